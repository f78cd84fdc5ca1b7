"""What an effect supports, in words computed from its intervals; nothing here looks at anything but numbers.

    tracks_beliefs       unedited, paired and false-belief accuracy are above chance; gate of the next two
    false_belief_falls   false-belief accuracy falls under the mask
    more_than_random     more than under random masks of equal size on average, and below 95 % of them
    true_belief_stays    its change is within +-margin; gate: above chance before any edit
    reality_stays        its change is within +-margin; gate: above chance before any edit
    perplexity_stays     the ratio of perplexities is within the margin

"Stays" is equivalence: the whole interval lies within the margin. A change that is not significant is not
evidence of staying. The gates are read off exact 95 % intervals; the claims that pass them are one family
with Holm-adjusted p-values at 0.05. A claim without its gate is "not testable": there is nothing to damage
where there was no ability.

NOT claimed: a cause. A supported selective effect says that these weights are needed for these answers in
this model, no more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from tl_tomsparse._intervals import CONFIDENCE, holm

if TYPE_CHECKING:
    from tl_tomsparse.effect import Effect

Status = Literal["supported", "not supported", "not testable"]
ALPHA = 1 - CONFIDENCE
_UNABLE = "The unedited model does not show that it tracks what each agent believes"
_FEWEST_SAMPLES = 10  # text samples below which drawing them again says nothing


@dataclass(frozen=True)
class Claim:
    """One claim about an effect.

    Attributes:
        claim: its name in the module docstring, or "selective_effect" for all of them together.
        status: "supported", "not supported" or "not testable".
        sentence: what was found, with the numbers.
        p: the Holm-adjusted p-value; None for gates, claims that are not testable, and all together.
    """

    claim: str
    status: Status
    sentence: str
    p: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The attributes as plain values for JSON."""
        return asdict(self)


class Test(NamedTuple):
    """A claim before Holm: why it cannot be tested, or its p-value, a further condition, its sentence."""

    claim: str
    obstacle: str | None
    p: float
    holds: bool
    sentence: Callable[[bool], str]


def verdict(effect: Effect) -> list[Claim]:
    """The claims of an effect: first "selective_effect", which takes all of them, then one by one."""
    gate, tests = gather(effect)
    claims = [gate, *decide(tests)]
    return [_together(claims, effect), *claims]


def gather(effect: Effect) -> tuple[Claim, list[Test]]:
    """The gate, and the claims before Holm, which other claims may join as one family."""
    reader = _Reader(effect)
    gate = reader.tracks_beliefs()
    return gate, [
        reader.false_belief_falls(gate),
        reader.more_than_random(gate),
        reader.stays("true_belief"),
        reader.stays("reality"),
        reader.perplexity_stays(),
    ]


def decide(tests: Sequence[Test]) -> list[Claim]:
    """The claims of one family, in order: supported where the Holm-adjusted p-value and the further condition
    allow it, not testable where there is an obstacle.
    """
    adjusted = holm({test.claim: test.p for test in tests if test.obstacle is None})
    claims = []
    for test in tests:
        if test.obstacle is not None:
            claims.append(Claim(test.claim, "not testable", _sentence(test.obstacle)))
            continue
        p = adjusted[test.claim]
        supported = p <= ALPHA and test.holds
        status: Status = "supported" if supported else "not supported"
        claims.append(Claim(test.claim, status, f"{test.sentence(supported)} Holm-adjusted p {_p(p)}.", p))
    return claims


class _Reader:
    def __init__(self, effect: Effect) -> None:
        self.effect = effect
        self._accuracy = effect.accuracy.set_index(["arm", "measure"])
        self._differences = effect.differences.set_index(["comparison", "measure"])
        self._empty = None if effect.n_weights["mask"] else "the mask is empty, so nothing was edited."

    def tracks_beliefs(self) -> Claim:
        if (obstacle := self._not_asked("false_belief") or self._not_asked("paired")) is not None:
            return Claim("tracks_beliefs", "not testable", _sentence(obstacle))
        able = [self._above_chance("false_belief"), self._above_chance("paired")]
        tracks = "The unedited model tracks what each agent believes" if all(able) else _UNABLE
        found = f"{self._before('false_belief')}; {self._before('paired')}"
        return Claim("tracks_beliefs", "supported" if all(able) else "not supported", f"{tracks}: {found}.")

    def false_belief_falls(self, gate: Claim) -> Test:
        name = "false_belief_falls"
        if (obstacle := self._empty or self._gated(gate)) is not None:
            return Test(name, obstacle, 1.0, False, str)
        row = self._differences.loc[("mask - before", "false_belief")]
        margin = self.effect.meta["accuracy_margin"]

        def sentence(supported: bool) -> str:
            found = f"{self._move('false_belief', 'mask')} ({_change(row)})"
            if supported:
                return f"False-belief accuracy falls under the mask: {found}."
            if row.low > 0:
                return f"False-belief accuracy rises under the mask: {found}."
            if row.high < 0:
                return f"A fall of false-belief accuracy is not shown, all claims taken together: {found}."
            if row.low > -margin:
                return f"No effect found: a fall of {_points(margin)} or more is excluded: {found}."
            return (
                f"No effect found: false-belief accuracy {found}; a fall of {_points(-row.low)} is possible."
            )

        return Test(name, None, float(row.p_below), True, sentence)

    def more_than_random(self, gate: Claim) -> Test:
        name = "more_than_random"
        if (obstacle := self._empty or self._gated(gate)) is not None:
            return Test(name, obstacle, 1.0, False, str)
        seeds = self.effect.random.false_belief
        needed = round(1 / ALPHA) - 1
        if len(seeds) < needed:
            few = (
                f"{len(seeds)} random masks are too few to be lower than 95 % of them; use at least {needed}."
            )
            return Test(name, few, 1.0, False, str)
        row = self._differences.loc[("mask - random", "false_belief")]
        after = self._accuracy.loc[("mask", "false_belief")].accuracy
        as_low = int((seeds <= after).sum())
        rank_p = (1 + as_low) / (1 + len(seeds))

        def sentence(supported: bool) -> str:
            falls = "falls more" if supported else "is not shown to fall more"
            mask, random = self._share("mask", "false_belief"), self._share("random", "false_belief")
            span = f"{percent(seeds.min())} to {percent(seeds.max())} over {len(seeds)} masks"
            return (
                f"False-belief accuracy {falls} than under random masks of equal size: {mask} against a mean "
                f"of {random} ({span}, {as_low} of them as low; {_change(row)})."
            )

        fall = self._differences.loc[("mask - before", "false_belief")]
        p = max(float(row.p_below), float(fall.p_below))  # to rise less is not to fall
        return Test(name, None, p, rank_p <= ALPHA + 1e-9, sentence)

    def stays(self, measure: str) -> Test:
        name, words = f"{measure}_stays", measure.replace("_", "-").capitalize()
        obstacle = self._empty or self._not_asked(measure)
        if obstacle is None and not self._above_chance(measure):
            obstacle = f"the unedited model is not above chance: {self._before(measure)}."
        if obstacle is not None:
            return Test(name, obstacle, 1.0, False, str)
        row = self._differences.loc[("mask - before", measure)]
        margin = f"{_points(self.effect.meta['accuracy_margin'])}"

        def sentence(supported: bool) -> str:
            found = f"{self._move(measure, 'mask')} ({_change(row)})"
            if supported:
                return f"{words} accuracy stays within {margin}: {found}."
            how = "falls" if row.high < 0 else "rises" if row.low > 0 else "is not shown to stay within"
            return f"{words} accuracy {how}{'' if row.high < 0 or row.low > 0 else ' ' + margin}: {found}."

        return Test(name, None, float(row.p_within), True, sentence)

    def perplexity_stays(self) -> Test:
        name = "perplexity_stays"
        n, margin = self.effect.meta["n_text_samples"], self.effect.meta["perplexity_margin"]
        obstacle = self._empty
        if obstacle is None and n < _FEWEST_SAMPLES:
            obstacle = f"{n} text samples are too few; use at least {_FEWEST_SAMPLES}."
        if obstacle is not None:
            return Test(name, obstacle, 1.0, False, str)
        table = self.effect.perplexity.set_index("arm")
        before, row = table.loc["before"], table.loc["mask"]

        def sentence(supported: bool) -> str:
            how = "stays" if supported else "is not shown to stay"
            return (
                f"Perplexity of text {how} within {100 * margin:g} %: {before.perplexity:.4g} before, "
                f"{row.perplexity:.4g} under the mask (ratio {row.ratio:.4f}, 95 % interval {row.low:.4f} to "
                f"{row.high:.4f})."
            )

        return Test(name, None, float(row.p_within), True, sentence)

    def _gated(self, gate: Claim) -> str | None:
        if gate.status == "supported":
            return None
        return gate.sentence if gate.status == "not testable" else f"{_UNABLE}, so nothing can be damaged."

    def _not_asked(self, measure: str) -> str | None:
        if ("before", measure) in self._accuracy.index:
            return None
        if measure == "paired":
            return "no story asks about several agents with different right answers."
        return f"no question of the category {measure} is asked."

    def _above_chance(self, measure: str) -> bool:
        row = self._accuracy.loc[("before", measure)]
        return bool(row.low > row.chance)

    def _before(self, measure: str) -> str:
        row = self._accuracy.loc[("before", measure)]
        what = "stories" if measure == "paired" else "questions"
        return (
            f"{measure.replace('_', '-')} accuracy {percent(row.accuracy)} of {int(row.n)} {what} "
            f"(95 % interval {percent(row.low)} to {percent(row.high)}, chance {percent(row.chance)})"
        )

    def _share(self, arm: str, measure: str) -> str:
        return percent(self._accuracy.loc[(arm, measure)].accuracy)

    def _move(self, measure: str, arm: str) -> str:
        n = int(self._accuracy.loc[("before", measure)].n)
        return f"{self._share('before', measure)} before, {self._share(arm, measure)} after, of {n} questions"


def _together(claims: list[Claim], effect: Effect) -> Claim:
    name = "selective_effect"
    by_name = {claim.claim: claim for claim in claims}
    falls = by_name["false_belief_falls"]
    weights = f"The edit of {effect.n_weights['mask']} weights"
    missing = [claim.claim.replace("_", " ") for claim in claims if claim.status != "supported"]
    if falls.status == "not testable":
        return Claim(name, "not testable", falls.sentence)
    if falls.status == "not supported":
        return Claim(name, "not supported", f"{weights} has no selective effect that shows. {falls.sentence}")
    if missing:
        shown = f"{weights} lowers false-belief accuracy, but not shown is: {', '.join(missing)}."
        return Claim(name, "not supported", shown)
    kept = "true belief, reality and perplexity stay, and random masks of equal size do less"
    return Claim(name, "supported", f"{weights} lowers false-belief accuracy while {kept}.")


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def percent(share: float) -> str:
    """As it is written in sentences."""
    return f"{100 * share:.1f} %"


def _points(share: float) -> str:
    return f"{100 * share:.3g} points"


def _change(row: Any) -> str:
    value, low, high = (f"{100 * number:+.1f}" for number in (row.value, row.low, row.high))
    return f"change {value} points, 95 % interval {low} to {high}"


def _p(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"= {p:.3f}"
