"""Slow and obvious computations in float64 to compare the package with; written without its code."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tl_tomsparse._model import Key
from tl_tomsparse.samples import Samples


def hf_matrices(hf: Any) -> dict[Key, tuple[Tensor, slice | Tensor]]:
    """For each (layer, matrix) the `transformers` parameter and the rows of it that belong to the matrix."""
    config, found = hf.config, {}
    everything = slice(None)
    if hasattr(hf, "gpt_neox"):
        heads, d_head = config.num_attention_heads, config.hidden_size // config.num_attention_heads
        for layer, block in enumerate(hf.gpt_neox.layers):
            fused = block.attention.query_key_value.weight
            rows = torch.arange(len(fused)).view(heads, 3, d_head)  # head by head: its q, its k, its v
            for i, matrix in enumerate("QKV"):
                found[layer, matrix] = (fused, rows[:, i].flatten())
            found[layer, "O"] = (block.attention.dense.weight, everything)
            found[layer, "in"] = (block.mlp.dense_h_to_4h.weight, everything)
            found[layer, "out"] = (block.mlp.dense_4h_to_h.weight, everything)
        return found
    for layer, block in enumerate(hf.model.layers):
        for matrix in "QKVO":
            found[layer, matrix] = (getattr(block.self_attn, f"{matrix.lower()}_proj").weight, everything)
        for matrix, name in (("gate", "gate"), ("in", "up"), ("out", "down")):
            found[layer, matrix] = (getattr(block.mlp, f"{name}_proj").weight, everything)
    return found


def canonical(hf: Any, matrix: str, weight: Tensor) -> Tensor:
    """An `[out, in]` matrix in the package's orientation: by head in attention, `[in, out]` in an MLP."""
    heads = hf.config.num_attention_heads
    d_head = hf.config.hidden_size // heads
    if matrix == "O":
        blocks = [weight[:, h * d_head : (h + 1) * d_head].T for h in range(heads)]
    elif matrix in "QKV":
        blocks = [weight[h * d_head : (h + 1) * d_head].T for h in range(len(weight) // d_head)]
    else:
        return weight.T
    return torch.stack(blocks)


def sample_loss(hf: Any, samples: Samples, n: int) -> Tensor:
    """The mean negative log-probability of the supervised tokens of one sample, without padding."""
    length = int(samples.attention_mask[n].sum())
    tokens = samples.tokens[n, :length]
    log_probs = hf(tokens[None]).logits[0].log_softmax(-1)
    losses = [-log_probs[p - 1, tokens[p]] for p in range(length) if samples.supervised[n, p]]
    return torch.stack(losses).mean()


def fisher(hf: Any, samples: Samples) -> dict[Key, Tensor]:
    """The mean over samples of the squared gradient, one backward pass a sample."""
    matrices = hf_matrices(hf)
    total = {key: torch.zeros_like(weight[rows]) for key, (weight, rows) in matrices.items()}
    for n in range(len(samples)):
        hf.zero_grad()
        sample_loss(hf, samples, n).backward()
        for key, (weight, rows) in matrices.items():
            total[key] += weight.grad[rows] ** 2 / len(samples)
    return {key: canonical(hf, key[1], value) for key, value in total.items()}


def logits(hf: Any, tokens: Tensor) -> Tensor:
    """Logits of one row, without padding or gradients."""
    with torch.no_grad():
        return hf(tokens[None]).logits[0]
