"""What an edit costs, as ratios of one forward pass and of the obvious ways, all in one run.

    python benchmarks/edit.py

The model is random, Llama-like, 6 layers, d_model 512; the mask has 1e-4 of each matrix. Each number is the
median over rounds in which every way has its turn, so that a busy machine slows all of them alike.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.tiny import build_tokenizer
from tl_tomsparse._model import ModelView, view
from tl_tomsparse.edit import SparseEdit
from tl_tomsparse.mask import SparseMask

ROUNDS = 15


def make_model() -> Any:
    tokenizer = build_tokenizer()
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=512,
        architectures=["LlamaForCausalLM"],
    )
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return TransformerBridge.boot_transformers(folder, device="cpu", dtype=torch.float32).eval()


def a_mask(model: Any, seen: ModelView, matrices: tuple[str, ...]) -> SparseMask:
    generator = torch.Generator().manual_seed(0)
    keys = seen.keys(matrices)
    return SparseMask.from_bool(
        model, {k: torch.rand(seen.shape(k), generator=generator) < 1e-4 for k in keys}
    )


def dense_hooks(seen: ModelView, edit: SparseEdit) -> list[Any]:
    """The obvious hooks: x times a matrix of changes that is zero nearly everywhere."""
    inputs: dict[Any, torch.Tensor] = {}
    hooks = seen.input_hooks(edit.before, lambda keys, x: inputs.update(dict.fromkeys(keys, x)))
    for key, index in edit.mask.entries.items():
        change = torch.zeros(edit.mask.to_bool(key).numel())
        change[index] = edit.after[key] - edit.before[key]
        change = change.view(edit.mask.shapes[key])

        def add(y: torch.Tensor, hook: Any, key: Any = key, change: torch.Tensor = change) -> torch.Tensor:
            equation = "bpm,hmd->bphd" if change.ndim == 3 and key[1] != "O" else "bpm,mk->bpk"
            x = inputs[key].flatten(2)
            return y + torch.einsum(equation, x, change.flatten(0, 1) if key[1] == "O" else change)

        hooks.append((seen.output_hook(key), add))
    return hooks


def medians(ways: dict[str, Callable[[], Any]]) -> dict[str, float]:
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(ROUNDS + 2):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if round_ >= 2:
                taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in taken.items()}


def on_and_off(edit: SparseEdit, model: Any) -> None:
    with edit.applied(model):
        pass


def reload(live: list[torch.Tensor], saved: list[torch.Tensor]) -> None:
    for to, value in zip(live, saved):
        to.copy_(value)


@torch.no_grad()
def main() -> None:
    model = make_model()
    seen = view(model)
    saved = [value.clone() for value in seen.parameters()]
    live = [value.clone() for value in saved]  # not the model's own: that would change what edits check
    for matrices in (("Q", "K"), ("Q", "K", "V", "O", "gate", "in", "out")):
        mask = a_mask(model, seen, matrices)
        edit = SparseEdit.mean(model, mask)
        sparse, dense = edit.hooks(model), dense_hooks(seen, edit)
        print(edit)
        for batch, pos in ((1, 32), (8, 64)):
            tokens = torch.randint(3, 8000, (batch, pos))
            taken = medians(
                {
                    "edit on and off": partial(on_and_off, edit, model),
                    "reload of the weights": partial(reload, live, saved),
                    "forward with the edit's hooks": partial(model.run_with_hooks, tokens, fwd_hooks=sparse),
                    "forward with dense hooks": partial(model.run_with_hooks, tokens, fwd_hooks=dense),
                    "forward": partial(model.run_with_hooks, tokens),
                }
            )
            base = taken["forward"]
            print(f"  {batch} x {pos} tokens: forward {1000 * base:.1f} ms")
            for name, value in taken.items():
                print(f"    {name:32s}{value / base:9.4f} x forward")


if __name__ == "__main__":
    main()
