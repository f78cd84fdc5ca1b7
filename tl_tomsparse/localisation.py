"""Contextual localisation (ours): finding something again that was said so many tokens ago.

    key-value   "Anna has a red ball. ... The ball of Anna is"      -> red
    induction   "key shoe lamp ... . key shoe"                      -> lamp

Distance is the number of tokens from the answer's last token, where it was said, to where it must be said
again. Each item is one story with one question of four options, so that `score_stories` and `story_samples`
take it (category "other"). The options are words of the text that are said equally often: each of four
colours is the colour of as many facts, and each option of a row is in it once.

NOT claimed: that these are all that localisation is, that a distance in tokens is the same for two
tokenizers, or that a fixed distance cannot be learnt as such by a model that is trained on these items.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import Any, Literal

from tl_tomsparse._checks import TomsparseError, check_choice, check_positive
from tl_tomsparse._model import ModelView, view
from tl_tomsparse.samples import encode
from tl_tomsparse.stories.lexicon import (
    COLOURS,
    CONTENTS,
    MATERIALS,
    NAMES,
    PLACES,
    ROOMS,
    SPLITS,
    THINGS,
    Draw,
    split_of,
)
from tl_tomsparse.stories.story import Question, Story

Distances = Sequence[int] | Literal["auto"]
_SHORTEST, _LONGEST, _MARGIN = 16, 1024, 128
_N_OPTIONS, _FACTS, _ONCE = 4, 8, 16
_THINGS = [thing for thing in THINGS if thing not in COLOURS]  # an orange
_WORDS = sorted({*THINGS, *PLACES, *CONTENTS, *ROOMS, *COLOURS, *MATERIALS})


def auto_distances(model: Any) -> tuple[int, ...]:
    """Powers of two from 16, and the longest that the context has room for, up to 1024."""
    longest = min(_LONGEST, view(model).n_ctx - _MARGIN)
    powers = [_SHORTEST << k for k in range(longest.bit_length()) if _SHORTEST << k < longest]
    return (*powers, longest) if longest >= _SHORTEST else ()


def key_value_stories(
    model: Any, n: int, *, distances: Distances = "auto", seed: int = 0, split: str = "test"
) -> list[Story]:
    """Facts about people's things, one of which is asked for.

    Args:
        model: whose tokenizer and context count.
        n: items at each distance; the same facts are asked for at every distance, and are one group.
        distances: in tokens, at least 16; each is the most that fits without another fact. "auto" takes
            powers of two up to the longest that the context has room for, at most 1024, less those that
            are too short for the tokenizer.
        seed: of all draws.
        split: "train", "dev" or "test": by combination of name and thing.

    Returns:
        Stories of one question each; scenario "key_value", condition the distance.

    Raises:
        TomsparseError: a distance that the tokenizer or the context has no room for, no tokenizer, or a value
            outside the ranges.
    """
    return _items(_key_value, model, n, distances, seed, split)


def induction_stories(
    model: Any, n: int, *, distances: Distances = "auto", seed: int = 0, split: str = "test"
) -> list[Story]:
    """Rows of words without meaning that begin again; the next word of the row is the answer.

    The arguments, and what is raised, are those of [`key_value_stories`][]; scenario "induction", condition
    the distance, which is the length of the row. A row that needs more words than there are repeats some,
    never one of its first sixteen, among which the answer and the other options are.
    """
    return _items(_induction, model, n, distances, seed, split)


class _NoRoom(TomsparseError):
    """A distance is too short for one item."""


def _items(
    make: Callable[[ModelView, int, int, str, int], Story],
    model: Any,
    n: int,
    distances: Distances,
    seed: int,
    split: str,
) -> list[Story]:
    model_view = view(model)
    check_positive("n", n)
    check_choice("split", split, SPLITS)
    if model_view.tokenizer is None:
        raise TomsparseError(f"{model_view.name} has no tokenizer; load it with one (load_model does).")
    wanted = auto_distances(model) if isinstance(distances, str) else tuple(distances)
    if isinstance(distances, str):
        check_choice("distances", distances, ("auto",))
    longest = model_view.n_ctx - _MARGIN
    if not wanted or min(wanted) < _SHORTEST or max(wanted) > longest:
        raise TomsparseError(
            f"distances={wanted!r} must be from {_SHORTEST} to {longest} tokens ({model_view.name}'s context "
            f"of {model_view.n_ctx} less {_MARGIN})."
        )
    stories: list[Story] = []
    for distance in wanted:
        try:
            stories += [make(model_view, distance, seed, split, i) for i in range(n)]
        except _NoRoom:
            if not isinstance(distances, str) or distance == wanted[-1]:
                raise
    return stories


def _key_value(model_view: ModelView, distance: int, seed: int, split: str, i: int) -> Story:
    draw = Draw("tl_tomsparse key_value", seed, split, i)
    while True:
        name, thing = draw.choice(NAMES), draw.choice(_THINGS)
        if split_of(name, thing) == split:
            break
    colours = draw.sample(COLOURS, _N_OPTIONS)
    answer, options = colours[0], tuple(draw.shuffled(colours))
    keys = _other_keys(draw, name, thing)
    ask, room, others = f"The {thing} of {name} is", distance, [next(keys)]
    while room > 0:  # about as many facts as the distance has room for, and some more
        room -= len(encode(model_view, f" {_fact(*others[-1], answer)}"))
        others.append(next(keys))
    ahead = [next(keys) for _ in range(_FACTS)]
    for m in range(len(others), 0, -1):
        # All colours equally often: as many facts ahead as that takes.
        p = max(0, _FACTS - m - 1) + -max(m + 1, _FACTS) % _N_OPTIONS
        rest = [*options * ((m + 1 + p) // _N_OPTIONS)]
        rest.remove(answer)
        drawn = draw.shuffled(rest)
        before = [_fact(*key, colour) for key, colour in zip(ahead[:p], drawn)]
        before.append(_fact(name, thing, answer))
        between = [_fact(*key, colour) for key, colour in zip(others[:m], drawn[p:])]
        said = " ".join(before)
        upto = len(encode(model_view, said[: said.rindex(answer) + len(answer)]))
        tokens = len(encode(model_view, " ".join([said, *between, ask]))) - upto + 1
        if tokens <= distance:
            break
    else:
        raise _NoRoom(
            f"distance={distance} leaves {model_view.name}'s tokenizer no room for a fact between (one takes "
            f"{tokens} tokens); ask for longer distances."
        )
    text = " ".join([said, *between])
    return _story("key_value", text, ask, answer, options, distance, f"{split}-{seed}-{i:05d}", split)


def _other_keys(draw: Draw, name: str, thing: str) -> Iterator[tuple[str, str]]:
    """Pairs of other names and other things, no pair twice; names begin again when all were used."""
    names = draw.shuffled([other for other in NAMES if other != name])
    things = [other for other in _THINGS if other != thing]
    used: set[tuple[str, str]] = set()
    for i in count():
        if 2 * len(used) > len(names) * len(things):
            raise TomsparseError(
                f"There are not enough names and things for a text of {len(used)} facts; ask for shorter "
                "distances."
            )
        key = names[i % len(names)], draw.choice(things)
        if key not in used:
            used.add(key)
            yield key


def _fact(name: str, thing: str, colour: str) -> str:
    return re.sub(r"\ba (?=[aeiou])", "an ", f"{name} has a {colour} {thing}.")


def _induction(model_view: ModelView, distance: int, seed: int, split: str, i: int) -> Story:
    draw = Draw("tl_tomsparse induction", seed, split, i)
    while True:
        row = draw.sample(_WORDS, _ONCE)
        if split_of(*row[:2]) == split:
            break
    rest = draw.shuffled([word for word in _WORDS if word not in row])
    room = distance - sum(len(encode(model_view, f" {word}")) for word in row)
    for n in range(distance):
        if room < 0:
            break
        row.append(rest[n % len(rest)])
        room -= len(encode(model_view, f" {row[-1]}"))
    while row and _period(model_view, row) > distance:  # what was counted word by word is nearly right
        row.pop()
    known = min(len(row), _ONCE) - _N_OPTIONS  # the answer comes after so many words at most
    if known < 2:
        raise _NoRoom(
            f"distance={distance} leaves {model_view.name}'s tokenizer room for a row of {len(row)} words, "
            f"and {_N_OPTIONS + 2} are needed; ask for longer distances."
        )
    at = 2 + draw.below(min(known, 8) - 1)
    answer, others = row[at], draw.sample(row[at + 1 : _ONCE], _N_OPTIONS - 1)
    options = tuple(draw.shuffled([answer, *others]))
    text, ask = f"{' '.join(row)}.", " ".join(row[:at])
    return _story("induction", text, ask, answer, options, distance, f"{split}-{seed}-{i:05d}", split)


def _period(model_view: ModelView, row: Sequence[str]) -> int:
    """Tokens from a word of the row to the same word when the row begins again."""
    start = " ".join(row[:2])
    return len(encode(model_view, f"{' '.join(row)}. {start}")) - len(encode(model_view, start))


def _story(
    scenario: str,
    text: str,
    ask: str,
    answer: str,
    options: tuple[str, ...],
    distance: int,
    name: str,
    split: str,
) -> Story:
    question = Question("other", (), ask, "completion", answer, options)
    group = f"{scenario}-{name}"
    return Story(
        f"{group}-{distance}", scenario, str(distance), "", split, "seen", text, (), (question,), group
    )
