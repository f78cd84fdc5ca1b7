"""Rotary frequencies against their formulas, written out by hand for every family."""

from __future__ import annotations

import math
from typing import Any

import families
import pytest
import torch
from families import D_HEAD, FAMILIES
from test_families import CASES

from tl_tomsparse._model import view
from tl_tomsparse.models import load_model

ROTARY = [(name, backend) for name, backend in CASES if FAMILIES[name].positions == "rotary"]
BASES = {"Mixtral": 1e6, "SmolLM3": 2e6, "Cohere": 5e5}
ROTARY_DIMS = {"Phi": 4, "Phi-3": 4, "StableLM": 2, "GPT-NeoX (Pythia)": 2, "GPT-J": 4, "GLM-4": 4}
ADJACENT = ("GPT-J", "Cohere", "GLM-4")


def frequencies(name: str, layer: int) -> list[float]:
    """Radians a position: base^(-2m / rotary_dim), then what the family's scaling says."""
    base, n = BASES.get(name, 1e4), ROTARY_DIMS.get(name, D_HEAD)
    if name == "Gemma 3":
        base = (1e4, 1e6)[layer]
    plain = [base ** (-2 * m / n) for m in range(n // 2)]
    if "linear" in name:
        return [theta / 2 for theta in plain]
    if "llama3" in name:  # factor 8, low 1, high 4, made for 64 tokens
        scaled = []
        for theta in plain:
            turns = 64 * theta / (2 * math.pi)
            smooth = min(1.0, max(0.0, (turns - 1) / (4 - 1)))
            scaled.append((1 - smooth) * theta / 8 + smooth * theta)
        return scaled
    if "yarn" in name:  # factor 4, made for 32 tokens, beta 32 and 1

        def dimension(turns: float) -> float:
            return n * math.log(32 / (turns * 2 * math.pi)) / (2 * math.log(base))

        low, high = max(math.floor(dimension(32)), 0), min(math.ceil(dimension(1)), n - 1)
        ramp = [min(1.0, max(0.0, (m - low) / (high - low))) for m in range(n // 2)]
        return [theta / 4 * r + theta * (1 - r) for theta, r in zip(plain, ramp)]
    return plain


@pytest.mark.parametrize(("name", "backend"), ROTARY)
def test_frequencies_and_pairs_are_those_of_the_formulas(name: str, backend: Any) -> None:
    model = load_model(families.directory(name), backend=backend, device="cpu")
    rotations, reasons = view(model).rotations
    assert set(reasons) == ({1} if name == "SmolLM3" else set())
    for layer, rotation in rotations.items():
        expected = frequencies(name, layer)
        assert rotation.frequencies.tolist() == pytest.approx(expected, rel=1e-5)
        pairs = list(zip(rotation.first.tolist(), rotation.second.tolist()))
        n = len(expected)
        half = [(m, m + n) for m in range(n)]
        assert pairs == ([(2 * m, 2 * m + 1) for m in range(n)] if name in ADJACENT else half)


def test_turning_is_multiplication_by_a_complex_number_and_back_again() -> None:
    rotations, _ = view(load_model(families.directory("GPT-J"), device="cpu")).rotations
    rotation = rotations[0]
    x = torch.randn(2, 5, 3, D_HEAD, dtype=torch.float64)
    positions = torch.tensor([[0, 1, 2, 3, 4], [7, 8, 9, 30, 31]])
    turned = rotation.turn(x, positions)
    for row in range(2):
        for at, position in enumerate(positions[row].tolist()):
            for m, theta in enumerate(rotation.frequencies.tolist()):
                i, j = int(rotation.first[m]), int(rotation.second[m])
                z = x[row, at, 0, i].item() + 1j * x[row, at, 0, j].item()
                z *= complex(math.cos(position * theta), math.sin(position * theta))
                assert turned[row, at, 0, [i, j]].tolist() == pytest.approx([z.real, z.imag], abs=1e-12)
    untouched = [d for d in range(D_HEAD) if d not in {*rotation.first.tolist(), *rotation.second.tolist()}]
    assert torch.equal(turned[..., untouched], x[..., untouched])
    torch.testing.assert_close(rotation.turn(turned, positions, back=True), x, rtol=0, atol=1e-12)
