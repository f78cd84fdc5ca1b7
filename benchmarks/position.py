"""What position measures cost beside plain forward passes over the same samples, in one run.

Compared with (1) the forward passes alone and (2) `run_with_cache`, which keeps every activation of every
sample before anything is measured on them. Repetitions are interleaved and the fastest of each counts.
Memory is the peak beyond what is held before, each way on its own (on a CPU in a process of its own), for n
samples and for four times as many.

    python benchmarks/position.py                    # a random Llama-like model of 5 million weights
    python benchmarks/position.py --longest 400      # longer rows
    python benchmarks/position.py --model DIRECTORY --backend hooked --device cuda
"""

from __future__ import annotations

import os
import resource
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import torch
import typer
from fisher import fastest, random_model, random_samples
from transformers.utils import logging

import tl_tomsparse as tt
from tl_tomsparse._model import view
from tl_tomsparse._position_changes import measure_position
from tl_tomsparse._stream import Current, stream
from tl_tomsparse.models import Backend, load_model
from tl_tomsparse.samples import Samples

QUIET: dict[str, Any] = {"show_progress": False}


def forward(model: Any, samples: Samples, batch_tokens: int) -> None:
    """The same batches, with nothing measured."""
    stream(
        view(model), samples, [], Current(), description="", batch_tokens=batch_tokens, show_progress=False
    )


@torch.no_grad()
def cached(model: Any, samples: Samples, batch_tokens: int) -> list[Any]:
    """Every activation of every sample, as one would have them before looking at any."""
    kept = []
    device = view(model).device
    for rows in samples.batches(batch_tokens):
        batch = samples[rows]
        mask = batch.attention_mask.long().to(device)
        kept.append(model.run_with_cache(batch.tokens.to(device), attention_mask=mask)[1])
    return kept


def ways(model: Any, samples: Samples, batch_tokens: int) -> dict[str, Callable[[], Any]]:
    """By name; the first one is what the others are compared with."""
    options = QUIET | {"batch_tokens": batch_tokens}
    first = torch.zeros(len(samples), dtype=torch.long)
    return {
        "forward": partial(forward, model, samples, batch_tokens),
        "frequency_norms": partial(tt.frequency_norms, model, samples, **options),
        "bos_angles": partial(tt.bos_angles, model, samples, **options),
        "sink_attention": partial(tt.sink_attention, model, samples, **options),
        "all three in one pass": partial(measure_position, view(model), samples, first, batch_tokens),
        "run_with_cache": partial(cached, model, samples, batch_tokens),
    }


def peak(way: Callable[[], Any], device: str) -> float:
    """MiB at the most, beyond what was held before."""
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        way()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        held = resource_now()
        way()
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - held
        os.write(write, str(grown).encode())
        os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    with os.fdopen(read) as answer:
        return float(answer.read())


def resource_now() -> float:
    """MiB resident in this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def main(
    model: Annotated[Path | None, typer.Option(help="A model directory; by default a random model.")] = None,
    backend: Annotated[str, typer.Option(help="bridge or hooked.")] = "bridge",
    device: Annotated[str, typer.Option()] = "cpu",
    n: Annotated[int, typer.Option(help="Samples.")] = 64,
    longest: Annotated[int, typer.Option(help="Tokens of the longest; the shortest has half as many.")] = 140,
    batch_tokens: Annotated[int, typer.Option(help="In a batch, for every way.")] = 1024,
    repeat: Annotated[int, typer.Option(help="Runs of each; the fastest counts.")] = 5,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
) -> None:
    """Times each way as a ratio to the forward passes, and its peak memory."""
    logging.disable_progress_bar()
    torch.set_num_threads(threads)
    kind: Backend = "hooked" if backend == "hooked" else "bridge"
    loaded = load_model(model, backend=kind, device=device) if model else random_model(2048, kind, device)
    seen = view(loaded)
    few, many = (
        random_samples(count, longest // 2, longest, seen.d_vocab, last_only=True) for count in (n, 4 * n)
    )
    assert seen.rotations[0]  # found once, before anything is measured
    forward(loaded, few, batch_tokens)
    memory = {
        count: {name: peak(way, device) for name, way in ways(loaded, samples, batch_tokens).items()}
        for count, samples in ((n, few), (4 * n, many))
    }
    times = fastest(ways(loaded, few, batch_tokens), repeat, device)
    rows = [
        {
            "way": name,
            "seconds": round(seconds, 3),
            "to forward": round(seconds / times["forward"], 2),
            **{f"peak MiB, {count} samples": round(memory[count][name], 1) for count in memory},
        }
        for name, seconds in times.items()
    ]
    typer.echo(pd.DataFrame(rows).to_string(index=False))


if __name__ == "__main__":
    typer.run(main)
