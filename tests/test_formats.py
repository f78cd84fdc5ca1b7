"""Stories to files and back."""

from __future__ import annotations

import dataclasses
import json

import pytest
from datasets import Dataset

from tl_tomsparse._checks import TomsparseError
from tl_tomsparse.stories import from_dataset, generate_stories, read_jsonl, to_dataset, write_jsonl


def test_jsonl_and_dataset_give_the_same_stories_back(tmp_path):
    stories = generate_stories(12, seed=1)
    path = tmp_path / "stories.jsonl"
    write_jsonl(path, stories)
    assert read_jsonl(path) == stories
    assert from_dataset(to_dataset(stories)) == stories


def test_stories_without_a_group_stand_alone(tmp_path):
    stories = generate_stories(4, seed=1)
    path = tmp_path / "stories.jsonl"
    write_jsonl(path, stories)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for record in records:
        del record["group"]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    expected = [dataclasses.replace(story, group="") for story in stories]
    assert read_jsonl(path) == expected
    assert from_dataset(to_dataset(stories).remove_columns("group")) == expected


def test_a_bad_line_is_named(tmp_path):
    path = tmp_path / "stories.jsonl"
    write_jsonl(path, generate_stories(2, seed=1))
    good = path.read_text().splitlines()
    path.write_text(good[0] + "\n{oops\n")
    with pytest.raises(TomsparseError, match="line 2: not JSON"):
        read_jsonl(path)
    record = json.loads(good[1])
    del record["questions"][0]["options"]
    path.write_text(good[0] + "\n" + json.dumps(record) + "\n")
    with pytest.raises(TomsparseError, match=r"line 2.*options"):
        read_jsonl(path)
    record = json.loads(good[1])
    record["questions"][0]["answer"] = "moon"
    path.write_text(json.dumps(record) + "\n")
    with pytest.raises(TomsparseError, match="'moon'"):
        read_jsonl(path)


def own(**changes):
    """A record with nothing but what is asked for."""
    question = {
        "kind": "belief",
        "agents": ["Ann"],
        "text": "Ann thinks the key is in the",
        "answer": "tin",
        "options": ["box", "tin"],
        "true_belief": False,
    }
    return {"text": "Ann puts the key in the tin. Bo moves it to the box.", "questions": [question | changes]}


def test_your_own_stories_need_text_and_questions_only(tmp_path):
    path = tmp_path / "own.jsonl"
    reality = {"kind": "reality", "text": "The key is in the", "answer": "box", "options": ["box", "tin"]}
    whole = own() | {"questions": [*own()["questions"], reality]}
    path.write_text("\n" + json.dumps(whole) + "\n" + json.dumps(own(true_belief=True)) + "\n")
    first, second = read_jsonl(path)
    assert (first.id, second.id) == ("line 2", "line 3")
    assert [question.category for question in first.questions] == ["false_belief", "reality"]
    assert [question.category for question in second.questions] == ["true_belief"]
    assert first.questions[0].options == ("box", "tin")
    assert first.questions[0].form == "completion"
    # In a table the fields that only some questions have are None in the others.
    in_rows = from_dataset(Dataset.from_list([whole, own(true_belief=True)]))
    assert [dataclasses.replace(story, id="") for story in in_rows] == [
        dataclasses.replace(story, id="") for story in (first, second)
    ]
    assert [story.id for story in in_rows] == ["row 0", "row 1"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"agents": []}, "no agents"),
        ({"true_belief": None}, "no true_belief"),
        ({"kind": "believes"}, "'believes' is not one of"),
        ({"form": "essay"}, "'essay' is not one of"),
        ({"kind": "photograph", "true_belief": None}, "no true_belief"),
        ({"colour": "red"}, "colour"),
        ({"options": "tin"}, "options='tin' must be texts in a list"),
        ({"text": 3}, "text=3 must be a text"),
        ({"true_belief": "no"}, "true_belief='no' must be true or false"),
    ],
)
def test_a_question_that_cannot_be_filed_is_refused(tmp_path, changes, message):
    path = tmp_path / "own.jsonl"
    path.write_text(json.dumps(own(**changes)) + "\n")
    with pytest.raises(TomsparseError, match=rf"own.jsonl, line 1: .*{message}"):
        read_jsonl(path)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([1, 2], "does not have the fields"),
        ({"text": "Once."}, "questions"),
        ({"text": "Once.", "questions": []}, "must be a list of at least one question"),
        ({"text": None, "questions": own()["questions"]}, "text"),
        (own() | {"agents": "Ann"}, "agents='Ann' must be texts in a list"),
    ],
)
def test_a_record_that_is_no_story_is_refused(tmp_path, record, message):
    path = tmp_path / "own.jsonl"
    path.write_text(json.dumps(record) + "\n")
    with pytest.raises(TomsparseError, match=rf"own.jsonl, line 1: story 'line 1'.*{message}"):
        read_jsonl(path)
