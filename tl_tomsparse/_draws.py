"""Uniform draws that are the same on every platform and with every version of numpy.

numpy keeps the raw 64-bit stream of PCG64 and its seeding for good, but not what `Generator.choice` makes of
them (NEP 19). So only the raw stream is used here, with rejection: exact, and a few lines.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Int64

from tl_tomsparse._checks import TomsparseError


def stream(seed: int, *place: int) -> np.random.PCG64:
    """A stream of random bits for a seed and a place (a layer and a matrix), independent of other places.

    Raises:
        TomsparseError: the seed is negative or not a whole number.
    """
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or seed < 0:
        raise TomsparseError(f"seed={seed!r} must be a whole number, 0 or larger.")
    return np.random.PCG64(np.random.SeedSequence([int(seed), *place]))


def below(bits: np.random.PCG64, high: int, n: int) -> Int64[np.ndarray, " n"]:
    """`n` independent uniform draws from 0 .. high - 1."""
    last = 2**64 // high * high - 1  # draws beyond it would favour small numbers
    drawn = np.empty(0, np.uint64)
    while len(drawn) < n:
        raw = np.atleast_1d(bits.random_raw(n - len(drawn)))
        drawn = np.concatenate([drawn, raw[raw <= np.uint64(last)]])
    return (drawn % np.uint64(high)).astype(np.int64)


def distinct(bits: np.random.PCG64, high: int, n: int) -> Int64[np.ndarray, " n"]:
    """A uniform subset of 0 .. high - 1 with `n` members, ascending."""
    if 2 * n > high:  # draw what is left out: fewer collisions
        left = np.ones(high, dtype=bool)
        left[distinct(bits, high, high - n)] = False
        return np.flatnonzero(left)
    drawn = np.empty(0, np.int64)
    while len(drawn) < n:  # as if drawn one by one, each repeat drawn again
        drawn = np.concatenate([drawn, below(bits, high, n - len(drawn))])
        drawn = drawn[np.sort(np.unique(drawn, return_index=True)[1])]
    return np.sort(drawn)
