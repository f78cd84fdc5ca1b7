"""The training of a few weights: its first step in float64, and what it leaves alone."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import tiny
import torch
from equations import Equations
from test_loss_change import an_edit, loss_by_hand

import tl_tomsparse as tt
from tl_tomsparse._model import view

module = importlib.import_module("tl_tomsparse.tune")  # the package has a function of this name


@pytest.mark.parametrize("backend", tiny.BACKENDS)
def test_tuning_trains_the_masked_entries_and_nothing_else(backend: Any) -> None:
    model = tiny.model("llama", backend)
    samples = tt.story_samples(model, [tiny.story(i) for i in range(4)])
    mask = an_edit(model).mask
    before = {key: view(model).weight(key).clone() for key in view(model).keys(view(model).matrices)}
    tuned = tt.tune(model, mask, samples, steps=12, batch=3, lr=0.1, show_progress=False)
    assert all(torch.equal(before[key], view(model).weight(key)) for key in before)
    unedited = loss_by_hand(model, samples).mean()
    with tuned.edit.applied(model):
        for key, weight in before.items():
            moved = (view(model).weight(key) != weight).flatten().nonzero()[:, 0]
            inside = mask.entries.get(key, torch.empty(0, dtype=torch.int64))
            assert bool(torch.isin(moved, inside).all())
        trained = loss_by_hand(model, samples).mean()
    assert trained < unedited - 0.05
    again = tt.tune(model, mask, samples, steps=12, batch=3, lr=0.1, show_progress=False)
    assert again.losses == tuned.losses
    assert len(tuned.losses) == 12


def test_the_first_step_is_that_of_adam_on_gradients_of_the_equations() -> None:
    """Adam's first update is lr * g / (|g| + 1e-8), here with g in units of the matrix' root mean square."""
    model = tiny.model("llama", dtype=torch.float64)
    samples = tt.story_samples(model, [tiny.story(i) for i in range(2)])
    mask = an_edit(model, matrices=("Q", "K")).mask
    tuned = tt.tune(model, mask, samples, steps=1, batch=2, lr=1e-3, show_progress=False)
    equations = Equations(tiny.hf_model("llama"))
    live = {key: weight.clone().requires_grad_() for key, weight in equations.weights.items()}
    losses = []
    for n in range(len(samples)):
        tokens = samples.tokens[n][samples.attention_mask[n]]
        at = samples.supervised[n].nonzero()[:, 0]
        losses.append(-equations.logits(tokens, live).log_softmax(-1)[at - 1, tokens[at]].mean())
    loss = torch.stack(losses).mean()
    assert tuned.losses == pytest.approx([float(loss.detach())], abs=1e-5)
    for key, gradient in zip(mask.entries, torch.autograd.grad(loss, [live[key] for key in mask.entries])):
        index, weight = mask.entries[key], equations.weights[key]
        size = weight.square().mean().sqrt()
        g = size * gradient.flatten()[index]
        wanted = weight.flatten()[index] - size * 1e-3 * g / (g.abs() + 1e-8)
        clear = g.abs() > 1e-4  # below, float32 inside transformers shows in the 1e-8
        assert clear.double().mean() > 0.8
        torch.testing.assert_close(tuned.edit.after[key][clear], wanted[clear], rtol=0, atol=2e-6 * size)
        assert torch.equal(tuned.edit.before[key], weight.flatten()[index])


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_training_leaves_the_model_as_it_was(error: Any, monkeypatch: Any) -> None:
    model = tiny.model("llama")
    samples = tt.story_samples(model, [tiny.story(i) for i in range(2)])
    mask = an_edit(model).mask
    state = {name: value.clone() for name, value in model.state_dict().items()}
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    hooks = {name: len(point.fwd_hooks) for name, point in model.hook_dict.items()}
    whole, calls = module.row_losses, []

    def failing(*given: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise error
        return whole(*given)

    monkeypatch.setattr(module, "row_losses", failing)
    with pytest.raises(error):
        tt.tune(model, mask, samples, steps=5, batch=2, show_progress=False)
    assert len(calls) == 3
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in state.items())
    assert [parameter.requires_grad for parameter in model.parameters()] == wanted
    assert all(parameter.grad is None for parameter in model.parameters())
    assert {name: len(point.fwd_hooks) for name, point in model.hook_dict.items()} == hooks


def test_tuning_works_where_the_caller_takes_no_gradients() -> None:
    model = tiny.model("llama")
    samples = tt.story_samples(model, [tiny.story(i) for i in range(4)])
    mask = an_edit(model).mask
    options = {"steps": 2, "batch": 2, "show_progress": False}
    usual = tt.tune(model, mask, samples, seed=1, **options)
    with torch.no_grad():
        found = tt.tune(model, mask, samples, seed=1, **options)
    assert found.losses == usual.losses
    assert all(torch.equal(found.edit.after[key], usual.edit.after[key]) for key in usual.edit.after)
    assert tt.tune(model, mask, samples, seed=2, **options).losses != usual.losses
    with torch.inference_mode(), pytest.raises(tt.TomsparseError, match="inference_mode"):
        tt.tune(model, mask, samples, **options)


def test_tuning_refuses_what_it_cannot_train() -> None:
    model = tiny.model("llama")
    samples = tt.story_samples(model, [tiny.story()])
    mask = an_edit(model).mask
    with pytest.raises(tt.TomsparseError, match="mask is empty"):
        tt.tune(model, mask - mask, samples, show_progress=False)
    with pytest.raises(tt.TomsparseError, match="lr="):
        tt.tune(model, mask, samples, lr=0.0, show_progress=False)
    with pytest.raises(tt.TomsparseError, match="steps"):
        tt.tune(model, mask, samples, steps=0, show_progress=False)
    for bad, words in (
        ({"lr": float("inf")}, "lr=inf"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"batch": 0}, "batch"),
        ({"seed": -1}, "seed=-1"),
    ):
        with pytest.raises(tt.TomsparseError, match=words):
            tt.tune(model, mask, samples, **{"show_progress": False, **bad})
    half = tiny.model("llama", dtype=torch.float16)
    with pytest.raises(tt.TomsparseError, match=r"not finite in torch\.float16"):
        tt.tune(half, an_edit(half).mask, samples, lr=1e6, steps=1, show_progress=False)
    with pytest.raises(tt.TomsparseError, match="fingerprint"):
        tt.tune(tiny.model("llama", seed=1), mask, samples, show_progress=False)
    with (
        tt.SparseEdit.zero(model, mask).applied(model),
        pytest.raises(tt.TomsparseError, match="active edit"),
    ):
        tt.tune(model, mask, samples, show_progress=False)
