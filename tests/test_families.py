"""Every architecture family: Fisher, masks, both forms of edit and scores against `transformers` in float64.

The oracle loads the same directory without TransformerLens, takes one backward pass a sample, and writes
edited values into the parameters.
"""

from __future__ import annotations

from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import families
import oracles
import pytest
import tiny
import torch
from families import FAMILIES
from family import common, without
from test_edit import raw_bytes
from test_evaluate import oracle
from torch import Tensor
from transformers import AutoModelForCausalLM, PersimmonConfig, Qwen3_5TextConfig

from tl_tomsparse._checks import TomsparseError
from tl_tomsparse._model import view
from tl_tomsparse.edit import SparseEdit
from tl_tomsparse.evaluate import perplexity, score_stories
from tl_tomsparse.mask import SparseMask
from tl_tomsparse.models import Backend, load_model
from tl_tomsparse.ranking import top_fraction
from tl_tomsparse.samples import Samples
from tl_tomsparse.sensitivity import fisher_diagonal

# One option is right and neither is likely; short enough for every context and window.
STORY = replace(tiny.story(), text="Anna moves the ball to the box.", questions=(tiny.story().questions[3],))
# TransformerLens knows it by its own names alone or not at all, or computes something else; float64 XGLM is
# no model of transformers.
NO_HOOKED = "is not currently supported|computes other logits|cannot be run in torch.float64"
SUPPORTED = [name for name, family in FAMILIES.items() if family.refused is None]
MAJOR = int(version("transformer-lens").split(".")[0])
CASES = [(name, "bridge") for name in SUPPORTED if FAMILIES[name].bridge_since <= MAJOR]
if "hooked" in tiny.BACKENDS:
    CASES += [(name, "hooked") for name in SUPPORTED if FAMILIES[name].hooked]
every_case = pytest.mark.parametrize(("name", "backend"), CASES)


@pytest.fixture(scope="module")
def samples() -> Samples:
    """Rows of 9 to 23 tokens: supervised at the end, everywhere, and at two places.

    With fewer than 23 - 16 tokens the padding would see nothing in a window of 16, where transformers
    computes nan in float64.
    """
    generator = torch.Generator().manual_seed(0)
    lengths = (23, 9, 11, 17)
    rows = [torch.randint(3, 370, (length,), generator=generator).tolist() for length in lengths]
    made = Samples.from_rows(rows, [22, 1, 1, 16], list("abcd"), bos=False, supervise="text", pad=0)
    made.supervised[3, 5] = True
    return made


def dtype_of(name: str, backend: str) -> torch.dtype:
    return FAMILIES[name].dtype if backend == "bridge" else FAMILIES[name].hooked_dtype


def load(name: str, backend: Backend, dtype: torch.dtype | None = None) -> Any:
    dtype = dtype or dtype_of(name, backend)
    return load_model(families.directory(name), backend=backend, device="cpu", dtype=dtype)


def original(name: str, dtype: torch.dtype = torch.float64) -> Any:
    hf = AutoModelForCausalLM.from_pretrained(
        families.directory(name), dtype=dtype, attn_implementation="eager"
    )
    hf.set_experts_implementation("eager")  # an expert at a time, which float64 needs
    return hf.eval()


def expected_fisher(hf: Any, name: str, samples: Samples) -> dict[tuple[int, str], Tensor]:
    matrices = families.matrices(hf, name)
    total = {key: torch.zeros_like(take(weight)) for key, (weight, take) in matrices.items()}
    for n in range(len(samples)):
        hf.zero_grad()
        oracles.sample_loss(hf, samples, n).backward()
        for key, (weight, take) in matrices.items():
            if weight.grad is not None:  # a layer that the supervised token does not depend on
                total[key] += take(weight.grad) ** 2 / len(samples)
    return total


def assert_logits(model: Any, hf: Any, samples: Samples) -> None:
    """Logits at every real position, of padded rows at once, against each row alone."""
    with torch.no_grad():
        found = view(model).logits(samples.tokens, samples.attention_mask)
    for n, mask in enumerate(samples.attention_mask):
        length = int(mask.sum())
        expected = oracles.logits(hf, samples.tokens[n, :length])
        error = (found[n, :length].double() - expected).abs().max() / expected.std()
        assert error < (1e-5 if hf.dtype == torch.float64 else 1e-4), (n, float(error))


@every_case
def test_fisher_masks_edits_and_perplexity_are_those_of_transformers(
    name: str, backend: Backend, samples: Samples
) -> None:
    model, hf = load(name, backend), original(name, dtype_of(name, backend))
    seen, without = view(model), FAMILIES[name].hooked_without if backend == "hooked" else ()
    matrices = {key: value for key, value in families.matrices(hf, name).items() if key[1] not in without}
    assert_logits(model, hf, samples)
    assert set(seen.keys(seen.matrices)) == set(matrices)
    for key, (weight, take) in matrices.items():
        assert torch.equal(seen.weight(key), take(weight.detach())), key

    found = fisher_diagonal(model, samples, matrices=seen.matrices, batch_tokens=40, show_progress=False)
    expected = {k: value for k, value in expected_fisher(hf, name, samples).items() if k in matrices}
    assert set(found) == set(expected)
    for key, value in expected.items():
        assert (found[key].double() - value).abs().max() <= 1e-5 * value.abs().max(), key

    mask = top_fraction(found, 0.02)
    edit = SparseEdit.mean(model, mask)
    before = raw_bytes(model)  # bytes: HookedTransformer's Bloom has a parameter that is never set
    plain = seen.logits(samples.tokens, samples.attention_mask).detach()
    with torch.no_grad():
        for key, (weight, take) in matrices.items():
            matrix, chosen = take(weight), mask.to_bool(key)
            matrix[chosen] = matrix[~chosen].mean()
    with edit.applied(model):
        assert_logits(model, hf, samples)
        nll = perplexity(model, samples, show_progress=False).nll
        margin = score_stories(model, [STORY], show_progress=False).frame.margin.item()
    (question,) = STORY.questions
    answer, other = (oracle(hf, model.tokenizer, STORY.prompt(question), o)[0] for o in ("box", "basket"))
    assert margin == pytest.approx(answer - other, abs=1e-4)
    with model.hooks(fwd_hooks=edit.hooks(model)):
        assert_logits(model, hf, samples)
    with torch.no_grad():
        losses = torch.stack([oracles.sample_loss(hf, samples, n) for n in range(len(samples))])
    assert nll.tolist() == pytest.approx((losses * samples.supervised.sum(1)).tolist(), rel=1e-5)
    assert raw_bytes(model) == before
    assert torch.equal(seen.logits(samples.tokens, samples.attention_mask), plain)


@pytest.mark.parametrize("name", [name for name in FAMILIES if FAMILIES[name].refused])
def test_what_cannot_be_examined_says_why(name: str) -> None:
    reason = FAMILIES[name].refused
    assert reason is not None
    with pytest.raises(TomsparseError, match=reason):
        view(load(name, "bridge"))


@pytest.mark.parametrize("name", SUPPORTED)
def test_a_bridge_that_computes_something_else_is_refused(name: str) -> None:
    if FAMILIES[name].bridge_since > MAJOR:
        with pytest.raises(TomsparseError, match=r"other logits .* use another version of transformer-lens"):
            load(name, "bridge")


def test_the_readme_has_the_table() -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    assert f"{families.BEGIN}\n{families.table()}\n{families.END}" in readme


@pytest.mark.parametrize("name", SUPPORTED)
@pytest.mark.skipif("hooked" not in tiny.BACKENDS, reason="TransformerLens 4 has no HookedTransformer")
def test_the_same_weights_have_the_same_fisher_on_both_kinds_of_model(name: str, samples: Samples) -> None:
    """Or HookedTransformer's form of the model is refused: never other numbers."""
    if not FAMILIES[name].hooked:
        with pytest.raises(TomsparseError, match=FAMILIES[name].hooked_refused or NO_HOOKED):
            load(name, "hooked")
        return
    hooked, bridge = (load(name, backend, FAMILIES[name].hooked_dtype) for backend in tiny.BACKENDS[::-1])
    matrices = [m for m in view(bridge).matrices if m in view(hooked).matrices]
    options = {"matrices": matrices, "show_progress": False}
    first, second = (fisher_diagonal(model, samples, **options) for model in (hooked, bridge))
    for key in first:
        torch.testing.assert_close(first[key], second[key], rtol=1e-4, atol=1e-6 * float(second[key].max()))
    masks = [top_fraction(values, 0.02) for values in (first, second)]
    assert isinstance(masks[0], SparseMask)
    assert {key: entries.tolist() for key, entries in masks[0].entries.items()} == {
        key: entries.tolist() for key, entries in masks[1].entries.items()
    }


@pytest.mark.skipif("hooked" not in tiny.BACKENDS, reason="TransformerLens 4 has no HookedTransformer")
def test_what_a_norm_hides_on_hooked_transformer_is_refused_by_that_name() -> None:
    """OLMo 3: the residual stream is the input of attention, and norms follow O and out."""
    model = load("OLMo 3", "hooked")
    seen = view(model)
    for matrix, norm in (("O", "ln1"), ("out", "ln2")):
        with pytest.raises(
            TomsparseError,
            match=rf"matrix '{matrix}': in layer 0 no hook point .* before a norm that follows it \({norm}\)",
        ):
            seen.keys(matrix)
    with pytest.raises(TomsparseError, match=r"does not offer matrix 'O': .* before a norm that follows"):
        _ = seen.heads
    model.set_use_split_qkv_input(True)
    rows = torch.tensor([[5, 6, 7]]), torch.ones(1, 3, dtype=torch.bool)
    hooks = seen.input_hooks([(1, "Q")], lambda keys, x: None)
    why = r"copies blocks.1.hook_resid_pre .* turn off use_split_qkv_input"
    with pytest.raises(TomsparseError, match=why), seen.hooks(hooks):
        seen.logits(*rows)


@pytest.mark.skipif("hooked" not in tiny.BACKENDS, reason="TransformerLens 4 has no HookedTransformer")
def test_norms_before_and_after_a_product_are_told_apart_on_hooked_transformer() -> None:
    """Gemma 2 and 3 have both; TransformerLens knows them by their hub names alone."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    torch.manual_seed(0)
    model = HookedTransformer(
        HookedTransformerConfig(
            n_layers=2, d_model=32, n_heads=4, d_head=8, d_mlp=48, d_vocab=40, n_ctx=16, act_fn="silu",
            normalization_type="RMS", gated_mlp=True, use_normalization_before_and_after=True, device="cpu",
            positional_embedding_type="rotary", rotary_dim=8,
        )
    ).eval()  # fmt: skip
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn(parameter.shape) * (1.0 if "ln" in name else 0.3))
    seen = view(model)
    assert seen.matrices == ("Q", "K", "V", "gate", "in")
    for matrix, norm in (("O", "ln1_post"), ("out", "ln2_post")):
        with pytest.raises(TomsparseError, match=rf"before a norm that follows it \({norm}\)"):
            seen.keys(matrix)


@pytest.mark.parametrize("name", ["Mixtral", "Qwen3-MoE"])
def test_experts_are_not_offered_and_it_is_said(name: str) -> None:
    seen = view(load(name, "bridge"))
    for matrix, why in (("gate", "is a .*Router, not a plain linear"), ("in", "no in"), ("out", "no out")):
        with pytest.raises(TomsparseError, match=f"does not offer matrix '{matrix}': .*{why}"):
            seen.keys((matrix,))


def test_a_weight_that_holds_more_than_queries_is_not_offered_as_q(tmp_path: Path) -> None:
    """Qwen3.5 has a gate beside each head's query in one weight; heads would be counted wrongly."""
    config = Qwen3_5TextConfig(
        **common(),
        head_dim=8,
        layer_types=["linear_attention", "full_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        architectures=["Qwen3_5ForCausalLM"],
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tiny.build_tokenizer().save_pretrained(tmp_path)
    seen = view(load_model(tmp_path, device="cpu"))
    assert seen.keys(("K", "V", "O")) == [(1, "K"), (1, "V"), (1, "O")]
    with pytest.raises(TomsparseError, match=r"matrix 'Q': in layer 1 .* 8 heads of 8 .* has 4, .* queries"):
        seen.keys("Q")


def test_what_transformer_lens_does_not_know_is_one_short_sentence(tmp_path: Path) -> None:
    config = PersimmonConfig(**without("num_key_value_heads"))
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tiny.build_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(
        TomsparseError, match=r"cannot make a bridge model of .*persimmon.*architecture"
    ) as error:
        load_model(tmp_path, device="cpu")
    assert len(str(error.value)) < 300 + len(str(tmp_path))
