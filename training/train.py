"""Train the embedded model: `python training/train.py --out training/runs/main`.

Seeded, resumable (run the same command again), logs to `log.jsonl`, checkpoints weights and optimiser every
few minutes. The learning rate warms up, stays, and decays over the last fifth of the budget; the curriculum
follows the share of the budget that is used up.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from data import CURRICULUM, Batch, Row, Stage, collate, rows
from probe import probe
from tokenizer import build
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WIDTH, CHUNK = 176, 960


def model_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """The architecture: RoPE, RMSNorm, SwiGLU, grouped-query attention, tied embeddings."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        attention_bias=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="sdpa",
    )


def stage_at(share: float) -> Stage:
    """The stage of the curriculum at a share of the budget."""
    return next(stage for stage in CURRICULUM if share < stage.until or stage is CURRICULUM[-1])


def batches(tokenizer: PreTrainedTokenizerFast, share: float, chunk: int, size: int) -> Iterator[Batch]:
    """The batches of one chunk of rows."""
    stream: Iterator[Row] = rows(tokenizer, stage_at(share), seed=1000 + 10 * chunk, n=CHUNK, length=WIDTH)
    for _ in range(CHUNK // size):
        yield collate(list(islice(stream, size)), tokenizer.pad_token_id, WIDTH)


def loss_of(backbone: Callable[..., Any], head: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Weighted mean cross-entropy of the predictions that count."""
    with torch.autocast("cpu", torch.bfloat16):
        hidden = backbone(
            batch.tokens, attention_mask=batch.mask, position_ids=batch.positions, use_cache=False
        )
        logits = head(hidden.last_hidden_state.flatten(0, 1)[batch.source])
    nll = cross_entropy(logits.float(), batch.target, reduction="none")
    return (nll * batch.weight).sum() / batch.weight.sum()


def optimisers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for everything else."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers" in name]
    others = [p for name, p in model.named_parameters() if not (p.ndim == 2 and "layers" in name)]
    return [
        torch.optim.Muon(matrices, lr=1.0, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=1.0, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def rate(share: float, step: int) -> float:
    """Learning-rate multiplier: linear warm-up over 100 steps, constant, linear decay over the last fifth."""
    return min(1.0, step / 100) * min(1.0, max(0.0, (1.0 - share) / 0.2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--minutes",
        type=float,
        default=72.0,
        help="budget of training time; resumed runs count what they used",
    )
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    words = args.out / "tokenizer"
    tokenizer = AutoTokenizer.from_pretrained(words) if words.exists() else build(2304, words)
    model = LlamaForCausalLM(model_config(tokenizer))
    optims = optimisers(model)
    backbone = torch.compile(model.model)  # twice as fast; shares the parameters
    state = {"step": 0, "tokens": 0, "seconds": 0.0, "chunk": 0}
    checkpoint = args.out / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        for optim, values in zip(optims, saved["optims"]):
            optim.load_state_dict(values)
        state = saved["state"]
    bases = (args.lr, args.lr / 2)
    budget, last_saved, last_probe = args.minutes * 60, time.time(), state["seconds"]

    def save() -> None:
        partial = checkpoint.with_suffix(".tmp")
        torch.save(
            {"model": model.state_dict(), "optims": [o.state_dict() for o in optims], "state": state}, partial
        )
        partial.replace(checkpoint)

    with (args.out / "log.jsonl").open("a") as log:
        while state["seconds"] < budget:
            for batch in batches(tokenizer, state["seconds"] / budget, state["chunk"], args.batch):
                begun = time.time()
                share = state["seconds"] / budget
                for optim, base in zip(optims, bases):
                    for group in optim.param_groups:
                        group["lr"] = base * rate(share, state["step"] + 1)
                model.train()
                loss = loss_of(backbone, model.lm_head, batch)
                loss.backward()
                norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                if not math.isfinite(float(norm)):
                    sys.exit(
                        f"the gradient is not finite at step {state['step']}; "
                        f"start again from {checkpoint} with a lower --lr"
                    )
                for optim in optims:
                    optim.step()
                    optim.zero_grad(set_to_none=True)
                state["step"] += 1
                state["tokens"] += int(batch.tokens.numel())
                state["seconds"] += time.time() - begun
                if state["step"] % 20 == 0:
                    log.write(json.dumps({**state, "loss": round(float(loss.detach()), 4)}) + "\n")
                    log.flush()
                if state["seconds"] - last_probe > 180 or state["seconds"] >= budget:
                    last_probe = state["seconds"]
                    log.write(json.dumps({**state, "probe": probe(model.eval(), tokenizer)}) + "\n")
                    log.flush()
                if state["seconds"] >= budget:
                    break
            state["chunk"] += 1
            if time.time() - last_saved > 120 or state["seconds"] >= budget:
                save()
                last_saved = time.time()
    (args.out / "args.json").write_text(
        json.dumps({k: str(v) for k, v in vars(args).items()} | {"stages": [asdict(s) for s in CURRICULUM]})
    )


if __name__ == "__main__":
    main()
