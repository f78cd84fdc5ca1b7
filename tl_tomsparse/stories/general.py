"""General text without anybody's beliefs: descriptions, counting, key-value lookups, repeated sequences,
simple facts.

It serves the general mask (what the weights matter for in any text) and perplexity. Generated, so that it
works without a network; real text files can be used in its place.
"""

from __future__ import annotations

import re

from .._checks import check_choice, check_positive
from .lexicon import COLOURS, MATERIALS, NAMES, PLACES, ROOMS, THINGS, Draw, check_split, split_of
from .wording import listed

KINDS = ("description", "counting", "lookup", "repetition", "fact")
_NUMBERS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen twenty"
).split()
_KINDS_OF_ROOM = ("big", "small", "quiet", "clean", "warm", "cold", "old", "new")
_SURFACES = ("table", "floor", "chair")
_FACTS = (
    "A bird has two wings.",
    "A cat has four legs.",
    "A day has twenty four hours.",
    "A dog can bark.",
    "A fish lives in the water.",
    "A knife is sharp.",
    "A week has seven days.",
    "A year has twelve months.",
    "Bees make honey.",
    "Cows give milk.",
    "Fire is hot.",
    "Ice is cold.",
    "In summer it is warm.",
    "In winter it often snows.",
    "People sleep at night.",
    "Rain comes from the clouds.",
    "The moon shines at night.",
    "The sky is blue.",
    "The sun rises in the morning.",
    "Trees have leaves.",
    "Water is wet.",
    "Wood comes from trees.",
)
_WEEK = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()


def generate_texts(
    n: int, *, seed: int = 0, split: str = "train", kinds: tuple[str, ...] = KINDS, sentences: int = 12
) -> list[str]:
    """Generate general text.

    Args:
        n: how many texts; kinds take turns.
        seed: of all draws.
        split: "train", "dev" or "test"; texts of different splits have no main combination of words in
            common.
        kinds: which kinds of text.
        sentences: rough length of each text.

    Returns:
        The texts; the same on every platform.

    Raises:
        TomsparseError: for an unknown kind or split, or n below 1.
    """
    check_positive("n", n)
    check_positive("sentences", sentences)
    check_split(split)
    for kind in kinds:
        check_choice("kinds", kind, KINDS)
    makers = {
        "description": _description,
        "counting": _counting,
        "lookup": _lookup,
        "repetition": _repetition,
        "fact": _facts,
    }
    texts = []
    for i in range(n):
        draw = Draw("tl_tomsparse general", seed, split, i)
        text = makers[kinds[i % len(kinds)]](draw, split, sentences)
        texts.append(re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text))
    return texts


def _pair(draw: Draw, split: str, first: list[str], second: list[str]) -> tuple[str, str]:
    while True:
        a, b = draw.choice(first), draw.choice(second)
        if a != b and split_of(a, b) == split:
            return a, b


def _description(draw: Draw, split: str, sentences: int) -> str:
    room, place = _pair(draw, split, ROOMS, PLACES)
    parts = [f"There is a {place} in the {room}."]
    while len(parts) < sentences:
        thing, colour, material = draw.choice(THINGS), draw.choice(COLOURS), draw.choice(MATERIALS)
        other = draw.choice([p for p in PLACES if p != place])
        parts.append(
            draw.choice(
                (
                    f"The {thing} is {colour}.",
                    f"The {room} is {draw.choice(_KINDS_OF_ROOM)}.",
                    f"There is a {colour} {thing} next to the {place}.",
                    f"The {place} is made of {material}.",
                    f"The {other} stands next to the {place}.",
                    f"The {place} is {colour} and the {other} is {draw.choice(COLOURS)}.",
                    f"One can see a {thing} and a {draw.choice(THINGS)} on the {draw.choice(_SURFACES)}.",
                    f"{draw.choice(NAMES)} likes the {room}.",
                    f"{listed(draw.sample(NAMES, 2))} often come to the {room}.",
                )
            )
        )
    return " ".join(parts)


def _counting(draw: Draw, split: str, sentences: int) -> str:
    name, thing = _pair(draw, split, NAMES, THINGS)
    step = 1 + draw.below(2)
    start = draw.below(len(_NUMBERS) - 6 * step)
    row = _NUMBERS[start::step]
    plural = {
        "s": f"{thing}es",
        "h": f"{thing}es",
        "x": f"{thing}es",
        "y": f"{thing[:-1]}ies",
        "e": f"{thing}s",
    }.get(thing[-1], f"{thing}s")
    parts = [f"{name} counts the {plural}: {', '.join(row)}."]
    have = 1 + draw.below(4)
    parts.append(f"{name} has {_NUMBERS[have]} {plural}.")
    while len(parts) < sentences // 2:
        more = 1 + draw.below(3)
        if draw.coin() and have + more < len(_NUMBERS):
            have += more
            parts.append(f"{name} gets {_NUMBERS[more]} more. Now {name} has {_NUMBERS[have]} {plural}.")
        elif have > more:
            have -= more
            parts.append(f"{name} gives away {_NUMBERS[more]}. Now {name} has {_NUMBERS[have]} {plural}.")
    return " ".join(parts)


def _lookup(draw: Draw, split: str, sentences: int) -> str:
    n = 2 + draw.below(max(1, sentences // 2 - 1))
    while True:
        keys, values = draw.sample(NAMES, n), draw.sample(THINGS, n)
        if split_of(keys[0], values[0]) == split:
            break
    colours = [draw.choice(COLOURS) for _ in keys]
    parts = [f"{key} has a {colour} {value}." for key, colour, value in zip(keys, colours, values)]
    parts = draw.shuffled(parts)
    for i in draw.shuffled(range(n)):
        parts.append(
            draw.choice(
                (
                    f"The {values[i]} of {keys[i]} is {colours[i]}.",
                    f"What does {keys[i]} have? {keys[i]} has a {colours[i]} {values[i]}.",
                    f"The {values[i]} belongs to {keys[i]}.",
                    f"Who has the {values[i]}? It is {keys[i]}.",
                )
            )
        )
    return " ".join(parts)


def _repetition(draw: Draw, split: str, sentences: int) -> str:
    first, second = _pair(draw, split, THINGS, THINGS)
    n = 3 + draw.below(max(1, sentences - 3))
    row = [first, second, *draw.sample([t for t in THINGS if t not in (first, second)], n)]
    return " ".join(" ".join(row) + "." for _ in range(2 + draw.below(2)))


def _facts(draw: Draw, split: str, sentences: int) -> str:
    name, colour = _pair(draw, split, NAMES, COLOURS)
    day = draw.below(7)
    parts = draw.sample(_FACTS, min(len(_FACTS), max(1, sentences - 4)))
    parts.append(
        f"Today is {_WEEK[day]}. Tomorrow is {_WEEK[(day + 1) % 7]}. Yesterday was {_WEEK[(day - 1) % 7]}."
    )
    parts.append(f"{name} has a {colour} coat. The coat of {name} is {colour}.")
    return " ".join(draw.shuffled(parts))
