"""Key-value and induction items: answers found by reading, distances counted in tokens, no shortcut."""

from __future__ import annotations

import re
from collections import Counter

import pytest
from scipy.stats import binomtest

import tl_tomsparse as tt
from tests import tiny
from tl_tomsparse._checks import TomsparseError
from tl_tomsparse.localisation import _other_keys, auto_distances
from tl_tomsparse.stories.lexicon import Draw

DISTANCES = (64, 200, 700)


@pytest.fixture(scope="module")
def model():
    return tt.load_model(tiny.long_directory(), device="cpu")


@pytest.fixture(scope="module")
def facts(model):
    return tt.key_value_stories(model, 40, distances=DISTANCES)


@pytest.fixture(scope="module")
def rows(model):
    return tt.induction_stories(model, 40, distances=DISTANCES)


def count(tokenizer, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_what_is_asked_was_said_once(facts):
    for story in facts:
        (question,) = story.questions
        said = re.findall(r"(\w+) has an? (\w+) (\w+)\.", story.text)
        assert len(said) == story.text.count(".")
        assert len({(name, thing) for name, _, thing in said}) == len(said)
        thing, name = re.fullmatch(r"The (\w+) of (\w+) is", question.text).groups()
        assert [colour for n, colour, t in said if (n, t) == (name, thing)] == [question.answer]
        counts = Counter(colour for _, colour, _ in said)
        assert set(counts) == set(question.options)
        assert len(question.options) == 4
        assert set(counts.values()) == {len(said) // 4}
        assert len(said) >= 8


def test_a_row_begins_again(rows):
    for story in rows:
        (question,) = story.questions
        row, start = story.text.rstrip(".").split(), question.text.split()
        assert row[: len(start)] == start
        assert row[len(start)] == question.answer
        assert all(row.count(word) == 1 for word in {*start, *question.options})
        assert not {*start} & {*question.options}


def test_distances_in_tokens(model, facts, rows):
    tokenizer = model.tokenizer
    for story in facts:
        (question,) = story.questions
        thing, name = re.fullmatch(r"The (\w+) of (\w+) is", question.text).groups()
        upto = re.match(rf".*\b{name} has an? \w+(?= {thing}\.)", story.text)[0]
        distance = count(tokenizer, story.prompt(question)) - count(tokenizer, upto) + 1
        one_more = count(tokenizer, " Alan has a silver umbrella.") + 40
        assert int(story.condition) - one_more < distance <= int(story.condition)
    for story in rows:
        (question,) = story.questions
        upto = story.text[: story.text.index(f" {question.answer}") + len(question.answer) + 1]
        answer = count(tokenizer, f" {question.answer}")
        distance = count(tokenizer, story.prompt(question)) - count(tokenizer, upto) + answer
        assert int(story.condition) - 20 < distance <= int(story.condition)


def test_no_other_way_to_the_answer(model):
    stories = [s for d in (64, 150) for s in tt.key_value_stories(model, 150, distances=(d,))]
    marks = {"first": [], "last": []}
    for story in stories:
        (question,) = story.questions
        said = re.findall(r"(\w+) has an? (\w+)", story.text)
        for place, (name, colour) in (("first", said[0]), ("last", said[-1])):
            if f" of {name} is" not in question.text:
                marks[place].append(colour == question.answer)
    for right in marks.values():
        assert binomtest(sum(right), len(right), 0.25, alternative="greater").pvalue > 1e-3
        assert len(right) > 100


def test_items_are_the_same_at_every_distance_and_seeded(model, facts):
    by_group = {}
    for story in facts:
        by_group.setdefault(story.group, set()).add((story.questions[0].text, story.questions[0].answer))
    assert len(by_group) == 40
    assert all(len(asked) == 1 for asked in by_group.values())
    assert facts[:40] == tt.key_value_stories(model, 40, distances=(64,))
    assert facts[0] != tt.key_value_stories(model, 1, distances=(64,), seed=1)[0]
    assert len({story.id for story in facts}) == len(facts)


def test_names_and_things_come_to_an_end():
    keys = _other_keys(Draw(1), "Anna", "ball")
    listed = [next(keys) for _ in range(3000)]
    seen = set(listed)
    assert len(seen) == len(listed)
    with pytest.raises(TomsparseError, match="not enough names and things"):
        list(keys)
    assert not {"Anna"} & {name for name, _ in seen}
    assert not {"ball", "orange"} & {thing for _, thing in seen}


def test_distances_by_themselves(model):
    assert auto_distances(model) == (16, 32, 64, 128, 256, 512, 896)
    assert auto_distances(tiny.model()) == ()
    assert auto_distances(tt.load_model(device="cpu")) == (16, 32, 64, 128, 256, 384)


def test_they_are_scored_and_sampled(model):
    rows = tt.induction_stories(model, 3, distances=(64, 128))
    scores = tt.score_stories(model, rows, show_progress=False)
    accuracy = scores.accuracy(["condition"]).set_index("condition")
    assert accuracy.n.to_dict() == {"64": 3, "128": 3}
    assert (accuracy.chance == 0.25).all()
    assert len(tt.story_samples(model, rows, categories=["other"])) == len(rows)


@pytest.mark.parametrize("make", [tt.key_value_stories, tt.induction_stories])
def test_what_has_no_room_is_refused(model, make):
    for distances in ((8,), (897,), ()):
        with pytest.raises(TomsparseError, match="must be from 16 to 896 tokens"):
            make(model, 1, distances=distances)
    with pytest.raises(TomsparseError, match="distances='all'"):
        make(model, 1, distances="all")
    with pytest.raises(TomsparseError, match="n=0"):
        make(model, 0)
    with pytest.raises(TomsparseError, match=r"distance=16 leaves .*; ask for longer distances"):
        make(model, 3, distances=(16,))  # this tokenizer cuts words into many tokens
    by_itself = {int(story.condition) for story in make(model, 3)}
    assert 16 not in by_itself
    assert {64, 128, 256, 512, 896} <= by_itself
