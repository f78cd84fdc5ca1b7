"""What every arm of a study answered, small enough to keep: who was right where, and what text cost.

A study's tables are computed from it, and so are comparisons between studies of several models, long after
the models are gone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Float, Int

from tl_tomsparse._points import Point
from tl_tomsparse._prepared import PreparedScoring, PreparedText

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False)
class Answers:
    """Right and wrong answers of every arm, and the losses of text.

    Attributes:
        questions: one row a question: the columns of `StoryScores` that do not depend on weights, prompt, and
            options (a tuple, the right answer first).
        families: the family of each arm, in the order of `Study.arms`.
        correct: which questions each arm has right.
        nll: negative log-probability of each text sample under each arm, nats.
        n_tokens: supervised tokens of each text sample.
        text: digest of the text's tokens; equal only where samples are the same to the token.
    """

    questions: pd.DataFrame = field(repr=False)
    families: tuple[str, ...] = field(repr=False)
    correct: Bool[np.ndarray, "arms questions"] = field(repr=False)
    nll: Float[np.ndarray, "arms samples"] = field(repr=False)
    n_tokens: Int[np.ndarray, " samples"] = field(repr=False)
    text: str

    @cached_property
    def arms(self) -> dict[str, Int[np.ndarray, " arms"]]:
        """The rows of each family."""
        found: dict[str, list[int]] = {}
        for row, family in enumerate(self.families):
            found.setdefault(family, []).append(row)
        return {family: np.array(rows) for family, rows in found.items()}


def collect_answers(
    scoring: PreparedScoring,
    text: PreparedText,
    prompts: Sequence[str],
    points: Mapping[str, Sequence[Point]],
    families: Sequence[str],
) -> Answers:
    """The answers of points, one row an arm.

    Args:
        scoring: the questions.
        text: the samples for perplexity.
        prompts: of the questions.
        points: of each family, one each or one a seed.
        families: of the arms, in order; each takes the next point of its family.
    """
    following = {family: iter(some) for family, some in points.items()}
    rows = [next(following[family]) for family in families]
    return Answers(
        scoring.questions.assign(prompt=list(prompts), options=list(scoring.options)),
        tuple(families),
        np.stack([point.correct for point in rows]),
        np.stack([point.nll for point in rows]),
        text.n_tokens,
        text.reads.digest,
    )
