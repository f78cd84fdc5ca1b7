"""Knock-outs on every architecture family: batched, packed and begun in the middle, against one prompt, one
measurement and one option at a time, with plain hooks at `hook_z`.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import tiny
import torch
from test_families import CASES, every_case, load

from tl_tomsparse._checks import TomsparseError
from tl_tomsparse._model import view
from tl_tomsparse.heads import KnockoutMeter, knockout_design

STORIES = [tiny.story(0), tiny.story(1)]


def replace(z, hook, *, heads, values):
    z = z.clone()
    for head in heads:
        z[:, :, head] = values[head]
    return z


def hooks_of(heads, out, means=None):
    """One hook a layer that loses a head."""
    by_layer = {}
    for (layer, head), gone in zip(heads, out):
        if gone:
            by_layer.setdefault(layer, []).append(head)
    return [
        (
            f"blocks.{layer}.attn.hook_z",
            partial(replace, heads=gone, values=torch.zeros(64) if means is None else means[layer]),
        )
        for layer, gone in by_layer.items()
    ]


def tokens_of(model, text):
    return [model.tokenizer.bos_token_id, *model.tokenizer(text, add_special_tokens=False)["input_ids"]]


def margins(model, hooks):
    """Of every question, from one unpadded forward an option."""
    found = []
    for story in STORIES:
        for question in story.questions:
            start = tokens_of(model, story.prompt(question))
            scores = {}
            for option in question.options:
                row = tokens_of(model, f"{story.prompt(question)} {option}")
                with torch.no_grad():
                    logits = model.run_with_hooks(torch.tensor([row]), fwd_hooks=hooks)[0].double()
                log_probs = logits.log_softmax(-1)
                scores[option] = sum(float(log_probs[p - 1, row[p]]) for p in range(len(start), len(row)))
            answer = scores.pop(question.answer)
            found.append(answer - max(scores.values()))
    return found


@every_case
def test_batched_and_prefix_shared_knockouts_are_those_of_single_hooks(name, backend):
    model = load(name, backend)
    if "LongRoPE" in name:  # made for 32 tokens, and these prompts are on both sides of that
        with pytest.raises(TomsparseError, match="from 33 tokens on"):
            KnockoutMeter(model, STORIES, show_progress=False)
        return
    if "O" not in view(model).matrices:
        with pytest.raises(TomsparseError, match=r"'O': .* before a norm that follows it"):
            KnockoutMeter(model, STORIES, show_progress=False)
        return
    meter = KnockoutMeter(model, STORIES, batch_tokens=700, show_progress=False)
    heads = meter.heads
    assert heads == tuple((layer, h) for layer in sorted({x for x, _ in heads}) for h in range(4))
    out = np.zeros((4, len(heads)), dtype=bool)
    out[1, [len(heads) - 1, len(heads) - 3]] = True  # the last layer: everything below it is shared
    out[2, [0, len(heads) - 2]] = True
    out[3] = knockout_design(heads, 1, share=0.5).out[0]
    before = view(model).logits(torch.tensor([[5, 6, 7]]), torch.ones(1, 3, dtype=torch.bool)).detach()
    found = meter.items(out)
    assert meter.refusal is None
    # transformers has softmax and rotation in float32, also in a model in float64
    tolerance = 2e-5 if view(model).dtype == torch.float64 else 2e-4
    for row, items in zip(out, found):
        np.testing.assert_allclose(items, margins(model, hooks_of(heads, row)), atol=tolerance)
    assert np.abs(found[1:] - found[0]).max(1).min() > 0.01
    after = view(model).logits(torch.tensor([[5, 6, 7]]), torch.ones(1, 3, dtype=torch.bool))
    assert torch.equal(before, after)
    assert not any("forward" in vars(block) for block in model.blocks)


def test_both_kinds_of_models_are_among_the_cases():
    assert {backend for _, backend in CASES} == set(tiny.BACKENDS)
