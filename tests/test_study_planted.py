"""Whole studies of a model made by hand, so that the weights that each kind of question hangs on are known.

One layer of attention; four kinds of questions, and a head for each. The last token of a prompt says what is
asked; the head of that kind looks from it to the one of two words that says the answer (`WORDS`), by one
entry of W_Q and one of W_K for each word. Embeddings are one-hot. Two hundred other entries of each matrix
are as large, at tokens that nothing contains.
"""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import tl_tomsparse as tt
from tests import tiny
from tl_tomsparse.stories.story import Question, Story

N_HEADS, D_HEAD, SLOW = 12, 32, 15  # the pair that turns most slowly, so that distances do not matter
ANSWERS = ("basket", "box")
WORDS = {  # for each kind of question, in the order of heads: what is asked last, and what tells each answer
    "false_belief": ("thinks", ("sweets", "coins")),
    "true_belief": ("will", ("ball", "bag")),
    "reality": ("was", ("kitchen", "label")),
    "memory": ("first", ("back", "inside")),
}
SETTINGS = tt.StudySettings(
    windows=16, length=24, kappa=1e-5, random_masks=20, few_masks=3, tune_steps=2, head_stories=6,
    localisation_items=0, n_draws=2000,
)  # fmt: skip


@cache
def planted_directory() -> Path:
    tokenizer = tiny.build_tokenizer()
    d_model = 384
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=d_model, intermediate_size=4, num_hidden_layers=1,
        num_attention_heads=N_HEADS, num_key_value_heads=N_HEADS, head_dim=D_HEAD,
        rope_parameters={"rope_type": "default", "rope_theta": 1e9}, max_position_embeddings=512,
        tie_word_embeddings=False, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    hf = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(0)
    unused = torch.arange(140, 240)  # bytes that no text here contains
    large = (5 * D_HEAD**0.5) ** 0.5 / d_model**0.5  # a logit of 5: looks there with nine tenths
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            if "norm" not in name:
                parameter.zero_()
        hf.model.embed_tokens.weight.fill_diagonal_(1.0)
        hf.lm_head.weight.fill_diagonal_(1.0)
        attention = hf.model.layers[0].self_attn
        for weight in (attention.q_proj.weight, attention.k_proj.weight):
            weight.copy_(1e-3 * torch.randn(weight.shape, generator=generator))
            rows = torch.randint(len(weight), (2, len(unused)), generator=generator)
            weight[rows, unused] = large
        basket, box = (token(tokenizer, answer) for answer in ANSWERS)
        for head, (asked, words) in enumerate(WORDS.values()):
            slow = head * D_HEAD + SLOW
            attention.q_proj.weight[slow, token(tokenizer, asked)] = large
            for word, sign in zip(words, (1.0, -1.0)):
                attention.k_proj.weight[slow, token(tokenizer, word)] = large
                attention.v_proj.weight[slow, token(tokenizer, word)] = sign / d_model**0.5
            attention.o_proj.weight[basket, slow], attention.o_proj.weight[box, slow] = 0.1, -0.1
    path = tiny.folder() / "planted"
    hf.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def token(tokenizer, word: str) -> int:
    (found,) = tokenizer(f" {word}", add_special_tokens=False)["input_ids"]
    return int(found)


def stories(kinds: dict[str, str] | None = None) -> dict[str, list[Story]]:
    """For each split; `kinds` exchanges what is asked about under a name in the train split."""
    rng = np.random.default_rng(0)
    made: dict[str, list[Story]] = {"train": [], "dev": [], "test": []}
    for split, count in (("train", 40), ("dev", 6), ("test", 80)):
        asked = WORDS if kinds is None or split != "train" else {k: WORDS[kinds.get(k, k)] for k in WORDS}
        for n in range(count):
            false = int(rng.integers(2))
            right = {"thinks": false, "will": 1 - false, "was": 1 - false, "first": int(rng.integers(2))}
            told = [words[right[last]] for last, words in WORDS.values()]
            text = f"{split} {n}: has {' '.join(rng.permutation(told))} ."
            questions = []
            for category, (last, _) in asked.items():
                agents, true = {"false_belief": (("Sally",), False), "true_belief": (("Anna",), True)}.get(
                    category, ((), None)
                )
                kind = "belief" if agents else category
                answer = ANSWERS[right[last]]
                questions.append(
                    Question(kind, agents, f"Here, who {last}", "completion", answer, ANSWERS, true)
                )
            made[split].append(
                Story(
                    id=f"{split}-{n}",
                    scenario="planted",
                    condition="false_belief",
                    protagonist="Sally",
                    split=split,
                    wording="seen",
                    text=text,
                    agents=("Sally", "Anna"),
                    questions=tuple(questions),
                    group=f"{split}-{n}",
                )
            )
    return made


@cache
def model():
    return tt.load_model(planted_directory(), device="cpu")


def statuses(study: tt.Study) -> dict[str, str]:
    return {claim.claim: claim.status for claim in study.claims}


def planted_entries(kind: str) -> dict[str, set[tuple[int, int, int]]]:
    """(head, row, column) of the entries that answers of this kind hang on, by matrix."""
    asked, words = WORDS[kind]
    head, tokenizer = list(WORDS).index(kind), model().tokenizer
    return {
        "Q": {(head, token(tokenizer, asked), SLOW)},
        "K": {(head, token(tokenizer, word), SLOW) for word in words},
    }


def entries(mask: tt.SparseMask) -> dict[str, set[tuple[int, int, int]]]:
    frame = mask.to_frame()
    assert set(frame.layer) <= {0}
    return {
        matrix: set(zip(part["head"], part["row"], part["col"])) for matrix, part in frame.groupby("matrix")
    }


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tt.Study:
    out = tmp_path_factory.mktemp("planted") / "study"
    return tt.study(model(), out, SETTINGS, stories=stories(), show_progress=False)


def test_the_planted_weights_are_found_and_every_claim_about_them_is_right(found: tt.Study) -> None:
    assert len(found.masks["mask"]) == 2  # one of W_Q and one of W_K, of 147,456 each
    for name, kind in (("mask", "false_belief"), *((kind, kind) for kind in list(WORDS)[1:])):
        for matrix, places in entries(found.masks[name]).items():
            assert places <= planted_entries(kind)[matrix], (name, matrix)
    status = statuses(found)
    true = ["tracks_beliefs", "false_belief_falls", "true_belief_stays", "reality_stays", "perplexity_stays"]
    # The same weights in any other place do nothing, nor do those that other questions hang on.
    true += [f"more_than_random{kind}" for kind in ("", "_total", "_row", "_column", "_pair")]
    others = (
        "general_only",
        "lowest",
        "true_belief",
        "reality",
        "memory",
        "key_value",
        "counting",
        "last_token",
    )
    true += [f"more_than_{name}" for name in others]
    true += ["selective", "stable"]
    assert {name: status[name] for name in true} == dict.fromkeys(true, "supported")
    # Wrong and shuffled answers have gradients at the same place, so this model cannot tell them apart.
    for name in ("wrong_labels", "shuffled_labels"):
        assert entries(found.masks[name])["Q"] == planted_entries("false_belief")["Q"]
        assert status[f"more_than_{name}"] == "not supported"
    (fall,) = (claim for claim in found.claims if claim.claim == "false_belief_falls")
    assert fall.value == pytest.approx(-0.5, abs=0.15)  # what is left is chance


def test_the_planted_heads_are_found(found: tt.Study) -> None:
    claims = {claim.claim: claim for claim in found.heads.claims}
    assert claims["heads_found"].status == claims["additive"].status == "supported"
    assert "hangs on L0H0, L0H1:" in claims["heads_found"].sentence
    assert claims["works_in_heads"].status == "supported"
    assert "100.0 % of its 2" in claims["mask_in_heads"].sentence


def test_the_mask_of_another_task_passed_off_as_that_of_the_task_supports_nothing(tmp_path: Path) -> None:
    """Train stories whose "false-belief" questions are put as those about true beliefs are."""
    exchanged = {"false_belief": "true_belief", "true_belief": "false_belief"}
    settings = dataclasses.replace(SETTINGS, head_stories=0)
    study = tt.study(model(), tmp_path / "x", settings, stories=stories(exchanged), show_progress=False)
    assert entries(study.masks["mask"])["Q"] == planted_entries("true_belief")["Q"]
    status = statuses(study)
    assert status["tracks_beliefs"] == "supported"
    for name in ("false_belief_falls", "selective", "true_belief_stays"):
        assert status[name] == "not supported", name
    assert not [name for name in status if name.startswith("more_than") and status[name] == "supported"]
    sentences = {claim.claim: claim.sentence for claim in study.claims}
    assert "True-belief accuracy falls" in sentences["true_belief_stays"]
