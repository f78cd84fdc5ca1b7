"""Head knock-outs: measurements a second as ratios, and recovery against the number of measurements.

    python benchmarks/heads.py speed [--layers 16] [--heads 16] [--d-model 256] [--device cpu] [--out 1 2 5]
    python benchmarks/heads.py recovery [--repeats 10]

`speed`: the model is random and Llama-like. Every way measures the same knock-outs on the same prompts, and
all give the same scores. "reload" restores all weights from memory and writes zeros into O for each
measurement, "hooks" runs one measurement at a time with hooks at hook_z; both on rows padded on the right.
Numbers are medians over rounds in which every way has its turn; on a CPU they are of CPU time, which a busy
machine changes little.

`recovery`: 256 heads of which 5 matter, noise and a mild interaction; how often a solver puts these 5 first.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.tiny import build_tokenizer, story
from tl_tomsparse._head_solvers import Solver
from tl_tomsparse._model import view
from tl_tomsparse._prepared import prepare_scoring
from tl_tomsparse.heads import KnockoutMeter, knockout_design
from tl_tomsparse.models import load_model

SOLVERS = {
    "Lasso, CV": Solver(),
    "Lasso, BIC": Solver("lasso", "bic"),
    "Lasso, alpha 0.01": Solver("lasso", 0.01, refit=False),
    "OMP": Solver("omp"),
    "IHT": Solver("iht"),
}


def make_model(layers: int, heads: int, d_model: int, device: str) -> Any:
    tokenizer = build_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=d_model,
        intermediate_size=8 * d_model // 3 // 8 * 8,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=512,
        architectures=["LlamaForCausalLM"],
    )
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return load_model(Path(folder), device=device)


def by_reload(model: Any, reads: Any, out: np.ndarray) -> np.ndarray:
    seen = view(model)
    live = seen.parameters()
    saved = [value.clone() for value in live]
    totals = []
    for row in out:
        for to, value in zip(live, saved):
            to.copy_(value)
        for (layer, head), gone in zip(seen.heads, row):
            if gone:
                seen.weight((layer, "O"))[head] = 0.0
        totals.append(reads.totals(model, description="", show_progress=False))
    for to, value in zip(live, saved):
        to.copy_(value)
    return np.stack(totals)


def by_hooks(model: Any, reads: Any, out: np.ndarray) -> np.ndarray:
    def remove(z: torch.Tensor, hook: Any, heads: list[int]) -> torch.Tensor:
        z = z.clone()
        z[:, :, heads] = 0.0
        return z

    totals = []
    for row in out:
        gone = [head for head, is_out in zip(view(model).heads, row) if is_out]
        hooks = [
            (f"blocks.{layer}.attn.hook_z", partial(remove, heads=[h for x, h in gone if x == layer]))
            for layer in sorted({layer for layer, _ in gone})
        ]
        with model.hooks(fwd_hooks=hooks):
            totals.append(reads.totals(model, description="", show_progress=False))
    return np.stack(totals)


def by_meter(model: Any, stories: list[Any], out: np.ndarray, **options: Any) -> Callable[[], np.ndarray]:
    meter = KnockoutMeter(model, stories, show_progress=False, **options)
    meter(out[:1])  # the trial, once a model

    def measure() -> np.ndarray:
        meter._known.totals.clear()
        meter(out)
        return np.stack(meter._known.measured(out))

    return measure


@torch.no_grad()
def speed(options: argparse.Namespace) -> None:
    model = make_model(options.layers, options.heads, options.d_model, options.device)
    stories = [story(index) for index in range(options.stories)]
    plain = prepare_scoring(model, stories).reads
    packed = prepare_scoring(model, stories, pack=True).reads
    print(
        f"{options.layers} layers x {options.heads} heads, d_model {options.d_model}, {options.device}, "
        f"{torch.get_num_threads()} threads; {plain.n_totals} options, {plain.n_tokens} tokens a "
        f"measurement, and {packed.n_tokens} where prompts of a story share its tokens"
    )
    for n_out in options.out:
        share = n_out / (options.layers * options.heads)
        out = knockout_design(view(model).heads, options.measurements, share=share).out
        ways = {
            "reload": partial(by_reload, model, plain, out),
            "hooks": partial(by_hooks, model, plain, out),
            "hooks, prompts packed": partial(by_hooks, model, packed, out),
            "batched, all layers": by_meter(model, stories, out, share_prefix=False),
            "batched, shared prefix": by_meter(model, stories, out),
        }
        clock = time.process_time if options.device == "cpu" else time.perf_counter
        taken: dict[str, list[float]] = {name: [] for name in ways}
        found: dict[str, np.ndarray] = {}
        for round_ in range(options.rounds + 1):
            for name, way in ways.items():
                start = clock()
                found[name] = way()
                if round_:
                    taken[name].append(clock() - start)
        base = statistics.median(taken["hooks"])
        apart = max(float(np.abs(value - found["hooks"]).max()) for value in found.values())
        print(f"{n_out} heads out, {len(out)} measurements; log-probabilities agree to {apart:.1e}")
        for name, times in taken.items():
            median = statistics.median(times)
            print(f"    {name:26s}{base / median:7.2f} x hooks{len(out) / median:9.1f} a second")


def recovery(options: argparse.Namespace) -> None:
    heads = [(layer, head) for layer in range(16) for head in range(16)]
    print("share of cases in which the five heads that matter come first")
    for kind in ("balanced", "stratified", "bernoulli"):
        for share in (0.02, 0.06, 0.2):
            print(f"{kind}, {100 * share:g} % out")
            print(f"    {'measurements':20s}" + "".join(f"{n:>7d}" for n in options.numbers))
            hits = {name: [0] * len(options.numbers) for name in (*SOLVERS, "correlation")}
            for repeat in range(options.repeats):
                rng = np.random.default_rng(repeat)
                needed = rng.choice(len(heads), 5, replace=False)
                effects = rng.uniform(0.5, 1.5, 5)
                for place, n in enumerate(options.numbers):
                    out = knockout_design(heads, n, share=share, kind=kind, seed=repeat).out
                    scores = -(out[:, needed].astype(float) @ effects) + 0.1 * rng.standard_normal(n)
                    scores += 0.3 * (out[:, needed[0]] & out[:, needed[1]])
                    marginal = (out - out.mean(0)).T @ (scores - scores.mean())
                    found = {name: solver.effects(out, scores, 0) for name, solver in SOLVERS.items()}
                    for name, values in {**found, "correlation": marginal}.items():
                        hits[name][place] += set(np.argsort(values)[:5]) == set(needed)
            for name, counts in hits.items():
                print(f"    {name:20s}" + "".join(f"{count / options.repeats:7.2f}" for count in counts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=["speed", "recovery"])
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--d-model", type=int, default=256)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=int, nargs="+", default=[1, 2, 5], help="heads out a measurement")
    parser.add_argument("--stories", type=int, default=4)
    parser.add_argument("--measurements", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--numbers", type=int, nargs="+", default=[50, 75, 100, 150, 200])
    options = parser.parse_args()
    speed(options) if options.what == "speed" else recovery(options)


if __name__ == "__main__":
    main()
