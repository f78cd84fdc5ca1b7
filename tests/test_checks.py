"""Everything that the functions refuse ends in one message with what was found and the cure."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import tl_tomsparse as tt
from tests import tiny
from tl_tomsparse._checks import TomsparseError, check_choice, check_kappa, check_positive

STORIES = [tiny.story(number) for number in range(2)]


@pytest.fixture(scope="module")
def sensitivity() -> tt.Sensitivity:
    model = tiny.model()
    return tt.fisher_diagonal(model, tt.story_samples(model, STORIES), show_progress=False)


def test_a_refusal_is_a_value_error():
    assert issubclass(TomsparseError, ValueError)


@pytest.mark.parametrize("kappa", [-1e-9, 1.0001, float("nan"), float("inf")])
def test_kappa_is_a_share(kappa, sensitivity):
    for refuse in (check_kappa, lambda kappa: tt.top_fraction(sensitivity, kappa)):
        with pytest.raises(TomsparseError, match=r"is outside \[0, 1\]; .*for example 1e-5"):
            refuse(kappa)
    check_kappa(0.0)
    check_kappa(1.0)


def test_choices_and_counts():
    with pytest.raises(TomsparseError, match=r"colour='green' is not one of 'red', 'blue'\."):
        check_choice("colour", "green", ("red", "blue"))
    with pytest.raises(TomsparseError, match=r"n=0 must be at least 1\."):
        check_positive("n", 0)
    check_positive("n", 1)


def work(model) -> dict[str, Callable[[], object]]:
    """Every function that runs the model."""
    return {
        "sensitivity": lambda: tt.fisher_diagonal(
            model, tt.story_samples(model, STORIES), show_progress=False
        ),
        "scores": lambda: tt.score_stories(model, STORIES, show_progress=False),
        "perplexity": lambda: tt.perplexity(
            model, tt.text_samples(model, list(tiny.CORPUS), length=16), show_progress=False
        ),
    }


@pytest.mark.parametrize("backend", tiny.BACKENDS)
def test_a_model_in_training_mode_is_refused_everywhere(backend):
    model = tiny.model(backend=backend)
    model.train()
    for call in work(model).values():
        with pytest.raises(TomsparseError, match=r"training mode.*eval"):
            call()
    model.eval()
    for call in work(model).values():
        call()


def test_folded_weights_are_refused(sensitivity):
    model = tiny.model()
    model.enable_compatibility_mode(disable_warnings=True)
    with pytest.raises(TomsparseError, match=r"(?i)processed|folded"):
        tt.fisher_diagonal(model, tt.story_samples(model, STORIES), show_progress=False)
    with pytest.raises(TomsparseError):
        tt.SparseEdit.mean(model, tt.top_fraction(sensitivity, 0.01))


def test_a_mask_of_another_model_is_refused_and_nothing_written(sensitivity):
    mask = tt.top_fraction(sensitivity, 0.01)
    for other in (tiny.model(seed=1), tiny.model("qwen2"), tiny.model(dtype=torch.float64)):
        before = {name: value.clone() for name, value in other.state_dict().items()}
        with pytest.raises(TomsparseError, match="fingerprint"):
            tt.SparseEdit.mean(other, mask)
        assert all(torch.equal(before[name], value) for name, value in other.state_dict().items())


def test_no_stories_and_no_samples_are_refused():
    model = tiny.model()
    for call in (
        lambda: tt.generate_stories(0),
        lambda: tt.story_samples(model, []),
        lambda: tt.score_stories(model, []),
        lambda: tt.text_samples(model, ""),
        lambda: tt.text_samples(model, "short", length=100),
    ):
        with pytest.raises(TomsparseError):
            call()
