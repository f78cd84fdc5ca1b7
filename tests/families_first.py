"""The families that the package was made for, and what it refuses."""

from __future__ import annotations

import torch
from family import (
    D_HEAD,
    D_MLP,
    D_MODEL,
    D_VOCAB,
    FALCON,
    FALCON_PLACES,
    GPT,
    HEADS,
    LAYERS,
    LLAMA,
    NEOX_MLP,
    PHI_MLP,
    SEPARATE,
    Family,
    Place,
    common,
    fused,
    made,
    rope,
    without,
)

PHI_3 = (
    fused("self_attn.qkv_proj", "blocks")
    | {"O": Place("self_attn.o_proj"), "gate": Place("mlp.gate_up_proj", "first")}
    | {"in": Place("mlp.gate_up_proj", "second"), "out": Place("mlp.down_proj")}
)
FIRST: dict[str, Family] = {
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
        base=(1e4, 1e6),
    ),
    "OLMo 2": Family(made("Olmo2", **common()), places=LLAMA),
    "Phi": Family(
        made("Phi", **common(num_key_value_heads=4), partial_rotary_factor=0.5),
        places={**{m: Place(f"self_attn.{m.lower()}_proj") for m in "QKV"}, "O": Place("self_attn.dense")}
        | PHI_MLP,
        kv_heads=4,
        rotary_dim=4,
        hooked_refused="reads 'partial_rotary_factor' from the configuration, where transformers .*",
    ),
    "Phi-3": Family(made("Phi3", **common()), places=PHI_3, hooked=True),
    "Phi-3, partial rotary": Family(
        made("Phi3", **common(), partial_rotary_factor=0.5), places=PHI_3, rotary_dim=4
    ),
    "StableLM": Family(
        made("StableLm", **common(), partial_rotary_factor=0.25, use_qkv_bias=True),
        places=LLAMA,
        rotary_dim=2,
    ),
    "GPT-NeoX (Pythia)": Family(
        made("GPTNeoX", **without("num_key_value_heads"), rotary_pct=0.25),
        layers="gpt_neox.layers",
        places=fused("attention.query_key_value", "by head") | {"O": Place("attention.dense")} | NEOX_MLP,
        kv_heads=4,
        hooked=True,
        rotary_dim=2,
    ),
    "Falcon": Family(
        made("Falcon", **FALCON, multi_query=True, alibi=False),
        layers="transformer.h",
        places=FALCON_PLACES,
        kv_heads=1,
    ),
    "GPT-J": Family(
        made(
            "GPTJ",
            **GPT,
            rotary_dim=4,
        ),
        layers="transformer.h",
        places={**{m: Place(f"attn.{m.lower()}_proj") for m in "QKV"}, "O": Place("attn.out_proj")}
        | {"in": Place("mlp.fc_in"), "out": Place("mlp.fc_out")},
        kv_heads=4,
        hooked=True,
        rotary_dim=4,
        pairing="adjacent",
    ),
    "Cohere": Family(made("Cohere", **common()), places=LLAMA, bridge_since=4, base=5e5, pairing="adjacent"),
    "GLM-4": Family(
        made("Glm4", **common(), head_dim=8, partial_rotary_factor=0.5),
        places=SEPARATE
        | {
            "gate": Place("mlp.gate_up_proj", "first"),
            "in": Place("mlp.gate_up_proj", "second"),
            "out": Place("mlp.down_proj"),
        },
        rotary_dim=4,
        pairing="adjacent",
    ),
    "Mixtral": Family(
        made("Mixtral", **common(), num_local_experts=2, num_experts_per_tok=1),
        places=SEPARATE,
        hooked=True,
        hooked_dtype=torch.float32,
        base=1e6,
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
    ),
    "GPT-2": Family(
        made("GPT2", **GPT),
        layers="transformer.h",
        places={m: Place("attn.c_attn", m.lower(), "blocks", True) for m in "QKV"}
        | {"O": Place("attn.c_proj", transposed=True)}
        | {"in": Place("mlp.c_fc", transposed=True), "out": Place("mlp.c_proj", transposed=True)},
        kv_heads=4,
        positions="learned",
        hooked=True,
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
    "SmolLM3": Family(
        made("SmolLM3", **common(), no_rope_layers=[1, 0]), places=LLAMA, base=2e6, not_rotated=(1,)
    ),
}

REFUSED: dict[str, Family] = {
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
    "JetMoE": Family(
        made(
            "JetMoe",
            **without("num_attention_heads"),
            kv_channels=D_HEAD,
            num_local_experts=2,
            num_experts_per_tok=1,
        ),
        refused="its attn has no Q matrix of its own",
    ),
    "HRM": Family(made("HrmText", **common()), refused="no single stack of layers"),
    "Nemotron-H": Family(
        made(
            "NemotronH",
            **common(),
            layers_block_type=["mamba", "attention"],
            mamba_num_heads=8,
            mamba_head_dim=8,
            ssm_state_size=8,
            n_groups=1,
            chunk_size=8,
            head_dim=8,
        ),
        refused="TransformerLens shows no attention in some of its layers",
    ),
    "GPT": Family(
        made("OpenAIGPT", vocab_size=D_VOCAB, n_embd=D_MODEL, n_layer=LAYERS, n_head=HEADS, n_positions=128),
        refused="other logits for this model under an attention mask",
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
