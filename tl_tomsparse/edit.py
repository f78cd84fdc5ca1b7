"""Sparse edits of weights: new values for a few entries, in the weights or as hooks, and exactly undone.

With W a matrix of d entries and M the k masked ones (arXiv 2504.04238; the mean is over the *unmasked*
entries, where the released code divides their sum by d):

    mean      W'[M] = sum(W[not M]) / (d - k)      summed in float64
    zero      W'[M] = 0
    scale     W'[M] = factor * W[M]
    resample  W'[M] = independent uniform draws from W[not M]

New values are computed once, from unedited weights, rounded to the dtype of the weights, and never read again
from live ones. [`SparseEdit.applied`][] writes them into the weights for the time of a block.
[`SparseEdit.hooks`][] adds `x (W' - W)` to the output of each product `x W` and writes nothing; both agree to
rounding.

Not claimed: that an edit stays on the data that the model was trained on; "mean" too is a change of behaviour
by weights that the model has never had.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_tomsparse._additive import additive_hooks
from tl_tomsparse._applied import Applied, Entries
from tl_tomsparse._channels import name, order, place
from tl_tomsparse._checks import TomsparseError, check_same_weights
from tl_tomsparse._draws import below, stream
from tl_tomsparse._model import Hook, Key, ModelIdentity, view
from tl_tomsparse.mask import SparseMask

if TYPE_CHECKING:
    import pandas as pd

_NONE = torch.empty(0, dtype=torch.int64)
Values = Callable[[Key, Tensor, Tensor, Tensor], Tensor]
"""New values from (key, live weight in canonical shape, flat indices, old values)."""


@dataclass(frozen=True, eq=False, repr=False)
class SparseEdit:
    """New values for the entries of a mask. Build one with `mean`, `zero`, `scale` or `resample`.

    Attributes:
        mask: the entries.
        before: for each (layer, matrix) with entries, the values that the weights have where the edit may be
            applied, in the order of `mask.entries`, in the dtype of the weights, on the CPU.
        after: the values that it gives them.
        operator: how they were made, in words.
        values: the rule that made them; None for an inverse and for several edits as one.
    """

    mask: SparseMask
    before: Mapping[Key, Float[Tensor, " _"]]
    after: Mapping[Key, Float[Tensor, " _"]]
    operator: str
    values: Values | None = None

    @property
    def identity(self) -> ModelIdentity:
        """Of the unedited model that the edit was made from."""
        return self.mask.identity

    # ---- makers

    @classmethod
    def mean(cls, model: Any, mask: SparseMask) -> SparseEdit:
        """Each masked entry gets the mean of the unmasked entries of its matrix.

        Args:
            model: unedited; the one that the mask was made from.
            mask: the entries.

        Raises:
            TomsparseError: the mask is of other weights; an edit is active; a matrix has no unmasked entry.
        """

        def values(key: Key, weight: Tensor, index: Tensor, old: Tensor) -> Tensor:
            rest = _unmasked(key, weight, index)
            total = weight.sum(dtype=torch.float64).cpu() - old.sum(dtype=torch.float64)
            return (total / rest).expand(len(old))

        return cls._make(model, mask, "mean", values)

    @classmethod
    def zero(cls, model: Any, mask: SparseMask) -> SparseEdit:
        """Each masked entry becomes 0; arguments and refusals as for `mean`."""
        return cls._make(model, mask, "zero", lambda key, weight, index, old: torch.zeros_like(old))

    @classmethod
    def scale(cls, model: Any, mask: SparseMask, factor: float) -> SparseEdit:
        """Each masked entry is multiplied by `factor`: -1 turns the sign, above 1 amplifies.

        Raises:
            TomsparseError: as for `mean`; a factor that is not finite, or too large for the dtype of the
                weights.
        """
        return cls._make(
            model, mask, f"scale {factor:g}", lambda key, weight, index, old: old.double() * factor
        )

    @classmethod
    def resample(cls, model: Any, mask: SparseMask, *, seed: int) -> SparseEdit:
        """Each masked entry gets the value of a random unmasked entry of its matrix, drawn with replacement.

        Args:
            model: unedited; the one that the mask was made from.
            mask: the entries.
            seed: 0 or larger; the draws are the same on every platform.

        Raises:
            TomsparseError: as for `mean`; a seed that is not a whole number from 0.
        """

        def values(key: Key, weight: Tensor, index: Tensor, old: Tensor) -> Tensor:
            rest = _unmasked(key, weight, index)
            rank = torch.from_numpy(below(stream(seed, *order(key)), rest, len(index)))
            # Before the r-th unmasked entry come the masked ones with at most r unmasked ones before them.
            flat = rank + torch.searchsorted(index - torch.arange(len(index)), rank, right=True)
            return weight[place(tuple(weight.shape), flat.to(weight.device))].cpu()

        return cls._make(model, mask, f"resample seed {seed}", values)

    @classmethod
    def _make(cls, model: Any, mask: SparseMask, operator: str, values: Values) -> SparseEdit:
        seen = view(model)
        if seen.active_edits:
            raise TomsparseError(
                f"{seen.name} has an active edit, {seen.active_edits[-1]}; edits are made from unedited "
                "weights, so make this one before the `with` block, or after it."
            )
        check_same_weights("The mask", mask.identity, "the model", seen.identity())
        before: dict[Key, Tensor] = {}
        after: dict[Key, Tensor] = {}
        for key, index in mask.entries.items():
            if len(index):
                if key not in seen.keys(key[1:]) or seen.shape(key) != mask.shapes[key]:
                    raise TomsparseError(
                        f"{seen.name} has no {name(key)} of shape {mask.shapes[key]}; make the mask again."
                    )
                weight = seen.weight(key)
                before[key] = weight[place(mask.shapes[key], index.to(weight.device))].cpu()
                after[key] = values(key, weight, index, before[key]).to(weight.dtype).contiguous()
                if not bool(after[key].isfinite().all()):
                    raise TomsparseError(
                        f"The edit ({operator}) gives {name(key)} values that are not finite in "
                        f"{weight.dtype}; choose a smaller factor, or check the weights."
                    )
        return cls(mask, MappingProxyType(before), MappingProxyType(after), operator, values)

    def on(self, model: Any, mask: SparseMask) -> SparseEdit:
        """The same operator on the entries of another mask: `edit.on(model, edit.mask.random_like(0))` is a
        placebo.

        Args:
            model: unedited; the one that the mask was made from.
            mask: the entries.

        Raises:
            TomsparseError: as for `mean`; this edit is an inverse, or several edits as one.
        """
        if self.values is None:
            raise TomsparseError(
                f"The edit ({self.operator}) has no rule of its own to use on other entries; make them with "
                "SparseEdit.mean, zero, scale or resample."
            )
        return self._make(model, mask, self.operator, self.values)

    # ---- algebra

    def restrict(self, mask: SparseMask) -> SparseEdit:
        """The part of this edit on the entries that are in `mask` too, with the same new values.

        Raises:
            TomsparseError: the mask is of other weights.
        """
        common = self.mask & mask
        kept = {
            key: torch.isin(self.mask.entries[key], common.entries.get(key, _NONE)) for key in self.before
        }
        before = {key: self.before[key][keep] for key, keep in kept.items() if bool(keep.any())}
        after = {key: self.after[key][kept[key]] for key in before}
        part = SparseMask(self.identity, self.mask.shapes, dict(common.entries))
        return SparseEdit(part, MappingProxyType(before), MappingProxyType(after), f"part of {self.operator}")

    @property
    def inverse(self) -> SparseEdit:
        """The edit that takes this one back: applied where this one is active, it gives the old values."""
        return SparseEdit(self.mask, self.after, self.before, f"inverse of {self.operator}")

    def __or__(self, other: SparseEdit) -> SparseEdit:
        """Both edits as one.

        Raises:
            TomsparseError: they are of different weights, or have entries in common.
        """
        if not isinstance(other, SparseEdit):
            return NotImplemented
        check_same_weights("The first edit", self.identity, "the second edit", other.identity)
        if len(common := self.mask & other.mask):
            first = next(key for key, index in common.entries.items() if len(index))
            raise TomsparseError(
                f"The edits have {len(common)} entries in common, the first in {name(first)}; take them "
                "out of one mask (mask_a - mask_b) before making its edit."
            )
        before: dict[Key, Tensor] = {}
        after: dict[Key, Tensor] = {}
        for key in sorted({*self.before, *other.before}, key=order):
            parts = [edit for edit in (self, other) if key in edit.before]
            ascending = torch.cat([edit.mask.entries[key] for edit in parts]).argsort()
            before[key] = torch.cat([edit.before[key] for edit in parts])[ascending]
            after[key] = torch.cat([edit.after[key] for edit in parts])[ascending]
        joined = f"{self.operator} | {other.operator}"
        return SparseEdit(self.mask | other.mask, MappingProxyType(before), MappingProxyType(after), joined)

    # ---- use

    def applied(self, model: Any) -> AbstractContextManager[SparseEdit]:
        """A block in which the edit is in the weights; afterwards every bit is as before.

        Only the entries are written. They are put back after the block's normal end, after an exception, and
        after Ctrl-C, also one that comes while entering or leaving (for which a handler stands before the
        present one while the block runs in the main thread). Edits can be nested, overlapping ones and the
        same one too; inner ones must be left first. A backward pass must be in the block of its forward pass;
        autograd raises otherwise.

        Args:
            model: with the weights that the edit was made from.

        Raises:
            TomsparseError: on entering, the model has other weights, or an entry does not have its old value;
                on leaving, an edit that was entered later is still active. Nothing is written then.
        """
        return Applied(self, model)

    def hooks(self, model: Any, *, strength: float = 1.0) -> list[Hook]:
        """The edit as forward hooks for `model.run_with_hooks` or `model.hooks`; no weight is written.

        They add the input of each product, gathered at the entries' rows, times the change of the weights, in
        float32 or better, and carry gradients. Use them together, in this order, and after hooks that change
        the input of an edited matrix (`applied` needs no order). Hooks of yours on its output see the edited
        value if they come later; if they come before, the change is added to what they return. What backward
        hooks see at such an input leaves out the change's own share: attribution patching needs `applied`.
        Not for a model that the edit is already applied to.

        Args:
            model: with the weights that the edit was made from.
            strength: how much of the change: 0 none, 1 all, 2 twice.

        Returns:
            (name of a hook point, function) pairs.

        Raises:
            TomsparseError: the model has other weights, or an entry does not have its old value; while
                running, a hook on an output did not see its input first.
        """
        seen = view(model)
        check_same_weights("The edit", self.identity, "the model", seen.identity())
        for key in self.before:
            Entries.read(seen, key, self.mask.entries[key], self.before[key])
        return additive_hooks(seen, self.mask, self.changes, strength)

    @property
    def changes(self) -> dict[Key, Float[Tensor, " _"]]:
        """For each (layer, matrix) with entries `after - before`, float64."""
        return {key: self.after[key].double() - self.before[key].double() for key in self.before}

    # ---- other forms

    def __len__(self) -> int:
        """How many entries."""
        return len(self.mask)

    def to_frame(self) -> pd.DataFrame:
        """The mask's frame with the columns `before` and `after`."""
        frame = self.mask.to_frame()
        for column, values in (("before", self.before), ("after", self.after)):
            parts = [values[key].double() for key in self.mask.entries if key in values]
            frame[column] = torch.cat([torch.empty(0, dtype=torch.float64), *parts]).numpy()
        return frame

    def __repr__(self) -> str:
        return f"SparseEdit({self.operator}: {str(self.mask).removeprefix('SparseMask(')}"

    def _repr_html_(self) -> str:
        return self.mask._repr_html_().replace("SparseMask(", f"SparseEdit({self.operator}: ")


def _unmasked(key: Key, weight: Tensor, index: Tensor) -> int:
    """How many entries of a matrix are not masked; at least one."""
    rest = weight.numel() - len(index)
    if rest == 0:
        raise TomsparseError(
            f"The mask covers all of {name(key)}, so there is no unmasked entry to take a value from; use a "
            "smaller kappa, or SparseEdit.zero or scale."
        )
    return rest
