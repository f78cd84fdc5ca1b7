"""How much two masks have in common, against two random masks of the same sizes.

Jaccard = |A and B| / |A or B|
null: in each matrix of d entries, a of which are in A and b in B, a hypergeometric number in common;
      the sum over matrices by exact convolution
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray

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


def overlap(a: SparseMask, b: SparseMask) -> Overlap:
    """The overlap of two masks of the same weights.

    Raises:
        TomsparseError: they are of different weights.
    """
    from scipy.stats import hypergeom

    common = a & b
    null: NDArray[np.float64] = np.ones(1)
    lowest, expected = 0, 0.0
    for key, index in common.entries.items():
        d, n_a, n_b = prod(a.shapes[key]), len(a.entries[key]), len(b.entries[key])
        del index
        least, most = max(0, n_a + n_b - d), min(n_a, n_b)
        null = np.convolve(null, hypergeom(d, n_a, n_b).pmf(np.arange(least, most + 1)))
        lowest, expected = lowest + least, expected + n_a * n_b / d
    tail = float(null[max(0, len(common) - lowest) :].sum())
    return Overlap(len(common), (len(a), len(b)), expected, min(1.0, tail))
