"""The view of a model: weights, hook points and identity, on every kind and backend."""

from __future__ import annotations

import copy
from typing import Any

import oracles
import pytest
import tiny
import torch

from tl_tomsparse._checks import TomsparseError
from tl_tomsparse._model import ModelIdentity, Reader, apply_matrix, view
from tl_tomsparse._model_identity import fingerprint

EVERY = [(kind, backend) for kind in tiny.KINDS for backend in tiny.BACKENDS]
every_model = pytest.mark.parametrize(("kind", "backend"), EVERY)
every_backend = pytest.mark.parametrize("backend", tiny.BACKENDS)
TOKENS = torch.tensor([[1, 40, 300, 77, 5, 9], [1, 60, 12, 0, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]]).bool()


def bits(model: Any) -> list[bytes]:
    return [tensor.contiguous().numpy().tobytes() for tensor in view(model).parameters()]


@every_model
def test_weights_are_those_of_the_original_model(kind: str, backend: str) -> None:
    model_view = view(tiny.model(kind, backend))
    hf = tiny.hf_model(kind, dtype=torch.float32)
    expected = oracles.hf_matrices(hf)
    assert set(model_view.keys(model_view.matrices)) == set(expected)
    for key, (weight, rows) in expected.items():
        found = model_view.weight(key)
        assert found.shape == model_view.shape(key)
        assert torch.equal(found, oracles.canonical(hf, key[1], weight.detach()[rows]))


@every_model
def test_writing_to_a_weight_changes_what_the_model_computes(kind: str, backend: str) -> None:
    model = tiny.model(kind, backend)
    model_view = view(model)
    before = model_view.logits(TOKENS, MASK)
    for key in model_view.keys(model_view.matrices):
        weight = model_view.weight(key)
        old = weight.clone()
        weight.add_(torch.randn(weight.shape))  # a constant would be lost in the next LayerNorm
        assert not torch.allclose(model_view.logits(TOKENS, MASK), before, atol=1e-3), key
        weight.copy_(old)
        assert torch.equal(model_view.logits(TOKENS, MASK), before), key


@every_model
def test_inputs_and_outputs_at_the_hooks_are_those_of_the_products(kind: str, backend: str) -> None:
    model_view = view(tiny.model(kind, backend, dtype=torch.float64))
    keys = model_view.keys(model_view.matrices)
    inputs: dict[Any, torch.Tensor] = {}
    outputs: dict[Any, torch.Tensor] = {}

    def store(group: Any, x: torch.Tensor) -> None:
        inputs.update(dict.fromkeys(group, x))

    hooks = model_view.input_hooks(keys, store)
    hooks += [(model_view.output_hook(k), lambda y, hook, k=k: outputs.update({k: y})) for k in keys]
    with torch.no_grad(), model_view.hooks(hooks):
        model_view.logits(TOKENS, MASK)
        base = dict(outputs)
        for key in keys:  # a change of the weight shows at the output as the product with the input
            weight = model_view.weight(key)
            old = weight.clone()
            weight.add_(torch.randn(weight.shape, dtype=weight.dtype))
            model_view.logits(TOKENS, MASK)
            expected = base[key] + apply_matrix(key[1], inputs[key], weight - old)
            torch.testing.assert_close(outputs[key][:1], expected[:1], rtol=1e-6, atol=1e-6)
            weight.copy_(old)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_identity_is_the_same_on_every_backend_and_tells_weights_apart(kind: str) -> None:
    identities = [view(tiny.model(kind, backend)).identity() for backend in tiny.BACKENDS]
    other = view(tiny.model(kind, seed=1)).identity()
    assert len({identity.fingerprint for identity in identities}) == 1
    assert identities[0].same_weights(identities[-1])
    assert not identities[0].same_weights(other)
    assert ModelIdentity.from_dict(other.to_dict()) == other


@every_backend
def test_identity_sees_one_changed_bit_and_its_way_back(backend: str) -> None:
    model = tiny.model("llama", backend)
    model_view = view(model)
    before = model_view.identity()
    weight = model_view.weight((1, "out"))
    old = weight[3, 5].clone()
    weight[3, 5] = torch.nextafter(old, torch.tensor(9.0))
    assert not model_view.identity().same_weights(before)
    weight[3, 5] = old
    assert model_view.identity() == before


def test_fingerprint_sees_two_exchanged_entries() -> None:
    weight = torch.randn(3, 100, 50, generator=torch.Generator().manual_seed(0))
    seen = {fingerprint([("W", weight)]), fingerprint([("V", weight)]), fingerprint([("W", weight.half())])}
    for first, second in (((0, 7, 5), (0, 8, 5)), ((0, 7, 5), (0, 7, 6)), ((0, 7, 5), (2, 7, 5))):
        other = weight.clone()
        other[first], other[second] = weight[second], weight[first]
        seen.add(fingerprint([("W", other)]))
    assert len(seen) == 6
    assert fingerprint([("W", weight.mT.contiguous().mT)]) == fingerprint([("W", weight)])


@every_backend
def test_views_are_cached_and_a_copy_of_the_model_gets_its_own(backend: str) -> None:
    model = tiny.model("llama", backend)
    assert view(model) is view(model)
    other = copy.deepcopy(model)
    assert view(other) is not view(model)
    view(other).weight((0, "Q")).zero_()
    assert view(model).weight((0, "Q")).abs().sum() > 0


@every_backend
def test_padding_changes_no_logit(backend: str) -> None:
    model_view = view(tiny.model("qwen2", backend))
    together = model_view.logits(TOKENS, MASK)
    alone = oracles.logits(tiny.hf_model("qwen2", dtype=torch.float32), TOKENS[1, :3])
    torch.testing.assert_close(together[1, :3], alone, rtol=0, atol=2e-5)


@every_model
def test_reader_gives_the_logits_asked_for(kind: str, backend: str) -> None:
    model_view = view(tiny.model(kind, backend))
    everywhere = model_view.logits(TOKENS, MASK)
    some, many = torch.zeros_like(MASK), MASK.clone()
    some[0, 2] = some[0, 4] = some[1, 1] = True  # rows that need different numbers of positions
    with model_view.reader() as read:
        for where in (some, many, torch.ones_like(MASK)):
            torch.testing.assert_close(read(TOKENS, MASK, where), everywhere[where], rtol=1e-5, atol=1e-5)
        assert torch.equal(model_view.logits(TOKENS, MASK), everywhere)  # idle between its calls
    assert Reader(model_view).before, "the last layer is not narrowed, so the test above tests little"


@every_backend
def test_reader_leaves_a_layer_alone_that_others_have_hooked(backend: str) -> None:
    model_view = view(tiny.model("llama", backend))
    shapes: list[torch.Size] = []
    where = torch.zeros_like(MASK)
    where[:, 1] = True
    name = model_view.output_hook((1, "in"))
    with model_view.hooks([(name, lambda y, hook: shapes.append(y.shape))]), model_view.reader() as read:
        read(TOKENS, MASK, where)
    assert [shape[:2] for shape in shapes] == [TOKENS.shape]


@every_backend
def test_matrices_that_are_not_there_are_refused_by_reason(backend: str) -> None:
    model_view = view(tiny.model("neox", backend))
    assert model_view.matrices == ("Q", "K", "V", "O", "in", "out")
    with pytest.raises(TomsparseError, match="no gate matrix"):
        model_view.keys(("Q", "gate"))
    with pytest.raises(TomsparseError, match="'q' is not one of"):
        model_view.keys(("q",))
    with pytest.raises(TomsparseError, match="empty"):
        model_view.keys(())


def test_other_objects_are_refused() -> None:
    with pytest.raises(TomsparseError, match=r"LlamaForCausalLM.*load_model"):
        view(tiny.hf_model("llama"))
    with pytest.raises(TomsparseError, match="NoneType"):
        view(None)


@every_backend
def test_training_mode_is_refused(backend: str) -> None:
    model_view = view(tiny.model("llama", backend))
    model_view.require_eval()
    model_view.model.train()
    with pytest.raises(TomsparseError, match=r"model\.eval\(\)"):
        model_view.require_eval()


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_processed_weights_are_noticed(kind: str) -> None:
    model = tiny.model(kind)
    raw = view(model).identity()
    assert raw.basis == "raw"
    model.enable_compatibility_mode()
    model_view = view(model)
    assert model_view.identity().basis == "processed"
    assert not model_view.identity().same_weights(raw)
    with pytest.raises(TomsparseError, match="allow_processed=True"):
        model_view.require_raw_basis()
    model_view.require_raw_basis(allow_processed=True)


@pytest.mark.skipif("hooked" not in tiny.BACKENDS, reason="TransformerLens 4 has no HookedTransformer")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fold", [True, False])
def test_processed_weights_of_hooked_transformer_are_noticed(fold: bool, dtype: torch.dtype) -> None:
    model = tiny.model("neox", "hooked", dtype=dtype)
    assert view(model).basis == "raw"  # and the view that says so is kept
    model.process_weights_(fold_ln=fold, center_writing_weights=not fold, center_unembed=False)
    assert view(model).basis == "processed"


@every_backend
@pytest.mark.parametrize("site", ["blocks.1.hook_resid_post", "ln_final.hook_normalized", "unembed.hook_out"])
def test_hooks_near_the_end_see_every_position(backend: str, site: str) -> None:
    model_view = view(tiny.model("llama", backend))

    def by_position(x: torch.Tensor, hook: Any) -> torch.Tensor:
        return x * torch.linspace(0.5, 1.5, TOKENS.shape[1])[:, None]

    where = torch.zeros_like(MASK)
    where[0, 2] = where[0, 4] = where[1, 1] = True
    with torch.no_grad(), model_view.hooks([(site, by_position)]):
        everywhere = model_view.logits(TOKENS, MASK)
        with model_view.reader() as read:
            found = read(TOKENS, MASK, where)
    torch.testing.assert_close(found, everywhere[where], rtol=1e-5, atol=1e-5)


@pytest.mark.skipif("hooked" not in tiny.BACKENDS, reason="only its weights become such tensors")
def test_weights_made_in_inference_mode_are_refused() -> None:
    with torch.inference_mode():
        model = tiny.model("llama", "hooked")
    with pytest.raises(TomsparseError, match="load it outside"):
        view(model)


def test_bits_are_compared_by_parameters() -> None:
    model = tiny.model("llama")
    before = bits(model)
    assert sum(tensor.numel() for tensor in view(model).parameters()) >= sum(
        p.numel() for p in tiny.hf_model("llama").parameters()
    )
    view(model).weight((0, "K"))[0, 0, 0] += 1
    assert sum(a != b for a, b in zip(before, bits(model))) == 1
