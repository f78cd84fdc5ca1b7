"""`load_model`: the embedded model, a local directory, or a name on the Hugging Face hub.

Models are loaded in evaluation mode with raw weights (no folded norms, no centring), eager attention, and
their tokenizer. What TransformerLens makes of a model is offered only if its logits are those of the
original; a model that has no matrices to edit is offered with a warning.
"""

from __future__ import annotations

import copy
import json
import os
import re
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from tl_tomsparse._checks import TomsparseError, check_choice
from tl_tomsparse._model import HookedTransformer
from tl_tomsparse.self_check import self_check

Backend = Literal["bridge", "hooked"]
EMBEDDED = Path(__file__).parent / "embedded"
EMBEDDED_NAME = "tomsparse-embedded"

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
)
_WEIGHT_PATTERNS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin")


def load_model(
    source: str | os.PathLike[str] | None = None,
    *,
    backend: Backend = "bridge",
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> Any:
    """A model with its tokenizer, ready for every function of this package.

    Args:
        source: None for the embedded model; a Hugging Face directory, which is never looked for elsewhere; or
            a hub name such as "EleutherAI/pythia-70m", from the local cache or the network.
        backend: "bridge" for a `TransformerBridge`, "hooked" for a `HookedTransformer` (TransformerLens 3.9
            only).
        device: by default the GPU if there is one, else the CPU.
        dtype: of the weights; half precision is slow on a CPU.

    Returns:
        `TransformerBridge` or `HookedTransformer`, in evaluation mode, weights not processed. A warning says
        so if `self_check(model, cheap=True)` finds a fault.

    Raises:
        TomsparseError: no such model or directory, something missing in it, no network, an architecture that
            the backend does not have, or a conversion that changes the logits.
    """
    check_choice("backend", backend, ("bridge", "hooked"))
    if backend == "hooked" and HookedTransformer is None:
        raise TomsparseError(
            'backend="hooked" needs HookedTransformer, which TransformerLens 4 no longer has; use '
            'backend="bridge", or install "transformer-lens>=3.9,<4".'
        )
    if not dtype.is_floating_point:
        raise TomsparseError(f"dtype={dtype} is not a floating-point type; use torch.float32.")
    where = _resolve_device(device)
    path, name = _resolve_source(source)
    hf, tokenizer = _load_hf(path, dtype)
    hf.to(where)
    make = _make_bridge if backend == "bridge" else _make_hooked
    tokens, expected = _logits_before(hf, path, where)
    try:
        model = make(hf, tokenizer, path, where, dtype).eval()
        _check_logits(model, tokens, expected, backend)
    except TomsparseError:
        raise
    except Exception as error:  # TransformerLens raises many kinds, depending on what it does not know
        raise TomsparseError(
            f"TransformerLens cannot make a {backend} model of {path} ({hf.config.model_type}): "
            f"{_first_line(error)}{_cure(error, backend, dtype)}"
        ) from error
    model.cfg.model_name = name
    report = self_check(model, cheap=True)
    if not report.ok:
        warnings.warn(
            f"The model is loaded, but what is found on it may be wrong or be refused: {report}", stacklevel=2
        )
    return model


def _resolve_device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        where = torch.device(device)
        torch.empty(0, device=where)
    except (RuntimeError, AssertionError) as error:
        raise TomsparseError(
            f"device={str(device)!r} cannot be used here: {_first_line(error)}; try 'cpu'."
        ) from error
    return where


def _resolve_source(source: str | os.PathLike[str] | None) -> tuple[str, str]:
    """The directory or hub name to load, and the name to give the model."""
    if source is None:
        if not (EMBEDDED / "config.json").exists():
            raise TomsparseError("This installation has no embedded model; pass a directory or a hub name.")
        return str(EMBEDDED), EMBEDDED_NAME
    text = os.fspath(source)
    path = Path(text).expanduser()
    if text and path.is_dir():
        _check_directory(path)
        return str(path), path.resolve().name
    if text and path.exists():
        raise TomsparseError(f"{text} is a file; pass the directory that holds config.json and the weights.")
    if not text or isinstance(source, os.PathLike) or text.startswith(("/", ".", "~")) or text.count("/") > 1:
        raise TomsparseError(f"There is no model directory {text!r}.")
    return text, text.rsplit("/", 1)[-1]


def _check_directory(path: Path) -> None:
    config = path / "config.json"
    try:
        json.loads(config.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise TomsparseError(f"{path} has no config.json; it is no Hugging Face model directory.") from None
    except (OSError, ValueError) as error:
        raise TomsparseError(f"{config} cannot be read: {_first_line(error)}") from error
    if not any(any(path.glob(pattern)) for pattern in _WEIGHT_PATTERNS):
        raise TomsparseError(f"{path} has no weights (model.safetensors); it is not a whole model directory.")
    if not any((path / name).exists() for name in _TOKENIZER_FILES):
        raise TomsparseError(
            f"{path} has no tokenizer (tokenizer.json); put it there with tokenizer.save_pretrained."
        )


def _load_hf(path: str, dtype: torch.dtype) -> tuple[Any, Any]:
    local = Path(path).is_dir()
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=local)
        if getattr(config, "is_encoder_decoder", False):
            raise TomsparseError(f"{path} is an encoder-decoder; a decoder-only model is needed.")
        if getattr(config, "quantization_config", None) is not None:
            raise TomsparseError(f"{path} is quantised: no single weight can be edited. Use the original.")
        tokenizer = _load_tokenizer(path, local)
        hf = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, attn_implementation="eager", local_files_only=local
        )
    except TomsparseError:
        raise
    except Exception as error:  # transformers raises many kinds here
        hint = "" if local else " If the name is right, check the network, or pass a local directory."
        raise TomsparseError(f"{path!r} cannot be loaded: {_first_line(error)}.{hint}") from error
    if not hf.config.architectures:
        hf.config.architectures = [type(hf).__name__]  # TransformerLens chooses its adapter by it
    return hf.eval(), tokenizer


def _load_tokenizer(path: str, local: bool) -> Any:
    """The tokenizer that was saved with the model.

    For some architectures, Qwen2 among them, `AutoTokenizer` takes the class of the published models, which
    splits words in its own way and adds a token, although the directory declares that `tokenizer.json` is
    all there is.
    """
    declared = get_tokenizer_config(path, local_files_only=local).get("tokenizer_class")
    if declared not in ("PreTrainedTokenizerFast", "TokenizersBackend"):
        return AutoTokenizer.from_pretrained(path, local_files_only=local)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path, local_files_only=local)
    if tokenizer.bos_token is None:
        return tokenizer
    # TransformerLens wants a tokenizer that puts BOS first, and reads one that does not again with
    # AutoTokenizer.
    return PreTrainedTokenizerFast.from_pretrained(path, local_files_only=local, add_bos_token=True)


def _make_bridge(hf: Any, tokenizer: Any, path: str, device: torch.device, dtype: torch.dtype) -> Any:
    return TransformerBridge.boot_transformers(
        path, hf_model=hf, tokenizer=tokenizer, device=str(device), dtype=dtype
    )


@torch.no_grad()
def _make_hooked(hf: Any, tokenizer: Any, path: str, device: torch.device, dtype: torch.dtype) -> Any:
    import transformer_lens.loading_from_pretrained as loading

    config = copy.deepcopy(hf.config)
    if not hasattr(config, "n_ctx"):  # older configs have it, and TransformerLens reads it of some
        config.n_ctx = getattr(config, "max_position_embeddings", None)
    # TransformerLens reads the architecture from the config of a directory, but guesses it from names that
    # contain "llama" or "gemma": a directory with a neutral name and nothing but the config avoids that.
    with tempfile.TemporaryDirectory(prefix="tomsparse-") as neutral:
        config.save_pretrained(neutral)
        cfg = loading.get_pretrained_model_config(
            neutral, hf_cfg=config.to_dict(), device=str(device), dtype=dtype, default_prepend_bos=False
        )
        state = loading.get_pretrained_state_dict(neutral, cfg, hf, dtype=dtype)
    # For some architectures TransformerLens has a context of its own, whatever the config says.
    cfg.n_ctx = min(cfg.n_ctx, getattr(hf.config, "max_position_embeddings", None) or cfg.n_ctx)
    state = {key: value.detach().clone() for key, value in state.items()}  # nothing shared with the original
    model = HookedTransformer(cfg, tokenizer, move_to_device=False)
    model.load_and_process_state_dict(
        state, fold_ln=False, center_writing_weights=False, center_unembed=False, fold_value_biases=False
    )
    model.to(device, print_details=False)
    return model


@torch.no_grad()
def _logits_before(hf: Any, path: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Some tokens and the original's logits for them, before TransformerLens works on it; a few tens of
    positions show wrong rotary angles.
    """
    if hf.dtype == torch.float64 and hasattr(hf, "set_experts_implementation"):
        hf.set_experts_implementation("eager")  # products of all experts at once exist up to float32 only
    config = hf.config.get_text_config()
    length = min(64, int(getattr(config, "max_position_embeddings", None) or 64))
    tokens = (torch.arange(length, device=device) * 7919).remainder(int(config.vocab_size))[None]
    try:
        return tokens, hf(tokens, use_cache=False).logits.float()
    except RuntimeError as error:
        cure = "" if hf.dtype == torch.float32 else "; load it with dtype=torch.float32"
        raise TomsparseError(
            f"{path} ({hf.config.model_type}) cannot be run in {hf.dtype} by transformers itself: "
            f"{_first_line(error)}{cure}."
        ) from error


@torch.no_grad()
def _check_logits(model: Any, tokens: Tensor, expected: Tensor, backend: Backend) -> None:
    """Refuse a conversion that changes the function, and a model in which what follows changes what was
    before, since rows are padded on the right: the row as it is, and with other tokens at its end.
    """
    short = max(1, tokens.shape[1] - 8)
    other = tokens.clone()
    other[:, short:] = tokens[:, :1]
    exact = model.cfg.dtype in (torch.float32, torch.float64)
    for row, n in ((tokens, tokens.shape[1]), (other, short)):
        found: Tensor = model(row, attention_mask=torch.ones_like(row), return_type="logits").float()
        apart = (found - expected)[:, :n].square().mean(-1).sqrt().max() / expected.std()
        if apart <= (1e-3 if exact else 0.1):
            continue
        if n < len(row[0]):
            raise TomsparseError(
                "This model is not causal: other tokens after a position change its logits (by "
                f"{float(apart):.2g} standard deviations). Only decoders can be examined."
            )
        cure = 'backend="bridge"' if backend == "hooked" else "another version of transformer-lens"
        raise TomsparseError(
            "TransformerLens computes other logits for this model under an attention mask than transformers "
            f"without one ({backend}: {float(apart):.2g} standard deviations apart at one position); use "
            f"{cure}."
        )


def _cure(error: Exception, backend: Backend, dtype: torch.dtype) -> str:
    """What may help where TransformerLens cannot make a model, as the rest of a sentence."""
    other = ' Use backend="bridge".' if backend == "hooked" else ""
    if isinstance(error, AttributeError) and isinstance(error.obj, PreTrainedConfig):
        return (
            f"; TransformerLens {version('transformer-lens')} reads {error.name!r} from the configuration, "
            f"where transformers {version('transformers')} no longer has it.{other}"
        )
    return f"{_in_float32(error, dtype)}.{other}"


def _in_float32(error: Exception, dtype: torch.dtype) -> str:
    """The advice to load in float32, where an error speaks of types of numbers."""
    about = re.search(r"dtype|scalar type|Half|BFloat16|Double|not implemented for", str(error))
    return "; load it with dtype=torch.float32" if about and dtype != torch.float32 else ""


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    if not text:
        return type(error).__name__
    if text[0].endswith(":") and len(text) > 1:  # a heading, of a list of weights that do not fit
        text[0] = f"{text[0]} {text[-1].strip()}"
    # TransformerLens lists all it knows; the first sentence says what is wrong.
    line = text[0] if len(text[0]) < 240 else text[0].partition(". ")[0][:240]
    return f"{type(error).__name__}: {line.rstrip('.')}"
