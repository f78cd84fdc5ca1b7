"""Edits: their values, that hooks and weights agree, and that every bit comes back."""

import gc
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from tl_tomsparse import _applied, _interrupts
from tl_tomsparse._checks import TomsparseError
from tl_tomsparse._model import Key, ModelView, view
from tl_tomsparse.edit import SparseEdit
from tl_tomsparse.mask import SparseMask

MODELS = [(kind, backend) for kind in tiny.KINDS for backend in tiny.BACKENDS]
TOKENS = (torch.arange(2 * 11).view(2, 11) * 7) % 300 + 3


def a_mask(model: Any, seed: int = 0, share: float = 0.03, keys: list[Key] | None = None) -> SparseMask:
    seen = view(model)
    generator = torch.Generator().manual_seed(seed)
    keys = seen.keys(seen.matrices) if keys is None else keys
    return SparseMask.from_bool(
        model, {k: torch.rand(seen.shape(k), generator=generator) < share for k in keys}
    )


def raw_bytes(model: Any) -> list[bytes]:
    """The bytes of every parameter and buffer under every name."""
    modules = torch.nn.Module
    tensors = [
        *modules.parameters(model),
        *modules.buffers(model),
        *model.parameters(),
        *view(model).parameters(),
    ]
    return [tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes() for tensor in tensors]


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny.model("llama")


@pytest.fixture
def unchanged(llama: Any) -> Iterator[Any]:
    """A model that must have the same bytes, no active edit and the same signal handler after the test."""
    before, handler = raw_bytes(llama), signal.getsignal(signal.SIGINT)
    identity = view(llama).identity()
    yield llama
    assert raw_bytes(llama) == before
    assert view(llama).active_edits == []
    assert view(llama).identity() == identity
    assert signal.getsignal(signal.SIGINT) == handler


# ---- values


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_values_equal_their_definitions(kind: str, dtype: torch.dtype) -> None:
    model = tiny.model(kind, dtype=dtype)
    seen, mask = view(model), a_mask(model)
    edits = {
        "mean": SparseEdit.mean(model, mask),
        "zero": SparseEdit.zero(model, mask),
        "scale": SparseEdit.scale(model, mask, -1.5),
        "resample": SparseEdit.resample(model, mask, seed=3),
    }
    assert mask.counts("matrix").min() > 5
    for key in seen.keys(seen.matrices):
        weight, chosen = seen.weight(key).clone(), mask.to_bool(key)
        rest = weight[~chosen]
        for name, edit in edits.items():
            expected = weight.clone()
            if name == "mean":
                expected[chosen] = rest.double().sum().div(len(rest)).to(dtype)
            elif name == "zero":
                expected[chosen] = 0
            elif name == "scale":
                expected[chosen] = (weight[chosen].double() * -1.5).to(dtype)
            with edit.applied(model):
                found = seen.weight(key).clone()
            if name == "resample":
                assert torch.equal(found[~chosen], rest)
                assert torch.isin(found[chosen], rest).all()
                assert not torch.equal(found, weight)
            else:
                tolerance = torch.finfo(dtype).eps
                torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * 1e-3)
                assert torch.equal(found[~chosen], expected[~chosen])


def test_resampled_values_are_seeded_and_uniform_over_the_unmasked(llama: Any) -> None:
    key = (0, "Q")
    weight = view(llama).weight(key)
    mask = SparseMask.from_bool(llama, {key: weight > weight.median()})  # in blocks of all lengths
    first, again, other = (SparseEdit.resample(llama, mask, seed=seed).after[key] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    rest = weight[~mask.to_bool(key)]
    drawn = torch.cat([SparseEdit.resample(llama, mask, seed=seed).after[key] for seed in range(40)])
    assert set(drawn.tolist()) == set(rest.tolist())
    assert abs(drawn.mean() - rest.mean()) < 5 * rest.std() / len(drawn) ** 0.5


def test_values_are_fixed_once(unchanged: Any) -> None:
    edit = SparseEdit.mean(unchanged, a_mask(unchanged))
    with edit.applied(unchanged):
        with pytest.raises(TomsparseError, match=r"has an active edit, SparseEdit.*make this one before"):
            SparseEdit.mean(unchanged, edit.mask)
        for key in edit.before:
            assert not torch.equal(edit.before[key], edit.after[key])
    with pytest.raises(AttributeError):
        edit.operator = "other"  # type: ignore[misc]
    with pytest.raises(TypeError):
        edit.after[0, "Q"] = edit.before[0, "Q"]  # type: ignore[index]


def test_what_cannot_be_made_is_refused(unchanged: Any) -> None:
    seen = view(unchanged)
    full = SparseMask.from_bool(unchanged, {(1, "K"): torch.ones(seen.shape((1, "K")), dtype=torch.bool)})
    for make in (SparseEdit.mean, lambda m, x: SparseEdit.resample(m, x, seed=0)):
        with pytest.raises(TomsparseError, match="covers all of matrix K of layer 1"):
            make(unchanged, full)
    assert len(SparseEdit.zero(unchanged, full)) == len(full)
    for factor in (float("nan"), float("inf"), 1e300):
        with pytest.raises(TomsparseError, match="values that are not finite"):
            SparseEdit.scale(unchanged, full, factor)
    with pytest.raises(TomsparseError, match="seed=-1"):
        SparseEdit.resample(unchanged, a_mask(unchanged), seed=-1)
    for shapes in ({(9, "Q"): (4, 32, 8)}, {(0, "Q"): (32, 4, 8)}):
        stray = SparseMask(seen.identity(), shapes, dict.fromkeys(shapes, torch.tensor([1])))
        with pytest.raises(TomsparseError, match=r"no matrix Q of layer . of shape"):
            SparseEdit.zero(unchanged, stray)


# ---- the same model


def test_masks_and_edits_of_other_weights_are_refused(unchanged: Any, tmp_path: Path) -> None:
    mask = a_mask(unchanged)
    edit = SparseEdit.zero(unchanged, mask)
    mask.save(tmp_path / "mask.safetensors")
    loaded = SparseMask.load(tmp_path / "mask.safetensors")
    assert SparseEdit.zero(unchanged, loaded).mask == mask
    for other in (tiny.model("llama", seed=1), tiny.model("llama", dtype=torch.bfloat16), tiny.model("neox")):
        before = raw_bytes(other)
        with pytest.raises(TomsparseError, match=r"The mask is about 'llama-2-0' .*but the model is about"):
            SparseEdit.mean(other, loaded)
        with pytest.raises(TomsparseError, match="The edit is about 'llama-2-0'"), edit.applied(other):
            pytest.fail("entered")
        with pytest.raises(TomsparseError, match="The edit is about 'llama-2-0'"):
            edit.hooks(other)
        assert raw_bytes(other) == before


@pytest.mark.skipif(len(tiny.BACKENDS) < 2, reason="needs HookedTransformer")
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_an_edit_works_on_the_same_weights_behind_another_backend(kind: str) -> None:
    bridge, hooked = (tiny.model(kind, backend) for backend in ("bridge", "hooked"))
    edit = SparseEdit.mean(bridge, a_mask(bridge))
    with torch.no_grad(), edit.applied(bridge), edit.applied(hooked):
        torch.testing.assert_close(bridge(TOKENS), hooked(TOKENS), rtol=1e-4, atol=1e-4)


def test_changed_weights_are_noticed() -> None:
    model = tiny.model("qwen2")
    edit = SparseEdit.zero(model, a_mask(model))
    weight = view(model).weight((0, "Q"))
    weight[0, 0, 0] += 1  # by hand, at whatever entry
    with pytest.raises(TomsparseError, match="but the model is about"), edit.applied(model):
        pytest.fail("entered")
    weight[0, 0, 0] -= 1
    fresh = SparseEdit.zero(model, a_mask(model))
    with fresh.applied(model):
        view(model).weight((1, "V")).mul_(1.5)  # as a training step in the block would
    with pytest.raises(TomsparseError, match="but the model is about"), fresh.applied(model):
        pytest.fail("entered")


def test_entries_that_are_not_as_expected_are_refused(unchanged: Any) -> None:
    mask = a_mask(unchanged)
    edit = SparseEdit.scale(unchanged, mask, 2)
    with pytest.raises(TomsparseError, match=r"entries of matrix Q of layer 0 .*expects.*flat index"):
        edit.inverse.applied(unchanged).__enter__()
    with edit.applied(unchanged):
        with pytest.raises(TomsparseError, match=r"entries of matrix Q of layer 0 .*expects"):
            edit.hooks(unchanged)
        saved = view(unchanged).weight((1, "in")).clone()
        view(unchanged).weight((1, "in")).zero_()
        with pytest.raises(TomsparseError, match="entries of matrix in of layer 1"):
            edit.applied(unchanged).__enter__()
        view(unchanged).weight((1, "in")).copy_(saved)


# ---- hooks and weights agree


def agree(found: Tensor, expected: Tensor, tolerance: float = 2e-5) -> None:
    scale = float(expected.double().abs().max()) or 1.0
    assert float((found.double() - expected.double()).abs().max()) <= tolerance * scale


@pytest.mark.parametrize("matrix", ["Q", "K", "V", "O", "gate", "in", "out", "all"])
@pytest.mark.parametrize(("kind", "backend"), MODELS)
def test_hooks_equal_weights_in_logits(kind: str, backend: str, matrix: str) -> None:
    model = tiny.model(kind, backend, dtype=torch.float64)
    seen = view(model)
    if matrix not in (*seen.matrices, "all"):
        pytest.skip(f"{kind} has no {matrix}")
    edit = SparseEdit.scale(
        model, a_mask(model, keys=seen.keys(seen.matrices if matrix == "all" else (matrix,))), -2
    )
    before = raw_bytes(model)
    with torch.no_grad():
        plain = model(TOKENS)
        hooked = model.run_with_hooks(TOKENS, fwd_hooks=edit.hooks(model))
        with edit.applied(model):
            applied = model(TOKENS)
        assert torch.equal(model(TOKENS), plain)
    agree(hooked, applied, 1e-11)
    assert float((plain - applied).abs().max()) > 1e-3
    assert raw_bytes(model) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "backend"), MODELS)
def test_hooks_equal_weights_in_cache_gradients_and_generation(
    kind: str, backend: str, dtype: torch.dtype
) -> None:
    model = tiny.model(kind, backend, dtype=dtype)
    edit = SparseEdit.mean(model, a_mask(model, share=0.01))
    hooks = edit.hooks(model)
    tolerance = 2e-5 if dtype == torch.float32 else 0.1
    options: dict[str, Any] = {
        "do_sample": False,
        "verbose": False,
        "stop_at_eos": False,
        "max_new_tokens": 6,
    }

    def everything() -> tuple[dict[str, Tensor], dict[int, Tensor], Tensor]:
        with torch.no_grad():
            _, cache = model.run_with_cache(TOKENS)
            tokens = model.generate(TOKENS[:1], use_past_kv_cache=True, **options)
        leaves = [p for p in dict.fromkeys(model.parameters()) if p.requires_grad]
        loss = model(TOKENS, return_type="logits")[:, :-1].float().log_softmax(-1)
        loss = -loss.gather(-1, TOKENS[:, 1:, None]).mean()
        gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
        found = {i: g for i, g in enumerate(gradients) if g is not None}
        return {name: value for name, value in cache.items() if value is not None}, found, tokens

    with edit.applied(model):
        cache, gradients, tokens = everything()
    with model.hooks(fwd_hooks=hooks):
        hooked_cache, hooked_gradients, hooked_tokens = everything()
    assert cache.keys() == hooked_cache.keys()
    for name, value in cache.items():
        if value.is_floating_point() and not name.endswith("attn_scores"):  # these hold -inf
            agree(hooked_cache[name], value, tolerance)
    assert gradients.keys() == hooked_gradients.keys()
    assert len(gradients) > 10
    if dtype == torch.float32:
        for i, gradient in gradients.items():
            agree(hooked_gradients[i], gradient, 1e-4)
        assert torch.equal(tokens, hooked_tokens)
        greedy = TOKENS[:1]
        with torch.no_grad():
            for _ in range(6):  # without the key-value cache
                logits = model.run_with_hooks(greedy, fwd_hooks=hooks)
                greedy = torch.cat([greedy, logits[:, -1:].argmax(-1)], 1)
        assert torch.equal(tokens, greedy)
    with torch.no_grad():
        _, plain = model.run_with_cache(TOKENS)
    last = "blocks.1.hook_resid_post"
    assert float((plain[last] - cache[last]).abs().max()) > 10 * float(
        (hooked_cache[last] - cache[last]).abs().max()
    )


def test_hooks_are_pure_and_leave_nothing_behind(unchanged: Any) -> None:
    edit = SparseEdit.scale(unchanged, a_mask(unchanged), 3)
    hooks = edit.hooks(unchanged)
    once = unchanged.run_with_hooks(TOKENS, fwd_hooks=hooks)
    assert torch.equal(once, unchanged.run_with_hooks(TOKENS, fwd_hooks=hooks))
    cells = [cell for _, fn in hooks for cell in fn.args]
    assert cells
    assert not any(cells)  # no input, and so no graph, is kept
    with pytest.raises(TomsparseError, match="was not seen before its output"):
        unchanged.run_with_hooks(TOKENS, fwd_hooks=[hook for hook in hooks if hook[1].args])
    nothing = SparseEdit.mean(unchanged, a_mask(unchanged, share=0))
    assert nothing.hooks(unchanged) == []
    with nothing.applied(unchanged):
        pass


# ---- exactly undone


class OfTheBlock(Exception):
    """Raised by a test inside a block."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("kind", "backend"), MODELS)
def test_every_bit_comes_back(kind: str, backend: str, dtype: torch.dtype) -> None:
    model = tiny.model(kind, backend, dtype=dtype)
    special = view(model).weight((0, "V"))
    special[0, 0, 0], special[0, 0, 1] = (
        -0.0,
        torch.finfo(dtype).tiny,
    )  # bits that comparing numbers would miss
    before = raw_bytes(model)
    mask = a_mask(model) | SparseMask.from_bool(model, {(0, "V"): torch.ones_like(special, dtype=torch.bool)})
    edit = SparseEdit.scale(model, mask, 0.3)
    for error in (None, OfTheBlock, KeyboardInterrupt, SystemExit, GeneratorExit):
        with pytest.raises(error) if error else nullcontext(), edit.applied(model) as entered:
            assert entered is edit
            assert raw_bytes(model) != before
            if error is not None:
                raise error
        assert raw_bytes(model) == before
        assert view(model).active_edits == []
        assert view(model).identity() == edit.identity


def fail_at(monkeypatch: pytest.MonkeyPatch, when: int, fail: Callable[[], None], after: bool) -> list[Key]:
    """Let the n-th write to a weight fail, before or after it has happened; lists all writes."""
    written: list[Key] = []
    overwrite = ModelView.overwrite

    def failing(self: ModelView, key: Key, place: tuple[Tensor, ...], values: Tensor) -> None:
        written.append(key)
        if after:
            overwrite(self, key, place, values)
        if len(written) - 1 == when:
            fail()
        if not after:
            overwrite(self, key, place, values)

    monkeypatch.setattr(ModelView, "overwrite", failing)
    return written


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("how", ["exception", "interrupt", "signal"])
def test_a_failure_at_any_write_is_undone(unchanged: Any, how: str, after: bool) -> None:
    edit = SparseEdit.mean(unchanged, a_mask(unchanged))
    before = raw_bytes(unchanged)
    n = len(edit.before)

    def fail() -> None:
        if how == "signal":
            signal.raise_signal(signal.SIGINT)
        else:
            raise KeyboardInterrupt if how == "interrupt" else OfTheBlock

    expected = OfTheBlock if how == "exception" else KeyboardInterrupt
    for when in range(2 * n):
        entered = False
        with pytest.MonkeyPatch.context() as patch:
            fail_at(patch, when, fail, after)
            with pytest.raises(expected), edit.applied(unchanged):
                entered = True
        assert entered == (when >= n)
        assert raw_bytes(unchanged) == before, when
        assert view(unchanged).active_edits == []


def test_weights_that_cannot_be_restored_stay_marked(unchanged: Any) -> None:
    edit = SparseEdit.zero(unchanged, a_mask(unchanged))
    block = edit.applied(unchanged)
    block.__enter__()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ModelView, "overwrite", lambda *_: (_ for _ in ()).throw(OfTheBlock()))
        with pytest.raises(OfTheBlock):
            block.__exit__(None, None, None)
    assert view(unchanged).active_edits == [block]
    with pytest.raises(TomsparseError, match="has an active edit"):
        SparseEdit.zero(unchanged, edit.mask)
    block.__exit__(None, None, None)


def test_ctrl_c_at_any_instruction_of_entering_and_leaving_is_undone(unchanged: Any) -> None:
    edit = SparseEdit.zero(unchanged, a_mask(unchanged, keys=[(0, "Q"), (1, "K")]))
    before = raw_bytes(unchanged)
    ours = {_applied.__file__, _interrupts.__file__}
    seen = raised = 0

    def run(when: int) -> int:
        """Enter and leave, with Ctrl-C at one instruction; gives how many there were."""
        count = 0

        def trace(frame: Any, event: str, arg: Any) -> Any:
            nonlocal count
            if frame.f_code.co_filename not in ours:
                return None
            frame.f_trace_opcodes = True
            count += 1
            if count == when:
                signal.raise_signal(signal.SIGINT)
            return trace

        block = edit.applied(unchanged)
        old = sys.gettrace()
        sys.settrace(trace)
        try:
            with block:
                pass
        finally:
            sys.settrace(old)
        return count

    total = run(0)
    for when in range(1, total + 1):
        seen += 1
        try:
            run(when)
        except KeyboardInterrupt:
            raised += 1
        assert raw_bytes(unchanged) == before, f"instruction {when} of {total}"
        assert view(unchanged).active_edits == []
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert seen == raised > 200


def test_interrupts_in_the_block_are_not_held_back(unchanged: Any) -> None:
    edit = SparseEdit.zero(unchanged, a_mask(unchanged))
    reached = []

    def interrupted() -> None:
        with edit.applied(unchanged), edit.applied(unchanged):
            signal.raise_signal(signal.SIGINT)
            reached.append(True)

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert reached == []


def test_other_handlers_are_respected(unchanged: Any) -> None:
    edit = SparseEdit.zero(unchanged, a_mask(unchanged))
    got: list[str] = []
    old = signal.signal(signal.SIGINT, lambda *_: got.append("outer"))
    try:
        with edit.applied(unchanged):
            signal.raise_signal(signal.SIGINT)
            inner = signal.signal(signal.SIGINT, lambda *_: got.append("inner"))
            signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert got == ["outer", "inner", "inner"]
        del inner
        for ignored in (signal.SIG_IGN, signal.SIG_DFL):
            signal.signal(signal.SIGINT, ignored)
            with edit.applied(unchanged):
                assert signal.getsignal(signal.SIGINT) == ignored
    finally:
        signal.signal(signal.SIGINT, old)


def test_blocks_in_other_threads_and_abandoned_generators_are_undone(unchanged: Any) -> None:
    edit = SparseEdit.zero(unchanged, a_mask(unchanged))
    before = raw_bytes(unchanged)
    inside: list[bool] = []

    def work() -> None:
        with edit.applied(unchanged):
            inside.append(raw_bytes(unchanged) != before)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert inside == [True]

    def generate() -> Iterator[int]:
        with edit.applied(unchanged):
            yield 1
            yield 2

    generator = generate()
    next(generator)
    assert raw_bytes(unchanged) != before
    del generator
    gc.collect()
    assert raw_bytes(unchanged) == before


def test_nested_edits_undo_in_order(unchanged: Any) -> None:
    first = SparseEdit.mean(unchanged, a_mask(unchanged, 0, 0.3))
    second = SparseEdit.zero(unchanged, a_mask(unchanged, 1, 0.3))
    assert len(first.mask & second.mask) > 100
    states = [raw_bytes(unchanged)]
    with first.applied(unchanged):
        states.append(raw_bytes(unchanged))
        with second.applied(unchanged):
            states.append(raw_bytes(unchanged))
            assert all(
                (view(unchanged).weight(key)[second.mask.to_bool(key)] == 0).all() for key in second.before
            )
            with first.applied(unchanged), first.applied(unchanged), second.applied(unchanged):
                pass
            assert raw_bytes(unchanged) == states[2]
        assert raw_bytes(unchanged) == states[1]
        with pytest.raises(OfTheBlock), second.applied(unchanged):
            raise OfTheBlock
        assert raw_bytes(unchanged) == states[1]
    assert raw_bytes(unchanged) == states[0]
    assert len(set(map(tuple, states))) == 3


def test_leaving_out_of_order_or_twice_is_refused_and_changes_nothing(unchanged: Any) -> None:
    edit = SparseEdit.zero(unchanged, a_mask(unchanged, 0))
    outer, inner = (
        edit.applied(unchanged),
        SparseEdit.mean(unchanged, a_mask(unchanged, 1)).applied(unchanged),
    )
    with pytest.raises(TomsparseError, match="is not active"):
        outer.__exit__(None, None, None)
    outer.__enter__()
    inner.__enter__()
    state = raw_bytes(unchanged)
    with pytest.raises(
        TomsparseError, match=r"SparseEdit\(mean.* was entered after SparseEdit\(zero.*leave it first"
    ):
        outer.__exit__(None, None, None)
    with pytest.raises(TomsparseError, match="was entered before"):
        outer.__enter__()
    assert raw_bytes(unchanged) == state
    inner.__exit__(None, None, None)
    outer.__exit__(None, None, None)
    with pytest.raises(TomsparseError, match="is not active"):
        outer.__exit__(None, None, None)


def test_blocks_work_in_inference_mode_and_with_frozen_weights(unchanged: Any) -> None:
    edit = SparseEdit.mean(unchanged, a_mask(unchanged))
    with torch.no_grad():
        expected = unchanged.run_with_hooks(TOKENS, fwd_hooks=edit.hooks(unchanged))
    with ExitStack() as stack, torch.inference_mode():
        stack.enter_context(edit.applied(unchanged))
        agree(unchanged(TOKENS), expected)
    wanted = [p for p in unchanged.parameters() if p.requires_grad]
    try:
        for parameter in wanted:
            parameter.requires_grad_(False)
        with edit.applied(unchanged):
            agree(unchanged(TOKENS), expected)
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)


def test_a_backward_pass_outside_its_block_is_refused_by_autograd(unchanged: Any) -> None:
    edit = SparseEdit.mean(unchanged, a_mask(unchanged))
    with edit.applied(unchanged):
        loss = unchanged(TOKENS).float().square().mean()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    unchanged.zero_grad(set_to_none=True)


# ---- algebra and forms


def test_the_inverse_restores(unchanged: Any) -> None:
    edit = SparseEdit.scale(unchanged, a_mask(unchanged), -1)
    before = raw_bytes(unchanged)
    with torch.no_grad():
        plain = unchanged(TOKENS)
        with edit.applied(unchanged):
            agree(unchanged.run_with_hooks(TOKENS, fwd_hooks=edit.inverse.hooks(unchanged)), plain)
            with edit.inverse.applied(unchanged):
                assert raw_bytes(unchanged) == before
            assert raw_bytes(unchanged) != before
    assert "inverse of scale -1" in repr(edit.inverse)


def test_the_union_of_disjoint_edits_is_both(unchanged: Any) -> None:
    mask = a_mask(unchanged, 0, 0.2)
    other = a_mask(unchanged, 1, 0.2) - mask
    other = other.restrict(matrices=["Q", "K", "in"])
    first, second = SparseEdit.mean(unchanged, mask), SparseEdit.zero(unchanged, other)
    both = first | second
    assert both.mask == mask | other
    with first.applied(unchanged), second.applied(unchanged):
        expected = raw_bytes(unchanged)
    for edit in (both, second | first):
        with edit.applied(unchanged):
            assert raw_bytes(unchanged) == expected
    with pytest.raises(TomsparseError, match="entries in common, the first in matrix Q of layer 0"):
        first | SparseEdit.zero(unchanged, mask.restrict(matrices=["Q"]))
    stranger = tiny.model("llama", seed=1)
    with pytest.raises(TomsparseError, match="The first edit is about"):
        first | SparseEdit.zero(stranger, a_mask(stranger))
    with pytest.raises(TypeError, match="unsupported operand"):
        first | mask  # type: ignore[operator]


def test_the_same_operator_works_on_another_mask(unchanged: Any) -> None:
    mask, other = a_mask(unchanged), a_mask(unchanged, 1)

    def made(on: SparseMask) -> list[SparseEdit]:
        return [
            SparseEdit.mean(unchanged, on),
            SparseEdit.zero(unchanged, on),
            SparseEdit.scale(unchanged, on, 3),
            SparseEdit.resample(unchanged, on, seed=2),
        ]

    for edit, expected in zip(made(mask), made(other)):
        found = edit.on(unchanged, other)
        assert (found.mask, found.operator) == (other, edit.operator)
        assert found.after.keys() == expected.after.keys()
        assert all(torch.equal(values, expected.after[key]) for key, values in found.after.items())
    first, second = made(mask)[0], made(other - mask)[1]
    for joined in (first.inverse, first | second):
        with pytest.raises(TomsparseError, match="has no rule of its own"):
            joined.on(unchanged, other)


def test_forms_for_reading(unchanged: Any) -> None:
    edit = SparseEdit.scale(unchanged, a_mask(unchanged), 2)
    assert len(edit) == len(edit.mask)
    assert repr(edit) == "SparseEdit(scale 2: " + repr(edit.mask).removeprefix("SparseMask(")
    assert len(repr(edit).splitlines()) == 1
    assert "<script" not in edit._repr_html_()
    assert "SparseEdit(scale 2: " in edit._repr_html_()
    frame = edit.to_frame()
    assert list(frame.columns) == [*edit.mask.to_frame().columns, "before", "after"]
    assert (frame.after == 2 * frame.before).all()
    row = frame[(frame.layer == 1) & (frame.matrix == "out")].iloc[0]
    assert view(unchanged).weight((1, "out"))[row.row, row.col] == row.before
