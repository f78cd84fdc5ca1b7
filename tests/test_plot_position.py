"""Figures of frequencies and sinks hold the very numbers of the results."""

from __future__ import annotations

import families
import numpy as np
import pandas as pd
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
    assert len(figure.data) == 1
    expected = torch.cat([before.rms[layer, part] for layer in range(2)]).numpy()
    np.testing.assert_allclose(cells(figure), expected, rtol=1e-6)
    assert list(figure.data[0].y)[:2] == ["L0H0", "L0H1"]
    turns = [float(name.split("a turn in ")[1].split(" ")[0].replace("k", "e3")) for name in figure.data[0].x]
    np.testing.assert_allclose(turns, before.layout[0].wavelengths, rtol=5e-3)
    assert list(figure.layout.xaxis.ticktext) == [_turn(float(wave)) for wave in before.layout[0].wavelengths]
    assert "fast" in figure.layout.xaxis.title.text.split("\N{LEFTWARDS ARROW}")[0]
    change = plot.frequency_norms(after, part=part, before=before)
    both = torch.cat([after.rms[layer, part] for layer in range(2)]).numpy()
    for panel, values in zip(change.data, (expected, both, both - expected), strict=True):
        np.testing.assert_allclose(panel.z, values, atol=1e-6)
    assert [panel.coloraxis for panel in change.data] == ["coloraxis", "coloraxis", "coloraxis2"]
    assert change.layout.coloraxis.cmax == pytest.approx(max(expected.max(), both.max()))
    assert change.layout.coloraxis2.cmin == -change.layout.coloraxis2.cmax
    assert plot.frequency_norms(before, before=before)  # no change at all is a figure, too
    with pytest.raises(tt.TomsparseError, match="part"):
        plot.frequency_norms(before, part="v")
    other = tt.frequency_norms(tiny.model("neox"), some_samples(), **QUIET)
    with pytest.raises(tt.TomsparseError, match="another model"):
        plot.frequency_norms(before, before=other)


def test_parts_of_the_cosine_and_their_change(model, edit):
    angles = tt.bos_angles(model, some_samples(), **QUIET)
    with edit.applied(model):
        turned = tt.bos_angles(model, some_samples(), **QUIET)
    before, after = (torch.cat([one.cosine[layer] for layer in range(2)]).numpy() for one in (angles, turned))
    alone, both = plot.bos_cosines(angles), plot.bos_cosines(angles, after=turned)
    np.testing.assert_allclose(cells(alone), before, rtol=1e-6)
    assert list(alone.data[0].y)[:2] == ["L0H0", "L0H1"]
    for panel, values in zip(both.data, (before, after, after - before), strict=True):
        np.testing.assert_allclose(panel.z, values, atol=1e-6)
    for colours in (alone.layout.coloraxis, both.layout.coloraxis, both.layout.coloraxis2):
        assert colours.cmin == -colours.cmax  # no part has the colour in the middle
    assert both.layout.coloraxis.cmax == pytest.approx(max(abs(before).max(), abs(after).max()))
    assert "the key of the first token" in alone.layout.coloraxis.colorbar.title.text
    with pytest.raises(tt.TomsparseError, match="rotated=True and rotated=False"):
        plot.bos_cosines(angles, after=tt.bos_angles(model, some_samples(), rotated=False, **QUIET))
    with pytest.raises(tt.TomsparseError, match="other samples"):
        plot.bos_cosines(angles, after=tt.bos_angles(model, some_samples((10, 12)), **QUIET))


def test_parts_of_the_cosine_of_a_large_model_are_means_over_heads():
    heads, pairs = 32, 64
    norms = large(1.0)
    cosine = {layer: torch.randn(heads, pairs).double() for layer in norms.layout}
    angles = tt.BosAngles({}, {}, {}, {}, cosine, {}, norms.layout, 0, True, True, ("a",))
    figure = plot.bos_cosines(angles)
    means = torch.stack([one.mean(0) for one in cosine.values()])
    np.testing.assert_allclose(cells(figure), means, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(figure.data[1 + 7].z, cosine[7], rtol=1e-5, atol=1e-6)
    assert size(figure) < 1


def _turn(wave: float) -> str:
    return f"{wave / 1000:.3g}k" if wave >= 999.5 else f"{wave:.3g}"


def test_layers_with_fewer_frequencies_leave_cells_empty():
    layers = {
        layer: RotaryLayer(torch.ones(n).double(), torch.arange(2 * n).view(n, 2), "adjacent")
        for layer, n in ((0, 2), (1, 4))
    }
    values = {(layer, part): torch.ones(3, n) for layer, n in ((0, 2), (1, 4)) for part in "qk"}
    norms = FrequencyNorms(RotaryLayout(layers, 8, {}), values, values, values, {}, {}, {}, 1, True)
    figure = plot.frequency_norms(norms)
    z, waves = cells(figure), np.asarray(figure.data[0].customdata, dtype=np.float64)
    assert np.isnan(z[:3, 2:]).all()
    np.testing.assert_allclose(waves[~np.isnan(z)], 2 * np.pi, rtol=1e-6)  # of one radian a token
    assert "a turn in %{customdata:.4g} tokens" in figure.data[0].hovertemplate
    assert not np.isnan(z[3:]).any()


def test_masks_by_frequency(model):
    frame = tt.mask_by_frequency(model, a_mask(model), n_random=20)
    figure = plot.mask_by_frequency(frame)
    for number, matrix in enumerate("QK"):
        part = frame[frame.matrix == matrix]
        band, bars = figure.data[2 * number : 2 * number + 2]
        assert list(bars.y) == part.entries.tolist()
        assert list(band.base) == part.random_low.tolist()
        np.testing.assert_allclose(
            np.asarray(band.base, dtype=float) + np.asarray(band.y), part.random_high.to_numpy()
        )
        assert [name.split(",")[0] for name in bars.x] == list(map(str, part.frequency))
    rows = tt.mask_by_frequency(model, a_mask(model), match="row", n_random=20)
    assert plot.mask_by_frequency(pd.concat([frame, rows])).to_json() == figure.to_json()
    half = load_model(families.directory("Phi"), device="cpu")
    labels = plot.mask_by_frequency(tt.mask_by_frequency(half, a_mask(half), n_random=5)).data[0].x
    assert [label.split(",")[0] for label in labels] == ["0", "1", "not rotated"]
    twice = pd.concat([frame.assign(edit="a"), frame.assign(edit="b")])
    with pytest.raises(tt.TomsparseError, match=r"several edits \(a, b\)"):
        plot.mask_by_frequency(twice)


def test_angles_and_sinks_and_their_change(model, edit):
    samples = some_samples()
    angles, sinks = tt.bos_angles(model, samples, **QUIET), tt.sink_attention(model, samples, **QUIET)
    with edit.applied(model):
        turned, moved = tt.bos_angles(model, samples, **QUIET), tt.sink_attention(model, samples, **QUIET)
    means = np.stack([angles.to_sink[layer].mean(0).numpy() for layer in range(2)])
    np.testing.assert_allclose(cells(plot.bos_angles(angles)), means, rtol=1e-6)
    after = np.stack([turned.to_sink[layer].mean(0).numpy() for layer in range(2)])
    both = plot.bos_angles(angles, after=turned)
    for panel, expected in zip(both.data, (means, after, after - means), strict=True):
        np.testing.assert_allclose(panel.z, expected, atol=1e-4)
    assert both.layout.coloraxis.cmin + both.layout.coloraxis.cmax == pytest.approx(180)
    assert both.layout.coloraxis2.cmin == -both.layout.coloraxis2.cmax
    # Nearer to the key is the same colour in all panels.
    assert not both.layout.coloraxis.reversescale
    assert not both.layout.coloraxis2.reversescale
    assert plot.sinks(sinks, after=moved).layout.coloraxis2.reversescale
    assert "key of the first token" in both.layout.coloraxis.colorbar.title.text
    share = np.stack([sinks.attention[layer].mean(0).numpy() for layer in range(2)])
    np.testing.assert_allclose(cells(plot.sinks(sinks)), share, rtol=1e-6)
    shift = np.stack([moved.attention[layer].mean(0).numpy() for layer in range(2)]) - share
    for panel, expected in zip(plot.sinks(sinks, after=moved).data, (share, share + shift, shift)):
        np.testing.assert_allclose(panel.z, expected, atol=1e-6)
    other = some_samples((10, 12))
    with pytest.raises(tt.TomsparseError, match="other samples"):
        plot.bos_angles(angles, after=tt.bos_angles(model, other, **QUIET))
    with pytest.raises(tt.TomsparseError, match="rotated=True and rotated=False"):
        plot.bos_angles(angles, after=tt.bos_angles(model, samples, rotated=False, **QUIET))
    with pytest.raises(tt.TomsparseError, match="other samples"):
        plot.sinks(sinks, after=tt.sink_attention(model, other, **QUIET))


def size(figure):
    """Megabytes of a figure without plotly.js."""
    return len(figure.to_html(include_plotlyjs=False)) / 1e6


def large(factor: float) -> FrequencyNorms:
    """Norms of 32 layers of 32 heads, key-value heads as many, with 64 frequencies."""
    heads, pairs, layers = 32, 64, 32
    frequencies = 10000.0 ** -(torch.arange(pairs).double() / pairs)
    dimensions = torch.arange(2 * pairs).view(2, pairs).T
    layout = {n: RotaryLayer(frequencies, dimensions, "half") for n in range(layers)}
    values = {(n, part): factor * torch.rand(heads, pairs).double() for n in range(layers) for part in "qk"}
    return FrequencyNorms(RotaryLayout(layout, 4096, {}), values, values, values, {}, {}, {}, 1, True)


def test_of_a_large_model_layers_come_first_and_each_layers_heads_on_request():
    before, after = large(1.0), large(0.9)
    figure = plot.frequency_norms(after, before=before)
    assert size(figure) < 2
    assert figure.layout.height < 900
    shown = [trace for trace in figure.data if trace.visible]
    assert len(shown) == 3
    mean = np.stack([(before.rms[layer, "q"].numpy() ** 2).mean(0) ** 0.5 for layer in range(32)])
    np.testing.assert_allclose(shown[0].z, mean, rtol=1e-6)
    buttons = figure.layout.updatemenus[0].buttons
    assert len(buttons) == 33
    visible = buttons[1 + 5].args[0]["visible"]
    assert sum(visible) == 3
    layer = [trace for trace, chosen in zip(figure.data, visible) if chosen]
    old, new = (one.rms[5, "q"].numpy() for one in (before, after))
    for trace, values in zip(layer, (old, new, new - old)):
        np.testing.assert_allclose(trace.z, values, rtol=1e-5, atol=1e-6)
    assert buttons[1 + 5].args[1]["yaxis.title.text"] == "layer 5, head"
    # What is shown has the whole range of the colours, not that of what is hidden.
    assert figure.layout.coloraxis.cmax == pytest.approx(mean.max())
    assert buttons[1 + 5].args[1]["coloraxis.cmax"] == pytest.approx(max(old.max(), new.max()))
    assert buttons[1 + 5].args[1]["coloraxis2.cmin"] == pytest.approx(-abs(new - old).max())
    assert size(plot.frequency_norms(before, part="k")) < 1


def test_maps_of_a_large_model_are_small():
    def values(top: float) -> dict[int, torch.Tensor]:
        return {layer: top * torch.rand(3, 32).double() for layer in range(32)}

    sinks = [tt.SinkAttention(values(0.6), 0, True, ("a", "b", "c")) for _ in range(2)]
    angles = [tt.BosAngles(values(170), *[{}] * 5, None, 0, True, True, ("a", "b", "c")) for _ in range(2)]
    for figure in (plot.sinks(sinks[0], after=sinks[1]), plot.bos_angles(angles[0], after=angles[1])):
        assert size(figure) < 0.2
        assert figure.layout.height < 900
    rows = {"frequency": range(64), "entries": 5, "random_low": 2.0, "random_high": 9.0, "random_mean": 5.0}
    rows |= {"match": "matrix", "enrichment": 1.0, "p": 0.5, "wavelength": 2.0 ** np.arange(64)}
    frame = pd.concat([pd.DataFrame({"matrix": matrix, **rows}) for matrix in "QK"])
    assert size(plot.mask_by_frequency(frame)) < 0.2


def test_histograms_of_angles(model, edit):
    found = tt.position_effects(
        model, some_samples(), {"mask": edit, "same": tt.SparseEdit.scale(model, edit.mask, 1.0)},
        n_random=2, n_draws=50, eps=0.2, **QUIET,
    )  # fmt: skip
    own = found.degrees[found.degrees.edit == "mask"]
    figure = plot.angle_histogram(own)
    kinds = ["sink", "all"]
    assert [trace.name for trace in figure.data] == ["random edits (range)", "unedited", "edited"] * 2
    for number, heads in enumerate(kinds):
        of = own[own.heads == heads].set_index("degree")
        band, old, new = figure.data[3 * number : 3 * number + 3]
        degrees = (np.asarray(old.x) - 0.5).astype(int)
        assert list(old.y) == of.before[degrees].tolist()
        assert list(new.y) == of.after[degrees].tolist()
        assert sum(old.y) == pytest.approx(1)
        assert list(band.y) == [*of.random_high[degrees], *of.random_low[degrees][::-1]]
    with pytest.raises(tt.TomsparseError, match=r"several edits \(mask, same\)"):
        plot.angle_histogram(found.degrees)


def test_a_histogram_of_the_angles_of_one_model(model):
    angles = tt.bos_angles(model, some_samples(), **QUIET)
    figure = plot.angle_histogram(angles)
    (line,) = figure.data
    counts = sum(count.sum(0) for count in angles.degrees.values()).numpy()
    shown = np.zeros(180)
    shown[(np.asarray(line.x) - 0.5).astype(int)] = line.y
    np.testing.assert_allclose(shown, counts / counts.sum())
    assert sum(line.y) == pytest.approx(1)
    assert [note.text for note in figure.layout.annotations] == ["all heads"]


@pytest.mark.parametrize("backend", tiny.BACKENDS)
def test_patterns_of_one_text_have_its_tokens_and_nothing_ahead(backend):
    model = tiny.model("llama", backend)
    samples = tt.text_samples(model, list(tiny.CORPUS), length=16)
    pattern = tt.attention_pattern(model, samples, [(0, 1), (1, 3)], sample=samples.ids[1])
    own = tt.SparseEdit.mean(model, a_mask(model))
    with own.applied(model):
        after = tt.attention_pattern(model, samples, [(1, 3)], sample=samples.ids[1])
    figure = plot.attention(pattern, layer=1, head=3, after=after)
    old, new = (one.of(1, 3).numpy() for one in (pattern, after))
    for trace, values in zip(figure.data, (old, new, new - old), strict=True):
        assert [len(row) for row in trace.z] == list(range(1, len(values) + 1))  # nothing above the diagonal
        for shown, whole in zip(trace.z, values):
            np.testing.assert_allclose(shown, whole[: len(shown)], atol=1e-4)
    assert [trace.visible for trace in figure.data] == [True, False, False]
    assert list(figure.layout.xaxis.ticktext) == list(pattern.tokens)
    assert len(plot.attention(pattern, layer=0, head=1).data) == 1
    with pytest.raises(tt.TomsparseError, match="no pattern of L0H2, only of L0H1, L1H3"):
        plot.attention(pattern, layer=0, head=2)
    other = tt.attention_pattern(model, samples, [(1, 3)])
    with pytest.raises(tt.TomsparseError, match="another text"):
        plot.attention(pattern, layer=1, head=3, after=other)


def test_patterns_of_a_long_text_are_small():
    long = torch.rand(400, 400).tril()
    pattern = tt.AttentionPattern(tuple("word" for _ in range(400)), {(0, 0): long})
    assert size(plot.attention(pattern, layer=0, head=0, after=pattern)) < 2


def test_effects_of_parts(model):
    edit = tt.SparseEdit.zero(model, a_mask(model).restrict(matrices=("Q",)))
    found = tt.component_effects(model, some_samples(), edit, n_random=2, n_draws=50, eps=0.2, **QUIET)
    figure = plot.component_effects(found, measures=["turn", "norm_q"])
    for number, measure in enumerate(("turn", "norm_q")):
        rows = found.frame[found.frame.measure == measure]
        full = rows[rows.note == ""]
        random, part, empty = figure.data[3 * number : 3 * number + 3]
        assert list(part.x) == full.value.tolist()
        np.testing.assert_allclose(np.asarray(part.x) + np.asarray(part.error_x.array), full.high)
        low = np.asarray(random.x) - np.asarray(random.error_x.arrayminus)
        np.testing.assert_allclose(low, full.random_low)
        assert {"K (0)", "not Q (0)"} <= set(empty.y)
        assert set(empty.text) == {"no entries"}
    order = list(figure.layout.yaxis.categoryarray)[::-1]
    assert order[:3] == [f"whole ({len(edit)})", f"Q ({len(edit)})", "not Q (0)"]
    assert len(plot.component_effects(found).data) == 3 * 2
    with pytest.raises(tt.TomsparseError, match="'reality', which was not taken; there are sinks_shifted"):
        plot.component_effects(found, measures=["reality"])
