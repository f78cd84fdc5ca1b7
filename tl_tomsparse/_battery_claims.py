"""What an edit does to finding things again and to two kinds of text, as claims of one family.

    key_value_falls, induction_falls    accuracy over all distances falls under the mask, and more than under
                                        random masks on average; gate: the unedited model is above chance
    prose_stays, patterns_stays         the ratio of perplexities is within the margin

Changes are paired by item. The same facts are asked for at every distance and are one group, and groups are
drawn again, for the mean of random masks the masks as well. A claim of two conditions has the larger of their
p-values. Holm-adjusted at 0.05.

NOT claimed: at which distance an effect begins (distances have intervals of their own, and no claim).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tl_tomsparse._intervals import ClusterBootstrap, Estimate
from tl_tomsparse._study_arms import FEW
from tl_tomsparse._study_claims import StudyClaim, in_points, with_evidence
from tl_tomsparse.verdict import Test, decide, percent

if TYPE_CHECKING:
    import pandas as pd

    from tl_tomsparse._study_settings import StudySettings

Floats = NDArray[np.float64]
Items = Mapping[str, Sequence["pd.DataFrame"]]
_ABLE = "before - chance"
_FALLS, _BEYOND = "mask - before", "mask - random_matrix"
_COMPARISONS = (_FALLS, _BEYOND, "general_only - before")
_WORDS = {"key_value": "Key-value recall", "induction": "Induction"}
_NONE = Estimate(float("nan"), float("nan"), float("nan"), np.zeros(0))


class Change(NamedTuple):
    """What an estimate is of; of perplexity it is the logarithm of a ratio."""

    comparison: str
    task: str
    subset: str


def changes_of(items: Items, *, n_draws: int, seed: int) -> dict[Change, Estimate]:
    """Changes of accuracy and of log perplexity; and by how much the unedited model is above chance.

    Args:
        items: of each family of arms, one frame each or one a seed, all of the same items in the same order.
        n_draws: how often groups are drawn again.
        seed: of the draws.
    """
    import pandas as pd

    (before,) = items["before"]
    found: dict[Change, Estimate] = {}
    for task, subset, places in _selections(before):
        some = before.iloc[places]
        groups = pd.factorize(some.group)[0]
        n = int(groups.max()) + 1
        # Losses are continuous, so "no change in any" means no change: nothing to smooth.
        bootstrap = ClusterBootstrap(n, n_draws=n_draws, seed=seed, smooth=task != "perplexity")

        def grouped(values: Any, groups: Any = groups, n: int = n) -> Floats:
            return np.bincount(groups, np.asarray(values, np.float64), n).astype(np.float64)

        sums = {
            family: np.stack([grouped(frame.value.iloc[places]) for frame in frames], axis=1)
            for family, frames in items.items()
        }
        weights = grouped(some.weight)
        for comparison in _COMPARISONS:
            family, other = comparison.split(" - ")
            found[Change(comparison, task, subset)] = bootstrap.ratio(sums[family] - sums[other], weights)
        if task != "perplexity":
            above = sums["before"][:, 0] - grouped(some.chance)
            found[Change(_ABLE, task, subset)] = bootstrap.ratio(above, weights)
    return found


def _selections(items: pd.DataFrame) -> Iterator[tuple[str, str, Any]]:
    """Task, subset and rows: each distance or kind of text, and all distances together."""
    for (task, subset), rows in items.groupby(["task", "subset"], sort=False).indices.items():
        yield task, subset, rows
    for task in _WORDS:
        if (rows := np.flatnonzero(items.task == task)).size:
            yield task, "all", rows


def changes_table(changes: Mapping[Change, Estimate]) -> pd.DataFrame:
    """See `BatterySection.changes`."""
    import pandas as pd

    rows = []
    for change, found in changes.items():
        if change.comparison == _ABLE:
            continue
        shown = np.exp if change.task == "perplexity" else float
        value, low, high = (float(shown(number)) for number in (found.value, found.low, found.high))
        rows.append({**change._asdict(), "value": value, "low": low, "high": high, "p": found.p_differs()})
    return pd.DataFrame(rows)


def battery_claims(
    items: Items, changes: Mapping[Change, Estimate], n_weights: int, settings: StudySettings
) -> list[StudyClaim]:
    """All claims; see the module docstring."""
    maker = _Maker(items, changes, n_weights, settings.perplexity_margin)
    made = [*map(maker.falls, _WORDS), *map(maker.stays, ("prose", "patterns"))]
    estimates = {test.claim: estimate for test, estimate in made}
    return [with_evidence(claim, estimates[claim.claim]) for claim in decide([test for test, _ in made])]


class _Maker:
    def __init__(
        self, items: Items, changes: Mapping[Change, Estimate], n_weights: int, margin: float
    ) -> None:
        self.items, self.changes, self.n_weights, self.margin = items, changes, n_weights, margin

    def falls(self, task: str) -> tuple[Test, Estimate]:
        name, what = f"{task}_falls", _WORDS[task]
        change, beyond, able = (
            self.changes[Change(comparison, task, "all")] for comparison in (_FALLS, _BEYOND, _ABLE)
        )
        (before,) = self.items["before"]
        asked = before[before.task == task]
        distances = [int(subset) for subset in asked.subset.unique()]
        where = f"of {len(asked)} items at {min(distances)} to {max(distances)} tokens"
        n_random = len(self.items["random_matrix"])
        obstacle = None
        if not self.n_weights:
            obstacle = "the mask is empty, so nothing was edited."
        elif able.low <= 0:
            chance = percent(asked.chance.mean())
            obstacle = (
                f"the unedited model is not shown to be above chance, so nothing can be damaged: {what} "
                f"{self._share('before', task)} {where}, chance {chance} ({in_points(able)})."
            )
        elif n_random < FEW:
            obstacle = f"{n_random} random masks are too few for their mean; use at least {FEW}."
        if obstacle is not None:
            return Test(name, obstacle, 1.0, False, str), _NONE

        def sentence(yes: bool) -> str:
            how = "falls" if yes else "is not shown to fall"
            return (
                f"{what} {how} under the mask, and more than under random masks: "
                f"{self._share('before', task)} before, {self._share('mask', task)} after, a mean of "
                f"{self._share('random_matrix', task)} under {n_random} random masks, {where} ("
                f"{in_points(change)}; beyond random masks {in_points(beyond)})."
            )

        return Test(name, None, max(change.p_below(), beyond.p_below()), True, sentence), change

    def stays(self, kind: str) -> tuple[Test, Estimate]:
        name = f"{kind}_stays"
        if not self.n_weights:
            return Test(name, "the mask is empty, so nothing was edited.", 1.0, False, str), _NONE
        found = self.changes[Change(_FALLS, "perplexity", kind)]
        value, low, high = (float(np.exp(number)) for number in (found.value, found.low, found.high))
        edge = float(np.log1p(self.margin))

        def sentence(yes: bool) -> str:
            how = "stays" if yes else "is not shown to stay"
            before, after = (self._perplexity(family, kind) for family in ("before", "mask"))
            return (
                f"Perplexity of {kind} {how} within {100 * self.margin:g} %: {before} before, {after} under "
                f"the mask (ratio {value:.4f}, 95 % interval {low:.4f} to {high:.4f})."
            )

        test = Test(name, None, found.p_within(-edge, edge), True, sentence)
        return test, Estimate(value, low, high, np.exp(found.draws))

    def _share(self, family: str, task: str) -> str:
        frames = self.items[family]
        return percent(float(np.mean([frame[frame.task == task].value.mean() for frame in frames])))

    def _perplexity(self, family: str, kind: str) -> str:
        (frame,) = self.items[family]
        some = frame[(frame.task == "perplexity") & (frame.subset == kind)]
        return f"{np.exp(some.value.sum() / some.weight.sum()):.4g}"
