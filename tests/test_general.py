"""Generated general text: true by its own rules, split, seeded."""

from __future__ import annotations

import re

import pytest

from tl_tomsparse._checks import TomsparseError
from tl_tomsparse.stories import generate_texts
from tl_tomsparse.stories.general import _NUMBERS, KINDS


def test_lookups_answer_what_was_said():
    for text in generate_texts(50, seed=2, kinds=("lookup",)):
        has = {m[1]: (m[2], m[3]) for m in re.finditer(r"(?:^|\. )(\w+) has an? (\w+) (\w+)", text)}
        answers = re.findall(r"The (\w+) of (\w+) is (\w+)", text)
        assert has
        assert all(has[who] == (colour, thing) for thing, who, colour in answers)
        assert all(
            has[who][1] == thing for thing, who in re.findall(r"Who has the (\w+)\? It is (\w+)", text)
        )


def test_counts_add_up():
    for text in generate_texts(50, seed=2, kinds=("counting",), sentences=20):
        have = None
        for verb, word in re.findall(r"(counts|gets|gives away|has) (\w+)", text):
            if verb == "counts" or word not in _NUMBERS:
                continue
            number = _NUMBERS.index(word)
            if verb == "gets":
                have += number
            elif verb == "gives away":
                have -= number
            else:
                assert have is None or have == number, text
                have = number


def test_repetitions_repeat():
    for text in generate_texts(20, seed=2, kinds=("repetition",)):
        assert len({part.strip() for part in text.split(".") if part}) == 1


def test_kinds_take_turns_and_are_seeded():
    texts = generate_texts(10, seed=1)
    assert texts == generate_texts(20, seed=1)[:10]
    assert texts != generate_texts(10, seed=2)
    assert not set(texts) & set(generate_texts(10, seed=1, split="test"))
    assert len(KINDS) == 5
    assert not any("  " in text for text in texts)


@pytest.mark.parametrize(
    "options", [{"n": 0}, {"n": 1, "kinds": ("poem",)}, {"n": 1, "split": "x"}, {"n": 1, "sentences": 0}]
)
def test_bad_values_are_refused(options):
    with pytest.raises(TomsparseError):
        generate_texts(**options)
