"""One point of an experiment: what a model answers, and what text costs it, under one mask.

    point = (model, entries and their new values or the operator, questions, text) -> (chosen option and
    margin of each question, NLL of each sample)

A point's key is a digest of exactly that, so a point that was measured before (a mask that two arms share,
an interrupted run) is recognised by its content and never by its place in a sweep. Measures turn right and
wrong answers into counts by group of stories (twins are one group, other stories stand alone), which
accuracies, paired accuracies and the bootstrap by group are all computed from.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from tl_tomsparse._checks import TomsparseError, check_choice
from tl_tomsparse._model import view
from tl_tomsparse._prepared import Outcome, PreparedScoring, PreparedText
from tl_tomsparse.edit import SparseEdit
from tl_tomsparse.evaluate import StoryScores
from tl_tomsparse.mask import SparseMask
from tl_tomsparse.stories.story import ALL_CATEGORIES, CATEGORIES, Story

if TYPE_CHECKING:
    import pandas as pd

Operator = Literal["mean", "zero"]
PointRecord = dict[str, Any]
MEASURES = (*CATEGORIES, "paired")
_DIGITS = 7  # of margins and losses, enough for float32; rounded always, so that a resumed run is the same


@dataclass(frozen=True, eq=False)
class Point:
    """What was measured under one mask.

    Attributes:
        outcome: the answers.
        nll: negative log-probability of each text sample, nats.
    """

    outcome: Outcome
    nll: NDArray[np.float64]

    @property
    def correct(self) -> NDArray[np.bool_]:
        """Which questions are answered right; a tie is wrong."""
        return self.outcome.margin > 0


class PointMeter:
    """Measures points on fixed questions and text, each once.

    Args:
        model: unedited.
        scoring: the questions.
        text: the samples for perplexity.
        operator: what an edit writes: "mean" of the unmasked entries of the same matrix, or "zero".
        on_point: called with a JSON-able record after each newly measured point, to be stored.
        resume: records stored by earlier runs; those that belong to other weights, masks, questions or text
            are ignored.
    """

    def __init__(
        self,
        model: Any,
        scoring: PreparedScoring,
        text: PreparedText,
        *,
        operator: Operator,
        on_point: Callable[[PointRecord], None] | None = None,
        resume: Iterable[Mapping[str, Any]] = (),
    ) -> None:
        check_choice("operator", operator, ("mean", "zero"))
        view(model).require_eval()
        if view(model).active_edits:
            raise TomsparseError("The model has an active edit; leave its `with` block before an experiment.")
        self.model, self.scoring, self.text, self.operator = model, scoring, text, operator
        self._on_point = on_point
        self._base = f"{view(model).identity().fingerprint} {scoring.digest} {text.reads.digest}"
        self._records: dict[str, Mapping[str, Any]] = {str(record["key"]): record for record in resume}
        self._points: dict[str, Point] = {}

    def measure(self, what: SparseMask | SparseEdit | None, label: str) -> Point:
        """The point of a mask under the operator, or of an edit (None: the unedited model); `label` names it
        in errors.
        """
        key = self._key(what)
        if key not in self._points:
            if key not in self._records:
                try:
                    self._records[key] = self._record(key, what)
                except TomsparseError as error:
                    raise TomsparseError(f"At {label}: {error}") from error
                if self._on_point is not None:
                    self._on_point(dict(self._records[key]))
            self._points[key] = _read(self._records[key])
        return self._points[key]

    def _record(self, key: str, what: SparseMask | SparseEdit | None) -> PointRecord:
        if what is None or not len(what):
            outcome, nll = self.scoring.outcome(self.model), self.text.nll(self.model)
        else:
            if isinstance(what, SparseMask):
                what = (SparseEdit.mean if self.operator == "mean" else SparseEdit.zero)(self.model, what)
            with what.applied(self.model):
                outcome, nll = self.scoring.outcome(self.model), self.text.nll(self.model)
        return {
            "key": key,
            "chosen": outcome.chosen.tolist(),
            "margin": [float(f"{value:.{_DIGITS}g}") for value in outcome.margin],
            "nll": [float(f"{value:.{_DIGITS}g}") for value in nll],
        }

    def _key(self, what: SparseMask | SparseEdit | None) -> str:
        operator = self.operator if isinstance(what, SparseMask) and len(what) else ""
        return edit_key(f"{self._base}{operator}", what)


def edit_key(base: str, what: SparseMask | SparseEdit | None) -> str:
    """A digest of `base`, entries, and what they become (of a mask: entries alone); empty ones are none."""
    digest = hashlib.blake2b(base.encode(), digest_size=16)
    if what is not None and len(what):
        mask = what if isinstance(what, SparseMask) else what.mask
        for key in sorted(key for key, index in mask.entries.items() if len(index)):
            digest.update(f"{key} {len(mask.entries[key])}".encode())
            digest.update(mask.entries[key].cpu().numpy().astype("<i8").tobytes())
            if isinstance(what, SparseEdit):
                digest.update(what.after[key].double().numpy().tobytes())
    return digest.hexdigest()


def _read(record: Mapping[str, Any]) -> Point:
    margin = np.asarray(record["margin"], dtype=np.float64)
    outcome = Outcome(np.asarray(record["chosen"], dtype=np.int64), margin)
    return Point(outcome, np.asarray(record["nll"], dtype=np.float64))


class Measures:
    """Counts by group of stories, of each category and of paired accuracy.

    Attributes:
        names: the categories that are asked about, in their usual order, and "paired" if there is a story
            for it.
        totals: for each name the observations of each group, `[groups]`.
        groups: their names.
        n_stories: number of stories.
        n_groups: number of groups.
    """

    def __init__(
        self, questions: pd.DataFrame, extra: Mapping[str, NDArray[np.bool_]] = MappingProxyType({})
    ) -> None:
        """`questions` as in `PreparedScoring`; `extra` names further selections of them, `[questions]`
        each.
        """
        import pandas as pd

        stories = questions.drop_duplicates("story_id")
        place = {story_id: index for index, story_id in enumerate(stories.story_id)}
        self._story = questions.story_id.map(place).to_numpy()
        self._group, names = pd.factorize(stories.group)
        self.groups: tuple[str, ...] = tuple(names)
        self.n_stories, self.n_groups = len(place), len(names)
        self._selected: dict[str, NDArray[np.bool_]] = {
            name: (questions.category == name).to_numpy()
            for name in ALL_CATEGORIES
            if (questions.category == name).any()
        }
        self._selected |= {name: selected for name, selected in extra.items() if selected.any()}
        paired = StoryScores(questions.assign(correct=False)).paired_stories()
        self._first_order = ((questions.kind == "belief") & (questions.order == 1)).to_numpy()
        self.totals: dict[str, NDArray[np.float64]] = {
            name: self._by_group(self._by_story(selected)) for name, selected in self._selected.items()
        }
        self._tells_apart = np.zeros(self.n_stories)
        if paired.tells_apart.any():
            self._tells_apart[paired.story_id[paired.tells_apart].map(place).to_numpy()] = 1.0
            self.totals["paired"] = self._by_group(self._tells_apart)
        self.names = tuple(self.totals)

    def counts(self, correct: NDArray[Any], name: str) -> NDArray[np.float64]:
        """Right answers by group: `[questions]` to `[groups]`, `[arms, questions]` to `[groups, arms]`."""
        if correct.ndim == 2:
            return np.stack([self.counts(row, name) for row in correct], axis=1)
        if name == "paired":
            wrong = self._by_story(self._first_order & ~correct)
            return self._by_group(self._tells_apart * (wrong == 0))
        return self._by_group(self._by_story(self._selected[name] & correct))

    def asked(self, name: str) -> NDArray[np.bool_]:
        """The questions that a measure counts, `[questions]`."""
        if name == "paired":
            return self._first_order & (self._tells_apart[self._story] > 0)
        return self._selected[name]

    def accuracy(self, correct: NDArray[np.bool_], name: str) -> float:
        """Share of right answers, of all questions or stories of one measure."""
        return float(self.counts(correct, name).sum() / self.totals[name].sum())

    def _by_story(self, flags: NDArray[np.bool_]) -> NDArray[np.float64]:
        return np.bincount(self._story, weights=flags, minlength=self.n_stories).astype(np.float64)

    def _by_group(self, counts: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.bincount(self._group, weights=counts, minlength=self.n_groups).astype(np.float64)


def check_split(stories: Iterable[Story], refused: Collection[str], why: str) -> None:
    """Refuse stories of a split that would spoil what is done with them."""
    for story in stories:
        if story.split in refused:
            raise TomsparseError(f"Story {story.id!r} is of the split {story.split!r}: {why}.")


def json_rows(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a frame as plain values for JSON, with None for what is missing."""
    import json

    return list(json.loads(frame.to_json(orient="records", double_precision=15)))
