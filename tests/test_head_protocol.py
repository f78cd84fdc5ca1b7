"""The paper's protocol against scikit-learn by hand; heads and masks against counting by hand."""

from __future__ import annotations

import dataclasses

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from sklearn.linear_model import Lasso

from tl_tomsparse._checks import TomsparseError
from tl_tomsparse._head_claims import crossed_claims
from tl_tomsparse._model import view
from tl_tomsparse.edit import SparseEdit
from tl_tomsparse.evaluate import score_stories
from tl_tomsparse.head_protocol import head_tasks, heads_and_mask, mask_in_heads, paper_protocol
from tl_tomsparse.heads import KnockoutMeter, knockout_design
from tl_tomsparse.mask import SparseMask
from tl_tomsparse.samples import story_samples, text_samples

GRID = [(layer, head) for layer in range(16) for head in range(16)]
STORIES = [tiny.story(index) for index in range(4)]


def both_forms(story):
    asked = [dataclasses.replace(q, form="question", text=f"Where is it? {q.text}") for q in story.questions]
    return dataclasses.replace(story, questions=(*story.questions, *asked))


def planted(effects, seed=0):
    values = np.zeros(256)
    values[list(effects)] = list(effects.values())

    def meter(out):
        noise = [0.02 * np.random.default_rng([seed, *np.packbits(row)]).standard_normal() for row in out]
        return 1.0 + out @ values + np.array(noise)

    return meter


NEEDED = {3: -0.5, 77: -0.45, 130: -0.45}


def test_the_protocol_is_the_lasso_on_standardised_scores():
    meter = planted(NEEDED)
    tests = {
        "task": planted(NEEDED, 1),
        "task, completion": planted(NEEDED, 2),
        "task, question": planted(NEEDED, 3),
        "other": planted({}, 4),
    }
    found = paper_protocol(meter, tests, heads=GRID, max_heads=3, seed=1)
    design = knockout_design(GRID, 100, share=0.02, kind="stratified", seed=1)
    assert (design.out.sum(1) == 5).all()
    y = meter(design.out)
    expected = Lasso(alpha=0.01).fit(design.out.astype(float), (y - y.mean()) / y.std()).coef_
    np.testing.assert_allclose(found.coefficients.coefficient, expected, atol=1e-3)
    assert set(found.heads) == {GRID[column] for column in NEEDED}
    assert found.heads[0] == GRID[int(expected.argmin())]
    dose = found.dose.set_index(["task", "n_heads"])
    assert dose.loc[("task", 3)].score == pytest.approx(-0.4, abs=0.06)
    assert dose.loc[("other", 3)].score == pytest.approx(1.0, abs=0.06)
    assert [(claim.claim, claim.status) for claim in found.claims] == [
        ("paper_protocol", "supported"),
        ("not_format", "supported"),
        ("selective", "supported"),
    ]


def test_heads_of_one_form_and_of_every_task_are_told_apart():
    tests = {
        "task": planted({column: effect / 2 for column, effect in NEEDED.items()}, 1),
        "task, completion": planted(NEEDED, 2),
        "task, question": planted({}, 3),
        "other": planted(NEEDED, 4),
    }
    found = paper_protocol(planted(NEEDED), tests, heads=GRID, max_heads=3, seed=1)
    assert [claim.status for claim in found.claims] == ["supported", "not supported", "not supported"]
    one_form = paper_protocol(planted(NEEDED), {"task": tests["task"]}, heads=GRID, max_heads=3, seed=1)
    assert [claim.status for claim in one_form.claims] == ["supported", "not testable"]
    few = paper_protocol(planted(NEEDED), tests, heads=GRID, max_heads=3, n_random=5, seed=1)
    assert few.claims[0].status == "not supported"


def test_to_raise_a_score_less_than_random_heads_is_not_to_lower_it():
    """Every head raises the score when it is out, those that are found less than others."""
    rising = {**dict.fromkeys(range(256), 1.0), **dict.fromkeys(NEEDED, 0.1)}
    tests = {f"task{form}": planted(rising, 1) for form in ("", ", completion", ", question")}
    found = paper_protocol(planted(NEEDED), tests, heads=GRID, max_heads=3, seed=1)
    ends = found.dose[found.dose.n_heads == 3]
    assert (ends.score < ends.random_low).all()
    assert [claim.status for claim in found.claims] == ["not supported", "not supported"]


def test_nothing_to_find_gives_no_heads():
    found = paper_protocol(lambda out: np.full(len(out), 0.7), {"task": planted({})}, heads=GRID)
    assert found.heads == ()
    assert [claim.status for claim in found.claims] == ["not supported"]
    assert found.dose.n_heads.tolist() == [0]


def test_tasks_of_one_meter():
    model = tiny.model()
    stories = [both_forms(story) for story in STORIES]
    meter = KnockoutMeter(model, stories, show_progress=False)
    assert list(head_tasks(meter)) == [
        "false_belief + true_belief", "false_belief + true_belief, completion",
        "false_belief + true_belief, question", "second_order", "reality", "memory",
    ]  # fmt: skip
    tasks = head_tasks(meter, ["false_belief"])
    assert list(tasks) == [
        "false_belief", "false_belief, completion", "false_belief, question", "true_belief",
        "second_order", "reality", "memory",
    ]  # fmt: skip
    out = np.zeros((1, 8), dtype=bool)
    out[0, 2] = True
    both = (tasks["false_belief, completion"](out) + tasks["false_belief, question"](out)) / 2
    assert tasks["false_belief"](out) == pytest.approx(both)
    assert tasks["memory"].n_measured == 1
    found = paper_protocol(tasks["false_belief"], tasks, max_heads=2, n=20, n_random=19)
    assert set(found.dose.task) == set(tasks)
    text = KnockoutMeter(model, text_samples(model, list(tiny.CORPUS), length=16), show_progress=False)
    with pytest.raises(TomsparseError, match="no question of the categories false_belief, true_belief"):
        head_tasks(text)


def test_protocol_refuses():
    with pytest.raises(TomsparseError, match="test is empty"):
        paper_protocol(planted({}), {}, heads=GRID)
    with pytest.raises(TomsparseError, match="pass heads="):
        paper_protocol(planted({}), {"task": planted({})})
    with pytest.raises(TomsparseError, match="penalty=-1"):
        paper_protocol(planted({}), {"task": planted({})}, heads=GRID, alpha=-1)


def made_mask(model, matrices="QKVO", share=0.05, only=None, seed=0):
    seen, generator = view(model), torch.Generator().manual_seed(seed)
    chosen = {
        key: torch.rand(seen.shape(key), generator=generator) < share for key in seen.keys(tuple(matrices))
    }
    for (layer, matrix), entries in chosen.items():
        for head in range(len(entries)):
            if only is not None and (layer, matrix, head) not in only:
                entries[head] = False
    return SparseMask.from_bool(model, chosen)


@pytest.mark.parametrize("backend", tiny.BACKENDS)
def test_weights_of_a_head_are_those_of_its_key_value_head_too(backend):
    model = tiny.model("llama", backend)  # four query heads, two key-value heads
    mask = made_mask(model)
    found = mask_in_heads(model, mask, [(0, 3), (1, 0)])
    for key in mask.shapes:
        expected = mask.to_bool(key).clone()
        kept = {0: 3, 1: 0}[key[0]]
        kept = kept // 2 if key[1] in "KV" else kept
        expected[[head for head in range(len(expected)) if head != kept]] = False
        assert torch.equal(found.to_bool(key), expected)


def test_overlap_counts_and_tells_planted_from_random_masks():
    model = tiny.model("llama", n_layers=4)
    meter = KnockoutMeter(model, STORIES, show_progress=False)
    heads = [(0, 3), (2, 1)]
    anywhere = made_mask(model, "QO")
    found = heads_and_mask(model, anywhere, heads, meter, show_progress=False)
    for matrix in "QO":
        inside = sum(int(anywhere.to_bool((layer, matrix))[head].sum()) for layer, head in heads)
        row = found.overlap.set_index("matrix").loc[matrix]
        assert row.in_heads == inside
        assert row.entries == sum(int(anywhere.to_bool((layer, matrix)).sum()) for layer in range(4))
        assert row.share == pytest.approx(inside / row.entries)
        assert row.random == pytest.approx(2 / 16, abs=0.02)
        assert row.heads_mean == pytest.approx(2 / 16, abs=0.04)
    assert found.claims[0].status == "not supported"
    only = {(layer, matrix, head) for layer, head in heads for matrix in "QO"}
    there = heads_and_mask(model, made_mask(model, "QO", only=only), heads, meter, show_progress=False)
    row = there.overlap.set_index("matrix").loc["all"]
    assert row.share == 1.0
    assert row.p_random == pytest.approx(1 / 21)
    assert there.claims[0].status == "supported"


def test_effects_of_the_mask_in_heads_are_those_of_edits():
    model = tiny.model("llama")
    meter = KnockoutMeter(model, STORIES, show_progress=False)
    mask, heads = made_mask(model, share=0.2), ((0, 1), (1, 2))
    samples = story_samples(model, STORIES)
    found = heads_and_mask(model, mask, heads, meter, samples=samples, n_random=3, show_progress=False)
    arms = found.effect.set_index("arm")
    inside = mask_in_heads(model, mask, heads)

    def margin(one):
        with SparseEdit.mean(model, one).applied(model):
            return score_stories(model, STORIES, show_progress=False).frame.margin.mean()

    assert arms.score["unedited"] == pytest.approx(
        score_stories(model, STORIES, show_progress=False).frame.margin.mean(), abs=1e-4
    )
    assert arms.score["mask"] == pytest.approx(margin(mask), abs=1e-4)
    assert arms.score["in heads"] == pytest.approx(margin(inside), abs=1e-4)
    assert arms.score["elsewhere"] == pytest.approx(margin(mask - inside), abs=1e-4)
    random = [margin(inside.random_like(seed)) for seed in range(3)]
    assert arms.score["random"] == pytest.approx(np.mean(random), abs=1e-4)
    assert (arms.low["random"], arms.high["random"]) == pytest.approx((min(random), max(random)), abs=1e-4)
    assert arms.n_weights["in heads"] == len(inside)
    pairs = set(zip(found.position.layer, found.position["head"]))
    assert pairs == set(heads)
    assert {"attention", "angle"} <= set(found.position.measure)


@pytest.mark.parametrize(
    ("inside", "n_random", "status"),
    [(0.5, 19, "supported"), (1.05, 19, "not supported"), (0.5, 18, "not testable")],
)
def test_weights_in_heads_lower_a_score_where_it_is_lower_than_before(inside, n_random, status):
    arms = [("unedited", 0, 1.0), ("mask", 9, 0.4), ("in heads", 5, inside), ("elsewhere", 4, 0.9)]
    effect = pd.DataFrame([*arms, ("random", 5, 1.3)], columns=["arm", "n_weights", "score"])
    effect = effect.assign(low=1.1, high=1.5)
    share = {"share": 0.5, "entries": 9, "random": 0.1, "random_low": 0.0, "random_high": 0.2}
    share |= {"p_random": 0.04, "p_heads": 0.04, "heads_mean": 0.1, "heads_low": 0.0, "heads_high": 0.2}
    overlap = pd.DataFrame([{"matrix": "all", **share}])
    claim = crossed_claims([(0, 1)], overlap, effect, "margin", n_random)[1]
    assert (claim.claim, claim.status) == ("works_in_heads", status)


def test_masks_without_weights_in_heads_are_not_tested_or_refused():
    model = tiny.model("llama")
    meter = KnockoutMeter(model, STORIES, show_progress=False)
    outside = made_mask(model, "Q", only={(1, "Q", 0)})
    found = heads_and_mask(model, outside, [(0, 3)], meter, n_random=19, show_progress=False)
    assert [claim.status for claim in found.claims] == ["not supported", "not testable"]
    assert len(found.position) == 0
    mlp = SparseMask.from_bool(model, {(0, "in"): torch.ones(32, 48, dtype=torch.bool)})
    with pytest.raises(TomsparseError, match="no weight in Q, K, V or O"):
        heads_and_mask(model, mlp, [(0, 3)], meter, show_progress=False)
    with pytest.raises(TomsparseError, match="heads is empty"):
        heads_and_mask(model, outside, [], meter, show_progress=False)
    other = made_mask(tiny.model("llama", seed=1))
    with pytest.raises(TomsparseError, match="fingerprint"):
        heads_and_mask(model, other, [(0, 3)], meter, show_progress=False)
