"""The layout of ToMBench; a part of `benchmarks`."""

from __future__ import annotations

import json
import re
import warnings
from dataclasses import dataclass
from typing import Any

from .benchmarks import Source
from .story import Kind, Question, Story

_KEYS = {
    "en": ("STORY", "QUESTION", [f"OPTION-{letter}" for letter in "ABCD"]),
    "zh": ("故事", "问题", [f"选项{letter}" for letter in "ABCD"]),
}
_REALITY = re.compile(r"^where is .*\bnow\b|^what is (?:really |actually )?in|^现在.*哪|里面有什么", re.I)
_MEMORY = re.compile(r"\b(?:before|at first)\W*$|^what should be in|^之前|应该有", re.I)
_WHO = re.compile(r"does (?P<a>.+?) (?:think (?P<b>.+?) )?(?:looks?|search|searches|expects?|will)\b")


@dataclass(frozen=True)
class _Item:
    """One line of the file."""

    where: str
    story: str
    words: str
    options: tuple[str, ...]
    right: int
    ability: str
    kind: Kind  # by ability and wording
    agents: tuple[str, ...]
    compared: str  # the answer, in Chinese if there is a twin


def tombench(source: Source) -> list[Story]:
    """JSON lines, each a question in English and Chinese."""
    asked: dict[str, list[_Item]] = {}
    for number, line in enumerate(source.text().splitlines(), start=1):
        if line.strip():
            item = _read(source, f"line {number}", line)
            asked.setdefault(item.story, []).append(item)
    stories: list[Story] = []
    left_out: list[str] = []
    for text, items in asked.items():
        real = next((item.compared for item in items if item.kind == "reality"), None)
        questions: list[Question] = []
        for item in items:
            if source.answers == "text" and item.options.count(item.options[item.right]) > 1:
                left_out.append(item.where)
            else:
                questions.append(_question(source, item, real))
        if questions:
            name = f"tombench-{len(stories):05d}"
            stories.append(source.story(name, "tombench", items[0].ability, text, tuple(questions)))
    if left_out:
        warnings.warn(
            f"{source.path}: {len(left_out)} questions have an option that is equal to the answer, "
            f"first at {left_out[0]}; they are left out (answers='letter' keeps them).",
            stacklevel=3,
        )
    return stories


def _question(source: Source, item: _Item, real: str | None) -> Question:
    kind, agents, options, right = item.kind, item.agents, item.options, item.right
    if kind == "belief" and len(agents) == 1 and real is None:
        kind, agents = "other", ()
    true = item.compared == real if len(agents) == 1 else None
    if source.answers == "text":
        answer, options = options[right], tuple(dict.fromkeys(options))
        right = options.index(answer)
    return source.question(kind, agents, item.words, options, right, true)


def _read(source: Source, where: str, line: str) -> _Item:
    cure = "give a .jsonl of ToMBench's data folder, or name the layout that the file has"
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise source.refused(where, f"not JSON ({error.msg})", cure) from error
    if not isinstance(record, dict):
        raise source.refused(where, f"a {type(record).__name__}, not a question", cure)
    record = {key.split("\n")[-1]: value for key, value in record.items()}  # "答案\nANSWER"
    story, ask, keys = _KEYS[source.language]
    for key in (story, ask, *keys[:2], "ABILITY", "ANSWER"):
        if not _is_text(record.get(key)):
            raise source.refused(where, f"no {key}", cure)
    options = tuple(_option(record[key]) for key in keys if _is_text(record.get(key)))
    letters = "ABCD"[: len(options)]
    letter = record["ANSWER"].strip()
    if letter not in tuple(letters):
        raise source.refused(where, f"the answer {letter!r} is not one of {', '.join(letters)}", cure)
    right = letters.index(letter)
    twin = record.get(_KEYS["zh"][2][right])
    ability = " ".join(record["ABILITY"].split())
    kind, agents = _about(ability, str(record.get("QUESTION")), str(record.get("问题")))
    return _Item(
        where,
        " ".join(record[story].split()),
        " ".join(record[ask].split()),
        options,
        right,
        ability,
        kind,
        agents,
        _option(str(twin)) if _is_text(twin) else options[right],
    )


def _about(ability: str, english: str, chinese: str) -> tuple[Kind, tuple[str, ...]]:
    """Kind and agents; where the wording does not give names away, one stands for them."""
    who = _WHO.search(english)
    if "Second-order beliefs" in ability:
        return "belief", (who["a"], who["b"]) if who and who["b"] else ("one", "another")
    if "false beliefs" not in ability:
        return "other", ()
    for kind, wording in (("reality", _REALITY), ("memory", _MEMORY)):
        if wording.search(english) or wording.search(chinese):
            return kind, ()  # type: ignore[return-value]
    return "belief", (who["a"] if who else "one",)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())  # a missing option is NaN


def _option(text: str) -> str:
    return " ".join(re.sub(r"^[A-D]\s*[.:：、．]\s*", "", text.strip()).split())
