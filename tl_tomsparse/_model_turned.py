"""How far queries, keys and attention patterns are from what a rotation predicts; a part of `_model.py`.

    shown rotated:  after[p, h] = c[p] (before[p, h] turned by p theta)         c[p] > 0 fitted
    rebuilt:        log A[q, k] = a q(q) . k(k) + b[h] k + a number a row        a > 0 and b fitted

The factor c stands for yarn's and for temperatures that depend on the position; a for the scale of scores, b
for ALiBi. Sinks, which take a share of each row, and windows do not matter. No factor can make up for another
angle.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

LAST = 32  # queries of a row whose attention is looked at, the last ones: they see the most keys
_SEEN = 1e-4  # a share of attention below which rounding rules

Turn = Callable[[Tensor, Tensor], Tensor]


def by_head(value: Tensor, like: Tensor) -> Tensor | None:
    """A tensor as `like` `[batch, pos, heads, d_head]`, or None: hook points also show it flat, or with heads
    before positions.
    """
    if value.ndim == 3 and value.numel() == like.numel():
        return value.unflatten(-1, like.shape[-2:])
    if value.shape == like.shape:
        return value
    return value.transpose(1, 2) if value.ndim == 4 and value.transpose(1, 2).shape == like.shape else None


def error_of_rotated(before: Tensor, after: Tensor, positions: Tensor, turn: Turn, turned: Tensor) -> float:
    """How far `after` is from `before`, turned, both `[1, pos, heads, d_head]`; inf if all are zero.

    Relative to the norm of each pair, so that large slow pairs, which hardly turn, do not hide the others;
    the median over positions, since some models clip single values; of the pair that is worst.

    Args:
        before: what enters the rotation.
        after: what comes out of it.
        positions: `[1, pos]`.
        turn: `turn(x, positions)`, the rotation.
        turned: `[pairs, 2]` the dimensions that it turns.
    """
    before, after = before.cpu().double(), after.cpu().double()
    predicted = turn(before, positions)[0]
    after = after[0]
    rest = torch.ones(after.shape[-1], dtype=torch.bool)
    rest[turned.flatten()] = False
    error = torch.zeros_like(after)
    for dims in (turned.flatten(), rest.nonzero().flatten()):
        p, a = predicted[..., dims], after[..., dims]
        factor = (p * a).sum((1, 2)) / p.square().sum((1, 2)).clamp_min(1e-300)
        error[..., dims] = (factor.clamp_min(0)[:, None, None] * p - a).square()
    power = after.square()
    for values in (error, power):
        values[..., turned] = values[..., turned].sum(-1, keepdim=True).expand(*values.shape[:-1], -1, 2)
    mean = power.mean(0)
    there = mean > 0
    if not there.any():
        return float("inf")
    return float((error.median(0).values[there] / mean[there]).sqrt().max())


class PatternFit:
    """The last rows of an attention pattern, `[1, heads, LAST, keys]`, to compare products with."""

    def __init__(self, pattern: Tensor) -> None:
        shown = pattern[0].cpu().double()
        self._rows, keys = shown.shape[1:]
        self._hidden = (shown == 0).all(0)  # by the mask; a single head's zero may be rounding
        self._hidden |= torch.ones(self._rows, keys, dtype=torch.bool).triu(keys - self._rows + 1)
        self._shown = shown / shown.sum(-1, keepdim=True)
        self._counted = (self._shown > _SEEN) & ~self._hidden
        self._position = self._centred(torch.arange(keys).double().expand_as(shown))
        self._wanted = self._centred(self._shown.clamp_min(1e-300).log())

    def error(self, q: Tensor, k: Tensor) -> float:
        """How far the pattern is from that of queries `[1, pos, heads, d_head]` and keys, relative to it."""
        q, k = q[0, -self._rows :].cpu().double(), k[0].cpu().double()
        if q.shape[1] % k.shape[1] or q.shape[1] != len(self._shown):
            return float("inf")
        products = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(q.shape[1] // k.shape[1], 1))
        slope_wanted, wanted = self._along(self._wanted)
        slope, scores = self._along(self._centred(products))
        scale = float((scores * wanted).sum() / scores.square().sum().clamp_min(1e-300))
        if not scale > 0:
            return float("inf")
        bias = (slope_wanted - scale * slope) * torch.arange(products.shape[-1])
        predicted = (scale * products + bias).masked_fill(self._hidden, -torch.inf).softmax(-1)
        return float((predicted - self._shown).norm() / self._shown.norm())

    def _centred(self, x: Tensor) -> Tensor:
        """Less its mean over the keys that count; zero at others."""
        x = torch.where(self._counted, x, 0.0)
        n = self._counted.sum(-1, keepdim=True).clamp_min(1)
        return torch.where(self._counted, x - x.sum(-1, keepdim=True) / n, 0.0)

    def _along(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What of centred numbers is linear in the key's position, a slope for each head, and the rest."""
        size = self._position.square().sum((1, 2), keepdim=True).clamp_min(1e-300)
        slope = (x * self._position).sum((1, 2), keepdim=True) / size
        return slope, x - slope * self._position
