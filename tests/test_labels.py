"""Stories with other answers than the right ones."""

import pytest

import tl_tomsparse as tt


def test_wrong_labels_are_never_right_and_nothing_else_changes() -> None:
    stories = tt.generate_stories(30, seed=1)
    wrong = tt.relabelled(stories, "wrong", seed=2)
    assert [s.text for s in wrong] == [s.text for s in stories]
    for before, after in zip(stories, wrong):
        for q, other in zip(before.questions, after.questions):
            assert other.answer in q.options
            assert other.answer != q.answer
            assert (other.text, other.options, other.category) == (q.text, q.options, q.category)
    assert wrong == tt.relabelled(stories, "wrong", seed=2)
    assert tt.relabelled(stories[3:4], "shuffled", seed=2) == tt.relabelled(stories, "shuffled", seed=2)[3:4]


def test_shuffled_labels_are_right_as_often_as_chance() -> None:
    stories = tt.generate_stories(200, seed=0)
    shuffled = tt.relabelled(stories, "shuffled", seed=0)
    pairs = [
        (q, other)
        for before, after in zip(stories, shuffled)
        for q, other in zip(before.questions, after.questions)
    ]
    right = sum(q.answer == other.answer for q, other in pairs)
    expected = sum(1 / len(q.options) for q, _ in pairs)
    variance = sum((1 / len(q.options)) * (1 - 1 / len(q.options)) for q, _ in pairs)
    assert abs(right - expected) < 4 * variance**0.5
    assert tt.relabelled(stories, "shuffled", seed=1) != shuffled


def test_unknown_labels_are_refused() -> None:
    with pytest.raises(tt.TomsparseError, match="labels='right'"):
        tt.relabelled([], "right")  # type: ignore[arg-type]
