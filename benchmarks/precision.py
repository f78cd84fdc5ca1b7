"""What a model's precision does to its most sensitive weights, against the sensitivities in float64.

Two questions, on story prompts of a real trained model: do the top kappa of each matrix stay the same when
the model runs in float32, bfloat16 or float16 (gradients are always squared and summed in float32 or better),
and what if squares were taken in float16?

    python benchmarks/precision.py                              # the embedded model
    python benchmarks/precision.py --model DIRECTORY --stories 20
"""

from __future__ import annotations

from typing import Annotated, Any

import pandas as pd
import torch
import typer
from torch import Tensor
from transformers.utils import logging

import tl_tomsparse as tt
from tl_tomsparse._model import Key, view
from tl_tomsparse.samples import Samples

KAPPAS = (1e-5, 1e-4, 1e-3, 1e-2)


def kept(found: dict[Key, Tensor], reference: dict[Key, Tensor], kappa: float) -> float:
    """The share of the reference's top kappa, matrix by matrix, that is in the other's top kappa."""
    common = total = 0
    for key, values in reference.items():
        k = max(1, round(kappa * values.numel()))
        best, other = (set(v.flatten().double().topk(k).indices.tolist()) for v in (values, found[key]))
        common, total = common + len(best & other), total + k
    return common / total


def squares_in_float16(model: Any, samples: Samples, keys: list[Key]) -> dict[Key, Tensor]:
    """The Fisher as a training loop in float16 would sum it: gradients squared and added in float16."""
    seen = view(model)
    total: dict[Key, Tensor] = {}
    for n in range(len(samples)):
        length = int(samples.attention_mask[n].sum())
        tokens, where = samples.tokens[n : n + 1, :length], samples.supervised[n, 1:length]

        def loss(tokens: Tensor = tokens, where: Tensor = where) -> Tensor:
            log_probs = seen.logits(tokens, torch.ones_like(tokens, dtype=torch.bool))[0].log_softmax(-1)
            return -log_probs[:-1].gather(-1, tokens[0, 1:, None])[where, 0].mean()

        for key, grad in zip(keys, seen.gradients(keys, loss)):
            square = grad.half() ** 2
            total[key] = total[key] + square if key in total else square
    return {key: value / len(samples) for key, value in total.items()}


def main(
    model: Annotated[
        str | None, typer.Option(help="directory or hub name; the embedded model by default")
    ] = None,
    stories: Annotated[int, typer.Option(help="whose false-belief questions are the prompts")] = 60,
    threads: Annotated[int, typer.Option()] = 1,
) -> None:
    """Print the table."""
    torch.set_num_threads(threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    rows: list[dict[str, Any]] = []
    reference: dict[Key, Tensor] = {}
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        subject = tt.load_model(model, device="cpu", dtype=dtype)
        samples = tt.story_samples(
            subject, tt.generate_stories(stories, seed=0, split="dev"), categories=("false_belief",)
        )
        found = dict(tt.fisher_diagonal(subject, samples, show_progress=False).items())
        reference = reference or found
        rows.append(row(str(dtype).removeprefix("torch."), found, reference))
        if dtype == torch.float32:
            naive = squares_in_float16(subject, samples, list(found))
            rows.append(row("float32, squares in float16", naive, reference))
            largest = max(float(value.sqrt().max()) for value in found.values())
            print(f"{len(samples)} prompts; the largest root mean square gradient is {largest:.3g}")
    print(pd.DataFrame(rows).to_string(index=False))


def row(name: str, found: dict[Key, Tensor], reference: dict[Key, Tensor]) -> dict[str, Any]:
    """One line of the table."""
    zero = sum(int((value == 0).sum()) for value in found.values()) / sum(v.numel() for v in found.values())
    return (
        {"computed in": name}
        | {f"top {kappa:g} kept": f"{kept(found, reference, kappa):.3f}" for kappa in KAPPAS}
        | {"exactly zero": f"{zero:.3f}"}
    )


if __name__ == "__main__":
    typer.run(main)
