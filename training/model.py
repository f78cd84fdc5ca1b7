"""The network while it is trained: a Qwen2 decoder, written out so that two CPU cores train it fast.

The weights are those of `transformers.Qwen2ForCausalLM` (`to_hugging_face`). What differs is speed, and two
choices at the start without which looking things up by a name does not form (see README.md):

* *Scale.* What attention and MLP add to the residual stream begins as large as an embedding, not smaller.
* *A starting point for look-ups.* Some heads of the first layers begin by looking a fixed number of tokens
  back (`shift_heads`), and two heads of a later layer by looking at what stood near the same word before
  (`match_heads`), over the slow rotary frequencies: the fast ones turn by more than a radian between the two
  places, so whatever is compared along them comes out at random. The last layer's first two heads begin by
  comparing who is asked about with who saw (`witness_heads`). All are trained like every other head.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

WITNESS_LAYER = 4
"""After this many layers the helper head reads who sees a sentence's event, and whom a question is about."""
SHIFTS = ((1, 2, 3, 4), (1, 3, None, None))
"""For the heads of the first layers: how many tokens back they look in the beginning."""
MATCH_LAYER = 2
"""The layer (from 0) whose first key-value head begins by matching words."""


def model_config(tokenizer: PreTrainedTokenizerFast) -> Qwen2Config:
    """The architecture: RoPE, RMSNorm, SwiGLU, grouped-query attention with biases, tied embeddings."""
    return Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=384,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


class Attention(nn.Module):
    """Grouped-query attention with rotary positions and an additive mask.

    Plain products: on a CPU the backward pass of the fused attention takes longer than all the rest.
    """

    def __init__(self, config: Qwen2Config) -> None:
        super().__init__()
        self.heads, self.groups = config.num_attention_heads, config.num_key_value_heads
        self.d_head = config.hidden_size // self.heads
        self.q_proj = nn.Linear(config.hidden_size, self.heads * self.d_head)
        self.k_proj = nn.Linear(config.hidden_size, self.groups * self.d_head)
        self.v_proj = nn.Linear(config.hidden_size, self.groups * self.d_head)
        self.o_proj = nn.Linear(self.heads * self.d_head, config.hidden_size, bias=False)

    def forward(self, x: Tensor, mask: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """[batch, pos, d_model] to the same, and the pattern of the first head [batch, pos, pos]."""
        batch, pos, _ = x.shape
        group = self.heads // self.groups

        def rotated(t: Tensor) -> Tensor:
            a, b = t.chunk(2, -1)
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
        return self.o_proj(z.reshape(batch, pos, self.heads * self.d_head)), pattern[:, 0, 0]


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: Qwen2Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, pos, d_model] to the same."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """Attention and MLP, each after its norm."""

    def __init__(self, config: Qwen2Config) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, mask: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """[batch, pos, d_model] to the same, and the pattern of the first head [batch, pos, pos]."""
        attended, pattern = self.self_attn(self.input_layernorm(x), mask, cos, sin)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), pattern


class Decoder(nn.Module):
    """The decoder with its helper head, which training alone uses: for every name, does this agent see what
    the sentence tells, or is the question about this agent?
    """

    def __init__(self, config: Qwen2Config, n_names: int) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.witness = nn.Linear(config.hidden_size, n_names)
        d_head = config.hidden_size // config.num_attention_heads
        theta = config.rope_parameters["rope_theta"]
        frequencies = theta ** -(torch.arange(d_head // 2) / (d_head / 2))
        self.register_buffer("frequencies", frequencies, persistent=False)
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
        for layer, offsets in zip(self.layers, SHIFTS):
            shift_heads(layer.self_attn, offsets, self.frequencies)
        match_heads(self.layers[0].self_attn, self.layers[MATCH_LAYER].self_attn, self.frequencies)
        witness_heads(self.layers[-1].self_attn, self.witness, self.frequencies)

    def forward(self, tokens: Tensor, mask: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states at the end and those that the helper head reads, both [batch, pos, d_model]; and the
        attention pattern of the last layer's first head, [batch, pos, pos].

        Args:
            tokens: [batch, pos]
            mask: [batch or 1, 1, 1, pos, pos], 0 where attention is allowed and very negative elsewhere.
            positions: [batch or 1, pos]
        """
        angle = positions.float()[..., None] * self.frequencies
        cos, sin = angle.cos()[:, :, None, None], angle.sin()[:, :, None, None]
        x = self.embed_tokens(tokens)
        for i, layer in enumerate(self.layers, start=1):
            x, pattern = layer(x, mask, cos, sin)
            if i == WITNESS_LAYER:
                middle = x
        return self.norm(x), middle, pattern

    def logits(self, hidden: Tensor) -> Tensor:
        """Unembed with the tied embedding."""
        return hidden @ self.embed_tokens.weight.T

    def witnesses(self, hidden: Tensor) -> Tensor:
        """Logits for every name at `hidden` [n, d_model]: sees what the sentence tells, or is asked about."""
        return self.witness(F.rms_norm(hidden.float(), hidden.shape[-1:]))


def shift_heads(attention: Attention, offsets: tuple[int | None, ...], frequencies: Tensor) -> None:
    """Bias queries and keys so that head i looks `offsets[i]` tokens back, whatever the tokens are.

    With the key bias along the first axis of each rotary pair and the query bias turned by -offset x
    frequency, the logit at distance D is gain x sum_f cos(f (D - offset)), over the faster half of the
    frequencies.
    """
    d_head, fast, gain = attention.d_head, len(frequencies) // 2, 4.0
    size = math.sqrt(gain * math.sqrt(d_head))
    group = attention.heads // attention.groups
    for head, offset in enumerate(offsets):
        if offset is None:
            continue
        key, query = d_head * (head // group), d_head * head
        turn = -frequencies[:fast] * offset
        attention.k_proj.bias[key : key + fast] = size
        attention.q_proj.bias[query : query + fast] = size * turn.cos()
        attention.q_proj.bias[query + d_head // 2 : query + d_head // 2 + fast] = size * turn.sin()


def match_heads(shift: Attention, match: Attention, frequencies: Tensor) -> None:
    """Let the heads of `shift` write what they see into directions of its own, and those of the first
    key-value head of `match` compare a word, or what such heads wrote, with what they wrote elsewhere.

    Comparing goes over the slow rotary pairs alone, and what is found is copied.
    """
    d_head, d_model = shift.d_head, shift.q_proj.in_features
    turned = torch.linalg.qr(torch.randn(d_model, d_model))[0]
    read, written, copied = (
        turned[:, :d_head],
        turned[:, d_head : 2 * d_head],
        turned[:, 2 * d_head : 3 * d_head],
    )
    shift.v_proj.weight.copy_(read.T.repeat(shift.groups, 1))
    shift.o_proj.weight.copy_(0.08 * written.repeat(1, shift.heads))
    rows = slow_rows(frequencies)
    n = len(rows)
    match.k_proj.weight[:d_head] = 0.0
    match.k_proj.weight[rows] = written.T[:n]
    match.v_proj.weight[:d_head] = copied.T
    for head in range(match.heads // match.groups):
        match.q_proj.weight[head * d_head : (head + 1) * d_head] = 0.0
        compared = (read + written).T[:n]
        # A little apart: two heads that begin alike have the same gradients, and stay one head for ever.
        match.q_proj.weight[rows + head * d_head] = compared + 0.1 * d_model**-0.5 * torch.randn_like(
            compared
        )
        match.o_proj.weight[:, head * d_head : (head + 1) * d_head] = 0.1 * copied


def witness_heads(attention: Attention, witness: nn.Linear, frequencies: Tensor) -> None:
    """Let the first key-value head compare what the helper head reads where a question ends and where an
    event is told, over the slow rotary pairs.
    """
    d_head, d_model = attention.d_head, attention.q_proj.in_features
    rows = slow_rows(frequencies)
    axes = torch.linalg.qr(torch.randn(d_model, len(rows)))[0]
    witness.weight.copy_(torch.randn(witness.out_features, len(rows)) @ axes.T * d_model**-0.5)
    attention.k_proj.weight[:d_head] = 0.0
    attention.k_proj.weight[rows] = axes.T
    for head in range(attention.heads // attention.groups):
        attention.q_proj.weight[head * d_head : (head + 1) * d_head] = 0.0
        attention.q_proj.weight[rows + head * d_head] = axes.T


def slow_rows(frequencies: Tensor) -> Tensor:
    """Axes of a head along which content can be compared: pairs that take more than 500 tokens for a turn."""
    slow = (frequencies < 2 * math.pi / 500).nonzero()[:, 0]
    return torch.cat((slow, slow + len(frequencies)))


def to_hugging_face(decoder: Decoder) -> Qwen2ForCausalLM:
    """The same network as `transformers` writes it; the helper head stays behind."""
    model = Qwen2ForCausalLM(decoder.config)
    state = {f"model.{name}": value for name, value in decoder.state_dict().items() if "witness" not in name}
    model.load_state_dict({**state, "lm_head.weight": decoder.embed_tokens.weight})
    return model.eval()
