"""Angles and sinks against loops over positions in float64, and where the answer is known by construction."""

from __future__ import annotations

import math
from typing import Any

import families
import numpy as np
import pytest
import tiny
import torch
from family import common, made, rope
from scipy.stats import binom, bootstrap
from test_edit import a_mask
from test_rotary import SPIED, queries_and_keys, some_samples
from torch import Tensor
from transformers import AutoModelForCausalLM

import tl_tomsparse as tt
from tl_tomsparse import sink
from tl_tomsparse._intervals import mean_intervals
from tl_tomsparse._model import view
from tl_tomsparse.models import load_model
from tl_tomsparse.samples import Samples

CASES = [(name, backend) for name in SPIED for backend in tiny.BACKENDS]
CASES = [(n, b) for n, b in CASES if b == "bridge" or families.FAMILIES[n].hooked]
if "hooked" in tiny.BACKENDS:
    CASES = [case for case in CASES if case != ("Cohere", "bridge")]  # refused on TransformerLens 3.9


NORMED = ("Llama", "Qwen3", "Gemma 3", "Phi", "GLM-4")


def degrees(a: Tensor, b: Tensor) -> float:
    cosine = float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))
    return math.degrees(math.acos(max(-1.0, min(1.0, cosine))))


@pytest.mark.parametrize(("name", "backend"), CASES)
@pytest.mark.parametrize("position", [0, 3])
def test_angles_are_those_of_loops_over_positions(name: str, backend: Any, position: int) -> None:
    samples = some_samples()
    model = load_model(families.directory(name), backend=backend, device="cpu", dtype=torch.float64)
    options = {"position": position, "batch_tokens": 30, "show_progress": False}
    found = tt.bos_angles(model, samples, **options)
    for layer, rows in queries_and_keys(name, samples).items():
        heads = rows[0][0].shape[1]
        by_position: dict[tuple[int, int], list[float]] = {}
        for n, (q, k) in enumerate(rows):
            for head in range(heads):
                key = k[:, head // (heads // k.shape[1])]
                sink, others = [], []
                for at in range(position + 1, len(q)):
                    angle = degrees(q[at, head], key[position])
                    sink.append(angle)
                    by_position.setdefault((head, at), []).append(angle)
                    others += [degrees(q[at, head], key[s]) for s in range(at + 1) if s != position]
                assert float(found.to_sink[layer][n, head]) == pytest.approx(sum(sink) / len(sink), rel=1e-5)
                assert float(found.to_others[layer][n, head]) == pytest.approx(
                    sum(others) / len(others), rel=1e-5
                )
        for (head, at), angles in by_position.items():
            expected = sum(angles) / len(angles)
            assert float(found.by_position[layer][head, at]) == pytest.approx(expected, rel=1e-5)
        assert found.by_position[layer][:, : position + 1].isnan().all()
        for head in range(heads):
            every = [angle for (of, _), angles in by_position.items() if of == head for angle in angles]
            counts, _ = np.histogram(every, bins=180, range=(0, 180))
            assert found.degrees[layer][head].tolist() == counts.tolist()
    # What each frequency adds to the cosine.
    layout = tt.RotaryLayout.of(model)
    for layer, rows in queries_and_keys(name, samples).items():
        if layer not in layout:
            continue
        heads, pairs = rows[0][0].shape[1], layout[layer].pairs.tolist()
        for head in range(heads):
            means = []
            for q, k in rows:
                key = k[position, head // (heads // k.shape[1])]
                each = [
                    [
                        float(one[i] * key[i] + one[j] * key[j]) / float(one.norm() * key.norm())
                        for i, j in pairs
                    ]
                    for one in q[position + 1 :, head]
                ]
                means.append(np.mean(each, 0))
            np.testing.assert_allclose(found.cosine[layer][head], np.mean(means, 0), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("name", "backend"), [case for case in CASES if case[0] in NORMED])
def test_before_the_rotation_angles_are_those_of_what_is_turned_back(name: str, backend: Any) -> None:
    """Also where a norm comes before the rotation, where part of a head is turned, and in adjacent pairs."""
    samples = some_samples()
    model = load_model(families.directory(name), backend=backend, device="cpu", dtype=torch.float64)
    layout = tt.RotaryLayout.of(model)
    found = tt.bos_angles(model, samples, rotated=False, show_progress=False)
    for layer, rows in queries_and_keys(name, samples).items():
        for n, (q, k) in enumerate(rows):
            q, k = (turned_back(x, layout[layer]) for x in (q, k))
            for head in range(q.shape[1]):
                key = k[0, head // (q.shape[1] // k.shape[1])]
                each = [degrees(one, key) for one in q[1:, head]]
                found_here = float(found.to_sink[layer][n, head])
                assert found_here == pytest.approx(sum(each) / len(each), rel=1e-5)


def turned_back(x: Tensor, rotation: Any) -> Tensor:
    """Rotated queries or keys `[pos, heads, d_head]` without their rotation, number by number."""
    back = x.clone()
    for at in range(len(x)):
        for (i, j), theta in zip(rotation.pairs.tolist(), rotation.frequencies.tolist()):
            cosine, sine = math.cos(-at * theta), math.sin(-at * theta)
            back[at, :, i] = cosine * x[at, :, i] - sine * x[at, :, j]
            back[at, :, j] = sine * x[at, :, i] + cosine * x[at, :, j]
    return back


def test_hardly_any_rotation_leaves_angles_as_they_are(tmp_path: Any) -> None:
    """Positions divided by a thousand million: no query is turned, however far away."""
    config = made("Llama", **common(), **rope("linear", factor=1e9))()
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tiny.build_tokenizer().save_pretrained(tmp_path)
    model = load_model(tmp_path, device="cpu", dtype=torch.float64)
    layout = tt.RotaryLayout.of(model)
    assert layout[0].wavelengths.tolist() == pytest.approx([2e9 * math.pi * 10**m for m in range(4)])
    found = [
        tt.bos_angles(model, some_samples(), rotated=which, show_progress=False) for which in (True, False)
    ]
    for layer in (0, 1):
        torch.testing.assert_close(found[0].to_sink[layer], found[1].to_sink[layer], rtol=0, atol=1e-6)
        assert found[0].to_sink[layer].std() > 0.1


@pytest.mark.parametrize("backend", tiny.BACKENDS)
def test_before_the_rotation_angles_are_those_of_the_projections(backend: Any) -> None:
    model, samples = tiny.model("qwen2", backend, dtype=torch.float64), some_samples()
    found = tt.bos_angles(model, samples, rotated=False, show_progress=False)
    for n, mask in enumerate(samples.attention_mask):
        length = int(mask.sum())
        with torch.no_grad():
            _, cache = model.run_with_cache(samples.tokens[n : n + 1, :length])
        for layer in range(2):
            q, k = (cache[f"blocks.{layer}.attn.hook_{part}"][0] for part in "qk")
            for head in range(q.shape[1]):
                key = k[0, head // (q.shape[1] // k.shape[1])]
                each = [degrees(q[at, head], key) for at in range(1, length)]
                found_here = float(found.to_sink[layer][n, head])
                assert found_here == pytest.approx(sum(each) / len(each), rel=1e-5)


def test_a_query_that_always_points_at_the_first_key_has_angle_zero() -> None:
    """Queries are a bias alone, set to the key of the first token; without rotation nothing moves them."""
    model = tiny.model("qwen2", dtype=torch.float64)
    samples = some_samples()
    samples.tokens[:, 0] = 7
    attention = model.blocks[0].attn
    with torch.no_grad():
        _, cache = model.run_with_cache(samples.tokens[:1])
        key = cache["blocks.0.attn.hook_k"][0, 0]
        view(model).weight((0, "Q")).zero_()
        attention.q.original_component.bias.view(-1, key.shape[-1])[:] = key[0]
    found = tt.bos_angles(model, samples, rotated=False, show_progress=False)
    assert found.to_sink[0].abs().max() < 1e-3
    assert found.to_others[0].min() > 1
    turned = tt.bos_angles(model, samples, show_progress=False)
    assert turned.to_sink[0].min() > 1  # RoPE turns them away
    frame = found.to_frame()
    assert frame.query("layer == 0").to_sink.abs().max() < 1e-3
    assert (frame.to_sink_low <= frame.to_sink + 1e-9).all()
    assert (frame.to_sink <= frame.to_sink_high + 1e-9).all()


@pytest.mark.parametrize("name", ["Llama", "GPT-NeoX (Pythia)", "GPT-J", "GPT-2", "Bloom", "Gemma 2"])
@pytest.mark.parametrize("position", [0, 2])
def test_attention_to_a_token_is_that_of_single_rows(name: str, position: int) -> None:
    samples = some_samples()
    model = load_model(families.directory(name), device="cpu", dtype=torch.float64)
    found = tt.sink_attention(model, samples, position=position, batch_tokens=30, show_progress=False)
    for n, mask in enumerate(samples.attention_mask):
        length = int(mask.sum())
        with torch.no_grad():
            _, cache = model.run_with_cache(samples.tokens[n : n + 1, :length])
        for layer, values in found.attention.items():
            pattern = cache[f"blocks.{layer}.attn.hook_pattern"][0]
            for head in range(values.shape[1]):
                each = [float(pattern[head, at, position]) for at in range(position, length)]
                assert float(values[n, head]) == pytest.approx(sum(each) / len(each), abs=1e-6)
    assert len(found.attention) == 2


@pytest.mark.parametrize("name", ["Llama", "Gemma 2", "GPT-J"])
@pytest.mark.parametrize("rotated", [True, False])
@pytest.mark.parametrize("batch_tokens", [None, 20])
def test_a_token_of_each_row_is_measured_as_in_that_row_alone(
    name: str, rotated: bool, batch_tokens: int | None, monkeypatch: Any
) -> None:
    samples, at = some_samples((13, 9, 17, 11)), torch.tensor([11, 0, 3, 3], dtype=torch.int32)
    model = load_model(families.directory(name), device="cpu", dtype=torch.float64)
    options: dict[str, Any] = {"batch_tokens": batch_tokens, "show_progress": False}
    monkeypatch.setattr(sink, "_CELLS_ON_CPU", 500)  # a few queries at a time
    found = tt.bos_angles(model, samples, position=at, rotated=rotated, **options)
    attention = tt.sink_attention(model, samples, position=at, **options)
    assert found.position == attention.position == (11, 0, 3, 3)
    assert "the chosen token of each row" in repr(found)
    assert "the chosen token of each row" in repr(attention)
    alone = [samples[torch.tensor([n])] for n in range(4)]
    each = [
        tt.bos_angles(model, row, position=int(token), rotated=rotated, show_progress=False)
        for row, token in zip(alone, at)
    ]
    looks = [
        tt.sink_attention(model, row, position=int(token), show_progress=False)
        for row, token in zip(alone, at)
    ]
    for layer in found.to_sink:
        for n, (row, look) in enumerate(zip(each, looks)):
            for which in ("to_sink", "to_others"):
                own, expected = getattr(found, which)[layer][n], getattr(row, which)[layer][0]
                torch.testing.assert_close(own, expected, rtol=0, atol=1e-5)
            torch.testing.assert_close(
                attention.attention[layer][n], look.attention[layer][0], rtol=0, atol=1e-6
            )
            torch.testing.assert_close(found.cosine_groups[layer][n], row.cosine[layer], rtol=0, atol=1e-6)
        assert torch.equal(found.degrees[layer], sum(row.degrees[layer] for row in each))
        means = sum(row.cosine[layer] for row in each) / 4
        torch.testing.assert_close(found.cosine[layer], means, rtol=0, atol=1e-6)
        for place in range(17):
            there = [
                row.by_position[layer][:, place]
                for row, token, length in zip(each, at.tolist(), (13, 9, 17, 11))
                if token < place < length
            ]
            own = found.by_position[layer][:, place]
            if there:
                torch.testing.assert_close(own, torch.stack(there).mean(0), rtol=0, atol=1e-5)
            else:
                assert own.isnan().all()


def test_a_tensor_of_one_position_is_that_position() -> None:
    model, samples = tiny.model(), some_samples()
    options = {"show_progress": False}
    same = torch.full((3,), 2)
    first, second = (tt.sink_attention(model, samples, position=p, **options) for p in (2, same))
    assert first.position == second.position == 2
    assert tt.sink_shift(first, second, eps=0.0).shifted.eq(0).all()
    apart = tt.sink_attention(model, samples, position=torch.tensor([2, 1, 2]), **options)
    with pytest.raises(tt.TomsparseError, match=r"position=2 and position=\(2, 1, 2\)"):
        tt.sink_shift(first, apart)


@pytest.mark.parametrize(
    ("position", "said"),
    [
        (torch.tensor([0, 1]), r"shape \(2,\) and there are 3 rows"),
        (torch.tensor(1), r"shape \(\) and there are 3 rows"),
        (torch.tensor([[0], [1], [1]]), r"shape \(3, 1\) and there are 3 rows"),
        (torch.tensor([0.0, 1.0, 2.0]), "dtype torch.float32; positions are integers"),
        (torch.tensor([True, False, True]), "dtype torch.bool; positions are integers"),
        (torch.tensor([0, -1, 2]), r"position\[1\]=-1 must be at least 0 .* sample '1' has 9 tokens"),
        (torch.tensor([0, 3, 10]), r"position\[2\]=10 .* before the last token .* '2' has 11 tokens"),
        (torch.tensor([0, 10, 2]), r"position\[1\]=10 .* '1' has 9 tokens \(padding is none\)"),
        ([0, 1, 2], "position is a list; pass one int for all rows, or an integer tensor"),
    ],
)
def test_bad_positions_of_rows_are_refused(position: Any, said: str) -> None:
    model, samples = tiny.model(), some_samples()
    edit = tt.SparseEdit.mean(model, a_mask(model))
    for measure in (
        tt.bos_angles,
        tt.sink_attention,
        lambda *args, **options: tt.position_effects(*args, {"mask": edit}, **options),
        lambda *args, **options: tt.component_effects(*args, edit, **options),
    ):
        with pytest.raises(tt.TomsparseError, match=said):
            measure(model, samples, position=position)


def test_the_interval_of_the_rate_is_that_of_prompts_drawn_again() -> None:
    generator = torch.Generator().manual_seed(3)
    n = 12
    tendency = torch.rand(n, 1, generator=generator)  # prompts differ, so their heads go together
    values = {
        layer: (tendency * torch.rand(n, 4, generator=generator)).double().clamp(0, 0.999)
        for layer in range(3)
    }
    sinks = tt.SinkAttention(values, 0, True, tuple(map(str, range(n))))
    low, high = sinks.rate_interval(0.2, seed=7)
    each = [np.mean([float(a) > 0.2 for layer in range(3) for a in values[layer][row]]) for row in range(n)]
    assert sinks.rate(0.2) == pytest.approx(np.mean(each))
    counts = np.random.default_rng(7).multinomial(n, [1 / n] * n, 2000)
    drawn = [sum(k * one for k, one in zip(row, each)) / n for row in counts]
    assert (low, high) == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])))
    theirs = bootstrap(
        (each,), np.mean, n_resamples=20_000, method="percentile", random_state=0
    ).confidence_interval
    assert low == pytest.approx(theirs.low, abs=0.02)
    assert high == pytest.approx(theirs.high, abs=0.02)
    assert sinks.rate_interval(0.2, seed=7) == (low, high) != sinks.rate_interval(0.2, seed=8)
    frame = sinks.to_frame(eps=0.2, seed=7).set_index(["layer", "head"])
    for (layer, head), row in frame.iterrows():
        above = [float(float(a) > 0.2) for a in values[layer][:, head]]
        assert row.rate == pytest.approx(np.mean(above))
        # One yes or no a sample: at the ends, k of n is as likely as a tail of 2.5 % allows.
        k = int(sum(above))
        if k:
            assert binom.sf(k - 1, n, row.rate_low) == pytest.approx(0.025)
        if k < n:
            assert binom.cdf(k, n, row.rate_high) == pytest.approx(0.025)
        assert row.rate_low < row.rate_high
    alike = {0: torch.full((n, 4), 0.9).double(), 1: torch.full((n, 4), 0.1).double()}  # half of the heads
    low, high = tt.SinkAttention(alike, 0, True, sinks.ids).rate_interval()
    assert (low, high) == pytest.approx((0.5 * 0.025 ** (1 / n), 1 - 0.5 * 0.025 ** (1 / n)))
    with pytest.raises(tt.TomsparseError, match=r"lies in \[0, 1\)"):
        sinks.rate_interval(1.0)


def test_rates_and_shifts_are_counted() -> None:
    before = {0: torch.tensor([[0.9, 0.1], [0.5, 0.31]]), 1: torch.tensor([[0.2, 0.2], [0.2, 0.4]])}
    after = {0: torch.tensor([[0.5, 0.1], [0.505, 0.31]]), 1: torch.tensor([[0.9, 0.2], [0.2, 0.4]])}
    make = lambda values: tt.SinkAttention({k: v.double() for k, v in values.items()}, 0, True, ("a", "b"))  # noqa: E731
    first, second = make(before), make(after)
    assert first.rate() == 4 / 8
    assert first.rate(0.45) == 2 / 8
    shift = tt.sink_shift(first, second).set_index("layer")
    assert shift.sinks.tolist() == [3, 1, 4]
    assert shift.shifted.tolist() == pytest.approx([1 / 3, 0, 1 / 4])
    assert shift.mean_change[0] == pytest.approx((-0.4 + 0.005 + 0) / 3)
    assert tt.sink_shift(first, second, threshold=0.001).set_index("layer").shifted[0] == pytest.approx(2 / 3)
    nothing = tt.sink_shift(first, second, eps=0.95).set_index("layer")
    assert nothing.sinks.tolist() == [0, 0, 0]
    assert nothing.shifted.isna().all()
    frame = first.to_frame()
    assert frame.query("layer == 0").rate.tolist() == [1.0, 0.5]
    assert "BOS" in repr(first)
    for other, said in (
        (tt.SinkAttention(second.attention, 1, True, ("a", "b")), "position=0 and position=1"),
        (tt.SinkAttention(second.attention, 0, False, ("a", "b")), "bos=True and bos=False"),
        (tt.SinkAttention(second.attention, 0, True, ("a", "c")), "other samples"),
        (tt.SinkAttention({0: second.attention[0]}, 0, True, ("a", "b")), "other layers"),
    ):
        with pytest.raises(tt.TomsparseError, match=said):
            tt.sink_shift(first, other)
    with pytest.raises(tt.TomsparseError, match=r"lies in \[0, 1\)"):
        first.rate(1.5)


def test_angles_do_not_depend_on_how_many_queries_are_held_at_once(monkeypatch: Any) -> None:
    model, samples = tiny.model("llama"), some_samples()
    whole = tt.bos_angles(model, samples, show_progress=False)
    monkeypatch.setattr(sink, "_CELLS_ON_CPU", 1)
    by_one = tt.bos_angles(model, samples, show_progress=False)
    for layer, angles in whole.to_others.items():
        assert by_one.to_others[layer].numpy() == pytest.approx(angles.numpy(), abs=1e-4)
        assert torch.equal(by_one.to_sink[layer], whole.to_sink[layer])


def test_an_edit_is_seen_and_undone() -> None:
    model, samples = tiny.model("llama"), some_samples()
    edit = tt.SparseEdit.mean(model, a_mask(model))
    options = {"show_progress": False}
    plain = tt.sink_attention(model, samples, **options), tt.bos_angles(model, samples, **options)
    with edit.applied(model):
        edited = tt.sink_attention(model, samples, **options), tt.bos_angles(model, samples, **options)
    again = tt.sink_attention(model, samples, **options), tt.bos_angles(model, samples, **options)
    assert not torch.equal(plain[0].attention[1], edited[0].attention[1])
    assert not torch.equal(plain[1].to_sink[1], edited[1].to_sink[1])
    assert torch.equal(plain[0].attention[1], again[0].attention[1])
    assert torch.equal(plain[1].to_sink[1], again[1].to_sink[1])
    assert tt.sink_shift(plain[0], again[0], eps=0.0).shifted.eq(0).all()


def test_bad_positions_are_refused_and_a_missing_bos_is_said() -> None:
    model, samples = tiny.model(), some_samples()
    for position in (-1, 8, 20):
        for measure in (tt.bos_angles, tt.sink_attention):
            with pytest.raises(tt.TomsparseError, match="the shortest has 9 tokens"):
                measure(model, samples, position=position)
    assert "no BOS" in repr(tt.sink_attention(model, samples, show_progress=False))
    with pytest.raises(tt.TomsparseError, match="no rotary frequencies"):
        tt.bos_angles(load_model(families.directory("GPT-2"), device="cpu"), samples)


def test_bootstrap_of_means_covers_and_skips_what_is_missing() -> None:
    noise = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)).numpy()
    values = noise + np.arange(3)
    values[3:, 2] = float("nan")
    mean, low, high = mean_intervals(values)
    assert mean[:2] == pytest.approx(values[:, :2].mean(0))
    assert mean[2] == pytest.approx(values[:3, 2].mean())
    half = 1.96 * values[:, :2].std(0) / 50**0.5
    assert (high - low)[:2] / 2 == pytest.approx(half, rel=0.15)
    alone: Samples = some_samples((12,))
    angles = tt.bos_angles(tiny.model(), alone, show_progress=False).to_frame()
    assert angles.to_sink_low.to_numpy() == pytest.approx(angles.to_sink.to_numpy())
