"""Generated stories: computed answers, matched controls, no shortcut, disjoint splits, deterministic."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter, defaultdict

import pytest
from scipy.stats import binomtest

from tl_tomsparse._checks import TomsparseError
from tl_tomsparse.stories import generate_stories
from tl_tomsparse.stories.formats import to_record
from tl_tomsparse.stories.generate import generate_scenes
from tl_tomsparse.stories.lexicon import CONTENTS, NAMES, PLACES, THINGS
from tl_tomsparse.stories.scenarios import CONDITIONS


@pytest.fixture(scope="module")
def stories():
    return generate_stories(2400, seed=3, split="test")


def mentions(story, options):
    return [word for word in re.findall(r"\w+", story.text.lower()) if word in options]


HEURISTICS = {
    "first-mentioned": lambda story, q, real: mentions(story, q.options)[0],
    "last-mentioned": lambda story, q, real: mentions(story, q.options)[-1],
    "most-mentioned": lambda story, q, real: Counter(mentions(story, q.options)).most_common(1)[0][0],
    "always reality": lambda story, q, real: real,
    "always the other one": lambda story, q, real: next(o for o in q.options if o != real),
    "first option": lambda story, q, real: q.options[0],
}


def reality(story):
    return next(q.answer for q in story.questions if q.kind == "reality")


@pytest.mark.parametrize("name", HEURISTICS)
@pytest.mark.parametrize("wording", ["seen", "new"])
def test_a_shortcut_is_no_better_than_chance_over_the_balanced_conditions(name, wording):
    """The balanced set: the protagonists' beliefs, false in half of the stories and true in the matched
    controls.
    """
    rule = HEURISTICS[name]
    marks = [
        rule(story, q, reality(story)) == q.answer
        for story in generate_stories(2400, seed=3, split="test", wording=wording)
        for q in story.questions
        if q.agents == (story.protagonist,)
    ]
    # Twins give the same mark, so half as many draws are independent.
    right, n = sum(marks) // 2, len(marks) // 2
    assert binomtest(right, n, 0.5).pvalue > 1e-3, f"{name}: {right / n:.3f} of {n}"


@pytest.mark.parametrize("name", ["first-mentioned", "last-mentioned", "most-mentioned", "first option"])
@pytest.mark.parametrize("category", ["false_belief", "true_belief", "reality", "second_order", "memory"])
def test_where_a_word_stands_says_nothing_in_any_category(stories, name, category):
    rule = HEURISTICS[name]
    by_story = defaultdict(list)
    for story in stories:
        for q in story.questions:
            if q.category == category:
                by_story[story.id].append(rule(story, q, reality(story)) == q.answer)
    first = [marks[0] for i, marks in enumerate(by_story.values()) if i % 2 == 0]
    assert binomtest(sum(first), len(first), 0.5).pvalue > 1e-3, f"{sum(first) / len(first):.3f}"


def test_one_story_holds_true_and_false_beliefs_side_by_side(stories):
    told = [s for s in stories if s.condition == "false_belief"]
    both = [s for s in told if {"true_belief", "false_belief"} <= {q.category for q in s.questions}]
    assert len(both) == len(told)  # the one who moves or fills always knows


def test_conditions_are_balanced_and_matched(stories):
    counts = Counter((s.scenario, s.condition) for s in stories)
    for scenario, conditions in CONDITIONS.items():
        assert counts[scenario, "false_belief"] == 600
        assert {counts[scenario, c] for c in conditions[1:]} == {200}
    for story in stories:
        own = next(q for q in story.questions if q.agents == (story.protagonist,))
        assert own.true_belief == (story.condition != "false_belief")
        assert all(set(q.options) == set(story.questions[0].options) for q in story.questions)
        assert all(q.answer in q.options and len(q.options) == 2 for q in story.questions)


def test_twins_differ_only_in_the_roles_of_the_two_objects(stories):
    for one, other in zip(stories[::2], stories[1::2]):
        a, b = sorted(one.questions[0].options)
        other_word = {a: b, b: a}
        swapped = re.sub(rf"\b({a}|{b})\b", lambda m, to=other_word: to[m[0].lower()], one.text, flags=re.I)
        # The article and the capital follow the word.
        plain = re.compile(r"\b(an?)\b", re.I)
        assert plain.sub("a", swapped).lower() == plain.sub("a", other.text).lower()
        assert [q.answer for q in one.questions] == [other_word[q.answer] for q in other.questions]
        assert one.group == other.group == one.id
    assert len({story.group for story in stories}) == len(stories[::2])


def test_every_question_asks_about_the_state_that_the_sentences_tell():
    """The text alone, read by a few regular expressions, gives the same first-order answers (transfer, seen
    wording, one round).
    """
    checked = 0
    for scene in generate_scenes(1200, seed=11, split="train", scenarios=("transfer",)):
        if scene.wording != "seen":
            continue
        place = scene.state.valuations[scene.state.actual]["place"]
        text = scene.sentences
        started = next(i for i, s in enumerate(scene.states) if s is not None)
        moved = place != scene.first
        for agent in scene.agents:
            leaves = re.compile(
                rf"^(?:Then, |Now, |After that, |A little later, |Soon, )?{agent} "
                r"(leaves|exits|goes|walks|runs|has to|says goodbye|waves)"
            )
            away = any(leaves.search(s) and " to the " not in s for s in text[started + 1 :])
            learns = any(
                re.search(rf"\b{agent}\b", s)
                and re.search(
                    r"\b(tells|informs|calls|writes|meets|whispers|sends|hears|(sees|watches) \w+ (put|hi))",
                    s,
                )
                and not re.search(
                    rf"^(?:Then, |Later, )?{agent} (tells|informs|calls|writes|meets|whispers|sends)", s
                )
                for s in text[started + 1 :]
            )
            if moved:
                expected = scene.first if away and not learns else place
                assert scene.state.belief((agent,), "place") == expected, (agent, text)
                checked += 1
    assert checked > 2000


@pytest.mark.parametrize("wording", ["seen", "new"])
def test_splits_share_no_pair_of_people_and_no_combination_of_things(wording):
    seen = {}
    for split in ("train", "dev", "test"):
        for scene in generate_scenes(600, seed=5, split=split, wording=wording):
            combination = (scene.slots.get("O") or scene.slots["K"], *sorted(scene.values))
            assert seen.setdefault(combination, split) == split
    people = {}
    for split in ("train", "dev", "test"):
        for story in generate_stories(600, seed=5, split=split, agents=(2, 2), wording=wording):
            assert people.setdefault(tuple(sorted(story.agents)), split) == split


def test_wordings_are_disjoint():
    from tl_tomsparse.stories.wording import POOLS

    for kind, templates in POOLS["seen"].items():
        assert kind in POOLS["new"]
        assert not set(templates) & set(POOLS["new"][kind])


def test_the_same_seed_gives_the_same_stories_on_every_platform(stories):
    again = generate_stories(60, seed=3, split="test")
    assert again == stories[:60]
    assert generate_stories(10, seed=4, split="test") != again[:10]
    digest = hashlib.sha256(json.dumps([to_record(s) for s in again], sort_keys=True).encode()).hexdigest()
    assert digest[:16] == "4b134276bf7b78ca"


def test_lists_have_no_duplicates_and_options_do_not_hide_in_other_words():
    for words in (NAMES, THINGS, PLACES, CONTENTS):
        assert len(set(words)) == len(words)
    assert not set(THINGS) & set(PLACES)


def test_options_can_be_asked_for():
    three = generate_stories(
        40, seed=1, scenarios=("transfer",), places=3, rounds=2, agents=(3, 5), forms=("question",)
    )
    assert all(len(q.options) == 3 and q.form == "question" for s in three for q in s.questions)
    assert {len(s.agents) for s in three} == {3, 4, 5}
    only = generate_stories(8, conditions=("informed",))
    assert {(s.scenario, s.condition) for s in only} == {("transfer", "informed"), ("contents", "informed")}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, "at least 1"),
        ({"n": 1, "split": "validation"}, "'validation'"),
        ({"n": 1, "wording": "odd"}, "'odd'"),
        ({"n": 1, "scenarios": ("tea party",)}, "'tea party'"),
        ({"n": 1, "scenarios": ()}, "no story"),
        ({"n": 1, "conditions": ("drunk",)}, "'drunk'"),
        ({"n": 1, "agents": (1, 2)}, "from 2 to 5"),
        ({"n": 1, "places": 7}, "from 2 to 3"),
        ({"n": 1, "rounds": 0}, "rounds=0"),
        ({"n": 1, "forms": ("song",)}, "'song'"),
    ],
)
def test_bad_values_are_refused_by_name(options, message):
    with pytest.raises(TomsparseError, match=message):
        generate_stories(**options)
