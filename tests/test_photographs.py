"""Stories about pictures: what they show against a reading of the text; no shortcut; both right together."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binomtest

import tl_tomsparse as tt
from tests import tiny
from tl_tomsparse._checks import TomsparseError
from tl_tomsparse.evaluate import StoryScores
from tl_tomsparse.stories import generate_photographs

PICTURE = re.compile(r"\b(photo|map|picture|drawing) of the")


def read(story):
    """What each picture shows, by going through the sentences: without distractors the last that is not about
    a picture is the move, or what is done instead.
    """
    first, after = story.questions[1].answer, story.questions[0].answer
    place, shown = first, {}
    plain = [s for s in re.split(r"(?<=\.) ", story.text) if not PICTURE.search(s)]
    moved = plain[-1]
    for sentence in re.split(r"(?<=\.) ", story.text):
        if match := PICTURE.search(sentence):
            shown[match[1]] = place
        if sentence == moved:
            place = after
    return shown


def test_what_pictures_show():
    stories = generate_photographs(400, seed=2, distractors=False)
    for story in stories:
        pictures = [question for question in story.questions if question.kind == "photograph"]
        assert {q.agents[0]: q.answer for q in pictures} == read(story)
        assert len({q.agents for q in pictures}) == 2
        real = story.questions[0].answer
        assert [q.true_belief for q in pictures] == [q.answer == real for q in pictures]
        assert (story.questions[1].answer == real) == (story.condition == "no_transfer")
        of_condition = next(q for q in pictures if q.agents == (story.protagonist,))
        assert (of_condition.category == "false_photograph") == (story.condition == "false_photograph")
    counts = pd.Series([story.condition for story in stories]).value_counts(normalize=True)
    assert counts.to_dict() == {"false_photograph": 0.5, "taken_after": 0.25, "no_transfer": 0.25}


@pytest.mark.parametrize("place", [0, -1, "most"])
def test_where_a_word_stands_says_nothing(place):
    marks = []
    for story in generate_photographs(1600, seed=4):
        words = [w for w in re.findall(r"\w+", story.text) if w in story.questions[0].options]
        guess = pd.Series(words).value_counts().index[0] if place == "most" else words[place]
        asked = next(q for q in story.questions if q.agents == (story.protagonist,))
        marks.append(guess == asked.answer)
    right, n = sum(marks) // 2, len(marks) // 2  # twins give the same mark
    assert binomtest(right, n, 0.5).pvalue > 1e-3


def scores(stories, rule):
    """Scores of somebody who answers by a rule."""
    rows = []
    for story in stories:
        for index, q in enumerate(story.questions):
            about = (
                story.id,
                story.group,
                story.scenario,
                story.condition,
                story.protagonist,
                "train",
                "seen",
            )
            correct = rule(story, q) == q.answer
            rows.append((*about, index, q.category, q.kind, q.order, q.agents[:1], q.answer, 2, correct))
    columns = (
        "story_id group scenario condition protagonist split wording question category kind order agents"
    )
    return StoryScores(pd.DataFrame(rows, columns=[*columns.split(), "answer", "n_options", "correct"]))


def test_both_pictures_of_a_story_cannot_be_right_by_a_rule():
    stories = generate_photographs(200, seed=1)
    differ = [s for s in stories if len({q.answer for q in s.questions if q.kind == "photograph"}) == 2]
    assert 40 < len(differ) < 160
    for rule in (lambda s, q: s.questions[0].answer, lambda s, q: s.questions[1].answer):
        paired = scores(stories, rule).paired(kind="photograph").set_index("subset")
        assert paired.n["false_belief_stories"] == len(differ)
        assert paired.accuracy["false_belief_stories"] == 0
        assert np.isclose(paired.chance["false_belief_stories"], 0.25)
    right = scores(stories, lambda s, q: q.answer).paired(kind="photograph")
    assert (right.accuracy == 1).all()
    assert scores(stories, lambda s, q: q.answer).paired().empty


def test_they_can_be_sampled_by_category():
    model = tt.load_model(tiny.long_directory(), device="cpu")
    stories = generate_photographs(12, seed=1)
    for category in ("false_photograph", "true_photograph"):
        asked = [q for story in stories for q in story.questions if q.category == category]
        samples = tt.story_samples(model, stories, categories=[category])
        texts = [model.tokenizer.decode(row[mask]) for row, mask in zip(samples.tokens, samples.supervised)]
        assert [text.strip() for text in texts] == [q.answer for q in asked]


def test_twins_and_seeds():
    stories = generate_photographs(20, seed=5, split="dev")
    assert stories == generate_photographs(30, seed=5, split="dev")[:20]
    assert stories != generate_photographs(20, seed=6, split="dev")
    for one, other in zip(stories[::2], stories[1::2]):
        assert one.group == other.group == one.id
        first, second = sorted(one.questions[0].options)
        swapped = {first: second, second: first}
        for q, twin in zip(one.questions, other.questions):
            assert twin.answer == swapped[q.answer]
    new = generate_photographs(4, seed=5, wording="new", conditions=["no_transfer"], forms=["question"])
    assert {story.condition for story in new} == {"no_transfer"}
    assert {question.form for story in new for question in story.questions} == {"question"}


@pytest.mark.parametrize(
    "arguments",
    [{"n": 0}, {"split": "all"}, {"conditions": ["false_belief"]}, {"conditions": []}, {"forms": ["x"]}],
)
def test_what_cannot_be_told_is_refused(arguments):
    with pytest.raises(TomsparseError):
        generate_photographs(**{"n": 2, **arguments})
