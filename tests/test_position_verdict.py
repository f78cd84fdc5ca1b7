"""Claims about position where the truth is planted: in masks and edits of tiny models, and in the numbers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import families
import pandas as pd
import pytest
import tiny
import torch
from test_edit import a_mask
from test_rotary import some_samples

import tl_tomsparse as tt
from tl_tomsparse._model import view
from tl_tomsparse.models import load_model
from tl_tomsparse.pipeline import RunSettings, run_pipeline

CLAIMS = [
    "mask_at_dominant_frequencies",
    "mask_at_slow_frequencies",
    "mask_of_low_rank",
    "query_norms_change",
    "key_norms_change",
    "queries_turn",
    "sinks_move",
]
SAMPLES = some_samples((13, 9, 11, 12, 10, 13, 9, 14, 11, 12, 10, 13))


def measured(model: Any, edit: tt.SparseEdit, **options: Any) -> tt.PositionEffects:
    given = {"n_random": 19, "n_draws": 300, "eps": 0.2, "show_progress": False} | options
    return tt.position_effects(model, SAMPLES, {"mask": edit}, **given)


def claims(found: tt.PositionEffects) -> dict[str, tt.Claim]:
    listed = tt.position_verdict(found)
    assert [claim.claim for claim in listed] == CLAIMS
    assert all(claim.sentence.endswith(".") and not re.search(r"\bnan\b", claim.sentence) for claim in listed)
    assert all((claim.p is None) == (claim.status == "not testable") for claim in listed)
    return {claim.claim: claim for claim in listed}


def statuses(found: tt.PositionEffects) -> dict[str, str]:
    return {name: claim.status for name, claim in claims(found).items()}


@pytest.mark.parametrize("backend", tiny.BACKENDS)
def test_masks_planted_at_slow_and_at_dominant_frequencies_are_found_there(backend: Any) -> None:
    model = tiny.model("llama", backend)
    whole = a_mask(model, share=0.2).restrict(matrices=("Q", "K"))
    norms = tt.frequency_norms(model, SAMPLES, show_progress=False)
    for name, frequencies in (("slow", "slow"), ("dominant", norms.dominant())):
        mask = tt.at_frequencies(model, whole, frequencies)
        found = claims(measured(model, tt.SparseEdit.mean(model, mask)))[f"mask_at_{name}_frequencies"]
        assert found.status == "supported"
        assert "more often than in random masks: 100.0 % of them" in found.sentence
        rest = claims(measured(model, tt.SparseEdit.mean(model, whole - mask)))
        found = rest[f"mask_at_{name}_frequencies"]
        assert found.status == "not supported"
        assert "less often" in found.sentence


def test_a_mask_in_the_form_of_a_cross_has_a_low_rank() -> None:
    """Few full rows and columns; random masks with as many entries in each row, or column, have more."""
    model = tiny.model("llama")
    chosen = {}
    for key in view(model).keys(("Q", "K")):
        cross = torch.zeros(view(model).shape(key), dtype=torch.bool)
        cross[:, 3], cross[0, :, 2] = True, True
        chosen[key] = cross
    mask = tt.SparseMask.from_bool(model, chosen)
    found = claims(measured(model, tt.SparseEdit.zero(model, mask)))["mask_of_low_rank"]
    assert found.status == "supported"
    assert "W_Q 2.0" in found.sentence


def test_an_edit_that_changes_nothing_supports_nothing() -> None:
    model = tiny.model("llama", dtype=torch.float64)
    same = tt.SparseEdit.scale(model, a_mask(model).random_like(5), 1.0)
    found = claims(measured(model, same))
    assert {claim.status for claim in found.values()} == {"not supported"}
    assert "by 0.0 %, under random edits 0.0 %" in found["query_norms_change"].sentence
    assert "are not shown to turn" in found["queries_turn"].sentence


def test_random_masks_passed_as_the_mask_support_nothing() -> None:
    model = tiny.model("llama")
    mask = a_mask(model, share=0.05).restrict(matrices=("Q", "K"))
    wrong = 0
    for seed in range(100, 104):
        edit = tt.SparseEdit.mean(model, mask.random_like(seed))
        wrong += "supported" in statuses(measured(model, edit)).values()
    assert wrong <= 1


def test_without_rotation_claims_about_it_are_not_testable_and_sinks_are() -> None:
    model = load_model(families.directory("GPT-2"), device="cpu")
    edit = tt.SparseEdit.zero(model, a_mask(model, share=0.05))
    found = claims(measured(model, edit, eps=0.05))
    for name in CLAIMS:
        about_rotation = name not in ("mask_of_low_rank", "sinks_move")
        assert (found[name].status == "not testable") == about_rotation, name
        if about_rotation:
            assert "No layer of this model rotates queries and keys" in found[name].sentence
    blind = claims(measured(model, edit, eps=0.99))["sinks_move"]
    assert "No head attends to the first token (no BOS) by more than 0.99" in blind.sentence


def test_the_page_of_a_model_without_rotation_says_what_cannot_be_tested(tmp_path: Path) -> None:
    settings = RunSettings(
        model=str(families.directory("Bloom")), stories=2, dev_stories=2, test_stories=6, windows=20,
        length=16, kappas=(0.01,), random_masks=3, device="cpu",
    )  # fmt: skip
    result = run_pipeline(settings, tmp_path / "run", show_progress=False)
    by_name = {claim.claim: claim for claim in result.position_claims}
    assert by_name["queries_turn"].sentence.startswith("No layer of this model rotates queries and keys")
    assert not (tmp_path / "run" / "position_frequencies.parquet").exists()
    assert len(pd.read_parquet(tmp_path / "run" / "position_sinks.parquet")) == 3  # two layers and all
    page = (tmp_path / "run" / "report.html").read_text()
    assert "No layer of this model rotates queries and keys" in page
    assert "Which frequencies carry the norm" not in page
    assert "Attention to BOS" in page


def test_what_cannot_be_tested_says_why() -> None:
    model = tiny.model("llama")
    edit = tt.SparseEdit.mean(model, a_mask(model))
    few = claims(measured(model, edit, n_random=5))
    for name in CLAIMS[2:]:
        assert few[name].sentence.startswith("5 random edits are too few"), name
    assert few["mask_at_slow_frequencies"].status != "not testable"
    blind = claims(measured(model, edit, eps=0.99))
    for name in ("queries_turn", "sinks_move"):
        assert "No head attends to the first token (no BOS) by more than 0.99" in blind[name].sentence
    short = tt.position_effects(
        model, SAMPLES[:9], {"mask": edit}, n_random=19, n_draws=50, eps=0.2, show_progress=False
    )
    assert "9 samples are too few" in claims(short)["sinks_move"].sentence
    nothing = tt.SparseEdit.mean(model, a_mask(model) - a_mask(model))
    assert set(statuses(measured(model, nothing)).values()) == {"not testable"}
    only_out = tt.SparseEdit.mean(model, a_mask(model).restrict(matrices=("out",)))
    elsewhere = claims(measured(model, only_out))
    assert "Nothing of the mask is in Q or K" in elsewhere["mask_at_slow_frequencies"].sentence
    assert "Nothing of the mask is in Q or K" in elsewhere["mask_of_low_rank"].sentence
    with pytest.raises(tt.TomsparseError, match="edit='other' is not one of 'mask'"):
        tt.position_verdict(short, edit="other")


def planted(**changes: dict[str, float]) -> tt.PositionEffects:
    """Numbers in which every claim holds, but for what is changed in a measure."""
    beyond = {"beyond": 0.3, "beyond_low": 0.2, "beyond_high": 0.4, "p_above": 1e-3, "p_below": 1.0}
    level = {"value": 0.5, "low": 0.4, "high": 0.6, "random": 0.2, "random_low": 0.1, "random_high": 0.3}
    up = level | beyond | {"as_high": 0, "as_low": 20}
    down = {name: -value for name, value in level.items()} | beyond
    down |= {"low": -0.6, "high": -0.4, "p_above": 1.0, "p_below": 1e-3, "as_high": 20, "as_low": 0}
    measures = {"sinks_shifted": up, "turn": down, "turn_others": down, "norm_q": up, "norm_k": up}
    summary = [
        {"edit": "mask", "measure": name} | row | changes.get(name, {}) for name, row in measures.items()
    ]
    share = {
        "entries": 30,
        "share": 0.6,
        "random_mean": 0.5,
        "random_low": 0.45,
        "random_high": 0.55,
        "p": 2e-3,
    }
    shares = [
        {"edit": "mask", "frequencies": which, "match": match} | share | changes.get(f"{which}_{match}", {})
        for which in ("dominant", "slow")
        for match in ("matrix", "row")
    ]
    rank: dict[str, float] = {"entries": 30, "rank": 5.0}
    for kind in ("matrix", "row", "column"):
        rank |= {f"random_{kind}": 9.0, f"random_{kind}_low": 8.0, f"random_{kind}_high": 10.0}
        rank |= {f"as_low_{kind}": 0, f"p_{kind}": 1e-3}
    ranks = [{"edit": "mask", "layer": -1, "matrix": m} | rank | changes.get(f"rank_{m}", {}) for m in "QK"]
    meta = {
        "position": 0,
        "bos": True,
        "eps": 0.3,
        "threshold": 0.01,
        "no_rotation": None,
        "dominant_slow": 0.7,
    }
    meta |= {"n_samples": 40, "n_random": 20}
    nothing: Any = None
    names = ("heads", "frequencies", "cosines", "sinks", "degrees", "by_frequency")
    frames = {name: pd.DataFrame() for name in names}
    return tt.PositionEffects(
        nothing, {}, pd.DataFrame(summary), shares=pd.DataFrame(shares), ranks=pd.DataFrame(ranks), **frames,
        sink_heads=((0, 0),), n_weights={"mask": 30}, meta=meta,
    )  # fmt: skip


def test_numbers_in_which_all_holds_support_all() -> None:
    found = claims(planted())
    assert "(of which 70.0 % are slow)" in found["mask_at_dominant_frequencies"].sentence
    assert {claim.status for claim in found.values()} == {"supported"}
    assert all(claim.p is not None and claim.p <= 0.05 for claim in found.values())
    assert (
        "towards orthogonal to the key of BOS, more than under random edits" in found["queries_turn"].sentence
    )


@pytest.mark.parametrize(
    ("claim", "change"),
    [
        ("mask_at_dominant_frequencies", {"dominant_row": {"p": 0.2}}),
        ("mask_at_slow_frequencies", {"slow_matrix": {"p": 0.2}}),
        ("mask_at_slow_frequencies", {"slow_matrix": {"share": 0.4}, "slow_row": {"share": 0.4}}),
        ("mask_of_low_rank", {"rank_K": {"p_column": 0.3}}),
        ("mask_of_low_rank", {"rank_Q": {"as_low_row": 1}}),
        ("query_norms_change", {"norm_q": {"p_above": 0.3}}),
        ("query_norms_change", {"norm_q": {"as_high": 1}}),
        ("key_norms_change", {"norm_k": {"as_high": 2}}),
        ("queries_turn", {"turn": {"high": 0.1}}),
        ("queries_turn", {"turn": {"p_below": 0.4}}),
        ("queries_turn", {"turn": {"as_low": 1}}),
        ("sinks_move", {"sinks_shifted": {"p_above": 0.06}}),
        ("sinks_move", {"sinks_shifted": {"as_high": 1}}),
    ],
)
def test_each_condition_is_needed_by_its_claim_alone(claim: str, change: dict[str, dict[str, float]]) -> None:
    found = statuses(planted(**change))
    assert found.pop(claim) == "not supported"
    assert set(found.values()) == {"supported"}


def test_p_values_are_adjusted_for_all_claims_that_are_tested() -> None:
    change = {name: {"p_above": 0.02} for name in ("norm_q", "norm_k", "sinks_shifted")}
    found = claims(planted(**change))
    assert found["query_norms_change"].p == pytest.approx(0.06)  # the three largest of seven
    assert found["query_norms_change"].status == found["sinks_move"].status == "not supported"


def test_turns_the_other_way_are_said() -> None:
    away = claims(planted(turn={"value": 0.5, "low": 0.4, "high": 0.6}))["queries_turn"]
    assert "turn away from orthogonal" in away.sentence
    not_more = claims(planted(turn={"as_low": 3}))["queries_turn"]
    assert "but not shown is more than under random edits" in not_more.sentence
