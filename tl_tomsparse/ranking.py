"""The entries with the largest sensitivities: exactly the wanted share, and ranked once for many shares.

For one matrix with d entries and sparsity kappa (arXiv 2504.04238),

    k = round(kappa * d),    choice = the k entries with the largest sensitivity

`round` is Python's, of the product in double precision, so halves go to the even number: 2.5 entries are 2.
Exactly k entries are chosen and ties go to the lowest flat index, on every device. (The released code keeps
what is strictly above the k-th value: one entry fewer, and none at k = 1.) With `quota="global"` the matrices
share one k = round(kappa * total); ties go to the earlier layer, then in the order Q, K, V, O, gate, in, out.

The difference of two choices is not nested in kappa, because both thresholds move. So [`rank_entries`][]
ranks each side once, and every kappa of a sweep is read off the ranks.

Not claimed: that a large sensitivity means that the capability depends on the entry.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Literal, get_args

import torch
from jaxtyping import Int64
from torch import Tensor

from tl_tomsparse._channels import name, order
from tl_tomsparse._checks import TomsparseError, check_choice, check_kappa
from tl_tomsparse._model import Key, ModelIdentity
from tl_tomsparse._select import bad_value, largest
from tl_tomsparse.mask import SparseMask

if TYPE_CHECKING:
    from tl_tomsparse.sensitivity import Sensitivity

Quota = Literal["matrix", "global"]


@dataclass(frozen=True, repr=False, eq=False)
class RankedEntries:
    """The entries of the largest sensitivities with their ranks, from which every smaller kappa is read off.

    Attributes:
        identity: of the model.
        shapes: canonical shape of each (layer, matrix).
        quota: "matrix" or "global".
        kappa_max: the largest kappa that can be asked for.
        entries: flat indices of each matrix, largest sensitivity first.
        ranks: the rank of each of them from 0, ascending; in the matrix, or over all matrices for "global".
    """

    identity: ModelIdentity
    shapes: Mapping[Key, tuple[int, ...]]
    quota: Quota
    kappa_max: float
    entries: Mapping[Key, Int64[Tensor, " _"]]
    ranks: Mapping[Key, Int64[Tensor, " _"]]

    def top(self, kappa: float) -> SparseMask:
        """The mask of exactly round(kappa * d) entries of each matrix, or of all together for "global".

        Raises:
            TomsparseError: kappa is outside [0, 1] or above `kappa_max`.
        """
        check_kappa(kappa)
        if kappa > self.kappa_max:
            raise TomsparseError(
                f"kappa={kappa!r} is above kappa_max={self.kappa_max!r}; rank more entries with rank_entries."
            )
        total = sum(map(prod, self.shapes.values()))
        chosen = {}
        for key, index in self.entries.items():
            k = round(kappa * (prod(self.shapes[key]) if self.quota == "matrix" else total))
            chosen[key] = index[: int(torch.searchsorted(self.ranks[key], k))]
        return SparseMask(self.identity, self.shapes, chosen)

    def __repr__(self) -> str:
        return f"RankedEntries(kappa_max={self.kappa_max:g}, quota={self.quota!r}, {self.identity.name})"


def rank_entries(sensitivity: Sensitivity, *, kappa_max: float, quota: Quota = "matrix") -> RankedEntries:
    """Rank the entries of the largest sensitivities once, for many kappas.

    Args:
        sensitivity: of the matrices to choose from.
        kappa_max: the largest kappa that will be asked for, in [0, 1].
        quota: "matrix" chooses the same share of each matrix, "global" of all of them together.

    Raises:
        TomsparseError: kappa_max is outside [0, 1]; an unknown quota; a sensitivity that is NaN, infinite or
            negative, with the name of the matrix.
    """
    check_kappa(kappa_max)
    check_choice("quota", quota, get_args(Quota))
    values = {key: sensitivity.values[key] for key in sorted(sensitivity.values, key=order)}
    shapes = {key: tuple(value.shape) for key, value in values.items()}
    flats = {key: value.detach().flatten() for key, value in values.items()}
    for key, flat in flats.items():
        if (bad := bad_value(flat)) is not None:
            raise TomsparseError(
                f"The sensitivity of {name(key)} has the value {bad}; it must be finite and not negative. "
                "Compute it again, in float32 or with a loss that stays finite."
            )
    entries, ranks = {}, {}
    if quota == "matrix":
        for key, flat in flats.items():
            _, entries[key] = largest([flat], round(kappa_max * flat.numel()))
            ranks[key] = torch.arange(len(entries[key]))
    else:
        total = sum(flat.numel() for flat in flats.values())
        which, index = largest(list(flats.values()), round(kappa_max * total))
        for place, key in enumerate(flats):
            ranks[key] = (which == place).nonzero().flatten()
            entries[key] = index[ranks[key]]
    return RankedEntries(sensitivity.identity, shapes, quota, kappa_max, entries, ranks)


def top_fraction(sensitivity: Sensitivity, kappa: float, *, quota: Quota = "matrix") -> SparseMask:
    """The mask of the entries with the largest sensitivities; the module docstring gives the rule.

    Args:
        sensitivity: of the matrices to choose from.
        kappa: share of the entries to choose, in [0, 1].
        quota: "matrix" chooses the same share of each matrix, "global" of all of them together.

    Raises:
        TomsparseError: as [`rank_entries`][].
    """
    return rank_entries(sensitivity, kappa_max=kappa, quota=quota).top(kappa)
