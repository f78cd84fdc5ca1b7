"""Stories to and from JSON lines and `datasets.Dataset`: one record a story, its questions nested."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._checks import TomsparseError
from .story import Question, Story

if TYPE_CHECKING:
    from datasets import Dataset


def to_record(story: Story) -> dict[str, Any]:
    """A story as plain JSON data."""
    return asdict(story)


def from_record(record: Mapping[str, Any]) -> Story:
    """A story from plain JSON data.

    Raises:
        TomsparseError: naming a field that is missing or unknown, or an answer that is not among the options.
    """
    try:
        fields = {**record, "agents": tuple(record["agents"])}
        fields["questions"] = tuple(
            Question(**{**q, "agents": tuple(q["agents"]), "options": tuple(q["options"])})
            for q in record["questions"]
        )
        story = Story(**fields)
    except (KeyError, TypeError) as error:
        raise TomsparseError(
            f"story {record.get('id', '?')!r} does not have the fields of a Story ({error}); "
            "compare it with a record that write_jsonl writes."
        ) from error
    for question in story.questions:
        if question.answer not in question.options:
            raise TomsparseError(
                f"story {story.id!r}: the answer {question.answer!r} is not among the options "
                f"{question.options}; add it."
            )
    return story


def write_jsonl(path: str | Path, stories: Iterable[Story]) -> None:
    """Write stories as JSON lines, whole or not at all."""
    from .._artifacts import write_text  # imports torch, which stories do not need otherwise

    write_text(Path(path), "".join(json.dumps(to_record(s), ensure_ascii=False) + "\n" for s in stories))


def read_jsonl(path: str | Path) -> list[Story]:
    """Read stories from JSON lines.

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
                stories.append(from_record(json.loads(line)))
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
    """Stories from a `datasets.Dataset` that has the columns of [`to_dataset`][].

    Raises:
        TomsparseError: if a row is not a story.
    """
    return [from_record(row) for row in dataset]
