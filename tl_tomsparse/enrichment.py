"""Where a mask lies among the rotary frequencies, and the rank of what it picks, against random masks.

    enrichment of frequency m:  entries of the mask that make frequency m / mean of that over random masks
    share at frequencies:       entries of the mask that make one of them / entries in Q and K
    rank:                       of W_Q or W_K of a layer with every entry outside the mask set to zero

arXiv 2504.04238 says that masked entries gather at dominant frequencies and that they are of low rank. Random
masks show what of that any mask with as many entries in each matrix, at each input channel ("row") or at each
output channel ("column") would have. How many of a random mask's entries make a frequency is drawn from its
distribution (multivariate hypergeometric) without making the mask; for ranks masks are made.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tl_tomsparse._channels import channels, name, place
from tl_tomsparse._checks import TomsparseError, check_choice, check_positive, check_same_weights
from tl_tomsparse._model import Key, ModelView, view
from tl_tomsparse.mask import Match, SparseMask
from tl_tomsparse.rotary import RotaryLayout, with_rotation

if TYPE_CHECKING:
    import pandas as pd

Kind = Literal["matrix", "row", "column"]
Half = Literal["slow", "fast"]
Counts = NDArray[np.int64]
NOT_ROTATED = -1


def mask_by_frequency(
    model: Any, mask: SparseMask, *, match: Kind = "matrix", n_random: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """How many of a mask's Q and K entries make each rotary frequency, against random masks.

    An entry of W_Q or W_K `[head, d_model, d_head]` makes the frequency that turns its d_head dimension.
    Layers without a rotation are left out.

    Args:
        model: that the mask was made from.
        mask: with entries in Q or K.
        match: what random masks have in common with it beside its number of entries in each matrix: nothing
            ("matrix"), how many there are at each input channel ("row") or at each output channel ("column":
            the dimensions are the mask's own, so nothing can be enriched).
        n_random: how many random masks.
        seed: of the random masks.

    Returns:
        One row a matrix and frequency (-1: dimensions that are not turned): match, matrix, frequency,
        entries, share (of the matrix' entries), random_mean, random_low, random_high (central 95 % of the
        random masks), enrichment (entries / random_mean), enrichment_low, enrichment_high (entries /
        random_high and / random_low: 1 is between them where the mask is like a random one; nan, no bound,
        where that is 0), p (two-sided, of the mask being one of the random ones), and where all layers turn
        alike radians and wavelength.

    Raises:
        TomsparseError: no layer with a rotation; a mask of other weights or without entries in Q and K.
    """
    import pandas as pd

    check_positive("n_random", n_random)
    check_choice("match", match, get_args(Kind))
    mask, layout = _rotated_part(model, mask)
    matrices = [m for m in ("Q", "K") if len(mask.restrict(matrices=(m,)))]
    width = max(len(layer.frequencies) for layer in layout.values())
    classes = _frequencies(mask, layout, width)
    found = _of_matrices(_counts(mask, classes, width + 1), matrices)
    drawn = _of_matrices(_drawn_counts(mask, classes, width + 1, match, n_random, seed), matrices)
    alike = len({tuple(layer.frequencies.tolist()) for layer in layout.values()}) == 1
    first = next(iter(layout.values()))
    rows = []
    for i, matrix in enumerate(matrices):
        for m in range(width + 1):
            entries, random = int(found[i, m]), drawn[i, :, m]
            if m == width and not entries and not random.any():
                continue  # everything is turned
            low, high = np.quantile(random, [0.025, 0.975])
            row = {
                "match": match,
                "matrix": matrix,
                "frequency": m if m < width else NOT_ROTATED,
                "entries": entries,
                "share": entries / found[i].sum(),
                "random_mean": random.mean(),
                "random_low": low,
                "random_high": high,
                **_over(entries, random.mean(), low, high),
                "p": _two_sided(entries, random),
            }
            if alike and m < width:
                row |= {"radians": float(first.frequencies[m]), "wavelength": float(first.wavelengths[m])}
            rows.append(row)
    return pd.DataFrame(rows)


def _over(entries: int, mean: float, low: float, high: float) -> dict[str, float]:
    """Enrichment over the mean and the ends of random masks."""
    ends = {"enrichment": mean, "enrichment_low": high, "enrichment_high": low}
    return {name: entries / end if end else float("nan") for name, end in ends.items()}


def at_frequencies(
    model: Any, mask: SparseMask, frequencies: Half | Collection[int] | pd.DataFrame
) -> SparseMask:
    """The entries of a mask in Q and K that make these rotary frequencies; its complement is `mask - it`.

    Args:
        model: that the mask was made from.
        mask: with entries in Q or K.
        frequencies: "slow" or "fast", the slower or faster half of each layer's ([`RotaryLayer.slow`][]);
            numbers, the same in all heads; or rows with layer, part ("q" or "k"), head (key-value head for
            "k") and frequency, such as [`FrequencyNorms.dominant`][] gives.

    Raises:
        TomsparseError: no layer with a rotation; a mask of other weights or without entries in Q and K; a
            frequency or head that the model does not have; missing columns.
    """
    mask, layout = _rotated_part(model, mask)
    chosen = _chosen(mask, layout, frequencies)
    entries = {}
    for key, index in mask.entries.items():
        head, _, dimension = place(mask.shapes[key], index)
        entries[key] = index[chosen[key][head, dimension] == 1]
    return SparseMask(mask.identity, mask.shapes, entries)


def share_at_frequencies(
    model: Any,
    mask: SparseMask,
    frequencies: Half | Collection[int] | pd.DataFrame,
    *,
    matches: Collection[Kind] = ("matrix", "row"),
    n_random: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Which share of a mask's Q and K entries makes these frequencies, against random masks.

    Args:
        model: that the mask was made from.
        mask: with entries in Q or K.
        frequencies: as in [`at_frequencies`][].
        matches: kinds of random masks; see [`mask_by_frequency`][].
        n_random: how many of each kind.
        seed: of the random masks.

    Returns:
        One row a kind: match, entries, share, random_mean, random_low, random_high (central 95 % of the
        random masks' shares), p (two-sided, of the mask being one of the random ones).

    Raises:
        TomsparseError: as `at_frequencies`; an unknown kind.
    """
    import pandas as pd

    check_positive("n_random", n_random)
    kinds = _kinds(matches, get_args(Kind))
    mask, layout = _rotated_part(model, mask)
    chosen = _chosen(mask, layout, frequencies)
    entries = sum(int(count[1]) for count in _counts(mask, chosen, 2).values())
    rows = []
    for match in kinds:
        drawn = _drawn_counts(mask, chosen, 2, cast("Kind", match), n_random, seed)
        random = sum((counts[:, 1] for counts in drawn.values()), start=np.zeros(n_random))
        low, high = np.quantile(random / len(mask), [0.025, 0.975])
        rows.append(
            {
                "match": match,
                "entries": entries,
                "share": entries / len(mask),
                "random_mean": random.mean() / len(mask),
                "random_low": low,
                "random_high": high,
                "p": _two_sided(entries, random),
            }
        )
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
        One row a layer and matrix, and one a matrix with the means over its layers (layer -1): layer, matrix,
        entries, rank, and for each kind the mean rank of the random masks with their smallest and largest
        (`random_row`, `random_row_low`, `random_row_high` ...), how many are as low (`as_low_row` ...), and
        p-values of "not lower" (`p_row` ...; Student's t of one more draw, doubled as two-sided ones, with
        ranks taken as normal and at least as spread as rounding to whole numbers makes them; ours).

    Raises:
        TomsparseError: a mask of other weights or without entries in Q and K; an unknown kind; an active
            edit.
    """
    import pandas as pd

    check_positive("n_random", n_random)
    kinds = cast("tuple[Match, ...]", _kinds(matches, get_args(Match)))
    seen = view(model)
    check_same_weights("The mask", mask.identity, "the model", seen.identity())
    if seen.active_edits:
        raise TomsparseError(
            f"{seen.name} has an active edit, {seen.active_edits[-1]}; ranks are those of unedited weights, "
            "so measure them outside of the block."
        )
    mask = _of_queries_and_keys(mask, None)
    ranks = {
        match: [_with_means(_ranks(seen, mask.random_like(seed + n, match=match))) for n in range(n_random)]
        for match in kinds
    }
    own = _with_means(_ranks(seen, mask))
    entries = _with_means({key: len(index) for key, index in _with_entries(mask)})
    rows = []
    for (layer, matrix), rank in own.items():
        row: dict[str, Any] = {"layer": layer, "matrix": matrix}
        row |= {"entries": entries[layer, matrix], "rank": rank}
        for match, drawn in ranks.items():
            values = np.array([one.get((layer, matrix), 0) for one in drawn])
            named = f"random_{match}"
            row |= {named: values.mean(), f"{named}_low": values.min(), f"{named}_high": values.max()}
            row |= {f"as_low_{match}": int((values <= rank).sum()), f"p_{match}": _p_lower(rank, values)}
        rows.append(row)
    return pd.DataFrame(rows)


def _with_means(of: Mapping[Key, float]) -> dict[Key, float]:
    """And for each matrix its mean over layers, as layer -1."""
    matrices = dict.fromkeys(matrix for _, matrix in of)
    means = {
        (-1, matrix): float(np.mean([value for key, value in of.items() if key[1] == matrix]))
        for matrix in matrices
    }
    return {**of, **means}


def _of_queries_and_keys(mask: SparseMask, layout: RotaryLayout | None) -> SparseMask:
    part = mask.restrict(matrices=("Q", "K"), layers=None if layout is None else list(layout))
    if not len(part):
        where = "" if layout is None else " of layers with a rotation"
        raise TomsparseError(f"The mask has no entries in Q and K{where}; make one with matrices Q and K.")
    return part


def _rotated_part(model: Any, mask: SparseMask) -> tuple[SparseMask, RotaryLayout]:
    """What a mask has in Q and K of layers with a rotation, and these."""
    seen = with_rotation(model)
    check_same_weights("The mask", mask.identity, "the model", seen.identity())
    layout = RotaryLayout.of(model)
    return _of_queries_and_keys(mask, layout), layout


def _kinds(matches: Collection[str], possible: tuple[str, ...]) -> tuple[str, ...]:
    kinds = (matches,) if isinstance(matches, str) else tuple(matches)
    for match in kinds:
        check_choice("matches", match, possible)
    return kinds


def _frequencies(mask: SparseMask, layout: RotaryLayout, width: int) -> dict[Key, Tensor]:
    """For each matrix `[heads, d_head]`: which frequency a dimension makes; `width` if it is not turned."""
    found = {}
    for key, shape in mask.shapes.items():
        frequency = torch.full((shape[-1],), width)
        for m, pair in enumerate(layout[key[0]].pairs):
            frequency[pair] = m
        found[key] = frequency.expand(shape[0], -1)
    return found


def _chosen(
    mask: SparseMask, layout: RotaryLayout, frequencies: Half | Collection[int] | pd.DataFrame
) -> dict[Key, Tensor]:
    """For each matrix `[heads, d_head]`: 1 where a dimension makes one of the frequencies, else 0."""
    import pandas as pd

    chosen = {key: torch.zeros(shape[0], shape[-1], dtype=torch.int64) for key, shape in mask.shapes.items()}
    if isinstance(frequencies, pd.DataFrame):
        names = ["layer", "part", "head", "frequency"]
        if missing := [name for name in names if name not in frequencies]:
            raise TomsparseError(
                f"frequencies has no column {missing[0]!r}; it needs {', '.join(names)}, as the rows of "
                "FrequencyNorms.dominant."
            )
        wanted = [
            ((int(layer), str(part).upper()), int(head), int(m))
            for layer, part, head, m in frequencies[names].itertuples(index=False)
        ]
    elif isinstance(frequencies, str):
        check_choice("frequencies", frequencies, get_args(Half))
        wanted = [
            (key, head, m)
            for key, axes in chosen.items()
            for head in range(len(axes))
            for m in (layout[key[0]].slow == (frequencies == "slow")).nonzero()[:, 0].tolist()
        ]
    else:
        wanted = [
            (key, head, m) for key, axes in chosen.items() for head in range(len(axes)) for m in frequencies
        ]
    for key, head, m in wanted:
        if key not in chosen:
            continue  # a matrix that the mask is not about
        pairs = layout[key[0]].pairs
        if not 0 <= m < len(pairs) or not 0 <= head < len(chosen[key]):
            raise TomsparseError(
                f"There is no frequency {m} in head {head} of {name(key)}; it has {len(chosen[key])} heads "
                f"with {len(pairs)} frequencies, counted from 0."
            )
        chosen[key][head, pairs[m]] = 1
    return chosen


def _counts(mask: SparseMask, classes: Mapping[Key, Tensor], n_classes: int) -> dict[Key, Counts]:
    """For each matrix how many entries lie in outputs (head and dimension) of each class, `[classes]`."""
    found = {}
    for key, index in mask.entries.items():
        head, _, dimension = place(mask.shapes[key], index)
        found[key] = torch.bincount(classes[key][head, dimension], minlength=n_classes).numpy()
    return found


def _drawn_counts(
    mask: SparseMask, classes: Mapping[Key, Tensor], n_classes: int, match: Kind, n: int, seed: int
) -> dict[Key, Counts]:
    """The same for `n` random masks, `[n, classes]`."""
    if match == "column":
        own = _counts(mask, classes, n_classes)
        return {key: np.broadcast_to(counts, (n, n_classes)) for key, counts in own.items()}
    generator = np.random.default_rng(seed)
    found = {}
    for key, index in mask.entries.items():
        outputs = torch.bincount(classes[key].flatten(), minlength=n_classes).numpy()
        rows = mask.shapes[key][1]
        if match == "matrix":
            found[key] = generator.multivariate_hypergeometric(outputs * rows, len(index), n)
            continue
        found[key] = np.zeros((n, n_classes), dtype=np.int64)
        for entries in torch.bincount(channels(key, mask.shapes[key], index)[0]).tolist():
            if entries:
                found[key] += generator.multivariate_hypergeometric(outputs, entries, n)
    return found


def _of_matrices(counts: Mapping[Key, Counts], matrices: list[str]) -> Counts:
    """Sums over layers, one a matrix, stacked."""
    return np.stack(
        [np.sum([one for (_, name), one in counts.items() if name == matrix], 0) for matrix in matrices]
    )


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


def _p_lower(value: float, drawn: NDArray[np.number]) -> float:
    """That one more draw is as low as the value; nan with one draw, whose spread is not known."""
    from scipy.stats import t as student

    n = len(drawn)
    if n < 2:
        return float("nan")
    spread = ((np.var(drawn, ddof=1) + 1 / 12) * (1 + 1 / n)) ** 0.5
    return float(min(1.0, 2 * student.cdf((value - drawn.mean()) / spread, n - 1)))


def _two_sided(value: float, drawn: NDArray[np.number]) -> float:
    tail = min((drawn <= value).sum(), (drawn >= value).sum())
    return float(min(1.0, 2 * (1 + tail) / (1 + len(drawn))))
