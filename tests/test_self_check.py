"""`self_check` says yes where everything works, and no where something does not."""

from __future__ import annotations

import re
import sys
import warnings
from dataclasses import replace
from typing import Any

import families
import pytest
import tiny
import torch
from families import FAMILIES
from test_edit import raw_bytes
from test_families import CASES

import tl_tomsparse as tt
from tl_tomsparse._model import view

module = sys.modules["tl_tomsparse.self_check"]  # the package's own name of it is the function


# TransformerLens mixes float32 into these, or rounds until another expert is chosen.
NOT_IN_HALF = (("Mixtral", "hooked"), ("OLMoE", "hooked"), ("GPT-OSS", "hooked"), ("CodeGen", "bridge"))


def status(report: tt.SelfCheck) -> dict[str, str]:
    return {check.name: check.status for check in report.checks}


@pytest.mark.parametrize(("name", "backend"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_family_is_fully_supported(name: str, backend: Any, dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and (name, backend) in NOT_IN_HALF:
        with pytest.raises(
            tt.TomsparseError, match=r"same dtype.*load it with dtype=torch.float32|computes other logits"
        ):
            tt.load_model(families.directory(name), backend=backend, device="cpu", dtype=dtype)
        return
    model = tt.load_model(families.directory(name), backend=backend, device="cpu", dtype=dtype)
    model(torch.tensor([[5, 6]]))  # LongRoPE writes down the frequencies of the length it saw last
    before = raw_bytes(model)  # bytes: HookedTransformer's Bloom has a parameter that is never set
    report = tt.self_check(model)
    model(torch.tensor([[5, 6]]))
    assert report.ok, str(report)
    assert status(report)["rotation"] == ("yes" if FAMILIES[name].positions == "rotary" else "not there")
    assert raw_bytes(model) == before
    assert "fully supported" in str(report)
    assert set(report.to_frame().name) == set(status(report))


@pytest.mark.parametrize("name", ["DeepSeek-V3", "Mamba"])
def test_a_model_that_cannot_be_examined_gets_a_report_too(name: str) -> None:
    with pytest.warns(
        UserWarning, match=f"(?s)may be wrong or be refused: .*{re.escape(FAMILIES[name].refused)}"
    ):
        model = tt.load_model(families.directory(name), device="cpu")
    report = tt.self_check(model)
    assert not report.ok
    assert FAMILIES[name].refused in str(report)
    assert not tt.self_check(torch.nn.Linear(2, 2)).ok


@pytest.mark.parametrize("backend", tiny.BACKENDS)
def test_loading_says_what_the_cheap_check_finds(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*may be wrong or be refused")
        model = tt.load_model(tiny.directory("llama"), backend=backend, device="cpu")
    before = raw_bytes(model)
    report = tt.self_check(model, cheap=True)
    assert [check.name for check in report.checks] == ["matrices", "weights", "edit"]
    assert report.ok
    assert raw_bytes(model) == before
    monkeypatch.setattr(module, "_edit", lambda *_: ("no", "an edit does not change the logits"))
    with pytest.warns(UserWarning, match="(?s)be refused: .*an edit does not change the logits"):
        tt.load_model(tiny.directory("llama"), backend=backend, device="cpu")


def test_frozen_parameters_are_no_obstacle_and_stay_frozen() -> None:
    model = tiny.model()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert tt.self_check(model).ok
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_says_no_to_training_mode_and_folded_weights() -> None:
    model = tiny.model().train()
    assert "model.eval()" in str(tt.self_check(model))
    folded = tiny.model()
    folded.enable_compatibility_mode()
    report = tt.self_check(folded)
    assert status(report)["weights"] == "no"
    assert not report.ok


def broken_sensitivity(monkeypatch: pytest.MonkeyPatch) -> str:
    right = module.fisher_diagonal
    monkeypatch.setattr(
        module, "fisher_diagonal", lambda *a, **k: {key: 1.1 * v for key, v in right(*a, **k).items()}
    )
    return "sensitivity"


def no_gradient(monkeypatch: pytest.MonkeyPatch) -> str:
    right = module.fisher_diagonal
    monkeypatch.setattr(
        module, "fisher_diagonal", lambda *a, **k: {key: 0 * v for key, v in right(*a, **k).items()}
    )
    return "sensitivity"


def hooks_that_do_nothing(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(module.SparseEdit, "hooks", lambda self, model: [])
    return "edit"


def padding_that_is_seen(monkeypatch: pytest.MonkeyPatch) -> str:
    right = module._logits
    monkeypatch.setattr(module, "_logits", lambda seen, s: right(seen, s) + s.tokens.shape[1])
    return "padding"


def other_frequencies(monkeypatch: pytest.MonkeyPatch) -> str:
    from tl_tomsparse import _model_rotary

    def wrong(*given: Any) -> list[list[Any]]:
        groups = right(*given)
        return [[replace(r, frequencies=1.05 * r.frequencies) for r in group] for group in groups]

    right = _model_rotary._candidates
    monkeypatch.setattr(_model_rotary, "_candidates", wrong)
    return "rotation"


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        (broken_sensitivity, "llama"),
        (no_gradient, "llama"),
        (hooks_that_do_nothing, "llama"),
        (padding_that_is_seen, "llama"),
        (other_frequencies, "llama"),
        (other_frequencies, "neox"),  # where rotated queries are rebuilt
    ],
)
def test_each_check_can_fail(fault: Any, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model(kind)
    name = fault(monkeypatch)
    report = tt.self_check(model)
    assert status(report)[name] == "no", str(report)
    assert [n for n, s in status(report).items() if s == "no"] == [name]


def test_a_hook_that_changes_weights_inputs_is_noticed() -> None:
    model = tiny.model()
    assert view(model)  # found before the hook came
    model.add_hook("blocks.0.attn.hook_q", lambda value, hook: value.roll(1, 1))
    report = tt.self_check(model)
    assert not report.ok
