"""What a story is: a text, and questions about it whose answers were computed by the epistemic logic.

Plain data without torch. A question is asked by appending its `text` to the story's `text`; the answer and
the other options are words without the leading space: single nouns in generated stories, up to whole
sentences in published sets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["reality", "memory", "belief", "photograph", "other"]
Form = Literal["completion", "question"]
Category = Literal[
    "reality",
    "memory",
    "true_belief",
    "false_belief",
    "second_order",
    "true_photograph",
    "false_photograph",
    "other",
]
CATEGORIES: tuple[Category, ...] = ("false_belief", "true_belief", "reality", "memory", "second_order")
"""What generated stories ask."""
ALL_CATEGORIES: tuple[Category, ...] = (*CATEGORIES, "false_photograph", "true_photograph", "other")
"""And what only `generate_photographs` or published sets ask."""


@dataclass(frozen=True)
class Question:
    """One question about one story.

    Attributes:
        kind: "reality" (where is it now), "memory" (where was it at first), "belief", "photograph" (what does
            a picture show) or "other" (anything else that a published set asks).
        agents: whose belief, outermost first: ("Anna",) for "Anna thinks ...", ("Anna", "Ben") for "Anna
            thinks that Ben thinks ...". Empty for reality and memory.
        text: the words that follow the story, up to but not including the answer.
        form: "completion" (the answer completes a sentence) or "question" (a question, then an answer
            prompt).
        answer: the right option.
        options: the answer and the alternatives, in an order that says nothing about which is right.
        true_belief: for a belief, whether what is believed is what is so; for a photograph, whether what it
            shows is; None for the other kinds.
    """

    kind: Kind
    agents: tuple[str, ...]
    text: str
    form: Form
    answer: str
    options: tuple[str, ...]
    true_belief: bool | None = None

    @property
    def order(self) -> int:
        """The order of belief: 1 for "A thinks" (and a picture), 2 for "A thinks that B thinks", else 0."""
        return len(self.agents)

    @property
    def category(self) -> Category:
        """The category under which the answer is reported."""
        if self.kind in ("reality", "memory", "other"):
            return self.kind
        if self.kind == "photograph":
            return "true_photograph" if self.true_belief else "false_photograph"
        if self.order >= 2:
            return "second_order"
        return "true_belief" if self.true_belief else "false_belief"


@dataclass(frozen=True)
class Story:
    """A story and its questions.

    Attributes:
        id: unique within a set of one seed, split and scenario list; stable across platforms.
        scenario: "transfer" (a thing is moved), "contents" (a container holds something else than its label
            says), or a name of a published set's.
        condition: what befalls the protagonist, for example "false_belief", "present", "informed".
        protagonist: whose condition it is; the other agents' beliefs may be true or false in any condition.
        split: "train", "dev" or "test": by combination of names, things and places.
        wording: "seen" or "new": the pool that the sentence templates come from.
        text: the story itself, sentences separated by single spaces.
        agents: everybody in it, in order of first mention.
        questions: at least one.
        group: the same for stories that are drawn together, such as twins; empty for one that stands alone.
    """

    id: str
    scenario: str
    condition: str
    protagonist: str
    split: str
    wording: str
    text: str
    agents: tuple[str, ...]
    questions: tuple[Question, ...]
    group: str = ""

    def prompt(self, question: Question) -> str:
        """The story followed by the question: what the model reads before the answer."""
        return f"{self.text} {question.text}"
