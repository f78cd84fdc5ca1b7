"""Which heads a score hangs on: pilot, measurements until they are enough, confirmation, controls, verdict.

    pilot       the share of heads out, by held-out R^2
    measure     knock-outs in steps until `recover_heads` says that more are not needed
    confirm     found heads are knocked out for real, the one first that lowers the score most, and so on;
                every two of them alone and together: interaction = y(ab) - y(a) - y(b) + y(none)
    controls    random heads of equal number; each head alone; greedy search; Thompson sampling
    test        the same knock-outs on prompts that nothing was chosen on

NOT claimed: that these are all heads that take part. A head that others stand in for has no effect of its
own, and "found" means more than chance at this number of measurements.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from math import comb
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from tl_tomsparse import _head_search as search
from tl_tomsparse import _head_tables as tables
from tl_tomsparse._checks import TomsparseError, check_choice, check_positive
from tl_tomsparse._head_claims import claims_of
from tl_tomsparse._head_solvers import Penalty, Solver, SolverName
from tl_tomsparse.heads import (
    Head,
    Kind,
    KnockoutDesign,
    Knockouts,
    Meter,
    check_heads,
    check_share,
    head_name,
    knockout_design,
    measure_knockouts,
    n_out,
)
from tl_tomsparse.recovery import FEWEST, HeadEffects, held_out_r2, recover_heads
from tl_tomsparse.verdict import Claim

if TYPE_CHECKING:
    import pandas as pd

Baseline = Literal["random", "single", "greedy", "thompson"]
BASELINES: tuple[Baseline, ...] = ("random", "single", "greedy", "thompson")
SHARES = (0.02, 0.05, 0.1, 0.2)
_PILOT_FOLDS = 5


@dataclass(frozen=True, eq=False)
class HeadLocation:
    """The heads that a score hangs on, and what that claim rests on.

    Attributes:
        heads: confirmed ones, in the order in which knocking them out lowers the score most; may be empty.
        effects: what the measurements say about each head.
        knockouts: the measurements.
        pilot: one row a share: share, n_out (heads out a measurement), r2, low, high (held-out R^2 and its
            bootstrap 95 %), chosen; empty where the share was given.
        path: one row a number of heads, from 0: n_heads, head (the last one), score, and of random heads of
            equal number random, random_low, random_high (mean and range); with test prompts the same four
            with `test_`.
        interactions: one row a pair of the heads on the path: a, b, y_a, y_b, y_ab (scores), interaction.
        methods: one row a way to find as many heads: method, n_measurements, heads, score, test_score.
        test: on the test prompts (or, without, on the same ones), the change of the score by the confirmed
            heads, and beyond random ones of equal number: rows "change" and "beyond random"; value, low, high
            (bootstrap 95 % by story, random sets drawn again), p. Empty where no head is confirmed.
        claims: in words.
        meta: how it was made, and how many measurements each stage took.
    """

    heads: tuple[Head, ...]
    effects: HeadEffects
    knockouts: Knockouts = field(repr=False)
    pilot: pd.DataFrame = field(repr=False)
    path: pd.DataFrame = field(repr=False)
    interactions: pd.DataFrame = field(repr=False)
    methods: pd.DataFrame = field(repr=False)
    test: pd.DataFrame = field(repr=False)
    claims: tuple[Claim, ...] = field(repr=False)
    meta: dict[str, Any] = field(repr=False)

    def to_frame(self) -> pd.DataFrame:
        """One row a head; see [`HeadEffects`][]."""
        return self.effects.to_frame()

    def __repr__(self) -> str:
        names = ", ".join(map(head_name, self.heads)) or "none"
        return f"HeadLocation({names}; {self.effects!r})"


def locate_heads(
    meter: Meter,
    *,
    heads: Sequence[Head] | None = None,
    test: Meter | None = None,
    share: float | None = None,
    shares: Sequence[float] = SHARES,
    kind: Kind = "balanced",
    solver: SolverName = "lasso",
    penalty: Penalty = "cv",
    n_pilot: int = 40,
    step: int = 50,
    most: int | None = None,
    max_heads: int = 5,
    smallest: float | None = None,
    n_random: int = 20,
    baselines: Collection[Baseline] = BASELINES,
    seed: int = 0,
) -> HeadLocation:
    """Find the heads that a score hangs on, confirm them, and compare with other ways to find heads.

    Measurements are looked at after every `step`; the error level of 0.05 is divided among all looks, so that
    where nothing is there, something is found in at most 5 % of cases.

    Args:
        meter: gives scores, on prompts to find heads with; a [`KnockoutMeter`][] or any function.
        heads: (layer, head) of each column; the meter's by default.
        test: the same score on other prompts, which nothing is chosen on.
        share: of the heads that one measurement knocks out; by default chosen by a pilot.
        shares: that the pilot tries, where there are at least ten different sets of so many heads: the
            smallest one whose held-out R^2 is within a standard error of the best is chosen.
        kind: of the design; see `knockout_design`.
        solver: see `recover_heads`.
        penalty: see `recover_heads`.
        n_pilot: measurements of each share; those of the chosen one count on.
        step: measurements between two looks.
        most: measurements after which no more are made, the pilot of the chosen share included; by default
            four a head, from 120 to 400.
        max_heads: most heads to confirm.
        smallest: the smallest effect of one head that matters, in units of the score; by default a tenth of
            the unedited score. A head is confirmed while it lowers the score by this.
        n_random: random sets of heads of each number; a claim needs at least 19.
        baselines: other ways to compare with: "random", "single" (one measurement a head), "greedy" (as many
            for each head taken), "thompson" (as many measurements as were made here). The last two only where
            heads are confirmed.
        seed: of everything drawn.

    Raises:
        TomsparseError: so few heads that there are no ten sets of them; no heads for a meter that is a
            function; a test meter of other heads; a number or share out of range; scores that are not finite.
    """
    given = getattr(meter, "heads", None) if heads is None else heads
    if given is None:
        raise TomsparseError("The meter is a function, so pass heads=[(layer, head), ...], one a column.")
    heads = check_heads(given)
    if most is None:
        most = max(n_pilot, min(400, max(120, 4 * len(heads))))
    for name, count in (("n_pilot", n_pilot), ("step", step), ("most", most), ("max_heads", max_heads)):
        check_positive(name, count)
    check_positive("n_random", n_random)
    for name in baselines:
        check_choice("baselines", name, BASELINES)
    if n_pilot < 2 * _PILOT_FOLDS or most < n_pilot:
        raise TomsparseError(
            f"n_pilot={n_pilot} and most={most}: use at least {2 * _PILOT_FOLDS} measurements in the pilot, "
            "and no fewer in all."
        )
    if test is not None and tuple(getattr(test, "heads", heads)) != heads:
        raise TomsparseError("The test meter has other heads; make it from the same model.")
    chosen = Solver(solver, penalty)
    first, pilot = _pilot(meter, heads, chosen, share, shares, kind, n_pilot, seed)
    knockouts, effects = _until_enough(meter, first, chosen, kind, step, most, smallest, seed)
    unedited = knockouts.unedited
    smallest = 0.1 * abs(unedited) if smallest is None else smallest
    column = {head: place for place, head in enumerate(heads)}
    found = set(effects.found)
    candidates = [column[head] for head in effects.ranked() if head in found][: 2 * max_heads]
    order, scores, n_confirm = search.greedy(meter, candidates, len(heads), max_heads)
    falls = -np.diff([unedited, *scores])
    n_confirmed = int(np.argmin([*(falls >= max(smallest, 1e-12)), False]))
    random = search.random_orders(len(heads), max(1, len(order)), n_random, seed)
    path = tables.path_table(meter, test, heads, order, random)
    interactions = tables.interactions_table(meter, heads, order, unedited)
    k = n_confirmed or min(max_heads, len(heads) - 1)
    confirmed = order[:n_confirmed]
    n_spent = len(knockouts.design) + 1
    counts = {
        "pilot": int(pilot.n_measurements.sum()) if len(pilot) else 0,
        "measured": len(knockouts.design),
        "confirm": n_confirm,
    }
    ways: dict[str, tuple[list[list[int]], int]] = {}
    if confirmed:
        unused = counts["pilot"] - (n_pilot if len(pilot) else 0)
        ways["compressed sensing"] = [confirmed], n_spent + unused + n_confirm
    else:  # nothing to compare with: only what costs little
        baselines = [name for name in baselines if name in ("single", "random")]
    ways |= tables.baselines(meter, len(heads), k, random, baselines, n_spent, seed)
    methods = tables.methods_table(meter, test, heads, ways)
    tested = tables.change_table(meter if test is None else test, heads, confirmed, random, seed)
    meta = {
        "share": knockouts.design.share,
        "kind": kind,
        "seed": seed,
        "n_random": n_random,
        "n_heads": len(heads),
        "n_measurements": counts,
        "smallest": smallest,
        "separate_test": test is not None and test is not meter,
        "score": knockouts.name,
        "prefix": getattr(meter, "refusal", None),
    }
    located = tuple(heads[place] for place in confirmed)
    claims = claims_of(located, effects, interactions, tested, meta)
    pilot = pilot.drop(columns="n_measurements", errors="ignore")
    return HeadLocation(located, effects, knockouts, pilot, path, interactions, methods, tested, claims, meta)


def _pilot(
    meter: Meter,
    heads: tuple[Head, ...],
    solver: Solver,
    share: float | None,
    shares: Sequence[float],
    kind: Kind,
    n: int,
    seed: int,
) -> tuple[Knockouts, pd.DataFrame]:
    """The measurements at the chosen share, and the table of all shares."""
    import pandas as pd

    if share is not None:
        return measure_knockouts(
            meter, knockout_design(heads, n, share=share, kind=kind, seed=seed)
        ), pd.DataFrame()
    shares = with_enough_sets(heads, shares)
    rows: list[dict[str, Any]] = []
    tried: dict[int, Knockouts] = {}
    for each in sorted(shares):
        count = n_out(each, heads)
        if count in tried:
            continue
        design = knockout_design(heads, n, share=each, kind=kind, seed=seed)
        tried[count] = measure_knockouts(meter, design)
        r2, low, high = held_out_r2(tried[count], solver, folds=_PILOT_FOLDS, seed=seed)
        rows.append({"share": each, "n_out": count, "n_measurements": n, "r2": r2, "low": low, "high": high})
    table = pd.DataFrame(rows)
    if table.r2.isna().all():  # the score never changes: the more is out, the more that says
        best = len(table) - 1
    else:
        top = table.loc[table.r2.idxmax()]
        best = int(np.argmax((table.r2 >= top.r2 - (top.high - top.low) / 4).to_numpy()))
    table["chosen"] = np.arange(len(table)) == best
    return tried[int(table.n_out[best])], table


def with_enough_sets(heads: Sequence[Head], shares: Sequence[float] = SHARES) -> list[float]:
    """The shares of which there are enough different sets of heads to tell their effects apart."""
    if not shares:
        raise TomsparseError("shares is empty; pass for example (0.02, 0.05, 0.1, 0.2), or one share.")
    for each in shares:
        check_share(each)
    enough = [each for each in shares if comb(len(heads), n_out(each, heads)) >= FEWEST]
    if not enough:
        raise TomsparseError(
            f"Of {len(heads)} heads there are fewer than {FEWEST} different sets to knock out at any of the "
            f"shares {', '.join(f'{each:g}' for each in shares)}; with so few heads, knock out each alone."
        )
    return enough


def _until_enough(
    meter: Meter, first: Knockouts, solver: Solver, kind: Kind, step: int, most: int,
    smallest: float | None, seed: int,
) -> tuple[Knockouts, HeadEffects]:  # fmt: skip
    """More measurements until they are enough."""
    looks = 1 + max(0, -(-(most - len(first.design)) // step))
    knockouts = first
    for look in range(looks):
        effects = recover_heads(
            knockouts, solver=solver.name, penalty=solver.penalty, smallest=smallest, level=0.05 / looks,
            n_permutations=max(999, 50 * looks), seed=seed,
        )  # fmt: skip
        if effects.enough or look == looks - 1:
            break
        design = knockouts.design
        n = min(step, most - len(design))
        new = knockout_design(design.heads, n, share=design.share, kind=kind, seed=seed + 1 + look)
        added = measure_knockouts(meter, new)
        knockouts = Knockouts(
            KnockoutDesign(design.heads, np.concatenate([design.out, new.out]), kind, design.share, seed),
            np.concatenate([knockouts.scores, added.scores]),
            knockouts.unedited,
            knockouts.name,
        )
    return knockouts, effects
