"""The sweep on tiny random models, and the choice from sweeps written by hand."""

from __future__ import annotations

import dataclasses
import functools
import json

import numpy as np
import pandas as pd
import pytest
import torch

from tests import tiny
from tl_tomsparse._checks import TomsparseError
from tl_tomsparse._model import view
from tl_tomsparse.edit import SparseEdit
from tl_tomsparse.evaluate import perplexity, score_stories
from tl_tomsparse.experiment import ARMS, KappaSweep, arm_masks, auto_kappas, choose_kappa, kappa_sweep
from tl_tomsparse.samples import story_samples, text_samples
from tl_tomsparse.sensitivity import Sensitivity, fisher_diagonal

DEV = [dataclasses.replace(tiny.story(index), split="dev") for index in range(6)]
KAPPAS = (0.002, 0.02, 0.1)


@functools.cache
def parts(backend: str):
    """A tiny model with its two sensitivities and text."""
    model = tiny.model("qwen2", backend)
    text = text_samples(model, list(tiny.CORPUS), length=16)
    tom = fisher_diagonal(model, story_samples(model, DEV), show_progress=False)
    general = fisher_diagonal(model, text, show_progress=False)
    return model, tom, general, text


def sweep(backend: str = "bridge", **options) -> KappaSweep:
    model, tom, general, text = parts(backend)
    defaults = {"kappas": KAPPAS, "n_random": 3, "show_progress": False}
    return kappa_sweep(model, tom, general, dev_stories=DEV, dev_text=text, **(defaults | options))


@pytest.mark.parametrize("backend", tiny.BACKENDS)
def test_every_point_is_what_the_pieces_give(backend):
    model, tom, general, text = parts(backend)
    raw = [parameter.clone() for parameter in view(model).parameters()]
    result = sweep(backend)
    assert all(torch.equal(a, b) for a, b in zip(raw, view(model).parameters()))
    frame = result.frame
    assert len(frame) == (1 + len(KAPPAS)) * (len(ARMS) - 1 + 3)
    assert result.n == {
        "false_belief": 6, "true_belief": 6, "reality": 6, "memory": 6, "second_order": 6, "paired": 6
    }  # fmt: skip
    rows = frame.set_index(["kappa", "arm", "seed"])
    masks = arm_masks(tom, general, 0.1)
    masks["random"] = masks["mask"].random_like(2)
    assert len({len(mask) for mask in masks.values()}) > 1
    for arm, mask in masks.items():
        found = rows.loc[(0.1, arm, 2 if arm == "random" else pd.NA)]
        with SparseEdit.mean(model, mask).applied(model):
            scores = score_stories(model, DEV, show_progress=False)
            cost = perplexity(model, text, show_progress=False).value
        assert found.n_weights == len(mask)
        assert found.perplexity == pytest.approx(cost, rel=1e-5)
        expected = scores.accuracy().set_index("category").accuracy
        assert found[list(expected.index)].to_dict() == pytest.approx(expected.to_dict())
        assert found.paired == scores.paired().set_index("subset").loc["false_belief_stories"].accuracy


def test_kappa_zero_is_the_unedited_model_and_random_masks_have_equal_size():
    model, *_, text = parts("bridge")
    frame = sweep().frame
    zero = frame[frame.kappa == 0]
    assert (zero.n_weights == 0).all()
    assert zero.perplexity.nunique() == 1
    assert zero.perplexity.iloc[0] == pytest.approx(
        perplexity(model, text, show_progress=False).value, rel=1e-5
    )
    sizes = frame[frame.arm.isin(["mask", "random"])].groupby("kappa").n_weights.nunique()
    assert (sizes == 1).all()
    assert frame[(frame.arm == "random") & (frame.kappa == 0.1)].perplexity.nunique() == 3


def test_an_interrupted_sweep_continues_and_nothing_is_measured_twice():
    whole: list[dict] = []
    expected = sweep(on_point=whole.append).frame
    assert len({record["key"] for record in whole}) == len(whole) < len(expected)  # kappa 0 was measured once

    stored: list[str] = []

    def stop_after_four(record):
        stored.append(json.dumps(record))
        if len(stored) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep(on_point=stop_after_four)
    rest: list[dict] = []
    records = [json.loads(line) for line in stored]
    pd.testing.assert_frame_equal(sweep(on_point=rest.append, resume=records).frame, expected)
    assert len(rest) == len(whole) - 4
    # Records of another operator or other stories are not taken for these.
    other: list[dict] = []
    sweep(on_point=other.append, resume=whole, operator="zero")
    assert len(other) == len(whole) - 1  # the unedited model is the same
    model, tom, general, text = parts("bridge")
    fewer: list[dict] = []
    kappa_sweep(model, tom, general, dev_stories=DEV[:3], dev_text=text, kappas=KAPPAS, n_random=3,
                show_progress=False, on_point=fewer.append, resume=whole)  # fmt: skip
    assert len(fewer) == len(whole)


def test_results_are_plain_values():
    result = sweep()
    values = json.loads(json.dumps(result.to_dict()))
    assert len(values["points"]) == len(result.frame)
    assert values["points"][0]["seed"] is None
    assert json.loads(json.dumps(choose_kappa(result).to_dict()))["kappa"] in KAPPAS
    band = result.band("perplexity")
    assert (band.low <= band["mean"]).all()
    assert (band["mean"] <= band.high).all()


def test_auto_kappas():
    identity = parts("bridge")[1].identity

    def of(*sizes: int) -> Sensitivity:
        values = {(layer, "Q"): torch.empty(1, 1, size, device="meta") for layer, size in enumerate(sizes)}
        return Sensitivity(values, 1, identity)

    small = auto_kappas(of(36_864, 36_864, 12_288))
    assert small[0] == 0
    assert small[-1] == 0.3
    assert round(small[1] * 36_864) == 1
    assert 5 <= len(small) <= 15
    assert np.allclose(np.diff(np.log(small[1:])), np.log(small[2] / small[1]), atol=0.02)
    large = auto_kappas(of(4096 * 4096))
    assert large == tuple(float(f"{2e-6 * step:.7g}") for step in range(26))
    assert auto_kappas(of(2))[1:] == (0.5,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kappas": (0.1, 1.5)}, "1.5"),
        ({"n_random": 0}, "n_random"),
        ({"operator": "double"}, "double"),
        ({"quota": "layer"}, "layer"),
        ({"dev_stories": [tiny.story(0)]}, "split 'test'"),
        ({"dev_stories": []}, "No question"),
    ],
)
def test_refusals_come_before_work(options, message):
    model, tom, general, text = parts("bridge")
    done: list[dict] = []
    arguments = {"dev_stories": DEV, "dev_text": text, "show_progress": False, "on_point": done.append}
    with pytest.raises(TomsparseError, match=message):
        kappa_sweep(model, tom, general, **(arguments | options))
    assert not done


def test_other_weights_and_active_edits_are_refused():
    model, tom, general, text = parts("bridge")
    other = tiny.model("qwen2", seed=1)
    with pytest.raises(TomsparseError):
        kappa_sweep(other, tom, general, dev_stories=DEV, dev_text=text, kappas=KAPPAS, show_progress=False)
    mask = arm_masks(tom, general, 0.02)["mask"]
    with SparseEdit.mean(model, mask).applied(model), pytest.raises(TomsparseError, match="active edit"):
        sweep()


def by_hand(rows: dict[float, tuple[float, ...]]) -> KappaSweep:
    """kappa: (false belief, random mean of it, true belief, reality, perplexity, n_weights) of the mask."""
    frame = []
    for kappa, (mask, random, true_belief, reality, cost, n_weights) in rows.items():
        common = {"kappa": kappa, "n_weights": n_weights, "true_belief": true_belief, "reality": reality,
                  "memory": np.nan, "perplexity": cost}  # fmt: skip
        frame.append({**common, "arm": "mask", "seed": None, "false_belief": mask})
        frame += [
            {**common, "arm": "random", "seed": s, "false_belief": random + d}
            for s, d in ((0, 0.01), (1, -0.01))
        ]
    return KappaSweep(pd.DataFrame(frame).astype({"seed": "Int64"}), {}, {})


UNEDITED = (0.9, 0.9, 0.9, 0.95, 10.0, 0)


def test_the_largest_specific_drop_that_spares_the_rest_is_chosen():
    choice = choose_kappa(
        by_hand(
            {
                0.0: UNEDITED,
                1e-4: (0.85, 0.9, 0.9, 0.95, 10.0, 3),
                1e-3: (0.60, 0.88, 0.88, 0.95, 10.2, 30),
                2e-3: (0.40, 0.85, 0.55, 0.95, 10.3, 60),  # true belief falls as well
                5e-3: (0.30, 0.85, 0.88, 0.95, 11.0, 90),  # text suffers
                1e-2: (0.30, 0.40, 0.88, 0.95, 10.0, 200),  # random masks do the same
            }
        )
    )
    assert choice.kappa == 1e-3
    assert choice.qualified
    assert "30 weights" in choice.reason
    assert choice.table.qualified.to_dict() == {
        1e-4: True, 1e-3: True, 2e-3: False, 5e-3: False, 1e-2: False
    }  # fmt: skip
    assert choice.table.specific_drop[1e-3] == pytest.approx(0.28)
    assert not choice.table.true_belief_stays[2e-3]
    assert not choice.table.perplexity_stays[5e-3]
    assert not choice.table.random_stays[1e-2]


def test_when_nothing_qualifies_the_choice_says_so():
    choice = choose_kappa(
        by_hand({0.0: UNEDITED, 1e-3: (0.95, 0.9, 0.9, 0.95, 10.0, 3), 1e-2: (0.5, 0.6, 0.5, 0.5, 90.0, 50)})
    )
    assert not choice.qualified
    assert choice.kappa == 1e-2
    assert choice.reason.startswith("No kappa qualifies")
    assert "perplexity stays" in choice.reason


def test_ties_go_to_the_smaller_kappa_and_empty_masks_are_never_chosen():
    same = (0.6, 0.9, 0.9, 0.95, 10.0)
    choice = choose_kappa(by_hand({0.0: UNEDITED, 1e-5: (*same, 0), 1e-3: (*same, 5), 1e-2: (*same, 9)}))
    assert choice.kappa == 1e-3
    with pytest.raises(TomsparseError, match="empty"):
        choose_kappa(by_hand({0.0: UNEDITED, 1e-5: (*same, 0)}))
    with pytest.raises(TomsparseError, match="false-belief"):
        choose_kappa(
            by_hand({0.0: (np.nan, np.nan, *UNEDITED[2:]), 1e-3: (np.nan, np.nan, 0.9, 0.9, 10.0, 5)})
        )
