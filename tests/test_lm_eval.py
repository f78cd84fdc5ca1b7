"""An edit under the evaluation harness lm-eval, on a task of this file: it gives the log-probabilities of a
model whose weights were changed for good, computed by hand in float64.
"""

from __future__ import annotations

import math
from typing import Any

import datasets
import numpy as np
import oracles
import pandas as pd
import pytest
import tiny
import torch
from lm_eval import simple_evaluate
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from scipy.stats import binomtest

import tl_tomsparse as tt
from tl_tomsparse._model import view
from tl_tomsparse.harness import _row

STORIES = [tiny.story(index) for index in range(4)]
TEXT = "Sally puts the ball in the basket. Anna moves the ball to the box. " * 40
ITEMS = [
    {"prompt": s.prompt(q), "options": [f" {o}" for o in q.options], "answer": q.options.index(q.answer)}
    for s in STORIES
    for q in s.questions
]


def task() -> ConfigurableTask:
    return ConfigurableTask(
        config={
            "task": "stories",
            "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(ITEMS)},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{prompt}}",
            "doc_to_choice": "{{options}}",
            "doc_to_target": "answer",
            "target_delimiter": "",
            "metric_list": [{"metric": "acc"}],
        }
    )


def evaluated(model: Any) -> tuple[float, list[list[float]]]:
    """The accuracy, and the log-probability of each option of each item."""
    lm = HFLM(model.original_model, tokenizer=model.tokenizer, batch_size=3, device="cpu")
    manager = TaskManager(include_defaults=False)  # reading the tasks that it comes with takes half a minute
    result = simple_evaluate(lm, tasks=[task()], task_manager=manager, bootstrap_iters=0)
    items = sorted(result["samples"]["stories"], key=lambda item: item["doc_id"])
    return result["results"]["stories"]["acc,none"], [
        [float(answer[0][0]) for answer in item["resps"]] for item in items
    ]


def by_hand(hf: Any, tokenizer: Any) -> list[list[float]]:
    """The same, one row at a time."""
    found = []
    for item in ITEMS:
        prompt = [1, *tokenizer(item["prompt"], add_special_tokens=False)["input_ids"]]
        scores = []
        for option in item["options"]:
            answer = tokenizer(option, add_special_tokens=False)["input_ids"]
            log_probs = oracles.logits(hf, torch.tensor(prompt + answer)).log_softmax(-1)
            scores.append(sum(float(log_probs[len(prompt) - 1 + i, token]) for i, token in enumerate(answer)))
        found.append(scores)
    return found


def test_an_edit_under_lm_eval() -> None:
    model, hf = tiny.model("llama", dtype=torch.float64), tiny.hf_model("llama")
    seen = view(model)
    samples = tt.story_samples(model, STORIES)
    fisher = tt.fisher_diagonal(model, samples, matrices=seen.matrices, show_progress=False)
    edit = tt.SparseEdit.mean(model, tt.top_fraction(fisher, 0.1))
    tokenizer = tiny.build_tokenizer()
    plain, (_, before) = by_hand(hf, tokenizer), evaluated(model)
    for found, expected in zip(before, plain):
        assert found == pytest.approx(expected, rel=1e-6)

    with torch.no_grad():
        for key, (weight, rows) in oracles.hf_matrices(hf).items():
            matrix, chosen = oracles.canonical(hf, key[1], weight[rows]), edit.mask.to_bool(key)
            value = matrix[~chosen].mean()
            weight[rows] = torch.where(uncanonical(hf, key[1], chosen), value, weight[rows])
    with edit.applied(model):
        accuracy, under = evaluated(model)
        ours = tt.score_stories(model, STORIES, show_progress=False)
    changed = by_hand(hf, tokenizer)
    assert under != before
    for found, wanted in zip(under, changed):
        assert found == pytest.approx(wanted, rel=1e-6)
    right = [max(range(len(o)), key=o.__getitem__) == item["answer"] for o, item in zip(changed, ITEMS)]
    assert accuracy == pytest.approx(sum(right) / len(right))
    assert ours.frame.correct.tolist() == right
    assert evaluated(model)[1] == before


def test_scores_of_the_harness_in_a_frame() -> None:
    model, hf = tiny.model("llama", dtype=torch.float64), tiny.hf_model("llama")
    scores = by_hand(hf, tiny.build_tokenizer())
    right = [max(range(len(o)), key=o.__getitem__) == item["answer"] for o, item in zip(scores, ITEMS)]
    found = tt.lm_eval_scores(model, [task()], batch_size=3)
    (row,) = found.frame.to_dict("records")
    assert (row["task"], row["measure"], row["n"]) == ("lm_eval:stories", "acc", len(ITEMS))
    assert row["score"] == evaluated(model)[0] == pytest.approx(sum(right) / len(right))
    interval = binomtest(sum(right), len(right)).proportion_ci(0.95, method="exact")
    assert (row["low"], row["high"]) == pytest.approx((interval.low, interval.high))
    assert row["chance"] == pytest.approx(0.5)
    assert row["above_chance"] == (interval.low > 0.5)
    assert found.items.sort_values(
        "item", key=lambda i: i.str.split(":").str[-1].astype(int)
    ).value.tolist() == [float(mark) for mark in right]
    assert tt.lm_eval_scores(model, [task()], limit=3).frame.n.tolist() == [3]
    together = tt.battery(
        model, tasks=["perplexity"], texts={"mine": TEXT}, n_windows=2, lm_eval=[task()], show_progress=False
    )
    assert together.frame.task.tolist() == ["perplexity", "lm_eval:stories"]
    assert together.frame.columns.tolist() == found.frame.columns.tolist()
    assert together.items.columns.tolist() == found.items.columns.tolist()


def test_an_edit_shows_in_the_frame() -> None:
    model = tiny.model("llama")
    fisher = tt.fisher_diagonal(model, tt.story_samples(model, STORIES), show_progress=False)
    before = tt.lm_eval_scores(model, [task()])
    with tt.SparseEdit.scale(model, tt.top_fraction(fisher, 0.5), factor=-3.0).applied(model):
        under, accuracy = tt.lm_eval_scores(model, [task()]), evaluated(model)[0]
    assert under.frame.score[0] == accuracy
    assert under.items.value.tolist() != before.items.value.tolist()
    assert tt.lm_eval_scores(model, [task()]).items.equals(before.items)


def test_a_metric_that_is_not_right_or_wrong() -> None:
    config = {
        "task": "loglikelihoods",
        "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(ITEMS)},
        "test_split": "test",
        "output_type": "loglikelihood",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{options[answer]}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    }
    model = tiny.model("llama")
    frame = tt.lm_eval_scores(model, [ConfigurableTask(config=config)]).frame.set_index("measure")
    # The perplexity of answers is no mean over documents: lm-eval's number, and no interval.
    answers = [
        row[item["answer"]] for row, item in zip(by_hand(tiny.hf_model(), tiny.build_tokenizer()), ITEMS)
    ]
    assert frame.score["perplexity"] == pytest.approx(math.exp(-sum(answers) / len(answers)), rel=1e-4)
    assert math.isnan(frame.low["perplexity"])
    assert frame.interval["acc"] == "exact binomial 95 %"


def test_a_share_of_each_document_is_drawn_again() -> None:
    values = [0.0, 0.5, 1.0, 0.25] * 10
    items = pd.DataFrame({"value": values, "chance": math.nan})
    row = _row("t", "none", "f1", 0.4375, 40, items, 0)
    draws = np.random.default_rng(1).choice(values, (20_000, 40)).mean(1)
    assert row["low"] == pytest.approx(np.quantile(draws, 0.025), abs=0.01)
    assert row["high"] == pytest.approx(np.quantile(draws, 0.975), abs=0.01)
    assert row["above_chance"] is pd.NA


def test_what_the_harness_cannot_run_is_refused() -> None:
    model = tiny.model("llama")
    for tasks in ([], "stories"):
        with pytest.raises(tt.TomsparseError, match="must be a list of at least one task"):
            tt.lm_eval_scores(model, tasks)
    if "hooked" in tiny.BACKENDS:
        with pytest.raises(tt.TomsparseError, match=r"HookedTransformer.*backend='bridge'"):
            tt.lm_eval_scores(tiny.model("llama", "hooked"), [task()])
    with pytest.raises(tt.TomsparseError, match="training mode"):
        tt.lm_eval_scores(model.train(), [task()])


def uncanonical(hf: Any, matrix: str, canonical: torch.Tensor) -> torch.Tensor:
    """A tensor in the package's orientation as `[out, in]`, the way `transformers` has it."""
    if matrix == "O":
        return canonical.flatten(0, 1).T
    return canonical.transpose(1, 2).flatten(0, 1) if matrix in "QKV" else canonical.T
