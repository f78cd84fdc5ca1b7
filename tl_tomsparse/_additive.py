"""A change of a few weights as hooks: to the output of each product `x W` is added `x dW`.

The change may be scaled, row by row of the batch, and may carry gradients: to the scale (which derivatives of
the loss along an edit are taken by) and to the single entries (which are trained by it).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_tomsparse._channels import channels, name
from tl_tomsparse._checks import TomsparseError
from tl_tomsparse._model import Hook, Key, ModelView
from tl_tomsparse.mask import SparseMask


def additive_hooks(
    seen: ModelView,
    mask: SparseMask,
    changes: Mapping[Key, Float[Tensor, " _"]],
    strength: float | Float[Tensor, " batch"] = 1.0,
) -> list[Hook]:
    """Forward hooks, to be used together and in this order; no weight is written.

    Args:
        seen: the model.
        mask: the entries that are changed.
        changes: for each (layer, matrix) the changes of its entries, in the order of `mask.entries`; computed
            with in float32 or better.
        strength: what they are multiplied by, for all rows of a batch or for each.
    """
    inputs: dict[Key, Tensor] = {}

    def store(keys: tuple[Key, ...], x: Tensor) -> None:
        inputs.update(dict.fromkeys(keys, x))

    additions = [
        (seen.output_hook(key), partial(_addition(key, seen, mask, change, strength), inputs))
        for key, change in changes.items()
    ]
    return [*seen.input_hooks(changes, store), *additions]


def _addition(
    key: Key, seen: ModelView, mask: SparseMask, change: Tensor, strength: float | Tensor
) -> Callable[..., Tensor]:
    """A hook that takes the stored input of a matrix and returns its changed output."""
    exact = torch.float64 if seen.dtype == torch.float64 else torch.float32
    rows, columns = channels(key, mask.shapes[key], mask.entries[key])
    rows, row = rows.unique(return_inverse=True)
    columns, column = columns.unique(return_inverse=True)
    rows, row, columns, column = (index.to(seen.device) for index in (rows, row, columns, column))

    def matrix() -> Tensor:
        nothing = torch.zeros(len(rows), len(columns), dtype=exact, device=seen.device)
        return nothing.index_put((row, column), change.to(seen.device, exact))

    fixed = None if change.requires_grad else matrix()

    def add(inputs: dict[Key, Tensor], y: Tensor, hook: Any) -> Tensor:
        del hook
        if key not in inputs:
            raise TomsparseError(
                f"The input of {name(key)} was not seen before its output; use all of the edit's hooks "
                "together."
            )
        x = inputs.pop(key).flatten(2)  # popped, so that no graph is kept alive
        change_of_y = x.index_select(2, rows).to(exact) @ (matrix() if fixed is None else fixed)
        if isinstance(strength, Tensor):
            change_of_y = change_of_y * strength[:, None, None]
        elif strength != 1.0:
            change_of_y = change_of_y * strength
        return y.flatten(2).to(exact).index_add(2, columns, change_of_y).to(y.dtype).view_as(y)

    return add
