"""Readers for published Theory-of-Mind sets, from files that the user has; none is shipped.

    bigtom     Gandhi et al. 2023, arXiv 2306.15448: `bigtom.csv`, fields separated by ";", no header
    hitom      Wu et al. 2023, arXiv 2310.16755: one JSON, {"data": [...]}
    tomi       Le et al. 2019, EMNLP D19-1598: numbered lines, "question<TAB>answer<TAB>line"; the `.trace`
               file beside it is read if there is one
    tombench   Chen et al. 2024, arXiv 2402.15052: JSON lines, English and Chinese side by side
    paper      the task file of arXiv 2504.04238, `.py` or `.json`: unexpected contents, unexpected transfer

Every question gets a kind, and with it a category, by the rules in `read_benchmark`. Nothing is computed
anew: answers are the file's.

NOT claimed: that the rules are those of the sets' authors, nor that scores compare with published ones, which
mostly come from generated text and other prompts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .._checks import TomsparseError, check_choice
from .lexicon import SPLITS, Draw
from .story import Kind, Question, Story

Benchmark = Literal["bigtom", "hitom", "tomi", "tombench", "paper"]
Answers = Literal["text", "letter"]
Language = Literal["en", "zh"]
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_WORDS = {"en": ("Question:", "Answer:"), "zh": ("问题：", "答案：")}


@dataclass(frozen=True)
class Source:
    """A file of a published set, and how its questions are to be asked."""

    path: Path
    answers: Answers
    language: Language
    split: str

    def refused(self, where: str, found: str, cure: str) -> TomsparseError:
        """The error about one place of the file."""
        return TomsparseError(f"{self.path}, {where}: {found}; {cure}.")

    def text(self) -> str:
        """The file's text.

        Raises:
            TomsparseError: if it is not UTF-8.
            FileNotFoundError: if there is no such file.
        """
        try:
            return self.path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise self.refused("text", f"not UTF-8 ({error})", "save it as UTF-8") from error

    def question(
        self,
        kind: Kind,
        agents: tuple[str, ...],
        words: str,
        options: tuple[str, ...],
        right: int,
        true_belief: bool | None = None,
    ) -> Question:
        """A question with the option at `right` as its answer, asked as `answers` says."""
        ask, reply = _WORDS[self.language]
        text = f"{ask} {words} {reply}"
        if self.answers == "letter":
            letters = tuple(LETTERS[: len(options)])
            listed = "\n".join(f"{letter}. {option}" for letter, option in zip(letters, options))
            text, options = f"{ask} {words}\n{listed}\n{reply}", letters
        return Question(kind, agents, text, "question", options[right], options, true_belief)

    def story(
        self,
        name: str,
        scenario: str,
        condition: str,
        text: str,
        questions: tuple[Question, ...],
        group: str = "",
    ) -> Story:
        """A story whose agents are those that its questions name."""
        agents = tuple(dict.fromkeys(agent for question in questions for agent in question.agents))
        protagonist = agents[0] if len(agents) == 1 else ""
        return Story(name, scenario, condition, protagonist, self.split, "", text, agents, questions, group)


def shuffled(name: str, options: tuple[str, ...]) -> tuple[str, ...]:
    """The options in an order that depends on nothing but `name`."""
    return tuple(Draw("tl_tomsparse options", name).shuffled(options))


def read_benchmark(
    path: str | Path,
    benchmark: Benchmark,
    *,
    answers: Answers = "text",
    language: Language = "en",
    split: str = "test",
) -> list[Story]:
    """Read a file of a published Theory-of-Mind set as stories, for `score_stories` and `story_samples`.

    A first-order belief is false where its answer is another than the answer about reality, and true where it
    is the same. In particular:

    * bigtom: each row is one group of ten stories of one question. Scenario "forward_belief" asks what the
      agent believes and "forward_action" what the agent will do, in four conditions: "true_belief" (sees the
      event), "false_belief" (does not), and "true_control" and "false_control" (something irrelevant happens
      instead, seen or not, and what was believed is still so). "backward_belief" tells the action and asks
      for the belief, in the first two conditions. All are first-order beliefs, false in the condition
      "false_belief". The desire questions are not read.
    * hitom: order 0 is reality, order 1 a belief, orders 2 to 4 are "second_order" (their `order` tells them
      apart). Numbers before sentences and the instruction above some stories are left away; what both
      prompting types ask alike is read once. Scenario: "length_1" to "length_3"; condition: "deception" or
      not.
    * tomi: by the wording of the question; options are the containers that held the thing, reality is the
      last of them. The condition is the story type of the `.trace` file, and without one "false_belief" where
      a first-order answer is not reality, else "true_belief".
    * tombench: abilities with "Second-order beliefs" are second order; of those with "false beliefs", where a
      thing is now or what is in a box is reality, where it was before or what should be in the box is memory,
      the rest are first-order beliefs; everything else, and a belief in a story without a question about
      reality, is "other". Answers are compared in Chinese, whose options are written alike in all questions
      of a story. The condition is the ability. Equal options are read as one; a question with an option equal
      to its answer is left out with a warning.
    * paper: each item gives four conditions, both ways round, one group; each asks about reality and the
      protagonist's belief. Contents items are templates; the sentences that make the conditions, and the
      questions, are not in the file and are worded anew. In transfer items the two places are exchanged word
      by word. The irony items ask no belief and are not read.

    Options may be whole sentences: where they differ in length, compare with
    `score_stories(..., normalise="tokens")` or ask for letters.

    Args:
        path: the file as published.
        benchmark: whose layout it has: "bigtom", "hitom", "tomi", "tombench" or "paper"; your own stories are
            read by `read_jsonl` and `from_dataset`.
        answers: "text" scores the options themselves; "letter" lists them after the question and scores their
            letters ("bigtom", "hitom" and "tombench", which are multiple choice).
        language: "en", or "zh" for the Chinese twins of "tombench".
        split: recorded on every story. Only "test" may be reported by `effect`, only others may choose a
            kappa; divide a set by `group` to do both.

    Returns:
        The stories in the order of the file; questions about one text are one story.

    Raises:
        TomsparseError: a value outside the choices, or a file of another layout: the message names the file,
            the place, what was found and the cure.
        FileNotFoundError: if there is no such file.
    """
    from . import _benchmark_files, _paper_tasks, _tombench

    readers: dict[str, Callable[[Source], list[Story]]] = {
        "bigtom": _benchmark_files.bigtom,
        "hitom": _benchmark_files.hitom,
        "tomi": _benchmark_files.tomi,
        "tombench": _tombench.tombench,
        "paper": _paper_tasks.paper,
    }
    check_choice("benchmark", benchmark, readers)
    check_choice("answers", answers, ("text", "letter"))
    check_choice("language", language, tuple(_WORDS))
    check_choice("split", split, SPLITS)
    if answers == "letter" and benchmark in ("tomi", "paper"):
        raise TomsparseError(
            f"answers='letter', but {benchmark!r} is not multiple choice; use answers='text'."
        )
    if language != "en" and benchmark != "tombench":
        raise TomsparseError(f"language={language!r}, but {benchmark!r} is in English; use language='en'.")
    source = Source(Path(path), answers, language, split)
    stories = readers[benchmark](source)
    if not stories:
        raise TomsparseError(f"{path} has no question; is it the whole file of {benchmark!r}?")
    return stories
