"""Studies with planted answers, whose verdicts are known; and one of a model that cannot do the task."""

from __future__ import annotations

import dataclasses
import html
import json
import shutil
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from math import comb
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

import tl_tomsparse as tt
from tests import tiny
from tests.test_effect import ABLE, Planted
from tl_tomsparse import _material, _study_measure, _study_processes, cli
from tl_tomsparse._folder import read_points
from tl_tomsparse._model import view
from tl_tomsparse._overlap import Overlap, overlap
from tl_tomsparse._study_arms import DOSES, most_arms, most_sensitive, random_part
from tl_tomsparse._study_claims import Evidence, claims_of
from tl_tomsparse._study_compare import Comparer
from tl_tomsparse._study_cost import duration
from tl_tomsparse._study_material import lowest, make_material
from tl_tomsparse.effect import assemble
from tl_tomsparse.loss_change import LossChange
from tl_tomsparse.study import CONTROLS
from tl_tomsparse.study_report import power, study_html

RANDOM = ("random_row", "random_pair")
LOW = {"false_belief": 0.4}
META = {"kappa": 1e-3, "seed": 0, "n_draws": 2000, "accuracy_margin": 0.05, "perplexity_margin": 0.05}


def evidence(
    rates: dict[str, dict[str, float]] | None = None,
    *,
    before: dict[str, float] | None = None,
    n_random: int = 20,
    overlaps: dict[str, Overlap] | None = None,
    loss: tuple[float, float] = (0.5, 0.45),
    spread: float = 0.1,
    copies: int = 1,
    n_stories: int = 200,
    left_out: dict[str, str] | None = None,
    true_belief: bool = True,
    n_few: int = 5,
) -> dict[str, Any]:
    """The claims where every family has the rates of the unedited model, but those that are given."""
    planted = Planted(n_stories=n_stories)
    half = planted.questions.story_id.str[1:].astype(int) % 2 == 1
    planted.questions.loc[half, "scenario"] = "contents"
    if not true_belief:
        planted.questions.loc[planted.questions.category == "true_belief", "category"] = "memory"
    given = {"mask": LOW, **(rates or {})}
    usual = before or {}
    families = dict.fromkeys(("before", "mask", *CONTROLS, "transfer", "contents", "tuned"), 1)
    families |= {"operator_amplify": 1, "rescue_0.5": 1, "new_wording": 1}
    families |= dict.fromkeys(("operator_amplify_random", "rescue_0.5_random", "tuned_random"), n_few)
    families |= {f"dose_{dose:g}": 1 for dose in DOSES}
    families |= {f"dose_{dose:g}_random": n_few for dose in DOSES}
    families |= dict.fromkeys(("random_matrix", *RANDOM), n_random)
    points = {
        name: [planted.point(usual | given.get(name, {}), noise=0.0 if name == "before" else 0.01)] * 1
        if n == 1
        else [planted.point(usual | given.get(name, {})) for _ in range(n)]
        for name, n in families.items()
        if name not in (left_out or {})
    }
    compare = Comparer(planted.answers(points), n_draws=2000, seed=0)
    as_effect = {"before": points["before"], "mask": points["mask"], "random": points["random_matrix"]}
    found = assemble(
        planted.scoring, planted.text, as_effect, {"before": 0, "mask": 40, "random": 40}, dict(META)
    )
    true, diagonal = loss
    noise = np.random.default_rng(0).standard_normal(200 // copies).repeat(copies) * spread
    samples = {"true": true + noise, "first": noise, "curvature": noise, "second_order": 2 * noise}
    claims = claims_of(
        Evidence(
            found,
            compare,
            {**dict.fromkeys(("halves", "seeds"), Overlap(20, (40, 40), 0.1, 1e-9)), **(overlaps or {})},
            LossChange(samples, diagonal, 40),
            np.arange(200) // copies,
            CONTROLS,
            RANDOM,
            dict.fromkeys(families, 40),
            2000,
            0,
            left_out or {},
        )
    )
    assert all(claim.sentence.endswith(".") and "nan" not in claim.sentence for claim in claims)
    assert len({claim.claim for claim in claims}) == len(claims)
    return {claim.claim: claim for claim in claims}


def statuses(**options: Any) -> dict[str, str]:
    return {name: claim.status for name, claim in evidence(**options).items()}


def test_a_mask_that_alone_lowers_false_belief_beats_every_control() -> None:
    found = evidence()
    for name in ("selective", *(f"more_than_{control}" for control in (*CONTROLS, *RANDOM))):
        assert found[name].status == "supported", name
        assert found[name].low < found[name].value < found[name].high < 0
    assert found["stable"].status == found["diagonal_predicts"].status == "supported"
    for name in ("amplifying_helps", "tuning_helps", "rescue", "transfers_to_contents"):
        assert found[name].status == "not supported", name
    assert found["false_belief_falls"].value == pytest.approx(-0.55, abs=0.08)
    assert found["false_belief_falls"].paper == "says so"


@pytest.mark.parametrize("control", ["shuffled_labels", "key_value", "last_token", "random_pair"])
def test_a_control_that_does_the_same_is_not_beaten(control: str) -> None:
    found = statuses(rates={control: LOW})
    assert found[f"more_than_{control}"] == "not supported"
    assert found["more_than_lowest"] == "supported"


def test_a_random_mask_is_said_to_be_as_low_where_the_mean_is_not() -> None:
    sentence = evidence()["more_than_random_row"].sentence
    assert "(0 of 20 as low; difference" in sentence


def test_a_control_passed_off_as_the_mask_supports_nothing() -> None:
    found = statuses(rates={"mask": {}})
    fell = [name for name, status in found.items() if name.startswith("more_than") and status == "supported"]
    assert not fell
    assert found["false_belief_falls"] == found["selective"] == found["dose"] == "not supported"


def test_what_random_masks_do_as_well_is_no_claim_about_the_mask() -> None:
    arms = ("mask", "random_matrix", "transfer", "contents", "new_wording", *CONTROLS, *RANDOM)
    rates = {arm: {**LOW, "second_order": 0.3} for arm in arms}
    for dose in DOSES:  # a curve that falls, the same for masks and random ones
        level = {"false_belief": 0.8 - 0.4 * min(1.0, dose)}
        rates |= {f"dose_{dose:g}": level, f"dose_{dose:g}_random": level}
    found = evidence(rates=rates)
    assert found["false_belief_falls"].status == "supported"
    for name, claim in found.items():
        if name.startswith(("more_than", "transfers", "selective", "dose")):
            assert claim.status == "not supported", (name, claim.sentence)
    assert "beyond random masks" in found["selective"].sentence
    steep = {f"dose_{dose:g}": {"false_belief": 0.9 - 0.5 * min(1.0, dose)} for dose in DOSES}
    assert statuses(rates=steep)["dose"] == "supported"


def test_to_fall_less_than_others_rise_is_no_fall() -> None:
    """The mask does nothing, while other answers rise."""
    before = {"false_belief": 0.78, "true_belief": 0.8}
    rates = {"mask": {}, "wrong_labels": {"false_belief": 0.95}, "rescue_0.5_random": {"false_belief": 0.6}}
    found = statuses(before=before, rates=rates)
    for name in ("false_belief_falls", "more_than_wrong_labels", "rescue"):
        assert found[name] == "not supported", name
    rising = statuses(before=before, rates={"mask": {"true_belief": 0.97}})
    assert rising["selective"] == "not supported"


def test_too_few_stories_for_so_many_claims_are_said_to_be() -> None:
    found = evidence(n_stories=9, before=dict.fromkeys(ABLE, 1.0))
    assert found["tracks_beliefs"].status == "supported"
    for name in ("false_belief_falls", "more_than_random", "more_than_lowest", "selective", "dose"):
        assert found[name].status == "not testable", name
        assert "9 groups of stories and 2000 draws are too few" in found[name].sentence
    assert found["stable"].status == "supported"


def test_damage_to_true_belief_too_is_not_selective() -> None:
    both = {"false_belief": 0.5, "true_belief": 0.5}
    assert statuses(rates={"mask": both})["selective"] == "not supported"


def test_doses_rescue_transfer_amplifying_and_tuning_are_found_where_they_are() -> None:
    rates: dict[str, dict[str, float]] = {
        f"dose_{dose:g}": {"false_belief": 0.6 - 0.05 * np.log2(dose)} for dose in DOSES
    }
    rates |= {"rescue_0.5": {"false_belief": 0.9}, "rescue_0.5_random": {"false_belief": 0.5}}
    rates |= {"transfer": LOW, "new_wording": LOW, "operator_amplify": {"false_belief": 0.9}}
    rates |= {"tuned": {"false_belief": 0.9}, "tuned_random": {"false_belief": 0.66}}
    rates |= {"mask": {"false_belief": 0.5}}
    found = evidence(rates, before={"false_belief": 0.65})
    for name in (
        "dose", "rescue", "transfers_to_contents", "transfers_from_wordings", "amplifying_helps",
        "tuning_helps", "stable", "seeds_agree",
    ):  # fmt: skip
        assert found[name].status == "supported", (name, found[name].sentence)
    assert found["transfers_to_transfer"].status == "not supported"
    assert found["dose"].value == pytest.approx(-0.05, abs=0.02)


def test_a_model_at_chance_has_nothing_to_damage() -> None:
    found = statuses(before=dict.fromkeys(ABLE, 0.5))
    for name in ("selective", "dose", "rescue", "more_than_lowest", "more_than_random_row", "tuning_helps"):
        assert found[name] == "not testable"


def test_few_random_masks_are_no_placebo() -> None:
    found = evidence(n_random=5)["more_than_random_row"]
    assert found.status == "not testable"
    assert "at least 19" in found.sentence


@pytest.mark.parametrize("claim", ["rescue", "amplifying_helps", "tuning_helps"])
def test_a_mean_of_few_random_masks_is_none(claim: str) -> None:
    found = evidence(n_few=4)[claim]
    assert found.status == "not testable"
    assert "4 random masks are too few for their mean; use at least 5" in found.sentence


def test_stories_without_true_beliefs_say_nothing_of_selectivity() -> None:
    found = evidence(true_belief=False)
    assert found["selective"].status == "not testable"
    assert "true_belief" in found["selective"].sentence
    assert found["more_than_lowest"].status == "supported"


def test_a_fall_at_the_largest_dose_alone_is_one_on_average() -> None:
    found = evidence({"dose_2": {"false_belief": 0.1}, "mask": {"false_belief": 0.8}})["dose"]
    assert found.status == "supported"
    assert "falls on average with a doubling of kappa" in found.sentence


@pytest.mark.parametrize("claim", ["amplifying_helps", "tuning_helps"])
def test_where_all_is_right_nothing_can_be_gained(claim: str) -> None:
    found = evidence(before={"false_belief": 1.1})
    assert found[claim].status == "not testable"
    assert "nothing to gain" in found[claim].sentence
    assert found["more_than_lowest"].status == "supported"


def test_a_difference_as_large_as_the_power_note_says_shows_in_four_of_five_studies() -> None:
    rng = np.random.default_rng(0)
    questions = pd.DataFrame({"category": "false_belief", "story_id": list("aab"), "group": list("xxy")})
    half = 0.1  # of an interval, of a normal estimate
    rows = [{"family": "before", "measure": "false_belief", "low": -half, "high": half}]
    study: Any = SimpleNamespace(comparisons=pd.DataFrame(rows), answers=SimpleNamespace(questions=questions))
    words = power(study)
    assert words.startswith("With 3 false-belief questions in 2 stories (2 groups)")
    difference = float(words.split("about ")[1].split(" points")[0]) / 100
    estimates = difference + half / 1.96 * rng.standard_normal(100_000)
    assert (estimates > half).mean() == pytest.approx(0.8, abs=0.01)


def test_masks_that_share_no_more_than_chance_are_not_stable() -> None:
    chance = Overlap(1, (40, 40), 0.9, 0.6)
    assert statuses(overlaps={"halves": chance})["stable"] == "not supported"
    assert statuses(overlaps={"halves": chance})["seeds_agree"] == "supported"
    assert statuses(overlaps={"seeds": chance})["seeds_agree"] == "not supported"
    assert statuses(overlaps={"seeds": Overlap(0, (40, 0), 0.0, 1.0)})["seeds_agree"] == "not testable"


def test_what_the_mask_does_to_second_order_beliefs_is_a_claim() -> None:
    found = evidence({"mask": LOW | {"second_order": 0.5}})["transfers_to_second_order"]
    assert found.status == "supported"
    assert "lowers accuracy about second-order beliefs" in found.sentence
    assert statuses()["transfers_to_second_order"] == "not supported"
    guessed = evidence(before={"second_order": 0.5})["transfers_to_second_order"]
    assert guessed.status == "not testable"
    assert "not shown to be above chance about second-order beliefs" in guessed.sentence


@pytest.mark.parametrize("true", [0.05, 2.0, -0.5])
def test_a_diagonal_that_is_far_off_predicts_nothing(true: float) -> None:
    assert statuses(loss=(true, 0.45))["diagonal_predicts"] == "not supported"


def test_losses_of_one_group_of_stories_are_drawn_again_together() -> None:
    """Twenty equal answers to each of ten stories are ten observations and no more."""
    few, many = (evidence(spread=0.3, copies=copies)["diagonal_predicts"] for copies in (20, 1))
    assert few.high - few.low > 2.5 * (many.high - many.low)


@pytest.mark.parametrize(
    ("claim", "rates"),
    [
        ("tuning_helps", {"tuned": 0.75, "tuned_random": 0.3}),
        ("amplifying_helps", {"operator_amplify": 0.75, "operator_amplify_random": 0.3}),
        ("amplifying_helps", {"operator_amplify": 0.81, "operator_amplify_random": 0.3}),
        ("rescue", {"rescue_0.5": 0.3, "rescue_0.5_random": 0.05}),
        ("rescue", {"mask": 0.9, "rescue_0.5": 0.99, "rescue_0.5_random": 0.6}),
        ("more_than_lowest", {"mask": 0.85, "lowest": 0.99}),
    ],
)
def test_better_than_another_is_not_enough_where_the_sentence_says_more(
    claim: str, rates: dict[str, float]
) -> None:
    """Training that harms less than another has not helped, and so on."""
    given = {name: {"false_belief": rate} for name, rate in rates.items()}
    found = evidence(given, before={"false_belief": 0.8})[claim]
    shown = found.high < 0 if claim.startswith("more_than") else found.low > 0
    assert shown  # against the other
    assert found.status == "not supported"


def test_more_claims_make_each_harder() -> None:
    """A p-value of 0.01 does not survive among thirty."""
    found = evidence(overlaps={"halves": Overlap(3, (40, 40), 1.0, 0.01)}, rates={"mask": {}})
    assert found["stable"].status == "not supported"
    assert found["stable"].p > 0.05


# ---- parts


def test_the_null_of_an_overlap_is_hypergeometric() -> None:
    shapes = {(0, "Q"): (1, 3, 4), (1, "Q"): (1, 2, 3)}
    model = tiny.model("llama")
    identity = view(model).identity()

    def mask(first: list[int], second: list[int]) -> tt.SparseMask:
        entries = {(0, "Q"): torch.tensor(first), (1, "Q"): torch.tensor(second, dtype=torch.int64)}
        return tt.SparseMask(identity, shapes, entries)

    found = overlap(mask([0, 1, 2, 3], [0, 5]), mask([2, 3, 4], [5, 1, 2]))
    assert (found.common, found.sizes) == (3, (6, 6))
    assert found.jaccard == 3 / 9
    assert found.expected == pytest.approx(4 * 3 / 12 + 2 * 3 / 6)

    def chance(d: int, a: int, b: int) -> list[float]:
        return [comb(a, k) * comb(d - a, b - k) / comb(d, b) if b - k >= 0 else 0.0 for k in range(a + 1)]

    p = sum(
        x * y for i, x in enumerate(chance(12, 4, 3)) for j, y in enumerate(chance(6, 2, 3)) if i + j >= 3
    )
    assert found.p == pytest.approx(p)
    assert overlap(mask([], []), mask([1], [])).p == pytest.approx(1.0)
    # A matrix of which nothing may be chosen says nothing.
    without, b = mask([], list(range(6))), mask([2, 3, 4], [5])
    inside = overlap(mask([0, 1, 2, 3], []), b, without=without)
    assert (inside.common, inside.expected) == (2, 1.0)
    assert inside.p == pytest.approx(sum(chance(12, 4, 3)[2:]))


def test_chances_below_the_smallest_number_change_nothing() -> None:
    """Of 5,000 entries, most numbers in common have a probability that is zero in float64."""
    identity, n = view(tiny.model("llama")).identity(), 5000
    shapes = {(0, "Q"): (1, 1, n), (1, "Q"): (1, 1, n)}

    def mask(first: int, size: int) -> tt.SparseMask:
        entries = torch.arange(first, first + size)
        return tt.SparseMask(identity, shapes, {(0, "Q"): entries, (1, "Q"): entries})

    found = overlap(mask(0, 2000), mask(1190, 2000))
    assert found.common == 1620
    one = [Fraction(comb(2000, k) * comb(3000, 2000 - k), comb(n, 2000)) for k in range(700, 901)]
    both = sum(
        one[i] * sum(one[max(0, 1620 - 700 - (700 + i)) :]) for i in range(len(one))
    )  # the rest is below 1e-10 of it
    assert found.p == pytest.approx(float(both), rel=1e-6)


def test_what_two_masks_leave_out_is_not_counted_as_chance() -> None:
    """Random masks without a common third are drawn from the rest; their overlap is no surprise."""
    identity = view(tiny.model("llama")).identity()
    rng = np.random.default_rng(0)

    def mask(entries: Any) -> tt.SparseMask:
        return tt.SparseMask(identity, {(0, "Q"): (1, 30, 40)}, {(0, "Q"): torch.as_tensor(entries)})

    general = mask(np.arange(400))
    p = []
    for _ in range(200):
        a, b = (mask(400 + rng.choice(800, 200, replace=False)) for _ in range(2))
        found = overlap(a, b, without=general)
        assert found.expected == 200 * 200 / 800
        p.append((found.p, overlap(a, b).p))
    inside, everywhere = np.array(p).T
    assert abs((inside <= 0.2).mean() - 0.2) < 0.1
    assert (everywhere <= 0.2).mean() > 0.8  # what the wrong null would say
    assert overlap(a, general, without=general).expected == 0
    assert overlap(a, general, without=general).p == 1
    with pytest.raises(tt.TomsparseError, match="should be without"):
        overlap(general, a, without=general)


def test_parts_of_a_mask_are_the_most_sensitive_or_random_entries() -> None:
    model = tiny.model("llama")
    samples = tt.story_samples(model, [tiny.story()])
    sensitivity = tt.fisher_diagonal(model, samples, show_progress=False)
    mask = tt.top_fraction(sensitivity, 0.05).random_like(0)
    part = most_sensitive(sensitivity, mask, 0.25)
    for key, index in mask.entries.items():
        ranked = sorted(index.tolist(), key=lambda i: -sensitivity[key].flatten()[i].item())
        assert part.entries[key].tolist() == sorted(ranked[: round(0.25 * len(index))])
    drawn = random_part(mask, 0.5, 3)
    assert len(mask & drawn) == len(drawn) == sum(round(0.5 * len(i)) for i in mask.entries.values())
    assert drawn == random_part(mask, 0.5, 3) != random_part(mask, 0.5, 4)


SMALL = tt.StudySettings(
    stories=16, dev_stories=2, test_stories=4, windows=10, length=48, random_masks=1, tune_steps=2,
    kappa=0.02, n_draws=200, head_stories=1, localisation_items=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[tt.Study, Path]:
    """A study of a random model, stopped twice on its way."""
    out = tmp_path_factory.mktemp("study") / "of_nothing"
    model = tt.load_model(tiny.long_directory(), device="cpu")

    def stop_at(words: str) -> None:
        def told(message: str) -> None:
            if message.startswith(words):
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            tt.study(model, out, SMALL, progress=told, show_progress=False)

    stop_at("Sensitivity to 10 samples of general")
    assert len(list(out.glob("sensitivity_part_*.safetensors"))) == 8
    stop_at("Training")
    with (out / "points.jsonl").open("ab") as file:
        file.write(b'{"key": "cut off')  # as kill -9 would leave it
    measured = (out / "points.jsonl").read_bytes().count(b"\n")

    def again(*_: Any, **__: Any) -> None:
        raise AssertionError("a finished sensitivity was computed again")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_material, "fisher_diagonal", again)
        found = tt.study(model, out, SMALL, show_progress=False)
    after = (out / "points.jsonl").read_bytes().count(b"\n")
    assert after == measured + 2  # the trained mask and the trained random one
    return found, out


def test_the_lowest_are_the_lowest_beside_an_enormous_one() -> None:
    model = tiny.model()
    generator = torch.Generator().manual_seed(0)
    values = {
        key: 1e-9 * torch.rand(view(model).shape(key), generator=generator) for key in ((0, "Q"), (1, "K"))
    }
    for one in values.values():
        one.view(-1)[17] = 1.0
    sensitivity = tt.Sensitivity(values, 1, view(model).identity())
    found = lowest(sensitivity, tt.top_fraction(sensitivity, 0.05))
    for key, index in found.entries.items():
        flat = values[key].flatten()
        inside = torch.zeros(len(flat), dtype=torch.bool).index_fill(0, index, True)
        assert len(index) == round(0.05 * len(flat))
        assert flat[inside].max() <= flat[~inside].min()


def test_a_random_model_gives_no_claim_of_damage(finished: tuple[tt.Study, Path]) -> None:
    found = {claim.claim: claim.status for claim in finished[0].claims}
    assert found["tracks_beliefs"] == "not supported"
    assert {
        found[name]
        for name in found
        if name.startswith("more_than")
        or name in ("selective", "dose", "rescue", "tuning_helps", "amplifying_helps", "false_belief_falls")
    } == {"not testable"}


def test_a_finished_study_is_read_again_as_it_was(
    finished: tuple[tt.Study, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    study, out = finished
    model = tt.load_model(tiny.long_directory(), device="cpu")

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("finished work was done again")

    with pytest.MonkeyPatch.context() as patch:
        for name in ("tune", "loss_change"):
            patch.setattr(_study_measure, name, never)
        patch.setattr(tt.SparseEdit, "applied", never)
        patch.setattr(tt.PreparedBattery, "measure", never)
        again = tt.study(model, out, SMALL, show_progress=False)
        assert capsys.readouterr() == ("", "")
        tt.study(model, out, SMALL)
        told = capsys.readouterr()
        assert told.out == ""
        stages = ("Making stories and texts\n", "To do: sensitivities to", "Heads by knock-outs\n")
        assert [told.err.find(words) for words in stages] == sorted(map(told.err.index, stages))
    assert str(again.claims) == str(study.claims)
    assert again.arms.equals(study.arms)
    assert str(again.battery.claims) == str(study.battery.claims)
    with pytest.raises(tt.TomsparseError, match="holds another run"):
        tt.study(model, out, tt.StudySettings().quick(), show_progress=False)


def test_the_arms_are_what_they_are_called(finished: tuple[tt.Study, Path]) -> None:
    study, out = finished
    arms = study.arms.set_index("family")
    size = len(study.masks["mask"])
    assert arms.n_weights["mask"] == arms.n_weights["random_pair"] == arms.n_weights["tuned"] == size
    assert arms.n_weights["before"] == 0
    assert arms.n_weights["rescue_0.5"] == pytest.approx(size / 2, abs=4)
    assert study.masks["tom_only"] - study.masks["general_only"] == study.masks["mask"]
    assert arms.dose["operator_half"] == 0.5
    assert np.isnan(arms.dose["operator_resample"])
    # The trained ones are no edits of masks that are there before; all kinds of random masks fit this model.
    assert len(study.arms) - 2 == most_arms(SMALL, len(study.masks))
    loaded = tt.SparseMask.load(out / "mask_shuffled_labels.safetensors")
    assert loaded == study.masks["shuffled_labels"]
    page = (out / "study.html").read_text()
    assert "not testable" in page
    assert "Kappa was given, not chosen here." in page
    assert all(claim.claim.replace("_", " ") in page for claim in study.claims)
    assert study.heads.claims
    assert "Effect of each head" in page
    assert (out / "heads_test.safetensors").exists()
    assert all(claim.sentence in html.unescape(page) for claim in study.heads.claims)
    assert [claim.claim for claim in study.battery.claims] == [
        "key_value_falls", "induction_falls", "prose_stays", "patterns_stays",
    ]  # fmt: skip
    assert {claim.status for claim in study.battery.claims[:2]} == {"not testable"}
    assert all(claim.sentence in html.unescape(page) for claim in study.battery.claims)
    changes = pd.read_parquet(out / "localisation_changes.parquet")
    pd.testing.assert_frame_equal(changes, study.battery.changes)


def test_a_study_is_read_without_its_model(finished: tuple[tt.Study, Path]) -> None:
    study, out = finished
    read = tt.read_study(out)
    assert repr(read) == repr(study)
    assert str(read.claims) == str(study.claims)
    assert (read.kappa, read.facts, dict(read.masks)) == (study.kappa, study.facts, dict(study.masks))
    for table in ("arms", "accuracy", "comparisons", "overlaps", "losses"):
        pd.testing.assert_frame_equal(getattr(read, table), getattr(study, table))
    for title, frame in study.heads.frames.items():
        pd.testing.assert_frame_equal(read.heads.frames[title], frame)
    for title, figure in study.heads.figures.items():
        assert json.loads(read.heads.figures[title].to_json()) == json.loads(figure.to_json())
    assert (read.heads.claims, read.heads.obstacle) == (study.heads.claims, study.heads.obstacle)
    assert (str(read.battery.claims), read.battery.obstacle) == (str(study.battery.claims), None)
    for table in ("scores", "changes"):
        pd.testing.assert_frame_equal(getattr(read.battery, table), getattr(study.battery, table))
    for name in ("correct", "nll", "n_tokens"):
        np.testing.assert_array_equal(getattr(read.answers, name), getattr(study.answers, name))
    assert (read.answers.families, read.answers.text) == (study.answers.families, study.answers.text)
    pd.testing.assert_frame_equal(read.answers.questions, study.answers.questions)
    page = study_html(dataclasses.replace(read, heads=study.heads))
    assert page == (out / "study.html").read_text(encoding="utf-8")


def test_curves_go_through_the_unedited_model_and_the_mask(finished: tuple[tt.Study, Path]) -> None:
    study, _ = finished
    rate = study.arms.groupby("family").false_belief.mean()
    curves = tt.plot.study_doses(study).data
    assert [len(curve.x) for curve in curves] == [6, 6, 6, 6, 5, 5]
    doses, random_doses, factors, _, shares, _ = (dict(zip(curve.x, curve.y)) for curve in curves)
    assert doses[study.kappa] == rate["mask"]
    assert doses[study.kappa / 4] == rate["dose_0.25"]
    assert random_doses[study.kappa] == rate["random_matrix"]
    families = {-1: "flip", 0: "zero", 0.5: "half", 1.5: "amplify", 2: "double"}
    assert factors == {1: rate["before"]} | {at: rate[f"operator_{name}"] for at, name in families.items()}
    assert (shares[0], shares[0.5], shares[1]) == (rate["mask"], rate["rescue_0.5"], rate["before"])


def test_the_cost_is_told_before_anything_is_done(tmp_path: Path) -> None:
    model, told = tt.load_model(tiny.long_directory(), device="cpu"), []

    def stop(message: str) -> None:
        told.append(message)
        if message.startswith("To do"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tt.study(model, tmp_path / "x", SMALL, progress=stop, show_progress=False)
    assert not (tmp_path / "x").exists()
    material = make_material(model, SMALL)
    gradients = sum(int(samples.attention_mask.sum()) for samples in material.tasks.values())
    assert f"({gradients:,} tokens), and up to {most_arms(SMALL, 18)} edits on" in told[-1]
    assert [duration(seconds) for seconds in (3.2, 119, 150, 7300)] == [
        "3 seconds", "119 seconds", "2 minutes", "2 hours",
    ]  # fmt: skip


def test_what_was_answered_is_kept_question_by_question(finished: tuple[tt.Study, Path]) -> None:
    study, _ = finished
    answers, model = study.answers, tt.load_model(tiny.long_directory(), device="cpu")
    assert list(answers.families) == list(study.arms.family)
    made = tt.generate_stories(SMALL.test_stories, seed=SMALL.seed, split="test")
    stories = {story.id: story for story in made}
    asked = answers.questions[answers.questions.story_id.isin(stories)]
    assert len(asked) == sum(len(story.questions) for story in stories.values())
    for row in asked.itertuples():
        question = stories[row.story_id].questions[row.question]
        assert row.prompt == stories[row.story_id].prompt(question)
        assert row.options[0] == question.answer
        assert sorted(row.options) == sorted(question.options)
    with tt.SparseEdit.mean(model, study.masks["mask"]).applied(model):
        found = tt.score_stories(model, stories.values(), show_progress=False)
    row = answers.families.index("mask")
    assert answers.correct[row][asked.index].tolist() == found.frame.correct.tolist()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda out: shutil.rmtree(out), "There is no folder .*pass the folder that a study was written to"),
        (lambda out: (out / "run.json").unlink(), "holds no study"),
        (lambda out: (out / "run.json").write_text("[]"), "holds no study"),
        (lambda out: edit(out / "run.json", command="tomsparse run"), "holds a run and not a study; add"),
        (lambda out: (out / "study.json").unlink(), "is not finished; the same command, .* continues it"),
        (lambda out: (out / "answers.safetensors").unlink(), "lacks files; the same command.* nothing again"),
        (lambda out: (out / "study.json").write_text("{"), "study.json is not a JSON file"),
        (lambda out: edit(out / "run.json", samples="x"), "study.json is of another study than .*run.json"),
        (lambda out: edit(out / "run.json", identity=OTHER), "study.json is about 'llama.* but the study in"),
        (lambda out: (out / "arms.parquet").write_bytes(b"PAR1"), "Cannot read .*arms.parquet"),
        (lambda out: (out / "mask_lowest.safetensors").unlink(), "Cannot read .*mask_lowest.safetensors"),
    ],
)
def test_what_is_no_finished_study_is_not_read(
    spoil: Callable[[Path], object], words: str, finished: tuple[tt.Study, Path], tmp_path: Path
) -> None:
    out = tmp_path / "copy"
    out.mkdir()
    for path in finished[1].iterdir():
        if path.suffix in (".json", ".parquet") or path.name.startswith(("mask_", "answers")):
            shutil.copy(path, out)
    tt.read_study(out)
    spoil(out)
    with pytest.raises(tt.TomsparseError, match=words):
        tt.read_study(out)


OTHER = {
    "name": "other", "fingerprint": "0" * 32, "basis": "raw", "transformer_lens": "4.3.0", "n_layers": 1,
    "n_heads": 1, "n_kv_heads": 1, "d_model": 1, "d_head": 1, "d_mlp": 1,
}  # fmt: skip


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_studies_are_compared_from_their_folders(finished: tuple[tt.Study, Path], tmp_path: Path) -> None:
    study, out = finished
    shutil.copytree(out, tmp_path / "run" / "study")
    page = tmp_path / "compare.html"
    command = ["compare", str(out), str(tmp_path / "run" / "study"), "--out", str(page)]
    named = CliRunner().invoke(cli.app, [*command, "--label", "one", "--label", "two"])
    assert named.exit_code == 0, named.output
    assert "not testable  architecture specific: Nothing can be damaged in one" in named.stdout
    assert named.stdout.endswith(f"{page}\n")
    assert "particular to one?" in page.read_text(encoding="utf-8")
    found = tt.compare_studies({"one": study, "two": tt.read_study(out)}, n_draws=SMALL.n_draws)
    own = found.frame[(found.frame.model == "one") & found.frame.minus.isna()].set_index("measure")
    for against, family in (("before", "before"), ("random", "random_matrix")):
        table = study.comparisons[study.comparisons.family == family].set_index("measure")
        mine = own[own.against == against].loc[table.index]
        columns = ["value", "low", "high", "p"]
        pd.testing.assert_frame_equal(mine[columns], table[columns])
    apart = found.frame[found.frame.minus.notna()]
    assert apart.paired.all()
    assert (apart.value == 0).all()
    for extra, words in (
        ([], "2 studies cannot be called llama-long, llama-long; give each its own --label"),
        (["--label", "one"], "2 studies cannot be called one; give each"),
    ):
        refused = CliRunner().invoke(cli.app, [*command, *extra])
        assert refused.exit_code == 2
        assert refused.stderr.startswith("tomsparse: ")
        assert words in refused.stderr
    shutil.copy(out / "run.json", tmp_path / "run" / "run.json")
    edit(tmp_path / "run" / "run.json", command="tomsparse run")
    refused = CliRunner().invoke(cli.app, ["compare", str(out), str(tmp_path / "run"), "--out", str(page)])
    assert refused.exit_code == 2
    assert f"holds a run and not a study; pass {tmp_path / 'run' / 'study'}" in refused.stderr


def test_bad_settings_are_refused_before_any_work(tmp_path: Path) -> None:
    model = tiny.model("neox")  # without a gate
    for bad, words in (
        ({"stories": 8}, "at least 16"),
        ({"kappa": 0.0}, "edits no weight"),
        ({"kappa": 1.0}, "leaves no weight"),
        ({"matrices": ()}, "No matrices"),
        ({"matrices": ("X",)}, "matrices="),
        ({"random_masks": 0}, "random_masks"),
        ({"few_masks": 0}, "few_masks=0 must be at least 1"),
        ({"seed": -1}, "seed=-1"),
        ({"length": 1}, "length=1 must be at least 2"),
        ({"accuracy_margin": float("nan")}, "accuracy_margin=nan must be a finite number"),
        ({"perplexity_margin": -0.1}, "perplexity_margin=-0.1"),
        ({"matrices": ("Q", "gate")}, "gate"),
    ):
        with pytest.raises(tt.TomsparseError, match=words):
            tt.study(model, tmp_path / "x", tt.StudySettings(**bad), show_progress=False)  # type: ignore[arg-type]
    assert not (tmp_path / "x").exists()


def test_an_edited_model_is_refused_before_anything_is_made_of_it(tmp_path: Path) -> None:
    model = tiny.model("llama")
    shape = view(model).shape((0, "Q"))
    mask = tt.SparseMask.from_bool(model, {(0, "Q"): torch.ones(shape).bool()})
    edited = tt.SparseEdit.zero(model, mask).applied(model)
    with edited, pytest.raises(tt.TomsparseError, match=r"has an active edit.*before a study"):
        tt.study(model, tmp_path / "x", SMALL, show_progress=False)
    assert not (tmp_path / "x").exists()


def test_the_command_line_refuses_a_study_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("the run has begun")

    monkeypatch.setattr(cli, "run_pipeline", never)
    for options, words in (
        (["--processes", "0"], "processes=0 must be at least 1"),
        (["--stories", "12"], "stories=12 must be at least 16"),
    ):
        done = CliRunner().invoke(cli.app, ["run", "--out", str(tmp_path / "x"), "--study", *options])
        assert done.exit_code == 2
        assert words in done.output
    (tmp_path / "x" / "study").mkdir(parents=True)
    owner = {"format": 1, "command": "study", "versions": {}, "device": "cpu", "earlier_starts": []}
    owner |= {"settings": tt.StudySettings(kappa=0.1).plain(), "identity": {}, "samples": ""}
    (tmp_path / "x" / "study" / "run.json").write_text(json.dumps(owner))
    done = CliRunner().invoke(cli.app, ["run", "--out", str(tmp_path / "x"), "--study", "--seed", "3"])
    assert done.exit_code == 2
    assert "holds another run, with other settings: seed 0 (now 3)" in " ".join(done.output.split())


def test_the_command_line_runs_the_study_at_the_kappa_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: tuple[tt.Study, Path]
) -> None:
    asked: list[Any] = []

    class Run:
        claims = position_claims = ()
        choice = tt.KappaChoice(0.03, True, "", pd.DataFrame())

    def record(model: Any, out: Path, settings: tt.StudySettings, **_: Any) -> tt.Study:
        asked.append((out, settings))
        return finished[0]

    monkeypatch.setattr(cli, "run_pipeline", lambda *_, **__: Run())
    monkeypatch.setattr(cli, "study", record)
    text = tmp_path / "text.txt"
    text.write_text("Some words.")
    options = ["run", "--out", str(tmp_path), "--model", str(tiny.long_directory()), "--text", str(text)]
    done = CliRunner().invoke(cli.app, [*options, "--study", "--random-masks", "21", "--seed", "3"])
    assert done.exit_code == 0, done.output
    ((out, settings),) = asked
    assert out == tmp_path / "study"
    assert (settings.kappa, settings.random_masks, settings.seed) == (0.03, 21, 3)
    assert settings.text == (str(text),)
    assert "tracks beliefs" in done.output
    assert str(tmp_path / "study" / "study.html") in done.output
    CliRunner().invoke(cli.app, [*options, "--study", "--quick"])
    assert asked[1][1].random_masks == 19
    assert asked[1][1].test_stories < settings.test_stories


def test_two_processes_measure_what_one_does(
    finished: tuple[tt.Study, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second process does all that is missing, since the first takes nothing."""
    study, out = finished
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    missing = ["points.jsonl", "sensitivity_part_3.safetensors", "loss_random_matrix_0.safetensors"]
    missing += ["battery_mask.parquet"]
    for name in missing:
        (copy / name).unlink()
    # Files of other masks are not taken for those of these.
    shutil.copy(out / "tuned_random_0.safetensors", copy / "tuned.safetensors")
    shutil.copy(out / "loss_random_matrix_0.safetensors", copy / "loss_mask.safetensors")
    load = partial(tt.load_model, tiny.long_directory(), device="cpu")
    monkeypatch.setattr(_study_processes, "_taken", lambda _job, _phase, _items: iter(()))
    threads = torch.get_num_threads()
    found = tt.study(load(), copy, SMALL, processes=2, load=load, show_progress=False)
    assert torch.get_num_threads() == threads
    assert not read_points(copy / "points.jsonl")
    assert len(read_points(copy / "points_0.jsonl")) > 0.9 * len(study.arms)  # empty masks are one point
    assert all((copy / name).exists() for name in missing)
    pd.testing.assert_frame_equal(found.arms, study.arms)
    pd.testing.assert_frame_equal(found.losses, study.losses)
    assert str(found.claims) == str(study.claims)
    monkeypatch.undo()
    with pytest.raises(tt.TomsparseError, match="processes=2 needs load="):
        tt.study(load(), tmp_path / "x", SMALL, processes=2, show_progress=False)
    with pytest.raises(tt.TomsparseError, match=r"cannot be sent to another process.*functools.partial"):
        tt.study(load(), tmp_path / "x", SMALL, processes=2, load=lambda: load(), show_progress=False)
    assert not (tmp_path / "x").exists()
    other = partial(tt.load_model, tiny.directory("neox"), device="cpu")
    with pytest.raises(tt.TomsparseError, match="other weights"):
        tt.study(load(), tmp_path / "copy", SMALL, processes=2, load=other, show_progress=False)
