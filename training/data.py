"""Training rows: a story followed by many questions, each of which sees the story up to one sentence and
itself only.

    story      s_0 s_1 ... s_k ... s_n        ordinary causal attention question   q_0 ... q_m
    sees s_0 .. s_k, where k is the sentence after which it is asked, and itself

So one row asks every agent, after many events, without one answer giving another away, at the price of
reading the story once. Only answers weigh fully in the loss; the words of a story are for the most part free
choices.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from variety import ALL_NAMES, ASKED, Renaming, framed, invented, joined, loosened
from wordings import EXTRA

from tl_tomsparse.stories import generate_texts, wording
from tl_tomsparse.stories.generate import FORMS, generate_scenes
from tl_tomsparse.stories.lexicon import COLOURS, CONTENTS, PACKAGES, PLACES, ROOMS, THINGS, Draw
from tl_tomsparse.stories.scenarios import Scene
from tl_tomsparse.stories.story import Kind
from tl_tomsparse.stories.wording import listed, sentence

SHAPES = (
    {"distractors": False},
    {},
    {"places": 3, "rounds": 2},
    {"rounds": 2},
    {"places": 3},
    {"rounds": 2, "distractors": False},
)
"""Shapes of stories; several take turns, so that no count of places or moves is the rule."""
LINKS = (
    "",
    "is in the",
    "has the",
    "goes to the",
    "likes",
    "has a",
    "wants the",
    "finds the",
)


@dataclass(frozen=True)
class Stage:
    """What rows are made of until `enough` of the answers are right, or for `at_most` million tokens."""

    at_most: float
    enough: float
    batch: int  # rows of a step
    width: int  # tokens of a row, at most
    chant: float = 0.0  # share of rows that say a few facts again and again, every repetition a look-up
    lookup: float = 0.0  # share of rows in which everything is looked up by a name once
    general: float = 0.0  # share of rows that are general text; the rest are stories
    facts: tuple[int, int] = (3, 10)  # how many a chant repeats
    lookups: tuple[int, int] = (2, 8)  # how many names a row of look-ups has
    keys: tuple[tuple[str, ...], ...] = (ALL_NAMES, ALL_NAMES, ALL_NAMES, tuple(THINGS))
    agents: tuple[int, int] = (2, 4)
    shapes: tuple[int, ...] = (0,)  # indices of SHAPES, drawn equally often
    second_order: float = 0.0  # chance of each second-order question
    presence: int = 0  # questions about who is there, in each transfer story
    variety: float = 0.0  # chance of each kind of change to the words of a story (`variety`)
    other_names: tuple[float, float] = (
        0.35,
        0.2,
    )  # chances that a story's names are others, and invented ones


STAGES = (
    Stage(12, 0.90, batch=80, width=80, chant=1.0, facts=(4, 7), keys=(ALL_NAMES,)),
    Stage(8, 0.90, batch=48, width=128, chant=1.0, facts=(4, 9)),
    Stage(12, 0.90, batch=32, width=192, chant=0.5, lookup=0.5, facts=(3, 9)),
    Stage(
        25, 0.94, batch=32, width=192, chant=0.08, lookup=0.22, general=0.08,
        agents=(2, 3), shapes=(0, 0, 0, 5, 1), presence=4, variety=0.2,
    ),
    Stage(
        float("inf"), float("inf"), batch=32, width=192, chant=0.05, lookup=0.12, general=0.14, facts=(3, 12),
        shapes=(0, 1, 1, 1, 2, 3, 4), second_order=0.3, presence=1, variety=0.4,
    ),
)  # fmt: skip
"""Looking things up by a name first: short, longer, in sentences. Then stories, second order last."""
_FARTHEST = replace(
    STAGES[-1], at_most=1, batch=8, width=512, chant=0.3, lookup=0.4, general=0.05, facts=(40, 80),
    lookups=(30, 76),
)  # fmt: skip
LONG = (
    replace(_FARTHEST, at_most=2, chant=0.1, general=0.1, facts=(8, 48), lookups=(8, 46)),
    _FARTHEST,
    _FARTHEST,
)
"""What follows, each for all of its tokens: rows as long as the context, for looking far back."""
LEXICON = (ALL_NAMES, THINGS, PLACES, ROOMS, CONTENTS, PACKAGES)
KEPT = frozenset(word for pool in LEXICON for word in pool)
STORY_WEIGHT, LOOKUP_WEIGHT, TEXT_WEIGHT, PRESENCE_WEIGHT = 0.05, 0.02, 0.3, 0.5
SHARE = 0.3  # of a story's words that are predicted, each weighing more by as much


@contextmanager
def more_wordings() -> Iterator[None]:
    """Stories in the wordings of the package and of `wordings.py`."""
    seen = {kind: (*pool, *EXTRA.get(kind, ())) for kind, pool in wording.POOLS["seen"].items()}
    with mock.patch.object(wording, "POOLS", {**wording.POOLS, "seen": seen}):
        yield


@dataclass
class Row:
    """Tokens of one row; `block` is 0 in the story and counts the questions, `reach` is how many story tokens
    a token may see.
    """

    tokens: list[int]
    positions: list[int]
    block: list[int]
    reach: list[int]
    predictions: list[tuple[int, int, float]] = field(default_factory=list)  # from index, target, weight
    witnesses: list[tuple[int, int, float]] = field(default_factory=list)  # at index, name, sees it or not
    looks: list[tuple[int, list[int]]] = field(default_factory=list)  # from index, where the answer stands
    about: list[tuple[int, list[int]]] = field(default_factory=list)  # at index, names a question is about

    @classmethod
    def story(cls, tokens: list[int]) -> Row:
        """Plain causal tokens."""
        n = len(tokens)
        return cls(tokens, list(range(n)), [0] * n, list(range(1, n + 1)))


class Rows:
    """Makes rows with one tokenizer, none longer than `width` tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, width: int) -> None:
        self.tokenizer, self.width = tokenizer, width
        fast = tokenizer.backend_tokenizer
        self.encode = lru_cache(200_000)(
            lambda text: fast.encode(text, add_special_tokens=False).ids if text else []
        )
        keep = {id_ for word in KEPT for id_ in (*self.encode(word), *self.encode(word.capitalize()))}
        self.all_small_words = [
            id_
            for word, id_ in sorted(tokenizer.get_vocab().items())
            if id_ not in keep and len(word) > 2 and id_ not in tokenizer.all_special_ids
        ]
        self.small_words = set(self.all_small_words)
        ids = tokenizer.get_vocab()
        swapped = {id_: ids.get(word[:1] + word[1:2].swapcase() + word[2:]) for word, id_ in ids.items()}
        self.other_case = {
            id_: other for id_, other in swapped.items() if {id_, other} <= self.small_words and other != id_
        }

    def chant(self, draw: Draw, facts: tuple[int, int], keys: Sequence[Sequence[str]]) -> Row:
        """All facts once, then again and again in random order: "Leo park. Ida lake. Leo" -> park.

        No fact twice running, and no fewer than four in the first stages: else there is a way to answer that
        looks only at the fact before.
        """
        n = facts[0] + draw.below(facts[1] - facts[0] + 1)
        left = draw.sample(draw.choice(keys), n)
        pool = draw.choice((ROOMS, THINGS, COLOURS, PLACES, CONTENTS, ALL_NAMES))
        pool = [value for value in pool if value not in left]
        right = draw.sample(pool, n) if n <= len(pool) else [draw.choice(pool) for _ in range(n)]
        link = draw.choice(("", "", *LINKS))
        stop = self.encode("a.")[-1:]  # without it, what stands after a value looks like one, too
        tokens, said, predictions = [self.tokenizer.bos_token_id], set(), []
        order, i = draw.shuffled(range(n)), -1
        while True:
            i = order.pop() if order else draw.choice([other for other in range(n) if other != i])
            head, (target,) = [*self.encode(left[i]), *self.encode(link)], self.encode(right[i])
            if len(tokens) + len(head) + 1 + len(stop) > self.width:
                break
            tokens += head
            if i in said:
                predictions.append((len(tokens) - 1, target, 1.0))
            said.add(i)
            tokens += [target, *stop]
        row = Row.story(tokens)
        row.predictions = predictions
        return row

    def lookup(self, draw: Draw, lookups: tuple[int, int]) -> Row | None:
        """What is whose, who is where, who is here, who thinks what: many names, and every name asked."""
        n = lookups[0] + draw.below(lookups[1] - lookups[0] + 1)
        names, parts, asked = draw.sample(ALL_NAMES, n), [], []
        kind = draw.below(4)
        if kind != 0 and draw.coin(0.3):
            names = [invented(draw) for _ in names]
        if kind == 0:
            for name, thing in zip(names, draw.sample(THINGS, n)):
                colour = draw.choice(COLOURS)
                has = f"{name} has {'an' if colour[0] in 'aeiou' else 'a'}"
                parts.append(f"{has} {colour} {thing}.")
                asked += [
                    (f"The {thing} of {name} is", colour),
                    (has, colour),
                    (f"What does {name} have? {has}", colour),
                    (f"The {thing} belongs to", name),
                    (f"Who has the {thing}? It is", name),
                ]
            parts = draw.shuffled(parts)
        elif kind == 1:
            where = {}
            for name in names + [draw.choice(names) for _ in range(n // 2)]:
                where[name] = draw.choice(ROOMS)
                verb = draw.choice(("is in", "goes to", "walks into", "enters"))
                parts.append(f"{name} {verb} the {where[name]}.")
            for name in names:
                asked.append((f"Right now, {name} is in the", where[name]))
                asked.append((f"Where is {name}? In the", where[name]))
        elif kind == 2:
            room = draw.choice(ROOMS)
            here = dict.fromkeys(names, True)
            parts.append(sentence(draw, "seen", "intro", L=listed(names), R=room))
            for name in [draw.choice(names) for _ in range(n)]:
                which = draw.choice(("leave", "leave", "stay")) if here[name] else "return"
                here[name] = which != "leave"
                parts.append(sentence(draw, "seen", which, P=name, R=room))
            asked = [(f"Right now, {name} is", "here" if here[name] else "away") for name in names]
        else:
            thing = draw.choice(THINGS)
            places = draw.sample([place for place in PLACES if place != thing], 3)
            for name in names:
                place = draw.choice(places)
                parts.append(f"{sentence(draw, 'seen', 'ask_belief', P=name, O=thing)} {place}.")
                form = draw.choice(("ask_belief", "question_belief"))
                asked.append((sentence(draw, "seen", form, P=name, O=thing), place))
        last = len(parts) - 1
        questions = [(text, answer, last, 1.0) for text, answer in draw.shuffled(asked)]
        packed = self._packed(draw, parts, questions, LOOKUP_WEIGHT)
        return packed and packed[0]

    def story(self, scene: Scene, draw: Draw, stage: Stage) -> Row | None:
        """The story, then questions after its end and after earlier sentences. None if it is too long."""
        asked = _questions(scene, draw, stage)
        renaming = Renaming.drawn(draw, scene.agents, *stage.other_names)
        sentences = [renaming(text) for text in scene.sentences]
        questions = [replace(question, text=renaming(question.text)) for question in asked]
        if draw.coin(stage.variety):
            sentences = [framed(draw, text) if draw.coin(0.3) else text for text in sentences]
            questions = [
                replace(q, text=joined(draw.choice(ASKED), q.text)) if draw.coin(0.25) else q
                for q in questions
            ]
        if draw.coin(stage.variety):
            often, kept = draw.choice((0.03, 0.06, 0.12)), KEPT | set(renaming.names.values())
            sentences = [loosened(draw, text, kept, often) for text in sentences]
            questions = [replace(q, text=loosened(draw, q.text, kept, often / 2)) for q in questions]
        packed = self._packed(draw, sentences, [question.packed for question in questions], STORY_WEIGHT)
        if packed is None:
            return None
        row, ends = packed
        if draw.coin(stage.variety):
            self._recased(row, draw, 0.15)
        if draw.coin(stage.variety):
            self._spoil(row, draw, draw.choice((0.04, 0.08, 0.16)))
        numbers = {agent: renaming.number(agent) for agent in scene.agents}
        if scene.scenario == "transfer":
            for i, agents in enumerate(witnesses(scene)):
                row.witnesses += [
                    (ends[i] - 1, number, float(agent in agents))
                    for agent, number in numbers.items()
                    if number is not None
                ]
        for source, target, _ in row.predictions:
            number = row.block[source]
            about = [numbers[agent] for agent in asked[number - 1].agents] if number else []
            if about and None not in about:
                row.about.append((source, about))
            if number and asked[number - 1].decided is not None:
                i = asked[number - 1].decided
                begin, end = (0, row.reach[source]) if i < 0 else (ends[i - 1] if i else 1, ends[i])
                found = [at for at in range(begin, end) if row.tokens[at] == target]
                found += [end - 1] if i >= 0 else []
                if found:
                    row.looks.append((source, found))
        return row

    def _spoil(self, row: Row, draw: Draw, share: float) -> None:
        """Put other words in place of some that are no name, thing, place or contents: a wording never seen
        has words in odd places, too. Only what is read changes, not what is predicted.
        """
        for i, token in enumerate(row.tokens):
            if token in self.small_words and draw.coin(share):
                row.tokens[i] = draw.choice(self.all_small_words)

    def _recased(self, row: Row, draw: Draw, share: float) -> None:
        """Write some of these words with a capital or without one: any of them may begin a sentence."""
        for i, token in enumerate(row.tokens):
            if token in self.other_case and draw.coin(share):
                row.tokens[i] = self.other_case[token]

    def text(self, text: str) -> Row:
        """General text: every token counts."""
        row = Row.story([self.tokenizer.bos_token_id, *self.encode(text)][: self.width])
        row.predictions = [(i, token, TEXT_WEIGHT) for i, token in enumerate(row.tokens[1:])]
        return row

    def _packed(
        self, draw: Draw, sentences: list[str], questions: list[tuple[str, str, int, float]], weight: float
    ) -> tuple[Row, list[int]] | None:
        """Sentences, then questions, each asked after one of the sentences; and where each sentence ends."""
        tokens, ends = [self.tokenizer.bos_token_id], []
        for text in sentences:
            tokens += self.encode(text)
            ends.append(len(tokens))
        row = Row.story(tokens)
        row.predictions = [
            (i, token, weight / SHARE) for i, token in enumerate(tokens[1:]) if draw.coin(SHARE)
        ]
        asked = 0
        for number, (text, answer, at, importance) in enumerate(questions, start=1):
            words, (target,) = self.encode(text), self.encode(answer)
            if len(row.tokens) + len(words) > self.width:
                continue
            asked += 1
            end = ends[at]
            row.tokens += words
            row.positions += range(end, end + len(words))
            row.block += [number] * len(words)
            row.reach += [end] * len(words)
            row.predictions.append((len(row.tokens) - 1, target, importance))
        return (row, ends) if asked and len(tokens) < self.width else None

    def stream(self, stage: Stage, seed: int, n: int) -> Iterator[Row]:
        """n rows of a stage."""
        draw = Draw("training", seed)
        kinds = ("description", "counting", "lookup", "lookup", "repetition", "fact")
        texts = iter(generate_texts(n, seed=seed, kinds=kinds))
        scenes = [
            generate_scenes(20 * n, seed=10 * seed + i, split="train", agents=stage.agents, **shape)
            for i, shape in enumerate(SHAPES)
        ]
        while n:
            kind, row = draw.below(1000) / 1000, None
            if kind < stage.chant:
                row = self.chant(draw, stage.facts, stage.keys)
            elif kind < stage.chant + stage.lookup:
                row = self.lookup(draw, stage.lookups)
            elif kind < stage.chant + stage.lookup + stage.general:
                row = self.text(next(texts))
            else:
                row = self.story(next(scenes[draw.choice(stage.shapes)]), draw, stage)
            if row is not None:
                n -= 1
                yield row


def witnesses(scene: Scene) -> list[set[str]]:
    """Who sees or hears what each sentence of a transfer story tells: those who are there, and whoever a
    sentence about the thing and a place names (a secret observer, one who is told).
    """
    thing, seen = scene.slots["O"], []
    for text, present in zip(scene.sentences, scene.present):
        words = set(re.findall(r"\w+", text))
        event = thing in words and any(place in words for place in scene.values)
        seen.append({a for a in scene.agents if a in present or (event and a in words)})
    return seen


def decided_by(scene: Scene, kind: Kind, agents: tuple[str, ...], at: int, answer: str) -> int | None:
    """The sentence that decides a question asked after sentence `at`: the last one that names the answer,
    changes what is believed and is witnessed by all `agents`.

    -1 where any mention of the answer is as good (unexpected contents), None if there is no such sentence.
    """
    if scene.scenario != "transfer":
        return -1
    settled = [i for i, state in enumerate(scene.states) if state is not None]
    named = [answer in re.findall(r"\w+", text) for text in scene.sentences]
    if kind == "memory":
        return next((i for i in settled if named[i]), None)
    seen = witnesses(scene)
    for i in range(at, settled[0] - 1, -1):
        before = scene.states[i - 1] if i > settled[0] else None
        news = scene.states[i] is None or before is None or scene.states[i] != before
        if named[i] and news and set(agents) <= seen[i]:
            return i
    return None


@dataclass(frozen=True)
class Asked:
    """A question in a row, and the sentence that decides it (`decided_by`)."""

    text: str
    answer: str
    at: int
    weight: float
    agents: tuple[str, ...] = ()
    decided: int | None = None

    @property
    def packed(self) -> tuple[str, str, int, float]:
        """What the row holds of it."""
        return self.text, self.answer, self.at, self.weight


def _questions(scene: Scene, draw: Draw, stage: Stage) -> list[Asked]:
    """The end's questions come first, since those that do not fit are left out."""
    last = len(scene.sentences) - 1
    settled = [i for i, state in enumerate(scene.states) if state is not None]
    pairs = [(a, b) for a in scene.agents for b in scene.agents if a != b]
    asked: list[tuple[Kind, tuple[str, ...], int]] = [("belief", (a,), last) for a in scene.agents]
    asked += [("belief", pair, last) for pair in pairs if draw.coin(stage.second_order)]
    facts: tuple[Kind, ...] = ("reality", "memory")
    asked += [(kind, (), last) for kind in facts if draw.coin()]
    moments = [i for i in settled if i != last]
    for at in draw.sample(moments, min(4, len(moments))):
        asked += [("belief", (a,), at) for a in scene.agents if draw.coin(0.6)]
        if draw.coin(0.2):
            asked.append(("reality", (), at))
        if draw.coin(stage.second_order):
            asked.append(("belief", draw.choice(pairs), at))
    chosen = []
    for kind, agents, at in asked:
        question = scene.question(kind, agents, form=draw.choice(FORMS), at=at)
        decided = decided_by(scene, kind, agents, at, question.answer)
        chosen.append(Asked(question.text, question.answer, at, 1.0, agents, decided))
    if scene.scenario == "transfer":
        for _ in range(stage.presence):
            at, agent = draw.choice(settled), draw.choice(scene.agents)
            where = "here" if agent in scene.present[at] else "away"
            chosen.append(Asked(f"Right now, {agent} is", where, at, PRESENCE_WEIGHT))
    return sorted(draw.shuffled(chosen), key=lambda question: question.at != last)


@dataclass(frozen=True)
class Batch:
    """Rows as tensors; `source`, `target` and `weight` list every prediction that counts, `witness*` what the
    helper head is asked, `look*` where a question's last token ought to look.
    """

    tokens: Tensor  # [batch, pos]
    positions: Tensor  # [batch, pos]
    block: Tensor  # [batch, pos] 0 in the story, the number of the question, -1 behind the end
    reach: Tensor  # [batch, pos] how many story tokens a token may see
    source: Tensor  # [prediction] flat index of the token that predicts
    target: Tensor  # [prediction] token that is predicted
    weight: Tensor  # [prediction]
    witness_at: Tensor  # [witness] flat index of the last token of a sentence
    witness_name: Tensor  # [witness] index of the agent in ALL_NAMES
    witness: Tensor  # [witness] 1 if the agent sees what the sentence tells
    look_from: Tensor  # [look] flat index of a question's last token
    look_at: Tensor  # [look, pos] True where the answer stands
    about_at: Tensor  # [about] flat index of a question's last token
    about: Tensor  # [about, 2] the agents that it is about, one of them twice if there is one

    @property
    def mask(self) -> Tensor:
        """[batch, 1, 1, pos, pos], 0 where attention is allowed, else very negative."""
        index = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        same = (self.block[:, :, None] == self.block[:, None, :]) & (index[:, None] >= index[None, :])
        story = (self.block[:, None, :] == 0) & (index[None, None, :] < self.reach[:, :, None])
        return torch.where(same | story, 0.0, -1e9)[:, None, None]

    def to(self, device: torch.device) -> Batch:
        """The same elsewhere."""
        return Batch(*(getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)))


def collate(rows: list[Row], pad: int, width: int) -> Batch:
    """Pad to a fixed width (one compiled shape)."""

    def padded(name: str, fill: int) -> Tensor:
        return torch.tensor([[*getattr(row, name), *[fill] * (width - len(row.tokens))] for row in rows])

    def flat(name: str) -> list[tuple[Any, ...]]:
        return [(i * width + at, *rest) for i, row in enumerate(rows) for at, *rest in getattr(row, name)]

    def columns(name: str) -> tuple[Tensor, Tensor, Tensor]:
        at, what, x = zip(*entries) if (entries := flat(name)) else ((), (), ())
        return torch.tensor(at, dtype=torch.long), torch.tensor(what, dtype=torch.long), torch.tensor(x)

    looks, abouts = flat("looks"), flat("about")
    look_at = torch.zeros(len(looks), width, dtype=torch.bool)
    for number, (_, found) in enumerate(looks):
        look_at[number, found] = True
    return Batch(
        padded("tokens", pad),
        padded("positions", 0),
        padded("block", -1),
        padded("reach", 0),
        *columns("predictions"),
        *columns("witnesses"),
        torch.tensor([at for at, _ in looks], dtype=torch.long),
        look_at,
        torch.tensor([at for at, _ in abouts], dtype=torch.long),
        torch.tensor([(names[0], names[-1]) for _, names in abouts], dtype=torch.long).view(-1, 2),
    )
