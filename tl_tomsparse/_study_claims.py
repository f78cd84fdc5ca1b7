"""What a study supports: the claims of an effect, and those that its controls allow, as one family.

    more_than_<control>      false-belief accuracy falls more than under the control; under random masks also
                             more than 95 % of them
    selective                the fall of false belief exceeds that of true belief, and so beyond random masks
    dose                     accuracy falls, on average over doublings of kappa, and so beyond random masks
    rescue                   leaving the most sensitive half of the mask unedited gives back more than leaving
                             a random half
    stable, seeds_agree      masks from two halves of the stories, and from stories of two seeds, have more in
                             common than chance
    transfers_to_<...>       a mask made from one kind of story lowers false belief in the other, the mask
                             second-order answers, and more than random masks do
    transfers_from_wordings  a mask made from stories in other wordings lowers false belief in these, likewise
    diagonal_predicts        the true change of the loss is within a factor of 2 of what the diagonal predicts
    amplifying_helps         1.5 times the masked weights raises false-belief accuracy, and more than 1.5
                             times random ones
    tuning_helps             the trained mask raises false-belief accuracy, and more than trained random masks

The last two are not testable where accuracy cannot rise.

A claim of several parts has the largest of their p-values: what falls more must be shown to fall, what gives
back more to give back some of a fall, what helps more to help, what random masks might do as well to exceed
them. What a transfer asks about must be answered above chance. Where the loss of every answer could not be
shown among so many claims, those of damage are not testable.

Every claim that has no obstacle is one of a family with Holm-adjusted p-values at 0.05. "paper" says where
arXiv 2504.04238 stands; "not asked" where it has no such control.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from tl_tomsparse._intervals import ClusterBootstrap, Estimate, proportion_interval
from tl_tomsparse._overlap import Overlap
from tl_tomsparse._study_arms import DOSES, FEW
from tl_tomsparse._study_compare import SCENARIOS, Comparer
from tl_tomsparse._study_words import ASKED, NAMES, PAPER
from tl_tomsparse.effect import Effect
from tl_tomsparse.loss_change import LossChange
from tl_tomsparse.verdict import ALPHA, Claim, Test, decide, gather, percent


@dataclass(frozen=True)
class StudyClaim(Claim):
    """A claim with its evidence and the paper's.

    Attributes:
        value, low, high: the estimate that it is read off, with its 95 % interval; nan where there is none.
        paper: where the paper stands.
    """

    value: float = float("nan")
    low: float = float("nan")
    high: float = float("nan")
    paper: str = "not asked"


@dataclass(frozen=True, eq=False)
class Evidence:
    """What claims are read off; `loss_groups` has the group of stories of each sample of `loss`, `overlaps`
    what masks of "halves" and "seeds" have in common.
    """

    effect: Effect
    compare: Comparer
    overlaps: Mapping[str, Overlap]
    loss: LossChange
    loss_groups: NDArray[np.int64]
    controls: tuple[str, ...]
    random: tuple[str, ...]
    sizes: Mapping[str, int]
    n_draws: int
    seed: int
    left_out: Mapping[str, str] = field(default_factory=dict)


def claims_of(evidence: Evidence) -> list[StudyClaim]:
    """All claims; see the module docstring."""
    gate, tests = gather(evidence.effect)
    maker = _Maker(evidence, gate)
    estimates: dict[str, Estimate] = {}
    for name, estimate, test in maker.all():
        estimates[name] = estimate
        tests.append(test)
    tests = maker.where_enough(tests)
    out = []
    for claim in (gate, *decide(tests)):
        estimate = estimates.get(claim.claim, maker.of_effect(claim.claim))
        out.append(with_evidence(claim, estimate))
    return out


def with_evidence(claim: Claim, estimate: Estimate) -> StudyClaim:
    """A claim with the estimate that it is read off, and the paper's stand."""
    paper = PAPER.get(claim.claim, "not asked")
    interval = estimate.value, estimate.low, estimate.high
    return StudyClaim(claim.claim, claim.status, claim.sentence, claim.p, *interval, paper)


_NONE = Estimate(float("nan"), float("nan"), float("nan"), np.zeros(0))


class _Maker:
    def __init__(self, evidence: Evidence, gate: Claim) -> None:
        self.evidence, self.gate = evidence, gate
        self.compare = evidence.compare

    def of_effect(self, claim: str) -> Estimate:
        """The estimate behind a claim of the effect."""
        rows = self.evidence.effect.differences.set_index(["comparison", "measure"])
        where = {
            "false_belief_falls": ("mask - before", "false_belief"),
            "more_than_random": ("mask - random", "false_belief"),
            "true_belief_stays": ("mask - before", "true_belief"),
            "reality_stays": ("mask - before", "reality"),
        }.get(claim)
        if where is None or where not in rows.index:
            return _NONE
        row = rows.loc[where]
        return Estimate(float(row.value), float(row.low), float(row.high), np.zeros(0))

    def all(self) -> list[tuple[str, Estimate, Test]]:
        made = [self._random(name) for name in self.evidence.random]
        made += [self._control(name) for name in self.evidence.controls]
        made += [self._selective(), self._dose(), self._rescue()]
        made += [
            self._alike("stable", "halves", "two halves of the stories"),
            self._alike("seeds_agree", "seeds", "stories of two seeds", "other_stories"),
        ]
        made += [
            self._transfers("to_contents", "transfer", "transfer stories", SCENARIOS["contents"]),
            self._transfers("to_transfer", "contents", "contents stories", SCENARIOS["transfer"]),
            self._transfers("to_second_order", "mask", "first-order questions", "second_order"),
            self._transfers("from_wordings", "new_wording", "stories in other wordings", "false_belief"),
        ]
        made += [self._diagonal(), self._amplify(), self._tuning()]
        return made

    def where_enough(self, tests: list[Test]) -> list[Test]:
        """Claims of damage are not testable where even the loss of every answer would not be shown."""
        n = sum(test.obstacle is None for test in tests)
        totals = self.compare.measures.totals.get("false_belief")
        if totals is None or not n:
            return tests
        groups = int((totals > 0).sum())
        p = n * self.compare.share_of(-totals, "false_belief").p_below()
        if p <= ALPHA:
            return tests
        few = (
            f"{groups} groups of stories and {self.evidence.n_draws} draws are too few for {n} claims: were "
            f"every answer lost, the Holm-adjusted p-value could be {min(1.0, p):.2g}."
        )
        return [
            test._replace(obstacle=few) if test.obstacle is None and _of_damage(test.claim) else test
            for test in tests
        ]

    def _obstacle(self, *families: str) -> str | None:
        if not self.evidence.sizes["mask"]:
            return "the mask is empty, so nothing was edited."
        if self.gate.status != "supported":
            return f"nothing can be damaged: {self.gate.sentence}"
        for family in families:
            if family in self.evidence.left_out:
                return self.evidence.left_out[family]
            if family not in self.compare.families:
                return f"{family.replace('_', ' ')} was not measured for this model."
            if not self.evidence.sizes.get(family, 1):
                return f"the mask {family.replace('_', ' ')} is empty at this kappa."
        return None

    def _test(
        self,
        name: str,
        families: tuple[str, ...],
        estimate: Callable[[], Estimate],
        p: Callable[[Estimate], float],
        sentence: Callable[[Estimate, bool], str],
        holds: Callable[[], bool] = lambda: True,
        few: str | None = None,
    ) -> tuple[str, Estimate, Test]:
        obstacle = self._obstacle(*families)
        if obstacle is None and few is not None and (n := len(self.compare.families[few])) < FEW:
            obstacle = f"{n} random masks are too few for their mean; use at least {FEW}."
        if obstacle is not None:
            return name, _NONE, Test(name, obstacle, 1.0, False, str)
        found = estimate()
        return name, found, Test(name, None, p(found), holds(), lambda yes: sentence(found, yes))

    def _below(
        self, family: str, what: str, further: Callable[[], str] = str
    ) -> Callable[[Estimate, bool], str]:
        def sentence(found: Estimate, yes: bool) -> str:
            falls = "falls more" if yes else "is not shown to fall more"
            mask, other = (self.compare.accuracy(name, "false_belief").mean() for name in ("mask", family))
            return (
                f"False-belief accuracy {falls} than under {what}: {percent(mask)} against "
                f"{percent(other)} ({further()}{in_points(found)})."
            )

        return sentence

    def _random(self, family: str) -> tuple[str, Estimate, Test]:
        name = f"more_than_{family}"
        few = len(self.compare.families.get(family, ())) < round(1 / ALPHA) - 1
        if few and self._obstacle(family) is None:
            words = f"{len(self.compare.families[family])} random masks are too few; use at least 19."
            return name, _NONE, Test(name, words, 1.0, False, str)

        def as_low() -> tuple[int, int]:
            seeds = self.compare.accuracy(family, "false_belief")
            return int((seeds <= self.compare.accuracy("mask", "false_belief")[0]).sum()), len(seeds)

        def holds() -> bool:
            low, n = as_low()
            return (1 + low) / (1 + n) <= ALPHA + 1e-9

        def counted() -> str:
            low, n = as_low()
            return f"{low} of {n} as low; "

        return self._test(
            name,
            (family,),
            lambda: self.compare.change("mask", family, "false_belief"),
            self._p_of_a_fall,
            self._below(family, NAMES.get(family, family.replace("_", " ")), counted),
            holds,
        )

    def _control(self, family: str) -> tuple[str, Estimate, Test]:
        what = NAMES.get(family, f"the mask of {family.replace('_', ' ')}")
        what += f" ({self.evidence.sizes.get(family, 0)} weights)"
        return self._test(
            f"more_than_{family}",
            (family,),
            lambda: self.compare.change("mask", family, "false_belief"),
            self._p_of_a_fall,
            self._below(family, what),
        )

    def _p_of_a_fall(self, *estimates: Estimate) -> float:
        """That these are below 0, and that the mask lowers accuracy at all: less than a rise is no fall."""
        fall = self.compare.change("mask", "before", "false_belief")
        return max(found.p_below() for found in (fall, *estimates))

    def _selective(self) -> tuple[str, Estimate, Test]:
        if "true_belief" not in self.compare.measures.names:
            obstacle = "no question of the category true_belief is asked."
            return "selective", _NONE, Test("selective", obstacle, 1.0, False, str)

        def beyond() -> Estimate:
            return self.compare.interaction("mask", "false_belief", "true_belief", "random_matrix")

        def sentence(found: Estimate, yes: bool) -> str:
            how = "falls more" if yes else "is not shown to fall more"
            return f"False belief {how} than true belief ({in_points(found)}; {_than_random(beyond())})."

        return self._test(
            "selective",
            ("mask", "random_matrix"),
            lambda: self.compare.interaction("mask", "false_belief", "true_belief", "before"),
            lambda found: self._p_of_a_fall(found, beyond()),
            sentence,
        )

    def _dose(self) -> tuple[str, Estimate, Test]:
        doses = {f"dose_{dose:g}": dose for dose in DOSES if f"dose_{dose:g}" in self.compare.families}
        families, steps = [*doses, "mask"], [*doses.values(), 1.0]
        random = [*(f"{dose}_random" for dose in doses), "random_matrix"]

        def beyond() -> Estimate:
            return self.compare.slope(families, steps, "false_belief", random)

        def sentence(found: Estimate, yes: bool) -> str:
            how = "falls" if yes else "is not shown to fall"
            return (
                f"False-belief accuracy {how} on average with a doubling of kappa ({in_points(found)}; "
                f"{_than_random(beyond())})."
            )

        return self._test(
            "dose",
            (*(doses or ("dose",)), *random),
            lambda: self.compare.slope(families, steps, "false_belief"),
            lambda found: max(found.p_below(), beyond().p_below()),
            sentence,
        )

    def _rescue(self) -> tuple[str, Estimate, Test]:
        def sentence(found: Estimate, yes: bool) -> str:
            how = "gives back more" if yes else "is not shown to give back more"
            return (
                f"Leaving the most sensitive half of the mask unedited {how} than leaving a random half "
                f"({in_points(found)})."
            )

        return self._test(
            "rescue",
            ("rescue_0.5", "rescue_0.5_random"),
            lambda: self.compare.change("rescue_0.5", "rescue_0.5_random", "false_belief"),
            lambda found: max(
                found.p_above(),
                self.compare.change("rescue_0.5", "mask", "false_belief").p_above(),
                self._p_of_a_fall(),
            ),
            sentence,
            few="rescue_0.5_random",
        )

    def _alike(self, name: str, which: str, what: str, family: str = "") -> tuple[str, Estimate, Test]:
        found = self.evidence.overlaps.get(which)
        obstacle = self.evidence.left_out.get(family)
        if obstacle is None and (found is None or not min(found.sizes)):
            obstacle = "one of the masks is empty."
        if found is None or obstacle is not None:
            return name, _NONE, Test(name, obstacle, 1.0, False, str)

        def sentence(yes: bool) -> str:
            how = "have more" if yes else "are not shown to have more"
            return (
                f"Masks from {what} {how} in common than random masks: Jaccard {found.jaccard:.3f}, by "
                f"chance {found.expected_jaccard:.3f}."
            )

        estimate = Estimate(found.jaccard, float("nan"), float("nan"), np.zeros(0))
        return name, estimate, Test(name, None, found.p, True, sentence)

    def _transfers(self, to: str, family: str, of: str, measure: str) -> tuple[str, Estimate, Test]:
        name, asked = f"transfers_{to}", ASKED[measure]
        if measure not in self.compare.measures.names:
            return name, _NONE, Test(name, f"no question about {asked} is asked.", 1.0, False, str)
        right = self.compare.counts("before", measure).sum()
        n = self.compare.measures.totals[measure].sum()
        low, _ = proportion_interval(int(right), int(n))
        if low <= (chance := self._chance(measure)):
            obstacle = (
                f"the unedited model is not shown to be above chance about {asked}, so nothing can be "
                f"damaged: {percent(right / n)} of {n:.0f}, chance {percent(chance)}."
            )
            return name, _NONE, Test(name, obstacle, 1.0, False, str)

        def sentence(found: Estimate, yes: bool) -> str:
            how = "lowers" if yes else "is not shown to lower"
            than = _than_random(self.compare.change(family, "random_matrix", measure))
            return f"The mask made from {of} {how} accuracy about {asked} ({in_points(found)}; {than})."

        return self._test(
            name,
            (family, "random_matrix"),
            lambda: self.compare.change(family, "before", measure),
            lambda found: max(
                found.p_below(), self.compare.change(family, "random_matrix", measure).p_below()
            ),
            sentence,
        )

    def _chance(self, measure: str) -> float:
        """What guessing gives; the false beliefs of one scenario are like all of them."""
        rows = self.evidence.effect.accuracy
        asked = "false_belief" if measure in SCENARIOS.values() else measure
        return float(rows[(rows.arm == "before") & (rows.measure == asked)].chance.iloc[0])

    def _diagonal(self) -> tuple[str, Estimate, Test]:
        loss, name = self.evidence.loss, "diagonal_predicts"
        if not self.evidence.sizes["mask"]:
            return name, _NONE, Test(name, "the mask is empty, so nothing was edited.", 1.0, False, str)
        true = loss.samples["true"]
        groups = self.evidence.loss_groups
        bootstrap = ClusterBootstrap(
            int(groups.max()) + 1, n_draws=self.evidence.n_draws, seed=self.evidence.seed, smooth=False
        )
        sums, counts = (np.bincount(groups, weights=some).astype(np.float64) for some in (true, None))
        found = bootstrap.ratio(sums, counts)
        low, high = sorted((loss.diagonal / 2, loss.diagonal * 2))

        def sentence(yes: bool) -> str:
            how = "is" if yes else "is not shown to be"
            second = loss.samples["second_order"].mean()
            return (
                f"The change of the loss {how} within a factor of 2 of what the diagonal predicts: "
                f"{found.value:+.3g} nats ({found.low:+.3g} to {found.high:+.3g}), predicted "
                f"{loss.diagonal:+.3g}; gradient and whole Hessian along the edit predict {second:+.3g}."
            )

        return name, found, Test(name, None, found.p_within(low, high), True, sentence)

    def _no_gain(self, name: str) -> tuple[str, Estimate, Test] | None:
        """Not testable where all false-belief questions are answered right to begin with."""
        if self._obstacle("mask") is not None or self.compare.accuracy("before", "false_belief")[0] < 1:
            return None
        obstacle = "every false-belief question is right before any edit, so there is nothing to gain."
        return name, _NONE, Test(name, obstacle, 1.0, False, str)

    def _amplify(self) -> tuple[str, Estimate, Test]:
        if (full := self._no_gain("amplifying_helps")) is not None:
            return full

        return self._helps(
            "amplifying_helps", "Multiplying the masked weights by 1.5", "multiplying", "operator_amplify"
        )

    def _tuning(self) -> tuple[str, Estimate, Test]:
        if (full := self._no_gain("tuning_helps")) is not None:
            return full

        return self._helps("tuning_helps", "Training the masked weights alone", "training", "tuned")

    def _helps(self, name: str, doing: str, same: str, family: str) -> tuple[str, Estimate, Test]:
        random = f"{family}_random"

        def sentence(found: Estimate, yes: bool) -> str:
            how = "helps more" if yes else "is not shown to help more"
            rates = (
                percent(self.compare.accuracy(some, "false_belief").mean())
                for some in ("before", family, random)
            )
            before, with_mask, with_random = rates
            return (
                f"{doing} {how} than {same} random ones: false belief {before} before, {with_mask} and "
                f"{with_random} ({in_points(found)})."
            )

        def p(found: Estimate) -> float:
            gain = self.compare.change(family, "before", "false_belief")
            return max(found.p_above(), gain.p_above())

        return self._test(
            name,
            (family, random),
            lambda: self.compare.change(family, random, "false_belief"),
            p,
            sentence,
            few=random,
        )


def _of_damage(claim: str) -> bool:
    return claim.startswith("more_than_") or claim in ("false_belief_falls", "selective", "dose", "rescue")


def in_points(found: Estimate) -> str:
    """A difference of accuracies as it is written in sentences."""
    value, low, high = (f"{100 * number:+.1f}" for number in (found.value, found.low, found.high))
    return f"difference {value} points, 95 % interval {low} to {high}"


def _than_random(found: Estimate) -> str:
    """The same beyond random masks of equal size."""
    value, low, high = (f"{100 * number:+.1f}" for number in (found.value, found.low, found.high))
    return f"beyond random masks {value}, {low} to {high}"
