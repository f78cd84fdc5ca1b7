"""Questions and texts made ready for one model: tokenised once, measured under as many edits as one likes.

    margin = s(answer) - max of s over the other options; right above 0, so a tie is wrong

The scores s are those of `_scoring`. Accuracies and perplexities are made of these numbers in `evaluate`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Float, Int

from tl_tomsparse._checks import TomsparseError, check_choice
from tl_tomsparse._model import view
from tl_tomsparse._scoring import Reads, Wanted, collect_reads
from tl_tomsparse.samples import Samples, check_samples, check_stories, option_tokens
from tl_tomsparse.stories.story import ALL_CATEGORIES, Category, Form, Question, Story

if TYPE_CHECKING:
    import pandas as pd

Normalise = Literal["none", "tokens"]
_OVERFLOW = "The model overflows: load it in float32 or bfloat16, or make the edit smaller."


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a model answered.

    Attributes:
        chosen: for each question an index into the prepared options, of which the answer is index 0.
        margin: the answer's score minus the best other option's, in nats.
    """

    chosen: Int[np.ndarray, " questions"]
    margin: Float[np.ndarray, " questions"]


def decide(scores: Float[np.ndarray, "questions max_options"]) -> Outcome:
    """What is chosen by these scores, the answer's first."""
    others = scores[:, 1:]
    margin = scores[:, 0] - others.max(1)
    # In a tie another option is shown as chosen, since a tie counts as wrong.
    return Outcome(np.where(margin > 0, 0, 1 + others.argmax(1)), margin)


@dataclass(frozen=True, eq=False)
class PreparedScoring:
    """Questions as batches of tokens: made once, scored at every point of a sweep.

    Attributes:
        questions: the columns of `StoryScores.frame` that do not depend on the model's weights.
        options: the options of each question, the answer first.
        reads: what is computed; its sums are the options of all questions in turn.
        prepend_bos: whether prompts begin with the BOS token.
        normalise: "none" or "tokens".
    """

    questions: pd.DataFrame = field(repr=False)
    options: tuple[tuple[str, ...], ...] = field(repr=False)
    reads: Reads
    prepend_bos: bool
    normalise: Normalise
    _lengths: Float[np.ndarray, " all_options"] = field(repr=False)

    @property
    def digest(self) -> str:
        """Equal for equal prompts, options and normalisation, on any weights and device."""
        return f"{self.reads.digest}-{self.normalise}"

    def option_scores(
        self, model: Any, *, show_progress: bool = False
    ) -> Float[np.ndarray, "questions max_options"]:
        """The score of every option in nats, the answer's first; -inf where a question has fewer options.

        Raises:
            TomsparseError: a score is not a finite number; the story and the question are named.
        """
        return self.scores(self.reads.totals(model, description="stories", show_progress=show_progress))

    def scores(self, totals: Float[np.ndarray, " all_options"]) -> Float[np.ndarray, "questions max_options"]:
        """The scores of options from the sums that `reads` gives, as `option_scores` gives them."""
        counts = self.questions.n_options.to_numpy()
        filled = np.arange(counts.max()) < counts[:, None]
        scores = np.full(filled.shape, -np.inf)
        scores[filled] = totals / self._lengths
        broken = ~np.isfinite(scores[filled])
        if broken.any():
            first = self.questions.iloc[int((filled & ~np.isfinite(scores)).any(1).argmax())]
            raise TomsparseError(
                f"{broken.sum()} of {broken.size} options have log-probabilities that are not finite, "
                f"first in story {first.story_id!r}, question {first.question}. {_OVERFLOW}"
            )
        return scores

    def outcome(self, model: Any, *, show_progress: bool = False) -> Outcome:
        """What is chosen and by which margin, for every question."""
        return decide(self.option_scores(model, show_progress=show_progress))


def prepare_scoring(
    model: Any,
    stories: Iterable[Story],
    *,
    prepend_bos: bool = True,
    categories: Collection[Category] | None = None,
    forms: Collection[Form] | None = None,
    normalise: Normalise = "none",
    batch_tokens: int | None = None,
    pack: bool = False,
) -> PreparedScoring:
    """Tokenise the questions of some stories for `model`; see `score_stories` for the arguments.

    With `pack`, stories are computed once for all of their questions where the model allows it.
    """
    import pandas as pd

    model_view = view(model)
    check_choice("normalise", normalise, ("none", "tokens"))
    for category in categories or ():
        check_choice("categories", category, ALL_CATEGORIES)
    rows: list[dict[str, Any]] = []
    all_options: list[tuple[str, ...]] = []
    wanted: list[Wanted] = []
    lengths: list[int] = []
    seen: set[str] = set()
    for story in check_stories(stories):
        if story.id in seen:
            raise TomsparseError(
                f"Two stories have the id {story.id!r}; intervals by story need different ids."
            )
        seen.add(story.id)
        for index, question in enumerate(story.questions):
            if categories is not None and question.category not in categories:
                continue
            if forms is not None and question.form not in forms:
                continue
            options = _answer_first(story, question)
            prompt, continuations = option_tokens(
                model_view, story.prompt(question), options, prepend_bos=prepend_bos, name=story.id
            )
            for tokens in continuations:
                places = [(len(prompt) - 1 + step, token) for step, token in enumerate(tokens)]
                wanted.append(([*prompt, *tokens[:-1]], places))
                lengths.append(len(tokens) if normalise == "tokens" else 1)
            all_options.append(options)
            rows.append(_describe(story, index, question))
    if not rows:
        raise TomsparseError(
            "No question to score: the stories are empty, or none has the categories and forms asked for."
        )
    reads = collect_reads(model, wanted, pack=pack, batch_tokens=batch_tokens)
    return PreparedScoring(
        pd.DataFrame(rows), tuple(all_options), reads, prepend_bos, normalise, np.asarray(lengths, np.float64)
    )


def _answer_first(story: Story, question: Question) -> tuple[str, ...]:
    others = [option for option in question.options if option != question.answer]
    if len(others) != len(question.options) - 1 or len(set(others)) != len(others) or not others:
        raise TomsparseError(
            f"Story {story.id!r}: the options {question.options} must be two or more, all different, and "
            f"have the answer {question.answer!r} among them."
        )
    return (question.answer, *others)


def _describe(story: Story, index: int, question: Question) -> dict[str, Any]:
    return {
        "story_id": story.id,
        "group": story.group or story.id,
        "scenario": story.scenario,
        "condition": story.condition,
        "protagonist": story.protagonist,
        "split": story.split,
        "wording": story.wording,
        "question": index,
        "category": question.category,
        "kind": question.kind,
        "order": question.order,
        "form": question.form,
        "agents": ", ".join(question.agents),
        "answer": question.answer,
        "n_options": len(question.options),
    }


@dataclass(frozen=True, eq=False)
class PreparedText:
    """Samples as batches of tokens: made once, measured at every point of a sweep."""

    reads: Reads
    n_tokens: Int[np.ndarray, " n"] = field(repr=False)
    ids: tuple[str, ...] = field(repr=False)

    def nll(self, model: Any, *, show_progress: bool = False) -> Float[np.ndarray, " n"]:
        """Negative log-probability of the supervised tokens of every sample, in nats.

        Raises:
            TomsparseError: one is not a finite number; the sample is named.
        """
        nll = -self.reads.totals(model, description="text", show_progress=show_progress)
        if not np.isfinite(nll).all():
            raise TomsparseError(
                f"The log-probability of sample {self.ids[int(np.isfinite(nll).argmin())]!r} is not finite. "
                f"{_OVERFLOW}"
            )
        return nll


def prepare_text(model: Any, samples: Samples, *, batch_tokens: int | None = None) -> PreparedText:
    """Batch samples for `model`; every supervised position of theirs is read."""
    check_samples(view(model), samples)
    wanted: list[Wanted] = []
    parts = (samples.tokens.cpu(), samples.attention_mask.cpu(), samples.supervised.cpu())
    for tokens, mask, supervised in zip(*parts):
        row = tokens[mask].tolist()
        places = [(position - 1, row[position]) for position in supervised.nonzero()[:, 0].tolist()]
        wanted.append((row[: 1 + places[-1][0]], places))
    reads = collect_reads(model, wanted, pack=False, batch_tokens=batch_tokens)
    return PreparedText(reads, samples.supervised.sum(1).cpu().numpy(), samples.ids)
