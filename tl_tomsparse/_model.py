"""The only file that knows TransformerLens' insides: one small view of `HookedTransformer` and
`TransformerBridge`.

Every matrix is meant as `y = x W + b` with `W` in canonical orientation: Q, K, V `[heads, d_model, d_head]`
(key-value heads not expanded), O `[heads, d_head, d_model]`, gate and in `[d_model, d_mlp]`, out `[d_mlp,
d_model]`. A [`ModelView`][] finds, for each layer and matrix, the live weight and the two hook points where
`x` and `y` are seen, and **checks by one forward pass that `y - x W` is constant over positions**. What does
not pass is not offered, with the reason. Architectures are not recognised by name, and nothing is claimed
about matrices outside these seven (experts, embeddings, norms).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from itertools import chain
from typing import Any, Literal, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge
from transformers.pytorch_utils import Conv1D

from tl_tomsparse._checks import TomsparseError, check_choice

try:
    from transformer_lens import HookedTransformer
except ImportError:  # TransformerLens 4 has the bridge only
    HookedTransformer = None

MatrixName = Literal["Q", "K", "V", "O", "gate", "in", "out"]
MATRICES: tuple[MatrixName, ...] = ("Q", "K", "V", "O", "gate", "in", "out")
Basis = Literal["raw", "processed"]
Key = tuple[int, str]
Hook = tuple[str, Callable[..., Any]]

_IN_ATTENTION = ("Q", "K", "V", "O")
_EQUATION = {"O": "bphd,hdm->bpm"} | dict.fromkeys("QKV", "bpm,hmd->bphd")

# Where x and y of each matrix are seen, best first: names on the bridge, then on HookedTransformer.
_INPUT_SITES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys("QKV", ("attn.hook_in", "ln1.hook_normalized")),
    "O": ("attn.o.hook_in", "attn.hook_z"),
    **dict.fromkeys(("gate", "in"), ("mlp.hook_in", "ln2.hook_normalized")),
    "out": ("mlp.out.hook_in", "mlp.hook_post"),
}
_OUTPUT_SITES: dict[str, tuple[str, ...]] = {
    "Q": ("attn.q.hook_out", "attn.hook_q"),
    "K": ("attn.k.hook_out", "attn.hook_k"),
    "V": ("attn.v.hook_out", "attn.hook_v"),
    "O": ("attn.o.hook_out", "attn.hook_out", "hook_attn_out"),
    "gate": ("mlp.gate.hook_out", "mlp.hook_pre"),
    "in": ("mlp.in.hook_out", "mlp.hook_pre_linear", "mlp.hook_pre"),
    "out": ("mlp.out.hook_out", "mlp.hook_out", "hook_mlp_out"),
}
_SAMPLE = 4096  # entries of each tensor that go into the fingerprint one by one


@dataclass(frozen=True)
class ModelIdentity:
    """What a sensitivity, mask or edit was made from.

    Attributes:
        name: the model's name without organisation or directory; says nothing about the weights.
        fingerprint: of the seven kinds of matrices, the embedding and the unembedding; the same on every
            device, and the same for `HookedTransformer` without weight processing and the bridge.
        basis: "raw" weights, or "processed" (folded norms, centred weights), where Q and K are different
            matrices.
        transformer_lens: the installed version; recorded, not compared.
        n_layers, n_heads, n_kv_heads, d_model, d_head, d_mlp: sizes; n_heads counts query heads.
    """

    name: str
    fingerprint: str
    basis: Basis
    transformer_lens: str
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_model: int
    d_head: int
    d_mlp: int

    def to_dict(self) -> dict[str, Any]:
        """The attributes as plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelIdentity:
        """The inverse of `to_dict`."""
        return cls(**values)

    def same_weights(self, other: ModelIdentity) -> bool:
        """Whether both mean the same weights in the same basis."""
        return (self.fingerprint, self.basis) == (other.fingerprint, other.basis)


def apply_matrix(matrix: str, x: Tensor, weight: Tensor) -> Tensor:
    """The product `x W` in the shapes of the hook points.

    Args:
        matrix: its name.
        x: `[batch, pos, d_model]`, for O `[batch, pos, heads, d_head]`, for out `[batch, pos, d_mlp]`.
        weight: canonical, or any tensor of that shape.

    Returns:
        For Q, K, V `[batch, pos, heads, d_head]`, for O and out `[batch, pos, d_model]`, for gate and in
        `[batch, pos, d_mlp]`.
    """
    return torch.einsum(_EQUATION.get(matrix, "bpm,mk->bpk"), x, weight)


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
        basis: "raw" or "processed" weights.
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
        self.n_ctx: int = int(cfg.n_ctx)
        self.d_vocab: int = int(cfg.d_vocab)
        self.active_edits: list[Any] = []
        self._hook_names = frozenset(model.hook_dict)
        self._sites: dict[Key, tuple[str, str]] = {}
        self._identity: tuple[dict[Key, tuple[int, int, int]], ModelIdentity] | None = None
        self._owners: dict[Key, tuple[nn.Module, str, bool]] = {}
        self._norm_after_affine: dict[str, bool] = {}

        reasons: dict[str, str] = {}
        self._readable = [key for key in self._all_keys() if self._is_readable(key, reasons)]
        if not any(matrix in _IN_ATTENTION for _, matrix in self._readable):
            why = "; ".join(dict.fromkeys(reasons.values()))
            raise TomsparseError(f"{self.name} has no attention matrices that can be addressed: {why}.")
        self._sizes()
        self.basis: Basis = self._find_basis()
        self._find_sites(reasons)
        present = {matrix for _, matrix in self._sites}
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
        return self.weight(self._readable[0]).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self.weight(self._readable[0]).dtype

    @property
    def tokenizer(self) -> Any:
        """The Hugging Face tokenizer, or None."""
        return self.model.tokenizer

    @property
    def bos_token_id(self) -> int | None:
        """The id of the beginning-of-sequence token, or None."""
        return getattr(self.tokenizer, "bos_token_id", None)

    @property
    def pad_token_id(self) -> int:
        """An id to fill up rows with; never attended to, so any will do."""
        for name in ("pad_token_id", "eos_token_id"):
            if (token := getattr(self.tokenizer, name, None)) is not None:
                return int(token)
        return 0

    def identity(self) -> ModelIdentity:
        """What these weights are; computed once, and again when a weight was replaced or written to.

        While an edit is in the weights, this is the identity of the unedited weights.
        """
        if self._identity is not None and self.active_edits:
            return self._identity[1]
        stamp = self._stamp()
        if self._identity is None or self._identity[0] != stamp:
            self._identity = (
                stamp,
                ModelIdentity(
                    name=self.name,
                    fingerprint=self._fingerprint(),
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
        return [key for key in self._sites if key[1] in matrices]

    def shape(self, key: Key) -> tuple[int, ...]:
        """The canonical shape of a matrix."""
        return tuple(self.weight(key).shape)

    def weight(self, key: Key) -> Tensor:
        """The live matrix in canonical orientation: a detached view; writing to it changes the model."""
        layer, matrix = key
        weight, in_first = self._parameter(layer, matrix)
        weight = weight.detach()
        if weight.ndim == 3:  # HookedTransformer's attention is canonical already
            return weight
        weight = weight if in_first else weight.T
        if matrix == "O":
            return weight.unflatten(0, (-1, self.d_head))
        return weight.unflatten(1, (-1, self.d_head)).transpose(0, 1) if matrix in "QKV" else weight

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

    # ---- hooks and forward passes

    def output_hook(self, key: Key) -> str:
        """The hook point of a matrix's output, where it can be read and replaced.

        Q `[batch, pos, n_heads, d_head]`, K and V `[batch, pos, n_kv_heads, d_head]`, O and out `[batch, pos,
        d_model]`, gate and in `[batch, pos, d_mlp]`. The `hook.name` that a hook receives there may be
        another name of the same point.
        """
        return self._sites[key][1]

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
            groups.setdefault(self._sites[key][0], []).append(key)

        def capture(x: Tensor, hook: Any, *, name: str, group: tuple[Key, ...]) -> None:
            del hook  # the bridge passes another name of the same point
            x = self._after_norm(name, x)
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
        self, tokens: Int[Tensor, "batch pos"], attention_mask: Bool[Tensor, "batch pos"]
    ) -> Float[Tensor, "rows read d_vocab"]:
        """Logits of right-padded rows."""
        device = self.device
        mask = attention_mask.to(device=device, dtype=torch.long)
        return cast(Tensor, self.model(tokens.to(device), return_type="logits", attention_mask=mask))

    @contextmanager
    def reader(self) -> Iterator[Reader]:
        """For the time of a block a function that gives logits at chosen positions; see [`Reader`][]."""
        reader = Reader(self)
        with self.hooks([*reader.before, *reader.after]):
            yield reader

    def packed_logits(
        self,
        tokens: Int[Tensor, "batch pos"],
        attention: Bool[Tensor, "batch query key"],
        positions: Int[Tensor, "batch pos"],
    ) -> Float[Tensor, "rows read d_vocab"]:
        """Logits of rows that hold several continuations of one beginning, each seeing only its own past.

        Not every model obeys a given mask and positions (`HookedTransformer` does not); see `logits`.

        Args:
            tokens: of all branches.
            attention: True where a query may look at a key.
            positions: of each token in its own branch.
        """
        device = self.device
        logits = self.model(
            tokens.to(device),
            return_type="logits",
            attention_mask=attention[:, None].to(device),
            position_ids=positions.to(device),
        )
        return cast(Tensor, logits)

    @contextmanager
    def only_positions(self, where: Bool[Tensor, "batch pos"]) -> Iterator[None]:
        """While active, `logits` gives `[1, n, d_vocab]`: only the n positions where `where` is True."""
        site = self.before_unembedding
        if site is None or bool(where.all()):
            yield
            return
        where = where.to(self.device)

        def select(x: Tensor, hook: Any) -> Tensor:
            del hook
            return x[where][None]

        with self.hooks([(site, select)]):
            yield

    @property
    def before_unembedding(self) -> str | None:
        """The hook point whose positions the unembedding sees, or None."""
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
        sites = []
        if (layer, "O") in self._sites:
            sites.append(self._sites[layer, "O"])
        if (layer, "in") in self._sites and (layer, "out") in self._sites:
            sites.append((self._sites[layer, "in"][0], self._sites[layer, "out"][1]))
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
        layer, matrix = self._readable[0]
        module, attribute, _ = self._find_owner(layer, matrix)
        owner = id(getattr(module, attribute))
        return (getattr(model, "_weights_processed", None), model.cfg.normalization_type, owner)

    def _all_keys(self) -> list[Key]:
        return [(layer, matrix) for layer in range(self.n_layers) for matrix in MATRICES]

    def _parameter(self, layer: int, matrix: str) -> tuple[Tensor, bool]:
        """The parameter that holds a matrix, and whether its first axis is the input."""
        found = self._owners.get((layer, matrix))
        if found is None:  # looked for once, because edits ask for many
            found = self._owners[layer, matrix] = self._find_owner(layer, matrix)
        module, attribute, in_first = found
        return getattr(module, attribute), in_first

    def _find_owner(self, layer: int, matrix: str) -> tuple[nn.Module, str, bool]:
        """The module and attribute of a matrix's parameter, and whether its first axis is the input."""
        part = "attn" if matrix in _IN_ATTENTION else "mlp"
        block = self.model.blocks[layer]
        if part not in block._modules:
            raise LookupError(f"layer {layer} has no {part}")
        owner = block._modules[part]
        if isinstance(self.model, TransformerBridge):
            linear = owner._modules.get(matrix.lower())
            component = getattr(linear, "original_component", None)
            if component is None:
                raise LookupError(f"its {part} has no {matrix} matrix of its own")
            if not isinstance(component, nn.Linear | Conv1D):
                raise LookupError(f"{matrix} is a {type(component).__name__}, not a plain linear layer")
            return component, "weight", isinstance(component, Conv1D)
        # With grouped-query attention W_K and W_V are expanded copies; the parameters have an underscore.
        for attribute in (f"_W_{matrix}", f"W_{matrix}"):
            if owner._parameters.get(attribute) is not None:
                return owner, attribute, True
        raise LookupError(f"its {part} has no {matrix} matrix of its own")

    def _is_readable(self, key: Key, reasons: dict[str, str]) -> bool:
        layer, matrix = key
        try:
            weight, _ = self._parameter(layer, matrix)
        except LookupError as error:
            reasons[matrix] = str(error)
            return False
        if not weight.is_floating_point() or weight.element_size() < 2:
            raise TomsparseError(
                f"{self.name} is quantised ({matrix} of layer {layer} is stored as {weight.dtype}); its "
                "weights cannot be read or edited one by one. Load it in float32, bfloat16 or float16."
            )
        if weight.device.type == "meta":
            raise TomsparseError(f"{self.name} has weights that are not loaded (device meta); load it whole.")
        return True

    def _sizes(self) -> None:
        shapes = {matrix: self.shape((layer, matrix)) for layer, matrix in self._readable}
        self.n_kv_heads = shapes.get("K", (self.n_heads,))[0]
        self.d_mlp = shapes["in"][1] if "in" in shapes else 0

    def _find_basis(self) -> Basis:
        cfg = self.model.cfg
        folded = str(cfg.normalization_type).endswith("Pre")
        folded = folded or getattr(self.model, "_weights_processed", False)
        # Centring leaves no flag, but rows of the embedding with mean zero; no training does that.
        embedding = self.model.W_E.detach()[: self.d_vocab]
        centred = bool((embedding.float().mean(-1).abs().max() < 1e-6 * embedding.float().std()).item())
        return "processed" if folded or centred else "raw"

    def _after_norm(self, name: str, x: Tensor) -> Tensor:
        """The output of HookedTransformer's norm from what its hook sees, which may be before scale and
        shift."""
        if not name.endswith("hook_normalized") or self._norm_after_affine.get(name, True):
            return x
        norm = self.model.get_submodule(name.removesuffix(".hook_normalized"))
        x = x.to(norm.w.dtype) * norm.w
        return x + norm.b if "b" in norm._parameters else x

    def _find_norm_order(self, seen: dict[str, Tensor]) -> None:
        for name, value in seen.items():
            if not name.endswith("hook_normalized") or isinstance(self.model, TransformerBridge):
                continue
            norm = self.model.get_submodule(name.removesuffix(".hook_normalized"))
            if "w" not in norm._parameters:
                continue
            captured: list[Tensor] = []
            handle = norm.hook_normalized.register_forward_hook(lambda m, i, o, c=captured: c.append(o))
            try:
                ramp = torch.linspace(-1, 2, value.shape[-1], device=value.device, dtype=value.dtype)
                output = norm(ramp[None, None])
            finally:
                handle.remove()
            self._norm_after_affine[name] = torch.allclose(output, captured[0].to(output.dtype), atol=1e-6)

    def _find_sites(self, reasons: dict[str, str]) -> None:
        """Chooses the hook points of each matrix by what one forward pass shows."""
        wanted: dict[str, None] = {}
        for layer, matrix in self._readable:
            for site in (*_INPUT_SITES[matrix], *_OUTPUT_SITES[matrix]):
                wanted[f"blocks.{layer}.{site}"] = None
        seen: dict[str, Tensor] = {}

        def keep(value: Tensor, hook: Any, *, name: str) -> None:
            del hook
            seen[name] = value

        hooks = [(name, partial(keep, name=name)) for name in wanted if name in self._hook_names]
        tokens = (torch.arange(1, 8) * 5).remainder(self.d_vocab)[None, : self.n_ctx]
        with torch.no_grad(), self.hooks(hooks):
            self.logits(tokens, torch.ones_like(tokens, dtype=torch.bool))
        self._find_norm_order(seen)
        for key in self._readable:
            layer, matrix = key
            inputs = [f"blocks.{layer}.{site}" for site in _INPUT_SITES[matrix]]
            outputs = [f"blocks.{layer}.{site}" for site in _OUTPUT_SITES[matrix]]
            pairs = ((x, y) for x in inputs for y in outputs if x in seen and y in seen)
            weight = self.weight(key)
            for x, y in pairs:
                if _is_product(matrix, self._after_norm(x, seen[x]), weight, seen[y]):
                    self._sites[key] = (x, y)
                    break
            else:
                reasons[matrix] = (
                    f"in layer {layer} no hook point shows the product of its input and weight (if hooks "
                    "that change activations are installed, call model.reset_hooks() first)"
                )
        if not self._sites:
            why = "; ".join(dict.fromkeys(reasons.values()))
            raise TomsparseError(f"{self.name} cannot be examined: {why}.")

    def _stamp(self) -> dict[Key, tuple[int, int, int]]:
        weights = ((key, self._parameter(*key)[0]) for key in self._readable)
        return {key: (id(w), w.data_ptr(), w._version) for key, w in weights}

    def _fingerprint(self) -> str:
        digest = hashlib.blake2b(digest_size=16)
        named: list[tuple[str, Tensor]] = [
            (f"{layer}.{m}", self.weight((layer, m))) for layer, m in self._readable
        ]
        named += [("E", self.model.W_E.detach()), ("U", self.model.W_U.detach())]
        for name, tensor in named:
            bits = tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])
            total = int(bits.sum(dtype=torch.int64).item())  # integer sums are the same in any order
            count = min(_SAMPLE, tensor.numel())
            flat = torch.arange(count, device=bits.device) * (tensor.numel() - 1) // max(count - 1, 1)
            sample = bits[torch.unravel_index(flat, bits.shape)].long().cpu().numpy()
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}{total}".encode() + sample.tobytes())
        return digest.hexdigest()


class Reader:
    """Logits at chosen positions, with less work than logits everywhere; made by `ModelView.reader`.

    The unembedding, and in the last layer O and the MLP, work on no other positions than those read from
    (per row as many as the row that needs most). What is read is unchanged; activations at other positions
    of the last layer are not those of a usual pass.

    Attributes:
        before: hooks to install first.
        after: hooks to install last; those in between see the narrowed tensors.
    """

    def __init__(self, model_view: ModelView) -> None:
        self._view = model_view
        sites = model_view.last_layer_sites()
        end = model_view.before_unembedding
        self.before: list[Hook] = [(first, self._take) for first, _ in sites]
        self.after: list[Hook] = [(last, self._put) for _, last in sites]
        self.after += [] if end is None else [(end, self._select)]
        self._where: Tensor | None = None
        self._narrow: Tensor | None = None
        self._shape = torch.Size()

    def __call__(
        self,
        tokens: Int[Tensor, "batch pos"],
        attention_mask: Bool[Tensor, "batch pos"],
        where: Bool[Tensor, "batch pos"],
    ) -> Float[Tensor, "reads d_vocab"]:
        """The logits where `where` is True, row by row.

        Args:
            tokens: right-padded rows.
            attention_mask: True at real tokens.
            where: positions to read from.
        """
        count = where.sum(1)
        most, device = int(count.max()), self._view.device
        if int(count.min()) < where.shape[1]:
            self._where = where.to(device)
        if 2 * most <= where.shape[1]:
            # Stable, so that within a row positions stay in order; rows that need fewer get others besides.
            self._narrow = torch.argsort(where.long(), dim=1, descending=True, stable=True)[:, :most].to(
                device
            )
        self._shape = where.shape
        try:
            logits = self._view.logits(tokens, attention_mask).flatten(0, 1)
        finally:
            narrowed, self._where, self._narrow = self._where, None, None
        return logits[narrowed.flatten()] if narrowed is not None and len(logits) == where.numel() else logits

    def _select(self, x: Tensor, hook: Any) -> Tensor | None:
        del hook
        return None if self._where is None else x[self._where][None]

    def _take(self, x: Tensor, hook: Any) -> Tensor | None:
        del hook
        if self._narrow is None:
            return None
        return x[torch.arange(len(x), device=x.device)[:, None], self._narrow]

    def _put(self, y: Tensor, hook: Any) -> Tensor | None:
        del hook
        if self._narrow is None:
            return None
        index = self._narrow[..., None].expand(y.shape)
        return y.new_zeros(*self._shape, y.shape[-1]).scatter(1, index, y)


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


def _is_product(matrix: str, x: Tensor, weight: Tensor, y: Tensor) -> bool:
    """Whether `y - x W` is the same at every position (a bias), up to rounding."""
    exact = torch.float64 if weight.dtype == torch.float64 else torch.float32
    try:
        rest = y.to(exact) - apply_matrix(matrix, x.to(exact), weight.to(exact))
    except RuntimeError:  # shapes that do not fit
        return False
    tolerance = 1e-3 if weight.element_size() >= 4 else 5e-2
    spread = (rest - rest.mean(1, keepdim=True)).norm()
    return bool((spread <= tolerance * (y.to(exact).norm() + 1e-12)).item())
