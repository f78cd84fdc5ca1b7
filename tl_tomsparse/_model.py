"""The only door to TransformerLens' insides: one small view of `HookedTransformer` and `TransformerBridge`.

Every matrix is meant as `y = x W + b` with `W` in canonical orientation: Q, K, V `[heads, d_model, d_head]`
(key-value heads not expanded), O `[heads, d_head, d_model]`, gate and in `[d_model, d_mlp]`, out `[d_mlp,
d_model]`. A [`ModelView`][] finds, for each layer and matrix, the live weight and the two hook points where
`x` and `y` are seen, and **checks by one forward pass that `y - x W` is constant over positions**. What does
not pass is not offered, with the reason. Architectures are not recognised by name, and nothing is claimed
about matrices outside these seven (experts, embeddings, norms).

What is known of the model as a whole (sizes, tokens, identity) is in `_model_facts`.

Other modules import from here. The work is in `_model_weights` (where weights lie, how they are oriented),
`_model_sites` (where inputs and outputs are seen), `_model_rotary` (how queries and keys are turned by their
position), `_model_reader` (logits at chosen positions), `_model_prefix` (passes that begin in the middle) and
`_model_identity` (what the weights are); of the package, only these know what TransformerLens looks like.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from itertools import chain
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tl_tomsparse._checks import TomsparseError, check_choice
from tl_tomsparse._model_facts import HookedTransformer, ModelFacts
from tl_tomsparse._model_identity import ModelIdentity, as_bits
from tl_tomsparse._model_prefix import SharedPrefix
from tl_tomsparse._model_reader import Reader
from tl_tomsparse._model_rotary import LENGTH, NOTHING_TURNED, Rotation, find_rotations, same_rotation
from tl_tomsparse._model_sites import Sites, apply_matrix
from tl_tomsparse._model_weights import MATRICES, Key, MatrixName

__all__ = [
    "MATRICES",
    "NOTHING_TURNED",
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


class ModelView(ModelFacts):
    """Live weights and hook points of one model; see the module docstring. Use [`view`][], which caches.

    Attributes:
        matrices: the names available in at least one layer.
        missing: for each other name, why it is not available.
    """

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self._hook_names = frozenset(model.hook_dict)
        self._rotations: dict[int, tuple[dict[int, Rotation], dict[int, str]]] = {}
        self._sites = Sites(self, self._weights.readable)
        if not self._sites.pairs:
            why = "; ".join(dict.fromkeys(self._sites.reasons.values()))
            raise TomsparseError(f"{self.name} cannot be examined: {why}.")
        shapes = {matrix: self.shape((layer, matrix)) for layer, matrix in self._sites.pairs}
        self.n_kv_heads = shapes.get("K", (self.n_heads,))[0]
        self.d_mlp = shapes["in"][1] if "in" in shapes else 0
        present = {matrix for _, matrix in self._sites.pairs}
        reasons = self._weights.reasons | self._sites.reasons
        self.matrices: tuple[MatrixName, ...] = tuple(m for m in MATRICES if m in present)
        self.missing = {m: reasons.get(m, "the model has none") for m in MATRICES if m not in present}
        self._made_for = self._signature(model)

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

        Of rows of a few hundred tokens: some models (LongRoPE) turn longer ones by other frequencies.
        """
        return self._rotations_of(min(LENGTH, self.n_ctx))

    def rotations_at(self, lengths: Collection[int]) -> tuple[dict[int, Rotation], dict[int, str]]:
        """The same of rows of these lengths.

        Raises:
            TomsparseError: they are turned by different frequencies.
        """
        self.require_same_rotation(lengths)
        usual, longest = min(LENGTH, self.n_ctx), max(lengths)
        return self._rotations_of(usual if same_rotation(self.model, (usual, longest)) else longest)

    def require_same_rotation(self, lengths: Collection[int]) -> None:
        """Refuse rows together that would be turned by different frequencies each alone."""
        ends = (min(lengths), max(lengths))
        if not same_rotation(self.model, ends):
            low, high = ends
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (middle, high) if same_rotation(self.model, (low, middle)) else (low, middle)
            raise TomsparseError(
                f"Rows of {ends[0]} and of {ends[1]} tokens together: {self.name} chooses rotary frequencies "
                f"by the longest row, other ones from {high} tokens on, so the short rows would not be what "
                f"they are alone. Take rows of up to {low} tokens and longer ones apart."
            )

    def _rotations_of(self, length: int) -> tuple[dict[int, Rotation], dict[int, str]]:
        if length in self._rotations:
            return self._rotations[length]
        found = find_rotations(self, length)
        if not self.active_edits:  # an edit may hide a rotation, for as long as it lasts
            self._rotations[length] = found
        return found

    def rotated_hooks(
        self, rotations: Mapping[int, Rotation], store: Callable[[int, str, Tensor], None]
    ) -> list[Hook]:
        """Forward hooks that hand over queries and keys after the rotation.

        Args:
            rotations: of the layers that are asked for.
            store: called as `store(layer, "q" or "k", value)`, first for the query, once each a forward pass;
                q is `[batch, pos, n_heads, d_head]`, k `[batch, pos, n_kv_heads, d_head]`. Rows must begin at
                position 0: right-padded, without a key-value cache.
        """

        def hand_over(value: Tensor, hook: Any, *, layer: int, part: str) -> None:
            del hook  # the bridge passes another name of the same point
            value = value.unflatten(-1, (-1, self.d_head)) if value.ndim == 3 else value
            store(layer, part, rotations[layer].compared(value, part))

        return [
            (name, partial(hand_over, layer=layer, part=part))
            for layer, rotation in rotations.items()
            for part, name in zip("qk", rotation.sites)
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
            if copied := self._sites.copied_by(name):
                raise TomsparseError(
                    f"{self.name} copies {name} before its product, and hooks may change the copy; turn off "
                    f"{', '.join(copied)}."
                )
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
                model obeys a mask of the second kind (`HookedTransformer` does not). One of the first kind
                is not passed on: no token looks at the padding on its right, and under a mask padding that
                can look at nothing (in a short sliding window) becomes nan, which spreads.
            positions: of each token in its own continuation; needed for packed rows.
        """
        device = self.device
        if positions is None:
            options = {"attention_mask": torch.ones_like(tokens, device=device, dtype=torch.long)}
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

    # ---- refusals

    def require_eval(self) -> None:
        """Refuse a model in training mode, where dropout makes every pass another one."""
        if self.model.training:
            raise TomsparseError(f"{self.name} is in training mode; call model.eval() first.")

    def original(self) -> Any:
        """The `transformers` model that a bridge wraps, whose weights are the live ones."""
        original = getattr(self.model, "original_model", None)
        if original is None:
            raise TomsparseError(
                f"{self.name} is a {type(self.model).__name__}, without the transformers model that this "
                "needs; load it with load_model(..., backend='bridge')."
            )
        return original

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
