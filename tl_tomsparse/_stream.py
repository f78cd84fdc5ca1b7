"""Samples through a model under hooks, batch by batch, with nothing kept but what the hooks keep."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch
from torch import Tensor
from tqdm.auto import tqdm

from tl_tomsparse._model import Hook, ModelView
from tl_tomsparse.samples import Samples

_BATCH_TOKENS = 1024
T = TypeVar("T")


@dataclass
class Current:
    """The batch that the hooks are called for.

    Attributes:
        rows: `[batch]`, which samples it has.
        mask: `[batch, pos]`, True at real tokens, on the model's device.
    """

    rows: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    mask: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))


@dataclass(frozen=True)
class Measure(Generic[T]):
    """Something measured while samples pass: its hooks, and what they found once all have passed."""

    hooks: Sequence[Hook]
    result: Callable[[], T]


def stream(
    seen: ModelView,
    samples: Samples,
    hooks: Sequence[Hook],
    current: Current,
    *,
    description: str,
    batch_tokens: int | None,
    show_progress: bool,
) -> None:
    """All samples forward, longest first, without gradients; `current` says which batch it is."""
    with (
        torch.no_grad(),
        seen.hooks(hooks),
        tqdm(total=len(samples), desc=description, disable=not show_progress) as bar,
    ):
        for current.rows in samples.batches(_BATCH_TOKENS if batch_tokens is None else batch_tokens):
            batch = samples[current.rows]
            current.mask = batch.attention_mask.to(seen.device)
            seen.logits(batch.tokens, batch.attention_mask)
            bar.update(len(batch))
