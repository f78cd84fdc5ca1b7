"""Studies of several models side by side: what the mask does in one and not in another.

    change      (right under the mask - right before) / questions; beyond random masks: - right under these
    difference  change in the first model - change in another
    perplexity  both of ln(perplexity), nats a token

    architecture_specific  false-belief accuracy falls more, beyond random masks, in the first model than in
                           the other; one claim for each other model, one family with Holm-adjusted p-values

Where two studies asked the same questions, these are paired: groups of stories are drawn again for both
models together. Elsewhere each has its own. Random masks are drawn again for each model by itself.

A claim is not testable if a model does not track beliefs, or if the masks were made at different sparsity or
of different matrices: changes then differ for that reason alone.

NOT claimed: that what sets two architectures apart is the cause. Each is one model from one training, they
may differ in more than one thing, and an equal kappa is not an equal blow; see perplexity beside.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from tl_tomsparse._checks import TomsparseError, check_positive
from tl_tomsparse._intervals import ClusterBootstrap, Estimate, difference
from tl_tomsparse._study_claims import in_points
from tl_tomsparse._study_compare import Comparer
from tl_tomsparse.effect import CONTRAST
from tl_tomsparse.study import Study
from tl_tomsparse.verdict import ALPHA, Claim, Test, decide

if TYPE_CHECKING:
    import pandas as pd

Against = Literal["before", "random"]
PERPLEXITY = "perplexity"
_FAMILIES: dict[Against, str] = {"before": "before", "random": "random_matrix"}
_Terms = list[tuple[NDArray[np.float64], NDArray[np.float64]]]
_NAN = float("nan")


@dataclass(frozen=True)
class ContrastClaim(Claim):
    """A claim about two models.

    Attributes:
        model, other: in which the fall is said to be larger, and smaller.
        value, low, high: the difference of the two changes, with its 95 % interval; nan where not testable.
        paired: whether both were asked the same questions; None where not testable.
    """

    model: str = ""
    other: str = ""
    value: float = _NAN
    low: float = _NAN
    high: float = _NAN
    paired: bool | None = None


@dataclass(frozen=True, eq=False)
class StudyComparison:
    """Studies side by side; the first model is set against each other one.

    Attributes:
        claims: "architecture_specific", one for each other model.
        frame: one row a change and a difference of changes: measure, against ("before" or "random"), model,
            minus (the other model; None for the change itself), n (questions, stories, or text samples),
            value (share of n; for "perplexity" nats a token), low, high (bootstrap 95 %), p (two-sided, of
            "none"), paired (of differences), random, random_low, random_high (of changes against "before":
            mean and range of the same under random masks).
        statuses: the status of every claim (rows) of each study (columns); "not made" where a study has no
            such claim.
        models: one row a model: model, name, fingerprint, kappa, n_weights, matrices, tracks_beliefs, before,
            mask, random (false-belief accuracy).
        settings: what the studies were asked for where that differs, a column a model.
    """

    claims: list[ContrastClaim]
    frame: pd.DataFrame = field(repr=False)
    statuses: pd.DataFrame = field(repr=False)
    models: pd.DataFrame = field(repr=False)
    settings: pd.DataFrame = field(repr=False)

    def to_frame(self) -> pd.DataFrame:
        """A copy of the table of changes and differences."""
        return self.frame.copy()

    def __repr__(self) -> str:
        """One line: the first model, and how each claim about it came out."""
        found = ", ".join(f"than {claim.other} {claim.status}" for claim in self.claims)
        return f"StudyComparison({len(self.models)} models; {self.claims[0].model} falls more: {found})"


def compare_studies(studies: Mapping[str, Study], *, n_draws: int = 10_000, seed: int = 0) -> StudyComparison:
    """Set the study of one model against those of others.

    Args:
        studies: by what the models shall be called; claims are about the first one.
        n_draws: how often groups of stories are drawn again.
        seed: of the draws.

    Raises:
        TomsparseError: fewer than two studies, or something else in place of one.
    """
    import pandas as pd

    check_positive("n_draws", n_draws)
    for label, study in studies.items():
        if not isinstance(study, Study):
            raise TomsparseError(
                f"studies[{label!r}] is a {type(study).__name__} and not a Study; read it with "
                "read_study(folder)."
            )
    if len(studies) < 2:
        raise TomsparseError(f"studies has {len(studies)} of them; pass at least two, by name.")
    boot = _Bootstraps(n_draws, seed)
    first, *others = [
        _Side(label, study, place, Comparer(study.answers, n_draws=n_draws, seed=seed))
        for place, (label, study) in enumerate(studies.items())
    ]
    rows = [row for side in (first, *others) for row in _changes(side, boot)]
    rows += [row for other in others for row in _differences(first, other, boot)]
    return StudyComparison(
        _claims(first, others, boot),
        pd.DataFrame(rows),
        _statuses(studies),
        pd.DataFrame([side.facts() for side in (first, *others)]),
        _settings(studies),
    )


class _Bootstraps:
    """Kept, since the draws of one serve many measures."""

    def __init__(self, n_draws: int, seed: int) -> None:
        self._n_draws, self._seed = n_draws, seed
        self._made: dict[tuple[int, bool, int], ClusterBootstrap] = {}

    def __call__(self, n_clusters: int, measure: str, place: int = 0) -> ClusterBootstrap:
        """`place` tells apart what has to be drawn independently."""
        # Losses are continuous, so "no change in any" means no change: nothing to smooth.
        key = (n_clusters, measure != PERPLEXITY, place)
        if key not in self._made:
            self._made[key] = ClusterBootstrap(
                n_clusters, n_draws=self._n_draws, seed=self._seed + place, smooth=key[1]
            )
        return self._made[key]


class _Side:
    """The study of one model as counts."""

    def __init__(self, label: str, study: Study, place: int, compare: Comparer) -> None:
        self.label, self.study, self.place, self.compare = label, study, place, compare
        names = list(self.compare.measures.names)
        if {"false_belief", "true_belief"} <= set(names):
            names.append(CONTRAST)
        self.measures = (*names, PERPLEXITY)

    def terms(self, measure: str, family: str, other: str) -> _Terms:
        """The change from one family to another: the first ratio minus the rest, `[clusters, arms]` over
        `[clusters]`.
        """
        if measure == PERPLEXITY:
            answers, rows = self.study.answers, self.compare.families
            change = answers.nll[rows[family]] - answers.nll[rows[other]]
            return [(change.T, answers.n_tokens.astype(np.float64))]
        return [
            (
                self.compare.counts(family, name) - self.compare.counts(other, name),
                self.compare.measures.totals[name],
            )
            for name in _parts(measure)
        ]

    def fall(self, against: Against) -> float:
        """The change of false-belief accuracy, negative where it falls."""
        return float(_ratio(self.terms("false_belief", "mask", _FAMILIES[against])).mean())

    def asks(self, measure: str) -> tuple[Any, NDArray[np.int64]]:
        """What is asked, comparable between studies, and the clusters that ask it, by name."""
        if measure == PERPLEXITY:
            return self.study.answers.text, np.arange(len(self.study.answers.n_tokens))
        measures = self.compare.measures
        asked = np.any([measures.asked(name) for name in _parts(measure)], axis=0)
        columns = ["group", "prompt", "options"]
        chosen = self.study.answers.questions.loc[asked, columns].sort_values("group", kind="stable")
        totals = sum(measures.totals[name] for name in _parts(measure))
        order = sorted(np.flatnonzero(totals), key=lambda cluster: measures.groups[cluster])
        return chosen.to_numpy().tolist(), np.array(order)

    def facts(self) -> dict[str, Any]:
        """A row of `StudyComparison.models`."""
        study = self.study
        rates = {
            name: float(self.compare.accuracy(family, "false_belief").mean())
            if "false_belief" in self.measures
            else _NAN
            for name, family in {"before": "before", "mask": "mask", "random": _FAMILIES["random"]}.items()
        }
        return {
            "model": self.label,
            "name": study.facts["identity"]["name"],
            "fingerprint": study.facts["identity"]["fingerprint"],
            "kappa": study.kappa,
            "n_weights": len(study.masks["mask"]),
            "matrices": self.matrices,
            "tracks_beliefs": self.tracks,
            **rates,
        }

    @property
    def matrices(self) -> str:
        return ", ".join(self.study.facts["settings"]["matrices"])

    @property
    def tracks(self) -> str:
        return next(claim.status for claim in self.study.claims if claim.claim == "tracks_beliefs")

    def obstacle(self) -> str | None:
        """Why nothing can be said about this model."""
        n_random = len(self.compare.families[_FAMILIES["random"]])
        if self.tracks != "supported":
            unable = "which is not shown to track what each agent believes"
            return f"nothing can be damaged in {self.label}, {unable}."
        if not len(self.study.masks["mask"]):
            return f"the mask of {self.label} is empty, so nothing was edited."
        if n_random < round(1 / ALPHA) - 1:
            return f"{n_random} random masks of {self.label} are too few; use at least 19."
        return None


def _parts(measure: str) -> tuple[str, ...]:
    return ("false_belief", "true_belief") if measure == CONTRAST else (measure,)


def _ratio(terms: _Terms) -> NDArray[np.float64]:
    """The first ratio minus the rest, of each arm."""
    first, *rest = [numerator.sum(0) / denominator.sum() for numerator, denominator in terms]
    return np.asarray(first - sum(rest))


def _row(measure: str, against: Against, model: str, minus: str | None, found: Estimate) -> dict[str, Any]:
    row = {"measure": measure, "against": against, "model": model, "minus": minus}
    return {**row, "value": found.value, "low": found.low, "high": found.high, "p": found.p_differs()}


def _changes(side: _Side, boot: _Bootstraps) -> list[dict[str, Any]]:
    """Of one model, every measure."""
    rows = []
    for measure in side.measures:
        for against, family in _FAMILIES.items():
            terms = side.terms(measure, "mask", family)
            found = boot(len(terms[0][1]), measure).contrast(terms)
            row = _row(measure, against, side.label, None, found) | {"n": _n(terms, measure)}
            if against == "before":
                seeds = _ratio(side.terms(measure, _FAMILIES["random"], family))
                row |= {"random": seeds.mean(), "random_low": seeds.min(), "random_high": seeds.max()}
            rows.append(row)
    return rows


def _n(terms: _Terms, measure: str) -> int:
    """How many observations a change is made of."""
    if measure == PERPLEXITY:
        return len(terms[0][1])
    return int(sum(denominator.sum() for _, denominator in terms))


def _differences(first: _Side, other: _Side, boot: _Bootstraps) -> list[dict[str, Any]]:
    """Between two models, every measure of both."""
    rows = []
    for measure in first.measures:
        if measure not in other.measures:
            continue
        for against in _FAMILIES:
            found, paired = _difference(first, other, measure, against, boot)
            rows.append(_row(measure, against, first.label, other.label, found) | {"paired": paired})
    return rows


def _difference(
    first: _Side, other: _Side, measure: str, against: Against, boot: _Bootstraps
) -> tuple[Estimate, bool]:
    """Of the changes of two models, and whether it is paired."""
    asked, clusters = zip(*(side.asks(measure) for side in (first, other)))
    terms = [side.terms(measure, "mask", _FAMILIES[against]) for side in (first, other)]
    if asked[0] != asked[1]:
        one, two = (
            boot(len(some[0][1]), measure, side.place).contrast(some)
            for side, some in zip((first, other), terms)
        )
        return difference(one, two), False
    ours, theirs = (
        [(numerator[rows], denominator[rows]) for numerator, denominator in some]
        for rows, some in zip(clusters, terms)
    )
    # All but the first term are subtracted, so what the other model subtracts itself is added.
    both = [*ours, theirs[0], *((-numerator, denominator) for numerator, denominator in theirs[1:])]
    members = [0] * len(ours) + [1] * len(theirs)
    return boot(len(clusters[0]), measure).contrast(both, members=members), True


def _claims(first: _Side, others: list[_Side], boot: _Bootstraps) -> list[ContrastClaim]:
    """One for each other model, one family."""
    found: list[tuple[Estimate, bool] | None] = []
    tests = []
    for other in others:
        obstacle = first.obstacle() or other.obstacle() or _unlike(first, other)
        if obstacle is not None:
            found.append(None)
            tests.append(Test(other.label, obstacle, 1.0, False, str))
            continue
        estimate, paired = _difference(first, other, "false_belief", "random", boot)
        found.append((estimate, paired))

        one, two = (100 * side.fall("random") for side in (first, other))
        # To rise, or to rise less than under random masks, is no fall.
        falls = [side.fall("before") < 0 and side.fall("random") < 0 for side in (first, other)]

        def sentence(
            yes: bool,
            other: _Side = other,
            estimate: Estimate = estimate,
            paired: bool = paired,
            one: float = one,
            two: float = two,
            other_falls: bool = falls[1],
        ) -> str:
            less = estimate.low > 0 and other_falls
            how = "falls more" if yes else "falls less" if less else "is not shown to fall more"
            pairing = "paired by question" if paired else "of different questions"
            return (
                f"False-belief accuracy {how}, beyond random masks, in {first.label} than in {other.label}: "
                f"{one:+.1f} points against {two:+.1f} ({in_points(estimate)}, {pairing})."
            )

        tests.append(Test(other.label, None, estimate.p_below(), falls[0], sentence))
    claims = []
    for claim, other, some in zip(decide(tests), others, found):
        made = ContrastClaim(
            "architecture_specific", claim.status, claim.sentence, claim.p, first.label, other.label
        )
        if some is not None:
            value, low, high = some[0].value, some[0].low, some[0].high
            made = replace(made, value=value, low=low, high=high, paired=some[1])
        claims.append(made)
    return claims


def _unlike(first: _Side, other: _Side) -> str | None:
    """Why two masks are not of one kind."""
    one, two = first.study.kappa, other.study.kappa
    if not np.isclose(one, two, rtol=1e-9, atol=0):
        return (
            f"the mask of {first.label} was made at kappa {one:g} and that of {other.label} at {two:g}; "
            "study both at one, with StudySettings(kappa=...)."
        )
    if first.matrices != other.matrices:
        return (
            f"the mask of {first.label} is of {first.matrices} and that of {other.label} of "
            f"{other.matrices}; study both with the same matrices."
        )
    return None


def _statuses(studies: Mapping[str, Study]) -> pd.DataFrame:
    """See `StudyComparison.statuses`."""
    import pandas as pd

    columns = {
        label: {claim.claim: claim.status for claim in study.claims}
        | {f"heads: {claim.claim}": claim.status for claim in study.heads.claims}
        | {f"localisation: {claim.claim}": claim.status for claim in study.battery.claims}
        for label, study in studies.items()
    }
    names = list(dict.fromkeys(name for column in columns.values() for name in column))
    order = sorted(names, key=lambda name: ": " in name)  # sections last, each in its own order
    table = {label: [column.get(name, "not made") for name in order] for label, column in columns.items()}
    return pd.DataFrame(table, index=pd.Index(order, name="claim"))


def _settings(studies: Mapping[str, Study]) -> pd.DataFrame:
    """See `StudyComparison.settings`."""
    import pandas as pd

    asked = {label: study.facts["settings"] for label, study in studies.items()}
    names = list(dict.fromkeys(name for settings in asked.values() for name in settings))
    shown = {
        name: {label: str(settings.get(name, "not asked")) for label, settings in asked.items()}
        for name in names
    }
    differing = [name for name, values in shown.items() if len(set(values.values())) > 1]
    index = pd.Index(differing, name="setting")
    return pd.DataFrame({label: [shown[name][label] for name in differing] for label in asked}, index=index)
