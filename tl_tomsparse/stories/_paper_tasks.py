"""The layout of the paper's task file; a part of `benchmarks`."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from typing import Any

from .benchmarks import Source, shuffled
from .story import Question, Story

_PLACEHOLDER = re.compile(r"(?P<start>^|[.!?]\s+)?\b(?P<key>CX|S1|S2|XNAM|XPRO|OBJ_PRO|POS_PRO)(?![A-Z_])")
_FIELDS = {"CX": "c", "XNAM": "xnam", "XPRO": "xpro", "OBJ_PRO": "obj_pro", "POS_PRO": "pos_pro"}
_CONTENTS = {  # what follows the item's text in each condition; S1 is what is inside, S2 the other thing
    "false_belief": ("txt", "XNAM reads the label, but does not open or examine the CX."),
    "correct_label": ("txt_correctlabel", "XNAM reads the label, but does not open or examine the CX."),
    "informed": (
        "txt",
        "XNAM reads the label, but does not open or examine the CX. A friend phones and says that the label "
        "is wrong: there is S1 in the CX, not S2. XNAM believes the friend.",
    ),
    "open_container": ("txt", "XNAM opens and examines the CX, and then reads the label."),
}
_TRANSFER = ("false_belief", "no_transfer", "informed", "present")


def paper(source: Source) -> list[Story]:
    """Contents items (`tsks1` or "s1") are templates in which CX, S1, S2, XNAM, XPRO, OBJ_PRO and POS_PRO are
    filled in; transfer items (`tsks2`, "s2") have everything but the exchange of their two places.
    """
    stories: list[Story] = []
    tasks = _tasks(source)
    for number, item in enumerate(tasks["s1"]):
        stories += _contents(source, number, item)
    for number, item in enumerate(tasks["s2"]):
        stories += _transfer(source, number, item)
    return stories


def _tasks(source: Source) -> dict[str, list[Any]]:
    """The items by "s1" and "s2"; a Python file is parsed, never run."""
    cure = "give the paper's ToM_tasks.py, or JSON with the lists 's1' and 's2'"
    text = source.text()
    names = {"tsks1": "s1", "tsks2": "s2"}
    found: dict[str, Any] = {}
    try:
        if source.path.suffix == ".py":
            for node in ast.parse(text).body:
                if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                    name = node.targets[0].id
                    if name in names:
                        found[names[name]] = ast.literal_eval(node.value)
        else:
            found = json.loads(text)
    except (SyntaxError, ValueError) as error:
        raise source.refused("text", f"neither literal Python nor JSON ({error})", cure) from error
    for key in ("s1", "s2"):
        if not isinstance(found, dict) or not isinstance(found.get(key), list):
            raise source.refused("top level", f"no list {key!r}", cure)
    return {key: found[key] for key in ("s1", "s2")}


def _checked(source: Source, where: str, item: Any, needed: tuple[str, ...]) -> Mapping[str, str]:
    missing = [key for key in needed if not isinstance(item, dict) or not isinstance(item.get(key), str)]
    if missing:
        raise source.refused(where, f"no text {', '.join(missing)}", "compare it with the other items")
    if item["o1"] == item["o2"]:
        raise source.refused(where, f"o1 and o2 are both {item['o1']!r}", "name two different things")
    return dict(item)


def _contents(source: Source, number: int, item: Any) -> list[Story]:
    needed = ("txt", "txt_correctlabel", "o1", "o2", *_FIELDS.values())
    item = _checked(source, f"contents item {number}", item, needed)
    stories = []
    for condition, (field, more) in _CONTENTS.items():
        for way in (0, 1):
            inside, label = (item["o1"], item["o2"]) if way == 0 else (item["o2"], item["o1"])
            words = {"S1": inside, "S2": label, **{key: item[name] for key, name in _FIELDS.items()}}
            text = _fill(f"{item[field].strip()} {more}", words)
            asks = tuple(
                _fill(ask, words)
                for ask in (
                    "In truth, the CX is full of",
                    "XNAM phones the people at home and says: I have found a CX full of",
                )
            )
            believed = label if condition == "false_belief" else inside
            name = f"paper-contents-{number:02d}-{condition}-{way}"
            stories.append(
                _pair(source, name, "contents", condition, text, asks, (inside, believed), item, item["xnam"])
            )
    return stories


def _transfer(source: Source, number: int, item: Any) -> list[Story]:
    where = f"transfer item {number}"
    needed = ("txt", "txt_notransfer", "txt_informed", "txt_present", "o1", "o2", "q1", "q2")
    item = _checked(source, where, item, needed)
    texts = {
        "false_belief": item["txt"],
        "no_transfer": item["txt_notransfer"],
        "informed": f"{item['txt'].strip()} {item['txt_informed']}",
        "present": item["txt_present"],
    }
    agent = re.split(r" (?:will|looks?|thinks?)\b", item["q2"])[0]
    last, first = item["o1"], item["o2"]
    stories = []
    for condition in _TRANSFER:
        for way in (0, 1):
            swap = {last: first, first: last} if way else {}
            text = _exchange(texts[condition].strip(), swap)
            real = first if condition == "no_transfer" else last
            believed = first if condition == "false_belief" else real
            answers = (swap.get(real, real), swap.get(believed, believed))
            name = f"paper-transfer-{number:02d}-{condition}-{way}"
            asks = (item["q1"].strip(), item["q2"].strip())
            stories.append(_pair(source, name, "transfer", condition, text, asks, answers, item, agent))
    return stories


def _pair(
    source: Source,
    name: str,
    scenario: str,
    condition: str,
    text: str,
    asks: tuple[str, ...],
    answers: tuple[str, str],
    item: Mapping[str, str],
    agent: str,
) -> Story:
    """A story with its question about reality and its question about the protagonist's belief."""
    options = shuffled(name, (item["o1"], item["o2"]))
    real, believed = answers
    questions = (
        Question("reality", (), asks[0], "completion", real, options),
        Question("belief", (agent,), asks[1], "completion", believed, options, believed == real),
    )
    return source.story(name, scenario, condition, text, questions, name.rsplit("-", 2)[0])


def _fill(template: str, words: Mapping[str, str]) -> str:
    """The template with its placeholders filled in, sentences still beginning with a capital."""

    def word(match: re.Match[str]) -> str:
        filled, start = words[match["key"]], match["start"]
        return filled if start is None else start + filled[:1].upper() + filled[1:]

    return _PLACEHOLDER.sub(word, template)


def _exchange(text: str, swap: Mapping[str, str]) -> str:
    if not swap:
        return text
    longest_first = sorted(map(re.escape, swap), key=len, reverse=True)
    return re.sub(rf"\b(?:{'|'.join(longest_first)})\b", lambda match: swap[match[0]], text)
