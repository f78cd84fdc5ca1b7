"""What is known of a model as a whole: sizes, special tokens, basis and identity; a part of `_model.py`."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from tl_tomsparse._checks import TomsparseError
from tl_tomsparse._model_identity import Basis, ModelIdentity, fingerprint
from tl_tomsparse._model_weights import Key, Weights

try:
    from transformer_lens import HookedTransformer
except ImportError:  # TransformerLens 4 has the bridge only
    HookedTransformer = None


class ModelFacts:
    """Facts about one model.

    Attributes:
        model: the `HookedTransformer` or `TransformerBridge`.
        n_layers, n_heads, n_kv_heads, d_model, d_head, d_mlp, n_ctx, d_vocab: sizes; d_mlp is 0 without a
            dense MLP.
        active_edits: edits that are in the weights now, innermost last.
    """

    n_kv_heads: int
    d_mlp: int

    def __init__(self, model: Any) -> None:
        _check_kind(model)
        self.model = model
        cfg = model.cfg
        self.n_layers: int = int(cfg.n_layers)
        self.n_heads: int = int(cfg.n_heads)
        self.d_model: int = int(cfg.d_model)
        self.d_head: int = int(cfg.d_head)
        self.n_ctx: int = _context_length(model)
        self.d_vocab: int = int(cfg.d_vocab)
        self.active_edits: list[Any] = []
        self._identity: tuple[dict[Key, tuple[int, int, int]], ModelIdentity] | None = None
        self._centred: tuple[tuple[int, int], bool] | None = None
        self._weights = Weights(model, self.name)

    @property
    def name(self) -> str:
        """The model's name without organisation or directory."""
        return str(self.model.cfg.model_name).rstrip("/").split("/")[-1]

    @property
    def device(self) -> torch.device:
        """Where the first weight lies; inputs belong there."""
        return self._weights.parameter(self._weights.readable[0]).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self._weights.parameter(self._weights.readable[0]).dtype

    @property
    def tokenizer(self) -> Any:
        """The Hugging Face tokenizer, or None."""
        return self.model.tokenizer

    @property
    def bos_token_id(self) -> int | None:
        """The id of the beginning-of-sequence token, or None.

        TransformerLens gives a tokenizer without one its end-of-sequence token, and where there is none
        either, a new token, which the model has never read and may have no embedding for.
        """
        given = getattr(self.tokenizer, "init_kwargs", {})
        same = getattr(self.tokenizer, "bos_token", None) == getattr(self.tokenizer, "eos_token", None)
        if same and given.get("bos_token") is None and given.get("eos_token") is None:
            return None
        return self._token_id("bos")

    @property
    def pad_token_id(self) -> int:
        """An id to fill up rows with; never attended to, so any will do."""
        return next((token for name in ("pad", "eos") if (token := self._token_id(name)) is not None), 0)

    @property
    def basis(self) -> Basis:
        """Whether norms are folded or weights centred ("processed") or neither ("raw")."""
        if str(self.model.cfg.normalization_type).endswith("Pre"):
            return "processed"
        if getattr(self.model, "_weights_processed", False):
            return "processed"
        # Centring leaves no flag, but rows of the embedding with mean zero; no training does that.
        embedding = self.model.W_E.detach()
        stamp = (embedding.data_ptr(), embedding._version)
        if self._centred is None or self._centred[0] != stamp:
            rows = embedding[: self.d_vocab]
            rounding = max(1e-6, torch.finfo(rows.dtype).eps / 2)
            centred = bool((rows.float().mean(-1).abs().max() < rounding * rows.float().std()).item())
            self._centred = stamp, centred
        return "processed" if self._centred[1] else "raw"

    def identity(self) -> ModelIdentity:
        """What these weights are; computed once, and again when a weight was replaced or written to.

        While an edit is in the weights, this is the identity of the unedited weights. What is written through
        `parameter.data` is not seen, since PyTorch does not count it.
        """
        if self._identity is not None and self.active_edits:
            return self._identity[1]
        stamp = self._stamp()
        if self._identity is None or self._identity[0] != stamp:
            self._identity = (
                stamp,
                ModelIdentity(
                    name=self.name,
                    fingerprint=fingerprint(self._named()),
                    basis=self.basis,
                    transformer_lens=version("transformer-lens"),
                    n_layers=self.n_layers,
                    n_heads=self.n_heads,
                    n_kv_heads=self.n_kv_heads,
                    d_model=self.d_model,
                    d_head=self.d_head,
                    d_mlp=self.d_mlp,
                ),
            )
        return self._identity[1]

    def edited(self) -> str | None:
        """While edits are in the weights, a fingerprint of the edited weights; otherwise None."""
        return fingerprint(self._named()) if self.active_edits else None

    def _token_id(self, name: str) -> int | None:
        """The id of a special token if the embedding has a row for it."""
        token = getattr(self.tokenizer, f"{name}_token_id", None)
        return int(token) if token is not None and int(token) < self.d_vocab else None

    def _stamp(self) -> dict[Key, tuple[int, int, int]]:
        weights = {key: self._weights.parameter(key) for key in self._weights.readable}
        return {key: (id(w), w.data_ptr(), w._version) for key, w in weights.items()}

    def _named(self) -> Iterator[tuple[str, Tensor]]:
        """What the fingerprint is of."""
        for layer, matrix in self._weights.readable:
            yield f"{layer}.{matrix}", self._weights[layer, matrix]
        yield "E", self.model.W_E.detach()
        yield "U", self.model.W_U.detach()


def _context_length(model: Any) -> int:
    """The smallest context length that is stated: for some models (MPT) TransformerLens has a larger one."""
    config = getattr(getattr(model, "original_model", None), "config", None)
    stated = [
        getattr(config, name, None) for name in ("max_position_embeddings", "n_positions", "max_seq_len")
    ]
    return min(int(n) for n in (model.cfg.n_ctx, *stated) if isinstance(n, int) and n > 0)


def _check_kind(model: Any) -> None:
    kinds = (TransformerBridge,) if HookedTransformer is None else (TransformerBridge, HookedTransformer)
    if not isinstance(model, kinds):
        raise TomsparseError(
            f"The model is a {type(model).__name__}; pass a TransformerBridge or a HookedTransformer "
            "of TransformerLens, with its weights in this process, for example load_model(name)."
        )
    config = getattr(getattr(model, "original_model", None), "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise TomsparseError(
            f"{model.cfg.model_name} is an encoder-decoder; only decoder-only language models are supported."
        )
