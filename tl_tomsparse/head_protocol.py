"""The protocol of arXiv 2603.03335 by name, and heads crossed with the weights of a sparse mask.

    paper       100 measurements, 2 % of the heads out in each, those used least so far first; Lasso with
                alpha 0.01 on standardised scores; heads with the most negative coefficients; dose curve
    crossed     share of a mask's weights that lie in the heads, against random masks and random heads; what
                the mask does in these heads alone and outside of them; what that does to their attention

Added to the paper's (ours): heads are found on other prompts than the reported ones, draws are seeded, and
beside the dose curve stand random heads, other tasks and at least two forms of the answer: a head that only
writes one form is needed for that form alone.

NOT claimed: that a head and the mask's weights in it have the same function. Knocking a head out is a far
larger change than editing some of its weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from tl_tomsparse import _head_search as search
from tl_tomsparse._checks import TomsparseError, check_positive, check_same_weights
from tl_tomsparse._head_claims import crossed_claims, protocol_claims
from tl_tomsparse._head_solvers import Solver
from tl_tomsparse._head_tables import dose
from tl_tomsparse._model import view
from tl_tomsparse.edit import SparseEdit
from tl_tomsparse.heads import (
    Head,
    KnockoutMeter,
    Knockouts,
    Meter,
    check_heads,
    knockout_design,
    measure_knockouts,
)
from tl_tomsparse.mask import SparseMask
from tl_tomsparse.position import position_effects
from tl_tomsparse.samples import Samples
from tl_tomsparse.stories.story import Category
from tl_tomsparse.verdict import Claim

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "HeadsAndMask",
    "PaperProtocol",
    "head_tasks",
    "heads_and_mask",
    "mask_in_heads",
    "paper_protocol",
]


def head_tasks(
    meter: KnockoutMeter, categories: Sequence[Category] = ("false_belief", "true_belief")
) -> dict[str, KnockoutMeter]:
    """The scores of one measurement by task; none of them costs another measurement.

    First the questions of `categories` together, then those of each form of the answer that is asked, then
    every other category. False and true beliefs are taken together by default: a model that prefers, say, the
    first place that was named gains in the one what it loses in the other.

    Raises:
        TomsparseError: a meter of text, or one that asks none of these categories.
    """
    asked = meter.questions()
    own = None if asked is None else asked[asked.category.isin(list(categories))]
    if asked is None or own is None or own.empty:
        raise TomsparseError(
            f"The meter asks no question of the categories {', '.join(categories)}; make it from stories "
            "that do."
        )
    main = " + ".join(name for name in categories if (own.category == name).any())
    tasks = {main: meter.scoring(categories=categories)}
    for form in dict.fromkeys(own.form):
        tasks[f"{main}, {form}"] = meter.scoring(categories=categories, forms=[form])
    for other in dict.fromkeys(asked.category):
        if other not in categories:
            tasks[other] = meter.scoring(categories=[other])
    return tasks


@dataclass(frozen=True, eq=False)
class PaperProtocol:
    """What the paper's protocol gives.

    Attributes:
        heads: with the most negative coefficients, the most negative first; may be fewer than asked for.
        coefficients: one row a head: layer, head, coefficient (standardised scores).
        knockouts: the measurements.
        dose: one row a task and number of heads, from 0: task, n_heads, score, and of random heads of equal
            number random, random_low, random_high (mean and range).
        claims: in words.
    """

    heads: tuple[Head, ...]
    coefficients: pd.DataFrame = field(repr=False)
    knockouts: Knockouts = field(repr=False)
    dose: pd.DataFrame = field(repr=False)
    claims: tuple[Claim, ...] = field(repr=False)


def paper_protocol(
    meter: Meter,
    test: Mapping[str, Meter],
    *,
    heads: Sequence[Head] | None = None,
    n: int = 100,
    share: float = 0.02,
    alpha: float = 0.01,
    max_heads: int = 5,
    n_random: int = 20,
    seed: int = 0,
) -> PaperProtocol:
    """Find heads as arXiv 2603.03335 does, and knock them out one after the other on test data.

    Args:
        meter: the score on calibration prompts.
        test: scores on other prompts by task, the first one the task that the heads are of;
            `head_tasks(meter_of_test_stories)` gives them, with forms of the answer and other categories.
        heads: (layer, head) of each column; the meter's by default.
        n: measurements.
        share: of the heads that each knocks out.
        alpha: the Lasso's penalty on standardised scores.
        max_heads: the longest dose.
        n_random: random orders of heads to compare with.
        seed: of the design and the random orders.

    Raises:
        TomsparseError: no test task; a function as meter without heads; numbers out of range.
    """
    import pandas as pd

    for name, count in (("max_heads", max_heads), ("n_random", n_random)):
        check_positive(name, count)
    if not test:
        raise TomsparseError("test is empty; pass scores on other prompts, for example head_tasks(meter).")
    given = getattr(meter, "heads", heads)
    if given is None:
        raise TomsparseError("The meter is a function, so pass heads=[(layer, head), ...], one a column.")
    columns = check_heads(given)
    solver = Solver("lasso", alpha, refit=False)
    design = knockout_design(columns, n, share=share, kind="stratified", seed=seed)
    knockouts = measure_knockouts(meter, design)
    effects = solver.effects(design.out, knockouts.scores, seed)
    scale = float(knockouts.scores.std()) or 1.0
    layers, numbers = np.array(columns).T
    table = pd.DataFrame({"layer": layers, "head": numbers, "coefficient": effects / scale})
    order = [int(c) for c in np.argsort(effects, kind="stable")[:max_heads] if effects[c] < 0]
    random = search.random_orders(len(columns), max(1, len(order)), n_random, seed)
    frames = []
    for task, which in test.items():
        own, others = dose(which, len(columns), order, random)
        frame = pd.DataFrame({"task": task, "n_heads": np.arange(len(order) + 1), "score": own})
        frame["random"], frame["random_low"] = others.mean(0), others.min(0)
        frames.append(frame.assign(random_high=others.max(0)))
    curves = pd.concat(frames, ignore_index=True)
    found = tuple(columns[c] for c in order)
    return PaperProtocol(found, table, knockouts, curves, protocol_claims(found, curves, n_random))


@dataclass(frozen=True, eq=False)
class HeadsAndMask:
    """A mask's weights inside and outside of some heads.

    Attributes:
        heads: that it was crossed with.
        overlap: one row a matrix and "all": matrix, entries (of the mask, in matrices with heads), in_heads,
            share, of random masks of equal size a matrix random, random_low, random_high and p_random, of as
            many random heads heads_mean, heads_low, heads_high and p_heads (shares; p of "not more").
        effect: one row an arm: arm ("unedited", "mask", "in heads", "elsewhere", "random": as many random
            entries as in the heads), n_weights, score, for "random" low and high (range).
        position: rows of `PositionEffects.heads` of these heads, under the mask's weights in them; empty
            without samples, or where the mask has no weight there.
        claims: in words.
    """

    heads: tuple[Head, ...]
    overlap: pd.DataFrame = field(repr=False)
    effect: pd.DataFrame = field(repr=False)
    position: pd.DataFrame = field(repr=False)
    claims: tuple[Claim, ...] = field(repr=False)


def mask_in_heads(model: Any, mask: SparseMask, heads: Sequence[Head]) -> SparseMask:
    """The entries of a mask in these heads: of Q and O in the head, of K and V in its key-value head.

    Args:
        model: that the mask was made from.
        mask: any.
        heads: (layer, query head) pairs.
    """
    seen = view(model)
    group = max(1, seen.n_heads // seen.n_kv_heads)
    shared = sorted({(layer, head // group) for layer, head in heads})
    return mask.restrict(matrices=("Q", "O"), heads=list(heads)) | mask.restrict(
        matrices=("K", "V"), heads=shared
    )


def heads_and_mask(
    model: Any,
    mask: SparseMask,
    heads: Sequence[Head],
    meter: KnockoutMeter,
    *,
    samples: Samples | None = None,
    n_random: int = 20,
    seed: int = 0,
    batch_tokens: int | None = None,
    show_progress: bool = True,
) -> HeadsAndMask:
    """Cross found heads with a sparse mask of weights.

    Args:
        model: unedited; the one that mask and meter were made from.
        mask: of weights, in Q, K, V or O at least one.
        heads: (layer, query head) pairs, for example `locate_heads(...).heads`.
        meter: the score under edits; nothing is knocked out.
        samples: rows for position effects; None leaves them out.
        n_random: random masks, and random sets of heads.
        seed: of both.
        batch_tokens: most tokens in one batch of `samples`.
        show_progress: a progress bar over the edits of `samples`.

    Raises:
        TomsparseError: a mask of other weights, or without a weight in Q, K, V, O; no heads.
    """
    import pandas as pd

    check_positive("n_random", n_random)
    heads = check_heads(heads)
    seen = view(model)
    check_same_weights("The mask", mask.identity, "the model", seen.identity())
    whole = mask.restrict(matrices=("Q", "K", "V", "O"))
    if not len(whole):
        raise TomsparseError("The mask has no weight in Q, K, V or O, so none of it can lie in a head.")
    inside = mask_in_heads(model, whole, heads)
    elsewhere = whole - inside
    drawn = [whole.random_like(number) for number in range(seed, seed + n_random)]
    orders = search.random_orders(len(seen.heads), len(heads), n_random, seed)
    sets = [[seen.heads[column] for column in order] for order in orders]
    overlap = _overlap(model, whole, heads, drawn, sets)
    arms: dict[str, list[SparseMask]] = {"mask": [whole], "in heads": [inside], "elsewhere": [elsewhere]}
    arms["random"] = [inside.random_like(number) for number in range(seed, seed + n_random)]
    score = float(meter.current_items(model).mean())
    rows = [{"arm": "unedited", "n_weights": 0, "score": score, "low": np.nan, "high": np.nan}]
    for arm, masks in arms.items():
        values = []
        for one in masks:
            with SparseEdit.mean(model, one).applied(model):
                values.append(float(meter.current_items(model).mean()))
        ends = (min(values), max(values)) if arm == "random" else (np.nan, np.nan)
        row = {"arm": arm, "n_weights": len(masks[0]), "score": float(np.mean(values))}
        rows.append({**row, "low": ends[0], "high": ends[1]})
    effect = pd.DataFrame(rows)
    position = pd.DataFrame()
    if samples is not None and len(inside):
        found = position_effects(
            model, samples, {"in heads": SparseEdit.mean(model, inside)}, n_random=n_random, seed=seed,
            batch_tokens=batch_tokens, show_progress=show_progress,
        )  # fmt: skip
        pairs = zip(found.heads.layer, found.heads["head"])
        position = found.heads[[pair in heads for pair in pairs]].reset_index(drop=True)
    claims = crossed_claims(heads, overlap, effect, meter.name, n_random)
    return HeadsAndMask(heads, overlap, effect, position, claims)


def _overlap(
    model: Any,
    mask: SparseMask,
    heads: tuple[Head, ...],
    drawn: Sequence[SparseMask],
    sets: Sequence[list[Head]],
) -> pd.DataFrame:
    import pandas as pd

    def count(of: SparseMask, where: Sequence[Head]) -> pd.Series:
        found = mask_in_heads(model, of, where).counts("matrix")
        return pd.concat([found, pd.Series({"all": found.sum()})])

    own = count(mask, heads)
    total = mask.counts("matrix")
    total = pd.concat([total, pd.Series({"all": total.sum()})])
    masks = pd.DataFrame([count(one, heads) for one in drawn])
    others = pd.DataFrame([count(mask, where) for where in sets])
    rows = []
    for matrix, entries in total[total > 0].items():
        row: dict[str, Any] = {"matrix": matrix, "entries": int(entries), "in_heads": int(own.get(matrix, 0))}
        row["share"] = row["in_heads"] / entries
        for prefix, p_name, table in (("random", "p_random", masks), ("heads", "p_heads", others)):
            found = table[matrix].fillna(0) if matrix in table else pd.Series(np.zeros(len(table)))
            mean = "random" if prefix == "random" else "heads_mean"
            row |= {mean: found.mean() / entries, f"{prefix}_low": found.min() / entries}
            row |= {f"{prefix}_high": found.max() / entries}
            row[p_name] = (1 + int((found >= row["in_heads"]).sum())) / (1 + len(found))
        rows.append(row)
    return pd.DataFrame(rows)
