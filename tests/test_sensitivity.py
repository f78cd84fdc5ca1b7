"""The empirical Fisher: exact per sample, and without a trace on the model."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import oracles
import pytest
import tiny
import torch
from torch import Tensor

import tl_tomsparse.sensitivity as module
from tl_tomsparse import _fisher_progress
from tl_tomsparse._checks import TomsparseError
from tl_tomsparse._model import view
from tl_tomsparse.edit import SparseEdit
from tl_tomsparse.ranking import top_fraction
from tl_tomsparse.samples import Samples, story_samples, text_samples
from tl_tomsparse.sensitivity import FisherAccumulator, Sensitivity, fisher_diagonal

every_backend = pytest.mark.parametrize("backend", tiny.BACKENDS)
every_model = pytest.mark.parametrize(
    ("kind", "backend"), [(kind, backend) for kind in tiny.KINDS for backend in tiny.BACKENDS]
)
STORIES = [tiny.story(i) for i in range(3)]


def prompts(model: Any) -> Samples:
    """Rows of different lengths with one or more supervised tokens."""
    return story_samples(model, STORIES, categories=("false_belief", "second_order", "reality"))


def mixed() -> Samples:
    """Rows from 2 to 40 tokens: supervised nowhere but the end, at two far places, everywhere."""
    generator = torch.Generator().manual_seed(0)
    lengths = (40, 2, 17, 33, 9, 25, 3)
    rows = [torch.randint(3, 300, (length,), generator=generator).tolist() for length in lengths]
    samples = Samples.from_rows(
        rows, [39, 1, 1, 30, 8, 3, 1], [f"row {i}" for i in range(7)], bos=False, supervise="text", pad=0
    )
    samples.supervised[3, 2] = True
    return samples


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())


def fisher(model: Any, samples: Samples, **options: Any) -> Sensitivity:
    return fisher_diagonal(
        model, samples, **{"matrices": view(model).matrices, "show_progress": False, **options}
    )


@every_model
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_the_per_sample_loop_of_transformers(kind: str, backend: str, dtype: torch.dtype) -> None:
    # Not closer than this in float64 either: transformers computes norms and softmax in float32.
    model = tiny.model(kind, backend, dtype=dtype)
    for samples in (prompts(model), mixed()):
        expected = oracles.fisher(tiny.hf_model(kind), samples)
        found = fisher(model, samples, batch_tokens=150)
        assert set(found) == set(expected)
        for key, value in expected.items():
            assert found[key].dtype == dtype
            assert relative_error(found[key], value) < 1e-5, key


@every_model
def test_every_entry_equals_autograd_on_the_same_model(kind: str, backend: str) -> None:
    model, samples = tiny.model(kind, backend, dtype=torch.float64), mixed()
    model_view = view(model)
    keys = model_view.keys(model_view.matrices)
    expected = {key: torch.zeros(model_view.shape(key), dtype=torch.float64) for key in keys}
    for n in range(len(samples)):
        model.zero_grad()
        per_row_loss(model, samples[[n]]).sum().backward()
        for key in keys:
            weight, grad = model_view.weight(key), model_view._weights.parameter(key).grad
            expected[key] += grad.as_strided(weight.shape, weight.stride()) ** 2 / len(samples)
    for key, value in fisher(model, samples).items():
        # The bridge computes norms and softmax in float32, as transformers does; HookedTransformer does not.
        rtol, atol = (1e-5, 1e-8) if backend == "bridge" else (1e-9, 1e-13)
        torch.testing.assert_close(value, expected[key], rtol=rtol, atol=atol * float(expected[key].max()))


def test_is_not_the_square_of_the_batch_gradient() -> None:
    model, samples = tiny.model("llama"), mixed()
    hf = tiny.hf_model("llama")
    torch.stack([oracles.sample_loss(hf, samples, n) for n in range(len(samples))]).mean().backward()
    weight, rows = oracles.hf_matrices(hf)[0, "Q"]
    wrong = oracles.canonical(hf, "Q", weight.grad[rows] ** 2)
    assert relative_error(fisher(model, samples)[0, "Q"], wrong) > 0.1


@every_backend
@pytest.mark.parametrize("batch_tokens", [1, 60, 10_000])
def test_batches_do_not_change_it(backend: str, batch_tokens: int) -> None:
    model = tiny.model("neox", backend, dtype=torch.float64)
    expected = fisher(model, mixed(), batch_tokens=100)
    found = fisher(model, mixed(), batch_tokens=batch_tokens)
    for key in expected:
        assert relative_error(found[key], expected[key]) < 1e-6


@every_backend
def test_a_subset_of_matrices_has_the_same_values(backend: str) -> None:
    # What is asked for decides where the graph starts.
    model = tiny.model("qwen2", backend, dtype=torch.float64)
    every = fisher(model, mixed())
    for matrices in (("Q", "K"), ("out",), ("V", "gate"), "O"):
        found = fisher(model, mixed(), matrices=matrices)
        assert {matrix for _, matrix in found} == set(matrices)
        for key, value in found.items():
            assert relative_error(value, every[key]) < 1e-12


@every_backend
def test_half_precision_is_squared_and_summed_in_float32(backend: str) -> None:
    model = tiny.model("llama", backend, dtype=torch.bfloat16)
    exact = fisher(tiny.model("llama", backend), mixed(), matrices=("Q", "K"))
    scaled = fisher(model, mixed(), matrices=("Q", "K"))
    for key, value in scaled.items():
        assert value.dtype == torch.float32
        # Activations have 8 bits, so values differ by some percent; squares and sums have 24.
        assert torch.corrcoef(torch.stack([value.flatten(), exact[key].flatten()]))[0, 1] > 0.9
        assert len(value.unique()) > 0.9 * value.numel()


@every_backend
def test_small_gradients_do_not_vanish(backend: str) -> None:
    model, samples = tiny.model("llama", backend), mixed()
    plain = {}
    for scale in (1.0, 1e-6):  # squares of 1e-12 are 0 in half precision
        with FisherAccumulator(model) as accumulator:
            (scale * per_row_loss(model, samples)).sum().backward()
        plain[scale] = accumulator.result()[0, "K"]
    assert relative_error(plain[1e-6] * 1e12, plain[1.0]) < 1e-5


def per_row_loss(model: Any, samples: Samples) -> Tensor:
    logits = model(samples.tokens, attention_mask=samples.attention_mask.long(), return_type="logits")
    nll = -logits[:, :-1].log_softmax(-1).gather(-1, samples.tokens[:, 1:, None])[..., 0]
    where = samples.supervised[:, 1:]
    return (nll * where).sum(1) / where.sum(1)


@every_model
@pytest.mark.parametrize("frozen", [False, True])
def test_accumulator_with_your_own_loss(kind: str, backend: str, frozen: bool) -> None:
    model = tiny.model(kind, backend)
    samples = mixed()
    if frozen:
        model.requires_grad_(False)
    with FisherAccumulator(model, matrices=("Q", "K", "out")) as accumulator:
        for rows in (slice(0, 4), slice(4, 7)):
            per_row_loss(model, samples[rows]).sum().backward()
    found = accumulator.result({"note": 1})
    expected = fisher(model, samples, matrices=("Q", "K", "out"))
    assert found.n_samples == len(samples)
    assert found.meta == {"note": 1}
    for key, value in expected.items():
        assert relative_error(found[key], value) < 1e-5
    assert all(p.requires_grad != frozen for p in model.parameters() if p.is_floating_point())


@every_backend
def test_two_forward_passes_before_one_backward_pass(backend: str) -> None:
    model, samples = tiny.model("llama", backend), mixed()
    with FisherAccumulator(model) as accumulator:
        sum(per_row_loss(model, samples[rows]).sum() for rows in (slice(0, 4), slice(4, 7))).backward()
    expected = fisher(model, samples, matrices=("Q", "K"))
    for key, value in accumulator.result().items():
        assert relative_error(value, expected[key]) < 1e-5


def state(model: Any) -> tuple[Any, ...]:
    hooks = {name: (len(p.fwd_hooks), len(p.bwd_hooks)) for name, p in model.hook_dict.items()}
    native = {name: len(p._forward_hooks) for name, p in model.hook_dict.items()}
    parameters = dict(model.named_parameters())
    flags = {name: p.requires_grad for name, p in parameters.items()}
    grads = {name: None if p.grad is None else p.grad.clone() for name, p in parameters.items()}
    weights = [t.numpy().tobytes() for t in map(Tensor.contiguous, view(model).parameters())]
    return hooks, native, flags, weights, grads


def assert_same_state(found: tuple[Any, ...], expected: tuple[Any, ...]) -> None:
    assert found[:-1] == expected[:-1]
    for name, grad in expected[-1].items():
        assert (grad is None) == (found[-1][name] is None), name
        assert grad is None or torch.equal(grad, found[-1][name]), name


@every_model
def test_leaves_the_model_as_it_was(kind: str, backend: str) -> None:
    model, samples = tiny.model(kind, backend), mixed()
    seen: list[torch.Size] = []
    model.add_hook("blocks.0.attn.hook_z", lambda z, hook: seen.append(z.shape))
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 3 != 0)
        if index % 3 == 1:
            parameter.grad = torch.full_like(parameter, 0.5)
    before = state(model)
    fisher(model, samples)
    assert_same_state(state(model), before)
    assert seen

    accumulator = FisherAccumulator(model)
    with suppress(KeyboardInterrupt), accumulator:
        per_row_loss(model, samples).sum().backward()
        raise KeyboardInterrupt
    assert_same_state(state(model), before)
    assert accumulator.result().n_samples == len(samples)


@every_backend
def test_hooks_that_change_activations_in_place_still_work(backend: str) -> None:
    model, samples = tiny.model("llama", backend), mixed()

    def knock_out(z: Tensor, hook: Any) -> Tensor:
        z[:, :, 1] = 0.0
        return z

    with model.hooks(fwd_hooks=[("blocks.0.attn.hook_q", knock_out)]):
        pass  # registered after ours below
    with FisherAccumulator(model) as accumulator, model.hooks([("blocks.0.attn.hook_q", knock_out)]):
        per_row_loss(model, samples).sum().backward()
    found = accumulator.result()[0, "Q"]
    assert not found[1].any()
    assert found[0].any()


@every_backend
def test_training_mode_and_processed_weights_are_refused(backend: str) -> None:
    model = tiny.model("llama", backend)
    model.train()
    with pytest.raises(TomsparseError, match=r"model\.eval\(\)"):
        fisher(model, mixed())
    model.eval()
    if backend == "bridge":
        model.enable_compatibility_mode()
    else:
        model.process_weights_()
    with pytest.raises(TomsparseError, match="processed"):
        fisher(model, mixed(), matrices=("Q", "K"))
    found = fisher(model, mixed(), matrices=("Q", "K"), allow_processed=True)
    assert found.identity.basis == "processed"


@every_backend
def test_gradients_that_are_not_finite_are_named(backend: str) -> None:
    model, samples = tiny.model("llama", backend), mixed()
    before = state(model)
    row = int(samples.lengths.argmax())
    token = next(t for t in samples.tokens[row, 1:].tolist() if (samples.tokens == t).sum() == 1)

    def poison(k: Tensor, hook: Any) -> Tensor:
        where = (lookup["tokens"] == token)[..., None, None]
        return torch.where(where.expand(k.shape), k * torch.inf, k)

    lookup: dict[str, Tensor] = {}
    original = module.Reader.__call__

    def remember(self: Any, tokens: Tensor, *others: Any) -> Tensor:
        lookup["tokens"] = tokens
        return original(self, tokens, *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.Reader, "__call__", remember)
        with (
            model.hooks([("blocks.1.attn.hook_k", poison)]),
            pytest.raises(TomsparseError, match=rf"gradient of [QK] in layer [01] .* '{samples.ids[row]}'"),
        ):
            fisher(model, samples, matrices=("Q", "K"))
    assert_same_state(state(model), before)


def test_misuse_of_the_accumulator_is_refused() -> None:
    model, samples = tiny.model("llama"), mixed()
    accumulator = FisherAccumulator(model)
    with pytest.raises(TomsparseError, match="No gradient"):
        accumulator.result()
    with accumulator:
        with torch.no_grad():
            per_row_loss(model, samples)
        with pytest.raises(TomsparseError, match="active already"), accumulator:
            pass
        loss = per_row_loss(model, samples).sum()
        loss.backward(retain_graph=True)
        with pytest.raises(TomsparseError, match="second backward"):
            loss.backward()
    with pytest.raises(TomsparseError, match="use shorter ones"):
        fisher(model, text_longer_than_the_context())


def text_longer_than_the_context() -> Samples:
    rows = [[5] * (tiny.N_CTX + 1)]
    return Samples.from_rows(rows, [1], ["long"], bos=False, supervise="text", pad=0)


@every_backend
def test_resumes_exactly(backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, samples, path = tiny.model("llama", backend), mixed(), tmp_path / "progress.safetensors"
    expected = fisher(model, samples, batch_tokens=60)
    monkeypatch.setattr(_fisher_progress, "_CHECKPOINT_SECONDS", 0.0)
    original, calls = module.row_losses, []

    def interrupted(read: Any, batch: Samples) -> Tensor:
        calls.append(batch.ids)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(read, batch)

    monkeypatch.setattr(module, "row_losses", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fisher(model, samples, batch_tokens=60, checkpoint=path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    done = {name for ids in calls[:2] for name in ids}
    calls.clear()
    calls.append(())  # the next calls are number 2, and then 4, 5 ...
    monkeypatch.setattr(
        module, "row_losses", lambda read, batch: calls.append(batch.ids) or original(read, batch)
    )
    found = fisher(model, samples, batch_tokens=60, checkpoint=path)
    assert not done & {name for ids in calls for name in ids}
    assert found.n_samples == expected.n_samples
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    calls.clear()
    again = fisher(model, samples, batch_tokens=60, checkpoint=path)
    assert not calls
    assert all(torch.equal(again[key], expected[key]) for key in expected)


def test_a_checkpoint_of_other_work_is_refused(tmp_path: Path) -> None:
    model, samples, path = tiny.model("llama"), mixed(), tmp_path / "progress.safetensors"
    fisher(model, samples, checkpoint=path)
    with pytest.raises(TomsparseError, match="other samples"):
        fisher(model, samples[:5], checkpoint=path)
    with pytest.raises(TomsparseError, match="other samples, matrices"):
        fisher(model, samples, matrices=("Q",), checkpoint=path)
    with pytest.raises(TomsparseError, match="checkpoint"):
        fisher(tiny.model("llama", seed=1), samples, checkpoint=path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(TomsparseError, match=r"progress\.safetensors"):
        fisher(model, samples, checkpoint=path)


@every_backend
def test_an_edited_model_has_its_own_sensitivity_and_checkpoints(backend: str, tmp_path: Path) -> None:
    model, samples, path = tiny.model("llama", backend), mixed(), tmp_path / "progress.safetensors"
    plain = fisher_diagonal(model, samples, checkpoint=path, show_progress=False)
    edit, other = (SparseEdit.scale(model, top_fraction(plain, 0.05), factor) for factor in (2.0, 3.0))
    found = []
    for each in (edit, other):
        with each.applied(model):
            found.append(fisher_diagonal(model, samples, show_progress=False))
            with pytest.raises(TomsparseError, match="or edits"):
                fisher_diagonal(model, samples, checkpoint=path, show_progress=False)
    assert plain.meta["edited"] is None
    assert all(each.identity == plain.identity for each in found)
    for one, two in ((plain, found[0]), (found[0], found[1])):
        with pytest.raises(TomsparseError, match="edited"):
            one.merge(two)


def test_merge_is_the_sensitivity_of_all_samples() -> None:
    model, samples = tiny.model("llama"), mixed()
    parts = [fisher(model, samples[rows]) for rows in (slice(0, 2), slice(2, 7))]
    merged, expected = parts[0].merge(parts[1]), fisher(model, samples)
    assert merged.n_samples == 7
    for key in expected:
        assert relative_error(merged[key], expected[key]) < 1e-5
    other = fisher(tiny.model("llama", seed=1), samples)
    with pytest.raises(TomsparseError, match="fingerprint"):
        merged.merge(other)
    with pytest.raises(TomsparseError, match="different matrices"):
        merged.merge(fisher(model, samples, matrices=("Q",)))
    with pytest.raises(TomsparseError, match="differently"):
        merged.merge(fisher(model, prompts(model)))


@every_backend
def test_saved_and_loaded_it_is_the_same(backend: str, tmp_path: Path) -> None:
    found = fisher(tiny.model("qwen2", backend), mixed())
    found.save(tmp_path / "f.safetensors")
    loaded = Sensitivity.load(tmp_path / "f.safetensors")
    assert list(loaded) == list(found) == list(loaded.keys())
    assert (loaded.n_samples, loaded.identity, loaded.meta) == (found.n_samples, found.identity, found.meta)
    assert all(torch.equal(loaded[key], found[key]) for key in found)
    assert repr(loaded) == repr(found)
    assert "\n" not in repr(found)


def test_frame_adds_up() -> None:
    found = fisher(tiny.model("llama"), mixed())
    frame = found.to_frame()
    assert len(frame) == 2 * (4 + 2 + 2 + 4 + 1 + 1 + 1)
    assert frame["n_weights"].sum() == sum(value.numel() for value in found.values.values())
    row = frame[(frame.layer == 1) & (frame.matrix == "K") & (frame["head"] == 1)].iloc[0]
    assert row["mean"] == pytest.approx(float(found[1, "K"][1].mean()))
    assert row["max"] == pytest.approx(float(found[1, "K"][1].max()))
    with pytest.raises(KeyError, match="not among"):
        found[9, "Q"]


@every_backend
def test_windows_of_text(backend: str) -> None:
    model = tiny.model("llama", backend)
    samples = text_samples(model, " ".join(tiny.CORPUS), length=24, n=4)
    expected = oracles.fisher(tiny.hf_model("llama"), samples)
    for key, value in fisher(model, samples).items():
        assert relative_error(value, expected[key]) < 1e-5
