"""How fast `fisher_diagonal` is, as ratios to the obvious ways, measured in one run on the same samples.

Compared with (1) one plain batched forward and backward pass that only gives the gradient of the batch, for
the same weights, and (2) the loop that computes each sample's gradient and squares it. Repetitions are
interleaved and the fastest of each counts, so that other load on the machine disturbs the ratios little.

    python benchmarks/fisher.py                      # a random Llama-like model of 5 million weights
    python benchmarks/fisher.py --vocab 49152        # with the vocabulary of a real small model
    python benchmarks/fisher.py --model DIRECTORY --backend hooked --device cuda
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import torch
import typer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from tl_tomsparse._model import view
from tl_tomsparse.models import Backend, load_model
from tl_tomsparse.samples import Samples
from tl_tomsparse.sensitivity import fisher_diagonal

BATCH_TOKENS = {"cpu": 800}


def random_model(vocab: int, backend: Backend, device: str) -> Any:
    """Six layers, width 256, 8 query and 4 key-value heads: about the size of the embedded model."""
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=512,
        architectures=["LlamaForCausalLM"],
    )
    torch.manual_seed(0)
    words = Tokenizer(WordLevel({"<unk>": 0, "<bos>": 1, "<pad>": 2}, unk_token="<unk>"))
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(config).save_pretrained(folder)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<bos>", pad_token="<pad>")
        tokenizer.save_pretrained(folder)
        return load_model(folder, backend=backend, device=device)


def random_samples(n: int, shortest: int, longest: int, vocab: int, *, last_only: bool) -> Samples:
    """Rows of random tokens; supervised at the last one (an answer) or everywhere (a window)."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(shortest, longest + 1, (n,), generator=generator).tolist()
    rows = [torch.randint(3, vocab, (length,), generator=generator).tolist() for length in lengths]
    starts = [length - 1 if last_only else 1 for length in lengths]
    return Samples.from_rows(rows, starts, [str(i) for i in range(n)], bos=False, supervise="answer", pad=0)


def loss_of(model: Any, batch: Samples) -> Tensor:
    """What one writes without this package: all logits, then the mean of each row, then the sum."""
    device = view(model).device
    tokens = batch.tokens.to(device)
    logits = model(tokens, attention_mask=batch.attention_mask.long().to(device), return_type="logits")
    nll = -logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    where = batch.supervised[:, 1:].to(device)
    return ((nll * where).sum(1) / where.sum(1)).sum()


def gradients(
    model: Any, samples: Samples, matrices: tuple[str, ...], batch_tokens: int, *, square: bool
) -> list[Tensor]:
    """Gradients of batches, or with `square` the sum of the squares of each row's gradient."""
    model_view = view(model)
    wanted = [model_view._weights.parameter(key) for key in model_view.keys(matrices)]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in wanted:
        parameter.requires_grad_(True)
    sums = [torch.zeros_like(parameter) for parameter in wanted]
    for rows in samples.batches(1 if square else batch_tokens):
        found = torch.autograd.grad(loss_of(model, samples[rows]), wanted)
        for total, gradient in zip(sums, found):
            if square:
                total.addcmul_(gradient, gradient)
            else:
                total.add_(gradient)
    return sums


def fastest(work: dict[str, Callable[[], object]], repeat: int, device: str) -> dict[str, float]:
    """Seconds of the fastest of `repeat` runs of each, interleaved: CPU seconds, on a GPU elapsed ones."""
    times = dict.fromkeys(work, float("inf"))
    clock = time.perf_counter if device.startswith("cuda") else time.process_time
    for _ in range(repeat):
        for name, run in work.items():
            start = clock()
            run()
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            times[name] = min(times[name], clock() - start)
    return times


def main(
    model: Annotated[Path | None, typer.Option(help="A model directory; by default a random model.")] = None,
    backend: Annotated[str, typer.Option(help="bridge or hooked.")] = "bridge",
    device: Annotated[str, typer.Option()] = "cpu",
    vocab: Annotated[int, typer.Option(help="Vocabulary of the random model.")] = 2048,
    n: Annotated[int, typer.Option(help="Samples of each kind.")] = 48,
    repeat: Annotated[int, typer.Option(help="Runs of each; the fastest counts.")] = 3,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
) -> None:
    """Times the three ways on prompts and on text windows, for Q and K and for all matrices."""
    logging.disable_progress_bar()
    torch.set_num_threads(threads)
    kind: Backend = "hooked" if backend == "hooked" else "bridge"
    loaded = load_model(model, backend=kind, device=device) if model else random_model(vocab, kind, device)
    model_view = view(loaded)
    size = model_view.d_vocab
    budget = BATCH_TOKENS.get(device, 16384)
    work = {
        "prompts, last token": random_samples(n, 50, 90, size, last_only=True),
        "text windows": random_samples(n, 128, 128, size, last_only=False),
    }
    rows = []
    for what, samples in work.items():
        for matrices in (("Q", "K"), model_view.matrices):
            times = fastest(
                {
                    "fisher_diagonal": partial(
                        fisher_diagonal, loaded, samples, matrices=matrices, show_progress=False
                    ),
                    "batch gradient": partial(gradients, loaded, samples, matrices, budget, square=False),
                    "per-sample loop": partial(gradients, loaded, samples, matrices, budget, square=True),
                },
                repeat,
                device,
            )
            seconds = times["fisher_diagonal"]
            rows.append(
                {
                    "samples": what,
                    "matrices": " ".join(matrices),
                    "seconds": round(seconds, 3),
                    "to batch gradient": round(seconds / times["batch gradient"], 2),
                    "loop is slower by": round(times["per-sample loop"] / seconds, 2),
                }
            )
    typer.echo(pd.DataFrame(rows).to_string(index=False))


if __name__ == "__main__":
    typer.run(main)
