"""The loss along an edit against finite differences in float64, and the training of a few weights."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tiny
import torch

import tl_tomsparse as tt
from tl_tomsparse._model import view


def loss_by_hand(model: Any, samples: tt.Samples) -> np.ndarray:
    """The mean cross-entropy at supervised positions, row by row."""
    found = []
    for n in range(len(samples)):
        one = samples[[n]]
        with torch.no_grad():
            logits = model(one.tokens, attention_mask=one.attention_mask.long()).log_softmax(-1)[0]
        positions = one.supervised[0].nonzero()[:, 0]
        found.append(-logits[positions - 1, one.tokens[0, positions]].mean().item())
    return np.array(found)


def an_edit(model: Any, share: float = 0.02, matrices: tuple[str, ...] = ("Q", "K", "O", "in")) -> Any:
    keys = view(model).keys(tuple(m for m in matrices if m in view(model).matrices))
    generator = torch.Generator().manual_seed(3)
    masks = {key: torch.rand(view(model).shape(key), generator=generator) < share for key in keys}
    return tt.SparseEdit.mean(model, tt.SparseMask.from_bool(model, masks))


@pytest.mark.parametrize("backend", tiny.BACKENDS)
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_derivatives_along_an_edit_are_those_of_finite_differences(kind: str, backend: Any) -> None:
    model = tiny.model(kind, backend, dtype=torch.float64)
    samples = tt.story_samples(
        model, [tiny.story(i) for i in range(3)], categories=("false_belief", "memory")
    )
    edit = an_edit(model)

    def at(t: float) -> np.ndarray:
        after = {key: edit.before[key] + t * (edit.after[key] - edit.before[key]) for key in edit.before}
        with replace(edit, after=after).applied(model):
            return loss_by_hand(model, samples)

    # Large, because transformers computes softmax in float32 in a float64 model: noise of 1e-7.
    h = 0.05
    values = {t: at(t) for t in (-2 * h, -h, 0.0, h, 2 * h, 1.0)}
    slope = (8 * (values[h] - values[-h]) - (values[2 * h] - values[-2 * h])) / (12 * h)
    bend = (16 * (values[h] + values[-h]) - (values[2 * h] + values[-2 * h]) - 30 * values[0.0]) / (12 * h**2)
    sensitivity = tt.fisher_diagonal(model, samples, matrices=("Q", "K", "O", "in"), show_progress=False)
    found = tt.loss_change(
        model, edit, samples, sensitivity=sensitivity, batch_tokens=60, show_progress=False
    )
    assert np.abs(bend).max() > 1e-3
    np.testing.assert_allclose(found.samples["true"], values[1.0] - values[0.0], rtol=0, atol=1e-10)
    np.testing.assert_allclose(found.samples["first"], slope, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(found.samples["curvature"], bend / 2, rtol=1e-2, atol=1e-3)
    by_hand = sum(
        sensitivity[row.layer, row.matrix].flatten()[row.flat].item() * (row.after - row.before) ** 2 / 2
        for row in edit.to_frame().itertuples()
    )
    assert found.diagonal == pytest.approx(by_hand, rel=1e-12)
    frame = found.to_frame().set_index("term")
    assert frame.loc["second_order", "mean"] == pytest.approx((slope + bend / 2).mean(), abs=1e-3)
    assert set(frame.index) == {"true", "first", "curvature", "second_order", "diagonal"}


def test_an_edit_that_changes_nothing_changes_no_loss() -> None:
    model = tiny.model("llama", dtype=torch.float64)
    samples = tt.story_samples(model, [tiny.story()])
    edit = an_edit(model)
    found = tt.loss_change(model, replace(edit, after=edit.before), samples, show_progress=False)
    assert all(np.abs(values).max() == 0 for values in found.samples.values())
    assert np.isnan(found.diagonal)


def test_a_loss_change_is_refused_where_it_would_mislead() -> None:
    model = tiny.model("llama")
    samples = tt.story_samples(model, [tiny.story()])
    edit = an_edit(model, matrices=("Q", "K"))
    of_q = tt.fisher_diagonal(model, samples, matrices=("Q",), show_progress=False)
    with pytest.raises(tt.TomsparseError, match="lacks matrix K of layer 0"):
        tt.loss_change(model, edit, samples, sensitivity=of_q, show_progress=False)
    with edit.applied(model), pytest.raises(tt.TomsparseError, match="active edit"):
        tt.loss_change(model, edit, samples, show_progress=False)
    with pytest.raises(tt.TomsparseError, match="edit"):
        tt.loss_change(tiny.model("llama", seed=1), edit, samples, show_progress=False)


@pytest.mark.parametrize("backend", tiny.BACKENDS)
def test_tuning_trains_the_masked_entries_and_nothing_else(backend: Any) -> None:
    model = tiny.model("llama", backend)
    samples = tt.story_samples(model, [tiny.story(i) for i in range(4)])
    mask = an_edit(model).mask
    before = {key: view(model).weight(key).clone() for key in view(model).keys(view(model).matrices)}
    tuned = tt.tune(model, mask, samples, steps=30, batch=3, lr=0.1, show_progress=False)
    assert all(torch.equal(before[key], view(model).weight(key)) for key in before)
    unedited = loss_by_hand(model, samples).mean()
    with tuned.edit.applied(model):
        for key, weight in before.items():
            moved = (view(model).weight(key) != weight).flatten().nonzero()[:, 0]
            inside = mask.entries.get(key, torch.empty(0, dtype=torch.int64))
            assert bool(torch.isin(moved, inside).all())
        trained = loss_by_hand(model, samples).mean()
    assert trained < unedited - 0.1
    again = tt.tune(model, mask, samples, steps=30, batch=3, lr=0.1, show_progress=False)
    assert again.losses == tuned.losses
    assert len(tuned.losses) == 30


def test_the_first_step_of_tuning_is_that_of_adam() -> None:
    """Adam's first update is lr against the sign of the gradient, in units of the matrix' size."""
    model = tiny.model("llama", dtype=torch.float64)
    samples = tt.story_samples(model, [tiny.story(i) for i in range(2)])
    mask = an_edit(model, matrices=("Q",)).mask
    tuned = tt.tune(model, mask, samples, steps=1, batch=2, lr=1e-3, show_progress=False)

    def loss() -> torch.Tensor:
        log_p = model(samples.tokens, attention_mask=samples.attention_mask.long()).log_softmax(-1)
        where = samples.supervised[:, 1:]
        right = log_p[:, :-1].gather(2, samples.tokens[:, 1:, None])[..., 0]
        return -((right * where).sum(1) / where.sum(1)).mean()

    keys = list(mask.shapes)
    gradients = dict(zip(keys, view(model).gradients(keys, loss)))
    assert tuned.losses[0] == pytest.approx(float(loss().detach()), abs=1e-6)
    for key, index in mask.entries.items():
        size = view(model).weight(key).square().mean().sqrt()
        step = tuned.edit.after[key] - tuned.edit.before[key]
        wanted = -1e-3 * size * gradients[key].flatten()[index].sign()
        torch.testing.assert_close(step, wanted, rtol=1e-3, atol=1e-9)


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


def test_part_of_an_edit_has_its_values_and_strength_scales_it() -> None:
    model = tiny.model("llama", dtype=torch.float64)
    edit = an_edit(model)
    kept = edit.mask.restrict(matrices=("Q",), layers=(1,))
    part = edit.restrict(kept)
    assert part.mask == kept
    assert torch.equal(part.after[1, "Q"], edit.after[1, "Q"])
    assert list(part.before) == [(1, "Q")]
    samples = tt.story_samples(model, [tiny.story()])
    options = {"attention_mask": samples.attention_mask.long(), "return_type": "logits"}
    half = {key: (edit.before[key] + edit.after[key]) / 2 for key in edit.before}
    with replace(edit, after=half).applied(model):
        wanted = model(samples.tokens, **options)
    found = model.run_with_hooks(samples.tokens, fwd_hooks=edit.hooks(model, strength=0.5), **options)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)
