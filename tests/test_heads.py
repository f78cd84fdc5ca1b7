"""Designs, ablations, scores, resuming and refusals of head knock-outs; families are beside it."""

from __future__ import annotations

import signal
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import tiny
import torch
from test_heads_families import hooks_of, margins, tokens_of

from tl_tomsparse import _meter, _model_reader
from tl_tomsparse._checks import TomsparseError
from tl_tomsparse._knockouts import PASS, _groups
from tl_tomsparse._model import SharedPrefix, view
from tl_tomsparse.edit import SparseEdit
from tl_tomsparse.evaluate import perplexity, score_stories
from tl_tomsparse.heads import KnockoutMeter, Knockouts, knockout_design, measure_knockouts, model_heads
from tl_tomsparse.mask import SparseMask
from tl_tomsparse.samples import text_samples

STORIES = [tiny.story(0), tiny.story(1)]
GRID = [(layer, head) for layer in range(6) for head in range(8)]


@pytest.mark.parametrize("kind", ["balanced", "stratified"])
@pytest.mark.parametrize("share", [0.02, 0.1, 0.3, 0.9])
def test_every_head_is_out_equally_often(kind, share):
    design = knockout_design(GRID, 37, share=share, kind=kind, seed=3)
    wanted = max(1, round(share * len(GRID)))
    assert (design.out.sum(1) == wanted).all()
    counts = design.out.sum(0)
    assert counts.max() - counts.min() <= 1
    assert len(design) == 37
    assert len(design.to_frame()) == design.out.sum()


def test_balanced_pairs_meet_more_evenly_than_stratified_ones():
    def spread(kind):
        out = knockout_design(GRID, 200, share=0.1, kind=kind).out.astype(int)
        together = (out.T @ out)[np.triu_indices(len(GRID), 1)]
        return together.std()

    assert spread("balanced") < 0.6 * spread("stratified")


def test_bernoulli_draws_each_head_on_its_own_and_no_empty_measurement():
    out = knockout_design(GRID, 4000, share=0.1, kind="bernoulli").out
    assert abs(out.mean() - 0.1) < 0.01
    few = knockout_design(GRID[:4], 300, share=0.05, kind="bernoulli").out
    assert few.any(1).all()
    together = (out[:, 0] & out[:, 1]).mean()
    assert abs(together - 0.01) < 0.006


def test_designs_are_the_same_for_a_seed_and_others_for_another():
    for kind in ("balanced", "stratified", "bernoulli"):
        a, b, c = (knockout_design(GRID, 9, share=0.2, kind=kind, seed=seed).out for seed in (1, 1, 2))
        assert (a == b).all()
        assert (a != c).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": 0.0}, "share=0.0"),
        ({"share": 1.0}, "share=1.0"),
        ({"n": 0}, "n=0"),
        ({"kind": "even"}, "'even'"),
        ({"heads": []}, "heads is empty"),
        ({"heads": [(0, 1), (2, 3), (0, 1)]}, "L0H1 twice"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_designs_refuse(options, message):
    with pytest.raises(TomsparseError, match=message):
        knockout_design(options.pop("heads", GRID), options.pop("n", 5), **options)


def some_out(n_heads, n=5, seed=0):
    return np.random.default_rng(seed).random((n, n_heads)) < 0.3


@pytest.mark.parametrize("backend", tiny.BACKENDS)
@pytest.mark.parametrize("n_layers", [2, 5])
def test_batches_prefix_and_packing_do_not_matter(backend, n_layers):
    model = tiny.model("qwen2", backend, n_layers=n_layers, dtype=torch.float64)
    out = some_out(4 * n_layers, 9)
    out[0] = False
    out[1:4, : 4 * (n_layers - 1)] = False
    found = [
        KnockoutMeter(model, STORIES, show_progress=False, **options).items(out)
        for options in (
            {},
            {"batch_tokens": 10},
            {"batch_tokens": 3000},
            {"share_prefix": False},
            {"share_prefix": False, "batch_tokens": 400},
        )
    ]
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], atol=1e-5)
    for row, items in zip(out, found[0]):
        np.testing.assert_allclose(items, margins(model, hooks_of(model_heads(model), row)), atol=2e-5)


def computed_rows(monkeypatch, model, out, **options):
    """How many rows each layer computes for some measurements."""
    rows = [0] * len(model.blocks)
    original = SharedPrefix._forward

    def spied(self, layer, forward):
        def counting(*args, **kwargs):
            rows[layer] += len(args[0])
            return forward(*args, **kwargs)

        return original(self, layer, counting)

    meter = KnockoutMeter(model, STORIES[:1], show_progress=False, **options)
    meter(np.zeros((1, len(meter.heads)), dtype=bool))  # the trial, and the unedited model
    with monkeypatch.context() as patch:
        patch.setattr(SharedPrefix, "_forward", spied)
        meter(out)
    return rows


def test_layers_that_are_shared_are_not_computed(monkeypatch):
    model = tiny.model(n_layers=6)
    out = np.zeros((10, 24), dtype=bool)
    out[np.arange(10), np.arange(10) + 14] = True  # layers 3 (two of them), 4 and 5 (four each)
    shared = computed_rows(monkeypatch, model, out)
    plain = computed_rows(monkeypatch, model, out, share_prefix=False)
    trees = plain[0] // 10
    assert plain == [10 * trees] * 6
    # one plain pass, and each measurement from the layer on where its batch begins
    assert shared[:3] == [trees] * 3
    assert shared[5] == 11 * trees
    assert 3 * trees <= shared[3] <= shared[4] < 11 * trees
    assert sum(shared) < 0.6 * sum(plain)


@pytest.mark.parametrize("budget", [10, 100, 1000])
def test_batches_are_cut_where_the_least_is_computed(budget):
    def cost(groups):
        return sum(
            (9 - first[group.start]) * ((group.stop - group.start) * 10 + PASS * budget) for group in groups
        )

    first = np.sort(np.random.default_rng(0).integers(0, 8, 9))
    found = _groups(first, 8, 10, budget)
    assert [group.start for group in found[1:]] == [group.stop for group in found[:-1]]
    assert (found[0].start, found[-1].stop) == (0, 9)
    every = []
    for cuts in range(2**8):
        ends = [place + 1 for place in range(8) if cuts >> place & 1]
        slices = [slice(a, b) for a, b in pairwise([0, *ends, 9])]
        if all(10 * (s.stop - s.start) <= budget for s in slices):
            every.append(cost(slices))
    assert cost(found) == pytest.approx(min(every))


def test_mean_ablation_is_the_mean_over_real_tokens():
    model = tiny.model("neox", dtype=torch.float64)
    rows = [tokens_of(model, story.prompt(question)) for story in STORIES for question in story.questions]
    sums, n = {}, 0
    for row in rows:
        with torch.no_grad():
            _, cache = model.run_with_cache(torch.tensor([row]))
        n += len(row)
        for layer in range(2):
            sums[layer] = sums.get(layer, 0) + cache[f"blocks.{layer}.attn.hook_z"][0].sum(0)
    means = {layer: total / n for layer, total in sums.items()}
    out = some_out(8)
    found = KnockoutMeter(model, STORIES, ablation="mean", batch_tokens=300, show_progress=False).items(out)
    for row, items in zip(out, found):
        np.testing.assert_allclose(items, margins(model, hooks_of(model_heads(model), row, means)), atol=2e-5)


def test_resample_takes_the_same_position_of_another_row_whatever_the_batches():
    model = tiny.model("llama", dtype=torch.float64)
    windows = text_samples(model, list(tiny.CORPUS), length=14)
    samples = windows[:3]
    other = text_samples(model, list(tiny.CORPUS), length=9, seed=4)[:1]  # shorter than the scored rows
    with torch.no_grad():
        _, cache = model.run_with_cache(other.tokens)
    out = some_out(8)
    found = [
        KnockoutMeter(
            model, samples, ablation="resample", reference=other, batch_tokens=tokens, show_progress=False
        ).items(out)
        for tokens in (1000, 15)
    ]
    np.testing.assert_allclose(found[0], found[1], atol=1e-6)
    clipped = torch.arange(13).clamp(max=8)

    def replaced(z, hook, layer, heads):
        z = z.clone()
        for head in heads:
            z[0, :, head] = cache[f"blocks.{layer}.attn.hook_z"][0, clipped, head]
        return z

    for row, items in zip(out, found[0]):
        gone = [head for head, is_out in zip(model_heads(model), row) if is_out]
        hooks = [
            (
                f"blocks.{layer}.attn.hook_z",
                partial(replaced, layer=layer, heads=[h for x, h in gone if x == layer]),
            )
            for layer in {layer for layer, _ in gone}
        ]
        for n in range(3):
            tokens = samples.tokens[n]
            with torch.no_grad():
                logits = model.run_with_hooks(tokens[None, :-1], fwd_hooks=hooks)[0]
            expected = logits.log_softmax(-1).gather(-1, tokens[1:, None]).mean()
            assert items[n] == pytest.approx(float(expected), abs=1e-5)


@pytest.mark.parametrize("ablation", ["zero", "mean", "resample"])
def test_the_last_layer_works_on_few_positions_with_the_same_numbers(ablation, monkeypatch):
    model = tiny.model("qwen2", dtype=torch.float64)
    options = {"ablation": ablation, "batch_tokens": 400, "show_progress": False}
    out = np.zeros((3, 8), dtype=bool)
    out[0, 5] = out[1, [4, 7]] = out[2, [1, 6]] = True
    narrow = KnockoutMeter(model, STORIES, **options).items(out)
    monkeypatch.setattr(_model_reader, "_last_layer_sites", lambda model_view: [])
    np.testing.assert_allclose(KnockoutMeter(model, STORIES, **options).items(out), narrow, atol=1e-5)


def test_resample_never_takes_a_prompt_itself():
    model = tiny.model()
    samples = text_samples(model, list(tiny.CORPUS), length=12)
    meter = KnockoutMeter(model, samples, ablation="resample", show_progress=False)
    out = np.ones((1, 8), dtype=bool)
    assert (np.abs(meter.items(out) - meter.items(~out)) > 1e-6).all()
    with pytest.raises(TomsparseError, match="there is none"):
        KnockoutMeter(model, samples[:1], ablation="resample", show_progress=False)
    means = KnockoutMeter(model, samples, ablation="resample", seed=1, show_progress=False)
    assert np.abs(means(out) - meter(out)).max() > 1e-6


def test_scores_of_one_measurement():
    model = tiny.model()
    meter = KnockoutMeter(model, STORIES, show_progress=False)
    out = np.zeros((2, 8), dtype=bool)
    out[1, 3] = True
    frame = score_stories(model, STORIES, show_progress=False).frame
    assert meter(out)[0] == pytest.approx(frame.margin.mean(), abs=1e-4)
    n = meter.n_measured
    accuracy = meter.scoring("accuracy")
    assert accuracy(out)[0] == pytest.approx(frame.correct.mean())
    false_belief = meter.scoring(categories=["false_belief"])
    chosen = frame[frame.category == "false_belief"]
    assert false_belief(out)[0] == pytest.approx(chosen.margin.mean(), abs=1e-4)
    assert false_belief.name == "margin of false_belief"
    assert len(false_belief.groups) == len(chosen)
    assert false_belief.scoring("accuracy")(out)[0] == pytest.approx(chosen.correct.mean())
    logprob = meter.scoring("logprob", categories=["reality"])
    assert logprob(out)[0] == pytest.approx(
        frame[frame.category == "reality"].logprob_answer.mean(), abs=1e-4
    )
    worst = meter.scoring(lambda scores: (scores[:, 0] - scores[:, 1]).min())
    assert worst(out)[0] == pytest.approx(frame.margin.min(), abs=1e-4)
    assert meter.n_measured == n == 2
    with pytest.raises(TomsparseError, match="forms \\['question'\\] was asked"):
        false_belief.scoring(forms=["question"])
    with pytest.raises(TomsparseError, match="'speed'"):
        meter.scoring("speed")
    with pytest.raises(TomsparseError, match="not finite"):
        meter.scoring(lambda scores: scores[:, 0] * np.nan)(out)


def test_a_meter_of_text_gives_log_probabilities_a_token():
    model = tiny.model()
    samples = text_samples(model, list(tiny.CORPUS), length=16)
    meter = KnockoutMeter(model, samples, show_progress=False)
    nll = perplexity(model, samples, show_progress=False)
    assert meter(np.zeros((1, 8), dtype=bool))[0] == pytest.approx(-(nll.nll / nll.n_tokens).mean(), abs=1e-5)
    with pytest.raises(TomsparseError, match="'margin'"):
        meter.scoring("margin")


def test_measurements_are_resumed_from_a_file(tmp_path, monkeypatch):
    model, path = tiny.model(), tmp_path / "knock-outs.safetensors"
    design = knockout_design(model_heads(model), 20, share=0.2)
    whole = measure_knockouts(KnockoutMeter(model, STORIES, show_progress=False), design)
    monkeypatch.setattr("tl_tomsparse._knockouts.BLOCK", 4)
    monkeypatch.setattr(_meter, "_CHECKPOINT_SECONDS", 0.0)
    stopped = KnockoutMeter(model, STORIES, checkpoint=path, show_progress=False)
    save, calls = _meter._Known._save, []

    def interrupted(self, **options):
        save(self, **options)
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(_meter._Known, "_save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measure_knockouts(stopped, design)
    monkeypatch.setattr(_meter._Known, "_save", save)
    resumed = KnockoutMeter(model, STORIES, checkpoint=path, show_progress=False)
    assert resumed.n_measured == 12
    found = measure_knockouts(resumed, design)
    np.testing.assert_allclose(found.scores, whole.scores, atol=1e-6)
    assert found.unedited == pytest.approx(whole.unedited, abs=1e-6)
    monkeypatch.setattr(resumed._known.run, "totals", None)
    assert (measure_knockouts(resumed, design).scores == found.scores).all()
    for other in (
        {"ablation": "mean"},
        {"categories": ["reality"]},
        {"prepend_bos": False},
    ):
        with pytest.raises(TomsparseError, match="other weights, prompts or settings"):
            KnockoutMeter(model, STORIES, checkpoint=path, show_progress=False, **other)
    with pytest.raises(TomsparseError, match="other weights"):
        KnockoutMeter(tiny.model(seed=1), STORIES, checkpoint=path, show_progress=False)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_nothing_stays_changed_after_an_exception(error):
    model = tiny.model(n_layers=3)
    tokens = torch.tensor([[5, 6, 7]])
    before = model(tokens)
    meter = KnockoutMeter(model, STORIES, show_progress=False)

    def broken(z, hook):
        if bool((z == 0).all(-1).any()):
            raise error("stop")

    out = np.ones((1, 12), dtype=bool)
    handler = signal.getsignal(signal.SIGINT)
    with (
        pytest.raises(error),
        model.hooks(fwd_hooks=[("blocks.2.attn.hook_pattern", lambda z, hook: broken(0 * z, hook))]),
    ):
        meter(out)
    assert signal.getsignal(signal.SIGINT) is handler
    assert not any("forward" in vars(block) for block in model.blocks)
    assert torch.equal(model(tokens), before)
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


def test_an_interrupt_while_entering_leaves_nothing():
    model = tiny.model()
    seen = view(model)

    class Interrupting(SharedPrefix):
        def _forward(self, layer, original):
            if layer == 1:
                signal.raise_signal(signal.SIGINT)
            return super()._forward(layer, original)

    with pytest.raises(KeyboardInterrupt), Interrupting(seen):
        raise AssertionError("entered")
    assert not any("forward" in vars(block) for block in model.blocks)


def test_a_model_that_cannot_begin_in_the_middle_computes_every_layer():
    model = tiny.model(n_layers=3, dtype=torch.float64)
    out = some_out(12)
    expected = KnockoutMeter(model, STORIES, show_progress=False).items(out)

    class Carrying(torch.nn.Module):
        """Hands something on beside the residual."""

        def __init__(self):
            super().__init__()
            self.carried = None

    carrying = Carrying()
    first = model.blocks[0]
    handle = first.attn.register_forward_hook(
        lambda module, inputs, output: setattr(carrying, "carried", 1.0)
    )
    reset = first.register_forward_pre_hook(lambda *_: setattr(carrying, "carried", None))

    def needs(x, hook):
        if carrying.carried is None:
            raise RuntimeError("layer 0 did not run")

    with model.hooks(fwd_hooks=[("blocks.2.attn.hook_z", needs)]):
        meter = KnockoutMeter(model, STORIES, show_progress=False)
        found = meter.items(out)
    handle.remove()
    reset.remove()
    assert "layer 0 did not run" in meter.refusal
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_other_weights_and_training_mode_are_refused():
    model = tiny.model()
    meter = KnockoutMeter(model, STORIES, show_progress=False)
    out = np.zeros((1, 8), dtype=bool)
    chosen = {(0, "Q"): torch.ones(4, 32, 8, dtype=torch.bool)}
    edit = SparseEdit.zero(model, SparseMask.from_bool(model, chosen))
    before = meter(out)
    with edit.applied(model):
        with pytest.raises(TomsparseError, match="another meter"):
            meter(out)
        edited = KnockoutMeter(model, STORIES, show_progress=False)(out)
    assert abs(edited - before) > 1e-4
    model.train()
    with pytest.raises(TomsparseError, match="training mode"):
        KnockoutMeter(model, STORIES, show_progress=False)


def test_any_function_is_a_meter():
    design = knockout_design(GRID, 30, share=0.1)
    found = measure_knockouts(lambda out: 2.0 - out[:, 3], design)
    assert isinstance(found, Knockouts)
    assert found.unedited == 2.0
    frame = found.to_frame()
    assert (frame.change == -design.out[:, 3].astype(float)).all()
    assert frame.heads[0].split()[0] == "L{}H{}".format(*GRID[int(np.flatnonzero(design.out[0])[0])])
    with pytest.raises(TomsparseError, match="shape"):
        measure_knockouts(lambda out: out, design)
    with pytest.raises(TomsparseError, match="not finite"):
        measure_knockouts(lambda out: np.where(out[:, 0], np.nan, 0.0), design)
    with pytest.raises(TomsparseError, match="of 48 heads"):
        measure_knockouts(KnockoutMeter(tiny.model(), STORIES, show_progress=False), design)
    with pytest.raises(TomsparseError, match="booleans"):
        KnockoutMeter(tiny.model(), STORIES, show_progress=False)(np.zeros((2, 8)))
