"""Intervals: exact binomial for a proportion, a bootstrap by cluster for differences, Holm for a family.

    accuracy:    Clopper-Pearson
    difference:  sum_c num_c / sum_c den_c, clusters c drawn again with replacement, all arms of one together
    family:      Holm, the j-th smallest of m p-values times m - j + 1

The questions of one story share its text, and twins share their plot, so a cluster, the unit that is drawn
again, is a group of stories (paired, clustered).
A change measured on an average over random masks also depends on which masks were drawn, so those are drawn
again as well (crossed). What is summed while samples pass is kept by groups of them, whose means have a
Student's t interval. Percentile intervals; p-values are two-sided and come from the same draws, so that
p <= 1 - confidence is the same as an interval without the null value.

NOT claimed: that the binomial intervals cover clustering. They treat questions as independent and are too
narrow where a story asks several questions of one category; the differences do not have this fault.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]
CONFIDENCE = 0.95
_CHUNK = 1024  # resamples whose weights are held as floats at once


def proportion_interval(correct: int, n: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The exact (Clopper-Pearson) interval of a proportion; (nan, nan) without observations."""
    from scipy.stats import binomtest

    if n == 0:
        return float("nan"), float("nan")
    interval = binomtest(int(correct), int(n)).proportion_ci(confidence, method="exact")
    return float(interval.low), float(interval.high)


@dataclass(frozen=True)
class Estimate:
    """An estimate, its interval, and the draws that the interval came from.

    Attributes:
        value: the estimate from the data as they are.
        low: lower end of the percentile interval.
        high: upper end of it.
        draws: the resampled estimates, `[n_draws]`; empty where nothing could be estimated.
    """

    value: float
    low: float
    high: float
    draws: Floats

    def p_differs(self, null: float = 0.0) -> float:
        """Two-sided p-value of "the true value is `null`": twice the smaller tail of the draws beyond it."""
        return min(1.0, 2 * min(self._tail(self.draws <= null), self._tail(self.draws >= null)))

    def p_below(self, null: float = 0.0) -> float:
        """p-value of "at least `null`", doubled so that it agrees with the two-sided interval."""
        return min(1.0, 2 * self._tail(self.draws >= null))

    def p_above(self, null: float = 0.0) -> float:
        """p-value of "at most `null`", doubled so that it agrees with the two-sided interval."""
        return min(1.0, 2 * self._tail(self.draws <= null))

    def p_within(self, low: float, high: float) -> float:
        """p-value of "outside (low, high)": the equivalence test that agrees with the two-sided interval."""
        return min(1.0, 2 * max(self._tail(self.draws <= low), self._tail(self.draws >= high)))

    def _tail(self, beyond: NDArray[np.bool_]) -> float:
        return float((1 + beyond.sum()) / (1 + len(beyond)))


class ClusterBootstrap:
    """Draws clusters again with replacement; the same draws serve every estimate.

    Args:
        n_clusters: how many groups of stories (or text windows) there are.
        n_draws: how often they are drawn again.
        seed: of the draws.
        confidence: of the percentile intervals.
        smooth: add one cluster that lost every answer and one that gained every answer (for contrasts: one
            pair a term) to those that are drawn, as Bonett and Price (2012) add a half to each cell of a
            paired table. Without it, no change in ten clusters would give the interval [0, 0], as if it were
            no change in a million. The estimate itself is not touched.
    """

    def __init__(
        self,
        n_clusters: int,
        *,
        n_draws: int = 10_000,
        seed: int = 0,
        confidence: float = CONFIDENCE,
        smooth: bool = True,
    ) -> None:
        self.n_clusters, self.confidence, self.smooth = n_clusters, confidence, smooth
        self._seed, self._n_draws = seed, n_draws
        self._weights: dict[tuple[str, int, int], NDArray[np.uint8]] = {}

    def ratio(self, numerator: Floats, denominator: Floats) -> Estimate:
        """The interval of `sum(numerator) / sum(denominator)` over clusters.

        Args:
            numerator: `[n_clusters]`, or `[n_clusters, n_members]` for an average over members (random
                masks) that are drawn again as well.
            denominator: `[n_clusters]`, how many observations each cluster has.
        """
        return self.contrast([(numerator, denominator)])

    def contrast(self, terms: Sequence[tuple[Floats, Floats]], *, members: Sequence[int] = ()) -> Estimate:
        """The interval of the first ratio minus the other ones, all from the same drawn clusters.

        Args:
            terms: numerator and denominator of each, as in `ratio`.
            members: for each term a number; terms with the same number average over the same members (masks
                of one model), others over members of their own. All the same by default.
        """
        value, draws = 0.0, np.zeros(self._n_draws)
        for sign, (index, (numerator, denominator)) in zip((1, *[-1] * (len(terms) - 1)), enumerate(terms)):
            columns = np.asarray(numerator, dtype=np.float64).reshape(self.n_clusters, -1)
            counts = np.asarray(denominator, dtype=np.float64)
            if counts.sum() == 0:
                return Estimate(float("nan"), float("nan"), float("nan"), np.zeros(0))
            value += sign * float(columns.mean(1).sum() / counts.sum())
            which = members[index] if members else 0
            draws += sign * self._resample(columns, counts, index, len(terms), which)
        return _estimate(value, draws, self.confidence)

    def _resample(self, columns: Floats, counts: Floats, index: int, n_terms: int, members: int) -> Floats:
        if self.smooth:
            usual = counts[counts > 0].mean()
            extra = np.zeros((2 * n_terms, 1))
            extra[2 * index], extra[2 * index + 1] = usual, -usual
            columns = np.concatenate([columns, np.broadcast_to(extra, (2 * n_terms, columns.shape[1]))])
            counts = np.concatenate([counts, np.abs(extra[:, 0])])
        weights = self._draw(len(columns), "clusters")
        sums, totals = np.empty((self._n_draws, columns.shape[1])), np.empty(self._n_draws)
        for start in range(0, self._n_draws, _CHUNK):
            chunk = weights[start : start + _CHUNK].astype(np.float64)
            sums[start : start + _CHUNK] = chunk @ columns
            totals[start : start + _CHUNK] = chunk @ counts
        n_members = columns.shape[1]
        if n_members > 1:
            sums = sums * self._draw(n_members, "members", members)
        with np.errstate(invalid="ignore"):  # a draw may hold none that asks this: it is left out
            return sums.mean(1) / totals

    def _draw(self, n: int, what: Literal["clusters", "members"], which: int = 0) -> NDArray[np.uint8]:
        """How often each of `n` was drawn, `[n_draws, n]`; kept for the next estimate."""
        if (what, n, which) not in self._weights:
            generator = np.random.default_rng([self._seed, n, len(what), *([which] if which else [])])
            drawn = generator.multinomial(n, np.full(n, 1 / n), self._n_draws)
            self._weights[what, n, which] = np.minimum(drawn, 255).astype(np.uint8)
        return self._weights[what, n, which]


def difference(first: Estimate, second: Estimate, confidence: float = CONFIDENCE) -> Estimate:
    """Of two estimates from data that have nothing in common; their bootstraps need different seeds."""
    n = min(len(first.draws), len(second.draws))
    return _estimate(first.value - second.value, first.draws[:n] - second.draws[:n], confidence)


def _estimate(value: float, draws: Floats, confidence: float) -> Estimate:
    draws = draws[np.isfinite(draws)]
    tail = (1 - confidence) / 2
    low, high = np.quantile(draws, [tail, 1 - tail]) if len(draws) else (float("nan"), float("nan"))
    return Estimate(value, float(low), float(high), draws)


def mean_intervals(
    values: Floats, *, n_draws: int = 2_000, seed: int = 0, confidence: float = CONFIDENCE
) -> tuple[Floats, Floats, Floats]:
    """Means over rows with percentile bootstrap intervals, column by column; rows with nan are left out.

    Args:
        values: `[n, k]`, one row an independent sample.
        n_draws: how often rows are drawn again, the same rows for every column.
        seed: of the draws.
        confidence: of the intervals.

    Returns:
        mean, low and high, each `[k]`; nan where a column has no value.
    """
    values = np.asarray(values, dtype=np.float64)
    there = np.isfinite(values)
    filled = np.where(there, values, 0.0)
    n = len(values)
    weights = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), n_draws).astype(np.float64)
    tail = (1 - confidence) / 2
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = filled.sum(0) / there.sum(0)
        draws = (weights @ filled) / (weights @ there.astype(np.float64))
    low, high = (np.full(values.shape[1], np.nan) for _ in range(2))
    known = there.any(0)
    if known.any():
        low[known], high[known] = np.nanquantile(draws[:, known], [tail, 1 - tail], axis=0)
    return mean, low, high


def agreed_interval(
    value: float, n: int, *, lowest: float = 0.0, highest: float = 1.0, confidence: float = CONFIDENCE
) -> tuple[float, float]:
    """The interval of a mean over samples of which every one that was seen has this value, so that drawing
    them again gives no width. Samples of another kind may be up to 1 - (alpha / 2)^(1 / n) of all without one
    of them being seen, and may lie at either bound; at a bound this is the exact (Clopper-Pearson) interval.

    Args:
        value: what all have.
        n: how many were seen.
        lowest: the least that a sample can have.
        highest: the most that a sample can have.
        confidence: 1 - alpha.
    """
    unseen = 1 - ((1 - confidence) / 2) ** (1 / n)
    return value - unseen * (value - lowest), value + unseen * (highest - value)


def group_reach(groups: Floats, confidence: float = CONFIDENCE) -> Floats:
    """How far the interval of a mean over groups of samples reaches to both sides: Student's t over the
    groups' own means.

    Args:
        groups: `[groups, ...]`, the mean of each.
        confidence: of the interval.

    Returns:
        `[...]`; nan with one group.
    """
    from scipy.stats import t as student

    n = len(groups)
    if n < 2:
        return np.full(groups.shape[1:], np.nan)
    return np.asarray(student.ppf((1 + confidence) / 2, n - 1) * groups.std(0, ddof=1) * n**-0.5)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm-adjusted p-values: rejecting those up to alpha, at most alpha of the families err."""
    adjusted: dict[str, float] = {}
    running = 0.0
    for rank, name in enumerate(sorted(p_values, key=p_values.__getitem__)):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = running
    return {name: adjusted[name] for name in p_values}
