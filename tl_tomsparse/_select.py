"""The k largest entries of one or many tensors, exactly, in about two read passes.

An entry belongs to the k largest when fewer than k entries come before it in the order (value, largest first;
then tensor, in the order given; then flat index, lowest first). That order has no ties, so the choice is the
same on every device and with every number of threads.

The largest value of each block of 128 entries is found first. At least k entries reach the k-th largest of
these block maxima, t, so every chosen entry does; and entries >= t lie only in blocks whose maximum is >= t.
Fewer than k blocks have a maximum above t, and of those whose maximum equals t only the first k can matter.
So 2k blocks are read again, and only their entries are sorted. Where k is too large a share for that, the
blocks have one entry, which costs as much as `torch.topk` does.

Not claimed: speed for large shares (above about 1 in 500 entries).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor

_BLOCKS = (
    128,
    32,
)  # entries in a block: larger ones are faster to reduce, smaller ones leave less to read again
_SHARE = 8  # the entries read again are at most 1 in this many


def bad_value(flat: Float[Tensor, " d"]) -> float | None:
    """A value that is NaN, infinite or negative, or None if all are fit to be sensitivities; one pass."""
    if flat.numel() == 0:
        return None
    extremes = (float(extreme) for extreme in torch.aminmax(flat))  # NaN is passed on
    return next((extreme for extreme in extremes if not 0.0 <= extreme < float("inf")), None)


def largest(flats: Sequence[Float[Tensor, " _"]], k: int) -> tuple[Int64[Tensor, " k"], Int64[Tensor, " k"]]:
    """The k largest entries of all tensors together, largest first.

    Args:
        flats: contiguous, one-dimensional, of one dtype, without NaN; on any devices.
        k: how many, at most the number of entries.

    Returns:
        tensor: which of `flats` each entry is in; on the CPU.
        index: the flat index in it.
    """
    total = sum(flat.numel() for flat in flats)
    block = next((size for size in _BLOCKS if 2 * k * size * _SHARE <= total and k <= _whole(flats, size)), 1)
    maxima = [_maxima(flat, block) for flat in flats]
    if k == 0 or not maxima:
        return torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
    threshold = torch.cat([each.to(maxima[0].device) for each in maxima]).topk(k).values[-1]
    candidates = [_candidates(f, m, threshold.to(f.device), block, k) for f, m in zip(flats, maxima)]
    values = torch.cat([flat[index].cpu() for flat, index in zip(flats, candidates)])
    tensor = torch.repeat_interleave(torch.tensor([len(index) for index in candidates]))
    index = torch.cat([index.cpu() for index in candidates])
    order = values.sort(descending=True, stable=True).indices[:k]
    return tensor[order], index[order]


def _maxima(flat: Tensor, block: int) -> Tensor:
    """The largest value of each whole block."""
    return flat[: flat.numel() // block * block].view(-1, block).amax(1) if block > 1 else flat


def _whole(flats: Sequence[Tensor], block: int) -> int:
    """How many whole blocks there are."""
    return sum(flat.numel() // block for flat in flats)


def _candidates(flat: Tensor, maxima: Tensor, threshold: Tensor, block: int, k: int) -> Tensor:
    """Ascending indices of entries that reach the threshold, with all of this tensor that can be chosen."""
    ties = (maxima == threshold).nonzero().flatten()[:k]
    blocks = torch.cat([(maxima > threshold).nonzero().flatten(), ties]).sort().values
    inside = (blocks[:, None] * block + torch.arange(block, device=flat.device)).flatten()
    rest = torch.arange(len(maxima) * block, flat.numel(), device=flat.device)
    index = torch.cat([inside, rest])
    return index[flat[index] >= threshold]
