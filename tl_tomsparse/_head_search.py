"""Other ways to find heads, and the confirmation of found ones: all of them by real knock-outs.

    single      y(h) for every head; the lowest
    greedy      the head that lowers the score most beside those taken already, again and again
    thompson    beliefs about additive effects, normal; each measurement knocks out the heads that are lowest
                in one draw from them, and corrects them
    random      heads in a random order

NOT claimed: that any of these finds the best set; that would take every subset.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from tl_tomsparse.heads import Meter, call_meter

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
_AT_ONCE = 8  # measurements between two corrections of the beliefs


def sets(columns: Sequence[Sequence[int]], n_heads: int) -> Bools:
    """One row a set of columns, True in them."""
    out = np.zeros((len(columns), n_heads), dtype=bool)
    for row, chosen in zip(out, columns):
        row[list(chosen)] = True
    return out


def single(meter: Meter, n_heads: int) -> Floats:
    """The score without each head alone."""
    return call_meter(meter, np.eye(n_heads, dtype=bool))


def greedy(meter: Meter, candidates: Sequence[int], n_heads: int, k: int) -> tuple[list[int], Floats, int]:
    """Heads in the order in which they lower the score most beside those before.

    Returns:
        up to k columns, the score after each, and how many measurements that took.
    """
    taken: list[int] = []
    scores: list[float] = []
    n = 0
    for _ in range(min(k, len(candidates))):
        left = [column for column in candidates if column not in taken]
        found = call_meter(meter, sets([[*taken, column] for column in left], n_heads))
        n += len(left)
        taken.append(left[int(found.argmin())])
        scores.append(float(found.min()))
    return taken, np.array(scores), n


def thompson(meter: Meter, n_heads: int, k: int, n: int, seed: int) -> list[int]:
    """The k heads that are believed to be needed most after n measurements of k heads each."""
    rng = np.random.default_rng(seed)
    first = min(n, 2 * _AT_ONCE)
    out = sets([rng.permutation(n_heads)[:k].tolist() for _ in range(first)], n_heads)
    scores = call_meter(meter, out)
    spread = float(scores.std()) or 1.0
    while len(scores) < n:
        mean, covariance = _beliefs(out, scores, spread, k)
        draws = rng.multivariate_normal(mean, covariance, min(_AT_ONCE, n - len(scores)), method="cholesky")
        new = sets(np.argsort(draws, 1, kind="stable")[:, :k].tolist(), n_heads)
        out = np.concatenate([out, new])
        scores = np.concatenate([scores, call_meter(meter, new)])
    found: list[int] = np.argsort(_beliefs(out, scores, spread, k)[0], kind="stable")[:k].tolist()
    return found


def _beliefs(out: Bools, scores: Floats, spread: float, k: int) -> tuple[Floats, Floats]:
    """Mean and covariance of effects: before, independent with variance spread^2 / k; noise spread^2 / 2."""
    x = np.concatenate([np.ones((len(out), 1)), out], 1)
    prior = np.full(x.shape[1], k / spread**2)
    prior[0] = 1e-6 / spread**2  # the score with no head out may be anything
    covariance = np.linalg.inv(np.diag(prior) + 2 * x.T @ x / spread**2)
    mean = covariance @ (2 * x.T @ scores / spread**2)
    return mean[1:], covariance[1:, 1:]


def random_orders(n_heads: int, k: int, n: int, seed: int) -> list[list[int]]:
    """Columns in n random orders, the first k of each."""
    rng = np.random.default_rng([seed, n_heads])
    return [rng.permutation(n_heads)[:k].tolist() for _ in range(n)]


def pairs(meter: Meter, columns: Sequence[int], n_heads: int) -> dict[tuple[int, int], tuple[float, ...]]:
    """For every two columns the scores without the first, the second and both."""
    found = list(combinations(columns, 2))
    alone = dict(zip(columns, call_meter(meter, sets([[c] for c in columns], n_heads))))
    if not found:
        return {}
    both = call_meter(meter, sets(found, n_heads))
    return {(a, b): (float(alone[a]), float(alone[b]), float(y)) for (a, b), y in zip(found, both)}
