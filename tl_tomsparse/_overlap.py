"""How much two masks have in common, against two random masks of the same sizes.

Jaccard = |A and B| / |A or B|
null: in each matrix of d entries that may be chosen, a of which are in A and b in B, a hypergeometric number
      in common; the sum over matrices by exact convolution
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray

from tl_tomsparse._checks import TomsparseError
from tl_tomsparse.mask import SparseMask


@dataclass(frozen=True)
class Overlap:
    """What two masks have in common.

    Attributes:
        common: entries of both.
        sizes: entries of each.
        expected: mean number in common of random masks with as many entries in each matrix.
        p: of at least as many in common by chance.
    """

    common: int
    sizes: tuple[int, int]
    expected: float
    p: float

    @property
    def jaccard(self) -> float:
        """Share of the entries of either that are in both; nan if both are empty."""
        either = sum(self.sizes) - self.common
        return self.common / either if either else float("nan")

    @property
    def expected_jaccard(self) -> float:
        """The same for the expected number in common."""
        either = sum(self.sizes) - self.expected
        return self.expected / either if either else float("nan")


def overlap(a: SparseMask, b: SparseMask, *, without: SparseMask | None = None) -> Overlap:
    """The overlap of two masks of the same weights.

    Args:
        a: has no entry of `without`.
        b: may have some; they are never in common.
        without: entries that `a` was kept out of, such as those of general text: chance, too, draws from the
            others alone. Otherwise masks that share nothing but what they leave out would seem alike.

    Raises:
        TomsparseError: they are of different weights, or `a` has entries of `without`.
    """
    from scipy.stats import hypergeom

    common = a & b
    apart = a - a if without is None else without
    if shared := len(a & apart):
        raise TomsparseError(f"The first mask has {shared} of the entries that it should be without.")
    inside = b - apart
    null: NDArray[np.float64] = np.ones(1)
    lowest, expected = 0, 0.0
    for key in common.entries:
        d = prod(a.shapes[key]) - len(apart.entries.get(key, ()))
        n_a, n_b = len(a.entries[key]), len(inside.entries[key])
        if not d:
            continue
        least, most = max(0, n_a + n_b - d), min(n_a, n_b)
        # Of logarithms, which scipy computes hundreds of times faster than the probabilities themselves.
        chances = np.exp(hypergeom(d, n_a, n_b).logpmf(np.arange(least, most + 1)))
        possible = np.flatnonzero(chances)  # the others are zero in float64: most, in a large matrix
        null = np.convolve(null, chances[possible[0] : possible[-1] + 1])
        lowest, expected = lowest + least + int(possible[0]), expected + n_a * n_b / d
    tail = float(null[max(0, len(common) - lowest) :].sum())
    return Overlap(len(common), (len(a), len(b)), expected, min(1.0, tail))
