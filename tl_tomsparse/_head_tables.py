"""The tables of a search for heads: dose, interactions, other ways to find heads, and the test."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tl_tomsparse import _head_search as search
from tl_tomsparse._intervals import ClusterBootstrap, Estimate
from tl_tomsparse.heads import Head, KnockoutMeter, Meter, call_meter, head_name

if TYPE_CHECKING:
    import pandas as pd


def dose(
    meter: Meter, n_heads: int, order: Sequence[int], random: Sequence[Sequence[int]]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Scores after 0, 1, 2, ... heads of an order, `[k + 1]`, and of random orders, `[n_random, k + 1]`."""
    k = len(order)
    own = [list(order[:n]) for n in range(k + 1)]
    others = [list(one[:n]) for one in random for n in range(k + 1)]
    scores = call_meter(meter, search.sets([*own, *others], n_heads))
    return scores[: k + 1], scores[k + 1 :].reshape(len(random), k + 1)


def path_table(
    meter: Meter, test: Meter | None, heads: tuple[Head, ...], order: list[int], random: list[list[int]]
) -> pd.DataFrame:
    import pandas as pd

    names = ["", *(head_name(heads[place]) for place in order)]
    frame = pd.DataFrame({"n_heads": np.arange(len(order) + 1), "head": names})
    for prefix, which in (("", meter), ("test_", test)):
        if which is not None:
            own, others = dose(which, len(heads), order, random)
            columns = {"score": own, "random": others.mean(0), "random_low": others.min(0)}
            columns["random_high"] = others.max(0)
            frame = frame.assign(**{prefix + name: values for name, values in columns.items()})
    return frame


def interactions_table(
    meter: Meter, heads: tuple[Head, ...], order: list[int], unedited: float
) -> pd.DataFrame:
    import pandas as pd

    rows = [
        {"a": head_name(heads[a]), "b": head_name(heads[b]), "y_a": y_a, "y_b": y_b, "y_ab": y_ab,
         "interaction": y_ab - y_a - y_b + unedited}
        for (a, b), (y_a, y_b, y_ab) in search.pairs(meter, order, len(heads)).items()
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=["a", "b", "y_a", "y_b", "y_ab", "interaction"])


def baselines(
    meter: Meter,
    n_heads: int,
    k: int,
    random: list[list[int]],
    wanted: Collection[str],
    n: int,
    seed: int,
) -> dict[str, tuple[list[list[int]], int]]:
    """For each way the sets of k heads that it finds (random ones are several), and its measurements."""
    ways: dict[str, tuple[list[list[int]], int]] = {}
    if "single" in wanted:
        lowest = np.argsort(search.single(meter, n_heads), kind="stable")[:k]
        ways["each head alone"] = [lowest.tolist()], n_heads
    if "greedy" in wanted:
        taken, _, spent = search.greedy(meter, range(n_heads), n_heads, k)
        ways["greedy search"] = [taken], spent
    if "thompson" in wanted:
        ways["Thompson sampling"] = [search.thompson(meter, n_heads, k, n, seed)], n
    if "random" in wanted:
        drawn = random if len(random[0]) >= k else search.random_orders(n_heads, k, len(random), seed)
        ways["random heads"] = [one[:k] for one in drawn], 0
    return ways


def methods_table(
    meter: Meter, test: Meter | None, heads: tuple[Head, ...], ways: Mapping[str, tuple[list[list[int]], int]]
) -> pd.DataFrame:
    import pandas as pd

    rows = []
    for method, (found, n) in ways.items():
        out = search.sets(found, len(heads))
        names = ", ".join(head_name(heads[place]) for place in found[0]) if len(found) == 1 else ""
        row = {
            "method": method,
            "n_measurements": n,
            "heads": names or f"{len(found)} sets of {len(found[0])}",
        }
        row["score"] = float(call_meter(meter, out).mean())
        row["test_score"] = float("nan") if test is None else float(call_meter(test, out).mean())
        rows.append(row)
    return pd.DataFrame(rows, columns=["method", "n_measurements", "heads", "score", "test_score"])


def change_table(
    meter: Meter, heads: tuple[Head, ...], confirmed: list[int], random: list[list[int]], seed: int
) -> pd.DataFrame:
    """See `HeadLocation.test`."""
    import pandas as pd

    columns = ["comparison", "value", "low", "high", "p", "as_low"]
    if not confirmed:
        return pd.DataFrame(columns=columns)
    sets = [[], confirmed, *(one[: len(confirmed)] for one in random)]
    out = search.sets(sets, len(heads))
    scores = call_meter(meter, out)
    as_low = int((scores[2:] <= scores[1]).sum())
    change, beyond = _estimates(meter, out, scores, seed)
    rows = [("change", change, float("nan")), ("beyond random", beyond, as_low)]
    return pd.DataFrame(
        [
            (name, one.value, one.low, one.high, one.p_below() if len(one.draws) else float("nan"), rank)
            for name, one, rank in rows
        ],
        columns=columns,
    )


def _estimates(
    meter: Meter, out: NDArray[np.bool_], scores: NDArray[np.float64], seed: int
) -> tuple[Estimate, Estimate]:
    """The change by the second row, and its change beyond the mean of those after it."""
    if not isinstance(meter, KnockoutMeter):
        nothing = np.zeros(0)
        values = (scores[1] - scores[0], scores[1] - scores[2:].mean())
        return tuple(Estimate(float(v), np.nan, np.nan, nothing) for v in values)  # type: ignore[return-value]
    items = meter.items(out)
    groups = meter.groups if items.shape[1] == len(meter.groups) else np.arange(items.shape[1])
    n_groups = int(groups.max()) + 1
    sums: NDArray[np.float64] = np.stack([np.bincount(groups, row, n_groups) for row in items], 1)
    counts = np.bincount(groups, minlength=n_groups).astype(np.float64)
    bootstrap = ClusterBootstrap(n_groups, seed=seed, smooth=False)
    terms = [(sums[:, 1], counts), (sums[:, 0], counts)]
    return bootstrap.contrast(terms), bootstrap.contrast([(sums[:, 1], counts), (sums[:, 2:], counts)])
