"""Edits around analyses of TransformerLens: the same as on a model whose weights were changed for good."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import tiny
import torch
from test_edit import a_mask, raw_bytes
from torch import Tensor
from transformer_lens import patching

from tl_tomsparse._model import view
from tl_tomsparse.edit import SparseEdit
from tl_tomsparse.models import Backend

every_backend = pytest.mark.parametrize("backend", tiny.BACKENDS)
CLEAN = (torch.arange(9)[None] * 7) % 300 + 3
CORRUPT = CLEAN.clone()
CORRUPT[0, 4] = 77


def metric(logits: Tensor) -> Tensor:
    """A logit difference at the last position."""
    return logits[0, -1, 40] - logits[0, -1, 41]


def changed_for_good(backend: Backend, edit: SparseEdit, kind: str = "llama", **options: Any) -> Any:
    """The same model with the edited values written into its weights, once and without undoing."""
    model = tiny.model(kind, backend, **options)
    for key, values in edit.after.items():
        weight = view(model).weight(key)
        weight[edit.mask.to_bool(key)] = values
    return model


def both_forms(model: Any, edit: SparseEdit) -> list[Callable[[], AbstractContextManager[Any]]]:
    return [lambda: edit.applied(model), lambda: model.hooks(fwd_hooks=edit.hooks(model))]


def without_head(z: Tensor, hook: Any) -> Tensor:
    z = z.clone()
    z[:, :, 1] = 0
    return z


def activation_patching(model: Any) -> Tensor:
    with torch.no_grad():
        _, cache = model.run_with_cache(CLEAN)
        result = patching.get_act_patch_resid_pre(model, CORRUPT, cache, metric)
    return result if isinstance(result, Tensor) else result.values


def head_patching(model: Any) -> Tensor:
    with torch.no_grad():
        _, cache = model.run_with_cache(CLEAN)
        result = patching.get_act_patch_attn_head_out_all_pos(model, CORRUPT, cache, metric)
    return result if isinstance(result, Tensor) else result.values


def knocked_out_head(model: Any) -> Tensor:
    with torch.no_grad():
        return model.run_with_hooks(CLEAN, fwd_hooks=[("blocks.0.attn.hook_z", without_head)])


def attribution_patching(model: Any) -> Tensor:
    analysis = pytest.importorskip("transformer_lens.tools.analysis.attribution_patching")
    result = analysis.attribution_patch(model, CLEAN, CORRUPT, metric)
    return torch.tensor([float(score) for score in result.node_scores.values()])


ANALYSES = [
    (backend, a) for backend in tiny.BACKENDS for a in (activation_patching, head_patching, knocked_out_head)
]


# Attribution patching is TransformerLens' analysis of bridges alone.
@pytest.mark.parametrize(("backend", "analysis"), [*ANALYSES, ("bridge", attribution_patching)])
def test_analyses_see_the_edited_model(backend: Backend, analysis: Callable[[Any], Tensor]) -> None:
    options: dict[str, Any] = {"dtype": torch.float64}
    model = tiny.model("llama", backend, **options)
    edit = SparseEdit.mean(model, a_mask(model))
    before, plain = raw_bytes(model), analysis(model)
    expected = analysis(changed_for_good(backend, edit, **options))
    assert not torch.allclose(plain, expected, rtol=1e-3)
    with edit.applied(model):
        found = analysis(model)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))
    assert raw_bytes(model) == before
    assert torch.equal(analysis(model), plain)


@every_backend
def test_edits_as_hooks_come_after_hooks_that_change_the_input_of_their_matrices(backend: Backend) -> None:
    options: dict[str, Any] = {"dtype": torch.float64}
    model = tiny.model("llama", backend, **options)
    edit = SparseEdit.mean(model, a_mask(model))
    expected = knocked_out_head(changed_for_good(backend, edit, **options))
    yours = [("blocks.0.attn.hook_z", without_head)]
    with torch.no_grad(), model.hooks(fwd_hooks=[*yours, *edit.hooks(model)]):
        torch.testing.assert_close(model(CLEAN), expected, rtol=1e-6, atol=1e-6)
    with model.hooks(fwd_hooks=edit.hooks(model)):  # patching the residual stream changes no such input later
        found = activation_patching(model)
    expected = activation_patching(changed_for_good(backend, edit, **options))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_direct_logit_attribution_of_an_edited_model() -> None:
    """It needs folded weights, so the edit is made on these."""
    analysis = pytest.importorskip("transformer_lens.tools.analysis.direct_logit_attribution")
    model = tiny.model("llama")
    model.enable_compatibility_mode(disable_warnings=True)
    edit = SparseEdit.mean(model, a_mask(model))

    def attributions() -> Tensor:
        with torch.no_grad():
            return analysis.direct_logit_attribution(model, CLEAN, 40, 41).attribution.squeeze()

    plain = attributions()
    for block in both_forms(model, edit):
        with block(), torch.no_grad():
            found = attributions()
            logits = model(CLEAN)[0, -1]
        assert float(found.sum()) == pytest.approx(float(logits[40] - logits[41]), rel=1e-3, abs=1e-3)
        assert not torch.allclose(found, plain, rtol=1e-2)
    assert torch.equal(attributions(), plain)


@every_backend
def test_your_hooks_on_the_points_of_the_edit(backend: Backend) -> None:
    """An edit in the weights comes before every hook; as hooks it comes in the order of registration."""
    options: dict[str, Any] = {"dtype": torch.float64}
    model = tiny.model("llama", backend, **options)
    edit = SparseEdit.mean(model, a_mask(model))
    for_good = changed_for_good(backend, edit, **options)

    def double(value: Tensor, hook: Any) -> Tensor:
        return 2 * value

    yours = [(f"blocks.{layer}.attn.hook_{part}", double) for layer in (0, 1) for part in "qkv"]

    def logits(subject: Any) -> Tensor:
        with torch.no_grad():
            return subject(CLEAN)

    with for_good.hooks(fwd_hooks=yours):
        expected = logits(for_good)
    with edit.applied(model), model.hooks(fwd_hooks=yours):
        torch.testing.assert_close(logits(model), expected)
    with model.hooks(fwd_hooks=yours), edit.applied(model):
        torch.testing.assert_close(logits(model), expected)
    with model.hooks(fwd_hooks=edit.hooks(model)), model.hooks(fwd_hooks=yours):
        torch.testing.assert_close(logits(model), expected, rtol=1e-6, atol=1e-6)
    with model.hooks(fwd_hooks=[*edit.hooks(model), *yours]):
        torch.testing.assert_close(logits(model), expected, rtol=1e-6, atol=1e-6)
    # Yours first: 2 x W + x dW, which is what doubling leaves of half the change.
    qkv = edit.restrict(edit.mask.restrict(matrices=("Q", "K", "V")))
    with model.hooks(fwd_hooks=[*qkv.hooks(model, strength=0.5), *yours]):
        halved = logits(model)
    with model.hooks(fwd_hooks=[*yours, *qkv.hooks(model)]):
        torch.testing.assert_close(logits(model), halved, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(halved, expected, rtol=1e-6, atol=1e-6)


def test_the_hugging_face_model_inside_a_bridge_is_edited_too() -> None:
    """What an evaluation harness runs, for example lm-eval's HFLM(bridge.original_model)."""
    model = tiny.model("llama", "bridge", dtype=torch.float64)
    inside = model.original_model
    edit = SparseEdit.mean(model, a_mask(model))
    expected = changed_for_good("bridge", edit, dtype=torch.float64)

    def logits(hf: Any) -> Tensor:
        with torch.no_grad():
            return hf(CLEAN).logits

    plain = logits(inside)
    with edit.applied(model):
        torch.testing.assert_close(logits(inside), logits(expected.original_model))
        assert not torch.allclose(logits(inside), plain)
    assert torch.equal(logits(inside), plain)


@every_backend
def test_a_sparse_autoencoder_reads_the_edited_model(backend: Backend) -> None:
    saes = pytest.importorskip("sae_lens", reason="SAELens is for TransformerLens 3")
    torch.manual_seed(0)
    sae = saes.StandardSAE(saes.StandardSAEConfig(d_in=32, d_sae=48))
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.normal_()
    model = tiny.model("llama", backend)
    edit = SparseEdit.mean(model, a_mask(model))

    def features(subject: Any) -> Tensor:
        with torch.no_grad():
            _, cache = subject.run_with_cache(CLEAN)
            return sae.encode(cache["blocks.0.hook_resid_post"])

    plain, expected = features(model), features(changed_for_good(backend, edit))
    assert not torch.allclose(plain, expected, rtol=1e-2)
    for block in both_forms(model, edit):
        with block():
            torch.testing.assert_close(features(model), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(features(model), plain)


def test_an_edit_in_the_bridge_of_saelens() -> None:
    saes = pytest.importorskip("sae_lens", reason="SAELens is for TransformerLens 3")
    torch.manual_seed(0)
    sae = saes.StandardSAE(saes.StandardSAEConfig(d_in=32, d_sae=48))
    sae.cfg.metadata.hook_name = "blocks.0.hook_resid_post"
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.normal_(std=0.3)

    def loaded() -> Any:
        path = str(tiny.directory("llama"))
        return saes.SAETransformerBridge.boot_transformers(path, device="cpu", dtype=torch.float32).eval()

    def logits(subject: Any) -> Tensor:
        with torch.no_grad():
            return subject.run_with_saes(CLEAN, saes=[sae])

    model, for_good = loaded(), loaded()
    edit = SparseEdit.mean(model, a_mask(model))
    for key, values in edit.after.items():
        weight = view(for_good).weight(key)
        weight[edit.mask.to_bool(key)] = values
    plain, expected = logits(model), logits(for_good)
    assert not torch.allclose(plain, expected, rtol=1e-2)
    with edit.applied(model):
        torch.testing.assert_close(logits(model), expected)
    assert torch.equal(logits(model), plain)
