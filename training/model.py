"""The network while it is trained, written out so that training is fast.

The weights are those of a network of `transformers` (`to_hugging_face`), by how positions are told:

* `rotary`, the embedded model: Qwen2 (RoPE, RMSNorm, SwiGLU, grouped-query attention).
* `learned` and `alibi`, its twins: GPT-2 and Bloom, the nearest networks of `transformers` without RoPE
  (LayerNorm, MLP without a gate, one key and value head for each query head, biases everywhere).

What differs is speed, and two choices at the start without which looking things up by a name does not form
(see README.md):

* *Scale.* What attention and MLP add to the residual stream begins as large as an embedding, not smaller.
* *A starting point for look-ups.* Some heads of the first layers begin by looking a fixed number of tokens
  back (`shift_heads`), and two heads of a later layer by looking at what stood near the same word before
  (`match_heads`); with RoPE over the slow rotary frequencies, since the fast ones turn by more than a radian
  between the two places, so whatever is compared along them comes out at random. The last layer's last two
  heads begin by comparing who is asked about with who saw (`witness_heads`). All are trained like every other
  head. With ALiBi no head can begin by looking back by a fixed number: the one that sees the least far copies
  instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

Positions = Literal["rotary", "learned", "alibi"]
POSITIONS: tuple[Positions, ...] = get_args(Positions)
WITNESS_LAYER = 4
"""After this many layers the helper head reads who sees a sentence's event, and whom a question is about."""
SHIFTS = ((1, 2, 3, 4), (1, 3, None, None))
"""For the heads of the first layers: how many tokens back they look in the beginning."""
MATCH_LAYER = 2
"""The layer (from 0) whose last two heads (with ALiBi they see the farthest) begin by matching words."""
ROPE_BASE = 1e6


@dataclass(frozen=True)
class Shape:
    """Sizes, and how positions are told."""

    vocabulary: int
    positions: Positions = "rotary"
    d_model: int = 192
    layers: int = 6
    heads: int = 4
    context: int = 512

    @classmethod
    def of(cls, state: dict[str, Tensor]) -> Shape:
        """That of a decoder's weights."""
        positions: Positions = (
            "learned" if "embed_positions.weight" in state
            else "alibi" if "embed_norm.weight" in state
            else "rotary"
        )  # fmt: skip
        return cls(len(state["embed_tokens.weight"]), positions)

    @property
    def rotary(self) -> bool:
        """Qwen2 and not one of the twins."""
        return self.positions == "rotary"

    @property
    def groups(self) -> int:
        """Key-value heads."""
        return 2 if self.rotary else self.heads

    @property
    def d_mlp(self) -> int:
        """Of a gated MLP, or of one without gate: GPT-2 and Bloom have four times d_model."""
        return (2 if self.rotary else 4) * self.d_model

    @property
    def d_head(self) -> int:
        """Of queries, keys and values."""
        return self.d_model // self.heads

    def norm(self) -> nn.Module:
        """RMSNorm or LayerNorm."""
        return nn.RMSNorm(self.d_model, eps=1e-6) if self.rotary else nn.LayerNorm(self.d_model, eps=1e-5)


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 where the hardware has it; a CPU that has not is fifty times slower with it."""
    fast = device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.autocast(device.type, torch.bfloat16, enabled=fast)


class Attention(nn.Module):
    """Attention with an additive mask, which ALiBi is a part of; rotated where there are angles.

    Plain products: on a CPU the backward pass of the fused attention takes longer than all the rest.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads, self.groups, self.d_head = shape.heads, shape.groups, shape.d_head
        self.q_proj = nn.Linear(shape.d_model, self.heads * self.d_head)
        self.k_proj = nn.Linear(shape.d_model, self.groups * self.d_head)
        self.v_proj = nn.Linear(shape.d_model, self.groups * self.d_head)
        self.o_proj = nn.Linear(self.heads * self.d_head, shape.d_model, bias=not shape.rotary)

    def forward(self, x: Tensor, mask: Tensor, turn: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """[batch, pos, d_model] to the same, and the pattern of the last head [batch, pos, pos]."""
        batch, pos, _ = x.shape
        group = self.heads // self.groups

        def rotated(t: Tensor) -> Tensor:
            if turn is None:
                return t
            a, b = t.chunk(2, -1)
            cos, sin = turn
            return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(t.dtype)

        q = rotated(self.q_proj(x).view(batch, pos, self.groups, group, self.d_head))
        k = rotated(self.k_proj(x).view(batch, pos, self.groups, 1, self.d_head))
        v = self.v_proj(x).view(batch, pos, self.groups, self.d_head)
        q = q.permute(0, 2, 3, 1, 4).reshape(batch * self.groups, group * pos, self.d_head)
        k = k.squeeze(3).permute(0, 2, 3, 1).reshape(batch * self.groups, self.d_head, pos)
        v = v.permute(0, 2, 1, 3).reshape(batch * self.groups, pos, self.d_head)
        scores = torch.bmm(q, k).float().view(batch, self.groups, group, pos, pos)
        pattern = (scores * self.d_head**-0.5 + mask).softmax(-1)
        z = torch.bmm(pattern.to(v.dtype).view(batch * self.groups, group * pos, pos), v)
        z = z.view(batch, self.groups, group, pos, self.d_head).permute(0, 3, 1, 2, 4)
        return self.o_proj(z.reshape(batch, pos, self.heads * self.d_head)), pattern[:, -1, -1]


class MLP(nn.Module):
    """SwiGLU, or without a gate GELU."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.d_model, shape.d_mlp, bias=False) if shape.rotary else None
        self.up_proj = nn.Linear(shape.d_model, shape.d_mlp, bias=not shape.rotary)
        self.down_proj = nn.Linear(shape.d_mlp, shape.d_model, bias=not shape.rotary)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, pos, d_model] to the same."""
        if self.gate_proj is None:
            return self.down_proj(F.gelu(self.up_proj(x), approximate="tanh"))
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """Attention and MLP, each after its norm."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm = shape.norm()
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = shape.norm()
        self.mlp = MLP(shape)

    def forward(self, x: Tensor, mask: Tensor, turn: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """[batch, pos, d_model] to the same, and the pattern of the last head [batch, pos, pos]."""
        attended, pattern = self.self_attn(self.input_layernorm(x), mask, turn)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), pattern


class Decoder(nn.Module):
    """The decoder with its helper head, which training alone uses: for every name, does this agent see what
    the sentence tells, or is the question about this agent?
    """

    def __init__(self, shape: Shape, n_names: int) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocabulary, shape.d_model)
        if shape.positions == "learned":
            self.embed_positions = nn.Embedding(shape.context, shape.d_model)
        if shape.positions == "alibi":
            self.embed_norm = shape.norm()  # as Bloom has it
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = shape.norm()
        self.witness = nn.Linear(shape.d_model, n_names)
        pairs = torch.arange(shape.d_head // 2)
        self.register_buffer("frequencies", ROPE_BASE ** (-pairs / len(pairs)), persistent=False)
        slopes = 2.0 ** (-8 / shape.heads * torch.arange(1, shape.heads + 1))
        self.register_buffer("slopes", slopes.view(shape.groups, -1, 1, 1), persistent=False)
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        scale = 0.05
        for name, parameter in self.named_parameters():
            if name.startswith("embed_tokens"):
                nn.init.normal_(parameter, std=scale)
            elif parameter.ndim == 2:
                into_stream = name.endswith(("o_proj.weight", "down_proj.weight"))
                std = parameter.shape[1] ** -0.5 * (1.4 * scale if into_stream else 1.0)
                nn.init.normal_(parameter, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        # Directions of the residual stream with a task of their own, d_head of each.
        d_model, d_head = self.shape.d_model, self.shape.d_head
        read, written, copied, place = torch.linalg.qr(torch.randn(d_model, d_model))[0].split(d_head, 1)
        first, match = self.layers[0].self_attn, self.layers[MATCH_LAYER].self_attn
        if self.shape.positions == "learned":
            words = self.embed_tokens.weight
            words -= words @ place @ place.T  # so that nothing else stands where positions are told
            angle = torch.arange(self.shape.context)[:, None] * self.frequencies
            self.embed_positions.weight.copy_(2 * scale * torch.cat((angle.cos(), angle.sin()), 1) @ place.T)
        if self.shape.positions == "alibi":
            self.embed_norm.weight.fill_(scale)
            copying = 1
        else:
            copying = len(SHIFTS[0])
            for layer, offsets in zip(self.layers, SHIFTS):
                shift_heads(layer.self_attn, offsets, self.frequencies, None if self.shape.rotary else place)
        first.v_proj.weight.copy_(read.T.repeat(first.groups, 1))
        first.o_proj.weight[:, : copying * d_head] = 0.32 / copying * written.repeat(1, copying)
        match_heads(match, read, written, copied, self.content_rows())
        witness_heads(self.layers[-1].self_attn, self.witness, self.content_rows())

    def forward(self, tokens: Tensor, mask: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states at the end and those that the helper head reads, both [batch, pos, d_model]; and the
        attention pattern of the last layer's last head, [batch, pos, pos].

        Args:
            tokens: [batch, pos]
            mask: [batch or 1, 1, 1, pos, pos], 0 where attention is allowed and very negative elsewhere.
            positions: [batch or 1, pos]
        """
        x, turn = self.embed_tokens(tokens), None
        if self.shape.positions == "rotary":
            angle = positions.float()[..., None] * self.frequencies
            turn = angle.cos()[:, :, None, None], angle.sin()[:, :, None, None]
        elif self.shape.positions == "learned":
            x = x + self.embed_positions(positions)
        else:
            x = self.embed_norm(x)
            mask = mask + self.slopes * positions.float()[:, None, None, None, :]
        for i, layer in enumerate(self.layers, start=1):
            x, pattern = layer(x, mask, turn)
            if i == WITNESS_LAYER:
                middle = x
        return self.norm(x), middle, pattern

    def logits(self, hidden: Tensor) -> Tensor:
        """Unembed with the tied embedding."""
        return hidden @ self.embed_tokens.weight.T

    def witnesses(self, hidden: Tensor) -> Tensor:
        """Logits for every name at `hidden` [n, d_model]: sees what the sentence tells, or is asked about."""
        return self.witness(F.rms_norm(hidden.float(), hidden.shape[-1:]))

    def content_rows(self) -> Tensor:
        """Axes of a head along which content can be compared: with RoPE, pairs that take more than 500 tokens
        for a turn; else all.
        """
        if not self.shape.rotary:
            return torch.arange(self.shape.d_head)
        slow = (self.frequencies < 2 * math.pi / 500).nonzero()[:, 0]
        return torch.cat((slow, slow + len(self.frequencies)))


def shift_heads(
    attention: Attention, offsets: tuple[int | None, ...], frequencies: Tensor, place: Tensor | None
) -> None:
    """Let head i look `offsets[i]` tokens back, whatever the tokens are.

    Queries are keys turned by -offset x frequency, so that the logit at distance D is gain x sum_f
    cos(f (D - offset)), over the faster half of the frequencies. Without `place` the key is a bias, along the
    first axis of each rotary pair, and RoPE does the rest; with it, cos and sin of the position stand in the
    directions `place` [d_model, d_head] and are read from there.
    """
    d_head, half, fast, gain = attention.d_head, len(frequencies), len(frequencies) // 2, 4.0
    size = math.sqrt(gain * math.sqrt(d_head))
    group = attention.heads // attention.groups
    for head, offset in enumerate(offsets):
        if offset is None:
            continue
        key, query = d_head * (head // group), d_head * head
        turn = -frequencies[:fast] * offset
        if place is None:
            attention.k_proj.bias[key : key + fast] = size
            attention.q_proj.bias[query : query + fast] = size * turn.cos()
            attention.q_proj.bias[query + half : query + half + fast] = size * turn.sin()
            continue
        # The norm before makes cos and sin of about this size.
        cos, sin = place.T[:fast] * (size / 1.6), place.T[half : half + fast] * (size / 1.6)
        attention.k_proj.weight[key : key + fast] = cos
        attention.k_proj.weight[key + half : key + half + fast] = sin
        attention.q_proj.weight[query : query + fast] = turn.cos()[:, None] * cos - turn.sin()[:, None] * sin
        attention.q_proj.weight[query + half : query + half + fast] = (
            turn.sin()[:, None] * cos + turn.cos()[:, None] * sin
        )


def match_heads(match: Attention, read: Tensor, written: Tensor, copied: Tensor, rows: Tensor) -> None:
    """Let the last two heads of `match` compare a word (`read`), or what the copying heads of the first layer
    wrote (`written`), with what these wrote elsewhere, along the axes `rows`, and copy what they find.
    """
    d_head, d_model, n = match.d_head, match.q_proj.in_features, len(rows)
    compared = (read + written).T[:n]
    for head, group in last_heads(match):
        match.k_proj.weight[group * d_head : (group + 1) * d_head] = 0.0
        match.k_proj.weight[rows + group * d_head] = written.T[:n]
        match.v_proj.weight[group * d_head : (group + 1) * d_head] = copied.T
        match.q_proj.weight[head * d_head : (head + 1) * d_head] = 0.0
        # A little apart: two heads that begin alike have the same gradients, and stay one head for ever.
        apart = 0.1 * d_model**-0.5 * torch.randn_like(compared)
        match.q_proj.weight[rows + head * d_head] = compared + apart
        match.o_proj.weight[:, head * d_head : (head + 1) * d_head] = 0.1 * copied


def witness_heads(attention: Attention, witness: nn.Linear, rows: Tensor) -> None:
    """Let the last two heads compare what the helper head reads where a question ends and where an event is
    told, along the axes `rows`.
    """
    d_head, d_model = attention.d_head, attention.q_proj.in_features
    axes = torch.linalg.qr(torch.randn(d_model, len(rows)))[0]
    witness.weight.copy_(torch.randn(witness.out_features, len(rows)) @ axes.T * d_model**-0.5)
    for head, group in last_heads(attention):
        attention.k_proj.weight[group * d_head : (group + 1) * d_head] = 0.0
        attention.k_proj.weight[rows + group * d_head] = axes.T
        attention.q_proj.weight[head * d_head : (head + 1) * d_head] = 0.0
        attention.q_proj.weight[rows + head * d_head] = axes.T


def last_heads(attention: Attention) -> list[tuple[int, int]]:
    """The last two heads, each with its key-value head."""
    group = attention.heads // attention.groups
    return [(head, head // group) for head in range(attention.heads - 2, attention.heads)]


def to_hugging_face(decoder: Decoder, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """The same network as `transformers` writes it, with the special tokens of the tokenizer; the helper head
    stays behind.
    """
    shape = decoder.shape
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    state = {name: value for name, value in decoder.state_dict().items() if "witness" not in name}
    make = {"rotary": _qwen2, "learned": _gpt2, "alibi": _bloom}[shape.positions]
    model, weights = make(shape, ids, state)
    model.load_state_dict({**weights, "lm_head.weight": decoder.embed_tokens.weight})
    return model.eval()


Made = tuple[PreTrainedModel, dict[str, Tensor]]


def _qwen2(shape: Shape, ids: dict[str, int], state: dict[str, Tensor]) -> Made:
    config = Qwen2Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.d_model,
        intermediate_size=shape.d_mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.groups,
        max_position_embeddings=shape.context,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_BASE},
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        **ids,
    )
    return Qwen2ForCausalLM(config), {f"model.{name}": value for name, value in state.items()}


def _gpt2(shape: Shape, ids: dict[str, int], state: dict[str, Tensor]) -> Made:
    config = GPT2Config(
        vocab_size=shape.vocabulary,
        n_embd=shape.d_model,
        n_layer=shape.layers,
        n_head=shape.heads,
        n_positions=shape.context,
        activation_function="gelu_new",
        **ids,
    )
    names = {
        "embed_tokens": "wte", "embed_positions": "wpe", "norm": "ln_f", "layers": "h",
        "input_layernorm": "ln_1", "post_attention_layernorm": "ln_2", "self_attn": "attn",
        "o_proj": "c_proj", "up_proj": "c_fc", "down_proj": "c_proj",
    }  # fmt: skip
    weights = _fused(state, "c_attn", lambda q, k, v: torch.cat((q, k, v)))
    return GPT2LMHeadModel(config), {
        _renamed(name, names): value.T if value.ndim == 2 and name.startswith("layers") else value
        for name, value in weights.items()
    }


def _bloom(shape: Shape, ids: dict[str, int], state: dict[str, Tensor]) -> Made:
    config = BloomConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.d_model,
        n_layer=shape.layers,
        n_head=shape.heads,
        seq_length=shape.context,
        **ids,
    )
    names = {
        "embed_tokens": "word_embeddings", "embed_norm": "word_embeddings_layernorm", "norm": "ln_f",
        "layers": "h", "self_attn": "self_attention", "o_proj": "dense", "up_proj": "dense_h_to_4h",
        "down_proj": "dense_4h_to_h",
    }  # fmt: skip

    def by_head(*parts: Tensor) -> Tensor:
        """q, k and v of the first head, then of the second, ..."""
        return torch.stack([part.unflatten(0, (shape.heads, -1)) for part in parts], 1).flatten(0, 2)

    weights = _fused(state, "query_key_value", by_head)
    return BloomForCausalLM(config), {_renamed(name, names): value for name, value in weights.items()}


def _fused(state: dict[str, Tensor], name: str, join: Callable[..., Tensor]) -> dict[str, Tensor]:
    """The weights with those of q, k and v joined into one called `name`."""
    out: dict[str, Tensor] = {}
    for key, value in state.items():
        if ".q_proj." in key:
            parts = [state[key.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")]
            out[key.replace("q_proj", name)] = join(*parts)
        elif ".k_proj." not in key and ".v_proj." not in key:
            out[key] = value
    return out


def _renamed(name: str, names: dict[str, str]) -> str:
    return "transformer." + ".".join(names.get(part, part) for part in name.split("."))
