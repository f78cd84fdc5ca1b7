"""How each layer turns queries and keys by their position; a part of `_model.py`.

    z_m = x_i + 1j x_j,  (i, j) the m-th pair      rotated: z_m * exp(1j * position * theta_m)

Angular frequencies are taken from wherever the model keeps them, and **checked on the model's own
activations**, so no architecture and no scaling rule is known here. Where every token of a row is the same,
so is what enters each layer at every position; then the rotated query at position p is the one at position 0
turned by p theta. Where hook points of rotated queries never fire, the attention pattern is compared instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from tl_tomsparse._model import ModelView

LENGTH = 256  # of the rows that are looked at: long enough to tell slow frequencies apart


@dataclass(frozen=True, eq=False)
class Rotation:
    """The rotation of one layer.

    Attributes:
        frequencies: `[pairs]`, float64, radians a position, in the model's order.
        first, second: `[pairs]` the two dimensions of a head that each frequency turns.
        sites: hook points that show queries and keys.
        shown_rotated: whether they show them after the rotation (True) or before it.

    A factor on rotated queries and keys (yarn) is not part of it: turning back leaves it in.
    """

    frequencies: Tensor
    first: Tensor
    second: Tensor
    sites: tuple[str, str]
    shown_rotated: bool

    def turn(self, x: Tensor, positions: Tensor, *, back: bool = False) -> Tensor:
        """Rotate `x` `[..., pos, heads, d_head]` by its positions `[..., pos]`, or undo that.

        Computed in float64 and returned in the dtype of x.
        """
        angle = positions.to(torch.float64)[..., None, None] * self.frequencies.to(x.device)
        cos, sin = angle.cos(), angle.sin() * (-1.0 if back else 1.0)
        a, b = (x[..., axes.to(x.device)].to(torch.float64) for axes in (self.first, self.second))
        out = x.clone()
        out[..., self.first.to(x.device)] = (a * cos - b * sin).to(x.dtype)
        out[..., self.second.to(x.device)] = (b * cos + a * sin).to(x.dtype)
        return out


def find_rotations(model_view: ModelView) -> tuple[dict[int, Rotation], dict[int, str]]:
    """The rotation of each layer that has one, and for each other layer with attention why there is none."""
    model_view.require_eval()  # dropout would make every position another one
    length = min(LENGTH, model_view.n_ctx)
    same = torch.full((1, length), (2 * model_view.d_vocab) // 3)
    varied = ((torch.arange(length) * 7 + 3) % model_view.d_vocab)[None]
    names = ("hook_rot_q", "hook_rot_k", "hook_cos", "hook_sin")
    layers = sorted({layer for layer, matrix in model_view.keys(model_view.matrices) if matrix in "QK"})
    seen = _shown(model_view, same, [f"blocks.{layer}.attn.{name}" for layer in layers for name in names])
    more = ("hook_q", "hook_k", "hook_pattern")
    silent = [layer for layer in layers if f"blocks.{layer}.attn.hook_rot_q" not in seen]
    plain = _shown(model_view, varied, [f"blocks.{layer}.attn.{name}" for layer in silent for name in more])
    found, reasons = {}, {}
    for layer in layers:
        at = f"blocks.{layer}.attn."
        candidates = list(_candidates(model_view, layer, seen))
        if layer in silent:
            if not candidates:
                reasons[layer] = "it has no rotary frequencies"
                continue
            error_of: Callable[[Rotation], float] = partial(_error_of_pattern, plain, at)
            sites = (at + "hook_q", at + "hook_k")
        else:
            error_of = partial(_error_of_rotated, seen, at)
            sites = (at + "hook_rot_q", at + "hook_rot_k")
        tried = [
            Rotation(frequencies, *_pairs(len(frequencies), adjacent), sites, layer not in silent)
            for frequencies in (*candidates, torch.zeros(1, dtype=torch.float64))
            for adjacent in (False, True)
        ]
        errors = [error_of(rotation) for rotation in tried]
        best = min(range(len(tried)), key=errors.__getitem__)
        if not errors[best] < _tolerance(seen.get(at + "hook_rot_q", plain.get(at + "hook_q"))):
            reasons[layer] = "its queries and keys are not those that any of its frequencies predict"
        elif not tried[best].frequencies.any():
            reasons[layer] = "its queries are not rotated"
        else:
            found[layer] = tried[best]
    return found, reasons


def _pairs(n: int, adjacent: bool) -> tuple[Tensor, Tensor]:
    index = torch.arange(n)
    return (2 * index, 2 * index + 1) if adjacent else (index, index + n)


def _shown(model_view: ModelView, tokens: Tensor, names: list[str]) -> dict[str, Tensor]:
    """What the hook points of these names show; those that do not exist or fire are left out."""
    seen: dict[str, Tensor] = {}

    def keep(value: Tensor, hook: Any, *, name: str) -> None:
        del hook  # the bridge passes another name of the same point
        seen[name] = value.detach()

    hooks = [(name, partial(keep, name=name)) for name in names if name in model_view.model.hook_dict]
    with torch.no_grad(), model_view.hooks(hooks):
        model_view.logits(tokens, torch.ones_like(tokens, dtype=torch.bool))
    return seen


def _candidates(model_view: ModelView, layer: int, seen: dict[str, Tensor]) -> Iterator[Tensor]:
    """Frequencies that this layer may use, most exact first: buffers, then tables of sines and cosines."""
    model = model_view.model
    for name, buffer in nn.Module.named_buffers(model):
        if name.endswith("inv_freq") and buffer.ndim == 1:
            yield buffer.detach().double().cpu()
    attention = model.blocks[layer].attn
    tables = []
    if f"blocks.{layer}.attn.hook_cos" in seen:
        tables.append(tuple(seen[f"blocks.{layer}.attn.hook_{part}"].squeeze() for part in ("cos", "sin")))
    if hasattr(attention, "rotary_cos"):
        tables.append((attention.rotary_cos, attention.rotary_sin))
    joined = getattr(getattr(attention, "original_component", None), "embed_positions", None)
    if isinstance(joined, Tensor) and joined.ndim == 2:
        sin, cos = joined.chunk(2, -1)
        tables.append((cos.repeat(1, 2), sin.repeat(1, 2)))
    for cos, sin in tables:
        theta = torch.atan2(sin[1].detach().double().cpu(), cos[1].detach().double().cpu())
        yield theta[: len(theta) // 2]
        yield theta[::2]


def _tolerance(value: Tensor | None) -> float:
    return 1e-3 if value is not None and value.element_size() >= 4 else 5e-2


def _error_of_rotated(seen: dict[str, Tensor], at: str, rotation: Rotation) -> float:
    """How far queries and keys are from the first position's, turned: relative to the norm of each pair, so
    that large slow pairs, which hardly turn, do not hide the others; a mean over heads and dimensions.
    """
    worst = 0.0
    for name in ("hook_rot_q", "hook_rot_k"):
        rotated = seen[at + name].cpu().double()
        if 2 * len(rotation.frequencies) > rotated.shape[-1]:
            return float("inf")
        positions = torch.arange(rotated.shape[1])[None]
        predicted = rotation.turn(rotated[:, :1].expand_as(rotated), positions)
        power = rotated.square().sum((0, 1))
        first, second = rotation.first, rotation.second
        power[:, first] = power[:, second] = power[:, first] + power[:, second]
        error = (predicted - rotated).square().sum((0, 1))
        there = power > 0
        worst = max(worst, float((error[there] / power[there]).sqrt().mean()) if there.any() else 0.0)
    return worst


def _error_of_pattern(plain: dict[str, Tensor], at: str, rotation: Rotation) -> float:
    """How far the attention pattern is from the softmax of the products of turned queries and keys, turned
    and other dimensions each times whatever one factor explains it best: scales differ, and long-context
    rotations have a factor of their own.
    """
    q, k, pattern = (plain.get(at + name) for name in ("hook_q", "hook_k", "hook_pattern"))
    if q is None or k is None or pattern is None or 2 * len(rotation.frequencies) > q.shape[-1]:
        return float("inf")
    positions = torch.arange(q.shape[1])[None]
    q, k = (rotation.turn(x.cpu().double(), positions) for x in (q, k))
    k = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
    turned = torch.zeros(q.shape[-1], dtype=torch.bool)
    turned[rotation.first] = turned[rotation.second] = True
    scores = torch.stack([torch.einsum("bqhd,bkhd->bhqk", q * part, k) for part in (turned, ~turned)])
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    shown = pattern.cpu().double()
    counted = (shown > 1e-4) & ~hidden
    n = counted.sum(-1, keepdim=True).clamp_min(1)

    def centred(x: Tensor) -> Tensor:
        x = torch.where(counted, x, 0.0)
        return torch.where(counted, x - x.sum(-1, keepdim=True) / n, 0.0)

    wanted = centred(shown.clamp_min(1e-12).log())
    design = torch.stack([centred(part).flatten() for part in scores], 1)
    factors = torch.linalg.pinv(design.T @ design, rtol=1e-10) @ (design.T @ wanted.flatten())
    predicted = torch.einsum("f,f...->...", factors, scores).masked_fill(hidden, -torch.inf).softmax(-1)
    return float((predicted - shown).norm() / shown.norm())
