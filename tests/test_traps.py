"""Traps of TransformerLens: each test first shows that the trap is there, then that it does not bite."""

from __future__ import annotations

from typing import Any

import oracles
import pytest
import tiny
import torch
from test_edit import a_mask
from torch import Tensor

import tl_tomsparse as tt
from tl_tomsparse._model import view

every_backend = pytest.mark.parametrize("backend", tiny.BACKENDS)
hooked_only = pytest.mark.skipif(
    "hooked" not in tiny.BACKENDS, reason="TransformerLens 4 has no HookedTransformer"
)
TOKENS = (torch.arange(2 * 11).view(2, 11) * 7) % 300 + 3
MASK = torch.ones_like(TOKENS, dtype=torch.bool)
STORIES = [tiny.story(index) for index in range(3)]


def fired(model: Any, name: str) -> int:
    """How often a hook point is called in one forward pass."""
    calls: list[Any] = []
    with torch.no_grad(), model.hooks(fwd_hooks=[(name, lambda value, hook: calls.append(value.shape))]):
        model(TOKENS)
    return len(calls)


def fisher_of(model: Any) -> tt.Sensitivity:
    samples = tt.story_samples(model, STORIES)
    return tt.fisher_diagonal(model, samples, matrices=("Q", "K", "V", "O"), show_progress=False)


@pytest.mark.parametrize(("kind", "fires"), [("llama", True), ("neox", False)])
def test_rotary_hooks_that_never_fire(kind: str, fires: bool) -> None:
    model, hf = tiny.model(kind, dtype=torch.float64), tiny.hf_model(kind)
    assert "blocks.1.attn.hook_rot_q" in model.hook_dict
    assert fired(model, "blocks.1.attn.hook_rot_q") == int(fires)
    seen: dict[str, Tensor] = {}
    some = {1: view(model).rotations[0][1]}
    hooks = view(model).rotated_hooks(some, lambda layer, part, value: seen.update({part: value}))
    with torch.no_grad(), view(model).hooks(hooks):
        view(model).logits(TOKENS, MASK)
        expected = hf(TOKENS, output_attentions=True).attentions[1]
    k = seen["k"].repeat_interleave(4 // seen["k"].shape[2], 2)
    scores = torch.einsum("bqhd,bkhd->bhqk", seen["q"], k) / seen["q"].shape[-1] ** 0.5
    hidden = torch.ones(11, 11, dtype=torch.bool).triu(1)
    found = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@hooked_only
def test_expanded_copies_of_grouped_keys_and_values() -> None:
    model, bridge = tiny.model("llama", "hooked"), tiny.model("llama")
    plain = model(TOKENS)
    model.blocks[0].attn.W_K[0] = 0.0
    assert torch.equal(model(TOKENS), plain)  # the write went to a copy
    assert model.blocks[0].attn.W_K.shape[0] == 4
    assert view(model).shape((0, "K")) == (2, 32, 8)
    edits = [tt.SparseEdit.zero(m, a_mask(m, keys=[(0, "K"), (1, "V")], share=0.3)) for m in (model, bridge)]
    with torch.no_grad(), edits[0].applied(model), edits[1].applied(bridge):
        assert not torch.allclose(model(TOKENS), plain, rtol=1e-2)
        torch.testing.assert_close(model(TOKENS), bridge(TOKENS), rtol=0, atol=2e-5)


def test_dead_fused_parameters() -> None:
    model, hf = tiny.model("neox", dtype=torch.float64), tiny.hf_model("neox")
    dead = {name: p for name, p in model.named_parameters() if "qkv" in name and name.endswith("weight")}
    assert dead
    model(TOKENS).sum().backward()
    assert all(p.grad is None for p in dead.values())
    plain = model(TOKENS).detach()
    with torch.no_grad():
        for p in dead.values():
            p.zero_()
    assert torch.equal(model(TOKENS), plain)  # nothing reads them
    samples = tt.story_samples(model, STORIES)
    found = tt.fisher_diagonal(model, samples, matrices=("Q", "K", "V"), show_progress=False)
    expected = oracles.fisher(hf, samples)
    for key, value in found.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-6 * float(expected[key].max()))
    with torch.no_grad(), tt.SparseEdit.zero(model, a_mask(model, keys=[(0, "K")])).applied(model):
        assert not torch.allclose(model(TOKENS), plain, rtol=1e-3)


@every_backend
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_aliases_of_weights_and_hook_points(kind: str, backend: Any) -> None:
    model, hf = tiny.model(kind, backend), tiny.hf_model(kind)
    if backend == "bridge":
        everything = [p.data_ptr() for p in (*model.parameters(), *torch.nn.Module.parameters(model))]
        assert len(everything) > len(set(everything))
    trained = sum(weight[rows].numel() for weight, rows in oracles.hf_matrices(hf).values())
    seen = view(model)
    assert sum(seen.weight(key).numel() for key in seen.keys(seen.matrices)) == trained
    hooks = tt.SparseEdit.zero(model, a_mask(model)).hooks(model)
    writers = [model.hook_dict[name] for name, fn in hooks if name in map(seen.output_hook, seen.keys("Q"))]
    assert len(writers) == len({id(point) for point in writers}) == 2
    # Both names of one point: a user's hook under the other name sees the edited value, edited once.
    values: list[Tensor] = []
    name = seen.output_hook((0, "Q"))
    others = [n for n, p in model.hook_dict.items() if p is model.hook_dict[name]]
    with torch.no_grad(), model.hooks(fwd_hooks=[*hooks, *((n, keep(values)) for n in others)]):
        model(TOKENS)
    assert len(values) == len(others)
    assert all(torch.equal(value, values[0]) for value in values)


def keep(values: list[Tensor]) -> Any:
    return lambda value, hook: values.append(value.clone())


@every_backend
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_padding_side_of_the_tokenizer(side: str, backend: Any) -> None:
    model, usual = tiny.model("llama", backend), tiny.model("llama", backend)
    model.tokenizer.padding_side = side
    usual.tokenizer.padding_side = "right"
    samples = tt.story_samples(model, STORIES)
    assert not samples.attention_mask.all()
    assert samples.attention_mask[:, 0].all()
    assert torch.equal(samples.tokens, tt.story_samples(usual, STORIES).tokens)
    frames = [tt.score_stories(m, STORIES, show_progress=False).frame for m in (model, usual)]
    assert frames[0].equals(frames[1])


@every_backend
@pytest.mark.parametrize("default", [True, False])
def test_the_default_of_prepending_bos(default: bool, backend: Any) -> None:
    model = tiny.model("llama", backend)
    model.cfg.default_prepend_bos = default
    with_bos, without = (tt.story_samples(model, STORIES, prepend_bos=bos) for bos in (True, False))
    assert (with_bos.tokens[:, 0] == 1).all()
    assert not (with_bos.tokens[:, 1:] == 1).any()
    assert not (without.tokens == 1).any()
    assert torch.equal(with_bos.lengths, without.lengths + 1)


@hooked_only
def test_hooks_of_the_first_norm_fire_three_times() -> None:
    model = tiny.model("llama", "hooked")
    assert fired(model, "blocks.0.ln1.hook_normalized") == 3
    found, expected = fisher_of(model), fisher_of(tiny.model("llama"))
    for key, value in found.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-6 * float(expected[key].max()))
    edit = tt.SparseEdit.scale(model, a_mask(model), -1)
    with torch.no_grad(), edit.applied(model):
        expected_logits = model(TOKENS)
    with torch.no_grad():
        hooked = model.run_with_hooks(TOKENS, fwd_hooks=edit.hooks(model))
    torch.testing.assert_close(hooked, expected_logits, rtol=0, atol=2e-5)


@hooked_only
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("kind", ["llama", "neox"])
def test_norm_hooks_before_or_after_scale_and_shift(
    kind: str, after: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TransformerLens 2 calls the hook of LayerNorm after scale and shift, 3 before."""
    model, hf = tiny.model(kind, "hooked", dtype=torch.float64), tiny.hf_model(kind)
    norm = type(model.blocks[0].ln1)
    if after:

        def forward(self: Any, x: Tensor) -> Tensor:
            shift = "b" in self._parameters
            x = x - x.mean(-1, keepdim=True) if shift else x
            x = x / self.hook_scale((x.square().mean(-1, keepdim=True) + self.eps).sqrt()) * self.w
            return self.hook_normalized(x + self.b if shift else x)

        monkeypatch.setattr(norm, "forward", forward)
    model.__dict__.pop("_tomsparse_view", None)
    inputs: dict[Any, Tensor] = {}
    block = (hf.gpt_neox if kind == "neox" else hf.model).layers[1]
    block.input_layernorm.register_forward_hook(lambda module, args, out: inputs.update(hf=out.detach()))
    seen = view(model)
    with (
        torch.no_grad(),
        seen.hooks(seen.input_hooks([(1, "Q")], lambda group, x: inputs.update(found=x))),
    ):
        torch.testing.assert_close(seen.logits(TOKENS, MASK), hf(TOKENS).logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(inputs["found"], inputs["hf"], rtol=0, atol=1e-5)


@every_backend
def test_unknown_hook_names_are_not_ignored(backend: Any) -> None:
    """The bridge of TransformerLens 3 ignores them; a hook that never runs would leave an edit out."""
    seen = view(tiny.model("llama", backend))
    with pytest.raises(tt.TomsparseError, match=r"no hook point 'blocks\.0\.attn\.hook_qq'"):
        seen.hooks([("blocks.0.attn.hook_qq", lambda value, hook: None)])
