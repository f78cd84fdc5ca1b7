"""An edit under the evaluation harness lm-eval, on a task of this file: it gives the log-probabilities of a
model whose weights were changed for good, computed by hand in float64.
"""

from __future__ import annotations

from typing import Any

import datasets
import oracles
import pytest
import tiny
import torch
from lm_eval import simple_evaluate
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import tl_tomsparse as tt
from tl_tomsparse._model import view

STORIES = [tiny.story(index) for index in range(4)]
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


def uncanonical(hf: Any, matrix: str, canonical: torch.Tensor) -> torch.Tensor:
    """A tensor in the package's orientation as `[out, in]`, the way `transformers` has it."""
    if matrix == "O":
        return canonical.flatten(0, 1).T
    return canonical.transpose(1, 2).flatten(0, 1) if matrix in "QKV" else canonical.T
