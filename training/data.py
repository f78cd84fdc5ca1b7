"""Training rows: a story followed by many questions, each of which sees the story up to one sentence and
itself only.

    story      s_0 s_1 ... s_k ... s_n        ordinary causal attention question   q_0 ... q_m answer
    sees s_0 .. s_k, where k is the sentence after which it is asked, and itself

So one row asks every agent, after many events, without one answer giving another away, at the price of
reading the story once. Only answers weigh fully in the loss; the words of a story are for the most part free
choices.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from tl_tomsparse.stories import generate_texts
from tl_tomsparse.stories.generate import FORMS, generate_scenes
from tl_tomsparse.stories.lexicon import COLOURS, NAMES, ROOMS, THINGS, Draw
from tl_tomsparse.stories.scenarios import Scene
from tl_tomsparse.stories.story import Kind
from tl_tomsparse.stories.wording import listed, sentence


@dataclass(frozen=True)
class Stage:
    """What a row is made of at some share of the training."""

    until: float  # share of the training at which the stage ends
    general: float  # share of rows that are general text
    kinds: tuple[str, ...]  # of general text
    agents: tuple[int, int]
    second_order: float  # chance of each second-order question
    distractors: float = 1.0  # share of stories with sentences that have no bearing on the answers
    rounds: bool = True  # half of the stories have more than one move
    presence: int = 1  # questions about who is there, in each transfer story
    lookup: float = 0.0  # share of rows that are nothing but looking things up by a name
    chant: float = 0.0  # share of rows that say a few facts again and again, every repetition a look-up


ALL_KINDS = ("description", "counting", "lookup", "repetition", "fact")
CURRICULUM = (
    Stage(0.08, 0.6, ("lookup", "lookup", "repetition", "description", "counting"), (2, 3), 0.0),
    Stage(0.49, 0.15, ALL_KINDS, (2, 4), 0.15, presence=0),
    # By now answers are guesses by the kind of story. Short stories, who was there, look-ups by name.
    Stage(0.60, 0.10, ALL_KINDS, (2, 3), 0.0, distractors=0.4, rounds=False, presence=4),
    Stage(
        0.65, 0.10, ALL_KINDS, (2, 3), 0.0, distractors=0.6, rounds=False, presence=3, lookup=0.15, chant=0.3
    ),
    Stage(1.00, 0.15, ALL_KINDS, (2, 4), 0.3, presence=1, rounds=False, lookup=0.05),
)
STORY_WEIGHT, TEXT_WEIGHT = 0.05, 0.3


@dataclass
class Row:
    """Tokens of one row; `block` is 0 in the story and counts the questions, `reach` is how many story tokens
    a token may see.
    """

    tokens: list[int]
    positions: list[int]
    block: list[int]
    reach: list[int]
    weight: list[float]  # of predicting this token from the one before it in its block
    previous: list[int]  # index of that one


def story_row(tokenizer: PreTrainedTokenizerFast, scene: Scene, draw: Draw, stage: Stage, length: int) -> Row:
    """The story, then questions after its end and after earlier sentences."""
    return _row(tokenizer, scene.sentences, _questions(scene, draw, stage), length)


def lookup_row(tokenizer: PreTrainedTokenizerFast, draw: Draw, length: int) -> Row:
    """What is whose, who is where, who is here: many names, and every name asked."""
    n = 3 + draw.below(6)
    names, parts, asked = draw.sample(NAMES, n), [], []
    kind = draw.below(3)
    if kind == 0:
        for name, thing in zip(names, draw.sample(THINGS, n)):
            colour = draw.choice(COLOURS)
            parts.append(f"{name} has a {colour} {thing}.")
            asked += [
                f"The {thing} of {name} is {colour}",
                f"{name} has a {colour} {thing}",
                f"Who has the {thing}? It is {name}",
            ]
        parts = draw.shuffled(parts)
    elif kind == 1:
        where = {}
        for name in names + [draw.choice(names) for _ in range(n // 2)]:
            where[name] = draw.choice(ROOMS)
            parts.append(
                f"{name} {draw.choice(('is in', 'goes to', 'walks into', 'enters'))} the {where[name]}."
            )
        asked = [
            text
            for name in names
            for text in (
                f"Right now, {name} is in the {where[name]}",
                f"Where is {name}? In the {where[name]}",
            )
        ]
    else:
        slots = {"R": draw.choice(ROOMS)}
        here = dict.fromkeys(names, True)
        parts.append(sentence(draw, "seen", "intro", L=listed(names), **slots))
        for name in [draw.choice(names) for _ in range(n)]:
            kinds = ("leave", "leave", "stay") if here[name] else ("return",)
            which = draw.choice(kinds)
            here[name] = which != "leave"
            parts.append(sentence(draw, "seen", which, P=name, **slots))
        asked = [f"Right now, {name} is {'here' if here[name] else 'away'}" for name in names]
    return _row(tokenizer, parts, [(text, len(parts) - 1) for text in draw.shuffled(asked)], length)


def chant_row(tokenizer: PreTrainedTokenizerFast, draw: Draw, length: int) -> Row:
    """A few facts, said again and again in random order: "Leo park. Ida lake. Ida lake. Leo" -> park."""
    n = 2 + draw.below(7)
    names = draw.sample(NAMES, n)
    values = draw.sample(draw.choice((ROOMS, THINGS, COLOURS)), n)
    link = draw.choice(("", "", " is in the", " has the", " goes to the", " likes the"))
    tokens, weight, said = [tokenizer.bos_token_id], [0.0], set()
    while True:
        i = len(said) if len(said) < n else draw.below(n)
        words = tokenizer(f"{names[i]}{link} {values[i]}{'.' if link else ''}", add_special_tokens=False)[
            "input_ids"
        ]
        if len(tokens) + len(words) > length:
            break
        at = len(words) - (2 if link else 1)
        tokens += words
        weight += [1.0 if k == at and i in said else 0.0 for k in range(len(words))]
        said.add(i)
    n_tokens = len(tokens)
    previous = [max(0, k - 1) for k in range(n_tokens)]
    return Row(tokens, list(range(n_tokens)), [0] * n_tokens, list(range(1, n_tokens + 1)), weight, previous)


def _row(
    tokenizer: PreTrainedTokenizerFast, sentences: list[str], questions: list[tuple[str, int]], length: int
) -> Row:
    """Sentences, then questions with their answers, each asked after one of the sentences."""
    pieces = tokenizer(sentences, add_special_tokens=False)["input_ids"]
    tokens = [tokenizer.bos_token_id]
    ends = []
    for piece in pieces:
        tokens += piece
        ends.append(len(tokens))
    n = len(tokens)
    row = Row(
        tokens,
        list(range(n)),
        [0] * n,
        list(range(1, n + 1)),
        [0.0] + [STORY_WEIGHT] * (n - 1),
        [max(0, i - 1) for i in range(n)],
    )
    encoded = tokenizer([text for text, _ in questions], add_special_tokens=False)["input_ids"]
    for number, ((_, at), words) in enumerate(zip(questions, encoded), start=1):
        end = ends[at]
        start = len(row.tokens)
        if start + len(words) > length:
            break
        row.tokens += words
        row.positions += range(end, end + len(words))
        row.block += [number] * len(words)
        row.reach += [end] * len(words)
        row.weight += [0.0] * (len(words) - 1) + [1.0]
        row.previous += [end - 1, *range(start, start + len(words) - 1)]
    return row


def _questions(scene: Scene, draw: Draw, stage: Stage) -> list[tuple[str, int]]:
    """Questions with their answers, and the sentence after which each is asked."""
    last = len(scene.sentences) - 1
    settled = [i for i, state in enumerate(scene.states) if state is not None]
    pairs = [(a, b) for a in scene.agents for b in scene.agents if a != b]
    asked: list[tuple[Kind, tuple[str, ...], int]] = [("belief", (a,), last) for a in scene.agents]
    asked += [("belief", pair, last) for pair in pairs if draw.coin(stage.second_order)]
    asked += [("reality", (), last), ("memory", (), last)]
    for _ in range(4):
        at = draw.choice(settled)
        asked.append(("belief", (draw.choice(scene.agents),), at) if draw.coin(0.85) else ("reality", (), at))
    chosen = []
    for kind, agents, at in asked:
        question = scene.question(kind, agents, form=draw.choice(FORMS), at=at)
        chosen.append((f"{question.text} {question.answer}", at))
    if scene.scenario == "transfer":
        for _ in range(stage.presence):
            at, agent = draw.choice(settled), draw.choice(scene.agents)
            chosen.append((f"Right now, {agent} is {'here' if agent in scene.present[at] else 'away'}", at))
    return draw.shuffled(chosen)


def text_row(tokenizer: PreTrainedTokenizerFast, text: str, length: int) -> Row:
    """General text: every token counts."""
    tokens = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]][:length]
    n = len(tokens)
    weight = [0.0] + [TEXT_WEIGHT] * (n - 1)
    return Row(
        tokens, list(range(n)), [0] * n, list(range(1, n + 1)), weight, [max(0, i - 1) for i in range(n)]
    )


def rows(tokenizer: PreTrainedTokenizerFast, stage: Stage, seed: int, n: int, length: int) -> Iterator[Row]:
    """n rows of a stage."""
    draw = Draw("training", seed)
    kinds = stage.kinds
    texts = iter(generate_texts(n, seed=seed, kinds=kinds))
    # Scenes without end: several shapes take turns, so that no count of places or moves is the rule.
    plain = {"split": "train", "agents": stage.agents}
    shapes = [
        generate_scenes(10 * n, seed=seed, **plain),
        generate_scenes(10 * n, seed=seed + 3, distractors=False, **plain),
    ]
    shapes += [
        generate_scenes(10 * n, seed=seed + 1, places=3, rounds=2, **plain),
        generate_scenes(10 * n, seed=seed + 2, rounds=2, **plain),
    ]
    for _ in range(n):
        if draw.coin(stage.chant):
            yield chant_row(tokenizer, draw, length)
        elif draw.coin(stage.lookup):
            yield lookup_row(tokenizer, draw, length)
        elif draw.coin(stage.general):
            yield text_row(tokenizer, next(texts), length)
        else:
            shape = (
                draw.choice((2, 3)) if stage.rounds and draw.coin() else int(not draw.coin(stage.distractors))
            )
            yield story_row(tokenizer, next(shapes[shape]), draw, stage, length)


@dataclass(frozen=True)
class Batch:
    """Rows as tensors; `source`, `target` and `weight` list every prediction that counts."""

    tokens: Tensor  # [batch, pos]
    positions: Tensor  # [batch, pos]
    mask: Tensor  # [batch, 1, pos, pos], True where attention is allowed
    source: Tensor  # [prediction] flat index of the token that predicts
    target: Tensor  # [prediction] token that is predicted
    weight: Tensor  # [prediction]


def collate(batch: list[Row], pad: int, width: int) -> Batch:
    """Pad to a fixed width (one compiled shape) and build the block mask."""

    def padded(name: str, fill: float) -> Tensor:
        return torch.tensor([[*getattr(row, name), *[fill] * (width - len(row.tokens))] for row in batch])

    tokens, positions, block, reach = (
        padded(name, fill) for name, fill in (("tokens", pad), ("positions", 0), ("block", -1), ("reach", 0))
    )
    weight, previous = padded("weight", 0.0), padded("previous", 0)
    index = torch.arange(width)
    causal = index[:, None] >= index[None, :]
    same = block[:, :, None] == block[:, None, :]
    story = (block[:, None, :] == 0) & (index[None, None, :] < reach[:, :, None])
    mask = ((same & causal) | story)[:, None]
    row, column = (weight > 0).nonzero(as_tuple=True)
    return Batch(
        tokens,
        positions,
        mask,
        row * width + previous[row, column],
        tokens[row, column],
        weight[row, column],
    )
