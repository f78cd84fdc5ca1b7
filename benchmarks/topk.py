"""What choosing the largest entries costs, in read passes and bytes, beside torch's ways, all in one run.

    python benchmarks/topk.py [entries in millions]

A read pass is the time of summing the tensor. Each number is the median over rounds in which every way has
its turn. Peak memory is measured on a GPU where there is one (torch does not measure it on a CPU).
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import torch

from tl_tomsparse._select import bad_value, largest

ROUNDS = 5


def seconds(way: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    way()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    millions = int(sys.argv[1]) if len(sys.argv) > 1 else 16
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    flat = torch.rand(millions * 2**20, device=device) ** 8
    print(f"{flat.numel():,} entries on {device}, {torch.get_num_threads()} threads")
    for kappa in (1e-5, 5e-5, 1e-3, 1e-2):
        k = round(kappa * flat.numel())

        def ours(k: int = k) -> torch.Tensor:
            bad_value(flat)
            return largest([flat], k)[1]

        def topk(k: int = k) -> torch.Tensor:
            return flat.topk(k).indices

        def sort(k: int = k) -> torch.Tensor:
            return flat.sort(descending=True, stable=True).indices[:k]

        ways = {
            "read pass": flat.sum,
            "ours (with check for NaN)": ours,
            "torch.topk": topk,
            "stable sort": sort,
        }
        taken: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(ROUNDS):
            for name, way in ways.items():
                taken[name].append(seconds(way, device))
        base = statistics.median(taken["read pass"])
        print(f"kappa {kappa:g}: {k} entries; equal to the sort: {torch.equal(ours(), sort().cpu())}")
        for name, times in taken.items():
            print(f"    {name:28s}{statistics.median(times) / base:9.2f} read passes{peak(ways[name], flat)}")


def peak(way: Callable[[], object], flat: torch.Tensor) -> str:
    if flat.device.type != "cuda":
        return ""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    way()
    return f", {(torch.cuda.max_memory_allocated() - before) / flat.numel():.2f} bytes an entry"


if __name__ == "__main__":
    main()
