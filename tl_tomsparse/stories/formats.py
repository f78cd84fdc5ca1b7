"""Stories to and from JSON lines and `datasets.Dataset`: one record a story, its questions nested.

    {"text": "Ann ...", "questions": [
        {"kind": "belief", "agents": ["Ann"], "text": "Ann thinks the key is in the",
         "answer": "tin", "options": ["box", "tin"], "true_belief": false}]}

is enough of your own story: a record needs `text` and `questions`, a question `kind`, `text`, `answer` and
`options`, a belief also `agents` and, of first order, `true_belief`. The rest has defaults.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from .._checks import TomsparseError, check_choice
from .story import Form, Kind, Question, Story

if TYPE_CHECKING:
    from datasets import Dataset


def to_record(story: Story) -> dict[str, Any]:
    """A story as plain JSON data."""
    return asdict(story)


_STORY = {"scenario": "own", "condition": "", "protagonist": "", "split": "", "wording": "", "agents": ()}
_QUESTION = {"form": "completion", "agents": ()}


def from_record(record: Mapping[str, Any], name: str = "") -> Story:
    """A story from plain JSON data.

    Args:
        record: its fields; those that the module docstring does not ask for may be missing or None.
        name: the id of a record without one.

    Raises:
        TomsparseError: naming a field that is missing or unknown, an answer that is not among the options, or
            a belief without its agents or of unknown truth.
    """
    name = str(record.get("id") or name) if isinstance(record, Mapping) else name
    try:
        fields = _filled(record, {"id": name, **_STORY})
        asked = [_filled(question, _QUESTION) for question in record["questions"]]
        for some in (fields, *asked):
            _check_types(name, some)
        story = Story(**{**fields, "questions": tuple(Question(**question) for question in asked)})
    except (KeyError, TypeError, AttributeError) as error:
        raise TomsparseError(
            f"story {name!r} does not have the fields of a Story ({error}); "
            "compare it with a record that write_jsonl writes."
        ) from error
    for question in story.questions:
        if question.answer not in question.options:
            raise TomsparseError(
                f"story {story.id!r}: the answer {question.answer!r} is not among the options "
                f"{question.options}; add it."
            )
        _check_kind(story.id, question)
    return story


def _filled(record: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a record, with tuples for lists; None, as a `Dataset` has it, is a missing value."""
    given = {key: value for key, value in record.items() if value is not None}
    filled = {**defaults, **given}
    return {key: tuple(value) if isinstance(value, list) else value for key, value in filled.items()}


def _check_types(name: str, fields: Mapping[str, Any]) -> None:
    for key, value in fields.items():
        if key in ("agents", "options"):
            right, what = (
                isinstance(value, tuple) and all(isinstance(v, str) for v in value),
                "texts in a list",
            )
        elif key == "true_belief":
            right, what = isinstance(value, bool), "true or false"
        elif key == "questions":
            right, what = isinstance(value, tuple) and len(value) > 0, "a list of at least one question"
        else:
            right, what = isinstance(value, str), "a text"
        if not right:
            raise TomsparseError(f"story {name!r}: {key}={value!r} must be {what}.")


def _check_kind(name: str, question: Question) -> None:
    check_choice(f"story {name!r}: kind", question.kind, get_args(Kind))
    check_choice(f"story {name!r}: form", question.form, get_args(Form))
    if question.kind == "belief" and not question.agents:
        raise TomsparseError(
            f"story {name!r}: the belief question {question.text!r} has no agents; name whose belief it is."
        )
    first_order = question.kind == "belief" and question.order == 1
    if (first_order or question.kind == "photograph") and question.true_belief is None:
        raise TomsparseError(
            f"story {name!r}: the {question.kind} question {question.text!r} has no true_belief; say whether "
            "its answer is what is so (true) or not (false)."
        )


def write_jsonl(path: str | Path, stories: Iterable[Story]) -> None:
    """Write stories as JSON lines, whole or not at all."""
    from .._artifacts import write_text  # imports torch, which stories do not need otherwise

    write_text(Path(path), "".join(json.dumps(to_record(s), ensure_ascii=False) + "\n" for s in stories))


def read_jsonl(path: str | Path) -> list[Story]:
    """Read stories from JSON lines, those that `write_jsonl` writes or your own (see `stories.formats`).

    Raises:
        TomsparseError: if a line is not a story; the message gives its number.
        FileNotFoundError: if there is no such file.
    """
    stories = []
    with Path(path).open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                stories.append(from_record(json.loads(line), f"line {number}"))
            except json.JSONDecodeError as error:
                raise TomsparseError(
                    f"{path}, line {number}: not JSON ({error}); write one story a line."
                ) from error
            except TomsparseError as error:
                raise TomsparseError(f"{path}, line {number}: {error}") from error
    return stories


def to_dataset(stories: Iterable[Story]) -> Dataset:
    """Stories as a `datasets.Dataset`, one row a story."""
    from datasets import Dataset

    return Dataset.from_list([to_record(s) for s in stories])


def from_dataset(dataset: Dataset) -> list[Story]:
    """Stories from a `datasets.Dataset` whose rows have the fields of a line of `read_jsonl`.

    Raises:
        TomsparseError: if a row is not a story.
    """
    return [from_record(row, f"row {index}") for index, row in enumerate(dataset)]
