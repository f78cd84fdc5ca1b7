"""Position effects of edits whose effect is known, and against the single measures made one by one."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import families
import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from scipy.stats import t as student
from test_edit import a_mask
from test_rotary import some_samples

import tl_tomsparse as tt
from tl_tomsparse.models import load_model

OPTIONS: dict[str, Any] = {"n_random": 3, "n_draws": 200, "eps": 0.2, "show_progress": False}


def whole(model: Any, layer: int, matrix: str, head: int) -> tt.SparseMask:
    """Every weight of one head's matrix."""
    chosen = torch.zeros(a_mask(model).shapes[layer, matrix], dtype=torch.bool)
    chosen[head] = True
    return tt.SparseMask.from_bool(model, {(layer, matrix): chosen})


@pytest.mark.parametrize("backend", tiny.BACKENDS)
def test_an_edit_that_changes_nothing_has_no_effect(backend: Any) -> None:
    model = tiny.model("llama", backend, dtype=torch.float64)
    same = tt.SparseEdit.scale(model, a_mask(model), 1.0)
    found = tt.position_effects(model, some_samples(), {"same": same}, **OPTIONS)
    assert set(found.summary.measure) == {
        "sinks_shifted", "sink_rate", "attention", "turn", "turn_others", "norm_q", "norm_k",
    }  # fmt: skip
    numbers = ["value", "random", "random_low", "random_high", "beyond"]
    assert (found.summary[numbers].to_numpy() == 0).all()
    # Of changes that have a size, none is none; samples with another count may have been missed.
    ends = found.summary.set_index("measure")[["low", "high"]]
    shift, rate = (ends.loc[name].tolist() for name in ("sinks_shifted", "sink_rate"))
    assert (ends.drop(["sinks_shifted", "sink_rate"]).to_numpy() == 0).all()
    missed = 1 - 0.025 ** (1 / len(some_samples()))
    assert rate == pytest.approx([-missed, missed])
    with_sinks = torch.cat(list(found.before.attention.attention.values()), 1).gt(OPTIONS["eps"]).any(1)
    assert shift == pytest.approx([0.0, 1 - 0.025 ** (1 / int(with_sinks.sum()))])
    assert (found.summary[["as_high", "as_low"]].to_numpy() == 3).all()
    assert (found.heads.change == 0).all()
    assert (found.frequencies.before == found.frequencies.after).all()


@pytest.mark.parametrize("backend", tiny.BACKENDS)
def test_turned_queries_have_the_supplementary_angle_and_the_same_norms(backend: Any) -> None:
    model, samples = tiny.model("llama", backend, dtype=torch.float64), some_samples()
    flipped = tt.SparseEdit.scale(model, whole(model, 1, "Q", 2), -1.0)
    found = tt.position_effects(model, samples, {"flipped": flipped}, **OPTIONS)
    heads = found.heads.set_index(["measure", "layer", "head"]).sort_index()
    for measure in ("angle", "angle_others"):
        row = heads.loc[measure, 1, 2]
        assert row.after == pytest.approx(180 - row.before)
        assert row.low <= row.change <= row.high
        assert heads.loc[measure, 0].change.abs().max() == 0  # layer 0 is not edited
        others = heads.loc[measure, 1].drop(index=2)
        assert others.change.abs().max() == 0
    assert heads.loc["attention", 1, 2].change != 0
    assert found.frequencies.after.to_numpy() == pytest.approx(found.frequencies.before.to_numpy())
    of = found.summary.set_index("measure")
    assert of.value["norm_q"] == pytest.approx(0, abs=1e-12)
    assert of.random["norm_q"] > 0.01
    assert of.as_low["norm_q"] == 0


@pytest.mark.parametrize("backend", tiny.BACKENDS)
def test_effects_are_those_of_single_measures_made_one_by_one(backend: Any) -> None:
    model, samples = tiny.model("qwen2", backend, dtype=torch.float64), some_samples()
    mask = a_mask(model, share=0.05)
    edit = tt.SparseEdit.zero(model, mask)
    found = tt.position_effects(model, samples, {"zero": edit}, seed=4, **OPTIONS)

    def measured(of: tt.SparseEdit | None) -> tuple[Any, Any, Any]:
        def each() -> tuple[Any, Any, Any]:
            quiet: dict[str, Any] = {"show_progress": False}
            return (
                tt.sink_attention(model, samples, **quiet),
                tt.bos_angles(model, samples, **quiet),
                tt.frequency_norms(model, samples, **quiet),
            )

        if of is None:
            return each()
        with of.applied(model):
            return each()

    old = measured(None)
    sinks = [
        (layer, head)
        for layer in range(2)
        for head in range(4)
        if float(old[0].attention[layer][:, head].mean()) > 0.2
    ]
    assert found.sink_heads == tuple(sinks)

    def by_hand(new: tuple[Any, Any, Any]) -> dict[str, float]:
        moved = [
            float(new[0].attention[layer][n, head] - old[0].attention[layer][n, head])
            for layer, head in sinks
            for n in range(len(samples))
        ]
        turns = [
            abs(float(new[1].to_sink[layer][n, head]) - 90) - abs(float(old[1].to_sink[layer][n, head]) - 90)
            for layer, head in sinks
            for n in range(len(samples))
        ]
        norms = []
        for row in (
            old[2].dominant().query("part == 'q'").groupby(["layer", "head"]).frequency.agg(list).items()
        ):
            (layer, head), chosen = row
            before, after = (
                (one[2].squares[layer, "q"][:, head, chosen]).sum(-1).sqrt() for one in (old, new)
            )
            norms.append((after / before - 1).abs().mean())
        each = [
            (abs(float(b) - float(a)) > 0.01)
            for layer in range(2)
            for a, b in zip(old[0].attention[layer].flatten(), new[0].attention[layer].flatten())
            if float(a) > 0.2
        ]
        return {
            "attention": float(np.mean(moved)),
            "turn": float(np.mean(turns)),
            "norm_q": float(np.mean(norms)),
            "sinks_shifted": float(np.mean(each)),
            "sink_rate": float(np.mean(above(new)) - np.mean(above(old))),
        }

    def above(of: tuple[Any, Any, Any]) -> list[bool]:
        return [float(a) > 0.2 for values in of[0].attention.values() for a in values.flatten()]

    own = by_hand(measured(edit))
    random = [
        by_hand(measured(tt.SparseEdit.zero(model, mask.random_like(seed, match="matrix"))))
        for seed in (4, 5, 6)
    ]
    slow = [bool(row.frequency >= 2) for row in old[2].dominant().itertuples()]  # of four frequencies
    assert found.meta["dominant_slow"] == pytest.approx(np.mean(slow))
    of = found.summary.set_index("measure")
    for name, value in own.items():
        assert of.value[name] == pytest.approx(value, abs=1e-9), name
        drawn = [one[name] for one in random]
        assert of.random[name] == pytest.approx(np.mean(drawn), abs=1e-9), name
        assert of.random_low[name] == pytest.approx(min(drawn), abs=1e-9), name
        assert of.as_high[name] == sum(one >= value - 1e-12 for one in drawn)
        assert of.beyond[name] == pytest.approx(value - np.mean(drawn), abs=1e-9), name


@pytest.mark.parametrize("backend", tiny.BACKENDS)
def test_frames_have_intervals_logits_and_angles_before_the_rotation(backend: Any) -> None:
    model, samples = tiny.model("llama", backend, dtype=torch.float64), some_samples()
    edit = tt.SparseEdit.zero(model, a_mask(model, share=0.05))
    found = tt.position_effects(model, samples, {"zero": edit}, unrotated=True, **OPTIONS)
    heads = found.heads.set_index(["measure", "layer", "head"]).sort_index()
    for state, block in (("before", nullcontext()), ("after", edit.applied(model))):
        with block:
            norms = tt.frequency_norms(model, samples, show_progress=False).to_frame()
            for rotated, name in ((True, ""), (False, "_unrotated")):
                angles = tt.bos_angles(model, samples, rotated=rotated, show_progress=False)
                for which, values in (("angle", angles.to_sink), ("angle_others", angles.to_others)):
                    for layer, value in values.items():
                        wanted = value.nanmean(0).tolist()
                        assert heads.loc[(f"{which}{name}", layer)][state].tolist() == pytest.approx(wanted)
        for column, of in (
            (state, "rms"), (f"{state}_low", "low"), (f"{state}_high", "high"),
            (f"logit_{state}", "logit"), (f"logit_first_{state}", "logit_first"),
        ):  # fmt: skip
            np.testing.assert_allclose(found.frequencies[column], norms[of], rtol=1e-6, atol=1e-9)
    for match, frame in found.by_frequency.groupby("match"):
        one = tt.mask_by_frequency(model, edit.mask, match=match, seed=0)
        pd.testing.assert_frame_equal(frame.drop(columns="edit").reset_index(drop=True), one)
    assert set(found.by_frequency["match"]) == {"matrix", "row"}


@pytest.mark.parametrize("backend", tiny.BACKENDS)
def test_cosines_by_frequency_are_those_of_angles_with_intervals_over_groups(backend: Any) -> None:
    model = tiny.model("llama", backend, dtype=torch.float64)
    samples = some_samples(tuple(9 + n % 5 for n in range(23)))  # groups of one sample and of two
    mask = a_mask(model, share=0.05)
    edit = tt.SparseEdit.zero(model, mask)
    found = tt.position_effects(model, samples, {"zero": edit}, position=1, seed=4, **OPTIONS)
    frame = found.cosines.set_index(["layer", "head", "frequency"])
    layout = tt.RotaryLayout.of(model)
    random = []
    for seed in (4, 5, 6):
        with tt.SparseEdit.zero(model, mask.random_like(seed, match="matrix")).applied(model):
            random.append(tt.bos_angles(model, samples, position=1, show_progress=False).cosine)
    for state, block in (("before", nullcontext()), ("after", edit.applied(model))):
        with block:
            alone = [
                tt.bos_angles(model, samples[torch.tensor([n])], position=1, show_progress=False).cosine
                for n in range(23)
            ]
        for (layer, head, m), row in frame.iterrows():
            each = [float(one[layer][head, m]) for one in alone]
            groups = [np.mean(each[n::20]) for n in range(20)]
            reach = student.ppf(0.975, 19) * np.std(groups, ddof=1) / 20**0.5
            expected = (np.mean(each), np.mean(each) - reach, np.mean(each) + reach)
            own = (row[state], row[f"{state}_low"], row[f"{state}_high"])
            assert own == pytest.approx(expected, abs=1e-6)
            drawn = [float(one[layer][head, m]) for one in random]
            assert (row.random, row.random_low, row.random_high) == pytest.approx(
                (np.mean(drawn), min(drawn), max(drawn)), abs=1e-9
            )
            assert row.radians == pytest.approx(float(layout[layer].frequencies[m]))
            assert row.wavelength == pytest.approx(2 * np.pi / row.radians)
    assert len(frame) == 2 * 4 * 4
    # All dimensions are turned here, so a head's cosines sum to the cosine of one query's angle.
    two = some_samples((3,))
    angles = tt.bos_angles(model, two, position=1, show_progress=False)
    for layer, value in angles.cosine.items():
        expected_sum = angles.to_sink[layer][0].deg2rad().cos()
        torch.testing.assert_close(value.sum(1), expected_sum, rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", tiny.BACKENDS)
def test_effects_at_a_token_of_each_row_are_those_of_single_measures(backend: Any) -> None:
    model, samples = tiny.model("llama", backend, dtype=torch.float64), some_samples()
    at = torch.tensor([4, 0, 7])
    edit = tt.SparseEdit.zero(model, a_mask(model, share=0.05))
    found = tt.position_effects(model, samples, {"zero": edit}, position=at, **OPTIONS)
    assert found.meta["position"] == (4, 0, 7)
    options: dict[str, Any] = {"position": at, "show_progress": False}
    old = tt.sink_attention(model, samples, **options), tt.bos_angles(model, samples, **options)
    with edit.applied(model):
        new = tt.sink_attention(model, samples, **options), tt.bos_angles(model, samples, **options)
    heads = found.heads.set_index(["measure", "layer", "head"]).sort_index()
    for layer in range(2):
        change = (new[0].attention[layer] - old[0].attention[layer]).mean(0)
        assert heads.loc[("attention", layer)].change.tolist() == pytest.approx(change.tolist())
        turn = (new[1].to_sink[layer] - old[1].to_sink[layer]).mean(0)
        assert heads.loc[("angle", layer)].change.tolist() == pytest.approx(turn.tolist())
    shift = tt.sink_shift(old[0], new[0], eps=OPTIONS["eps"])
    assert found.sinks.shifted.tolist() == pytest.approx(shift.shifted.tolist(), nan_ok=True)
    # Positions are those of rows, whatever the order of the rows.
    turned = tt.position_effects(
        model, samples[torch.tensor([2, 0, 1])], {"zero": edit}, position=at[[2, 0, 1]], **OPTIONS
    )
    assert turned.heads.change.tolist() == pytest.approx(found.heads.change.tolist(), abs=1e-9)
    parts = tt.component_effects(model, samples, edit, position=at, **OPTIONS)
    assert parts.meta["position"] == (4, 0, 7)
    own = parts.frame[parts.frame.component == "whole"].set_index("measure")
    summary = found.summary.set_index("measure")
    for measure in summary.index:
        assert own.value[measure] == pytest.approx(summary.value[measure], abs=1e-9)


def test_without_rotation_only_sinks_are_measured() -> None:
    model = load_model(families.directory("GPT-2"), device="cpu")
    edit = tt.SparseEdit.zero(model, a_mask(model, share=0.05))
    found = tt.position_effects(model, some_samples(), {"zero": edit}, **{**OPTIONS, "eps": 0.05})
    assert set(found.summary.measure) == {"sinks_shifted", "sink_rate", "attention"}
    assert set(found.heads.measure) == {"attention"}
    for frame in (found.frequencies, found.cosines, found.by_frequency, found.shares, found.degrees):
        assert frame.empty
    assert set(found.ranks.matrix) == {"Q", "K"}  # which need no rotation
    assert found.meta["no_rotation"] == "it has no rotary frequencies"
    assert found.before.angles is None
    assert found.before.norms is None


def test_weights_come_back_and_what_cannot_be_measured_is_refused() -> None:
    model, samples = tiny.model("llama"), some_samples()
    edit = tt.SparseEdit.mean(model, a_mask(model))
    before = [parameter.clone() for parameter in model.parameters()]
    tt.position_effects(model, samples, {"mean": edit}, **OPTIONS)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    with pytest.raises(tt.TomsparseError, match="edits is empty"):
        tt.position_effects(model, samples, {}, **OPTIONS)
    with pytest.raises(tt.TomsparseError, match="has no rule of its own"):
        tt.position_effects(model, samples, {"back": edit.inverse}, **OPTIONS)
    with edit.applied(model), pytest.raises(tt.TomsparseError, match="active edit"):
        tt.position_effects(model, samples, {"mean": edit}, **OPTIONS)
