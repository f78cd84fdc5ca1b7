"""Masks by frequency and their ranks, against counting by hand and where the answer is known."""

from __future__ import annotations

import math
from typing import Any

import families
import numpy as np
import pandas as pd
import pytest
import scipy.stats
import tiny
import torch
from test_edit import a_mask
from test_rotary import some_samples

import tl_tomsparse as tt
from tl_tomsparse import enrichment
from tl_tomsparse._model import view
from tl_tomsparse.models import load_model


def masked(model: Any, key: tuple[int, str], *entries: tuple[int, int, int]) -> tt.SparseMask:
    chosen = torch.zeros(view(model).shape(key), dtype=torch.bool)
    for entry in entries:
        chosen[entry] = True
    return tt.SparseMask.from_bool(model, {key: chosen})


@pytest.mark.parametrize(("name", "adjacent", "turned"), [("Llama", False, 8), ("GPT-J", True, 4)])
def test_counts_are_those_by_hand(name: str, adjacent: bool, turned: int) -> None:
    model = load_model(families.directory(name), device="cpu")
    mask = a_mask(model, share=0.05)
    found = tt.mask_by_frequency(model, mask, n_random=30).set_index(["matrix", "frequency"])
    n = turned // 2
    for matrix in "QK":
        expected = dict.fromkeys([*range(n), -1], 0)
        for layer in range(2):
            for _, _, d in mask.to_bool((layer, matrix)).nonzero().tolist():
                m = -1 if d >= turned else (d // 2 if adjacent else d % n)
                expected[m] += 1
        for m, entries in expected.items():
            if (matrix, m) in found.index:
                row = found.loc[matrix, m]
                assert row.entries == entries
                assert row.share == pytest.approx(entries / sum(expected.values()))
                assert row.random_low <= row.random_mean <= row.random_high
                assert row.enrichment == pytest.approx(entries / row.random_mean)
                assert row.enrichment_low == pytest.approx(entries / row.random_high)
                high = entries / row.random_low if row.random_low else np.nan
                assert row.enrichment_high == pytest.approx(high, nan_ok=True)
            else:
                assert (m, entries) == (-1, 0)


@pytest.mark.parametrize("match", ["matrix", "row", "column"])
def test_drawn_counts_are_distributed_as_those_of_random_masks(match: Any) -> None:
    model = load_model(families.directory("GPT-J"), device="cpu")
    full = [(head, 3, d) for head in range(4) for d in range(8)]
    mask = a_mask(model, share=0.02) | masked(model, (0, "Q"), *full)
    expected = tt.mask_by_frequency(model, mask, match=match, n_random=4000)
    masks = (mask.random_like(seed, match=match) for seed in range(400))
    made = np.array([tt.mask_by_frequency(model, one, n_random=1).entries for one in masks])
    error = made.std(0) / 400**0.5
    assert (np.abs(made.mean(0) - expected.random_mean) <= 4 * error + 1e-9).all()
    for quantile, column in ((0.025, "random_low"), (0.975, "random_high")):
        assert (np.abs(np.quantile(made, quantile, axis=0) - expected[column]) <= 3).all()
    if match == "row":  # channel 3 is full, so a quarter of its entries is known
        low = tt.mask_by_frequency(model, mask, match="matrix").query("matrix == 'Q'").random_low.min()
        assert expected.query("matrix == 'Q'").random_low.min() > low


def test_entries_at_frequencies_are_those_by_hand() -> None:
    model = load_model(families.directory("GPT-J"), device="cpu")
    mask = a_mask(model, share=0.05)
    pairs = tt.RotaryLayout.of(model)[0].pairs.tolist()
    for chosen in ([1], [0, 1]):
        kept = tt.at_frequencies(model, mask, chosen).to_frame()
        rows = mask.to_frame().query("matrix in ['Q', 'K']")
        rows = rows[rows.col.isin([d for m in chosen for d in pairs[m]])]
        assert kept.flat.tolist() == rows.flat.tolist()
    norms = tt.frequency_norms(model, some_samples(), show_progress=False)
    dominant = norms.dominant(top=1)
    strongest = {(row.layer, row.part.upper(), row.head): row.frequency for row in dominant.itertuples()}
    expected = []
    for row in mask.to_frame().itertuples():
        m = strongest.get((row.layer, row.matrix, row.head))
        if m is not None and row.col in pairs[m]:
            expected.append(row.flat)
    kept = tt.at_frequencies(model, mask, dominant)
    assert kept.to_frame().flat.tolist() == expected
    assert len(mask - kept) == len(mask) - len(kept)
    share = tt.share_at_frequencies(model, mask, dominant).set_index("match")
    n = len(mask.restrict(matrices=("Q", "K")))
    assert (share.entries == len(expected)).all()
    assert share.share.to_numpy() == pytest.approx(len(expected) / n)
    made = [len(tt.at_frequencies(model, mask.random_like(seed), dominant)) / n for seed in range(200)]
    assert share.random_mean["matrix"] == pytest.approx(np.mean(made), abs=4 * np.std(made) / 200**0.5)


@pytest.mark.parametrize("name", ["Llama", "Phi", "Llama, yarn"])
def test_slow_and_fast_halves(name: str) -> None:
    model = load_model(families.directory(name), device="cpu")
    layer = tt.RotaryLayout.of(model)[0]
    slow = layer.slow.tolist()
    half = len(slow) // 2
    assert sorted(range(len(slow)), key=lambda m: float(layer.wavelengths[m]))[-half:] == [
        m for m, chosen in enumerate(slow) if chosen
    ]
    mask = a_mask(model, share=0.1)
    for which in ("slow", "fast"):
        numbers = [m for m, chosen in enumerate(slow) if chosen == (which == "slow")]
        assert tt.at_frequencies(model, mask, which) == tt.at_frequencies(model, mask, numbers)
    with pytest.raises(tt.TomsparseError, match="frequencies='mild' is not one of"):
        tt.at_frequencies(model, mask, "mild")  # type: ignore[arg-type]


def test_a_mask_at_the_dominant_frequencies_is_found_there() -> None:
    model = tiny.model("llama")
    dominant = tt.frequency_norms(model, some_samples(), show_progress=False).dominant(top=1)
    whole = a_mask(model, share=0.3)
    there = tt.at_frequencies(model, whole, dominant)
    share = tt.share_at_frequencies(model, there, dominant)
    assert (share.share == 1).all()
    assert (share.p < 0.01).all()
    assert (share.random_high < 0.6).all()
    nowhere = tt.share_at_frequencies(model, whole - there, dominant)
    assert (nowhere.share == 0).all()


@pytest.mark.parametrize(
    ("frequencies", "message"),
    [
        ([9], "no frequency 9 in head 0 of matrix Q of layer 0; it has 4 heads with 4 frequencies"),
        (pd.DataFrame({"layer": [0], "head": [0], "frequency": [0]}), "no column 'part'"),
        (pd.DataFrame({"layer": [0], "part": ["k"], "head": [7], "frequency": [0]}), "head 7 of matrix K"),
    ],
)
def test_frequencies_that_are_not_there_are_refused(frequencies: Any, message: str) -> None:
    model = tiny.model("llama")
    with pytest.raises(tt.TomsparseError, match=message):
        tt.at_frequencies(model, a_mask(model), frequencies)


def test_a_mask_on_one_frequency_is_enriched_there_and_nowhere_else() -> None:
    model = tiny.model("llama")
    dims = tt.RotaryLayout.of(model)[0].pairs[2].tolist()
    entries = [(head, row, dim) for head in range(4) for row in range(0, 30, 3) for dim in dims]
    mask = masked(model, (0, "Q"), *entries)
    found = tt.mask_by_frequency(model, mask, n_random=200).set_index("frequency")
    assert found.share.tolist() == [0, 0, 1, 0]
    assert found.enrichment[2] == pytest.approx(4, rel=0.1)
    assert found.p[2] == pytest.approx(2 / 201)
    assert (found.p[[0, 1, 3]] < 0.05).all()
    assert found.radians.tolist() == pytest.approx([1, 0.1, 0.01, 0.001])
    same = tt.mask_by_frequency(model, mask, match="column", n_random=20).set_index("frequency")
    assert same.random_mean.tolist() == same.entries.tolist()  # output channels are the mask's own


def test_a_random_mask_is_not_enriched() -> None:
    model = tiny.model("llama")
    p = [
        tt.mask_by_frequency(model, a_mask(model, seed=seed).random_like(1000), n_random=100).p.min()
        for seed in range(8)
    ]
    assert sum(value < 0.01 for value in p) <= 2  # eight frequencies each, so few are small


def test_ranks_are_those_of_whole_matrices() -> None:
    model = tiny.model("qwen2")
    mask = a_mask(model, share=0.02)
    found = tt.mask_rank(model, mask, n_random=3).set_index(["layer", "matrix"])
    for (layer, matrix), row in found.query("layer >= 0").iterrows():
        weight = view(model).weight((layer, matrix)).double() * mask.to_bool((layer, matrix))
        flat = weight.transpose(0, 1).flatten(1)  # d_model by heads times d_head
        assert row["rank"] == torch.linalg.matrix_rank(flat)
        for match in ("matrix", "row", "column"):
            named = f"random_{match}"
            assert row[f"{named}_low"] <= row[named] <= row[f"{named}_high"]
    for matrix in "QK":
        each = found.query("layer >= 0").xs(matrix, level="matrix")
        mean = found.loc[-1, matrix]
        assert mean["rank"] == each["rank"].mean()
        assert mean.random_row == pytest.approx(each.random_row.mean())
        assert (mean.as_low_row == 3) == (mean.random_row_high <= mean["rank"])


def test_one_input_channel_has_rank_one_and_so_has_every_mask_matched_by_row() -> None:
    model = tiny.model("llama")
    mask = masked(model, (0, "Q"), *((head, 7, dim) for head in range(4) for dim in range(5)))
    row = tt.mask_rank(model, mask, n_random=5).iloc[0]
    assert row["rank"] == row.random_row_low == row.random_row_high == 1
    assert row.random_matrix_low > 5


def test_a_low_rank_is_told_from_that_of_random_masks() -> None:
    model = tiny.model("llama")
    block = [(head, row, dim) for head in range(4) for row in range(4) for dim in (0, 1)]
    low = tt.mask_rank(model, masked(model, (0, "Q"), *block)).iloc[-1]
    assert low["rank"] == 4  # four input channels, which random masks matched by row have, too
    assert low.p_row == 1
    assert low.p_column < 0.05
    assert low.p_matrix < 1e-3
    drawn = [float(n) for n in (7, 8, 9, 8)]
    ours = enrichment._p_lower(6.0, np.array(drawn))
    spread = math.sqrt((np.var(drawn, ddof=1) + 1 / 12) * (1 + 1 / 4))
    assert ours == pytest.approx(2 * scipy.stats.t.cdf((6 - 8) / spread, 3))
    assert math.isnan(enrichment._p_lower(6.0, np.array([8.0])))
    random = a_mask(model, share=0.02).random_like(77)
    found = tt.mask_rank(model, random).query("layer == -1")
    assert (found[["p_matrix", "p_row", "p_column"]] > 0.01).all(axis=None)


def test_random_masks_may_leave_a_matrix_empty_and_one_kind_may_be_a_string() -> None:
    model = tiny.model("llama")
    keys = {
        key: torch.zeros(view(model).shape(key), dtype=torch.bool) for key in view(model).keys(("Q", "K"))
    }
    keys[0, "Q"].view(-1)[:3] = True
    mask = tt.SparseMask.from_bool(model, keys)
    found = tt.mask_rank(model, mask, matches="total", n_random=5)
    assert found.random_total_low.iloc[0] == 0
    assert found.layer.tolist() == [0, -1]
    everything = tt.SparseEdit.scale(model, a_mask(model), 0.0)
    with everything.applied(model), pytest.raises(tt.TomsparseError, match="active edit"):
        tt.mask_rank(model, a_mask(tiny.model("llama")))


def test_refusals() -> None:
    model = tiny.model("llama")
    only_out = tt.SparseMask.from_bool(model, {(0, "out"): torch.ones(view(model).shape((0, "out"))).bool()})
    for measure in (tt.mask_by_frequency, tt.mask_rank):
        with pytest.raises(tt.TomsparseError, match="no entries in Q and K"):
            measure(model, only_out)
        with pytest.raises(tt.TomsparseError, match="n_random"):
            measure(model, a_mask(model), n_random=0)
        with pytest.raises(tt.TomsparseError, match="The mask"):
            measure(tiny.model("llama", seed=1), a_mask(model))
    with pytest.raises(tt.TomsparseError, match="matches"):
        tt.mask_rank(model, a_mask(model), matches=("head",))  # type: ignore[arg-type]
    bare = load_model(families.directory("GPT-2"), device="cpu")
    with pytest.raises(tt.TomsparseError, match="no rotary frequencies"):
        tt.mask_by_frequency(bare, a_mask(bare))
