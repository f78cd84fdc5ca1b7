"""Fisher, masks, edits and position on models of unusual shapes, against equations written out in float64."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from equations import Equations, Row
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    Gemma4TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
)

from tl_tomsparse._checks import TomsparseError
from tl_tomsparse._model import view
from tl_tomsparse.edit import SparseEdit
from tl_tomsparse.models import load_model
from tl_tomsparse.position import position_effects
from tl_tomsparse.ranking import top_fraction
from tl_tomsparse.samples import Samples
from tl_tomsparse.self_check import self_check
from tl_tomsparse.sensitivity import fisher_diagonal

D_VOCAB = 101
SHAPES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "one layer, one head": (
        LlamaConfig,
        {"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1},
    ),
    "heads wider than the model": (LlamaConfig, {"head_dim": 12, "num_key_value_heads": 1}),
    "tied, biases everywhere": (
        LlamaConfig,
        {
            "num_key_value_heads": 4,
            "tie_word_embeddings": True,
            "attention_bias": True,
            "mlp_bias": True,
            "head_dim": 4,
        },
    ),
    "no grouped queries": (Qwen2Config, {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "sequential, a quarter rotated": (GPTNeoXConfig, {"use_parallel_residual": False, "rotary_pct": 0.25}),
    "parallel, all rotated": (
        GPTNeoXConfig,
        {"rotary_pct": 1.0, "num_attention_heads": 1, "num_hidden_layers": 1},
    ),
}
# HookedTransformer has no d_head other than d_model / n_heads, and no biases in Llama-like models.
CASES = [(shape, "bridge") for shape in SHAPES]
CASES += [
    (shape, "hooked") for shape, (_, o) in SHAPES.items() if "head_dim" not in o and "hooked" in tiny.BACKENDS
]


SIZES = {"vocab_size": D_VOCAB, "hidden_size": 32, "intermediate_size": 24, "max_position_embeddings": 32}
HEADS = {"num_hidden_layers": 2, "num_attention_heads": 4}


def build(path: Path, shape: str) -> Path:
    kind, options = SHAPES[shape]
    return written(path, kind(**{**SIZES, **HEADS, **options}, architectures=[NAMES[kind]]))


def written(path: Path, config: PreTrainedConfig) -> Path:
    """A random model of this configuration."""
    hf = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.copy_(0.4 * noise + float("norm" in name and name.endswith("weight")))
            else:
                parameter.copy_(noise if "embed" in name else 1.7 * noise / parameter.shape[1] ** 0.5)
    hf.save_pretrained(path)
    tiny.build_tokenizer().save_pretrained(path)
    return path


NAMES = {
    LlamaConfig: "LlamaForCausalLM",
    Qwen2Config: "Qwen2ForCausalLM",
    GPTNeoXConfig: "GPTNeoXForCausalLM",
}


def rows() -> list[Row]:
    """An answer of one and of three tokens, position 1 alone, the ends, everything; two rows come twice."""
    generator = torch.Generator().manual_seed(1)
    wanted = [(12, [11]), (12, [9, 10, 11]), (2, [1]), (9, [1]), (9, [1, 8]), (7, [1, 2, 3, 4, 5, 6])]
    made = [(torch.randint(3, D_VOCAB, (length,), generator=generator), where) for length, where in wanted]
    return [*made, made[1], made[5]]


def samples(some: list[Row]) -> Samples:
    shape = len(some), max(len(tokens) for tokens, _ in some)
    tokens, mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.bool)
    supervised = mask.clone()
    for n, (row, where) in enumerate(some):
        tokens[n, : len(row)], mask[n, : len(row)], supervised[n, where] = row, True, True
    return Samples(tokens, mask, supervised, tuple(f"row {n}" for n in range(len(some))), False, "text")


def largest_error(found: Any, expected: dict[Any, Tensor]) -> float:
    assert set(found) == set(expected)
    return max(
        float((found[key] - value).abs().max() / value.abs().max().clamp_min(1e-30))
        for key, value in expected.items()
    )


@pytest.mark.parametrize(("shape", "backend"), CASES)
def test_fisher_mask_and_edit_are_those_of_the_equations(shape: str, backend: Any, tmp_path: Path) -> None:
    path, some = build(tmp_path, shape), rows()
    model = load_model(path, backend=backend, device="cpu")
    model_view, batch = view(model), samples(some)
    oracle = Equations(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64))
    options = {"matrices": model_view.matrices, "show_progress": False}

    expected = oracle.fisher(some)
    found = fisher_diagonal(model, batch, batch_tokens=40, **options)
    assert largest_error(found, expected) < 2e-5
    # A single sample of two tokens: attention has no choice, so Q and K have no gradient at all.
    alone = fisher_diagonal(model, batch[[2]], **options)
    assert largest_error(alone, oracle.fisher(some[2:3])) < 2e-5
    assert not any(alone[key].any() for key in alone if key[1] in "QK")

    mask = top_fraction(found, 0.05)
    for key, value in expected.items():
        best = value.flatten().argsort(descending=True, stable=True)[: round(0.05 * value.numel())]
        assert mask.entries[key].tolist() == best.sort().values.tolist(), key

    edit, weights = SparseEdit.mean(model, mask), oracle.edited(mask.entries)
    expected = oracle.fisher(some, weights)
    hooks = edit.hooks(model)
    for block in (edit.applied(model), model.hooks(fwd_hooks=hooks)):
        with block:
            with torch.no_grad():
                logits = model_view.logits(batch.tokens, batch.attention_mask)
            changed = fisher_diagonal(model, batch, **options)
        for n, (tokens, _) in enumerate(some):
            wanted = oracle.logits(tokens, weights)
            torch.testing.assert_close(logits[n, : len(tokens)].double(), wanted, rtol=0, atol=1e-4)
        assert largest_error(changed, expected) < 5e-5


@pytest.mark.parametrize(("shape", "backend"), CASES)
def test_position_is_that_of_single_rows(shape: str, backend: Any, tmp_path: Path) -> None:
    model, batch = load_model(build(tmp_path, shape), backend=backend, device="cpu"), samples(rows())
    mask = top_fraction(fisher_diagonal(model, batch, show_progress=False), 0.05)
    edits = {"mask": SparseEdit.mean(model, mask)}
    effects = position_effects(model, batch, edits, n_random=1, n_draws=50, show_progress=False)
    for found, edit in ((effects.before, None), (effects.after["mask"], edits["mask"])):
        for n, real in enumerate(batch.attention_mask):
            tokens = batch.tokens[n : n + 1, : int(real.sum())]
            with torch.no_grad(), nullcontext() if edit is None else edit.applied(model):
                _, cache = model.run_with_cache(tokens)
            for layer, values in found.attention.attention.items():
                pattern = cache[f"blocks.{layer}.attn.hook_pattern"][0, :, :, 0].mean(-1)
                torch.testing.assert_close(values[n].double(), pattern.double(), rtol=0, atol=1e-5)
    assert len(effects.before.attention.attention) == view(model).n_layers
    assert set(zip(effects.heads.layer, effects.heads["head"])) == set(view(model).heads)


def test_padding_beyond_a_short_window_is_no_obstacle_in_float64(tmp_path: Path) -> None:
    """Under a mask it could look at nothing there, and `transformers` gives nan for the whole row."""
    path = written(tmp_path, MistralConfig(**SIZES, **HEADS, num_key_value_heads=2, sliding_window=4))
    model = load_model(path, device="cpu", dtype=torch.float64)
    assert self_check(model).ok
    rows = [list(range(3, 3 + n)) for n in (24, 5)]
    samples = Samples.from_rows(rows, [1, 1], ["long", "short"], bos=False, supervise="text", pad=0)
    hf = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    with torch.no_grad():
        found = view(model).logits(samples.tokens, samples.attention_mask)
        for n, row in enumerate(rows):
            alone = hf(torch.tensor([row])).logits[0]
            torch.testing.assert_close(found[n, : len(row)], alone, rtol=0, atol=1e-5)  # float32 angles
    fisher = fisher_diagonal(model, samples, show_progress=False)
    halves = [fisher_diagonal(model, samples[[n]], show_progress=False) for n in range(2)]
    for key, values in fisher.items():
        torch.testing.assert_close(values, (halves[0][key] + halves[1][key]) / 2)


def test_sensitivities_are_the_same_in_inference_mode() -> None:
    model = tiny.model()
    rows = [[5, 6, 7, 8], [9, 10]]
    with torch.inference_mode():
        samples = Samples.from_rows(rows, [1, 1], ["a", "b"], bos=False, supervise="text", pad=0)
        inside = fisher_diagonal(model, samples, show_progress=False)
    outside = fisher_diagonal(model, samples, show_progress=False)
    for key, values in outside.items():
        assert torch.equal(values, inside[key])
        assert values.any()


@pytest.mark.parametrize(
    ("head_dim", "reason"),
    [(16, "heads of another size"), (14, "heads of K have 28 dimensions together, no multiple of 8")],
)
def test_heads_of_two_sizes_are_not_supported_and_the_reason_is_named(
    tmp_path: Path, head_dim: int, reason: str
) -> None:
    config = Gemma4TextConfig(
        **SIZES, **HEADS, num_key_value_heads=2, head_dim=8, global_head_dim=head_dim,
        hidden_size_per_layer_input=0, sliding_window=4,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    with pytest.warns(UserWarning, match="may be wrong or be refused"):
        model = load_model(written(tmp_path, config), device="cpu")
    report = self_check(model)
    assert not report.ok
    assert report.checks[0].status == "no"
    assert reason in report.checks[0].detail
    samples = Samples.from_rows([[5, 6]], [1], ["a"], bos=False, supervise="text", pad=0)
    with pytest.raises(TomsparseError, match="Q"):
        fisher_diagonal(model, samples, show_progress=False)


def test_an_encoder_is_refused_because_it_is_not_causal(tmp_path: Path) -> None:
    config = BertConfig(**SIZES, **HEADS, is_decoder=False, architectures=["BertLMHeadModel"])
    path = written(tmp_path, config)
    with pytest.raises(TomsparseError, match="not causal: other tokens after a position change its logits"):
        load_model(path, device="cpu")


def test_integers_beside_whole_weights_are_no_quantisation() -> None:
    model = tiny.model()
    linear = model.original_model.model.layers[0].self_attn.q_proj
    linear.register_buffer("table", torch.zeros(3, dtype=torch.int64))
    assert "Q" in view(model).matrices
