"""Log-probabilities of prompts under many knock-outs: each row of a batch has its own heads out.

    z[layer, row, pos, head]  <-  replacement     where the row's measurement has the head out

Rows are prompts times measurements. Measurements are in the order of the first layer that loses a head, so
that those of one batch have most layers below it in common; these are computed once a prompt. A model that
cannot begin in the middle computes all layers in each row; that changes the time, not the numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_tomsparse._checks import TomsparseError
from tl_tomsparse._draws import below, stream
from tl_tomsparse._model import Hook, ModelView, Reader, SharedPrefix
from tl_tomsparse._scoring import Batch, Reads
from tl_tomsparse.samples import Samples

Ablation = Literal["zero", "mean", "resample"]
PASS = 1 / 32  # what one forward pass costs beside its tokens, as a share of the tokens of a full batch
BLOCK = 64  # measurements after which the prefix is computed anew, and progress can be stored


class KnockoutRun:
    """Sums of log-probabilities under knock-outs, for one model and fixed prompts.

    Args:
        model_view: of the model.
        reads: what is summed, in batches of few prompts: a batch is repeated for several measurements.
        heads: (layer, head) of each column of a design.
        ablation: "zero"; "mean" of a head's output over the real tokens of `reference`; "resample": a head's
            output at the same position (a shorter row's last one) in another row of `reference`, the same row
            in every measurement.
        reference: rows for "mean" and "resample".
        seed: of the choice of other rows.
        budget: most tokens in one batch.
        share_prefix: compute the layers that measurements have in common once.

    Attributes:
        refusal: why the model computes all layers in each row, or None.
    """

    def __init__(
        self,
        model_view: ModelView,
        reads: Reads,
        heads: Sequence[tuple[int, int]],
        *,
        ablation: Ablation,
        reference: Samples,
        seed: int,
        budget: int,
        share_prefix: bool = True,
    ) -> None:
        self._view, self._reads, self._budget = model_view, reads, budget
        self._heads, self._ablation, self._reference = heads, ablation, reference
        self._layers = np.array([layer for layer, _ in heads])
        self._hooked = sorted({layer for layer, _ in heads})
        self._out: dict[int, Tensor] = {}
        self._value: dict[int, Tensor] = {}
        self._store: dict[int, Tensor] | None = None
        self._read: Reader | None = None
        self._checked, self._share_prefix = False, share_prefix
        self.refusal: str | None = None if share_prefix else "it was not asked for"
        self._donors = self._choose_donors(seed) if ablation == "resample" else None
        self._means = self._mean_outputs() if ablation == "mean" else {}

    def totals(
        self,
        out: Bool[np.ndarray, "n heads"],
        on_block: Callable[[np.ndarray, Float[np.ndarray, "block totals"]], None],
    ) -> None:
        """Each measurement's totals, handed over in blocks as soon as they are known.

        Args:
            out: which heads each measurement knocks out.
            on_block: called with indices of measurements and their totals, float64.
        """
        self._view.require_eval()
        first = np.where(out.any(1), self._layers[out.argmax(1)], self._view.n_layers - 1)
        order = np.argsort(first, kind="stable")
        with (
            torch.inference_mode(),
            SharedPrefix(self._view) as prefix,
            self._view.reader() as read,
            self._view.hooks(self._hooks()),
        ):
            self._read = read
            try:
                self._check_prefix(prefix, read)
                for start in range(0, len(order), BLOCK):
                    block = order[start : start + BLOCK]
                    on_block(block, self._block(out[block], first[block], prefix, read))
            finally:
                self._read = None
                self._out, self._value, self._store = {}, {}, None

    # ---- one block

    def _block(self, out: np.ndarray, first: np.ndarray, prefix: SharedPrefix, read: Reader) -> np.ndarray:
        n = len(out)
        device = self._view.device
        totals = torch.zeros(n, self._reads.n_totals, dtype=torch.float64, device=device)
        place = {head: column for column, head in enumerate(self._heads)}
        masks = {
            layer: torch.from_numpy(out[:, [place[h] for h in self._heads if h[0] == layer]]).to(device)
            for layer in self._hooked
        }
        row = 0
        for batch in self._reads.batches:
            begins = np.zeros(n, dtype=int) if self.refusal else first
            groups = _groups(begins, self._view.n_layers, batch.tokens.numel(), self._budget)
            starts = [int(begins[group.start]) for group in groups]
            if any(starts):
                prefix.keep(starts)
                self._out = {}
                batch.logits(read)
            prefix.start(0, 1)
            donors = self._donor_outputs(batch, row)
            repeated = {times: batch.repeated(times, self._reads.n_totals) for times in {
                group.stop - group.start for group in groups
            }}  # fmt: skip
            for group, start in zip(groups, starts):
                times = group.stop - group.start
                prefix.start(start, times)
                self._set(masks, group, len(batch.tokens))
                self._value = self._means or {
                    layer: z.repeat(times, 1, 1, 1) for layer, z in donors.items() if layer in self._out
                }
                repeated[times].add_to(totals[group].view(-1), read)
            row += len(batch.tokens)
        return totals.cpu().numpy()

    def _set(self, masks: dict[int, Tensor], group: slice, n_prompts: int) -> None:
        """Rows of the next pass: the prompts for the first measurement, for the second, ..."""
        chosen = {layer: mask[group] for layer, mask in masks.items()}
        self._out = {
            layer: mask.repeat_interleave(n_prompts, 0) for layer, mask in chosen.items() if bool(mask.any())
        }

    def _check_prefix(self, prefix: SharedPrefix, read: Reader) -> None:
        """Whether the model can begin in the middle; tried once, on the first batch."""
        layers = sorted({self._view.n_layers // 2, self._view.n_layers - 1} - {0})
        if self._share_prefix and not self._checked:
            self.refusal = prefix.refusal(partial(self._reads.batches[0].logits, read), layers)
            self._checked = True

    # ---- hooks and what heads become

    def _hooks(self) -> list[Hook]:
        return [(self._view.head_hook(layer), partial(self._hook, layer=layer)) for layer in self._hooked]

    def _hook(self, z: Tensor, hook: Any, *, layer: int) -> Tensor | None:
        del hook  # the bridge passes another name of the same point
        if self._store is not None:
            self._store[layer] = z
            return None
        if layer not in self._out:
            return None
        chosen = self._out[layer][:, None, :, None].to(z.device)
        if self._ablation == "zero":
            return z.masked_fill(chosen, 0.0)
        value = self._value[layer]
        if self._read is not None and value.shape[1] not in (1, z.shape[1]):
            value = self._read.narrowed(value)
        return torch.where(chosen, value.to(z), z)

    def _outputs(self, samples: Samples) -> dict[int, Tensor]:
        """z of every layer, `[n, pos, n_heads, d_head]`, without knock-outs."""
        store: dict[int, Tensor] = {}
        self._store = store
        try:
            self._view.logits(samples.tokens, samples.attention_mask)
        finally:
            self._store = None
        return store

    def _mean_outputs(self) -> dict[int, Tensor]:
        sums: dict[int, Tensor] = {}
        with torch.inference_mode(), self._view.hooks(self._hooks()):
            for rows in self._reference.batches(self._budget):
                samples = self._reference[rows]
                for layer, z in self._outputs(samples).items():
                    found = z[samples.attention_mask.to(z.device)].double().sum(0)
                    sums[layer] = sums[layer] + found if layer in sums else found
        n = int(self._reference.attention_mask.sum())
        return {layer: (total / n)[None, None] for layer, total in sums.items()}

    def _choose_donors(self, seed: int) -> np.ndarray:
        """For each row of the reads a row of the reference that is not the same prompt."""
        mask = self._reference.attention_mask
        rows = [tuple(tokens[real].tolist()) for tokens, real in zip(self._reference.tokens, mask)]
        prompts = [
            tuple(tokens[real].tolist())
            for batch in self._reads.batches
            for tokens, real in zip(batch.tokens.cpu(), batch.attention.cpu())
        ]
        drawn = below(stream(seed), len(rows), len(prompts))
        for index, prompt in enumerate(prompts):
            turns = 0
            while rows[drawn[index]][: len(prompt)] == prompt[: len(rows[drawn[index]])]:
                drawn[index] = (drawn[index] + 1) % len(rows)
                turns += 1
                if turns == len(rows):
                    raise TomsparseError(
                        'ablation="resample" takes outputs from other prompts, and there is none; give more '
                        "stories, or other rows as `reference`."
                    )
        return drawn

    def _donor_outputs(self, batch: Batch, row: int) -> dict[int, Tensor]:
        """z of each row's other prompt at the row's positions, `[prompts, pos, n_heads, d_head]`."""
        if self._donors is None:
            return {}
        samples = self._reference[torch.from_numpy(self._donors[row : row + len(batch.tokens)])]
        where = torch.arange(batch.tokens.shape[1])[None].minimum(samples.lengths[:, None] - 1)
        rows = torch.arange(len(where))[:, None]
        return {
            layer: z[rows.to(z.device), where.to(z.device)] for layer, z in self._outputs(samples).items()
        }


def _groups(first: np.ndarray, n_layers: int, tokens: int, budget: int) -> list[slice]:
    """Cuts measurements into batches so that the least is computed.

    Args:
        first: the first layer of each measurement that must be computed, ascending.
        n_layers: of the model.
        tokens: of one measurement.
        budget: most tokens in one batch (but one measurement at least). A batch is taken to cost its tokens
            and `PASS` of the budget besides, in each of its layers and once more around them.
    """
    most = max(1, budget // tokens)
    cost, cut = [0.0], [0]
    for end in range(1, len(first) + 1):
        begins = range(max(0, end - most), end)
        costs = [
            cost[at] + (n_layers + 1 - first[at]) * ((end - at) * tokens + PASS * budget) for at in begins
        ]
        best = int(np.argmin(costs))
        cost.append(float(costs[best]))
        cut.append(begins[best])
    slices: list[slice] = []
    end = len(first)
    while end:
        slices.append(slice(cut[end], end))
        end = cut[end]
    return slices[::-1]
