"""Figures hold the very numbers of the results."""

from __future__ import annotations

import dataclasses

import numpy as np
import plotly.graph_objects as go
import plotly.io
import pytest
import torch

from tests import tiny
from tests.test_effect import ABLE, Planted
from tl_tomsparse import plot
from tl_tomsparse._checks import TomsparseError
from tl_tomsparse._intervals import proportion_interval
from tl_tomsparse._model import view
from tl_tomsparse.experiment import KappaSweep, kappa_sweep
from tl_tomsparse.mask import SparseMask
from tl_tomsparse.samples import story_samples, text_samples
from tl_tomsparse.sensitivity import fisher_diagonal


@pytest.fixture(autouse=True)
def nothing_is_shown(monkeypatch):
    monkeypatch.setattr(go.Figure, "show", lambda *_, **__: pytest.fail("shown"))
    before = plotly.io.templates.default, plotly.io.renderers.default
    yield
    assert (plotly.io.templates.default, plotly.io.renderers.default) == before


@pytest.fixture(scope="module")
def sweep() -> KappaSweep:
    model = tiny.model()
    stories = [tiny.story(number) for number in range(4)]
    text = text_samples(model, " ".join(tiny.CORPUS * 4), length=16)
    tom = fisher_diagonal(model, story_samples(model, stories), show_progress=False)
    general = fisher_diagonal(model, text, show_progress=False)
    dev = [dataclasses.replace(tiny.story(number), split="dev") for number in range(6)]
    return kappa_sweep(
        model, tom, general, dev_stories=dev, dev_text=text, kappas=(2e-3, 0.05),
        n_random=4, show_progress=False,
    )  # fmt: skip


def trace(figure: go.Figure, name: str, legend: str | None = None) -> go.Scatter:
    (found,) = (one for one in figure.data if one.name == name and legend in (None, one.legend or "legend"))
    return found


def test_the_sweep_is_drawn_as_it_is(sweep):
    figure = plot.kappa_sweep(sweep, chosen=0.05)
    assert isinstance(figure, go.Figure)
    mask = sweep.arm("mask")
    for measure in ("false_belief", "true_belief", "reality", "memory", "second_order", "paired"):
        line = trace(figure, plot.LABELS[measure])
        np.testing.assert_array_equal(line.y, mask[measure])
        assert [row[0] for row in line.customdata] == list(mask.index)
        assert [row[1] for row in line.customdata] == list(mask.n_weights)
    for arm in ("mask", "general_only", "tom_only"):
        line = trace(figure, plot.LABELS[arm], "legend2")
        np.testing.assert_array_equal(line.y, sweep.arm(arm).perplexity)
    main = trace(figure, "false belief")
    n = sweep.n["false_belief"]
    for share, up, down in zip(main.y, main.error_y.array, main.error_y.arrayminus):
        assert (share - down, share + up) == pytest.approx(proportion_interval(round(share * n), n))


def test_the_band_spans_all_random_masks(sweep):
    figure = plot.kappa_sweep(sweep)
    random = sweep.frame[sweep.frame.arm == "random"].groupby("kappa")
    for legend, measure in (("legend", "false_belief"), ("legend2", "perplexity")):
        band = trace(figure, "4 random masks", legend)
        high, low = np.split(np.array(band.y), 2)
        np.testing.assert_array_equal(high, random[measure].max())
        np.testing.assert_array_equal(low[::-1], random[measure].min())


def test_the_chosen_kappa_is_marked_and_others_are_refused(sweep):
    assert not plot.kappa_sweep(sweep).layout.annotations
    figure = plot.kappa_sweep(sweep, chosen=0.05)
    (mark,) = figure.layout.annotations
    place = figure.layout.xaxis.tickvals.index(mark.x)
    assert figure.layout.xaxis.ticktext[place].startswith("0.05<br>")
    assert sum(shape.x0 == shape.x1 == mark.x for shape in figure.layout.shapes) == 2
    with pytest.raises(TomsparseError, match=r"chosen=0\.3 is not a kappa of the sweep"):
        plot.kappa_sweep(sweep, chosen=0.3)


def test_a_category_that_is_not_asked_is_left_out(sweep):
    frame = sweep.frame.assign(memory=np.nan)
    names = {one.name for one in plot.kappa_sweep(KappaSweep(frame, sweep.n, sweep.meta)).data}
    assert "memory" not in names
    assert "reality" in names


@pytest.mark.parametrize(
    ("low", "high"),
    [(13.2, 13.2), (13.2, 13.4), (110.0, 125.0), (3.0, 70.0), (2.0, 1e6), (9.99, 10.01), (1.0, 1.0)],
)
def test_perplexity_ticks_are_few_round_and_in_sight(low, high):
    ticks = plot._log_ticks(low, high)
    assert (1 if low == high else 2) <= len(ticks) <= 9
    assert ticks == sorted(set(ticks))
    assert min(ticks) <= 10 * low
    assert max(ticks) >= high / 10
    assert sum(0.98 * low <= tick <= 1.02 * high for tick in ticks) >= 1


def test_accuracy_has_the_intervals_of_the_table():
    found = Planted().effect(ABLE, {"false_belief": 0.4}, {})
    figure = plot.accuracy(found)
    for arm, label in (
        ("before", "unedited"),
        ("mask", "mask (40 weights)"),
        ("random", "random masks (40 weights)"),
    ):
        rows = found.accuracy[found.accuracy.arm == arm]
        points = trace(figure, label)
        np.testing.assert_array_equal(points.y, rows.accuracy)
        np.testing.assert_allclose(np.add(points.y, points.error_y.array), rows.high)
        np.testing.assert_allclose(np.subtract(points.y, points.error_y.arrayminus), rows.low)
        assert [row[2] for row in points.customdata] == list(rows.interval)
    chances = [shape.y0 for shape in figure.layout.shapes]
    assert chances == list(found.accuracy[found.accuracy.arm == "before"].chance)


def a_mask(shapes: dict[tuple[int, str], tuple[int, ...]], share: float = 0.01) -> SparseMask:
    generator = torch.Generator().manual_seed(0)
    entries = {}
    for key, shape in shapes.items():
        size = torch.Size(shape).numel()
        entries[key] = torch.randperm(size, generator=generator)[: round(share * size)].sort().values
    return SparseMask(entries=entries, identity=view(tiny.model()).identity(), shapes=shapes)


def test_places_are_the_counts_of_the_mask():
    shapes = {}
    for layer in range(3):
        shapes |= {(layer, name): (4, 32, 8) for name in "QO"} | {(layer, name): (2, 32, 8) for name in "KV"}
        shapes |= {(layer, name): (32, 48) for name in ("gate", "in")} | {(layer, "out"): (48, 32)}
    mask = a_mask(shapes)
    figure = plot.mask_places(mask)
    by_head = mask.counts("head")
    assert len(figure.data) == 7
    for panel, matrix in zip(figure.data, ("Q", "K", "V", "O", "gate", "in", "out")):
        assert f"W_{matrix}" in panel.hovertemplate
        for layer, row in zip(panel.y, panel.z):
            if len(shapes[0, matrix]) == 3:
                assert list(row) == [by_head[layer, matrix, head] for head in range(shapes[0, matrix][0])]
            else:
                assert list(row) == [len(mask.entries[layer, matrix])]
    assert sum(sum(sum(row) for row in panel.z) for panel in figure.data) == len(mask)


def test_places_of_many_heads_and_of_some_matrices_only():
    large = plot.mask_places(a_mask({(layer, "Q"): (32, 8, 8) for layer in range(32)}))
    assert np.shape(large.data[0].z) == (32, 32)
    assert large.data[0].texttemplate is None
    assert large.layout.height < 1000
    assert np.shape(plot.mask_places(a_mask({(5, "in"): (32, 48)})).data[0].z) == (1, 1)
    with pytest.raises(TomsparseError, match="mask is empty"):
        plot.mask_places(a_mask({(0, "Q"): (2, 8, 8)}, share=0))
