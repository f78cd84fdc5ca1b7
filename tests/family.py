"""What a family of models is in these tests: its configuration, and where `transformers` keeps matrices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig

D_MODEL, HEADS, D_HEAD, D_MLP, D_VOCAB, LAYERS = 32, 4, 8, 40, 380, 2


@dataclass(frozen=True)
class Place:
    """Where a matrix lies: the module below a layer, which of its parts, and whether it is `[in, out]`."""

    module: str
    part: str = "all"  # "all", or of a fused weight: "q", "k", "v" by layout, "first" or "second" half
    layout: str = ""  # of a fused weight: "blocks", "by head", "by head, q v k"
    transposed: bool = False


@dataclass(frozen=True)
class Family:
    """One architecture in one form.

    Attributes:
        config: makes its configuration.
        layers: path of the list of layers in the `transformers` model.
        places: matrices that the package must offer, and where they are.
        attention_layers: layers that have attention; None for all.
        hooked: whether TransformerLens 3.9's HookedTransformer has it; else it is refused, because it cannot
            be loaded, its parts cannot be seen, or other numbers come out.
        positions: how they enter: "rotary", "learned", "sinusoids", "ALiBi", "none".
        base, rotary_dim: of rotary frequencies, base^(-2m / rotary_dim); one base, or one for each layer.
        pairing: which dimensions of a head each frequency turns: "half", "adjacent", or "half, backwards".
        frequencies: radians a position in each layer, where they do not follow from the base.
        not_rotated: layers with attention and no rotation.
        dtype, hooked_dtype: of the model and its oracle; HookedTransformer's experts need float32.
        hooked_without: matrices that the model has and HookedTransformer does not show.
        hooked_refused: part of the message with which HookedTransformer's form is refused, where it is not a
            usual one.
        refused: part of the message with which the whole model is refused.
        bridge_since: the first version of TransformerLens whose bridge computes what `transformers` does;
            before, the model is refused.
    """

    config: Callable[[], PreTrainedConfig]
    layers: str = "model.layers"
    places: dict[str, Place] = field(default_factory=dict)
    kv_heads: int = 2
    attention_layers: tuple[int, ...] | None = None
    hooked: bool = False
    positions: str = "rotary"
    base: float | tuple[float, float] = 1e4
    rotary_dim: int = D_HEAD
    pairing: str = "half"
    frequencies: tuple[list[float], list[float]] | None = None
    not_rotated: tuple[int, ...] = ()
    hooked_without: tuple[str, ...] = ()
    hooked_refused: str | None = None
    refused: str | None = None
    bridge_since: int = 3
    dtype: torch.dtype = torch.float64
    hooked_dtype: torch.dtype = torch.float64


def common(**more: Any) -> dict[str, Any]:
    """Sizes under their usual names."""
    return {
        "vocab_size": D_VOCAB,
        "hidden_size": D_MODEL,
        "intermediate_size": D_MLP,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **more,
    }


def without(name: str) -> dict[str, Any]:
    """The usual sizes, one left out."""
    return {key: value for key, value in common().items() if key != name}


def made(kind: str, **options: Any) -> Callable[[], PreTrainedConfig]:
    """A configuration by its class name, with the model class that TransformerLens chooses its adapter by."""

    def make() -> PreTrainedConfig:
        config = getattr(transformers, f"{kind}Config")(**options)
        config.architectures = [ARCHITECTURES.get(kind, f"{kind}ForCausalLM")]
        return config

    return make


ARCHITECTURES = {
    "GPT2": "GPT2LMHeadModel",
    "Gemma3Text": "Gemma3ForCausalLM",
    "Gemma4Text": "Gemma4ForCausalLM",
    "Llama4Text": "Llama4ForCausalLM",
    "Qwen3_5Text": "Qwen3_5ForCausalLM",
    "OpenAIGPT": "OpenAIGPTLMHeadModel",
    "T5": "T5ForConditionalGeneration",
}
SEPARATE = {m: Place(f"self_attn.{m.lower()}_proj") for m in "QKVO"}
GATED = {"gate": Place("mlp.gate_proj"), "in": Place("mlp.up_proj"), "out": Place("mlp.down_proj")}
LLAMA = SEPARATE | GATED


def rope(kind: str, **more: Any) -> dict[str, Any]:
    """Rope parameters of one kind of scaling."""
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **more}}


def fused(module: str, layout: str) -> dict[str, Place]:
    """Q, K and V in one weight."""
    return {m: Place(module, m.lower(), layout) for m in "QKV"}


PHI_MLP = {"in": Place("mlp.fc1"), "out": Place("mlp.fc2")}
NEOX_MLP = {"in": Place("mlp.dense_h_to_4h"), "out": Place("mlp.dense_4h_to_h")}
GPT = {
    "vocab_size": D_VOCAB,
    "n_embd": D_MODEL,
    "n_layer": LAYERS,
    "n_head": HEADS,
    "n_positions": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FALCON = {**common(), "new_decoder_architecture": False, "parallel_attn": True, "ffn_hidden_size": D_MLP}
FALCON_PLACES = (
    fused("self_attention.query_key_value", "blocks") | {"O": Place("self_attention.dense")} | NEOX_MLP
)
