"""Where the input and the output of each product `y = x W` are seen; a part of `_model.py`.

    a pair of hook points belongs to W  if  y - x W is the same at every position (a bias), up to rounding

Pairs are tried by name, best first, and checked on one forward pass. So a name that means something else in
some model is noticed, and no architecture is recognised by its name.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from tl_tomsparse._checks import TomsparseError
from tl_tomsparse._model_weights import IN_ATTENTION, Key

if TYPE_CHECKING:
    from tl_tomsparse._model import ModelView

# Names on the bridge first, then on HookedTransformer; the residual stream is where no norm comes first.
_INPUTS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys("QKV", ("attn.hook_in", "ln1.hook_normalized", "hook_resid_pre")),
    "O": ("attn.o.hook_in", "attn.hook_z"),
    "gate": ("mlp.hook_in", "mlp.gate.hook_in", "ln2.hook_normalized", "hook_resid_mid"),
    "in": ("mlp.hook_in", "mlp.in.hook_in", "ln2.hook_normalized", "hook_resid_mid"),
    "out": ("mlp.out.hook_in", "mlp.hook_post"),
}
_OUTPUTS: dict[str, tuple[str, ...]] = {
    "Q": ("attn.q.hook_out", "attn.hook_q"),
    "K": ("attn.k.hook_out", "attn.hook_k"),
    "V": ("attn.v.hook_out", "attn.hook_v"),
    "O": ("attn.o.hook_out", "attn.hook_out", "hook_attn_out"),
    "gate": ("mlp.gate.hook_out", "mlp.hook_pre"),
    "in": ("mlp.in.hook_out", "mlp.hook_pre_linear", "mlp.hook_pre"),
    "out": ("mlp.out.hook_out", "mlp.hook_out", "hook_mlp_out"),
}
_NORMS = {"O": ("ln1_post", "ln1"), "out": ("ln2_post", "ln2")}  # what may follow a product
_COPIES = {  # settings of HookedTransformer with which users change a copy of the residual stream
    "hook_resid_pre": ("use_attn_in", "use_split_qkv_input"),
    "hook_resid_mid": ("use_hook_mlp_in",),
}
_EQUATION = {"O": "bphd,hdm->bpm"} | dict.fromkeys("QKV", "bpm,hmd->bphd")


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


class Sites:
    """The hook points of the matrices of one model.

    Attributes:
        pairs: for each key the hook points of its product's input and output; a matrix that lacks them in one
            layer is left out in all.
        reasons: for each matrix name that has none in a layer where it has a weight, why.
    """

    def __init__(self, model_view: ModelView, keys: Collection[Key]) -> None:
        self._model = model_view.model
        self._after_affine: dict[str, bool] = {}
        self.pairs: dict[Key, tuple[str, str]] = {}
        self.reasons: dict[str, str] = {}
        names = [
            f"blocks.{layer}.{site}"
            for layer, m in keys
            for site in (*_INPUTS[m], *_OUTPUTS[m], *_norm_outputs(m))
        ]
        seen = _activations(model_view, names)
        self._find_norm_order(seen)
        for layer, matrix in keys:
            weight = model_view.weight((layer, matrix))
            if matrix == "Q" and len(weight) != model_view.n_heads:
                self.reasons[matrix] = (
                    f"in layer {layer} its weight has outputs for {len(weight)} heads of {model_view.d_head} "
                    f"and the model has {model_view.n_heads}, so it is more than queries (a gate beside "
                    "them, or heads of another size)"
                )
                continue
            if matrix in ("gate", "in") and (layer, "out") in keys:
                needed, found = model_view.shape((layer, "out"))[0], weight.shape[1]
                if found != needed:
                    self.reasons[matrix] = (
                        f"in layer {layer} its weight has {found} outputs and the MLP {needed} hidden "
                        f"units, so it is more than the matrix {matrix!r} (a gate beside it)"
                    )
                    continue
            inputs = [f"blocks.{layer}.{site}" for site in _INPUTS[matrix]]
            outputs = [f"blocks.{layer}.{site}" for site in _OUTPUTS[matrix]]
            for x, y in ((x, y) for x in inputs for y in outputs if x in seen and y in seen):
                if _is_product(matrix, self.as_input(x, seen[x]), weight, seen[y]):
                    self.pairs[layer, matrix] = (x, y)
                    break
            else:
                norm = self._norm_that_follows(layer, matrix, seen)
                first = next(key for key in keys if key[1] == matrix)
                if matrix in IN_ATTENTION and weight.shape[0] != model_view.shape(first)[0]:
                    why = f"layers {first[0]} and {layer} have heads of other sizes, or other numbers of them"
                else:
                    what = f"in layer {layer} no hook point shows the product of its input and weight"
                    hooks = "(if hooks that change activations are installed, call model.reset_hooks() first)"
                    why = f"{what} before a norm that follows it ({norm})" if norm else f"{what} {hooks}"
                self.reasons.setdefault(matrix, why)
        # All layers that have a matrix, or none: a mask of some would pass for one of the whole model.
        self.pairs = {key: pair for key, pair in self.pairs.items() if key[1] not in self.reasons}

    def _norm_that_follows(self, layer: int, matrix: str, seen: dict[str, Tensor]) -> str | None:
        """The norm whose output is what the hook point of a matrix's output shows."""
        for site in _norm_outputs(matrix):
            normed = seen.get(f"blocks.{layer}.{site}")
            for y in (seen.get(f"blocks.{layer}.{output}") for output in _OUTPUTS[matrix]):
                if normed is not None and y is not None and normed.shape == y.shape:
                    value = self.as_input(f"blocks.{layer}.{site}", normed)
                    if torch.allclose(value.to(y.dtype), y, rtol=1e-3, atol=1e-5):
                        return site.removesuffix(".hook_normalized")
        return None

    def copied_by(self, name: str) -> list[str]:
        """The settings that are on, with which a product's input is a copy of what its hook point shows."""
        flags = _COPIES.get(name.rpartition(".")[2], ())
        return [flag for flag in flags if getattr(self._model.cfg, flag, False)]

    def as_input(self, name: str, value: Tensor) -> Tensor:
        """The input of a product from what its hook point shows.

        On `HookedTransformer` that is the output of a norm, which the hook may see before scale and shift.
        """
        if self._after_affine.get(name, True):
            return value
        norm = self._norm(name)
        value = value.to(norm.w.dtype) * norm.w
        return value + norm.b if "b" in norm._parameters else value

    def _norm(self, name: str) -> Any:
        return self._model.get_submodule(name.removesuffix(".hook_normalized"))

    def _find_norm_order(self, seen: dict[str, Tensor]) -> None:
        """Whether the hooks of norms see what comes after scale and shift: it depends on the version."""
        if isinstance(self._model, TransformerBridge):
            return
        for name, value in seen.items():
            if not name.endswith("hook_normalized") or "w" not in self._norm(name)._parameters:
                continue
            captured: list[Tensor] = []
            handle = self._norm(name).hook_normalized.register_forward_hook(
                lambda module, inputs, output, to=captured: to.append(output)
            )
            try:
                ramp = torch.linspace(-1, 2, value.shape[-1], device=value.device, dtype=value.dtype)
                output = self._norm(name)(ramp[None, None])
            finally:
                handle.remove()
            self._after_affine[name] = torch.allclose(output, captured[0].to(output.dtype), atol=1e-6)


def _norm_outputs(matrix: str) -> list[str]:
    return [f"{norm}.hook_normalized" for norm in _NORMS.get(matrix, ())]


def _activations(model_view: ModelView, names: Collection[str]) -> dict[str, Tensor]:
    """What the hook points of these names show in one forward pass; those that do not fire are left out."""
    seen: dict[str, Tensor] = {}

    def keep(value: Tensor, hook: Any, *, name: str) -> None:
        del hook  # the bridge passes another name of the same point
        seen[name] = value

    known = [name for name in dict.fromkeys(names) if name in model_view.model.hook_dict]
    hooks: list[tuple[str, Callable[..., Any]]] = [(name, partial(keep, name=name)) for name in known]
    tokens = (torch.arange(1, 8) * 5).remainder(model_view.d_vocab)[None, : model_view.n_ctx]
    try:
        with torch.no_grad(), model_view.hooks(hooks):
            model_view.logits(tokens, torch.ones_like(tokens, dtype=torch.bool))
    except RuntimeError as error:
        raise TomsparseError(
            f"{model_view.name} cannot be run in {model_view.dtype} ({error}). Load it in float32, or with "
            "load_model, which checks that it runs."
        ) from error
    return seen


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
