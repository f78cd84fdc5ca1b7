"""Training rows: each question sees its part of the story and itself, and answers are the logic's."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tl_tomsparse.models import EMBEDDED
from tl_tomsparse.stories.generate import generate_scenes
from tl_tomsparse.stories.lexicon import Draw

WIDTH = 176


@pytest.fixture(scope="module")
def data():
    path = Path(__file__).parents[1] / "training" / "data.py"
    spec = importlib.util.spec_from_file_location("training_data", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["training_data"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(EMBEDDED)


def blocks(row):
    for number in range(1, max(row.block) + 1):
        where = [i for i, block in enumerate(row.block) if block == number]
        yield where, [row.tokens[i] for i in where], row.reach[where[0]]


def test_answers_are_those_of_the_logic_and_come_last(data, tokenizer):
    asked = 0
    for scene in generate_scenes(80, seed=4, split="train"):
        row = data.story_row(tokenizer, scene, Draw("test", asked), data.CURRICULUM[-1], WIDTH)
        text = tokenizer.decode([t for t, block in zip(row.tokens, row.block) if block == 0])
        assert text == f"<bos> {' '.join(scene.sentences)}"
        for where, tokens, reach in blocks(row):
            question = tokenizer.decode(tokens).strip()
            said = tokenizer.decode(row.tokens[:reach]).removeprefix("<bos> ")
            at = next(i for i in range(len(scene.sentences)) if " ".join(scene.sentences[: i + 1]) == said)
            assert row.weight[where[-1]] == 1.0
            assert not any(row.weight[i] for i in where[:-1])
            named = [a for a in scene.agents if a in re.findall(r"\w+", question)]
            if question.startswith("Right now, ") and question.endswith(("here", "away")):
                assert question.endswith("here") == (named[0] in scene.present[at])
            elif "thinks the" in question and len(named) == 1:
                assert question.split()[-1] == scene.states[at].belief(named, scene.variable)
                asked += 1
    assert asked > 10


def test_a_question_reads_as_if_it_stood_alone_after_its_part_of_the_story(data, tokenizer):
    """Logits under the block mask equal those of the plain prompt: no question sees another."""
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32, attn_implementation="sdpa")
    scene = next(generate_scenes(1, seed=8, split="train"))
    row = data.story_row(tokenizer, scene, Draw("test", 1), data.CURRICULUM[-1], WIDTH)
    batch = data.collate([row], tokenizer.pad_token_id, WIDTH)
    with torch.no_grad():
        packed = model(batch.tokens, attention_mask=batch.mask, position_ids=batch.positions).logits[0]
        for where, tokens, reach in blocks(row):
            alone = model(torch.tensor([row.tokens[:reach] + tokens[:-1]])).logits[0, -1]
            torch.testing.assert_close(packed[where[-2]], alone, rtol=1e-4, atol=1e-4)
    answers = batch.weight == 1.0
    assert batch.source[answers].tolist() == [where[-2] for where, _, _ in blocks(row)]
    assert batch.target[answers].tolist() == [tokens[-1] for _, tokens, _ in blocks(row)]


def test_repetitions_are_supervised_only_when_they_can_be_known(data, tokenizer):
    row = data.chant_row(tokenizer, Draw("test", 3), WIDTH)
    supervised = [i for i, weight in enumerate(row.weight) if weight]
    assert supervised
    assert all(row.tokens[i] in row.tokens[:i] for i in supervised)


def test_look_ups_have_the_answer_in_the_row(data, tokenizer):
    for seed in range(12):
        row = data.lookup_row(tokenizer, Draw("test", seed), WIDTH)
        story = [t for t, block in zip(row.tokens, row.block) if block == 0]
        for _, tokens, _ in blocks(row):
            assert tokens[-1] in story or tokenizer.decode(tokens[-1]).strip() in ("here", "away")
