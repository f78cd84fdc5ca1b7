"""The embedded model is what its card and the README say it is, and does what tests and demos need."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

import tl_tomsparse as tt
from tl_tomsparse._model import view
from tl_tomsparse.models import EMBEDDED

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def model():
    return tt.load_model()


@pytest.fixture(scope="module")
def card():
    spec = importlib.util.spec_from_file_location("card", ROOT / "training" / "card.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["card"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def numbers():
    return json.loads((EMBEDDED / "evaluation.json").read_text())


def test_numbers_are_of_these_weights_and_texts_are_of_these_numbers(model, card, numbers):
    assert numbers["fingerprint"] == view(model).identity().fingerprint
    assert numbers["run"]["fingerprint"] == numbers["fingerprint"]
    config = json.loads((EMBEDDED / "config.json").read_text())
    log = [json.loads(line) for line in card.LOG.read_text().splitlines()]
    assert (EMBEDDED / "README.md").read_text() == card.card(numbers, config, log)
    readme = (ROOT / "README.md").read_text()
    assert readme == card.with_block(readme, card.readme_block(numbers))


@pytest.mark.parametrize("name", ["learned", "alibi"])
def test_cards_of_the_twins_are_of_their_numbers(card, name):
    folder = ROOT / "training" / "twins" / name
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    config, found = (json.loads((folder / file).read_text()) for file in ("config.json", card.NUMBERS))
    assert (folder / "README.md").read_text() == card.card(found, config, log)
    assert view(tt.load_model(folder, device="cpu")).identity().fingerprint == found["fingerprint"]


def test_the_bars_of_accuracy_are_reached_and_a_missed_bar_is_said(card, numbers):
    lines = card.bars(numbers).splitlines()
    missed = [line for line in lines if "not reached" in line]
    assert all("milliseconds" in line for line in missed)
    worse = {**numbers, "second_order_paired": 0.7499}
    assert [line for line in card.bars(worse).splitlines() if line not in lines] == [
        "| second order and first order of one story all right | at least 0.75 | 0.750 | **not reached** |"
    ]


@pytest.mark.parametrize("wording", ["seen", "new"])
def test_accuracies_come_out_again_on_a_part_of_the_questions(model, numbers, wording):
    stories = tt.generate_stories(80, seed=0, split="test", wording=wording)
    scores = tt.score_stories(model, stories, show_progress=False).accuracy().set_index("category")
    for row in numbers[wording]:
        if row["category"] == "paired":
            continue
        here = scores.loc[row["category"]]
        # A part of the same questions: its wide interval must reach the whole's.
        assert here.low <= row["high"], row
        assert here.high >= row["low"], row


def test_small_and_offline(model):
    assert sum(path.stat().st_size for path in EMBEDDED.iterdir()) < 8e6
    assert view(model).dtype == torch.float32
    assert view(model).bos_token_id == 0


def test_every_answer_is_one_token(model):
    tokenizer = view(model).tokenizer
    for story in tt.generate_stories(200, seed=5, split="test"):
        for option in story.questions[0].options:
            assert len(tokenizer(f" {option}", add_special_tokens=False)["input_ids"]) == 1, option
    text = "Anna’s naïve café, 12 €"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]).strip() == text


def test_shortcuts_of_the_card_are_shortcuts(card):
    rules = card.shortcuts(tt.generate_stories(200, seed=0, split="test"))
    assert rules["always reality"]["reality"] == rules["always reality"]["true_belief"] == 1.0
    assert rules["always reality"]["false_belief"] == 0.0
    assert all(
        by["paired"] == 0.0 for by in rules.values()
    )  # one answer for all agents cannot be right for all
