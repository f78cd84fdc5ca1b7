"""Tiny random models of every architecture family, and where `transformers` keeps their matrices: what the
oracles of `test_families.py` and the README's table are made from (`python tests/families.py` writes it).

Where a matrix lies is written down here once more, by hand, from the modelling code of `transformers`; the
package itself finds it without knowing the architecture.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny
import torch
import transformers
from families_first import FIRST, REFUSED
from families_more import MORE
from family import D_HEAD, HEADS, LAYERS, Family, Place
from torch import Tensor
from transformers import AutoModelForCausalLM

FAMILIES: dict[str, Family] = FIRST | MORE | REFUSED


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
    elif place.layout.startswith("by head"):
        order = "qvk" if place.layout.endswith("q v k") else "qkv"
        weight = weight.unflatten(0, (HEADS, 3, D_HEAD))[:, order.index(place.part)]
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
        cells = ["yes" if mark else "refused" for mark in marks]
        if family.hooked_without:
            cells[2] += f", without {' and '.join(family.hooked_without)}: norms follow them"
        if family.hooked_refused is not None:
            cells[2] += f": {WHY[name]}"
        lines.append(f"| {name} | {offered} | {family.positions} | {' | '.join(cells)} |")
    return "\n".join(lines)


WHY = {
    "DeepSeek-V3": "multi-head latent attention has no single Q and K matrix",
    "Falcon 40B's form": "TransformerLens does not split its fused weight",
    "JetMoE": "experts instead of the matrices of attention",
    "HRM": "two stacks of layers, run in turns",
    "Nemotron-H": "TransformerLens shows its attention layers under no name of their own",
    "GPT": "TransformerLens computes other logits under an attention mask",
    "Mamba": "no attention",
    "Phi": "TransformerLens reads `partial_rotary_factor`, which transformers 5 keeps elsewhere",
    "T5": "encoder-decoder",
}


def main() -> None:
    """Write the table into the README."""
    readme = Path(__file__).parents[1] / "README.md"
    before, rest = readme.read_text().split(BEGIN)
    readme.write_text(f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
