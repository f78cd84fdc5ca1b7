"""The layouts of BigToM, Hi-ToM and ToMi; a part of `benchmarks`."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from .benchmarks import Source, shuffled
from .story import Kind, Question, Story

_SENTENCE = re.compile(r"(?<=[.!?])\s+")
_NUMBERED = re.compile(r"(\d+) (.+)")


def bigtom(source: Source) -> list[Story]:
    """Fields separated by ";", no header."""
    stories: list[Story] = []
    reader = csv.reader(io.StringIO(source.text()), delimiter=";", strict=True)
    try:
        for row in reader:
            if any(field.strip() for field in row):
                stories += _bigtom_row(source, reader.line_num, row, len(stories) // 10)
    except csv.Error as error:
        raise source.refused(
            f"line {reader.line_num}", f"not CSV ({error})", "compare it with the published bigtom.csv"
        ) from error
    return stories


def _bigtom_row(source: Source, line: int, row: list[str], number: int) -> Iterator[Story]:
    cure = "give bigtom.csv as published, or name the layout that the file has"
    row = [" ".join(field.split()) for field in row]
    if len(row) != 19:
        raise source.refused(f"line {line}", f"{len(row)} fields separated by ';' where BigToM has 19", cure)
    if not all(row[:17]):
        raise source.refused(f"line {line}", f"field {row.index('') + 1} is empty", cure)
    plot, aware, unaware, acts_aware, acts_unaware, ask_belief, _, ask_action = row[:8]
    belief, action = {True: row[8], False: row[11]}, {True: row[10], False: row[13]}
    other_event, other_aware, other_unaware = row[14:17]
    asked = re.match(r"Does (.+?) (?:believe|think)", ask_belief)
    if asked is None:
        raise source.refused(
            f"line {line}", f"the belief question {ask_belief!r} does not begin 'Does ... believe'", cure
        )
    sentences = _SENTENCE.split(plot)
    if len(sentences) < 2:
        raise source.refused(f"line {line}", "the story has one sentence, not an event in its last", cure)
    calm = " ".join(sentences[:-1])  # the story before the event that makes the belief false
    # condition: text, whether the agent knows of the event, whether the belief is true
    told = {
        "true_belief": (f"{plot} {aware}", True, True),
        "false_belief": (f"{plot} {unaware}", False, False),
        "true_control": (f"{calm} {other_event} {other_aware}", False, True),
        "false_control": (f"{calm} {other_event} {other_unaware}", False, True),
    }
    cells = [
        (scenario, condition, *cell, ask, replies)
        for scenario, ask, replies in (
            ("forward_belief", ask_belief, belief),
            ("forward_action", ask_action, action),
        )
        for condition, cell in told.items()
    ]
    cells += [
        ("backward_belief", "true_belief", f"{plot} {acts_aware}", True, True, ask_belief, belief),
        ("backward_belief", "false_belief", f"{plot} {acts_unaware}", False, False, ask_belief, belief),
    ]
    group = f"bigtom-{number:04d}"
    agents = (asked.group(1),)
    for scenario, condition, text, knows, true, ask, replies in cells:
        if replies[True] == replies[False]:
            raise source.refused(f"line {line}", f"both answers to {ask!r} are {replies[True]!r}", cure)
        name = f"{group}-{scenario}-{condition}"
        options = shuffled(name, tuple(replies.values()))
        question = source.question("belief", agents, ask, options, options.index(replies[knows]), true)
        yield source.story(name, scenario, condition, text, (question,), group)


_HITOM = {
    "story": str,
    "question": str,
    "question_order": int,
    "choices": str,
    "answer": str,
    "story_length": int,
    "deception": bool,
}


def hitom(source: Source) -> list[Story]:
    """One JSON, {"data": [...]}."""
    cure = "give Hi-ToM_data.json as published, or name the layout that the file has"
    try:
        items = json.loads(source.text())
    except json.JSONDecodeError as error:
        raise source.refused(f"line {error.lineno}", f"not JSON ({error.msg})", cure) from error
    items = items.get("data") if isinstance(items, dict) else items
    if not isinstance(items, list):
        raise source.refused("top level", "no list of questions under 'data'", cure)
    asked: dict[str, list[tuple[str, Mapping[str, Any]]]] = {}
    for number, item in enumerate(items, start=1):
        where = f"item {number}"
        missing = [
            key
            for key, type_ in _HITOM.items()
            if not isinstance(item, dict) or type(item.get(key)) is not type_
        ]
        if missing:
            raise source.refused(where, f"no {', '.join(missing)}", cure)
        lines = [match.group(2) for line in item["story"].split("\n") if (match := _NUMBERED.match(line))]
        if not lines:
            raise source.refused(where, "the story has no numbered line", cure)
        asked.setdefault(" ".join(lines), []).append((where, item))
    return [_hitom_story(source, f"hitom-{i:04d}", text, asked[text], cure) for i, text in enumerate(asked)]


def _hitom_story(
    source: Source, name: str, text: str, asked: list[tuple[str, Mapping[str, Any]]], cure: str
) -> Story:
    real = {_thing(item): item["answer"] for _, item in asked if item["question_order"] == 0}
    questions: dict[tuple[str, str, frozenset[str]], Question] = {}
    for where, item in asked:
        order, words, answer = item["question_order"], item["question"], item["answer"]
        # "A. blue_box, B. red_crate": a choice ends where the next letter begins
        options = tuple(re.findall(r"[A-Z]\. (.+?)(?=, [A-Z]\. |$)", item["choices"]))
        if answer not in options:
            raise source.refused(where, f"the answer {answer!r} is not among {item['choices']!r}", cure)
        agents = tuple(re.findall(r"(?:does|thinks?) ([A-Z]\w*)", words))
        if len(agents) != order:
            raise source.refused(where, f"{words!r} names {len(agents)} agents at order {order}", cure)
        if order == 1 and _thing(item) not in real:
            raise source.refused(
                where,
                f"its story has no question of order 0 about {_thing(item)!r}",
                "keep it: it tells true beliefs from false",
            )
        kind: Kind = "belief" if order else "reality"
        true = answer == real[_thing(item)] if order == 1 else None
        question = source.question(kind, agents, words, options, options.index(answer), true)
        questions.setdefault((words, answer, frozenset(options)), question)
    first = asked[0][1]
    condition = "deception" if first["deception"] else "no_deception"
    return source.story(name, f"length_{first['story_length']}", condition, text, tuple(questions.values()))


def _thing(item: Mapping[str, Any]) -> str:
    """What a question of Hi-ToM is about: "Where is the pear really?", "... the pear is?"."""
    match = re.search(r"\bthe (\S+) (?:is\b|really)", item["question"])
    return match.group(1) if match else ""


_TOMI: tuple[tuple[Kind, re.Pattern[str]], ...] = (
    ("memory", re.compile(r"Where was the (?P<thing>\S+) at the beginning\?")),
    ("reality", re.compile(r"Where is the (?P<thing>\S+) really\?")),
    ("belief", re.compile(r"Where will (?P<a>\w+) look for the (?P<thing>\S+)\?")),
    (
        "belief",
        re.compile(r"Where does (?P<a>\w+) think that (?P<b>\w+) searches for the (?P<thing>\S+)\?"),
    ),
)


def tomi(source: Source) -> list[Story]:
    """Numbered lines; a story ends in a question."""
    blocks = list(_tomi_blocks(source))
    trace = source.path.with_suffix(".trace")
    types: list[str] = []
    if trace.exists():
        types = [line.split(",")[-1].strip() for line in trace.read_text().splitlines() if line.strip()]
        if len(types) != len(blocks):
            raise source.refused(
                "trace",
                f"{trace} has {len(types)} lines for {len(blocks)} questions",
                "use the file of this set",
            )
    stories: list[Story] = []
    at = 0
    while at < len(blocks):
        lines, end = blocks[at][0], at
        while end < len(blocks) and blocks[end][0] == lines:
            end += 1
        questions = tuple(
            _tomi_question(source, lines, where, asked, answer) for _, where, asked, answer in blocks[at:end]
        )
        false = any(question.category == "false_belief" for question in questions)
        condition = types[at] if types else "false_belief" if false else "true_belief"
        text = " ".join(line if line.endswith(".") else f"{line}." for line in lines)
        stories.append(source.story(f"tomi-{len(stories):05d}", "transfer", condition, text, questions))
        at = end
    return stories


def _tomi_blocks(source: Source) -> Iterator[tuple[tuple[str, ...], str, str, str]]:
    """For each question: the story's lines, the place, the question and the answer."""
    cure = "ToMi has numbered lines, and a story ends in 'question<TAB>answer<TAB>number'"
    lines: list[str] = []
    for number, line in enumerate(source.text().splitlines(), start=1):
        if not line.strip():
            continue
        match, where = _NUMBERED.match(line), f"line {number}"
        if match is None:
            raise source.refused(where, f"{line[:40]!r} does not begin with a number", cure)
        if int(match.group(1)) != len(lines) + 1:
            raise source.refused(where, f"number {match.group(1)} where {len(lines) + 1} follows", cure)
        words, *fields = match.group(2).split("\t")
        if not fields:
            lines.append(words.strip())
            continue
        if not lines:
            raise source.refused(where, "a question without a story", cure)
        yield tuple(lines), where, words.strip(), fields[0].strip()
        lines = []
    if lines:
        raise source.refused(f"line {number}", "the last story has no question", cure)


def _tomi_question(source: Source, lines: tuple[str, ...], where: str, asked: str, answer: str) -> Question:
    kind, match = next(((k, m) for k, p in _TOMI if (m := p.fullmatch(asked))), (None, None))
    if kind is None or match is None:
        raise source.refused(
            where, f"a question of unknown wording: {asked!r}", "remove it, or use read_jsonl"
        )
    thing = re.escape(match["thing"])
    held = re.findall(rf"(?:The {thing} is in|moved the {thing} to) the (\S+?)\.(?:\s|$)", "\n".join(lines))
    options = tuple(dict.fromkeys(held))
    if len(options) < 2 or answer not in options:
        raise source.refused(
            where,
            f"the answer {answer!r} and the containers {options} of the {match['thing']} do not go together",
            "the story must name two containers, the answer among them",
        )
    agents = tuple(name for key in "ab" if (name := match.groupdict().get(key)))
    true = answer == held[-1] if len(agents) == 1 else None
    options = shuffled(f"{' '.join(lines)} {asked}", options)
    return source.question(kind, agents, asked, options, options.index(answer), true)
