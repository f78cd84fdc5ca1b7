"""Where a mask lies among the rotary frequencies, and the rank of what it picks, against random masks.

    enrichment of frequency m:  entries of the mask that make frequency m / mean of that over random masks
    rank:                       of W_Q or W_K of a layer with every entry outside the mask set to zero

arXiv 2504.04238 says that masked entries gather at dominant frequencies and that they are of low rank. Random
masks show what of that any mask with as many entries in each matrix, at each input channel ("row") or at each
output channel ("column") would have.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tl_tomsparse._channels import channels
from tl_tomsparse._checks import TomsparseError, check_choice, check_positive, check_same_weights
from tl_tomsparse._model import Key, ModelView, view
from tl_tomsparse.mask import Match, SparseMask
from tl_tomsparse.rotary import RotaryLayout, with_rotation

if TYPE_CHECKING:
    import pandas as pd

NOT_ROTATED = -1


def mask_by_frequency(
    model: Any, mask: SparseMask, *, match: Match = "matrix", n_random: int = 200, seed: int = 0
) -> pd.DataFrame:
    """How many of a mask's Q and K entries make each rotary frequency, against random masks.

    An entry of W_Q or W_K `[head, d_model, d_head]` makes the frequency that turns its d_head dimension.
    Layers without a rotation are left out.

    Args:
        model: that the mask was made from.
        mask: with entries in Q or K.
        match: what the random masks have in common with it: "matrix", "total", "row" (input channels) or
            "column"; with "column" the dimensions are the mask's own, so nothing can be enriched.
        n_random: how many random masks; intervals need 200 or more.
        seed: of the first of them.

    Returns:
        One row a matrix and frequency (-1: dimensions that are not turned): matrix, frequency, entries, share
        (of the matrix' entries), random_mean, random_low, random_high (central 95 % of the random masks),
        enrichment (entries / random_mean), p (two-sided, of the mask being one of the random ones), and where
        all layers turn alike radians and wavelength.

    Raises:
        TomsparseError: no layer with a rotation; a mask of other weights or without entries in Q and K.
    """
    import pandas as pd

    check_positive("n_random", n_random)
    seen = with_rotation(model)
    check_same_weights("The mask", mask.identity, "the model", seen.identity())
    layout = RotaryLayout.of(model)
    mask = _of_queries_and_keys(mask, layout)
    matrices = [m for m in ("Q", "K") if len(mask.restrict(matrices=(m,)))]
    width = max(len(layer.frequencies) for layer in layout.values())
    found = _counts(mask, layout, matrices, width)
    drawn = np.stack(
        [_counts(mask.random_like(seed + n, match=match), layout, matrices, width) for n in range(n_random)]
    )
    alike = len({tuple(layer.frequencies.tolist()) for layer in layout.values()}) == 1
    first = next(iter(layout.values()))
    rows = []
    for i, matrix in enumerate(matrices):
        for m in range(width + 1):
            entries, random = int(found[i, m]), drawn[:, i, m]
            if m == width and not entries and not random.any():
                continue  # everything is turned
            low, high = np.quantile(random, [0.025, 0.975])
            row = {
                "matrix": matrix,
                "frequency": m if m < width else NOT_ROTATED,
                "entries": entries,
                "share": entries / found[i].sum(),
                "random_mean": random.mean(),
                "random_low": low,
                "random_high": high,
                "enrichment": entries / random.mean() if random.mean() else float("nan"),
                "p": _two_sided(entries, random),
            }
            if alike and m < width:
                row |= {"radians": float(first.frequencies[m]), "wavelength": float(first.wavelengths[m])}
            rows.append(row)
    return pd.DataFrame(rows)


def mask_rank(
    model: Any,
    mask: SparseMask,
    *,
    matches: Collection[Match] = ("matrix", "row", "column"),
    n_random: int = 20,
    seed: int = 0,
) -> pd.DataFrame:
    """The rank of each layer's masked W_Q and W_K, all heads side by side, against random masks.

    Args:
        model: that the mask was made from.
        mask: with entries in Q or K.
        matches: kinds of random masks; see [`SparseMask.random_like`][].
        n_random: how many of each kind.
        seed: of the first of them.

    Returns:
        One row a layer and matrix: layer, matrix, entries, rank, and for each kind the mean rank of the
        random masks with their smallest and largest (`random_row`, `random_row_low`, `random_row_high` ...).

    Raises:
        TomsparseError: a mask of other weights or without entries in Q and K; an unknown kind; an active
            edit.
    """
    import pandas as pd

    check_positive("n_random", n_random)
    kinds: tuple[Match, ...] = (matches,) if isinstance(matches, str) else tuple(matches)  # type: ignore[assignment]
    for match in kinds:
        check_choice("matches", match, ("matrix", "total", "row", "column"))
    seen = view(model)
    check_same_weights("The mask", mask.identity, "the model", seen.identity())
    if seen.active_edits:
        raise TomsparseError(
            f"{seen.name} has an active edit, {seen.active_edits[-1]}; ranks are those of unedited weights, "
            "so measure them outside of the block."
        )
    mask = _of_queries_and_keys(mask, None)
    ranks = {
        match: [_ranks(seen, mask.random_like(seed + n, match=match)) for n in range(n_random)]
        for match in kinds
    }
    rows = []
    for (layer, matrix), rank in _ranks(seen, mask).items():
        row: dict[str, Any] = {"layer": layer, "matrix": matrix}
        row |= {"entries": len(mask.entries[layer, matrix]), "rank": rank}
        for match, drawn in ranks.items():
            values = [one.get((layer, matrix), 0) for one in drawn]
            named = f"random_{match}"
            row |= {named: sum(values) / n_random, f"{named}_low": min(values), f"{named}_high": max(values)}
        rows.append(row)
    return pd.DataFrame(rows)


def _of_queries_and_keys(mask: SparseMask, layout: RotaryLayout | None) -> SparseMask:
    part = mask.restrict(matrices=("Q", "K"), layers=None if layout is None else list(layout))
    if not len(part):
        where = "" if layout is None else " of layers with a rotation"
        raise TomsparseError(f"The mask has no entries in Q and K{where}; make one with matrices Q and K.")
    return part


def _counts(mask: SparseMask, layout: RotaryLayout, matrices: list[str], width: int) -> NDArray[np.float64]:
    """`[matrices, frequencies + 1]`, the last one for dimensions that are not turned."""
    found = np.zeros((len(matrices), width + 1))
    for (layer, matrix), index in mask.entries.items():
        d_head = mask.shapes[layer, matrix][-1]
        frequency = torch.full((d_head,), width)
        for m, pair in enumerate(layout[layer].pairs):
            frequency[pair] = m
        if len(index):
            counts = torch.bincount(frequency[index % d_head], minlength=width + 1)
            found[matrices.index(matrix)] += counts.numpy()
    return found


def _ranks(seen: ModelView, mask: SparseMask) -> dict[Key, int]:
    return {key: _rank(seen.weight(key), key, index) for key, index in _with_entries(mask)}


def _with_entries(mask: SparseMask) -> Iterator[tuple[Key, Tensor]]:
    return ((key, index) for key, index in mask.entries.items() if len(index))


def _rank(weight: Tensor, key: Key, index: Tensor) -> int:
    """Of the matrix from d_model to all heads' dimensions that has only these entries."""
    inputs, outputs = channels(key, tuple(weight.shape), index)
    rows, columns = (axis.unique(return_inverse=True) for axis in (inputs, outputs))
    small = torch.zeros(len(rows[0]), len(columns[0]), dtype=torch.float64)
    small[rows[1], columns[1]] = weight.detach().cpu().double().reshape(-1)[index]
    return int(torch.linalg.matrix_rank(small))


def _two_sided(value: float, drawn: NDArray[np.float64]) -> float:
    tail = min((drawn <= value).sum(), (drawn >= value).sum())
    return float(min(1.0, 2 * (1 + tail) / (1 + len(drawn))))
