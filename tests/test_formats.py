"""Stories to files and back."""

from __future__ import annotations

import dataclasses
import json

import pytest

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
    del record["questions"][0]["form"]
    path.write_text(good[0] + "\n" + json.dumps(record) + "\n")
    with pytest.raises(TomsparseError, match=r"line 2.*form"):
        read_jsonl(path)
    record = json.loads(good[1])
    record["questions"][0]["answer"] = "moon"
    path.write_text(json.dumps(record) + "\n")
    with pytest.raises(TomsparseError, match="'moon'"):
        read_jsonl(path)
