"""Knocking out attention heads, many at a time: designs, measurements, scores.

    out[m, h]    measurement m knocks out head h: its output z is replaced by 0, its mean, or another prompt's
    y[m]         the score then: a mean over questions of the margin (nats), of right answers, or your own

Many measurements with a few random heads each say which heads a score hangs on with fewer of them than there
are heads, if few matter (compressed sensing; arXiv 2603.03335). [`recover_heads`][] reads the effects from
them, [`locate_heads`][] does all of it with its controls.

NOT claimed: that a head whose output is replaced is what the model would be without it; zero and mean are
values that no prompt gives, and effects of heads that stand in for each other show only together.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from jaxtyping import Bool, Float

from tl_tomsparse._checks import TomsparseError, check_choice, check_positive
from tl_tomsparse._draws import stream
from tl_tomsparse._meter import KnockoutMeter
from tl_tomsparse._model import view

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "KnockoutDesign",
    "KnockoutMeter",
    "Knockouts",
    "Meter",
    "knockout_design",
    "measure_knockouts",
    "model_heads",
]

Head = tuple[int, int]
Kind = Literal["balanced", "stratified", "bernoulli"]


def head_name(head: Head) -> str:
    """The usual short name, such as L9H6."""
    return f"L{head[0]}H{head[1]}"


# ---- designs


@dataclass(frozen=True, eq=False)
class KnockoutDesign:
    """Which heads each measurement knocks out.

    Attributes:
        heads: (layer, head) of each column.
        out: `[n, heads]`, True where a measurement knocks out a head.
        kind: how it was drawn.
        share: of the heads that a measurement was to knock out.
        seed: of the draws.
    """

    heads: tuple[Head, ...] = field(repr=False)
    out: Bool[np.ndarray, "n heads"] = field(repr=False)
    kind: str
    share: float
    seed: int

    def __len__(self) -> int:
        """The number of measurements."""
        return len(self.out)

    def to_frame(self) -> pd.DataFrame:
        """One row a knocked-out head of a measurement: measurement, layer, head."""
        import pandas as pd

        measurement, column = np.nonzero(self.out)
        layers, heads = np.array(self.heads)[column].reshape(-1, 2).T
        return pd.DataFrame({"measurement": measurement, "layer": layers, "head": heads})


def model_heads(model: Any) -> tuple[Head, ...]:
    """Every attention head of a model as (layer, head), layer by layer.

    Raises:
        TomsparseError: a model of a kind that is not supported, or whose heads' outputs cannot be seen.
    """
    return tuple(view(model).heads)


def knockout_design(
    heads: Sequence[Head], n: int, *, share: float = 0.05, kind: Kind = "balanced", seed: int = 0
) -> KnockoutDesign:
    """Draw which heads each of `n` measurements knocks out.

    * "bernoulli": each head with probability `share`, on its own; a measurement without any is drawn again.
    * "stratified": `share` of the heads (one at least), those used least so far, ties at random.
    * "balanced": the same, ties going to those that were least often out together with the ones that the
      measurement has already. Every head is out equally often (to one), every two about equally often.

    Args:
        heads: (layer, head) pairs, as `model_heads(model)` gives them.
        n: measurements.
        share: of the heads that one measurement knocks out, above 0 and below 1.
        kind: "balanced", "stratified" or "bernoulli".
        seed: 0 or larger; the draws are the same on every platform.

    Raises:
        TomsparseError: no head or the same one twice, a share outside (0, 1), an unknown kind, n below 1.
    """
    heads = check_heads(heads)
    check_positive("n", n)
    check_share(share)
    check_choice("kind", kind, ("balanced", "stratified", "bernoulli"))
    bits = stream(seed, ("balanced", "stratified", "bernoulli").index(kind))
    out = np.zeros((n, len(heads)), dtype=bool)
    if kind == "bernoulli":
        below = np.uint64(min(int(share * 2.0**64), 2**64 - 1))
        for row in out:
            while not row.any():
                row[:] = bits.random_raw(len(heads)) < below
        return KnockoutDesign(heads, out, kind, share, seed)
    used = np.zeros(len(heads), dtype=np.int64)
    together = np.zeros((len(heads), len(heads)), dtype=np.int64)
    for row in out:
        if kind == "stratified":
            row[np.lexsort((bits.random_raw(len(heads)), used))[: n_out(share, heads)]] = True
        else:
            for _ in range(n_out(share, heads)):
                met = together[:, row].sum(1)
                row[np.lexsort((bits.random_raw(len(heads)), met, used, row))[0]] = True
            together += np.outer(row, row)
        used += row
    return KnockoutDesign(heads, out, kind, share, seed)


def n_out(share: float, heads: Sequence[Head]) -> int:
    """How many heads a share is; one at least, not all."""
    return min(max(1, round(share * len(heads))), max(1, len(heads) - 1))


def check_heads(heads: Iterable[Head]) -> tuple[Head, ...]:
    """Heads as sorted pairs; refuse none, and the same one twice."""
    found = sorted((int(layer), int(head)) for layer, head in heads)
    if not found:
        raise TomsparseError("heads is empty; pass (layer, head) pairs, for example model_heads(model).")
    if twice := next((a for a, b in pairwise(found) if a == b), None):
        raise TomsparseError(f"heads has {head_name(twice)} twice; give each head once.")
    return tuple(found)


def check_share(share: float) -> None:
    """Refuse what is no share of the heads."""
    if not 0.0 < share < 1.0:
        raise TomsparseError(
            f"share={share!r} is outside (0, 1); it is the share of the heads that a measurement knocks out."
        )


# ---- measurements


class Meter(Protocol):
    """What gives scores: a [`KnockoutMeter`][], or any function of a boolean array `[n, heads]` to `[n]`."""

    def __call__(self, out: Bool[np.ndarray, "n heads"], /) -> Float[np.ndarray, " n"]:
        """The score of each measurement, higher is better."""


@dataclass(frozen=True, eq=False)
class Knockouts:
    """Measurements: which heads were out, and the scores then.

    Attributes:
        design: which heads.
        scores: `[n]`, of each measurement.
        unedited: the score with no head out.
        name: of the score.
    """

    design: KnockoutDesign
    scores: Float[np.ndarray, " n"] = field(repr=False)
    unedited: float
    name: str = "score"

    def to_frame(self) -> pd.DataFrame:
        """One row a measurement: heads (names, joined by spaces), n_out, score, change (from unedited)."""
        import pandas as pd

        names = np.array([head_name(head) for head in self.design.heads])
        return pd.DataFrame(
            {
                "heads": [" ".join(names[row]) for row in self.design.out],
                "n_out": self.design.out.sum(1),
                "score": self.scores,
                "change": self.scores - self.unedited,
            }
        )


def measure_knockouts(meter: Meter, design: KnockoutDesign) -> Knockouts:
    """Measure every knock-out of a design.

    Args:
        meter: a [`KnockoutMeter`][]; or any function from a boolean array `[n, heads]` to scores `[n]`, for
            scores that it does not have.
        design: of the heads of the meter.

    Raises:
        TomsparseError: a design of other heads, or scores of another shape or not finite.
    """
    own = getattr(meter, "heads", design.heads)
    if tuple(own) != tuple(design.heads):
        raise TomsparseError(
            f"The design is of {len(design.heads)} heads and the meter of {len(own)}, or in another order; "
            "make it with knockout_design(meter.heads, ...)."
        )
    scores = call_meter(meter, np.concatenate([np.zeros((1, len(design.heads)), dtype=bool), design.out]))
    return Knockouts(design, scores[1:], float(scores[0]), str(getattr(meter, "name", "score")))


def call_meter(meter: Meter, out: Bool[np.ndarray, "n heads"]) -> Float[np.ndarray, " n"]:
    """Scores of a meter; refuse another shape, and what is not finite."""
    scores = np.asarray(meter(out), dtype=np.float64)
    if scores.shape != (len(out),):
        raise TomsparseError(
            f"The meter gave scores of shape {scores.shape} for {len(out)} measurements; it must give one "
            "number each."
        )
    if not np.isfinite(scores).all():
        which = int((~np.isfinite(scores)).argmax())
        raise TomsparseError(f"The score of measurement {which} is {scores[which]}, which is not finite.")
    return scores
