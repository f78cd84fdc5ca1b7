"""Comparisons between the arms of a study: paired by question, drawn again by group of stories.

    change(arm, other, measure) = (right under arm - right under other) / questions

Arms of a random family are averaged, and drawn again together with the stories.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tl_tomsparse._intervals import ClusterBootstrap, Estimate, proportion_interval
from tl_tomsparse._points import Measures
from tl_tomsparse._study_answers import Answers

if TYPE_CHECKING:
    import pandas as pd

Floats = NDArray[np.float64]
SCENARIOS = {"transfer": "false_belief in transfer", "contents": "false_belief in contents"}


class Comparer:
    """Changes of accuracy between families of arms on the same questions.

    Args:
        answers: of each family, one arm or one a seed; "before" is the unedited model.
        n_draws: how often groups are drawn again.
        seed: of the draws.
    """

    def __init__(self, answers: Answers, *, n_draws: int, seed: int) -> None:
        questions = answers.questions
        extra = {
            name: ((questions.category == "false_belief") & (questions.scenario == scenario)).to_numpy()
            for scenario, name in SCENARIOS.items()
        }
        self.answers, self.families = answers, answers.arms
        self.measures = Measures(questions, extra)
        self._bootstrap = ClusterBootstrap(self.measures.n_groups, n_draws=n_draws, seed=seed)
        self._counts: dict[tuple[str, str], Floats] = {}

    def counts(self, family: str, measure: str) -> Floats:
        """Right answers `[groups, arms]`."""
        if (family, measure) not in self._counts:
            correct = self.answers.correct[self.families[family]]
            self._counts[family, measure] = self.measures.counts(correct, measure)
        return self._counts[family, measure]

    def change(self, family: str, other: str, measure: str) -> Estimate:
        """Of one family against another; at least one of them has a single arm."""
        difference = self.counts(family, measure) - self.counts(other, measure)
        return self._bootstrap.ratio(difference, self.measures.totals[measure])

    def interaction(self, family: str, measure: str, other: str, reference: str) -> Estimate:
        """The change of one measure minus the change of another, both against the same family."""
        terms = [
            (self.counts(family, name) - self.counts(reference, name), self.measures.totals[name])
            for name in (measure, other)
        ]
        return self._bootstrap.contrast(terms)

    def share_of(self, numerator: Floats, measure: str) -> Estimate:
        """What these sums of the groups are of the questions."""
        return self._bootstrap.ratio(numerator, self.measures.totals[measure])

    def slope(
        self, families: Sequence[str], doses: Sequence[float], measure: str, minus: Sequence[str] = ()
    ) -> Estimate:
        """Least-squares slope of accuracy on log2(dose), the change for each doubling; less that of other
        families at the same doses.
        """
        x = np.log2(np.asarray(doses))
        x = (x - x.mean()) / ((x - x.mean()) ** 2).sum()
        # In units of the steepest slope that an answer can have: so steep are the groups, too, that smoothing
        # adds, which lose or gain every answer.
        steepest = np.abs(x).sum() / 2
        total = sum(w * self.counts(family, measure).mean(1) for w, family in zip(x / steepest, families))
        total -= sum(w * self.counts(family, measure).mean(1) for w, family in zip(x / steepest, minus))
        found = self._bootstrap.ratio(np.asarray(total), self.measures.totals[measure])
        return Estimate(*(steepest * part for part in (found.value, found.low, found.high, found.draws)))

    def accuracy(self, family: str, measure: str) -> Floats:
        """Of each arm of a family."""
        return np.asarray(self.counts(family, measure).sum(0) / self.measures.totals[measure].sum())

    def perplexity(self, family: str) -> Floats:
        """Of the text, under each arm of a family."""
        nll = self.answers.nll[self.families[family]].sum(1)
        return np.asarray(np.exp(nll / self.answers.n_tokens.sum()))

    def table(self, chance: Mapping[str, float]) -> pd.DataFrame:
        """One row a family and measure; see `Study.accuracy`."""
        import pandas as pd

        rows: list[dict[str, Any]] = []
        for family, arms in self.families.items():
            for measure in self.measures.names:
                values = self.accuracy(family, measure)
                n = int(self.measures.totals[measure].sum())
                if len(arms) == 1:
                    low, high = proportion_interval(round(values[0] * n), n)
                else:
                    low, high = values.min(), values.max()
                row = {"family": family, "arms": len(arms), "measure": measure, "n": n}
                row |= {"accuracy": values.mean(), "low": low, "high": high}
                rows.append({**row, "chance": chance.get(measure, np.nan)})
        return pd.DataFrame(rows)
