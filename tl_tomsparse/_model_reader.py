"""Logits at chosen positions, with less work than logits everywhere; a part of `_model.py`.

    read(tokens, attention, where) = logits(tokens, attention)[where]

The unembedding, and in the last layer O and the MLP, need no other positions than those read from: nothing
after them mixes positions. Which hook points these are, the [`ModelView`][] has found out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

if TYPE_CHECKING:
    from tl_tomsparse._model import Hook, ModelView


class Reader:
    """A function that gives logits at chosen positions; made by `ModelView.reader`, which installs its hooks.

    What is read is unchanged. Activations at other positions are not those of a usual pass: the last layer
    works on as many positions a row as the row that needs most, and its O and MLP give zeros elsewhere.

    Attributes:
        before: hooks to install first.
        after: hooks to install last; those in between see the narrowed tensors.
    """

    def __init__(self, model_view: ModelView) -> None:
        self._view = model_view
        sites = _last_layer_sites(model_view)
        end = _before_unembedding(model_view)
        self.before: list[Hook] = [(first, self._take) for first, _ in sites]
        self.after: list[Hook] = [(last, self._put) for _, last in sites]
        self.after += [] if end is None else [(end, self._select)]
        self._where: Tensor | None = None
        self._narrow: Tensor | None = None

    def __call__(
        self,
        tokens: Int[Tensor, "batch pos"],
        attention: Bool[Tensor, "batch pos"] | Bool[Tensor, "batch query key"],
        where: Bool[Tensor, "batch pos"],
        positions: Int[Tensor, "batch pos"] | None = None,
    ) -> Float[Tensor, "reads d_vocab"]:
        """The logits where `where` is True, row by row.

        Args:
            tokens: right-padded rows, or packed ones.
            attention: as `ModelView.logits` takes it.
            where: positions to read from.
            positions: of packed rows.
        """
        count = where.sum(1)
        fewest, most = int(count.min()), int(count.max())
        if fewest < where.shape[1]:
            self._where = where.to(self._view.device)
            if 2 * most <= where.shape[1]:
                # Stable, so that positions stay in order; rows that need fewer get others besides.
                order = torch.argsort(self._where.long(), dim=1, descending=True, stable=True)
                self._narrow = order[:, :most]
        try:
            logits = self._view.logits(tokens, attention, positions).flatten(0, 1)
        finally:
            wanted, self._where, self._narrow = self._where, None, None
        if wanted is None or len(logits) < wanted.numel():
            return logits
        return logits[wanted.flatten()]

    def narrowed(self, values: Float[Tensor, "batch pos ..."]) -> Float[Tensor, "batch some ..."]:
        """Values given for every position, at those positions that the last layer works on now."""
        if self._narrow is None:
            return values
        return values[torch.arange(len(values), device=values.device)[:, None], self._narrow]

    def _select(self, x: Tensor, hook: Any) -> Tensor | None:
        del hook
        return None if self._where is None else x[self._where][None]

    def _take(self, x: Tensor, hook: Any) -> Tensor | None:
        del hook
        return None if self._narrow is None else self.narrowed(x)

    def _put(self, y: Tensor, hook: Any) -> Tensor | None:
        del hook
        if self._narrow is None or self._where is None:
            return None
        index = self._narrow[..., None].expand(y.shape)
        return y.new_zeros(*self._where.shape, y.shape[-1]).scatter(1, index, y)


def _before_unembedding(model_view: ModelView) -> str | None:
    """The hook point whose positions the unembedding sees; None where others look at its output."""
    out = model_view.model.hook_dict.get("unembed.hook_out")
    if out is not None and out.fwd_hooks:
        return None
    sites = ("unembed.hook_in", "ln_final.hook_normalized")
    return next((site for site in sites if site in model_view._hook_names), None)


def _last_layer_sites(model_view: ModelView) -> list[tuple[str, str]]:
    """Input and output hook points of the position-wise parts of the last layer: O, and a dense MLP.

    Empty where other hooks are installed in that layer, which may rely on the shapes there.
    """
    layer = model_view.n_layers - 1
    points = model_view.model.hook_dict
    if any(points[name].fwd_hooks for name in model_view._hook_names if name.startswith(f"blocks.{layer}.")):
        return []
    pairs = model_view._sites.pairs
    sites = [pairs[layer, "O"]] if (layer, "O") in pairs else []
    if (layer, "in") in pairs and (layer, "out") in pairs:
        sites.append((pairs[layer, "in"][0], pairs[layer, "out"][1]))
    return sites
