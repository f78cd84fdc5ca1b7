"""The loss along an edit against the gradient and the whole Hessian of equations in float64."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from equations import Equations

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


def losses_along(
    model: Any, samples: tt.Samples, edit: tt.SparseEdit
) -> tuple[Callable[[int, torch.Tensor], torch.Tensor], torch.Tensor]:
    """The loss of a sample as a function of the edited entries' changes, from equations in float64; and the
    edit's changes.
    """
    equations = Equations(tiny.hf_model("llama" if view(model).d_mlp == 48 else "neox"))
    changes = torch.cat([edit.changes[key] for key in edit.before])

    def loss(n: int, change: torch.Tensor) -> torch.Tensor:
        weights, at = dict(equations.weights), 0
        for key in edit.before:
            index = edit.mask.entries[key]
            flat = weights[key].flatten()
            flat = flat.index_add(0, index, change[at : at + len(index)])
            weights[key], at = flat.view(weights[key].shape), at + len(index)
        tokens = samples.tokens[n][samples.attention_mask[n]]
        positions = samples.supervised[n].nonzero()[:, 0]
        log_p = equations.logits(tokens, weights).log_softmax(-1)
        return -log_p[positions - 1, tokens[positions]].mean()

    return loss, changes


@pytest.mark.parametrize("backend", tiny.BACKENDS)
@pytest.mark.parametrize("kind", ["llama", "neox"])
def test_derivatives_along_an_edit_are_those_of_the_whole_hessian(kind: str, backend: Any) -> None:
    """Gradient and Hessian of the edited entries, from equations in float64. What is left is the float32
    inside transformers' float64 models: norms and angles of rotation as well as the softmax.
    """
    model = tiny.model(kind, backend, dtype=torch.float64)
    samples = tt.story_samples(model, [tiny.story(i) for i in range(2)], categories=("memory",))
    edit = an_edit(model, share=0.004)
    loss, change = losses_along(model, samples, edit)
    sensitivity = tt.fisher_diagonal(model, samples, matrices=("Q", "K", "O", "in"), show_progress=False)
    found = tt.loss_change(
        model, edit, samples, sensitivity=sensitivity, batch_tokens=60, show_progress=False
    )
    zero = torch.zeros_like(change)
    expected: dict[str, list[float]] = {"true": [], "first": [], "curvature": []}
    for n in range(len(samples)):
        of = partial(loss, n)
        expected["true"].append(float(of(change) - of(zero)))
        expected["first"].append(float(torch.autograd.functional.jacobian(of, zero) @ change))
        expected["curvature"].append(float(change @ torch.autograd.functional.hessian(of, zero) @ change / 2))
    for term, values in expected.items():
        size = np.abs(values).max()
        assert size > 1e-3, term
        np.testing.assert_allclose(found.samples[term], values, rtol=0, atol=3e-5 * max(size, 0.1))
    by_hand = sum(
        sensitivity[row.layer, row.matrix].flatten()[row.flat].item() * (row.after - row.before) ** 2 / 2
        for row in edit.to_frame().itertuples()
    )
    assert found.diagonal == pytest.approx(by_hand, rel=1e-12)
    frame = found.to_frame().set_index("term")
    second = np.add(expected["first"], expected["curvature"]).mean()
    assert frame.loc["second_order", "mean"] == pytest.approx(second, abs=1e-4)
    assert set(frame.index) == {"true", "first", "curvature", "second_order", "diagonal"}


@pytest.mark.parametrize("backend", tiny.BACKENDS)
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_the_true_change_is_that_of_the_edited_model(kind: str, backend: Any) -> None:
    """And the derivatives are those of differences, as far as float32 inside transformers lets these go."""
    model = tiny.model(kind, backend, dtype=torch.float64)
    samples = tt.story_samples(
        model, [tiny.story(i) for i in range(3)], categories=("false_belief", "memory")
    )
    edit = an_edit(model)

    def at(t: float) -> np.ndarray:
        after = {key: edit.before[key] + t * (edit.after[key] - edit.before[key]) for key in edit.before}
        with replace(edit, after=after).applied(model):
            return loss_by_hand(model, samples)

    h = 0.05  # large, for noise of 1e-7
    values = {t: at(t) for t in (-2 * h, -h, 0.0, h, 2 * h, 1.0)}
    slope = (8 * (values[h] - values[-h]) - (values[2 * h] - values[-2 * h])) / (12 * h)
    bend = (16 * (values[h] + values[-h]) - (values[2 * h] + values[-2 * h]) - 30 * values[0.0]) / (12 * h**2)
    found = tt.loss_change(model, edit, samples, batch_tokens=60, show_progress=False)
    assert np.abs(bend).max() > 1e-3
    np.testing.assert_allclose(found.samples["true"], values[1.0] - values[0.0], rtol=0, atol=1e-10)
    np.testing.assert_allclose(found.samples["first"], slope, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(found.samples["curvature"], bend / 2, rtol=1e-2, atol=1e-3)


def test_derivatives_are_taken_where_the_caller_takes_none() -> None:
    model = tiny.model("llama", dtype=torch.float64)
    samples = tt.story_samples(model, [tiny.story()])
    edit = an_edit(model)
    usual = tt.loss_change(model, edit, samples, show_progress=False)
    with torch.no_grad():
        found = tt.loss_change(model, edit, samples, show_progress=False)
    for term, values in usual.samples.items():
        np.testing.assert_array_equal(found.samples[term], values)
    with torch.inference_mode(), pytest.raises(tt.TomsparseError, match="inference_mode"):
        tt.loss_change(model, edit, samples, show_progress=False)


def test_an_edit_of_no_entries_changes_no_loss() -> None:
    model = tiny.model("llama")
    samples = tt.story_samples(model, [tiny.story()])
    mask = an_edit(model).mask
    found = tt.loss_change(model, tt.SparseEdit.mean(model, mask - mask), samples, show_progress=False)
    assert all(np.abs(values).max() == 0 for values in found.samples.values())


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
