"""Rotary frequencies against their formulas, written out by hand for every family; norms and logits by
frequency against loops over positions in float64.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import families
import numpy as np
import oracles
import pytest
import scipy.stats
import tiny
import torch
from families import FAMILIES
from family import D_HEAD, LAYERS, common, made, rope, without
from test_families import CASES, dtype_of, load, original
from torch import Tensor

import tl_tomsparse as tt
from tl_tomsparse._model import view
from tl_tomsparse.models import load_model
from tl_tomsparse.samples import Samples

ROTARY = [(name, backend) for name, backend in CASES if FAMILIES[name].positions == "rotary"]


def frequencies(name: str, layer: int) -> list[float]:
    """Radians a position: base^(-2m / rotary_dim), then what the family's scaling says."""
    family = FAMILIES[name]
    if family.frequencies is not None:
        return family.frequencies[layer]
    base = family.base[layer] if isinstance(family.base, tuple) else family.base
    n = family.rotary_dim
    plain = [base ** (-2 * m / n) for m in range(n // 2)]
    if "linear" in name:
        return [theta / 2 for theta in plain]
    if "llama3" in name:  # factor 8, low 1, high 4, made for 64 tokens
        scaled = []
        for theta in plain:
            turns = 64 * theta / (2 * math.pi)
            smooth = min(1.0, max(0.0, (turns - 1) / (4 - 1)))
            scaled.append((1 - smooth) * theta / 8 + smooth * theta)
        return scaled
    if "yarn" in name:  # factor 4, made for 32 tokens, beta 32 and 1

        def dimension(turns: float) -> float:
            return n * math.log(32 / (turns * 2 * math.pi)) / (2 * math.log(base))

        low, high = max(math.floor(dimension(32)), 0), min(math.ceil(dimension(1)), n - 1)
        ramp = [min(1.0, max(0.0, (m - low) / (high - low))) for m in range(n // 2)]
        return [theta / 4 * r + theta * (1 - r) for theta, r in zip(plain, ramp)]
    return plain


@pytest.mark.parametrize(("name", "backend"), ROTARY)
def test_frequencies_and_pairs_are_those_of_the_formulas(name: str, backend: Any) -> None:
    model = load_model(families.directory(name), backend=backend, device="cpu")
    rotations, reasons = view(model).rotations
    family = FAMILIES[name]
    assert reasons == dict.fromkeys(family.not_rotated, "its queries are not rotated")
    assert sorted({*rotations, *reasons}) == list(family.attention_layers or range(LAYERS))
    for layer, rotation in rotations.items():
        expected = frequencies(name, layer)
        assert rotation.frequencies.tolist() == pytest.approx(expected, rel=1e-5)
        assert list(zip(rotation.first.tolist(), rotation.second.tolist())) == pairs_of(name, len(expected))


def pairs_of(name: str, n: int) -> list[tuple[int, int]]:
    """The dimensions that each frequency turns."""
    return {
        "half": [(m, m + n) for m in range(n)],
        "half, backwards": [(m + n, m) for m in range(n)],
        "adjacent": [(2 * m, 2 * m + 1) for m in range(n)],
    }[FAMILIES[name].pairing]


def test_turning_is_multiplication_by_a_complex_number_and_back_again() -> None:
    rotations, _ = view(load_model(families.directory("GPT-J"), device="cpu")).rotations
    rotation = rotations[0]
    x = torch.randn(2, 5, 3, D_HEAD, dtype=torch.float64)
    positions = torch.tensor([[0, 1, 2, 3, 4], [7, 8, 9, 30, 31]])
    turned = rotation.turn(x, positions)
    for row in range(2):
        for at, position in enumerate(positions[row].tolist()):
            for m, theta in enumerate(rotation.frequencies.tolist()):
                i, j = int(rotation.first[m]), int(rotation.second[m])
                z = x[row, at, 0, i].item() + 1j * x[row, at, 0, j].item()
                z *= complex(math.cos(position * theta), math.sin(position * theta))
                assert turned[row, at, 0, [i, j]].tolist() == pytest.approx([z.real, z.imag], abs=1e-12)
    untouched = [d for d in range(D_HEAD) if d not in {*rotation.first.tolist(), *rotation.second.tolist()}]
    assert torch.equal(turned[..., untouched], x[..., untouched])
    torch.testing.assert_close(rotation.turn(turned, positions, back=True), x, rtol=0, atol=1e-12)


def some_samples(n_tokens: tuple[int, ...] = (13, 9, 11)) -> Samples:
    generator = torch.Generator().manual_seed(2)
    rows = [torch.randint(3, 370, (n,), generator=generator).tolist() for n in n_tokens]
    ids = [str(n) for n in range(len(rows))]
    return Samples.from_rows(rows, [1] * len(rows), ids, bos=False, supervise="text", pad=0)


def queries_and_keys(
    name: str, samples: Samples, dtype: torch.dtype = torch.float64
) -> dict[int, list[tuple[Tensor, Tensor]]]:
    """For each layer and row rotated q `[pos, heads, d_head]` and k, of the `transformers` model alone: what
    its attention function receives.
    """
    import transformers.modeling_utils as utils

    found: dict[int, list[tuple[Tensor, Tensor]]] = {}
    hf = original(name, dtype)

    def spy(module: Any, q: Tensor, k: Tensor, v: Tensor, *mask: Any, **options: Any) -> Any:
        del mask
        options.pop("attention_mask", None)
        found.setdefault(module.layer_idx, []).append((q[0].transpose(0, 1), k[0].transpose(0, 1)))
        eager = sys.modules[type(module).__module__].eager_attention_forward
        hidden = torch.full((1, 1, q.shape[2], k.shape[2]), -torch.inf, dtype=q.dtype).triu(1)
        return eager(module, q, k, v, hidden, **options)

    utils.ALL_ATTENTION_FUNCTIONS.register("spy", spy)
    hf.set_attn_implementation("spy")
    for n, mask in enumerate(samples.attention_mask):
        oracles.logits(hf, samples.tokens[n, : int(mask.sum())])
    return found


# These compute attention without the function that can be looked into.
HIDDEN = ("GPT-J", "CodeGen", "Falcon")
# A few ways of making queries and keys, for the slower loops of test_sink.
SPIED = ["Llama", "Llama, yarn", "Qwen3", "Gemma 3", "Phi", "Phi-3", "GPT-NeoX (Pythia)", "Cohere", "GLM-4"]
SPIED += ["Phi-3, LongRoPE", "NanoChat"]


@pytest.mark.parametrize(
    ("name", "backend"), [case for case in ROTARY if case[0] in (*HIDDEN, "Llama", "GPT-NeoX (Pythia)")]
)
def test_norms_by_frequency_are_those_before_the_rotation(name: str, backend: Any) -> None:
    """A rotation changes no norm, so those of what the projections give are the same."""
    model, samples = load(name, backend), some_samples()
    found, layout = tt.frequency_norms(model, samples, show_progress=False), tt.RotaryLayout.of(model)
    squares: dict[tuple[int, str], list[Tensor]] = {}
    for n, mask in enumerate(samples.attention_mask):
        with torch.no_grad():
            _, cache = model.run_with_cache(samples.tokens[n : n + 1, : int(mask.sum())])
        for layer, rotation in layout.items():
            for part in "qk":
                value = cache[f"blocks.{layer}.attn.hook_{part}"][0].double()
                value = value.unflatten(-1, (-1, D_HEAD)) if value.ndim == 2 else value
                square = value[..., rotation.pairs].square().sum(-1)
                squares.setdefault((layer, part), []).append(square)
    for key, every in squares.items():
        expected = torch.cat(every).mean(0).sqrt()
        torch.testing.assert_close(found.rms[key], expected, rtol=1e-6, atol=1e-9)


def test_what_is_kept_does_not_grow_with_samples() -> None:
    model = tiny.model("llama")
    sizes = []
    for n in (25, 100):
        found = tt.frequency_norms(model, some_samples((9,) * n), show_progress=False)
        tensors = [*found.rms.values(), *found.mean.values(), *found.largest.values(), *found.logit.values()]
        tensors += [*found.logit_first.values(), *found.squares.values()]
        sizes.append(sum(tensor.numel() for tensor in tensors))
        assert all(len(groups) == 20 for groups in found.squares.values())
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize(("name", "backend"), [case for case in ROTARY if case[0] not in HIDDEN])
def test_norms_and_logits_are_those_of_loops_over_positions(name: str, backend: Any) -> None:
    samples = some_samples()
    model = load(name, backend)
    norms = tt.frequency_norms(model, samples, batch_tokens=30, show_progress=False)
    expected = queries_and_keys(name, samples, dtype_of(name, backend))
    assert norms.n_positions == int(samples.attention_mask.sum())
    expected = {layer: expected[layer] for layer in expected if layer not in FAMILIES[name].not_rotated}
    assert list(norms.layout) == sorted(expected)
    for layer, rows in expected.items():
        n = len(frequencies(name, layer))
        pairs = pairs_of(name, n)
        for part, index in (("q", 0), ("k", 1)):
            values = torch.cat([row[index] for row in rows])  # every position of every row
            for m, (i, j) in enumerate(pairs):
                size = (values[:, :, i] ** 2 + values[:, :, j] ** 2).sqrt()
                close(norms.rms[layer, part][:, m], (size**2).mean(0).sqrt())
                close(norms.mean[layer, part][:, m], size.mean(0))
                close(norms.largest[layer, part][:, m], size.amax(0))
                each = [(row[index][..., i] ** 2 + row[index][..., j] ** 2).mean(0) for row in rows]
                close(norms.squares[layer, part][..., m], torch.stack(each))  # fewer samples than groups
        total = torch.zeros(len(norms.logit[layer]), n, dtype=torch.float64)
        first, n_pairs, n_queries = total.clone(), 0, 0
        for q, k in rows:
            for head in range(q.shape[1]):
                key = k[:, head // (q.shape[1] // k.shape[1])]
                for m, (i, j) in enumerate(pairs):
                    for at in range(len(q)):
                        products = (key[: at + 1, [i, j]] * q[at, head, [i, j]]).sum(1) / D_HEAD**0.5
                        total[head, m] += products.sum()
                        first[head, m] += products[0]
            n_pairs, n_queries = n_pairs + len(q) * (len(q) + 1) // 2, n_queries + len(q)
        close(norms.logit[layer], total / n_pairs)
        close(norms.logit_first[layer], first / n_queries)


def close(found: Tensor, expected: Tensor) -> None:
    """Equal but for float32 inside transformers' rotary embedding."""
    exact = expected.to(found.dtype)  # experts on HookedTransformer are in float32
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-6 * float(exact.abs().max()))


def test_a_frequency_that_carries_everything_is_the_dominant_one() -> None:
    model = tiny.model("llama")
    pairs = tt.RotaryLayout.of(model)[0].pairs
    with torch.no_grad():  # head 2 of layer 0: only the pair of frequency 3
        weight = view(model).weight((0, "Q"))
        keep = weight[2][:, pairs[3]].clone()
        weight[2] = 0
        weight[2][:, pairs[3]] = keep
    norms = tt.frequency_norms(model, some_samples(), show_progress=False)
    strongest = norms.dominant().query("layer == 0 and part == 'q' and head == 2")
    assert strongest.frequency.tolist() == [3]
    assert strongest.share.tolist() == pytest.approx([1.0])
    assert len(norms.dominant(top=2).query("layer == 1 and part == 'k'")) == 2 * 2
    everything = norms.dominant(share=1.0).query("layer == 1 and part == 'k' and head == 0")
    assert everything.share.sum() == pytest.approx(1.0)
    assert everything.share.is_monotonic_decreasing
    half = norms.dominant().groupby(["layer", "part", "head"]).share.agg(["sum", "min"])
    assert (half["sum"] >= 0.5 - 1e-9).all()
    assert (half["sum"] - half["min"] < 0.5).all()  # without its last one it would not be enough
    for wrong in ({"share": 0.5, "top": 1}, {"share": 1.5}, {"top": 0}):
        with pytest.raises(tt.TomsparseError):
            norms.dominant(**wrong)


def test_memory_and_batches_do_not_matter_and_rows_add_up() -> None:
    model, samples = tiny.model("neox", dtype=torch.float64), some_samples()
    whole = tt.frequency_norms(model, samples, show_progress=False)
    small = tt.frequency_norms(model, samples, batch_tokens=1, show_progress=False)
    for key, value in whole.rms.items():
        torch.testing.assert_close(small.rms[key], value, rtol=1e-6, atol=0)
    frame = whole.to_frame()
    assert frame.groupby(["layer", "part", "head"]).share.sum().to_numpy() == pytest.approx(1.0)
    assert set(frame.columns) >= {"radians", "wavelength", "rms", "mean", "largest", "logit", "logit_first"}


def test_intervals_of_norms_are_student_s_over_groups_of_samples() -> None:
    model = tiny.model("neox", dtype=torch.float64)
    samples = some_samples(tuple(5 + n % 3 for n in range(50)))
    norms = tt.frequency_norms(model, samples, show_progress=False)
    frame = norms.to_frame().set_index(["layer", "part", "head", "frequency"])
    alone = [tt.frequency_norms(model, samples[n : n + 1], show_progress=False) for n in range(50)]
    squares = np.array([float(one.rms[1, "k"][2, 0]) ** 2 for one in alone])
    lengths = samples.lengths.numpy()
    groups = [np.average(squares[n::20], weights=lengths[n::20]) for n in range(20)]
    half = scipy.stats.t.ppf(0.975, 19) * np.std(groups, ddof=1) / 20**0.5
    row = frame.loc[1, "k", 2, 0]
    assert (row.low**2, row.high**2) == pytest.approx((row.rms**2 - half, row.rms**2 + half))
    assert np.isnan(alone[0].to_frame().low).all()


def test_what_has_no_rotation_is_refused_by_reason() -> None:
    for name, reason in (("GPT-2", "no rotary frequencies"), ("Bloom", "no rotary frequencies")):
        model = load_model(families.directory(name), device="cpu")
        with pytest.raises(tt.TomsparseError, match=reason):
            tt.frequency_norms(model, some_samples())
        with pytest.raises(tt.TomsparseError, match=reason):
            tt.RotaryLayout.of(model)
    layout = tt.RotaryLayout.of(load_model(families.directory("SmolLM3"), device="cpu"))
    assert list(layout) == [0]
    assert layout.without == {1: "its queries are not rotated"}
    long = Samples.from_rows([[5] * 200], [1], ["long"], bos=False, supervise="text", pad=0)
    with pytest.raises(tt.TomsparseError, match="200 tokens"):
        tt.frequency_norms(tiny.model(), long)
    with pytest.raises(tt.TomsparseError, match="training mode"):
        tt.frequency_norms(tiny.model().train(), some_samples())


def test_layout_as_a_table() -> None:
    layout = tt.RotaryLayout.of(tiny.model("neox"))
    frame = layout.to_frame()
    assert frame.wavelength.to_numpy() == pytest.approx(2 * math.pi / frame.radians.to_numpy())
    assert layout[0].rotary_dim == 2 * len(layout[0].frequencies)
    assert "context 128" in repr(layout)


def test_a_rotation_hidden_by_training_mode_or_an_edit_is_found_afterwards() -> None:
    model = tiny.model("llama")
    view(model)._rotations.clear()
    with pytest.raises(tt.TomsparseError, match="training mode"):
        tt.RotaryLayout.of(model.train())
    model.eval()
    everything = tt.SparseMask.from_bool(model, {(0, "Q"): torch.ones(view(model).shape((0, "Q"))).bool()})
    with tt.SparseEdit.scale(model, everything, 0.0).applied(model):
        tt.RotaryLayout.of(model)
    assert list(tt.RotaryLayout.of(model)) == [0, 1]


def test_large_slow_pairs_do_not_hide_the_rotation_in_half_precision(tmp_path: Any) -> None:
    from transformers import AutoModelForCausalLM

    config = made(
        "Qwen2",
        **common(),
        **rope("default") | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    )()
    hf = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for layer in hf.model.layers:
            for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
                projection.bias.view(-1, D_HEAD)[:, [3, 7]] = 20.0
    hf.save_pretrained(tmp_path)
    tiny.build_tokenizer().save_pretrained(tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        layout = tt.RotaryLayout.of(load_model(tmp_path, device="cpu", dtype=dtype))
        assert layout[1].frequencies.tolist() == pytest.approx([1, 10**-1.5, 1e-3, 10**-4.5], rel=1e-5)


def test_long_context_factors_are_no_obstacle_where_the_pattern_is_compared(tmp_path: Any) -> None:
    from transformers import AutoModelForCausalLM

    scaling = rope("yarn", factor=4.0, original_max_position_embeddings=32)
    config = made("GPTNeoX", **without("num_key_value_heads"), **scaling)()
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tiny.build_tokenizer().save_pretrained(tmp_path)
    layout = tt.RotaryLayout.of(load_model(tmp_path, device="cpu"))
    assert list(layout) == [0, 1]


@pytest.mark.parametrize("name", ["Llama, LongRoPE", "Phi-3, LongRoPE"])
def test_rows_that_are_turned_by_other_frequencies_when_long(name: str) -> None:
    """Made for 32 tokens: frequencies are divided by one list of factors up to there, by another beyond."""
    model = load(name, "bridge")
    short, long = (1.0, 1.1, 1.2, 1.3), (2.0, 3.0, 4.0, 5.0)
    for length, factors in ((20, short), (32, short), (33, long), (128, long)):
        expected = [10**-m / factor for m, factor in enumerate(factors)]
        found = tt.RotaryLayout.of(model, length=length)[1].frequencies
        assert found.tolist() == pytest.approx(expected, rel=1e-5)
    for lengths in ((20, 31), (40, 35)):
        samples = some_samples(lengths)
        norms = tt.frequency_norms(model, samples, show_progress=False)
        for layer, rows in queries_and_keys(name, samples).items():
            values = torch.cat([row[1] for row in rows])  # keys
            for m, (i, j) in enumerate(pairs_of(name, 4)):
                close(norms.rms[layer, "k"][:, m], (values[..., i] ** 2 + values[..., j] ** 2).mean(0).sqrt())
            close(tt.bos_angles(model, samples, show_progress=False).to_sink[layer], angles_of(rows))
    for measure in (tt.frequency_norms, tt.bos_angles, tt.fisher_diagonal, tt.perplexity):
        with pytest.raises(tt.TomsparseError, match=r"20 and of 40 .* from 33 tokens on.* up to 32 tokens"):
            measure(model, some_samples((20, 40)), show_progress=False)


def angles_of(rows: list[tuple[Tensor, Tensor]]) -> Tensor:
    """`[n, heads]` mean degrees between each query and the first key."""
    means = []
    for q, k in rows:
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)[0]
        cosine = torch.nn.functional.cosine_similarity(q[1:], k[None].expand_as(q[1:]), dim=-1)
        means.append(cosine.arccos().rad2deg().mean(0))
    return torch.stack(means)


def test_what_is_not_the_rotation_that_is_predicted_is_refused_by_reason() -> None:
    llama = tiny.model("llama")
    with llama.hooks(fwd_hooks=[("blocks.0.attn.hook_rot_k", lambda value, hook: value.roll(1, 1))]):
        _, reasons = view(llama).rotations
    assert list(reasons) == [0]
    assert "not what any of its frequencies predict" in reasons[0]
    neox = tiny.model("neox")

    def flipped(value: Tensor, hook: Any) -> Tensor:
        return value[:, [1, 0, 3, 2]]

    with neox.hooks(fwd_hooks=[("blocks.1.attn.hook_attn_scores", flipped)]):
        _, reasons = view(neox).rotations
    assert list(reasons) == [1]
    assert "something else is done to them that no hook point shows" in reasons[1]


def test_strings_are_no_samples() -> None:
    for measure in (tt.frequency_norms, tt.bos_angles, tt.sink_attention):
        with pytest.raises(tt.TomsparseError, match="samples is a list; make samples with"):
            measure(tiny.model(), ["Sally looks"], show_progress=False)


def test_batches_of_no_tokens_are_refused() -> None:
    with pytest.raises(tt.TomsparseError, match="batch_tokens"):
        tt.frequency_norms(tiny.model(), some_samples(), batch_tokens=0)
