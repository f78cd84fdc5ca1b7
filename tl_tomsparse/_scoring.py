"""Stories and texts as batches of tokens, made once and scored as often as a sweep needs.

    option score   s(o) = sum_i log P(o_i | prompt, o_1..o_{i-1})
    sample loss    NLL_n = - sum_{supervised p} log P(token_p | tokens before p)

The row of an option is the prompt and all of its tokens but the last, since only these are read from. So
options of one token share the prompt's row, equal rows are computed once, and a row that begins another row
is read from the longer one (attention is causal, rows are padded on the right). Batches hold rows of
similar length under a budget of tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_tomsparse._checks import check_positive
from tl_tomsparse._model import ModelView, view


@dataclass(frozen=True, eq=False)
class _Batch:
    """Right-padded rows; `where` are the positions read from, `slot` counts these row by row."""

    tokens: Int[Tensor, "batch pos"]
    attention_mask: Bool[Tensor, "batch pos"]
    where: Bool[Tensor, "batch pos"]
    slot: Int[Tensor, " reads"]
    token: Int[Tensor, " reads"]
    total: Int[Tensor, " reads"]


@dataclass(frozen=True, eq=False)
class Reads:
    """Rows of tokens with the log-probabilities to read from them, summed into totals.

    Attributes:
        batches: rows of similar length.
        n_totals: how many sums there are.
        n_tokens: tokens of all rows, without padding: the cost of one pass.
        digest: of all tokens, places and totals, on any device: equal digests mean equal numbers from equal
            weights.
    """

    batches: tuple[_Batch, ...] = field(repr=False)
    n_totals: int
    n_tokens: int
    digest: str

    def totals(self, model: Any, *, description: str, show_progress: bool) -> Float[np.ndarray, " totals"]:
        """Each sum of log-probabilities in nats, float64."""
        model_view = view(model)
        model_view.require_eval()
        totals = torch.zeros(self.n_totals, dtype=torch.float64, device=model_view.device)
        with torch.inference_mode():
            for batch in tqdm(self.batches, desc=description, disable=not show_progress, leave=False):
                with model_view.only_positions(batch.where):
                    logits = model_view.logits(batch.tokens, batch.attention_mask).flatten(0, 1)
                if len(logits) == batch.where.numel():  # every position came: nothing could be left out
                    logits = logits[batch.where.flatten()]
                logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
                read = logits[batch.slot, batch.token] - logits.logsumexp(-1)[batch.slot]
                totals.index_add_(0, batch.total, read.double())
        return totals.cpu().numpy()


def collect_reads(
    wanted: Sequence[tuple[Sequence[int], Sequence[tuple[int, int]]]],
    *,
    device: torch.device,
    pad: int,
    batch_tokens: int,
) -> Reads:
    """Batches for sums of log-probabilities.

    Args:
        wanted: for each sum, the tokens of a row and the (position, token) pairs: the log-probability of
            `token` as the successor of `position` is added.
        device: where the batches are kept.
        pad: token that fills rows up; never attended to or read from.
        batch_tokens: most tokens a batch, padding included (a single longer row is a batch of its own).
    """
    check_positive("batch_tokens", batch_tokens)
    rows = sorted({tuple(row) for row, _ in wanted})
    # In sorted order a row that begins others is directly followed by one of them.
    kept: list[tuple[int, ...]] = []
    home: dict[tuple[int, ...], int] = {}
    for row in reversed(rows):
        if not kept or kept[-1][: len(row)] != row:
            kept.append(row)
        home[row] = len(kept) - 1
    order = sorted(range(len(kept)), key=lambda index: (len(kept[index]), kept[index]))
    groups: list[list[int]] = []
    for index in order:
        if not groups or len(kept[index]) * (len(groups[-1]) + 1) > batch_tokens:
            groups.append([])
        groups[-1].append(index)
    reads: dict[int, list[tuple[int, int, int]]] = {index: [] for index in order}
    for total, (tokens_of, places) in enumerate(wanted):
        reads[home[tuple(tokens_of)]].extend((position, token, total) for position, token in places)
    digest = hashlib.blake2b(digest_size=16)
    batches: list[_Batch] = []
    for group in groups:
        tokens = torch.full((len(group), max(len(kept[index]) for index in group)), pad, dtype=torch.long)
        attention_mask = torch.zeros_like(tokens, dtype=torch.bool)
        where = torch.zeros_like(attention_mask)
        found: list[tuple[int, int, int, int]] = []
        for place, index in enumerate(group):
            row = kept[index]
            tokens[place, : len(row)] = torch.tensor(row)
            attention_mask[place, : len(row)] = True
            found += [(place, *read) for read in reads[index]]
            digest.update(repr((row, reads[index])).encode())
        columns = torch.tensor(found, dtype=torch.long).reshape(-1, 4).T.contiguous()
        place_of, position_of, token_of, total_of = columns
        where[place_of, position_of] = True
        slot = (where.flatten().cumsum(0) - 1).view_as(tokens)[place_of, position_of]
        tensors = (tokens, attention_mask, where, slot, token_of, total_of)
        batches.append(_Batch(*(tensor.to(device) for tensor in tensors)))
    return Reads(tuple(batches), len(wanted), sum(map(len, kept)), digest.hexdigest())


def default_batch_tokens(model_view: ModelView) -> int:
    """Tokens a batch by device: on a CPU larger batches fall out of its cache, on a GPU logits bound them."""
    if model_view.device.type == "cpu":
        return 2048
    return max(1024, min(32768, 2**29 // model_view.d_vocab))
