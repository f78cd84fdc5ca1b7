"""Sparse masks: which few entries of which weight matrices, as a value with the algebra of sets.

The mask of a capability is the difference of two choices of entries (arXiv 2504.04238; [`top_fraction`][]):

    mask = top_fraction(F_task, kappa) - top_fraction(F_general, kappa)

An entry is named by layer, matrix and flat index: row-major in the canonical shape, which is
`[heads, d_model, d_head]` for Q, K, V (key-value heads not expanded), `[heads, d_head, d_model]` for O,
`[d_model, d_mlp]` for gate and in, `[d_mlp, d_model]` for out.

Not claimed: that the chosen entries matter. Compare every mask with [`SparseMask.random_like`][].
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from tl_tomsparse._artifacts import read_safetensors, write_safetensors
from tl_tomsparse._channels import name, order
from tl_tomsparse._checks import TomsparseError, check_choice, check_same_weights
from tl_tomsparse._model import MATRICES, Key, ModelIdentity, view
from tl_tomsparse._random_masks import NEED_MODEL, Match, draw_entries

if TYPE_CHECKING:
    import pandas as pd

By = Literal["layer", "head", "matrix"]

_KIND = "tomsparse.mask"


@dataclass(frozen=True, eq=False, repr=False)
class SparseMask:
    """A set of entries of a model's weight matrices; a value, never changed.

    Build one with [`top_fraction`][], from boolean tensors with [`SparseMask.from_bool`][], or from indices.

    Attributes:
        identity: of the model whose weights are meant.
        shapes: canonical shape of each (layer, matrix) that the mask is about, layer by layer.
        entries: for each of them the flat indices, ascending, int64, on the CPU; may be empty.

    Raises:
        TomsparseError: an index is outside its matrix, or a matrix has no shape.
    """

    identity: ModelIdentity
    shapes: Mapping[Key, tuple[int, ...]]
    entries: Mapping[Key, Int64[Tensor, " _"]]

    def __post_init__(self) -> None:
        if missing := [key for key in self.entries if key not in self.shapes]:
            raise TomsparseError(
                f"{name(missing[0])} has entries but no shape; give the shape of every matrix."
            )
        shapes = {key: tuple(self.shapes[key]) for key in sorted(self.shapes, key=order)}
        entries: dict[Key, Tensor] = {}
        for key, shape in shapes.items():
            given = torch.as_tensor(self.entries.get(key, ()))
            index = given.detach().to("cpu", torch.int64).flatten().unique()
            if len(index) and not (index[0] >= 0 and index[-1] < prod(shape)):
                bad = index[0] if index[0] < 0 else index[-1]
                raise TomsparseError(
                    f"Index {int(bad)} is outside {name(key)} of shape {shape} with {prod(shape)} entries."
                )
            entries[key] = index
        object.__setattr__(self, "shapes", MappingProxyType(shapes))
        object.__setattr__(self, "entries", MappingProxyType(entries))

    # ---- algebra

    def __sub__(self, other: SparseMask) -> SparseMask:
        """The entries of this mask that are not in the other; about the matrices of this one."""
        return self._combine(other, self.shapes, lambda a, b: a[~torch.isin(a, b, assume_unique=True)])

    def __and__(self, other: SparseMask) -> SparseMask:
        """The entries of both masks; about the matrices of both."""
        shapes = {key: shape for key, shape in self.shapes.items() if key in other.shapes}
        return self._combine(other, shapes, lambda a, b: a[torch.isin(a, b, assume_unique=True)])

    def __or__(self, other: SparseMask) -> SparseMask:
        """The entries of either mask; about the matrices of either."""
        return self._combine(other, {**self.shapes, **other.shapes}, lambda a, b: torch.cat([a, b]))

    def __len__(self) -> int:
        """How many entries."""
        return sum(map(len, self.entries.values()))

    def __eq__(self, other: object) -> bool:
        """Whether both have the same entries of the same weights; matrices without entries do not count."""
        if not isinstance(other, SparseMask):
            return NotImplemented
        mine = {key: index for key, index in self.entries.items() if len(index)}
        theirs = {key: index for key, index in other.entries.items() if len(index)}
        return (
            self.identity.same_weights(other.identity)
            and mine.keys() == theirs.keys()
            and all(torch.equal(index, theirs[key]) for key, index in mine.items())
        )

    __hash__ = None  # type: ignore[assignment]

    def restrict(
        self,
        *,
        layers: Collection[int] | None = None,
        matrices: Collection[str] | None = None,
        heads: Collection[int | tuple[int, int]] | None = None,
    ) -> SparseMask:
        """The entries in these layers, matrices and heads; None keeps all.

        Args:
            layers: counted from 0.
            matrices: of Q, K, V, O, gate, in, out.
            heads: counted from 0, for all layers, or (layer, head) pairs; key-value heads for K and V.
                Matrices without heads are left out.

        Raises:
            TomsparseError: an unknown matrix name.
        """
        for matrix in matrices or ():
            check_choice("matrices", matrix, MATRICES)
        shapes = {
            key: shape
            for key, shape in self.shapes.items()
            if (layers is None or key[0] in layers)
            and (matrices is None or key[1] in matrices)
            and (heads is None or len(shape) == 3)
        }
        entries = {key: self.entries[key] for key in shapes}
        if heads is not None:
            entries = {
                key: index[torch.isin(index // prod(shapes[key][1:]), _heads_of(heads, key[0]))]
                for key, index in entries.items()
            }
        return SparseMask(self.identity, shapes, entries)

    def random_like(self, seed: int, *, match: Match = "matrix", model: Any = None) -> SparseMask:
        """A random mask of the same size: the placebo. The same on every platform.

        Args:
            seed: 0 or larger; other seeds are independent draws.
            match: what it has in common with this mask, all else uniform.
                "matrix": the number of entries in each matrix.
                "total": the number of entries over all the mask's matrices together, empty ones included.
                "row": the number of entries at each input channel of each matrix; inputs are d_model for
                Q, K, V, gate and in, (head, d_head) for O, d_mlp for out.
                "column": the number at each output channel; outputs are (head, d_head) for Q, K, V, d_mlp for
                gate and in, d_model for O and out.
                "pair": the number at each rotary pair of each head; for Q and K of layers with a rotation.
                "magnitude": the number at entries of about the same |W| (ranks within a factor of sqrt(2)).
                "change": the number at entries of about the same |W - mean of the matrix|, which the edit
                "mean" changes by as much.
            model: the one that the mask was made from; for "pair", "magnitude" and "change" only.

        Raises:
            TomsparseError: an unknown match, or a seed that is not a whole number from 0; for "pair",
                "magnitude" and "change" no model, one with other weights or with an active edit; for "pair"
                entries in a matrix that is not rotated.
        """
        check_choice("match", match, get_args(Match))
        if match in NEED_MODEL:
            if model is None:
                raise TomsparseError(f"match={match!r} looks at the weights; pass model=.")
            check_same_weights("The mask", self.identity, "the model", view(model).identity())
            if view(model).active_edits:
                raise TomsparseError(
                    f"match={match!r} looks at unedited weights; make the mask before the `with` block of "
                    "the edit."
                )
        return SparseMask(
            self.identity, self.shapes, draw_entries(self.entries, self.shapes, seed, match, model)
        )

    # ---- other forms

    def to_bool(self, key: Key) -> Bool[Tensor, ...]:
        """One matrix as a boolean tensor in canonical shape, True at the entries.

        Raises:
            TomsparseError: the mask is not about this matrix.
        """
        if key not in self.shapes:
            raise TomsparseError(f"The mask is not about {name(key)}; it is about {_span(self)}.")
        flat = torch.zeros(prod(self.shapes[key]), dtype=torch.bool)
        flat[self.entries[key]] = True
        return flat.view(self.shapes[key])

    @classmethod
    def from_bool(cls, model: Any, masks: Mapping[Key, Bool[Tensor, ...]]) -> SparseMask:
        """A mask from boolean tensors in canonical shape, True at the entries.

        Args:
            model: whose weights are meant.
            masks: for each (layer, matrix) that the mask is about.

        Raises:
            TomsparseError: the model does not have such a matrix, or it has another shape.
        """
        seen = view(model)
        entries: dict[Key, Tensor] = {}
        for key, mask in masks.items():
            if key not in seen.keys((key[1],)):
                raise TomsparseError(f"{seen.name} has no {name(key)}; it has {seen.n_layers} layers.")
            if mask.dtype != torch.bool or tuple(mask.shape) != seen.shape(key):
                raise TomsparseError(
                    f"The mask of {name(key)} is {mask.dtype} {tuple(mask.shape)}; it must be torch.bool "
                    f"{seen.shape(key)}."
                )
            entries[key] = mask.flatten().nonzero().flatten()
        return cls(seen.identity(), {key: seen.shape(key) for key in entries}, entries)

    def to_frame(self) -> pd.DataFrame:
        """One row per entry, in order: layer, matrix, head, row, col, flat.

        `row` and `col` are the last two canonical axes: input and output of the product, within one head for
        the matrices that have heads. `head` is missing for the others.
        """
        import pandas as pd

        parts = []
        for key, index in self.entries.items():
            *head, row, col = np.unravel_index(index.numpy(), self.shapes[key])
            parts.append(
                pd.DataFrame(
                    {
                        "layer": key[0],
                        "matrix": key[1],
                        "head": pd.array(head[0] if head else [None] * len(index), dtype="Int64"),
                        "row": row,
                        "col": col,
                        "flat": index.numpy(),
                    }
                )
            )
        columns = {"layer": "int64", "matrix": "object", "head": "Int64"} | dict.fromkeys(
            ("row", "col", "flat"), "int64"
        )
        frame = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=list(columns))
        return frame.astype(columns)

    def counts(self, by: By = "layer") -> pd.Series[int]:
        """How many entries there are in each layer, matrix or head, also where there are none.

        Args:
            by: "layer" and "matrix" (its name, over all layers) count every entry; "head" has the index
                (layer, matrix, head) and counts the matrices that have heads, K and V by key-value head.

        Raises:
            TomsparseError: an unknown choice.
        """
        import pandas as pd

        check_choice("by", by, get_args(By))
        if by == "head":
            found = {
                (*key, head): count
                for key, index in self.entries.items()
                if len(shape := self.shapes[key]) == 3
                for head, count in enumerate(
                    torch.bincount(index // prod(shape[1:]), minlength=shape[0]).tolist()
                )
            }
            names = pd.MultiIndex.from_tuples(list(found), names=["layer", "matrix", "head"])
            return pd.Series(list(found.values()), index=names, name="entries", dtype="int64")
        axis = 0 if by == "layer" else 1
        sums = {key[axis]: 0 for key in sorted(self.shapes, key=lambda key: order(key)[axis])}
        for key, index in self.entries.items():
            sums[key[axis]] += len(index)
        return pd.Series(
            list(sums.values()), index=pd.Index(list(sums), name=by), name="entries", dtype="int64"
        )

    def save(self, path: str | Path) -> None:
        """Write the mask to a safetensors file, whole or not at all; equal masks give equal bytes.

        Raises:
            TomsparseError: the file cannot be written.
        """
        shapes = {f"{layer}.{matrix}": shape for (layer, matrix), shape in self.shapes.items()}
        header = {"kind": _KIND, "identity": self.identity.to_dict(), "shapes": shapes}
        write_safetensors(path, dict(zip(shapes, self.entries.values())), header)

    @classmethod
    def load(cls, path: str | Path) -> SparseMask:
        """Read a mask that `save` wrote.

        Raises:
            TomsparseError: the file cannot be read, is not a mask, or is damaged.
        """
        tensors, header = read_safetensors(path, _KIND)
        try:
            shapes = {_key(stored): tuple(map(int, shape)) for stored, shape in header["shapes"].items()}
            identity = ModelIdentity.from_dict(header["identity"])
            return cls(identity, shapes, {_key(stored): index for stored, index in tensors.items()})
        except (KeyError, TypeError, ValueError) as error:
            raise TomsparseError(f"{path} is a damaged mask ({error}); make it again.") from error

    def __repr__(self) -> str:
        total = sum(map(prod, self.shapes.values()))
        return f"SparseMask({len(self):,} of {total:,} weights in {_span(self)} of {self.identity.name})"

    def _repr_html_(self) -> str:
        layers = sorted({layer for layer, _ in self.shapes})
        matrices = [matrix for matrix in MATRICES if any(key[1] == matrix for key in self.shapes)]
        head = "".join(f"<th>{matrix}</th>" for matrix in matrices)
        rows = "".join(
            f"<tr><th>{layer}</th>"
            + "".join(f"<td>{len(self.entries.get((layer, matrix), ()))}</td>" for matrix in matrices)
            + "</tr>"
            for layer in layers
        )
        caption = repr(self).replace("&", "&amp;").replace("<", "&lt;")
        return f"<table><caption>{caption}</caption><tr><th>layer</th>{head}</tr>{rows}</table>"

    # ---- parts

    def _combine(
        self,
        other: SparseMask,
        shapes: Mapping[Key, tuple[int, ...]],
        how: Callable[[Tensor, Tensor], Tensor],
    ) -> SparseMask:
        if not isinstance(other, SparseMask):
            return NotImplemented
        check_same_weights("The first mask", self.identity, "the second mask", other.identity)
        none = torch.empty(0, dtype=torch.int64)
        entries = {key: how(self.entries.get(key, none), other.entries.get(key, none)) for key in shapes}
        return SparseMask(self.identity, shapes, entries)


def _heads_of(heads: Collection[int | tuple[int, int]], layer: int) -> Int64[Tensor, " k"]:
    """The heads that are meant in a layer: a number is for all layers, a pair for its own."""
    pairs = [head if isinstance(head, tuple) else (layer, head) for head in heads]
    return torch.tensor(sorted(head for of, head in pairs if of == layer), dtype=torch.int64)


def _key(stored: str) -> Key:
    layer, _, matrix = stored.partition(".")
    return int(layer), matrix


def _span(mask: SparseMask) -> str:
    layers = {layer for layer, _ in mask.shapes}
    matrices = [matrix for matrix in MATRICES if any(key[1] == matrix for key in mask.shapes)]
    return f"{', '.join(matrices) or 'no matrix'} of {len(layers)} layer{'s' if len(layers) != 1 else ''}"
