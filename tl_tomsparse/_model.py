"""The only door to TransformerLens' insides: one small view of `HookedTransformer` and `TransformerBridge`.

Every matrix is meant as `y = x W + b` with `W` in canonical orientation: Q, K, V `[heads, d_model, d_head]`
(key-value heads not expanded), O `[heads, d_head, d_model]`, gate and in `[d_model, d_mlp]`, out `[d_mlp,
d_model]`. A [`ModelView`][] finds, for each layer and matrix, the live weight and the two hook points where
`x` and `y` are seen, and **checks by one forward pass that `y - x W` is constant over positions**. What does
not pass is not offered, with the reason. Architectures are not recognised by name, and nothing is claimed
about matrices outside these seven (experts, embeddings, norms).

Other modules import from here. The work is in `_model_weights` (where weights lie, how they are oriented),
`_model_sites` (where inputs and outputs are seen), `_model_rotary` (how queries and keys are turned by their
position), `_model_reader` (logits at chosen positions), `_model_prefix` (passes that begin in the middle) and
`_model_identity` (what the weights are); of the package, only these know what TransformerLens looks like.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from importlib.metadata import version
from itertools import chain
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge

from tl_tomsparse._checks import TomsparseError, check_choice
from tl_tomsparse._model_identity import Basis, ModelIdentity, as_bits, fingerprint
from tl_tomsparse._model_prefix import SharedPrefix
from tl_tomsparse._model_reader import Reader
from tl_tomsparse._model_rotary import Rotation, find_rotations
from tl_tomsparse._model_sites import Sites, apply_matrix
from tl_tomsparse._model_weights import MATRICES, Key, MatrixName, Weights

try:
    from transformer_lens import HookedTransformer
except ImportError:  # TransformerLens 4 has the bridge only
    HookedTransformer = None

__all__ = [
    "MATRICES",
    "Hook",
    "HookedTransformer",
    "Key",
    "MatrixName",
    "ModelIdentity",
    "ModelView",
    "Reader",
    "Rotation",
    "SharedPrefix",
    "apply_matrix",
    "as_bits",
    "view",
]

Hook = tuple[str, Callable[..., Any]]


def view(model: Any) -> ModelView:
    """The view of a model; made once, and again when its weights were processed since.

    Raises:
        TomsparseError: the model is of a kind that is not supported; the message says why.
    """
    cached = vars(model).get("_tomsparse_view") if isinstance(model, nn.Module) else None
    if isinstance(cached, ModelView) and cached.is_current(model):
        return cached
    made = ModelView(model)
    object.__setattr__(model, "_tomsparse_view", made)
    return made


class ModelView:
    """Live weights and hook points of one model; see the module docstring. Use [`view`][], which caches.

    Attributes:
        model: the `HookedTransformer` or `TransformerBridge`.
        n_layers, n_heads, n_kv_heads, d_model, d_head, d_mlp, n_ctx, d_vocab: sizes; d_mlp is 0 without a
            dense MLP.
        matrices: the names available in at least one layer.
        missing: for each other name, why it is not available.
        active_edits: edits that are in the weights now, innermost last.
    """

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
        self._hook_names = frozenset(model.hook_dict)
        self._identity: tuple[dict[Key, tuple[int, int, int]], ModelIdentity] | None = None
        self._centred: tuple[tuple[int, int], bool] | None = None
        self._rotations: tuple[dict[int, Rotation], dict[int, str]] | None = None

        self._weights = Weights(model, self.name)
        self._sites = Sites(self, self._weights.readable)
        if not self._sites.pairs:
            why = "; ".join(dict.fromkeys(self._sites.reasons.values()))
            raise TomsparseError(f"{self.name} cannot be examined: {why}.")
        shapes = {matrix: self.shape((layer, matrix)) for layer, matrix in self._sites.pairs}
        self.n_kv_heads: int = shapes.get("K", (self.n_heads,))[0]
        self.d_mlp: int = shapes["in"][1] if "in" in shapes else 0
        present = {matrix for _, matrix in self._sites.pairs}
        reasons = self._weights.reasons | self._sites.reasons
        self.matrices: tuple[MatrixName, ...] = tuple(m for m in MATRICES if m in present)
        self.missing = {m: reasons.get(m, "the model has none") for m in MATRICES if m not in present}
        self._made_for = self._signature(model)

    # ---- facts

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

    # ---- matrices

    def keys(self, matrices: Collection[str]) -> list[Key]:
        """The (layer, matrix) pairs of these matrices, layer by layer.

        Raises:
            TomsparseError: an unknown name, none at all, or one that this model does not offer.
        """
        if isinstance(matrices, str):
            matrices = (matrices,)
        if not matrices:
            raise TomsparseError(f"matrices is empty; choose some of {', '.join(self.matrices)}.")
        for matrix in matrices:
            check_choice("matrices", matrix, MATRICES)
            if matrix in self.missing:
                raise TomsparseError(
                    f"{self.name} does not offer matrix {matrix!r}: {self.missing[matrix]}. "
                    f"It offers {', '.join(self.matrices)}."
                )
        return [key for key in self._sites.pairs if key[1] in matrices]

    def shape(self, key: Key) -> tuple[int, ...]:
        """The canonical shape of a matrix."""
        return tuple(self.weight(key).shape)

    def weight(self, key: Key) -> Tensor:
        """The live matrix in canonical orientation: a detached view; writing to it changes the model."""
        return self._weights[key]

    def gradients(self, keys: Sequence[Key], loss: Callable[[], Tensor]) -> list[Tensor]:
        """Plain gradients of `loss()` with respect to matrices, in canonical orientation, also of a model
        whose parameters are frozen.
        """
        parameters = [self._weights.parameter(key) for key in keys]
        frozen = [parameter for parameter in parameters if not parameter.requires_grad]
        try:
            for parameter in frozen:
                parameter.requires_grad_(True)
            with torch.enable_grad():
                found = torch.autograd.grad(loss(), parameters)
        finally:
            for parameter in frozen:
                parameter.requires_grad_(False)
        return [self._weights.oriented(key, grad) for key, grad in zip(keys, found)]

    def overwrite(self, key: Key, place: tuple[Tensor, ...], values: Tensor) -> None:
        """Write to entries of a live matrix, for an edit in `active_edits` that will put the old bits back.

        Args:
            key: of the matrix.
            place: one index tensor for each canonical axis.
            values: of these entries, in the dtype of the matrix.
        """
        weight = self.weight(key)
        weight[tuple(axis.to(weight.device) for axis in place)] = values.to(weight)
        if self._identity is not None:
            # Our own write moves the version counter by one; anyone else's still means a new fingerprint.
            owner, data, count = self._identity[0][key]
            self._identity[0][key] = (owner, data, count + 1)

    def parameters(self) -> list[Tensor]:
        """Every distinct parameter and buffer once, detached; other names of the same weight are left out."""
        model = self.model
        found: dict[tuple[int, int, torch.Size], Tensor] = {}
        for tensor in chain(model.parameters(), nn.Module.parameters(model), model.buffers()):
            if tensor.numel():
                found.setdefault((tensor.data_ptr(), tensor.storage_offset(), tensor.shape), tensor.detach())
        return list(found.values())

    @property
    def rotations(self) -> tuple[dict[int, Rotation], dict[int, str]]:
        """How each layer turns queries and keys by their position, checked on its activations; and for each
        other layer with attention why nothing is offered. Found once, on the unedited model.
        """
        if self._rotations is not None:
            return self._rotations
        found = find_rotations(self)
        if not self.active_edits:  # an edit may hide a rotation, for as long as it lasts
            self._rotations = found
        return found

    def rotated_hooks(self, layers: Collection[int], store: Callable[[int, str, Tensor], None]) -> list[Hook]:
        """Forward hooks that hand over queries and keys after the rotation.

        Args:
            layers: with a rotation.
            store: called as `store(layer, "q" or "k", value)`, first for the query, once each a forward pass;
                q is `[batch, pos, n_heads, d_head]`, k `[batch, pos, n_kv_heads, d_head]`. Rows must begin at
                position 0: right-padded, without a key-value cache.
        """

        def hand_over(value: Tensor, hook: Any, *, layer: int, part: str) -> None:
            del hook  # the bridge passes another name of the same point
            rotation = self.rotations[0][layer]
            if not rotation.shown_rotated:
                positions = torch.arange(value.shape[1], device=value.device)
                value = rotation.turn(value, positions[None].expand(value.shape[:2]))
            store(layer, part, value)

        return [
            (name, partial(hand_over, layer=layer, part=part))
            for layer in layers
            for part, name in zip("qk", self.rotations[0][layer].sites)
        ]

    def pattern_hooks(self, store: Callable[[int, Tensor], None]) -> list[Hook]:
        """Forward hooks that call `store(layer, pattern)` with each attention pattern, `[batch, n_heads,
        query, key]`, after softmax; layers without one are left out.
        """

        def hand_over(value: Tensor, hook: Any, *, layer: int) -> None:
            del hook
            store(layer, value)

        names = {layer: f"blocks.{layer}.attn.hook_pattern" for layer in range(self.n_layers)}
        return [
            (name, partial(hand_over, layer=layer))
            for layer, name in names.items()
            if name in self._hook_names
        ]

    # ---- hooks and forward passes

    @property
    def heads(self) -> list[tuple[int, int]]:
        """Every attention head as (layer, head), layer by layer.

        Raises:
            TomsparseError: the heads' outputs cannot be seen.
        """
        return [(layer, head) for layer, _ in self.keys("O") for head in range(self.n_heads)]

    def head_hook(self, layer: int) -> str:
        """The hook point where head outputs z `[batch, pos, n_heads, d_head]` are read and replaced.

        It was checked that they are the input of O's product.
        """
        return self._sites.pairs[layer, "O"][0]

    def output_hook(self, key: Key) -> str:
        """The hook point of a matrix's output, where it can be read and replaced.

        Q `[batch, pos, n_heads, d_head]`, K and V `[batch, pos, n_kv_heads, d_head]`, O and out `[batch, pos,
        d_model]`, gate and in `[batch, pos, d_mlp]`. The `hook.name` that a hook receives there may be
        another name of the same point.
        """
        return self._sites.pairs[key][1]

    def input_hooks(
        self, keys: Collection[Key], store: Callable[[tuple[Key, ...], Tensor], None]
    ) -> list[Hook]:
        """Forward hooks that hand over the exact input of each matrix's product, with its graph.

        Args:
            keys: of the matrices.
            store: called as `store(keys, x)` for each group of keys with one common input (Q, K and V of a
                layer; gate and in). x is `[batch, pos, d_model]`, for O `[batch, pos, n_heads, d_head]`, for
                out `[batch, pos, d_mlp]`. It is always called before the outputs of these keys are seen; up
                to three times a forward on `HookedTransformer`.
        """
        groups: dict[str, list[Key]] = {}
        for key in keys:
            groups.setdefault(self._sites.pairs[key][0], []).append(key)

        def capture(x: Tensor, hook: Any, *, name: str, group: tuple[Key, ...]) -> None:
            del hook  # the bridge passes another name of the same point
            x = self._sites.as_input(name, x)
            if x.ndim != (4 if group[0][1] == "O" else 3):
                raise TomsparseError(
                    f"{name} has shape {tuple(x.shape)}; turn off use_split_qkv_input, use_attn_in and "
                    "use_attn_result."
                )
            store(group, x)

        return [(name, partial(capture, name=name, group=tuple(group))) for name, group in groups.items()]

    def hooks(self, fwd: Sequence[Hook] = (), bwd: Sequence[Hook] = ()) -> AbstractContextManager[Any]:
        """`model.hooks` for the time of a block; refuses names that the model does not have instead of
        ignoring them."""
        for name, _ in (*fwd, *bwd):
            if name not in self._hook_names:
                raise TomsparseError(f"{self.name} has no hook point {name!r}.")
        hooks = self.model.hooks(fwd_hooks=list(fwd), bwd_hooks=list(bwd))
        return cast("AbstractContextManager[Any]", hooks)

    def logits(
        self,
        tokens: Int[Tensor, "batch pos"],
        attention: Bool[Tensor, "batch pos"] | Bool[Tensor, "batch query key"],
        positions: Int[Tensor, "batch pos"] | None = None,
    ) -> Float[Tensor, "rows read d_vocab"]:
        """Logits at every position; where a [`Reader`][] is at work, `[1, reads, d_vocab]`.

        Args:
            tokens: right-padded rows; or *packed* ones, which hold several continuations of one beginning.
            attention: True at real tokens; of packed rows, True where a query may look at a key. Not every
                model obeys a mask of the second kind (`HookedTransformer` does not).
            positions: of each token in its own continuation; needed for packed rows.
        """
        device = self.device
        if positions is None:
            options = {"attention_mask": attention.to(device=device, dtype=torch.long)}
        else:
            mask = attention[:, None].to(device)
            options = {"attention_mask": mask, "position_ids": positions.to(device)}
        return cast(Tensor, self.model(tokens.to(device), return_type="logits", **options))

    @contextmanager
    def reader(self) -> Iterator[Reader]:
        """For the time of a block a function that gives logits at chosen positions; see [`Reader`][]."""
        reader = Reader(self)
        with self.hooks([*reader.before, *reader.after]):
            yield reader

    @property
    def before_unembedding(self) -> str | None:
        """The hook point whose positions the unembedding sees; None where others look at its output."""
        out = self.model.hook_dict.get("unembed.hook_out")
        if out is not None and out.fwd_hooks:
            return None
        sites = ("unembed.hook_in", "ln_final.hook_normalized")
        return next((site for site in sites if site in self._hook_names), None)

    def last_layer_sites(self) -> list[tuple[str, str]]:
        """Input and output hook points of the position-wise parts of the last layer: O, and a dense MLP.

        Empty where other hooks are installed in that layer, which may rely on the shapes there.
        """
        layer = self.n_layers - 1
        points = self.model.hook_dict
        if any(points[name].fwd_hooks for name in self._hook_names if name.startswith(f"blocks.{layer}.")):
            return []
        pairs = self._sites.pairs
        sites = [pairs[layer, "O"]] if (layer, "O") in pairs else []
        if (layer, "in") in pairs and (layer, "out") in pairs:
            sites.append((pairs[layer, "in"][0], pairs[layer, "out"][1]))
        return sites

    # ---- refusals

    def require_eval(self) -> None:
        """Refuse a model in training mode, where dropout makes every pass another one."""
        if self.model.training:
            raise TomsparseError(f"{self.name} is in training mode; call model.eval() first.")

    def require_raw_basis(self, *, allow_processed: bool = False) -> None:
        """Refuse folded or centred weights unless they were asked for."""
        if self.basis == "processed" and not allow_processed:
            raise TomsparseError(
                f"{self.name} has processed weights (folded norms or centred weights), in which Q and K are "
                "other matrices than the model's own. Load it without processing (load_model, or "
                "from_pretrained_no_processing), or pass allow_processed=True to work in this basis."
            )

    def is_current(self, model: Any) -> bool:
        """Whether this view was made for this model object in its present form."""
        return self.model is model and self._made_for == self._signature(model)

    # ---- how it is found out

    def _signature(self, model: Any) -> tuple[Any, ...]:
        processed = getattr(model, "_weights_processed", None)
        return processed, model.cfg.normalization_type, self._weights.first_now()

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
            yield f"{layer}.{matrix}", self.weight((layer, matrix))
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
