"""Further families that TransformerLens' bridge has."""

from __future__ import annotations

import torch
from family import (
    D_MLP,
    D_MODEL,
    D_VOCAB,
    FALCON,
    FALCON_PLACES,
    GATED,
    GPT,
    HEADS,
    LAYERS,
    LLAMA,
    SEPARATE,
    Family,
    Place,
    common,
    fused,
    made,
    rope,
    without,
)

SLIDING = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": D_MLP}
LOCAL_EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
STATE_SPACE = {
    "mamba_d_state": 8,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
}
UNGATED = {"in": Place("mlp.up_proj"), "out": Place("mlp.down_proj")}
FEED_FORWARD = {
    name: Place(f"feed_forward.{part}_proj")
    for name, part in (("gate", "gate"), ("in", "up"), ("out", "down"))
}
JOINT_MLP = {
    "gate": Place("mlp.gate_up_proj", "first"),
    "in": Place("mlp.gate_up_proj", "second"),
    "out": Place("mlp.down_proj"),
}
FC = {"in": Place("fc1"), "out": Place("fc2")}
OUT_PROJ = SEPARATE | {"O": Place("self_attn.out_proj")}
LONG = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 5.0]}

MORE: dict[str, Family] = {
    # norms before the rotation, scales per position after it (from 16 tokens on), layers without a rotation
    "Gemma": Family(made("Gemma", **common(), head_dim=8), places=LLAMA),
    "Gemma 4 (all heads of one size)": Family(
        made(
            "Gemma4Text", **common(), head_dim=8, global_head_dim=8, hidden_size_per_layer_input=0, **SLIDING
        ),
        places=LLAMA,
        frequencies=([1.0, 0.1, 0.01, 0.001], [1.0, 0.0, 0.0, 0.0]),
    ),
    "VaultGemma": Family(
        made("VaultGemma", **common(), head_dim=8, query_pre_attn_scalar=8, **SLIDING), places=LLAMA
    ),
    "Ministral 3": Family(
        made(
            "Ministral3",
            **common(),
            head_dim=8,
            **rope("default", llama_4_scaling_beta=0.1, original_max_position_embeddings=4),
        ),
        places=LLAMA,
    ),
    "Llama 4": Family(
        made(
            "Llama4Text",
            **common(),
            head_dim=8,
            **LOCAL_EXPERTS,
            intermediate_size_mlp=D_MLP,
            attention_chunk_size=64,
            no_rope_layers=[1, 0],
            moe_layers=[],
        ),
        places=SEPARATE,
        base=5e5,
        pairing="adjacent",
        not_rotated=(1,),
    ),
    "Llama, LongRoPE": Family(
        made(
            "Llama", **common(), **rope("longrope", factor=4.0, original_max_position_embeddings=32, **LONG)
        ),
        places=LLAMA,
        frequencies=([1 / 2, 0.1 / 3, 0.01 / 4, 0.001 / 5],) * 2,
    ),
    "Phi-3, LongRoPE": Family(
        made(
            "Phi3",
            **common(),
            original_max_position_embeddings=32,
            **rope("longrope", original_max_position_embeddings=32, **LONG),
        ),
        places=fused("self_attn.qkv_proj", "blocks") | {"O": Place("self_attn.o_proj")} | JOINT_MLP,
        frequencies=([1 / 2, 0.1 / 3, 0.01 / 4, 0.001 / 5],) * 2,
    ),
    "OLMo": Family(made("Olmo", **common(), clip_qkv=4.0), places=LLAMA),
    "OLMo 3": Family(
        made("Olmo3", **common(), **SLIDING),
        places=LLAMA,
        base=5e5,
        hooked=True,
        hooked_without=("O", "out"),
    ),
    "Apertus": Family(made("Apertus", **common(), **rope("default")), places=SEPARATE | UNGATED, hooked=True),
    "Arcee": Family(made("Arcee", **common()), places=SEPARATE | UNGATED),
    "BitNet": Family(made("BitNet", **common()), places=LLAMA, base=5e5),
    "CodeGen": Family(
        made("CodeGen", **GPT, n_inner=D_MLP, rotary_dim=4),
        layers="transformer.h",
        places=fused("attn.qkv_proj", "by head, q v k")
        | {"O": Place("attn.out_proj"), "in": Place("mlp.fc_in"), "out": Place("mlp.fc_out")},
        kv_heads=4,
        rotary_dim=4,
        pairing="adjacent",
    ),
    "Cohere 2": Family(
        made("Cohere2", **common(), **SLIDING),
        places=LLAMA,
        pairing="adjacent",
        not_rotated=(1,),
        bridge_since=4,
    ),
    "ERNIE 4.5": Family(made("Ernie4_5", **common(), head_dim=8), places=LLAMA, base=5e5, pairing="adjacent"),
    "EXAONE 4": Family(made("Exaone4", **common(), **SLIDING), places=LLAMA, not_rotated=(1,)),
    "Falcon, ALiBi": Family(
        made("Falcon", **FALCON, multi_query=True, alibi=True),
        layers="transformer.h",
        places=FALCON_PLACES,
        kv_heads=1,
        positions="ALiBi",
    ),
    "GLM": Family(
        made("Glm", **common(), head_dim=8, partial_rotary_factor=0.5),
        places=SEPARATE | JOINT_MLP,
        rotary_dim=4,
        pairing="adjacent",
    ),
    "Granite": Family(made("Granite", **common()), places=LLAMA),
    "HunYuan": Family(made("HunYuanDenseV1", **common(), head_dim=8), places=LLAMA, bridge_since=4),
    "Jais 2": Family(made("Jais2", **common()), places=SEPARATE | UNGATED),
    "ModernBERT decoder": Family(
        made("ModernBertDecoder", **common(), local_attention=32),
        places={m: Place(f"attn.{m.lower()}_proj") for m in "QKV"}
        | {"O": Place("attn.Wo"), "out": Place("mlp.Wo")},  # the weight of "in" holds a gate, too
        kv_heads=4,
        base=(1.6e5, 1e4),
    ),
    "NanoChat": Family(
        made("NanoChat", **common()),
        places=SEPARATE | {"in": Place("mlp.fc1"), "out": Place("mlp.fc2")},
        pairing="half, backwards",
    ),
    "Nemotron": Family(made("Nemotron", **common(), head_dim=8), places=SEPARATE | UNGATED, rotary_dim=4),
    "Seed-OSS": Family(made("SeedOss", **common(), head_dim=8), places=LLAMA),
    "StarCoder 2": Family(
        made("Starcoder2", **common()),
        places=SEPARATE | {"in": Place("mlp.c_fc"), "out": Place("mlp.c_proj")},
    ),
    # layers of another kind between those with attention, or beside it
    "Bamba": Family(
        made("Bamba", **common(), attn_layer_indices=[1], **STATE_SPACE),
        places=SEPARATE | FEED_FORWARD,
        attention_layers=(1,),
        rotary_dim=4,
    ),
    "Falcon-H1": Family(
        made("FalconH1", **common(), head_dim=8, mamba_d_ssm=64, **STATE_SPACE, key_multiplier=0.7),
        places=SEPARATE | FEED_FORWARD,
    ),
    "Granite 4, hybrid": Family(
        made(
            "GraniteMoeHybrid",
            **common(),
            layer_types=["mamba", "attention"],
            num_local_experts=0,
            shared_intermediate_size=D_MLP,
            position_embedding_type="rope",
            **STATE_SPACE,
        ),
        places=SEPARATE,
        attention_layers=(1,),
    ),
    "LFM2": Family(
        made("Lfm2", **common(), layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False),
        places=OUT_PROJ | {m: Place(f"feed_forward.w{n}") for m, n in (("gate", 1), ("in", 3), ("out", 2))},
        attention_layers=(1,),
        base=1e6,
    ),
    "OLMo hybrid": Family(made("OlmoHybrid", **common(), **LINEAR), places=LLAMA, attention_layers=(1,)),
    "Qwen3.5": Family(  # Q lies beside a gate in one weight
        made("Qwen3_5Text", **common(), head_dim=8, **LINEAR),
        places={m: SEPARATE[m] for m in "KVO"} | GATED,
        attention_layers=(1,),
        rotary_dim=2,
    ),
    # experts instead of the MLP
    "AFMoE (Trinity)": Family(
        made("Afmoe", **common(), head_dim=8, num_dense_layers=2, num_shared_experts=1, **EXPERTS, **SLIDING),
        places=SEPARATE,
        not_rotated=(1,),
    ),
    "FlexOlmo": Family(
        made("FlexOlmo", **common(), num_experts=2, num_experts_per_tok=1), places=SEPARATE, base=5e5
    ),
    "GLM-4.5": Family(
        made(
            "Glm4Moe",
            **common(),
            head_dim=8,
            partial_rotary_factor=0.5,
            n_routed_experts=2,
            num_experts_per_tok=1,
            moe_intermediate_size=D_MLP,
            first_k_dense_replace=1,
            n_group=1,
            topk_group=1,
        ),
        places=SEPARATE,
        rotary_dim=4,
    ),
    "GPT-OSS": Family(  # with sinks
        made("GptOss", **common(), head_dim=8, **LOCAL_EXPERTS, **SLIDING, **rope("default")),
        places=SEPARATE,
        hooked=True,
    ),
    "Granite MoE": Family(made("GraniteMoe", **common(), **LOCAL_EXPERTS), places=SEPARATE),
    "LFM2-MoE": Family(
        made("Lfm2Moe", **common(), layer_types=["conv", "full_attention"], num_dense_layers=1, **EXPERTS),
        places=OUT_PROJ,
        attention_layers=(1,),
        base=1e6,
    ),
    "MiniMax-M2": Family(
        made("MiniMaxM2", **common(), head_dim=8, **LOCAL_EXPERTS), places=SEPARATE, base=5e6
    ),
    "OLMoE": Family(
        made("Olmoe", **common(), num_experts=2, num_experts_per_tok=1),
        places=SEPARATE,
        hooked=True,
        hooked_dtype=torch.float32,
    ),
    "Qwen2-MoE": Family(
        made("Qwen2Moe", **common(), **EXPERTS, shared_expert_intermediate_size=D_MLP), places=SEPARATE
    ),
    "Qwen3-Next": Family(
        made("Qwen3Next", **common(), head_dim=8, **LINEAR, **EXPERTS, shared_expert_intermediate_size=D_MLP),
        places={m: SEPARATE[m] for m in "KVO"},
        attention_layers=(1,),
        rotary_dim=2,
    ),
    # without a rotation
    "GPT-BigCode (StarCoder)": Family(
        made("GPTBigCode", **GPT, n_inner=D_MLP),
        layers="transformer.h",
        places=fused("attn.c_attn", "blocks")
        | {"O": Place("attn.c_proj"), "in": Place("mlp.c_fc"), "out": Place("mlp.c_proj")},
        kv_heads=1,
        positions="learned",
    ),
    "GPT-Neo": Family(
        made(
            "GPTNeo",
            vocab_size=D_VOCAB,
            hidden_size=D_MODEL,
            num_layers=LAYERS,
            num_heads=HEADS,
            max_position_embeddings=128,
            attention_types=[[["global", "local"], 1]],
            window_size=16,
            bos_token_id=1,
            eos_token_id=2,
        ),
        layers="transformer.h",
        places={m: Place(f"attn.attention.{m.lower()}_proj") for m in "QKV"}
        | {"O": Place("attn.attention.out_proj"), "in": Place("mlp.c_fc"), "out": Place("mlp.c_proj")},
        kv_heads=4,
        positions="learned",
        hooked=True,
    ),
    "OPT": Family(
        made("OPT", **without("num_key_value_heads"), ffn_dim=D_MLP, word_embed_proj_dim=D_MODEL),
        layers="model.decoder.layers",
        places=OUT_PROJ | FC,
        kv_heads=4,
        hooked=True,
        positions="learned",
    ),
    "XGLM": Family(
        made(
            "XGLM",
            vocab_size=D_VOCAB,
            d_model=D_MODEL,
            num_layers=LAYERS,
            attention_heads=HEADS,
            ffn_dim=D_MLP,
            max_position_embeddings=128,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        ),
        places=OUT_PROJ | FC,
        kv_heads=4,
        positions="sinusoids",
        dtype=torch.float32,  # transformers cannot make its mask in float64
    ),
}
