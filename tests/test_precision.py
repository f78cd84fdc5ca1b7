"""What the README says of squares in float16 is so on the embedded model."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

import tl_tomsparse as tt


def test_squares_in_float16_lose_small_gradients_and_choose_other_weights_here() -> None:
    path = Path(__file__).parents[1] / "benchmarks" / "precision.py"
    spec = importlib.util.spec_from_file_location("precision", path)
    assert spec is not None
    assert spec.loader is not None
    precision = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(precision)
    model = tt.load_model(device="cpu")
    stories = tt.generate_stories(60, seed=0, split="dev")
    samples = tt.story_samples(model, stories, categories=("false_belief",))
    right = dict(tt.fisher_diagonal(model, samples, show_progress=False).items())
    half = precision.squares_in_float16(model, samples, list(right))
    zero = sum(int((v == 0).sum()) for v in half.values()) / sum(v.numel() for v in half.values())
    assert zero > 0.99
    assert 0.1 < precision.kept(half, right, 1e-3) < 0.5
    assert precision.kept(right, right, 1e-3) == 1.0
    # In float32 the top of each matrix is that of float64, within one in a hundred.
    exact = tt.load_model(device="cpu", dtype=torch.float64)
    reference = dict(tt.fisher_diagonal(exact, samples, show_progress=False).items())
    for kappa in precision.KAPPAS:
        assert precision.kept(right, reference, kappa) >= 0.99
    assert precision.kept(half, right, 1e-5) < 0.5
    assert precision.kept({key: -value for key, value in right.items()}, right, 1e-3) < 0.01
