"""Llama-like and GPT-NeoX-like models in float64, written from their equations.

    Llama    x += O attention(rope(q), rope(k), v);  x += out(silu(gate h) * (in h))
    NeoX     the same with LayerNorm and gelu; with a parallel residual both parts read the same x

Weights are held by (layer, matrix) in the package's orientation, so gradients and edits need no translation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, silu

from tl_tomsparse._model import Key

Row = tuple[Tensor, list[int]]
"""Tokens, and the supervised positions."""


class Equations:
    """One model; `weights` are its matrices, and every method takes others in their place."""

    def __init__(self, hf: Any) -> None:
        self.config = hf.config
        self.state = {name: value.detach().double() for name, value in hf.state_dict().items()}
        self.neox = hf.config.model_type == "gpt_neox"
        self.heads = hf.config.num_attention_heads
        self.d_head = getattr(hf.config, "head_dim", None) or hf.config.hidden_size // self.heads
        self.weights: dict[Key, Tensor] = {}
        self.biases: dict[Key, Tensor | float] = {}
        for layer in range(hf.config.num_hidden_layers):
            self._read(layer)

    def _prefix(self, layer: int) -> str:
        return f"{'gpt_neox' if self.neox else 'model'}.layers.{layer}."

    def _read(self, layer: int) -> None:
        prefix, d = self._prefix(layer), self.d_head
        if self.neox:
            names = {"O": "attention.dense", "in": "mlp.dense_h_to_4h", "out": "mlp.dense_4h_to_h"}
            fused = self.state[prefix + "attention.query_key_value.weight"].unflatten(0, (self.heads, 3, d))
            bias = self.state[prefix + "attention.query_key_value.bias"].view(self.heads, 3, d)
            for place, matrix in enumerate("QKV"):
                self.weights[layer, matrix] = fused[:, place].mT.contiguous()
                self.biases[layer, matrix] = bias[:, place]
        else:
            names = {matrix: f"self_attn.{matrix.lower()}_proj" for matrix in "QKVO"}
            names |= {"gate": "mlp.gate_proj", "in": "mlp.up_proj", "out": "mlp.down_proj"}
        for matrix, name in names.items():
            weight, bias = self.state[f"{prefix}{name}.weight"], self.state.get(f"{prefix}{name}.bias", 0.0)
            if matrix in ("Q", "K", "V"):
                weight = weight.unflatten(0, (-1, d)).mT
                bias = bias.view(-1, d) if isinstance(bias, Tensor) else bias
            else:
                weight = weight.T.unflatten(0, (-1, d)) if matrix == "O" else weight.T
            self.weights[layer, matrix], self.biases[layer, matrix] = weight.contiguous(), bias

    def logits(self, tokens: Tensor, weights: Mapping[Key, Tensor] | None = None) -> Tensor:
        """`[pos, d_vocab]` of one row."""
        weights = self.weights if weights is None else weights
        end = "gpt_neox.final_layer_norm" if self.neox else "model.norm"
        x = self.state["gpt_neox.embed_in.weight" if self.neox else "model.embed_tokens.weight"][tokens]
        for layer in range(self.config.num_hidden_layers):

            def times(matrix: str, y: Tensor, equation: str = "tm,mk->tk", layer: int = layer) -> Tensor:
                return torch.einsum(equation, y, weights[layer, matrix]) + self.biases[layer, matrix]

            prefix = self._prefix(layer)
            normed = self._norm(x, prefix + "input_layernorm")
            q, k, v = (times(matrix, normed, "tm,hmd->thd") for matrix in "QKV")
            attended = times("O", self._attention(self._rope(q), self._rope(k), v), "thd,hdm->tm")
            parallel = self.neox and self.config.use_parallel_residual
            normed = self._norm(x if parallel else x + attended, prefix + "post_attention_layernorm")
            hidden = (
                gelu(times("in", normed)) if self.neox else silu(times("gate", normed)) * times("in", normed)
            )
            x = x + attended + times("out", hidden)
        name = "embed_out.weight" if "embed_out.weight" in self.state else "lm_head.weight"
        return self._norm(x, end) @ self.state[name].T

    def _norm(self, x: Tensor, name: str) -> Tensor:
        weight = self.state[f"{name}.weight"]
        if self.neox:
            return layer_norm(x, weight.shape, weight, self.state[f"{name}.bias"], self.config.layer_norm_eps)
        return x / (x.square().mean(-1, keepdim=True) + self.config.rms_norm_eps).sqrt() * weight

    def _rope(self, x: Tensor) -> Tensor:
        rope = self.config.rope_parameters
        half = int(self.d_head * rope.get("partial_rotary_factor", 1.0)) // 2
        theta = rope["rope_theta"] ** (-torch.arange(half, dtype=torch.float64) / half)
        angle = torch.arange(len(x), dtype=torch.float64)[:, None, None] * theta
        a, b = x[..., :half], x[..., half : 2 * half]
        cos, sin = angle.cos(), angle.sin()
        return torch.cat([a * cos - b * sin, b * cos + a * sin, x[..., 2 * half :]], -1)

    def _attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (y.repeat_interleave(self.heads // y.shape[1], 1) for y in (k, v))
        scores = torch.einsum("thd,shd->hts", q, k) / math.sqrt(self.d_head)
        future = torch.ones(len(q), len(q)).triu(1).bool()
        return torch.einsum("hts,shd->thd", scores.masked_fill(future, -math.inf).softmax(-1), v)

    def fisher(self, rows: Sequence[Row], weights: Mapping[Key, Tensor] | None = None) -> dict[Key, Tensor]:
        """The mean over rows of the squared gradient of the mean loss at supervised positions."""
        live = {key: value.detach().requires_grad_() for key, value in (weights or self.weights).items()}
        total = {key: torch.zeros_like(value) for key, value in live.items()}
        for tokens, supervised in rows:
            log_probs = self.logits(tokens, live).log_softmax(-1)
            loss = -torch.stack([log_probs[p - 1, tokens[p]] for p in supervised]).mean()
            for key, grad in zip(live, torch.autograd.grad(loss, list(live.values()))):
                total[key] += grad.square() / len(rows)
        return total

    def edited(self, entries: Mapping[Key, Tensor]) -> dict[Key, Tensor]:
        """The weights with these entries (flat indices) at the mean of the other entries of their matrix."""
        weights = dict(self.weights)
        for key, index in entries.items():
            flat = weights[key].flatten()
            other = torch.ones(len(flat), dtype=torch.bool)
            other[index] = False
            weights[key] = torch.where(other, flat, flat[other].mean()).view(weights[key].shape)
        return weights
