"""Sparse effects of heads from measurements, and which of them are more than chance.

    y[m] = intercept + sum_h effect[h] out[m, h] + rest        few effects differ from 0

Solvers are scikit-learn's (Lasso with the penalty by cross-validation, by an information criterion or given;
orthogonal matching pursuit), and iterative hard thresholding, which it does not have:

    b <- the k largest of  b + mu X'(y - X b),     mu the step that is best on the heads chosen now

Chosen heads get least-squares effects, so that the penalty does not shrink them. Which heads are *found* does
not depend on the solver: step by step the head with the largest partial correlation is taken, as long as
fewer than 5 % of permutations of the residuals have a larger one (the largest of all heads; Freedman-Lane).
With nothing there, something is found in 5 % of cases.

NOT claimed: that the rest is noise. Scores of a model are exact; the rest is what heads do together, and all
tests take it as exchangeable between measurements.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tl_tomsparse._checks import TomsparseError, check_choice

Floats = NDArray[np.float64]
SolverName = Literal["lasso", "omp", "iht"]
Penalty = Literal["cv", "bic"] | float

_FOLDS = 5
_PATIENCE = 6  # numbers of heads tried beyond the best one so far
_ROUNDING = 1e-10  # share of the variance below which a residual is rounding


@dataclass(frozen=True)
class Solver:
    """A solver and how it chooses how many heads.

    Attributes:
        name: "lasso", "omp" or "iht".
        penalty: "cv", "bic" (Lasso only), or a number: for the Lasso alpha on standardised scores, for the
            others the number of heads.
        refit: give chosen heads least-squares effects instead of penalised ones.
    """

    name: SolverName = "lasso"
    penalty: Penalty = "cv"
    refit: bool = True

    def __post_init__(self) -> None:
        check_choice("solver", self.name, ("lasso", "omp", "iht"))
        if isinstance(self.penalty, str):
            check_choice("penalty", self.penalty, ("cv", "bic") if self.name == "lasso" else ("cv",))
        elif not self.penalty > 0 or (self.name != "lasso" and self.penalty != int(self.penalty)):
            raise TomsparseError(
                f"penalty={self.penalty!r} does not fit solver {self.name!r}: 'cv', "
                f"{'a number above 0' if self.name == 'lasso' else 'or a whole number of heads'}."
            )

    def fixed(self, out: NDArray[np.bool_], scores: Floats, seed: int) -> Solver:
        """The same with its penalty chosen on these measurements."""
        if not isinstance(self.penalty, str):
            return self
        x, y = _standard(out, scores)[:2]
        if self.name == "lasso":
            return replace(self, penalty=self._lasso(x, y, seed)[1])
        most = min(x.shape[1], max(1, len(x) // 4))
        return replace(self, penalty=max(1, self._count(x, y, most, seed)))

    def effects(self, out: NDArray[np.bool_], scores: Floats, seed: int) -> Floats:
        """The effect of each head on the score, 0 where it is not chosen."""
        x, y, scale = _standard(out, scores)
        if scale == 0.0:
            return np.zeros(x.shape[1])
        if self.name == "lasso":
            coefficients = self._lasso(x, y, seed)[0]
        else:
            k = self.penalty
            if isinstance(k, str):
                k = self._count(x, y, min(x.shape[1], max(1, len(x) // 4)), seed)
            coefficients = _greedy(self.name, x, y, int(k))
        chosen = np.flatnonzero(coefficients)
        if self.refit and 0 < len(chosen) < len(x) / 2:
            coefficients = coefficients.copy()
            coefficients[chosen] = np.linalg.lstsq(x[:, chosen], y, rcond=None)[0]
        return coefficients * scale

    def _lasso(self, x: Floats, y: Floats, seed: int) -> tuple[Floats, float]:
        """Coefficients, and the penalty that they belong to."""
        from sklearn.linear_model import Lasso, LassoCV, LassoLarsIC
        from sklearn.model_selection import KFold

        top = float(np.abs(x.T @ y).max()) / len(x)
        if not top > 0:
            return np.zeros(x.shape[1]), 1.0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of slow convergence at the smallest penalties
            if not isinstance(self.penalty, str):
                alpha = float(self.penalty)
                return Lasso(alpha=alpha, max_iter=5000).fit(x, y).coef_, alpha
            folds = KFold(_FOLDS, shuffle=True, random_state=seed)
            grid = top * np.geomspace(1.001, 0.01, 30)
            fit = LassoCV(alphas=grid, cv=folds, max_iter=5000, tol=1e-3).fit(x, y)
            if self.penalty == "cv":
                return fit.coef_, float(fit.alpha_)
            rest = y - x @ fit.coef_ - fit.intercept_
            freedom = max(1, len(y) - 1 - int(np.count_nonzero(fit.coef_)))
            variance = max(float(rest @ rest) / freedom, _ROUNDING)
            lars = LassoLarsIC(criterion="bic", noise_variance=variance, max_iter=len(y)).fit(x, y)
            return lars.coef_, max(float(lars.alpha_), 1e-6 * top)

    def _count(self, x: Floats, y: Floats, most: int, seed: int) -> int:
        """The number of heads that predicts best, by cross-validation."""
        from sklearn.model_selection import KFold

        splits = list(KFold(_FOLDS, shuffle=True, random_state=seed).split(x))
        errors = [sum(((y[test] - y[train].mean()) ** 2).sum() for train, test in splits)]
        for k in range(1, most + 1):
            error = 0.0
            for train, test in splits:
                middle = y[train].mean()
                b = _greedy(self.name, x[train], y[train] - middle, k)
                chosen = np.flatnonzero(b)
                if len(chosen):
                    b[chosen] = np.linalg.lstsq(x[train][:, chosen], y[train] - middle, rcond=None)[0]
                error += ((y[test] - middle - x[test] @ b) ** 2).sum()
            errors.append(error)
            if k - int(np.argmin(errors)) >= _PATIENCE:
                break
        return int(np.argmin(errors))


def _standard(out: NDArray[np.bool_], scores: Floats) -> tuple[Floats, Floats, float]:
    """Centred columns, standardised scores, and their standard deviation (0 where it is rounding)."""
    x = out.astype(np.float64)
    x -= x.mean(0)
    y = scores - scores.mean()
    scale = float(y.std())
    if scale <= _ROUNDING * float(np.abs(scores).max()):
        return x, np.zeros_like(y), 0.0
    return x, y / scale, scale


def _greedy(name: str, x: Floats, y: Floats, k: int) -> Floats:
    k = min(k, x.shape[1], len(x))
    if k == 0 or not np.abs(x.T @ y).max() > 0:
        return np.zeros(x.shape[1])
    return _omp(x, y, k) if name == "omp" else _iht(x, y, k)


def _omp(x: Floats, y: Floats, k: int) -> Floats:
    from sklearn.linear_model import orthogonal_mp

    norm = np.linalg.norm(x, axis=0)
    norm[norm == 0] = 1.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of an early end, when nothing is left
        found: Floats = orthogonal_mp(x / norm, y, n_nonzero_coefs=k) / norm
    return found


def _iht(x: Floats, y: Floats, k: int, steps: int = 100) -> Floats:
    """Normalised iterative hard thresholding with k heads."""
    b = np.zeros(x.shape[1])
    chosen = np.argsort(-np.abs(x.T @ y), kind="stable")[:k]
    for _ in range(steps):
        gradient = x.T @ (y - x @ b)
        along = np.zeros_like(b)
        along[chosen] = gradient[chosen]
        length = float(((x @ along) ** 2).sum())
        if length <= _ROUNDING:
            break
        b_new = b + float(along @ along) / length * gradient
        kept = np.argsort(-np.abs(b_new), kind="stable")[:k]
        small = np.ones(len(b), dtype=bool)
        small[kept] = False
        b_new[small] = 0.0
        done = bool(np.abs(b_new - b).max() <= 1e-8 * np.abs(b_new).max())
        b, chosen = b_new, kept
        if done:
            break
    return b


@dataclass(frozen=True, eq=False)
class Tested:
    """What is more than chance.

    Attributes:
        found: columns, in the order in which they were taken.
        p: of each of them, and last of the first that was not.
        estimate: least-squares effect of each head beside the found ones.
        half_width: of the simultaneous 95 % interval of each.
    """

    found: tuple[int, ...]
    p: tuple[float, ...]
    estimate: Floats
    half_width: Floats


def step_down(
    out: NDArray[np.bool_], scores: Floats, *, level: float, n_permutations: int, seed: int
) -> Tested:
    """Take heads one by one, as long as the next one is more than chance."""
    rng = np.random.default_rng(seed)
    x = out.astype(np.float64)
    x -= x.mean(0)
    y = scores - scores.mean()
    n, n_heads = x.shape
    total = float(y @ y)
    found: list[int] = []
    p_values: list[float] = []
    critical = 0.0
    while True:
        rest, others, norm = _beside(x, y, found)
        if float(rest @ rest) <= _ROUNDING * max(total, float((scores**2).sum()) * _ROUNDING):
            critical = 0.0
            break  # nothing is left to explain
        alive = np.where(norm > 1e-6, norm, np.inf)  # a column that the found ones explain tells nothing
        correlation = np.abs(others.T @ rest) / (alive * np.linalg.norm(rest))
        shuffled = np.stack([rng.permutation(rest) for _ in range(n_permutations)], 1)
        basis = _basis(x, found)
        left = shuffled - basis @ (basis.T @ shuffled)
        largest = (np.abs(others.T @ shuffled) / alive[:, None]).max(0) / np.linalg.norm(left, axis=0)
        top = int(correlation.argmax())
        p = (1 + int((largest >= correlation[top]).sum())) / (1 + n_permutations)
        p_values.append(p)
        critical = min(float(np.quantile(largest, 1 - level)), 1 - 1e-9)
        if p > level or len(found) >= min(n_heads, n // 4):
            break
        found.append(top)
    freedom = max(1, n - 1 - len(found))
    rest, others, norm = _beside(x, y, found)
    sigma = float(np.sqrt(rest @ rest / freedom))
    estimate = np.where(norm > 1e-6, others.T @ rest / np.maximum(norm, 1e-6) ** 2, 0.0)
    for head in found:
        without = [other for other in found if other != head]
        own_rest, own_others, own_norm = _beside(x, y, without)
        estimate[head] = own_others[:, head] @ own_rest / own_norm[head] ** 2
        norm[head] = own_norm[head]
    width = critical * np.sqrt(freedom / (1 - critical**2)) * sigma / np.maximum(norm, 1e-6)
    width[norm <= 1e-6] = np.inf
    return Tested(tuple(found), tuple(p_values), estimate, width)


def _basis(x: Floats, chosen: list[int]) -> Floats:
    """Orthonormal columns that span the constant and the chosen ones."""
    ones = np.ones((len(x), 1)) / np.sqrt(len(x))
    return np.linalg.qr(np.concatenate([ones, x[:, chosen]], 1))[0]


def _beside(x: Floats, y: Floats, chosen: list[int]) -> tuple[Floats, Floats, Floats]:
    """What the chosen columns leave of the scores and of each column, and the length of the latter."""
    basis = _basis(x, chosen)
    others = x - basis @ (basis.T @ x)
    return y - basis @ (basis.T @ y), others, np.linalg.norm(others, axis=0)
