"""Entries of random masks that have something in common with those of a given one.

    matrix, row, column, pair, magnitude, change    as many entries in each class of entries of each matrix
    total                                           as many over all matrices together

The classes: the whole matrix; an input channel; an output channel; a rotary pair of one head; entries of
about the same |W|; entries of about the same |W - mean of the matrix|, which is how much the edit "mean"
changes them. "About" (ours): entries are ranked, largest first, and rank r is in class
floor(2 log2(1 + r / 32)), so a class holds ranks within a factor of the square root of 2 of each other, and
never fewer than 14 entries, of which a few may be the given ones again.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from tl_tomsparse._channels import channels, flat_index, n_channels, name, order, place
from tl_tomsparse._checks import TomsparseError
from tl_tomsparse._draws import distinct, stream
from tl_tomsparse._model import Key, view

Match = Literal["matrix", "total", "row", "column", "pair", "magnitude", "change"]
Entries = Mapping[Key, Tensor]
Shapes = Mapping[Key, tuple[int, ...]]
NEED_MODEL = ("pair", "magnitude", "change")
_FINEST = 32  # ranks below which classes are no longer narrower


def draw_entries(entries: Entries, shapes: Shapes, seed: int, match: Match, model: Any) -> dict[Key, Tensor]:
    """Random flat indices of each matrix; see the module docstring.

    Raises:
        TomsparseError: a seed that is not a whole number from 0; "pair" and a matrix that is not rotated.
    """
    if match == "total":
        return _over_all(entries, shapes, seed)
    drawn = {}
    for key, index in entries.items():
        bits = stream(seed, get_args(Match).index(match), *order(key))
        if match == "matrix":
            drawn[key] = torch.from_numpy(distinct(bits, prod(shapes[key]), len(index)))
        elif match in ("row", "column"):
            drawn[key] = _in_channels(bits, key, shapes[key], index, match == "row")
        elif len(index):
            classes = _pairs(model, key) if match == "pair" else _ranks(model, key, match == "change")
            drawn[key] = _in_classes(bits, classes, index)
        else:
            drawn[key] = index
    return drawn


def _over_all(entries: Entries, shapes: Shapes, seed: int) -> dict[Key, Tensor]:
    ends = np.cumsum([prod(shape) for shape in shapes.values()])
    size = sum(map(len, entries.values()))
    bits = stream(seed, get_args(Match).index("total"))
    chosen = distinct(bits, int(ends[-1]) if len(ends) else 0, size)
    parts = np.split(chosen, np.searchsorted(chosen, ends[:-1]))
    starts = np.concatenate([[0], ends[:-1]])
    return {key: torch.from_numpy(part - start) for key, part, start in zip(shapes, parts, starts)}


def _in_channels(
    bits: np.random.PCG64, key: Key, shape: tuple[int, ...], index: Tensor, by_input: bool
) -> Int64[Tensor, " k"]:
    inputs, outputs = channels(key, shape, index)
    n_inputs, n_outputs = n_channels(key, shape)
    kept, others = (inputs, n_outputs) if by_input else (outputs, n_inputs)
    places, counts = kept.unique(return_counts=True)
    drawn = [distinct(bits, others, count) for count in counts.tolist()]
    free = torch.from_numpy(np.concatenate([np.empty(0, np.int64), *drawn]))
    fixed = places.repeat_interleave(counts)
    return flat_index(key, shape, *((fixed, free) if by_input else (free, fixed)))


def _in_classes(bits: np.random.PCG64, classes: Tensor, index: Tensor) -> Int64[Tensor, " k"]:
    """As many entries of each class as `index` has; `classes` has a number for every entry, from 0."""
    wanted, counts = classes[index].unique(return_counts=True)
    by_class = classes.argsort(stable=True)
    sizes = torch.bincount(classes)
    starts = sizes.cumsum(0) - sizes
    parts = [
        by_class[int(starts[one]) + torch.from_numpy(distinct(bits, int(sizes[one]), count))]
        for one, count in zip(wanted.tolist(), counts.tolist())
    ]
    return torch.cat(parts).sort().values


def _pairs(model: Any, key: Key) -> Tensor:
    """For every entry its rotary pair, counted over heads; dimensions that are not turned are a pair."""
    layer, matrix = key
    rotations, without = view(model).rotations
    if matrix not in ("Q", "K") or layer not in rotations:
        why = without.get(layer, "it is not rotated") if matrix in ("Q", "K") else "only Q and K are rotated"
        raise TomsparseError(
            f"match='pair' needs rotary pairs, which {name(key)} has not ({why}); restrict the mask to the Q "
            "and K of rotated layers, or match something else."
        )
    rotation, shape = rotations[layer], view(model).shape(key)
    n = len(rotation.frequencies)
    pair = torch.full((shape[-1],), n)
    for axes in (rotation.first, rotation.second):
        pair[axes.cpu()] = torch.arange(n)
    head, _, dimension = place(shape, torch.arange(prod(shape)))
    return head * (n + 1) + pair[dimension]


def _ranks(model: Any, key: Key, from_mean: bool) -> Tensor:
    """For every entry the class of its rank by size, largest first."""
    weight = view(model).weight(key).flatten().double().cpu()
    size = (weight - weight.mean() if from_mean else weight).abs()
    rank = torch.empty(len(size), dtype=torch.float64)
    rank[size.argsort(descending=True, stable=True)] = torch.arange(len(size), dtype=torch.float64)
    return (2 * torch.log2(1 + rank / _FINEST)).long()
