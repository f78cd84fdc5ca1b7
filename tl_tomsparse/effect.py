"""What an edit does, on stories and text that nothing was chosen on, beside its placebos.

    change       sum over questions (right after - right before) / number of questions
    placebo      the same under random masks of equal size in each matrix: mean and range over seeds
    contrast     change of false belief - change of true belief
    perplexity   exp((NLL after - NLL before) / tokens), the ratio of two perplexities

Accuracies have exact binomial intervals. Changes are paired by question; their intervals draw whole groups of
stories again (twins, which are one story with two objects in exchanged roles, are one group), and for the
mean of random masks the masks as well. [`verdict`][tl_tomsparse.verdict.verdict] reads claims off these
numbers.

NOT claimed: that stories which one generator made stand for stories in general.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from tl_tomsparse._checks import TomsparseError, check_positive
from tl_tomsparse._intervals import CONFIDENCE, ClusterBootstrap, Estimate
from tl_tomsparse._points import Measures, Operator, Point, PointMeter, PointRecord, check_split, json_rows
from tl_tomsparse._prepared import PreparedScoring, PreparedText, prepare_scoring, prepare_text
from tl_tomsparse.evaluate import PAIRED_SUBSETS, tabulate
from tl_tomsparse.mask import SparseMask
from tl_tomsparse.samples import Samples
from tl_tomsparse.stories.story import Story

if TYPE_CHECKING:
    import pandas as pd

CONTRAST = "false_belief - true_belief"
HELD_OUT = "an effect is measured on held-out stories; pass stories of the split 'test'"
EXACT, RANGE = "exact binomial 95 %", "range over seeds"


@dataclass(frozen=True, eq=False)
class Effect:
    """Answers and perplexity of the unedited model ("before") and under each mask.

    Attributes:
        accuracy: one row an arm and measure (categories, "paired"): arm, measure, n, correct, accuracy,
            low, high, interval, chance. For "random", accuracy and correct are means over seeds, low and
            high the extremes.
        random: one row a seed: seed, n_weights, an accuracy for each measure, perplexity.
        perplexity: one row an arm: perplexity, ratio (to before), low, high (bootstrap 95 %), p_within (of
            "outside the margin").
        differences: one row a comparison and measure (also the contrast "false_belief - true_belief"):
            comparison, measure, value, low, high (bootstrap 95 %), p (two-sided, of "no change"), p_below
            (of "no fall"), p_within (of "outside the margin").
        answers: one row a question: its columns in `StoryScores`, chosen_before, correct_before,
            margin_before, chosen_mask, correct_mask, margin_mask, correct_random (share of the random
            masks).
        n_weights: number of edited entries of each arm.
        meta: kappa, margins and how it was made.
    """

    accuracy: pd.DataFrame = field(repr=False)
    random: pd.DataFrame = field(repr=False)
    perplexity: pd.DataFrame = field(repr=False)
    differences: pd.DataFrame = field(repr=False)
    answers: pd.DataFrame = field(repr=False)
    n_weights: dict[str, int]
    meta: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Everything but `answers` as plain values for JSON."""
        names = ("accuracy", "random", "perplexity", "differences")
        tables = {name: json_rows(getattr(self, name)) for name in names}
        return {**tables, "n_weights": self.n_weights, **self.meta}


def effect(
    model: Any,
    masks: Mapping[str, SparseMask],
    *,
    stories: Sequence[Story],
    text: Samples,
    kappa: float | None = None,
    n_random: int = 20,
    seed: int = 0,
    operator: Operator = "mean",
    accuracy_margin: float = 0.05,
    perplexity_margin: float = 0.05,
    n_draws: int = 10_000,
    prepend_bos: bool = True,
    batch_tokens: int | None = None,
    on_point: Callable[[PointRecord], None] | None = None,
    resume: Iterable[Mapping[str, Any]] = (),
    show_progress: bool = True,
) -> Effect:
    """Measure a mask and its controls on held-out stories and text.

    Args:
        model: unedited, in eval mode.
        masks: by arm; "mask" is the one that claims are about, others ("general_only", "tom_only") are
            controls. See `arm_masks`.
        stories: held out: not of the splits "train" or "dev".
        text: held-out general text.
        kappa: at which the masks were made; only recorded.
        n_random: random masks with as many entries in each matrix as "mask"; a claim needs at least 19.
        seed: they have the seeds `seed`, `seed + 1`, ...; also of the bootstrap.
        operator: what masked entries become: "mean" of the matrix's unmasked entries, or "zero".
        accuracy_margin: a change smaller than this share of the questions counts as none.
        perplexity_margin: a ratio of perplexities between 1 / (1 + this) and 1 + this counts as none.
        n_draws: how often groups of stories are drawn again.
        prepend_bos: begin every prompt with the BOS token.
        batch_tokens: most tokens in one batch; by default chosen for the device.
        on_point: called with a JSON-able record of each point as soon as it is measured.
        resume: stored records of an interrupted run; those of other weights, masks, stories or text are
            ignored.
        show_progress: show a progress bar over points.

    Raises:
        TomsparseError: no "mask", stories of another split, a mask of other weights, a model in training
            mode, or losses that are not finite.
    """
    if "mask" not in masks or {"before", "random"} & masks.keys():
        raise TomsparseError(
            f"masks has {sorted(masks)}; it must have 'mask', and not 'before' or 'random', made here."
        )
    check_positive("n_random", n_random)
    check_positive("n_draws", n_draws)
    check_split(stories, ("train", "dev"), HELD_OUT)
    scoring = prepare_scoring(model, stories, prepend_bos=prepend_bos, batch_tokens=batch_tokens, pack=True)
    prepared_text = prepare_text(model, text, batch_tokens=batch_tokens)
    meter = PointMeter(model, scoring, prepared_text, operator=operator, on_point=on_point, resume=resume)
    named: list[tuple[str, int | None, SparseMask | None]] = [("before", None, None)]
    named += [(arm, None, mask) for arm, mask in masks.items()]
    named += [
        ("random", number, masks["mask"].random_like(number)) for number in range(seed, seed + n_random)
    ]
    points: dict[str, list[Point]] = {}
    for arm, number, mask in tqdm(named, desc="effect", disable=not show_progress):
        label = f"arm {arm!r}" if number is None else f"arm {arm!r}, seed {number}"
        points.setdefault(arm, []).append(meter.measure(mask, label))
    n_weights = {"before": 0, **{arm: len(mask) for arm, mask in masks.items()}}
    n_weights["random"] = n_weights["mask"]
    meta = {
        "kappa": kappa,
        "operator": operator,
        "n_random": n_random,
        "seed": seed,
        "accuracy_margin": accuracy_margin,
        "perplexity_margin": perplexity_margin,
        "n_draws": n_draws,
        "prepend_bos": prepend_bos,
    }
    return assemble(scoring, prepared_text, points, n_weights, meta)


def assemble(
    scoring: PreparedScoring,
    text: PreparedText,
    points: Mapping[str, Sequence[Point]],
    n_weights: dict[str, int],
    meta: dict[str, Any],
) -> Effect:
    """The effect of points measured under each arm: one each, for "random" one a seed."""
    tables = _Tables(scoring, text, points, meta)
    counted = {
        "confidence": CONFIDENCE,
        "n_stories": tables.measures.n_stories,
        "n_groups": tables.measures.n_groups,
        "n_text_samples": len(text.ids),
        "n_text_tokens": int(text.n_tokens.sum()),
    }
    return Effect(
        tables.accuracy(),
        tables.random(n_weights["random"]),
        tables.perplexity(),
        tables.differences(),
        tables.answers(),
        n_weights,
        {**meta, **counted},
    )


class _Tables:
    """The tables of an effect, from its points."""

    def __init__(
        self,
        scoring: PreparedScoring,
        text: PreparedText,
        points: Mapping[str, Sequence[Point]],
        meta: dict[str, Any],
    ) -> None:
        self.scoring, self.text, self.points, self.meta = scoring, text, points, meta
        self.measures = Measures(scoring.questions)
        seed, n_draws = meta["seed"], meta["n_draws"]
        self._by_group = ClusterBootstrap(self.measures.n_groups, n_draws=n_draws, seed=seed)
        # Losses are continuous, so "no change in any" means no change: nothing to smooth.
        self._by_sample = ClusterBootstrap(len(text.ids), n_draws=n_draws, seed=seed, smooth=False)
        self._counts = {
            (arm, name): np.concatenate([self.measures.counts(p.correct[None], name) for p in some], axis=1)
            for arm, some in points.items()
            for name in self.measures.names
        }

    def accuracy(self) -> pd.DataFrame:
        """See `Effect.accuracy`."""
        import pandas as pd

        rows: list[dict[str, Any]] = []
        for arm, some in self.points.items():
            scores = tabulate(self.scoring, some[0].outcome)
            paired = scores.paired()
            exact = pd.concat(
                [
                    scores.accuracy().rename(columns={"category": "measure"}),
                    paired[paired.subset == PAIRED_SUBSETS[0]].assign(measure="paired"),
                ]
            )
            for row in exact.to_dict("records"):
                if arm == "random":
                    correct = self._counts[arm, row["measure"]].sum(0)
                    shares = correct / row["n"]
                    row |= {"correct": correct.mean(), "accuracy": shares.mean()}
                    row |= {"low": shares.min(), "high": shares.max()}
                rows.append({"arm": arm, **row, "interval": RANGE if arm == "random" else EXACT})
        columns = ["arm", "measure", "n", "correct", "accuracy", "low", "high", "interval", "chance"]
        return pd.DataFrame(rows)[columns]

    def random(self, n_weights: int) -> pd.DataFrame:
        """See `Effect.random`."""
        import pandas as pd

        rows = []
        for number, point in enumerate(self.points["random"], start=self.meta["seed"]):
            row: dict[str, Any] = {"seed": number, "n_weights": n_weights}
            row |= {name: self.measures.accuracy(point.correct, name) for name in self.measures.names}
            rows.append({**row, "perplexity": self._perplexity(point)})
        return pd.DataFrame(rows)

    def perplexity(self) -> pd.DataFrame:
        """See `Effect.perplexity`."""
        import pandas as pd

        (before,) = self.points["before"]
        margin = float(np.log1p(self.meta["perplexity_margin"]))
        rows = []
        for arm, some in self.points.items():
            change = np.stack([point.nll - before.nll for point in some], axis=1)
            estimate = self._by_sample.ratio(change, self.text.n_tokens.astype(np.float64))
            rows.append(
                {
                    "arm": arm,
                    "perplexity": float(np.exp(np.mean([np.log(self._perplexity(point)) for point in some]))),
                    "ratio": float(np.exp(estimate.value)),
                    "low": float(np.exp(estimate.low)),
                    "high": float(np.exp(estimate.high)),
                    "p_within": estimate.p_within(-margin, margin),
                }
            )
        return pd.DataFrame(rows)

    def differences(self) -> pd.DataFrame:
        """See `Effect.differences`."""
        import pandas as pd

        pairs = [(arm, "before") for arm in self.points if arm != "before"]
        pairs += [("mask", arm) for arm in self.points if arm not in ("before", "mask")]
        rows: list[dict[str, Any]] = []
        for arm, other in pairs:
            changes = {name: self._change(arm, other, name) for name in self.measures.names}
            estimates = {name: self._by_group.ratio(*change) for name, change in changes.items()}
            if {"false_belief", "true_belief"} <= changes.keys():
                terms = [changes["false_belief"], changes["true_belief"]]
                estimates[CONTRAST] = self._by_group.contrast(terms)
            for name, estimate in estimates.items():
                rows.append({"comparison": f"{arm} - {other}", **self._row(name, estimate)})
        return pd.DataFrame(rows)

    def answers(self) -> pd.DataFrame:
        """See `Effect.answers`."""
        frame = self.scoring.questions.copy()
        for arm in ("before", "mask"):
            scores = tabulate(self.scoring, self.points[arm][0].outcome).frame
            for column in ("chosen", "correct", "margin"):
                frame[f"{column}_{arm}"] = scores[column]
        frame["correct_random"] = np.mean([point.correct for point in self.points["random"]], axis=0)
        return frame

    def _perplexity(self, point: Point) -> float:
        return float(np.exp(point.nll.sum() / self.text.n_tokens.sum()))

    def _change(self, arm: str, other: str, name: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        return self._counts[arm, name] - self._counts[other, name], self.measures.totals[name]

    def _row(self, name: str, estimate: Estimate) -> dict[str, Any]:
        margin = self.meta["accuracy_margin"]
        return {
            "measure": name,
            "value": estimate.value,
            "low": estimate.low,
            "high": estimate.high,
            "p": estimate.p_differs(),
            "p_below": estimate.p_below(),
            "p_within": estimate.p_within(-margin, margin),
        }
