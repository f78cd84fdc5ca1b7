"""Train the embedded model: `python training/train.py --out training/runs/main`.

Data-parallel over CPU processes of one thread each, seeded, resumable (run the same command again), with a
log (`log.jsonl`), a checkpoint every two minutes and half-precision snapshots along the way. The learning
rate warms up, stays, and falls to zero over the last part of the budget; what rows are made of moves on when
the answers are right (`data.STAGES`).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from data import STAGES, Batch, Rows, collate, more_wordings
from model import Decoder, model_config, to_hugging_face
from probe import probe
from safetensors.torch import save_file
from tokenizer import build
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from variety import ALL_NAMES

STEPS = 20  # between two looks at the clock; rows are made for as many
SNAPSHOT = 10_000_000  # tokens between two snapshots


@dataclass
class Progress:
    """Where a run stands."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    chunk: int = 0
    stage: int = 0
    stage_began: int = 0  # tokens


def loss_of(decoder: Decoder, compiled: Any, batch: Batch) -> tuple[Tensor, dict[str, float]]:
    """Weighted mean cross-entropy of the predictions that count; plus the helper head's, plus that of where
    the last layer's first head looks; and what to log.
    """
    with torch.autocast("cpu", torch.bfloat16):
        hidden, middle, pattern = compiled(batch.tokens, batch.mask, batch.positions)
        logits = decoder.logits(hidden.flatten(0, 1)[batch.source])
    nll = F.cross_entropy(logits.float(), batch.target, reduction="none")
    loss = (nll * batch.weight).sum() / batch.weight.sum().clamp(min=1.0)
    answers = batch.weight >= 1.0
    seen = {
        "loss": float(loss.detach()),
        "right": float((logits.argmax(-1) == batch.target)[answers].float().mean()),
    }
    if len(batch.witness):
        every = decoder.witnesses(middle.flatten(0, 1)[batch.witness_at])
        guess = every.gather(1, batch.witness_name[:, None])[:, 0]
        weight = 3.0 - 2.0 * batch.witness  # few are away
        loss = loss + 0.3 * F.binary_cross_entropy_with_logits(guess, batch.witness, weight)
        seen["witness"] = float(((guess > 0) == (batch.witness > 0)).float().mean())
    if len(batch.about):
        about = decoder.witnesses(middle.flatten(0, 1)[batch.about_at])
        loss = loss + 0.3 * F.cross_entropy(about, batch.about)
        seen["about"] = float((batch.about.gather(1, about.argmax(-1, keepdim=True)) > 0).float().mean())
    if len(batch.look_at):
        looked = (pattern[batch.look_from] * batch.look_at).sum(-1)
        loss = loss - 0.4 * (looked + 1e-5).log().mean()
        seen["looked"] = float(looked.detach().mean())
    return loss, seen


def optimisers(decoder: Decoder) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for everything else."""
    inside = {name: p.ndim == 2 and name.startswith("layers") for name, p in decoder.named_parameters()}
    matrices = [p for name, p in decoder.named_parameters() if inside[name]]
    others = [p for name, p in decoder.named_parameters() if not inside[name]]
    return [
        torch.optim.Muon(matrices, lr=1.0, weight_decay=0.01, ns_steps=4, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=1.0, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


def average_gradients(parameters: list[torch.nn.Parameter]) -> None:
    """The mean over processes; a parameter without a gradient counts as zero."""
    flat = torch.cat(
        [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters]
    )
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters])):
        parameter.grad = part.view_as(parameter)


def mean_over_processes(value: float) -> float:
    """So that all processes decide alike."""
    total = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(total)
    return float(total) / dist.get_world_size()


def train(rank: int, args: argparse.Namespace) -> None:
    """One process of the run."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(args.port))
    dist.init_process_group("gloo", rank=rank, world_size=args.processes)
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(args.out / "tokenizer")
    decoder = Decoder(model_config(tokenizer), len(ALL_NAMES))
    optims, parameters, progress = optimisers(decoder), list(decoder.parameters()), Progress()
    checkpoint = args.out / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        decoder.load_state_dict(saved["decoder"])
        for optim, values in zip(optims, saved["optims"]):
            optim.load_state_dict(values)
        progress = Progress(**saved["progress"])
        if rank == 0:  # what was logged after the checkpoint is done again
            lines = (args.out / "log.jsonl").read_text().splitlines(keepends=True)
            kept = [line for line in lines if json.loads(line)["step"] <= progress.step]
            (args.out / "log.jsonl").write_text("".join(kept))
    compiled = torch.compile(decoder, dynamic=False)
    budget, last_saved, last_probe = args.minutes * 60, progress.seconds, progress.seconds

    def log(**entry: Any) -> None:
        with (args.out / "log.jsonl").open("a") as file:
            file.write(json.dumps({**asdict(progress), **entry}) + "\n")

    def save() -> None:
        partial = checkpoint.with_suffix(".tmp")
        states = [optim.state_dict() for optim in optims]
        torch.save({"decoder": decoder.state_dict(), "optims": states, "progress": asdict(progress)}, partial)
        partial.replace(checkpoint)

    while progress.seconds < budget:
        begun = time.time()
        stage = STAGES[progress.stage]
        rows = Rows(tokenizer, stage.width)
        seed = args.seed + 1000 + progress.chunk * args.processes + rank
        made = list(rows.stream(stage, seed, STEPS * stage.batch))
        means: dict[str, list[float]] = defaultdict(list)
        share = progress.seconds / budget
        for i in range(STEPS):
            batch = collate(
                made[i * stage.batch : (i + 1) * stage.batch], tokenizer.pad_token_id, stage.width
            )
            rate = min(1.0, (progress.step + 1) / 50) * min(1.0, (1.0 - share) / args.decay)
            for optim, base in zip(optims, (args.lr, args.lr / 2)):
                for group in optim.param_groups:
                    group["lr"] = base * rate
            loss, seen = loss_of(decoder, compiled, batch)
            loss.backward()
            average_gradients(parameters)
            norm = float(torch.nn.utils.clip_grad_norm_(parameters, 1.0))
            if not math.isfinite(norm):
                raise SystemExit(
                    f"the gradient is not finite at step {progress.step}; run again from {checkpoint} with a "
                    f"lower --lr than {args.lr}"
                )
            for optim in optims:
                optim.step()
                optim.zero_grad(set_to_none=True)
            for name, value in seen.items():
                means[name].append(value)
            progress.step += 1
            progress.tokens += batch.tokens.numel() * args.processes
        progress.chunk += 1
        progress.seconds += mean_over_processes(time.time() - begun)
        right = mean_over_processes(sum(means["right"]) / STEPS)
        snapshot = progress.tokens % SNAPSHOT < STEPS * batch.tokens.numel() * args.processes
        done = progress.seconds >= budget
        if rank == 0:
            log(**{name: round(sum(values) / len(values), 4) for name, values in means.items()})
            if done or progress.seconds - last_probe > 240:
                log(probe=probe(to_hugging_face(decoder), tokenizer))
            if done or progress.seconds - last_saved > 120:
                save()
            if snapshot:
                half = {name: p.half() for name, p in decoder.state_dict().items()}
                save_file(half, args.out / f"snapshot-{progress.tokens // SNAPSHOT * SNAPSHOT}.safetensors")
        if progress.seconds - last_probe > 240:
            last_probe = progress.seconds
        if progress.seconds - last_saved > 120:
            last_saved = progress.seconds
        if right >= stage.enough or progress.tokens - progress.stage_began > stage.at_most * 1e6:
            progress.stage, progress.stage_began = progress.stage + 1, progress.tokens
    dist.barrier()
    dist.destroy_process_group()


def process(rank: int, args: argparse.Namespace) -> None:
    """One process, in the wordings of training."""
    with more_wordings():
        train(rank, args)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--minutes",
        type=float,
        default=90.0,
        help="budget of training time; resumed runs count what they used",
    )
    parser.add_argument("--decay", type=float, default=0.25, help="share of the budget over which lr falls")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--port", type=int, default=29511, help="of this machine, where the processes meet")
    args = parser.parse_args()
    if not (args.out / "tokenizer").exists():
        args.out.mkdir(parents=True, exist_ok=True)
        with more_wordings():
            build(9216, args.out / "tokenizer")
    torch.multiprocessing.spawn(process, (args,), nprocs=args.processes)


if __name__ == "__main__":
    main()
