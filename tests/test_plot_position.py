"""Figures of frequencies and sinks hold the very numbers of the results."""

from __future__ import annotations

import families
import numpy as np
import pytest
import tiny
import torch
from test_edit import a_mask
from test_rotary import some_samples

import tl_tomsparse as tt
from tl_tomsparse import plot
from tl_tomsparse.models import load_model
from tl_tomsparse.rotary import FrequencyNorms, RotaryLayer, RotaryLayout

QUIET = {"show_progress": False}


@pytest.fixture(scope="module")
def model():
    return tiny.model("llama")


@pytest.fixture(scope="module")
def edit(model):
    return tt.SparseEdit.mean(model, a_mask(model))


def cells(figure):
    return np.asarray(figure.data[0].z, dtype=np.float64)


@pytest.mark.parametrize("part", ["q", "k"])
def test_norms_and_their_change(model, edit, part):
    before = tt.frequency_norms(model, some_samples(), **QUIET)
    with edit.applied(model):
        after = tt.frequency_norms(model, some_samples(), **QUIET)
    figure = plot.frequency_norms(before, part=part)
    expected = torch.cat([before.rms[layer, part] for layer in range(2)]).numpy()
    np.testing.assert_allclose(cells(figure), expected, rtol=1e-6)
    assert list(figure.data[0].y)[:2] == ["L0H0", "L0H1"]
    np.testing.assert_allclose(figure.data[0].customdata[0], before.layout[0].wavelengths, rtol=1e-6)
    change = plot.frequency_norms(after, part=part, before=before)
    both = torch.cat([after.rms[layer, part] for layer in range(2)]).numpy()
    np.testing.assert_allclose(cells(change), both - expected, atol=1e-6)
    assert change.data[0].zmin == -change.data[0].zmax
    assert plot.frequency_norms(before, before=before)  # no change at all is a figure, too
    with pytest.raises(tt.TomsparseError, match="part"):
        plot.frequency_norms(before, part="v")
    other = tt.frequency_norms(tiny.model("neox"), some_samples(), **QUIET)
    with pytest.raises(tt.TomsparseError, match="another model"):
        plot.frequency_norms(before, before=other)


def test_layers_with_fewer_frequencies_leave_cells_empty():
    layers = {
        layer: RotaryLayer(torch.ones(n).double(), torch.arange(2 * n).view(n, 2), "adjacent")
        for layer, n in ((0, 2), (1, 4))
    }
    values = {(layer, part): torch.ones(3, n) for layer, n in ((0, 2), (1, 4)) for part in "qk"}
    norms = FrequencyNorms(RotaryLayout(layers, 8, {}), values, values, values, {}, {}, {}, 1, True)
    z = cells(plot.frequency_norms(norms))
    assert np.isnan(z[:3, 2:]).all()
    assert not np.isnan(z[3:]).any()


def test_masks_by_frequency(model):
    frame = tt.mask_by_frequency(model, a_mask(model), n_random=20)
    figure = plot.mask_by_frequency(frame)
    for number, matrix in enumerate("QK"):
        part = frame[frame.matrix == matrix]
        bars, random = figure.data[2 * number : 2 * number + 2]
        assert list(bars.y) == part.entries.tolist()
        assert list(random.y) == part.random_mean.tolist()
        np.testing.assert_allclose(
            np.asarray(random.y) + np.asarray(random.error_y.array), part.random_high.to_numpy()
        )
    half = load_model(families.directory("Phi"), device="cpu")
    labels = plot.mask_by_frequency(tt.mask_by_frequency(half, a_mask(half), n_random=5)).data[0].x
    assert list(labels) == ["0", "1", "not rotated"]


def test_angles_and_sinks_and_their_change(model, edit):
    samples = some_samples()
    angles, sinks = tt.bos_angles(model, samples, **QUIET), tt.sink_attention(model, samples, **QUIET)
    with edit.applied(model):
        turned, moved = tt.bos_angles(model, samples, **QUIET), tt.sink_attention(model, samples, **QUIET)
    means = np.stack([angles.to_sink[layer].mean(0).numpy() for layer in range(2)])
    np.testing.assert_allclose(cells(plot.bos_angles(angles)), means, rtol=1e-6)
    after = np.stack([turned.to_sink[layer].mean(0).numpy() for layer in range(2)])
    np.testing.assert_allclose(cells(plot.bos_angles(angles, after=turned)), after - means, atol=1e-4)
    share = np.stack([sinks.attention[layer].mean(0).numpy() for layer in range(2)])
    np.testing.assert_allclose(cells(plot.sinks(sinks)), share, rtol=1e-6)
    shift = np.stack([moved.attention[layer].mean(0).numpy() for layer in range(2)]) - share
    np.testing.assert_allclose(cells(plot.sinks(sinks, after=moved)), shift, atol=1e-6)
    other = some_samples((10, 12))
    with pytest.raises(tt.TomsparseError, match="other samples"):
        plot.bos_angles(angles, after=tt.bos_angles(model, other, **QUIET))
    with pytest.raises(tt.TomsparseError, match="rotated=True and rotated=False"):
        plot.bos_angles(angles, after=tt.bos_angles(model, samples, rotated=False, **QUIET))
    with pytest.raises(tt.TomsparseError, match="other samples"):
        plot.sinks(sinks, after=tt.sink_attention(model, other, **QUIET))


def test_a_large_model_is_a_figure_of_less_than_two_megabytes():
    heads, pairs, layers = 32, 64, 32
    layout = {
        n: RotaryLayer(
            10000.0 ** -(torch.arange(pairs).double() / pairs), torch.zeros(pairs, 2).long(), "half"
        )
        for n in range(layers)
    }
    values = {(n, part): torch.rand(heads, pairs).double() for n in range(layers) for part in "qk"}
    norms = FrequencyNorms(RotaryLayout(layout, 4096, {}), values, values, values, {}, {}, {}, 1, True)
    html = plot.frequency_norms(norms).to_html(include_plotlyjs=False)
    assert len(html) < 2e6
