"""Attention patterns of a text: where each of its tokens looks, in chosen heads.

    A[i, j]    attention of query i to key j after softmax; rows sum to 1, and nothing looks ahead

Whole patterns are kept here, `pos * pos` numbers a head, so this is for one text at a time and to be looked
at. [`sink_attention`][] streams many texts and keeps what each head gives to one token.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_tomsparse._checks import TomsparseError
from tl_tomsparse._model import view
from tl_tomsparse.samples import Samples, check_samples


@dataclass(frozen=True, eq=False)
class AttentionPattern:
    """The attention of some heads over one text.

    Attributes:
        tokens: the text's tokens as strings, without spaces around them.
        patterns: for each (layer, head) `[pos, pos]`, float32: queries by keys.
    """

    tokens: tuple[str, ...]
    patterns: Mapping[tuple[int, int], Float[Tensor, "pos pos"]] = field(repr=False)

    def of(self, layer: int, head: int) -> Float[Tensor, "pos pos"]:
        """The pattern of one head.

        Raises:
            TomsparseError: it was not kept.
        """
        if (layer, head) not in self.patterns:
            there = ", ".join(f"L{layer}H{head}" for layer, head in self.patterns)
            raise TomsparseError(f"There is no pattern of L{layer}H{head}, only of {there}.")
        return self.patterns[layer, head]


def attention_pattern(
    model: Any, samples: Samples, heads: Collection[tuple[int, int]], *, sample: str | None = None
) -> AttentionPattern:
    """The attention pattern of some heads over one sample.

    Args:
        model: `HookedTransformer` or `TransformerBridge`, in evaluation mode; inside `edit.applied(model)`
            the edited one is measured.
        samples: rows of tokens.
        heads: (layer, head) pairs, counted from 0.
        sample: its id; the first one by default.

    Raises:
        TomsparseError: training mode; no such sample; no head, one that the model does not have, or a layer
            that shows no attention pattern.
    """
    seen = view(model)
    seen.require_eval()
    if not heads:
        raise TomsparseError("heads is empty; name some as (layer, head).")
    if sample is not None and sample not in samples.ids:
        raise TomsparseError(f"There is no sample {sample!r}; the first one is {samples.ids[0]!r}.")
    row = samples[[0 if sample is None else samples.ids.index(sample)]]
    check_samples(seen, row)
    found: dict[int, Tensor] = {}
    with (
        torch.no_grad(),
        seen.hooks(seen.pattern_hooks(lambda layer, value: _keep(found, layer, value, heads))),
    ):
        seen.logits(row.tokens, row.attention_mask)
    patterns = {}
    for layer, head in heads:
        if layer not in found or not 0 <= head < len(found[layer]):
            raise TomsparseError(
                f"{seen.name} shows no attention pattern of L{layer}H{head}; it has {seen.n_layers} layers "
                f"of {seen.n_heads} heads, counted from 0."
            )
        patterns[layer, head] = found[layer][head]
    return AttentionPattern(_words(seen.tokenizer, row.tokens[0].tolist()), patterns)


def _keep(found: dict[int, Tensor], layer: int, pattern: Tensor, heads: Collection[tuple[int, int]]) -> None:
    if any(of == layer for of, _ in heads):
        found[layer] = pattern[0].detach().float().cpu()


def _words(tokenizer: Any, tokens: list[int]) -> tuple[str, ...]:
    return tuple(str(token) if tokenizer is None else tokenizer.decode([token]).strip() for token in tokens)
