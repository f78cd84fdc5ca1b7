"""Train the embedded model: `python training/train.py --out training/runs/main`.

On a GPU where there is one, else on the CPU; rows are made by other processes. Seeded, resumable (run the
same command again), with a log (`log.jsonl`), a checkpoint every two minutes and half-precision snapshots
along the way. The learning rate warms up, stays, and falls to zero over the last part of the budget; what
rows are made of moves on when the answers are right (`data.STAGES`). Then come short parts on rows as long as
the context (`data.LONG`), each from the last snapshot on, with a learning rate that falls again.
`--positions learned` and `--positions alibi` train the twins.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from data import LONG, STAGES, Batch, Rows, collate, more_wordings
from model import POSITIONS, Decoder, Shape, autocast, to_hugging_face
from probe import probe
from safetensors.torch import load_file, save_file
from tokenizer import build
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast
from variety import ALL_NAMES

STEPS = 20  # between two looks at the answers; rows are made for as many
SNAPSHOT = 10_000_000  # tokens between two snapshots
PROBE = 5_000_000  # tokens between two looks at the dev split
SAVE = 120  # seconds between two checkpoints
LONG_RATE = 0.15  # the learning rate of the parts on long rows, as a share of --lr


@dataclass
class Progress:
    """Where a run stands."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    chunk: int = 0
    stage: int = 0
    stage_began: int = 0  # tokens


def loss_of(decoder: Decoder, compiled: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted mean cross-entropy of the predictions that count; plus the helper head's, plus that of where
    the last layer's last head looks; and what to log.
    """
    with autocast(batch.tokens.device):
        hidden, middle, pattern = compiled(batch.tokens, batch.mask, batch.positions)
        logits = decoder.logits(hidden.flatten(0, 1)[batch.source])
    nll = F.cross_entropy(logits.float(), batch.target, reduction="none")
    loss = (nll * batch.weight).sum() / batch.weight.sum().clamp(min=1.0)
    answers = batch.weight >= 1.0
    seen = {"loss": loss, "right": (logits.argmax(-1) == batch.target)[answers].float().mean()}
    if len(batch.witness):
        every = decoder.witnesses(middle.flatten(0, 1)[batch.witness_at])
        guess = every.gather(1, batch.witness_name[:, None])[:, 0]
        weight = 3.0 - 2.0 * batch.witness  # few are away
        loss = loss + 0.3 * F.binary_cross_entropy_with_logits(guess, batch.witness, weight)
        seen["witness"] = ((guess > 0) == (batch.witness > 0)).float().mean()
    if len(batch.about):
        about = decoder.witnesses(middle.flatten(0, 1)[batch.about_at])
        loss = loss - 0.3 * about.log_softmax(-1).gather(1, batch.about).mean()
        seen["about"] = (batch.about == about.argmax(-1, keepdim=True)).any(-1).float().mean()
    if len(batch.look_at):
        looked = (pattern.flatten(0, 1)[batch.look_from] * batch.look_at).sum(-1)
        loss = loss - 0.4 * (looked + 1e-5).log().mean()
        seen["looked"] = looked.mean()
    return loss, {name: value.detach() for name, value in seen.items()}


def optimisers(decoder: Decoder) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for everything else."""
    inside = {name: p.ndim == 2 and name.startswith("layers") for name, p in decoder.named_parameters()}
    matrices = [p for name, p in decoder.named_parameters() if inside[name]]
    others = [p for name, p in decoder.named_parameters() if not inside[name]]
    return [
        torch.optim.Muon(matrices, lr=1.0, weight_decay=0.01, ns_steps=4, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=1.0, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


def made(tokenizer: Path, stage: int, seed: int) -> list[Batch]:
    """The batches of one chunk; runs in a process of its own."""
    torch.set_num_threads(1)
    if tokenizer not in _READ:
        _READ[tokenizer] = PreTrainedTokenizerFast.from_pretrained(tokenizer)
    of, read = (*STAGES, *LONG)[stage], _READ[tokenizer]
    with more_wordings():
        rows = list(Rows(read, of.width).stream(of, seed, STEPS * of.batch))
    return [
        collate(rows[i : i + of.batch], read.pad_token_id, of.width) for i in range(0, len(rows), of.batch)
    ]


_READ: dict[Path, PreTrainedTokenizerFast] = {}


class Chunks:
    """Batches, made ahead by other processes; the same ones for the same seed, however many processes."""

    def __init__(self, tokenizer: Path, seed: int, workers: int) -> None:
        self._tokenizer, self._seed, self._workers = tokenizer, seed, workers
        context = torch.multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(workers, mp_context=context)
        self._ahead: deque[tuple[int, int, Future[list[Batch]]]] = deque()

    def __call__(self, stage: int, chunk: int) -> list[Batch]:
        """The batches of a chunk; what was made ahead for another stage is thrown away."""
        while self._ahead and self._ahead[0][:2] != (stage, chunk):
            self._ahead.popleft()[2].cancel()
        for number in range(chunk + len(self._ahead), chunk + 1 + 2 * self._workers):
            task = self._pool.submit(made, self._tokenizer, stage, self._seed + 1000 + number)
            self._ahead.append((stage, number, task))
        return self._ahead.popleft()[2].result()

    def close(self) -> None:
        """Stop the processes."""
        self._pool.shutdown(cancel_futures=True)


def steps(
    decoder: Decoder, compiled: Any, optims: list[torch.optim.Optimizer], batches: list[Batch], rate: Any
) -> Iterator[dict[str, Tensor]]:
    """One update a batch, with the learning rate `rate(i)`; what to log."""
    parameters, device = list(decoder.parameters()), decoder.embed_tokens.weight.device
    for i, batch in enumerate(batches):
        for optim, base in zip(optims, (1.0, 0.5)):
            for group in optim.param_groups:
                group["lr"] = base * rate(i)
        loss, seen = loss_of(decoder, compiled, batch.to(device))
        loss.backward()
        seen["norm"] = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optim in optims:
            optim.step()
            optim.zero_grad(set_to_none=True)
        yield seen


@dataclass(frozen=True)
class Part:
    """One fall of the learning rate."""

    checkpoint: str
    until: float  # tokens, all parts together
    lr: float
    decay: float  # share of the part's tokens over which the rate falls
    stage: int = 0  # that it begins with
    after: Path | None = None  # snapshot that it begins with


def parts(args: argparse.Namespace) -> list[Part]:
    """The main part and those on long rows, from the first on whose last snapshot is not there."""
    main = Part("checkpoint.pt", args.millions * 1e6, args.lr, args.decay)
    found = [main]
    for i, stage in enumerate(() if args.main_only else LONG):
        until, lr = found[-1].until + stage.at_most * 1e6, LONG_RATE * args.lr
        last = snapshot(args.out, found[-1].until)
        found.append(Part(f"checkpoint-long-{i}.pt", until, lr, 1.0, len(STAGES) + i, last))
    return [part for part in found if not snapshot(args.out, part.until).exists()]


def snapshot(out: Path, tokens: float) -> Path:
    """Where the weights after so many tokens are."""
    return out / f"snapshot-{int(tokens) // 1_000_000:04d}.safetensors"


def train(args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast, part: Part) -> None:
    """A part of the run, from its checkpoint if there is one."""
    device = torch.device(args.device)
    torch.manual_seed(args.seed)
    decoder = Decoder(Shape(len(tokenizer), args.positions), len(ALL_NAMES)).to(device)
    optims, progress = optimisers(decoder), Progress()
    checkpoint, log_file = args.out / part.checkpoint, args.out / "log.jsonl"
    if part.after is not None:
        decoder.load_state_dict(load_file(part.after, device=args.device))
        lines = [json.loads(line) for line in log_file.read_text().splitlines()]
        entry = max((e for e in lines if e["stage"] < part.stage), key=lambda e: e["step"])
        progress = Progress(**{f.name: entry[f.name] for f in fields(Progress)})
        progress.stage, progress.stage_began = part.stage, progress.tokens
    began = (progress.step, progress.tokens)
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True, map_location=device)
        decoder.load_state_dict(saved["decoder"])
        for optim, values in zip(optims, saved["optims"]):
            optim.load_state_dict(values)
        progress = Progress(**saved["progress"])
    logged = log_file.read_text().splitlines(keepends=True) if log_file.exists() else []
    kept = [line for line in logged if json.loads(line)["step"] <= progress.step]
    log_file.write_text("".join(kept))  # what was logged after the checkpoint is done again
    compiled = torch.compile(decoder, dynamic=False)
    last_saved = time.time()
    chunks = Chunks(args.out / "tokenizer", args.seed, args.workers)

    def log(**entry: Any) -> None:
        with log_file.open("a") as file:
            file.write(json.dumps({**asdict(progress), **entry}) + "\n")

    while progress.tokens < part.until:
        begun, before, stage = time.time(), progress.tokens, (*STAGES, *LONG)[progress.stage]
        batches = chunks(progress.stage, progress.chunk)
        waited = time.time() - begun

        def rate(i: int) -> float:
            left = max(0.0, (part.until - before) / (part.until - began[1]))  # noqa: B023 (this round only)
            falling = left / part.decay if left < part.decay else 1.0
            return part.lr * min(1.0, (progress.step + i + 1 - began[0]) / 50) * falling

        all_seen = list(steps(decoder, compiled, optims, batches, rate))
        means = {
            name: float(torch.stack([seen[name] for seen in all_seen if name in seen]).mean())
            for name in sorted({name for seen in all_seen for name in seen})
        }
        if not math.isfinite(means.pop("norm")):
            raise SystemExit(
                f"a gradient is not finite before step {progress.step + len(batches)}; run again from "
                f"{checkpoint} with a lower --lr than {args.lr}"
            )
        progress.step += len(batches)
        progress.tokens += sum(batch.tokens.numel() for batch in batches)
        progress.chunk += 1
        progress.seconds += time.time() - begun
        done = progress.tokens >= part.until
        log(waited=round(waited, 2), **{name: round(value, 4) for name, value in means.items()})
        ends = means["right"] >= stage.enough or progress.tokens - progress.stage_began > stage.at_most * 1e6
        if ends and part.after is None:  # a part on long rows has one stage
            progress.stage, progress.stage_began = progress.stage + 1, progress.tokens
        if done or progress.tokens // PROBE > before // PROBE:
            log(probe=probe(to_hugging_face(decoder, tokenizer).to(device), tokenizer))
        if done or progress.tokens // SNAPSHOT > before // SNAPSHOT:
            half = {name: p.half().cpu() for name, p in decoder.state_dict().items()}
            save_file(half, snapshot(args.out, progress.tokens))
        if done or time.time() - last_saved > SAVE:
            last_saved, partial = time.time(), checkpoint.with_suffix(".tmp")
            states = [optim.state_dict() for optim in optims]
            torch.save(
                {"decoder": decoder.state_dict(), "optims": states, "progress": asdict(progress)}, partial
            )
            partial.replace(checkpoint)
    chunks.close()


def run(args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> None:
    """All parts that are not finished."""
    for part in parts(args):
        train(args, tokenizer, part)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--positions", choices=POSITIONS, default="rotary", help="the model, or a twin")
    parser.add_argument("--millions", type=float, default=140.0, help="tokens to train on, in millions")
    parser.add_argument("--decay", type=float, default=0.25, help="share of the budget over which lr falls")
    parser.add_argument("--main-only", action="store_true", help="leave out the parts on long rows")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--workers", type=int, default=max(1, (os.cpu_count() or 1) - 1), help="processes that make rows"
    )
    args = parser.parse_args()
    if not (args.out / "tokenizer").exists():
        args.out.mkdir(parents=True, exist_ok=True)
        with more_wordings():
            build(9216, args.out / "tokenizer")
    run(args, PreTrainedTokenizerFast.from_pretrained(args.out / "tokenizer"))


if __name__ == "__main__":
    main()
