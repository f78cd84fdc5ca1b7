"""Stories with answers that are not the right ones: controls for what a sensitivity owes to the labels.

    wrong       another option than the right answer, drawn uniformly
    shuffled    any option, drawn uniformly: right with chance 1 / number of options

Texts, questions, options and categories stay. A mask made from such labels that does what the mask of the
right answers does shows that the labels do not matter, only the prompts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Literal, get_args

from tl_tomsparse._checks import check_choice

from .lexicon import Draw
from .story import Story

Labels = Literal["wrong", "shuffled"]


def relabelled(stories: Iterable[Story], labels: Labels, *, seed: int = 0) -> list[Story]:
    """The same stories with other answers, the same on every platform.

    Args:
        stories: any number.
        labels: "wrong" or "shuffled"; see the module docstring.
        seed: of the draws, one for each story's id.

    Raises:
        TomsparseError: an unknown choice of labels.
    """
    check_choice("labels", labels, get_args(Labels))
    out = []
    for story in stories:
        draw = Draw("labels", labels, seed, story.id)
        out.append(
            replace(
                story,
                questions=tuple(
                    replace(
                        q,
                        answer=draw.choice([o for o in q.options if labels == "shuffled" or o != q.answer]),
                    )
                    for q in story.questions
                ),
            )
        )
    return out
