"""Figures of heads hold the very numbers of the results."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
from test_head_protocol import made_mask
from test_locate import FEW, Planted

import tl_tomsparse as tt
from tl_tomsparse import plot


@pytest.fixture(scope="module")
def location():
    effects = {3: -1.5, 20: -1.2, 9: 0.6}
    meter, test = (Planted(effects, noise=0.05, seed=seed) for seed in (0, 1))
    return tt.locate_heads(meter, test=test, baselines=(), **FEW)


def test_the_map_has_every_head_and_frames_the_found(location):
    figure = plot.head_effects(location.effects)
    z = np.asarray(figure.data[0].z, dtype=np.float64)
    assert z.shape == (8, 8)
    for row in location.to_frame().itertuples():
        assert z[row.layer, row.head] == pytest.approx(row.effect, abs=1e-6)
        assert figure.data[0].customdata[row.layer, row.head][0].startswith(f"L{row.layer}H{row.head}")
    assert figure.data[0].zmin == -figure.data[0].zmax
    assert figure.data[0].colorscale[0][1] == "rgb(5,48,97)"  # blue below, red above
    boxes = {(shape.y0 + 0.5, shape.x0 + 0.5) for shape in figure.layout.shapes}
    assert boxes == set(location.effects.found) == {(0, 3), (2, 4), (1, 1)}


def test_a_map_of_layers_without_attention_leaves_them_out():
    heads = [(1, 0), (1, 1), (4, 0), (4, 1)]
    design = tt.knockout_design(heads, 60, share=0.5, kind="bernoulli")
    found = tt.recover_heads(tt.measure_knockouts(lambda out: 1.0 - out[:, 2], design))
    figure = plot.head_effects(found, value="estimate")
    assert list(figure.data[0].y) == ["1", "4"]
    assert figure.data[0].z[1][0] == pytest.approx(-1)


def test_predictions_are_held_out_ones(location):
    figure = plot.knockouts_predicted(location.effects)
    np.testing.assert_array_equal(figure.data[1].x, location.effects.predicted)
    np.testing.assert_array_equal(figure.data[1].y, location.effects.scores)
    assert f"{location.effects.r2:.2f}" in figure.layout.annotations[0].text
    design = tt.knockout_design([(0, head) for head in range(8)], 20, share=0.5)
    flat = tt.recover_heads(tt.measure_knockouts(lambda out: np.ones(len(out)), design))
    assert "never changes" in plot.knockouts_predicted(flat).layout.annotations[0].text


def test_the_path_has_both_kinds_of_prompts(location):
    figure = plot.recovery_path(location)
    found = [trace for trace in figure.data if trace.name == "found heads"]
    np.testing.assert_array_equal(found[0].y, location.path.score)
    np.testing.assert_array_equal(found[1].y, location.path.test_score)
    band = figure.data[0]
    n = len(location.path)
    np.testing.assert_array_equal(band.y[:n], location.path.random_high)
    np.testing.assert_array_equal(band.y[n:][::-1], location.path.random_low)
    assert list(found[0].marker.symbol)[: 1 + len(location.heads)] == ["circle"] * (1 + len(location.heads))
    alone = tt.locate_heads(Planted({}), baselines=(), **FEW)
    assert len({trace.xaxis for trace in plot.recovery_path(alone).data}) == 1


def test_dose_mask_and_section(location):
    model = tiny.model("llama")
    meter = tt.KnockoutMeter(model, [tiny.story(0), tiny.story(1)], show_progress=False)
    tasks = tt.head_tasks(meter)
    protocol = tt.paper_protocol(meter, tasks, n=20, n_random=3)
    figure = plot.dose_curve(protocol)
    found = [trace for trace in figure.data if trace.name == "found heads"]
    assert len(found) == len(tasks)
    for trace, task in zip(found, tasks):
        np.testing.assert_array_equal(trace.y, protocol.dose[protocol.dose.task == task].score)
    crossed = tt.heads_and_mask(model, made_mask(model), [(0, 3)], meter, n_random=3, show_progress=False)
    shares = plot.heads_and_mask(crossed)
    np.testing.assert_array_equal(shares.data[0].y, crossed.overlap.share)
    np.testing.assert_allclose(
        shares.data[1].y + shares.data[1].error_y.array, crossed.overlap.random_high, atol=1e-12
    )
    section = plot.heads_section(location, protocol=protocol, crossed=crossed)
    assert len(section["figures"]) == 5
    assert [claim.claim for claim in section["claims"]][:4] == [
        "heads_found", "more_than_random", "additive", "paper_protocol",
    ]  # fmt: skip
    assert section["frames"]["dose curve"] is protocol.dose
    assert set(plot.heads_section(location)["figures"]) < set(section["figures"])
