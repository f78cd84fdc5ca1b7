"""Attention patterns against a softmax of queries and keys, written out in float64."""

from __future__ import annotations

import math

import pytest
import tiny
import torch
from test_rotary import some_samples

import tl_tomsparse as tt
from tl_tomsparse._model import view


def by_hand(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """`[heads, pos, pos]` of rotated queries and keys `[pos, heads, d_head]`, key-value heads shared."""
    n, heads, d_head = q.shape
    group = heads // k.shape[1]
    found = torch.zeros(heads, n, n, dtype=torch.float64)
    for head in range(heads):
        for i in range(n):
            scores = [float(q[i, head].double() @ k[j, head // group].double()) for j in range(i + 1)]
            weights = [math.exp(score / math.sqrt(d_head)) for score in scores]
            found[head, i, : i + 1] = torch.tensor([w / sum(weights) for w in weights])
    return found


@pytest.mark.parametrize("backend", tiny.BACKENDS)
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_a_pattern_is_the_softmax_of_queries_and_keys(kind, backend):
    model = tiny.model(kind, backend)
    seen = view(model)
    assert (seen.n_kv_heads < seen.n_heads) == (kind != "neox")
    stories = [tiny.story(0), tiny.story(1)]
    samples = tt.story_samples(model, stories, categories=("reality",))
    short = int(samples.lengths.argmin())
    assert samples.lengths.max() > samples.lengths.min()
    heads = [(layer, head) for layer in range(2) for head in range(4)]
    pattern = tt.attention_pattern(model, samples, heads, sample=samples.ids[short])
    row = samples.tokens[short][samples.attention_mask[short]]
    assert list(pattern.tokens) == [model.tokenizer.decode([int(token)]).strip() for token in row]
    turned = {}
    hooks = seen.rotated_hooks(
        seen.rotations[0], lambda layer, part, value: turned.__setitem__((layer, part), value)
    )
    with torch.no_grad(), seen.hooks(hooks):  # among longer rows, so that there is padding
        seen.logits(samples.tokens, samples.attention_mask)
    for layer in range(2):
        q, k = (turned[layer, part][short, : len(row)] for part in "qk")
        expected = by_hand(q, k)
        for head in range(4):
            found = pattern.of(layer, head)
            assert found.dtype == torch.float32
            torch.testing.assert_close(found.double(), expected[head], rtol=0, atol=2e-6)
            assert not found.triu(1).any()


def test_an_edited_model_has_other_patterns():
    model = tiny.model("llama")
    samples = some_samples()
    keys = view(model).keys(("Q",))
    masks = {key: torch.rand(view(model).shape(key)) < 0.2 for key in keys}
    edit = tt.SparseEdit.zero(model, tt.SparseMask.from_bool(model, masks))
    before = tt.attention_pattern(model, samples, [(1, 0)])
    with edit.applied(model):
        after = tt.attention_pattern(model, samples, [(1, 0)])
    assert not torch.equal(before.of(1, 0), after.of(1, 0))
    assert torch.equal(before.of(1, 0), tt.attention_pattern(model, samples, [(1, 0)]).of(1, 0))
    with pytest.raises(tt.TomsparseError, match="no pattern of L0H2, only of L1H0"):
        before.of(0, 2)


def test_patterns_that_cannot_be_shown_are_refused():
    model = tiny.model("llama")
    samples = some_samples()
    for heads, sample, message in (
        ([], None, "heads is empty"),
        ([(0, 9)], None, "no attention pattern of L0H9; it has 2 layers of 4 heads"),
        ([(7, 0)], None, "no attention pattern of L7H0"),
        ([(0, 0)], "nobody", "no sample 'nobody'; the first one is '0'"),
    ):
        with pytest.raises(tt.TomsparseError, match=message):
            tt.attention_pattern(model, samples, heads, sample=sample)
    model.train()
    with pytest.raises(tt.TomsparseError, match="training mode"):
        tt.attention_pattern(model, samples, [(0, 0)])
