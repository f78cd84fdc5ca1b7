"""How well a model answers stories and predicts text.

    score of option o after prompt c:   s(o) = sum_i log P(o_i | c, o_1..o_{i-1})     nothing is sampled
    an answer is right when             s(right option) > s(every other option)       a tie is wrong
    perplexity:                         exp(sum of negative log-probabilities / number of predicted tokens)

Accuracies are given apart for false belief, true belief, reality, memory and second-order belief: who
always names where the thing really is has all of reality and true belief right, and none of false belief.
*Paired* accuracy (ours) counts a story only when every first-order belief question of it is right, in
stories where the agents' right answers differ and somebody's belief is false: an answer that depends on the
story but not on the agent cannot pass it.

NOT claimed: that the option preferred here is what the model would write when sampled, nor that summed
scores are comparable between options of different length; where lengths differ, compare with
`normalise="tokens"`. An option whose tokens begin another option ("tea", "teapot" in a tokenizer that cuts
there) is never less probable than it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Float, Int

from tl_tomsparse._intervals import proportion_interval
from tl_tomsparse._prepared import (
    Normalise,
    Outcome,
    PreparedScoring,
    decide,
    prepare_scoring,
    prepare_text,
)
from tl_tomsparse.samples import Samples
from tl_tomsparse.stories.story import ALL_CATEGORIES, Category, Form, Story

if TYPE_CHECKING:
    import pandas as pd

PAIRED_SUBSETS = ("false_belief_stories", "all_stories")


@dataclass(frozen=True, eq=False)
class StoryScores:
    """Answers of a model to the questions of some stories.

    Attributes:
        frame: one row a question, in the order of the stories: story_id, group (of stories drawn together),
            scenario, condition, protagonist, split, wording, question (its index in the story), category,
            kind, order, form, agents (outermost first, joined by ", "), answer, n_options, chosen (what the
            model prefers), correct, logprob_answer (nats), margin (nats: the answer's score minus the best
            other option's; right means above 0).
        prepend_bos: whether prompts began with the BOS token.
        normalise: "none" for summed log-probabilities, "tokens" for their mean over the option's tokens.
    """

    frame: pd.DataFrame = field(repr=False)
    prepend_bos: bool = True
    normalise: Normalise = "none"

    def __repr__(self) -> str:
        shares = ", ".join(f"{row.category} {row.accuracy:.3f}" for row in self.accuracy().itertuples())
        return f"StoryScores({len(self.frame)} questions, {self.frame.story_id.nunique()} stories: {shares})"

    def to_frame(self) -> pd.DataFrame:
        """A copy of the table, one row a question."""
        return self.frame.copy()

    def accuracy(self, by: Sequence[str] = ()) -> pd.DataFrame:
        """Share of right answers in each category.

        Args:
            by: further columns of `frame` to split by, for example `["scenario", "condition"]`.

        Returns:
            One row a group: `by`..., category, n, correct, accuracy, low, high (exact binomial 95 %
            interval, questions taken as independent), chance (mean of one over the number of options).
        """
        chance = 1 / self.frame.n_options
        return _proportions(self.frame.assign(chance=chance), [*by, "category"])

    def paired(
        self, by: Sequence[str] = (), *, kind: Literal["belief", "photograph"] = "belief"
    ) -> pd.DataFrame:
        """Share of stories with every first-order belief question right.

        Args:
            by: further columns of `frame`, constant in a story, to split by.
            kind: "photograph" for the same about what pictures show.

        Returns:
            One row a group: `by`..., subset, n (stories), correct, accuracy, low, high (exact binomial 95
            %), chance. Subset "false_belief_stories" has the stories where at least two agents are asked
            about, the right answers differ between agents, and at least one belief is false; "all_stories"
            every story with a first-order belief question. Chance takes one guess an agent: the mean of the
            product of one over the number of options.
        """
        import pandas as pd

        stories = self.paired_stories(kind)
        telling, every = PAIRED_SUBSETS
        parts = [stories[stories.tells_apart].assign(subset=telling), stories.assign(subset=every)]
        return _proportions(pd.concat(parts, ignore_index=True), [*by, "subset"])

    def paired_stories(self, kind: Literal["belief", "photograph"] = "belief") -> pd.DataFrame:
        """One row a story with a first-order question of a kind: correct (all of it), tells_apart, chance."""
        about = ["story_id", "group", "scenario", "condition", "protagonist", "split", "wording"]
        asked = self.frame[(self.frame.kind == kind) & (self.frame.order == 1)]
        agents = asked.drop_duplicates(["story_id", "agents"])
        answers = agents.groupby("story_id").answer.nunique()
        false_beliefs = (asked.category == f"false_{kind}").groupby(asked.story_id).sum()
        chance = (1 / agents.n_options).groupby(agents.story_id).prod()
        correct = asked.groupby("story_id").correct.all()
        frame = asked.drop_duplicates("story_id")[about].reset_index(drop=True)
        return frame.assign(
            correct=frame.story_id.map(correct).astype(bool),
            tells_apart=frame.story_id.map((answers > 1) & (false_beliefs > 0)).astype(bool),
            chance=frame.story_id.map(chance).astype(float),
        )


def _proportions(frame: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """Counts, shares, exact intervals and mean chance of each group, in the usual order of categories."""
    import pandas as pd

    rows: list[dict[str, Any]] = []
    for values, group in frame.groupby(keys, sort=False):
        n, correct = len(group), int(group.correct.sum())
        low, high = proportion_interval(correct, n)
        names = dict(zip(keys, values if isinstance(values, tuple) else (values,)))
        rows.append({**names, "n": n, "correct": correct, "accuracy": correct / n, "low": low, "high": high,
                     "chance": float(group.chance.mean())})  # fmt: skip
    usual = {name: place for place, name in enumerate((*ALL_CATEGORIES, *PAIRED_SUBSETS))}
    *by, last = keys  # a condition may be named as a category is, so only the last key has the usual order
    rows.sort(key=lambda row: (*(row[key] for key in by), usual[row[last]]))
    return pd.DataFrame(rows, columns=[*keys, "n", "correct", "accuracy", "low", "high", "chance"])


def score_stories(
    model: Any,
    stories: Iterable[Story],
    *,
    prepend_bos: bool = True,
    categories: Collection[Category] | None = None,
    forms: Collection[Form] | None = None,
    normalise: Normalise = "none",
    batch_tokens: int | None = None,
    pack: bool = False,
    show_progress: bool = True,
) -> StoryScores:
    """Ask a model every question of some stories and compare the log-probabilities of the options.

    Each option is appended to the story and the question, and its tokens' log-probabilities given all
    tokens before them are summed (teacher forcing). Prompts are padded on the right, with an attention
    mask; nothing is sampled.

    Args:
        model: `TransformerBridge` or `HookedTransformer`, in eval mode, edited or not.
        stories: their questions are scored in order.
        prepend_bos: begin every prompt with the BOS token.
        categories: score only these; all by default.
        forms: score only questions of these forms ("completion", "question"); all by default.
        normalise: "none" compares sums, "tokens" means over each option's tokens.
        batch_tokens: most tokens in one batch, padding included; by default chosen for the device.
        pack: compute each story once for all of its questions where the model allows it: several times less
            work for many stories and equal up to rounding, but hooks of your own see packed rows.
        show_progress: show a progress bar over batches.

    Raises:
        TomsparseError: no question is left; options that are not distinct; a prompt longer than the
            context; no tokenizer; a log-probability that is not a finite number; a model in training mode.
    """
    prepared = prepare_scoring(
        model, stories, prepend_bos=prepend_bos, categories=categories, forms=forms, normalise=normalise,
        batch_tokens=batch_tokens, pack=pack,
    )  # fmt: skip
    scores = prepared.option_scores(model, show_progress=show_progress)
    return tabulate(prepared, decide(scores), scores[:, 0])


def tabulate(
    prepared: PreparedScoring, outcome: Outcome, logprob_answer: Float[np.ndarray, " questions"] | None = None
) -> StoryScores:
    """The table of an outcome of prepared questions."""
    frame = prepared.questions.assign(
        chosen=[options[index] for options, index in zip(prepared.options, outcome.chosen)],
        correct=outcome.margin > 0,
        logprob_answer=np.nan if logprob_answer is None else logprob_answer,
        margin=outcome.margin,
    )
    return StoryScores(frame, prepared.prepend_bos, prepared.normalise)


@dataclass(frozen=True, eq=False)
class Perplexity:
    """Negative log-probabilities of some samples.

    Attributes:
        nll: sum over the supervised tokens of each sample, in nats, `[n]`, float64.
        n_tokens: number of these tokens, `[n]`.
        ids: names of the samples.
    """

    nll: Float[np.ndarray, " n"] = field(repr=False)
    n_tokens: Int[np.ndarray, " n"] = field(repr=False)
    ids: tuple[str, ...] = field(repr=False)

    @property
    def value(self) -> float:
        """exp(total negative log-probability / total number of supervised tokens)."""
        return math.exp(float(self.nll.sum()) / int(self.n_tokens.sum()))

    def __repr__(self) -> str:
        return f"Perplexity({self.value:.4g} over {len(self.nll)} samples, {int(self.n_tokens.sum())} tokens)"

    def to_frame(self) -> pd.DataFrame:
        """One row a sample: sample, n_tokens, nll (nats), perplexity."""
        import pandas as pd

        return pd.DataFrame(
            {
                "sample": self.ids,
                "n_tokens": self.n_tokens,
                "nll": self.nll,
                "perplexity": np.exp(self.nll / self.n_tokens),
            }
        )


def perplexity(
    model: Any, samples: Samples, *, batch_tokens: int | None = None, show_progress: bool = True
) -> Perplexity:
    """Perplexity of a model on samples of text, `exp(total NLL / total supervised tokens)`.

    Args:
        model: `TransformerBridge` or `HookedTransformer`, in eval mode, edited or not.
        samples: from `text_samples`; only supervised tokens count.
        batch_tokens: most tokens in one batch, padding included; by default chosen for the device.
        show_progress: show a progress bar over batches.

    Raises:
        TomsparseError: no sample; a loss that is not a finite number; a model in training mode.
    """
    prepared = prepare_text(model, samples, batch_tokens=batch_tokens)
    return Perplexity(prepared.nll(model, show_progress=show_progress), prepared.n_tokens, prepared.ids)
