"""The token that attention, angles and effects are about: its position in each row, and its name."""

from __future__ import annotations

import operator

import torch
from jaxtyping import Int, Int64
from torch import Tensor

from tl_tomsparse._checks import TomsparseError
from tl_tomsparse._model import ModelView
from tl_tomsparse.samples import Samples, check_samples


def positions_of(
    seen: ModelView, samples: Samples, position: int | Int[Tensor, " rows"]
) -> Int64[Tensor, " rows"]:
    """The position of the token in each row.

    Raises:
        TomsparseError: training mode; rows that are too long; a position that a row does not have, or that is
            its last one; a tensor that has another shape or no integers; anything else.
    """
    seen.require_eval()
    check_samples(seen, samples)
    if isinstance(position, Tensor):
        return _one_each(samples, position)
    try:
        same = operator.index(position)
    except TypeError:
        raise TomsparseError(
            f"position is a {type(position).__name__}; pass one int for all rows, or an integer tensor with "
            "one for each row."
        ) from None
    shortest = int(samples.lengths.min())
    if not 0 <= same < shortest - 1:
        raise TomsparseError(
            f"position={same} must be at least 0 and before the last token of every row; the shortest "
            f"has {shortest} tokens."
        )
    return torch.full((len(samples),), same)


def _one_each(samples: Samples, position: Tensor) -> Tensor:
    if position.is_floating_point() or position.is_complex() or position.dtype == torch.bool:
        raise TomsparseError(f"position has dtype {position.dtype}; positions are integers (torch.int64).")
    if position.shape != (len(samples),):
        raise TomsparseError(
            f"position has shape {tuple(position.shape)} and there are {len(samples)} rows; pass one int for "
            "all rows, or a tensor with one for each row."
        )
    at = position.detach().cpu().long()
    for row in ((at < 0) | (at >= samples.lengths - 1)).nonzero()[:1, 0].tolist():
        raise TomsparseError(
            f"position[{row}]={int(at[row])} must be at least 0 and before the last token of its row; sample "
            f"{samples.ids[row]!r} has {int(samples.lengths[row])} tokens (padding is none)."
        )
    return at


def stated(at: Tensor) -> int | tuple[int, ...]:
    """Positions as results keep them."""
    each = tuple(at.tolist())
    return each[0] if len(set(each)) == 1 else each


def check_threshold(value: float) -> None:
    """Refuse what is no share of attention."""
    if not 0 <= value < 1:
        raise TomsparseError(f"A threshold of attention lies in [0, 1), not {value}.")


def key_name(position: int | tuple[int, ...], bos: bool) -> str:
    """The token that is asked about, in words."""
    if isinstance(position, tuple):
        return "the chosen token of each row"
    if position:
        return f"token {position}"
    return "BOS" if bos else "the first token (no BOS)"
