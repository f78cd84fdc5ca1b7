"""Effects of single heads from measurements with several heads out, and how far to trust them.

    y[m] = intercept + sum_h effect[h] out[m, h] + rest
    R^2  = 1 - sum (y - predicted)^2 / sum (y - mean)^2       of measurements that were not used for either

`effect` is the solver's, 0 for heads that it does not choose; `stability` the share of bootstrap resamples of
the measurements in which the solver chooses a head with the same sign; `estimate`, `low`, `high` a
least-squares effect beside the found heads, with an interval that holds for all heads at once; `found` says
that it is more than chance (see `_head_solvers`). The held-out R^2 says how additive the model is: what is
left is what heads do together.

NOT claimed: that an effect is the head's alone. It is the mean change of the score over what else was out in
the measurements; confirm heads by knocking them out ([`locate_heads`][] does).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tl_tomsparse._checks import TomsparseError, check_positive
from tl_tomsparse._head_solvers import Penalty, Solver, SolverName, step_down
from tl_tomsparse._intervals import ClusterBootstrap
from tl_tomsparse.heads import Head, Knockouts, head_name

if TYPE_CHECKING:
    import pandas as pd

Floats = NDArray[np.float64]
STABLE = 0.8  # share of resamples from which a head counts as chosen whatever the measurements
_FLAT = 0.05  # gain of R^2 by twice the measurements below which more of them are not worth it
FEWEST = 10


@dataclass(frozen=True, eq=False)
class HeadEffects:
    """What measurements say about each head.

    Attributes:
        frame: one row a head: layer, head, effect (score units; negative where the score needs the head),
            stability, estimate, low, high (simultaneous 95 %), found.
        r2, r2_low, r2_high: of held-out measurements, with a bootstrap 95 % interval over them; nan where the
            score is the same in all.
        r2_half: the same, of effects from half of the measurements.
        predicted: `[n]`, held-out prediction of each measurement; those of the same heads are one.
        scores: `[n]`, what was measured.
        intercept: of the additive model.
        unedited: the score with no head out.
        p: that the strongest head is chance; 1 where the score is the same in all measurements.
        enough: whether more measurements are not needed.
        reason: why, in a sentence.
        solver: what chose the heads.
        name: of the score.
    """

    frame: pd.DataFrame = field(repr=False)
    r2: float
    r2_low: float
    r2_high: float
    r2_half: float
    predicted: Floats = field(repr=False)
    scores: Floats = field(repr=False)
    intercept: float
    unedited: float
    p: float
    enough: bool
    reason: str
    solver: Solver
    name: str

    @property
    def found(self) -> list[Head]:
        """Heads that are more than chance, the most needed first, those that harm the score last."""
        rows = self.frame[self.frame.found].sort_values("estimate", kind="stable")
        return list(zip(rows.layer.tolist(), rows["head"].tolist()))

    def ranked(self) -> list[Head]:
        """Every head that the solver chooses or that is found and whose knock-out lowers the score, the most
        needed first; found ones before others.
        """
        size = self.frame.effect.where(~self.frame.found, self.frame.estimate)
        rows = self.frame.assign(size=size)[size < 0].sort_values(
            ["found", "size"], ascending=[False, True], kind="stable"
        )
        return list(zip(rows.layer.tolist(), rows["head"].tolist()))

    def to_frame(self) -> pd.DataFrame:
        """A copy of the table, one row a head."""
        return self.frame.copy()

    def __repr__(self) -> str:
        names = ", ".join(map(head_name, self.found)) or "none"
        return (
            f"HeadEffects({len(self.scores)} measurements of {len(self.frame)} heads, held-out R^2 "
            f"{self.r2:.2f} ({self.r2_low:.2f} to {self.r2_high:.2f}), found: {names})"
        )


def recover_heads(
    knockouts: Knockouts,
    *,
    solver: SolverName = "lasso",
    penalty: Penalty = "cv",
    smallest: float | None = None,
    level: float = 0.05,
    n_bootstrap: int = 50,
    n_permutations: int = 999,
    folds: int = 10,
    seed: int = 0,
) -> HeadEffects:
    """Recover the effects of heads from measurements.

    More measurements are not needed when (ours)

    * something is found, twice the measurements raise the held-out R^2 by less than 0.05, and the found heads
      are those that 80 % of resamples choose, but for heads whose intervals exclude effects of `smallest`; or
    * nothing is found, and the intervals exclude effects of `smallest` and more; or
    * the score is the same in all measurements.

    Args:
        knockouts: at least ten measurements; those of the same heads count as one, with their mean.
        solver: "lasso", "omp" (orthogonal matching pursuit), "iht" (iterative hard thresholding).
        penalty: "cv" (cross-validation), "bic" (Lasso only), or a number: alpha on standardised scores for
            the Lasso, the number of heads for the others.
        smallest: the smallest effect of one head that matters, in units of the score; by default a tenth of
            the unedited score.
        level: error level of what is found, of all heads together.
        n_bootstrap: resamples for the stability.
        n_permutations: for what is chance.
        folds: of the held-out R^2.
        seed: of folds, resamples and permutations.

    Raises:
        TomsparseError: fewer than ten different measurements; an unknown solver or penalty; a level outside
            (0, 1).
    """
    for name, count in (("n_bootstrap", n_bootstrap), ("n_permutations", n_permutations)):
        check_positive(name, count)
    if not 0 < level < 1:
        raise TomsparseError(f"level={level!r} is outside (0, 1), for example 0.05.")
    out, scores = _distinct(knockouts)
    n = len(scores)
    if n < FEWEST:
        raise TomsparseError(
            f"{n} different measurements are too few to recover anything; use at least {FEWEST}, or, with "
            "few heads, knock out each alone."
        )
    chosen = Solver(solver, penalty)
    smallest = 0.1 * abs(knockouts.unedited) if smallest is None else smallest
    effects = chosen.effects(out, scores, seed)
    intercept = float(scores.mean() - out.mean(0) @ effects)
    predicted, (r2, low, high) = _held_out(chosen, out, scores, min(folds, n), seed)
    if np.isnan(r2):
        frame = _frame(knockouts, effects, np.zeros(len(effects)), np.zeros((3, len(effects))), [])
        reason = (
            f"The score is {knockouts.unedited:.4g} with no head out and the same in all {n} measurements."
        )
        if not np.isclose(scores[0], knockouts.unedited, rtol=1e-6, atol=1e-12):
            reason = (
                f"The score is the same in all {n} measurements, {scores[0]:.4g}; unedited it is another."
            )
        return HeadEffects(
            frame, r2, low, high, r2, predicted, scores, intercept, knockouts.unedited, 1.0, True, reason,
            chosen, knockouts.name,
        )  # fmt: skip
    half = _held_out(chosen, out, scores, 2, seed)[1][0]
    stability = _stability(chosen.fixed(out, scores, seed), out, scores, effects, n_bootstrap, seed)
    tested = step_down(out, scores, level=level, n_permutations=n_permutations, seed=seed)
    bounds = np.stack(
        [tested.estimate, tested.estimate - tested.half_width, tested.estimate + tested.half_width]
    )
    frame = _frame(knockouts, effects, stability, bounds, tested.found)
    enough, reason = _enough(frame, (r2, low, high), half, smallest, level)
    return HeadEffects(
        frame, r2, low, high, half, predicted, scores, intercept, knockouts.unedited, tested.p[0], enough,
        reason, chosen, knockouts.name,
    )  # fmt: skip


def held_out_r2(knockouts: Knockouts, solver: Solver, *, folds: int, seed: int) -> tuple[float, float, float]:
    """R^2 of held-out measurements with its interval; nan where all scores are the same, and where fewer than
    ten measurements are different.
    """
    out, scores = _distinct(knockouts)
    if len(scores) < FEWEST:
        return float("nan"), float("nan"), float("nan")
    return _held_out(solver, out, scores, folds, seed)[1]


def _distinct(knockouts: Knockouts) -> tuple[NDArray[np.bool_], Floats]:
    """Measurements of the same heads as one with their mean: a repetition is not held out from the other."""
    out, first, which = np.unique(knockouts.design.out, axis=0, return_index=True, return_inverse=True)
    which = which.reshape(-1)
    sums = np.bincount(which, np.asarray(knockouts.scores, dtype=np.float64), len(out))
    order = np.argsort(first)
    found: NDArray[np.bool_] = out[order]
    return found, (sums / np.bincount(which))[order]


def _held_out(
    solver: Solver, out: NDArray[np.bool_], scores: Floats, folds: int, seed: int
) -> tuple[Floats, tuple[float, float, float]]:
    from sklearn.model_selection import KFold

    predicted, middle = np.empty_like(scores), np.empty_like(scores)
    for train, test in KFold(folds, shuffle=True, random_state=seed).split(out):
        effects = solver.effects(out[train], scores[train], seed)
        middle[test] = scores[train].mean()
        predicted[test] = middle[test] + (out[test] - out[train].mean(0)) @ effects
    spread = float(scores.std())
    if spread <= 1e-10 * float(np.abs(scores).max()):
        return predicted, (float("nan"), float("nan"), float("nan"))
    rest, total = (scores - predicted) ** 2, (scores - middle) ** 2
    found = ClusterBootstrap(len(scores), n_draws=2000, seed=seed, smooth=False).ratio(rest, total)
    return predicted, (1 - found.value, 1 - found.high, 1 - found.low)


def _stability(
    solver: Solver, out: NDArray[np.bool_], scores: Floats, effects: Floats, n: int, seed: int
) -> Floats:
    """How often a resample gives each effect the same sign; 0 where there is none."""
    rng = np.random.default_rng(seed)
    agreed = np.zeros(len(effects))
    for _ in range(n):
        rows = rng.integers(0, len(scores), len(scores))
        agreed += np.sign(solver.effects(out[rows], scores[rows], seed)) == np.sign(effects)
    return np.where(effects != 0, agreed / n, 0.0)


def _frame(
    knockouts: Knockouts,
    effects: Floats,
    stability: Floats,
    bounds: Floats,
    found: tuple[int, ...] | list[int],
) -> pd.DataFrame:
    import pandas as pd

    layers, heads = np.array(knockouts.design.heads).T
    columns = {"layer": layers, "head": heads, "effect": effects, "stability": stability}
    frame = pd.DataFrame({**columns, "estimate": bounds[0], "low": bounds[1], "high": bounds[2]})
    return frame.assign(found=np.isin(np.arange(len(frame)), found))


def _enough(
    frame: pd.DataFrame, r2: tuple[float, float, float], half: float, smallest: float, level: float
) -> tuple[bool, str]:
    percent = f"{100 * (1 - level):.3g} %"
    fit = f"held-out R^2 is {r2[0]:.2f} ({r2[1]:.2f} to {r2[2]:.2f})"
    reach = np.maximum(frame.high, -frame.low)
    if not frame.found.any():
        excluded = float(reach.max())
        nothing = f"No head's effect is more than chance (the {fit})"
        if np.isinf(excluded):
            return False, f"{nothing}; some heads were out in no measurement, or in all: measure more."
        if excluded <= smallest:
            return True, f"{nothing}; effects of {excluded:.3g} or more are excluded ({percent}, all heads)."
        return False, (
            f"{nothing}, but effects up to {excluded:.3g} are possible, and {smallest:.3g} would matter: "
            "measure more."
        )
    if r2[1] <= 0:
        return False, f"Heads are found, but few effects do not predict other measurements (the {fit})."
    if r2[0] - half >= _FLAT:
        return False, f"The {fit}, from half of the measurements {half:.2f}: measure more."
    stable = frame.stability >= STABLE
    unsure = frame[(stable ^ frame.found) & (reach >= smallest)]
    chosen = f"those that {100 * STABLE:g} % of resamples choose"
    if len(unsure):
        names = ", ".join(map(head_name, zip(unsure.layer, unsure["head"])))
        return False, f"The found heads and {chosen} differ in {names} (the {fit}): measure more."
    return True, (
        f"The {fit} ({half:.2f} from half of the measurements); the found heads are {chosen}, but for heads "
        f"with effects below {smallest:.3g}."
    )
