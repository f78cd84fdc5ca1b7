"""Tiny random models of every architecture family, and where `transformers` keeps their matrices: what the
oracles of `test_families.py` and the README's table are made from (`python tests/families.py` writes it).

Where a matrix lies is written down here once more, by hand, from the modelling code of `transformers`; the
package itself finds it without knowing the architecture.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tiny
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig

D_MODEL, HEADS, D_HEAD, D_MLP, D_VOCAB, LAYERS = 32, 4, 8, 40, 380, 2


@dataclass(frozen=True)
class Place:
    """Where a matrix lies: the module below a layer, which of its parts, and whether it is `[in, out]`."""

    module: str
    part: str = "all"  # "all", or of a fused weight: "q", "k", "v" by layout, "first" or "second" half
    layout: str = ""  # of a fused weight: "blocks", "by head", "by group"
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
        positions: how they enter: "rotary", "learned", "ALiBi", "none".
        dtype: of the model and its oracle; products of experts exist in float32 only.
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
    refused: str | None = None
    bridge_since: int = 3
    dtype: torch.dtype = torch.float64


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

FAMILIES: dict[str, Family] = {
    "Llama": Family(made("Llama", **common()), places=LLAMA, hooked=True),
    "Llama, llama3 scaling": Family(
        made(
            "Llama",
            **common(),
            **rope(
                "llama3",
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=64,
            ),
        ),
        places=LLAMA,
        hooked=True,
    ),
    "Llama, linear scaling": Family(made("Llama", **common(), **rope("linear", factor=2.0)), places=LLAMA),
    "Llama, yarn": Family(
        made("Llama", **common(), **rope("yarn", factor=4.0, original_max_position_embeddings=32)),
        places=LLAMA,
    ),
    "Llama, dynamic": Family(
        made("Llama", **common(), **rope("dynamic", factor=2.0)), places=LLAMA, hooked=True
    ),
    "Qwen2": Family(made("Qwen2", **common()), places=LLAMA, hooked=True),
    "Qwen3": Family(made("Qwen3", **common(), head_dim=8), places=LLAMA, hooked=True),
    "Mistral": Family(made("Mistral", **common()), places=LLAMA, hooked=True),
    "Gemma 2": Family(
        made("Gemma2", **common(), head_dim=8, query_pre_attn_scalar=8, sliding_window=16), places=LLAMA
    ),
    "Gemma 3": Family(
        made(
            "Gemma3Text",
            **common(),
            head_dim=8,
            query_pre_attn_scalar=8,
            sliding_window=16,
            layer_types=["sliding_attention", "full_attention"],
        ),
        places=LLAMA,
    ),
    "OLMo 2": Family(made("Olmo2", **common()), places=LLAMA),
    "Phi": Family(
        made("Phi", **common(num_key_value_heads=4), partial_rotary_factor=0.5),
        places={**{m: Place(f"self_attn.{m.lower()}_proj") for m in "QKV"}, "O": Place("self_attn.dense")}
        | PHI_MLP,
        kv_heads=4,
    ),
    "Phi-3": Family(
        made("Phi3", **common(), partial_rotary_factor=0.5),
        places=fused("self_attn.qkv_proj", "blocks")
        | {
            "O": Place("self_attn.o_proj"),
            "gate": Place("mlp.gate_up_proj", "first"),
            "in": Place("mlp.gate_up_proj", "second"),
            "out": Place("mlp.down_proj"),
        },
    ),
    "StableLM": Family(
        made("StableLm", **common(), partial_rotary_factor=0.25, use_qkv_bias=True), places=LLAMA
    ),
    "GPT-NeoX (Pythia)": Family(
        made("GPTNeoX", **without("num_key_value_heads"), rotary_pct=0.25),
        layers="gpt_neox.layers",
        places=fused("attention.query_key_value", "by head") | {"O": Place("attention.dense")} | NEOX_MLP,
        kv_heads=4,
        hooked=True,
    ),
    "Falcon": Family(
        made(
            "Falcon",
            **common(),
            new_decoder_architecture=False,
            multi_query=True,
            parallel_attn=True,
            ffn_hidden_size=D_MLP,
            alibi=False,
        ),
        layers="transformer.h",
        places=fused("self_attention.query_key_value", "blocks")
        | {"O": Place("self_attention.dense")}
        | NEOX_MLP,
        kv_heads=1,
    ),
    "GPT-J": Family(
        made(
            "GPTJ",
            vocab_size=D_VOCAB,
            n_embd=D_MODEL,
            n_layer=LAYERS,
            n_head=HEADS,
            n_positions=128,
            rotary_dim=4,
            bos_token_id=1,
            eos_token_id=2,
        ),
        layers="transformer.h",
        places={**{m: Place(f"attn.{m.lower()}_proj") for m in "QKV"}, "O": Place("attn.out_proj")}
        | {"in": Place("mlp.fc_in"), "out": Place("mlp.fc_out")},
        kv_heads=4,
        hooked=True,
    ),
    "Cohere": Family(made("Cohere", **common()), places=LLAMA, bridge_since=4),
    "GLM-4": Family(
        made("Glm4", **common(), head_dim=8, partial_rotary_factor=0.5),
        places=SEPARATE
        | {
            "gate": Place("mlp.gate_up_proj", "first"),
            "in": Place("mlp.gate_up_proj", "second"),
            "out": Place("mlp.down_proj"),
        },
    ),
    "Mixtral": Family(
        made("Mixtral", **common(), num_local_experts=2, num_experts_per_tok=1),
        places=SEPARATE,
        hooked=True,
        dtype=torch.float32,
    ),
    "Qwen3-MoE": Family(
        made(
            "Qwen3Moe",
            **common(),
            head_dim=8,
            num_experts=2,
            num_experts_per_tok=1,
            moe_intermediate_size=D_MLP,
            decoder_sparse_step=1,
            mlp_only_layers=[],
        ),
        places=SEPARATE,
        dtype=torch.float32,
    ),
    "GPT-2": Family(
        made(
            "GPT2",
            vocab_size=D_VOCAB,
            n_embd=D_MODEL,
            n_layer=LAYERS,
            n_head=HEADS,
            n_inner=D_MLP,
            n_positions=128,
            bos_token_id=1,
            eos_token_id=2,
        ),
        layers="transformer.h",
        places={m: Place("attn.c_attn", m.lower(), "blocks", True) for m in "QKV"}
        | {"O": Place("attn.c_proj", transposed=True)}
        | {"in": Place("mlp.c_fc", transposed=True), "out": Place("mlp.c_proj", transposed=True)},
        kv_heads=4,
        positions="learned",
    ),
    "Bloom": Family(
        made(
            "Bloom",
            vocab_size=D_VOCAB,
            hidden_size=D_MODEL,
            n_layer=LAYERS,
            n_head=HEADS,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        ),
        layers="transformer.h",
        places=fused("self_attention.query_key_value", "by head")
        | {"O": Place("self_attention.dense")}
        | NEOX_MLP,
        kv_heads=4,
        hooked=True,
        positions="ALiBi",
    ),
    "MPT": Family(
        made(
            "Mpt",
            vocab_size=D_VOCAB,
            d_model=D_MODEL,
            n_layers=LAYERS,
            n_heads=HEADS,
            expansion_ratio=2,
            max_seq_len=128,
        ),
        layers="transformer.blocks",
        places=fused("attn.Wqkv", "blocks")
        | {"O": Place("attn.out_proj"), "in": Place("ffn.up_proj"), "out": Place("ffn.down_proj")},
        kv_heads=4,
        positions="ALiBi",
    ),
    "Jamba": Family(
        made(
            "Jamba",
            **common(),
            attn_layer_period=2,
            attn_layer_offset=1,
            expert_layer_period=2,
            expert_layer_offset=0,
            num_experts=1,
            mamba_d_state=4,
            mamba_dt_rank=4,
            use_mamba_kernels=False,
        ),
        places=SEPARATE
        | {
            name: Place(f"feed_forward.{part}_proj")
            for name, part in (("gate", "gate"), ("in", "up"), ("out", "down"))
        },
        attention_layers=(1,),
        positions="none",
    ),
    "SmolLM3": Family(made("SmolLM3", **common(), no_rope_layers=[1, 0]), places=LLAMA),
    "DeepSeek-V3": Family(
        made(
            "DeepseekV3",
            **common(num_key_value_heads=4),
            q_lora_rank=8,
            kv_lora_rank=8,
            qk_rope_head_dim=4,
            qk_nope_head_dim=4,
            v_head_dim=8,
            n_routed_experts=2,
            num_experts_per_tok=1,
            first_k_dense_replace=2,
            n_group=1,
            topk_group=1,
        ),
        refused="no Q and K matrices of its own",
    ),
    "Falcon 40B's form": Family(
        made(
            "Falcon",
            **common(),
            new_decoder_architecture=True,
            num_kv_heads=2,
            ffn_hidden_size=D_MLP,
            alibi=False,
        ),
        refused="TransformerLens cannot make",
    ),
    "GPT": Family(
        made("OpenAIGPT", vocab_size=D_VOCAB, n_embd=D_MODEL, n_layer=LAYERS, n_head=HEADS, n_positions=128),
        refused="other logits .* under an attention mask",
    ),
    "Mamba": Family(
        made("Mamba", vocab_size=D_VOCAB, hidden_size=D_MODEL, num_hidden_layers=LAYERS, state_size=4),
        refused="no attention matrices",
    ),
    "T5": Family(
        made(
            "T5", vocab_size=D_VOCAB, d_model=D_MODEL, num_layers=LAYERS, num_heads=HEADS, d_kv=8, d_ff=D_MLP
        ),
        refused="encoder-decoder",
    ),
}


@functools.cache
def directory(name: str) -> Path:
    """A Hugging Face directory with a random model of a family, every weight far from where it usually
    begins.
    """
    path = tiny.folder() / f"family-{len(list(tiny.folder().iterdir()))}"
    config = FAMILIES[name].config()
    if config.is_encoder_decoder:
        hf = transformers.AutoModelForSeq2SeqLM.from_config(config)
    else:
        hf = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter_name, parameter in hf.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "A_log" in parameter_name or "dt_" in parameter_name:
                continue
            if parameter.ndim == 1:
                around = float("norm" in parameter_name and parameter_name.endswith("weight"))
                parameter.copy_(around + 0.3 * noise)
            elif "embed" in parameter_name or "wte" in parameter_name or "wpe" in parameter_name:
                parameter.copy_(noise)
            else:
                parameter.copy_(1.5 * noise / parameter.shape[-1] ** 0.5)
    hf.save_pretrained(path)
    tiny.build_tokenizer().save_pretrained(path)
    return path


def matrices(hf: Any, name: str) -> dict[tuple[int, str], tuple[Tensor, Callable[[Tensor], Tensor]]]:
    """For each layer and matrix its parameter, and how to take the matrix out of a tensor like it: a view in
    the package's orientation.
    """
    family, found = FAMILIES[name], {}
    for layer, block in enumerate(hf.get_submodule(family.layers)):
        for matrix, place in family.places.items():
            if matrix in "QKVO" and layer not in (family.attention_layers or range(LAYERS)):
                continue
            parameter = block.get_submodule(place.module).weight
            found[layer, matrix] = (parameter, functools.partial(taken, family, matrix, place))
    return found


def taken(family: Family, matrix: str, place: Place, weight: Tensor) -> Tensor:
    """A matrix out of a weight, as a view that can be written to."""
    weight = weight.T if place.transposed else weight  # [out, in]
    kv = family.kv_heads
    if place.part in ("first", "second"):
        weight = weight.unflatten(0, (2, -1))[int(place.part == "second")]
    elif place.layout == "by head":
        weight = weight.unflatten(0, (HEADS, 3, D_HEAD))[:, "qkv".index(place.part)]
    elif place.layout == "blocks":
        ends = {"q": (0, HEADS), "k": (HEADS, HEADS + kv), "v": (HEADS + kv, HEADS + 2 * kv)}
        begin, end = ends[place.part]
        weight = weight[begin * D_HEAD : end * D_HEAD].unflatten(0, (-1, D_HEAD))
    elif matrix in "QKV":
        weight = weight.unflatten(0, (-1, D_HEAD))
    if matrix == "O":  # [d_model, heads d_head] to [heads, d_head, d_model]
        return weight.T.unflatten(0, (HEADS, D_HEAD))
    return weight.transpose(-1, -2)  # [heads, d_model, d_head] or [in, out]


BEGIN, END = "<!-- families: written by tests/families.py -->", "<!-- end of families -->"


def table() -> str:
    """What `test_families.py` holds true, as Markdown."""
    lines = [
        "| model | matrices | positions | bridge 4.x | bridge 3.9 | HookedTransformer 3.9 |",
        "|---|---|---|---|---|---|",
    ]
    for name, family in FAMILIES.items():
        offered = ", ".join(m for m in ("Q", "K", "V", "O", "gate", "in", "out") if m in family.places)
        if family.refused is not None:
            lines.append(f"| {name} | refused: {WHY[name]} | | | | |")
            continue
        marks = [True, family.bridge_since <= 3, family.hooked]
        cells = " | ".join("yes" if mark else "refused" for mark in marks)
        lines.append(f"| {name} | {offered} | {family.positions} | {cells} |")
    return "\n".join(lines)


WHY = {
    "DeepSeek-V3": "multi-head latent attention has no single Q and K matrix",
    "Falcon 40B's form": "TransformerLens does not split its fused weight",
    "GPT": "TransformerLens computes other logits under an attention mask",
    "Mamba": "no attention",
    "T5": "encoder-decoder",
}


def main() -> None:
    """Write the table into the README."""
    readme = Path(__file__).parents[1] / "README.md"
    before, rest = readme.read_text().split(BEGIN)
    readme.write_text(f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
