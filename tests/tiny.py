"""Tiny random models and a tiny tokenizer, written to a directory and loaded from it; nothing is downloaded.

Weights, biases and normalisation scales are all random and far from their usual initial values, so that a
forgotten bias or scale changes numbers that the tests look at.
"""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from tl_tomsparse._model import HookedTransformer
from tl_tomsparse.models import Backend, load_model
from tl_tomsparse.stories.story import Question, Story

KINDS = ("llama", "qwen2", "neox")
BACKENDS: tuple[Backend, ...] = ("bridge", "hooked") if HookedTransformer is not None else ("bridge",)
N_CTX = 128

CORPUS = (
    "Sally puts the ball in the basket. Sally leaves the kitchen. Anna moves the ball to the box.",
    "Sally comes back. Sally will look for the ball in the basket. The ball is in the box.",
    "At first the ball was in the basket. Anna thinks that Sally will look for the ball in the box.",
    "Ben finds a bag with the label sweets. There are coins in the bag. Ben has not looked inside the bag.",
    "Ben thinks that the bag is full of sweets.",
)


@functools.cache
def folder() -> Path:
    """One temporary directory for everything built here; removed when the interpreter ends."""
    folder.keep = tempfile.TemporaryDirectory(prefix="tiny-models-")  # type: ignore[attr-defined]
    return Path(folder.keep.name)  # type: ignore[attr-defined]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on a few lines: common words are one token, and every text has tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<pad>", "<bos>", "<eos>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=380, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )


def config(kind: str, d_vocab: int, n_layers: int) -> PreTrainedConfig:
    """The configuration of a tiny model of one kind."""
    common: dict[str, Any] = {
        "vocab_size": d_vocab,
        "hidden_size": 32,
        "num_hidden_layers": n_layers,
        "num_attention_heads": 4,
        "max_position_embeddings": N_CTX,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if kind == "llama":  # grouped-query attention, no biases
        return LlamaConfig(
            **common, intermediate_size=48, num_key_value_heads=2, architectures=["LlamaForCausalLM"]
        )
    if kind == "qwen2":  # grouped-query attention, biases on Q, K, V
        return Qwen2Config(
            **common, intermediate_size=40, num_key_value_heads=1, architectures=["Qwen2ForCausalLM"]
        )
    if kind == "neox":  # fused QKV, partial rotary, LayerNorm with biases, parallel MLP without gate
        return GPTNeoXConfig(
            **common, intermediate_size=56, rotary_pct=0.5, architectures=["GPTNeoXForCausalLM"]
        )
    raise ValueError(kind)


@functools.cache
def directory(kind: str = "llama", *, n_layers: int = 2, seed: int = 0) -> Path:
    """A Hugging Face directory with a random model of one kind and the tiny tokenizer."""
    path = folder() / f"{kind}-{n_layers}-{seed}"
    tokenizer = build_tokenizer()
    hf = AutoModelForCausalLM.from_config(config(kind, len(tokenizer), n_layers))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.3 * noise)
            elif parameter.ndim == 1:
                parameter.copy_(0.3 * noise)
            elif "embed" in name:
                parameter.copy_(noise)
            else:
                parameter.copy_(1.5 * noise / parameter.shape[1] ** 0.5)
    hf.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def model(
    kind: str = "llama",
    backend: Backend = "bridge",
    *,
    dtype: torch.dtype = torch.float32,
    n_layers: int = 2,
    seed: int = 0,
) -> Any:
    """A fresh tiny model; the same kind, layers and seed have the same weights on every backend."""
    path = directory(kind, n_layers=n_layers, seed=seed)
    return load_model(path, backend=backend, device="cpu", dtype=dtype)


def hf_model(
    kind: str = "llama", *, dtype: torch.dtype = torch.float64, n_layers: int = 2, seed: int = 0
) -> Any:
    """The same weights as plain `transformers`, without TransformerLens: what oracles are computed from."""
    path = directory(kind, n_layers=n_layers, seed=seed)
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="eager").eval()


def story(index: int = 0) -> Story:
    """A false-belief story written by hand, with a question of every category."""
    name, other = ("Sally", "Anna") if index % 2 == 0 else ("Anna", "Ben")
    thing = ("ball", "coins", "sweets")[index % 3]
    first, last = ("basket", "box") if index % 4 < 2 else ("box", "bag")
    text = (
        f"{name} puts the {thing} in the {first}. {name} leaves the kitchen. "
        f"{other} moves the {thing} to the {last}. {name} comes back."
    )

    options = (first, last) if index % 2 == 0 else (last, first)
    look = f"{name} will look for the {thing} in the"
    questions = (
        Question("belief", (name,), look, "completion", first, options, False),
        Question("belief", (other,), look.replace(name, other), "completion", last, options, True),
        Question("belief", (other, name), f"{other} thinks that {look}", "completion", first, options, True),
        Question("reality", (), f"The {thing} is in the", "completion", last, options),
        Question("memory", (), f"At first the {thing} was in the", "completion", first, options),
    )
    return Story(
        id=f"s{index}",
        scenario="transfer",
        condition="false_belief",
        protagonist=name,
        split="test",
        wording="seen",
        text=text,
        agents=(name, other),
        questions=questions,
    )


@functools.cache
def long_directory(kind: str = "llama") -> Path:
    """The model of `directory`, with a context that generated stories fit into."""
    path = folder() / f"{kind}-long"
    shutil.copytree(directory(kind), path)
    settings = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**settings, "max_position_embeddings": 1024}))
    return path
