"""What a search for heads supports, in words computed from its numbers.

    heads_found          at least one head's effect is more than chance, and knocking it out confirms it
    more_than_random     knocking the found heads out lowers the score more than random heads of equal number:
                         on average (interval by story and random set), and below 95 % of them
    additive             the held-out R^2 of additive effects is above 1/2 with its whole interval

What lowers a score leaves it lower than it was: to raise it less than random heads do is not to lower it.
Each claim is judged at 0.05 by itself.

NOT claimed: a mechanism, or that these heads do it alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tl_tomsparse.heads import Head, head_name
from tl_tomsparse.verdict import Claim, percent

if TYPE_CHECKING:
    import pandas as pd

    from tl_tomsparse.recovery import HeadEffects

_LEVEL = 0.05
_MOSTLY = 0.5


def claims_of(
    heads: Sequence[Head],
    effects: HeadEffects,
    interactions: pd.DataFrame,
    test: pd.DataFrame,
    meta: dict[str, Any],
) -> tuple[Claim, ...]:
    """The claims of a location, in the order of the module docstring."""
    return (
        _found(heads, effects, meta),
        _more_than_random(heads, test, meta),
        _additive(effects, interactions),
    )


def _found(heads: Sequence[Head], effects: HeadEffects, meta: dict[str, Any]) -> Claim:
    n = f"{len(effects.scores)} measurements of {meta['n_heads']} heads"
    if not effects.found:
        return Claim("heads_found", "not supported", f"Nothing found in {n}. {effects.reason}", effects.p)
    names = ", ".join(map(head_name, effects.found))
    if not heads:
        sentence = (
            f"{names} have effects in {n}, but none of them lowers the {meta['score']} by "
            f"{meta['smallest']:.3g} when it is knocked out alone. {effects.reason}"
        )
        return Claim("heads_found", "not supported", sentence, effects.p)
    return Claim(
        "heads_found",
        "supported",
        f"The {meta['score']} hangs on {', '.join(map(head_name, heads))}: found in {n} and confirmed by "
        f"knocking them out. {effects.reason}",
        effects.p,
    )


def _more_than_random(heads: Sequence[Head], test: pd.DataFrame, meta: dict[str, Any]) -> Claim:
    name = "more_than_random"
    if not heads:
        return Claim(name, "not testable", "No head is confirmed, so there is nothing to compare.")
    if meta["n_random"] < round(1 / _LEVEL) - 1:
        few = f"{meta['n_random']} random sets are too few to be below 95 % of them; use at least 19."
        return Claim(name, "not testable", few)
    change, beyond = test.set_index("comparison").loc[["change", "beyond random"]].itertuples()
    where = "other prompts" if meta["separate_test"] else "the same prompts, which flatters it"
    rank = (1 + beyond.as_low) / (1 + meta["n_random"])
    known = np.isfinite(beyond.low)
    lower = change.value < 0 and beyond.value < 0
    supported = lower and rank <= _LEVEL + 1e-9 and (not known or beyond.p <= _LEVEL)
    interval = f" (95 % interval {beyond.low:.3g} to {beyond.high:.3g})" if known else ""
    verb = "lowers" if supported else "is not shown to lower"
    what = "this head" if len(heads) == 1 else f"these {len(heads)} heads"
    sentence = (
        f"On {where}, knocking out {what} {verb} the {meta['score']} more than random heads of equal number: "
        f"change {change.value:.3g}, beyond the mean of {meta['n_random']} random sets {beyond.value:.3g}"
        f"{interval}, {int(beyond.as_low)} of them as low."
    )
    p = max(rank, beyond.p) if known else rank
    return Claim(name, "supported" if supported else "not supported", sentence, float(p))


def _additive(effects: HeadEffects, interactions: pd.DataFrame) -> Claim:
    if np.isnan(effects.r2):
        return Claim("additive", "not testable", "The score is the same in all measurements.")
    fit = f"held-out R^2 {effects.r2:.2f}, 95 % interval {effects.r2_low:.2f} to {effects.r2_high:.2f}"
    supported = effects.r2_low > _MOSTLY
    how = "mostly add up" if supported else "are not shown to add up"
    sentence = f"Effects of heads {how} ({fit})."
    if len(interactions):
        row = interactions.loc[interactions.interaction.abs().idxmax()]
        sentence += (
            f" The largest interaction of two heads on the path is {row.interaction:+.3g}, between {row.a} "
            f"and {row.b}, which alone change the score by {row.y_a - effects.unedited:+.3g} and "
            f"{row.y_b - effects.unedited:+.3g}."
        )
    return Claim("additive", "supported" if supported else "not supported", sentence)


def protocol_claims(heads: Sequence[Head], dose: pd.DataFrame, n_random: int) -> tuple[Claim, ...]:
    """Of the paper's protocol: what the found heads do to their task, its other form, and other tasks."""
    tasks = list(dict.fromkeys(dose.task))
    name = "paper_protocol"
    if not heads:
        return (Claim(name, "not supported", "The Lasso gives no head a negative coefficient."),)
    ends = dose[dose.n_heads == len(heads)].set_index("task")
    before = dose[dose.n_heads == 0].set_index("task").score

    def told(task: str) -> str:
        row = ends.loc[task]
        return (
            f"{task} {before[task]:.3g} to {row.score:.3g} (random heads {row.random:.3g}, "
            f"{row.random_low:.3g} to {row.random_high:.3g})"
        )

    below = {task: bool(ends.score[task] < ends.random_low[task]) for task in tasks}
    lower = {task: below[task] and bool(ends.score[task] < before[task]) for task in tasks}
    enough = n_random >= round(1 / _LEVEL) - 1
    main = tasks[0]
    listed = ", ".join(map(head_name, heads))
    supported = lower[main] and enough
    verb = "lower" if supported else "are not shown to lower"
    few = "" if enough else f" ({n_random} random sets are too few; use at least 19)"
    first = Claim(
        name,
        "supported" if supported else "not supported",
        f"{listed} {verb} the task more than all {n_random} random sets of as many heads{few}: {told(main)}.",
    )
    forms = [task for task in tasks if task.startswith(f"{main}, ")]
    rest = [task for task in tasks[1:] if task not in forms]
    claims = [first]
    if len(forms) < 2:
        only = "The task is asked in one form, so heads of the form cannot be told from heads of the task."
        claims.append(Claim("not_format", "not testable", only))
    else:
        holds = enough and all(lower[form] for form in forms)
        how = "in every form" if holds else "but not in every form below all random sets"
        sentence = f"Knocked out, they lower it {how}: {'; '.join(map(told, forms))}."
        claims.append(Claim("not_format", "supported" if holds else "not supported", sentence))
    if rest:
        kept = [task for task in rest if not below[task]]
        holds = len(kept) == len(rest)
        how = "stay within" if holds else "do not all stay within"
        sentence = f"Other tasks {how} the range of random heads: {'; '.join(map(told, rest))}."
        claims.append(Claim("selective", "supported" if holds else "not supported", sentence))
    return tuple(claims)


def crossed_claims(
    heads: Sequence[Head], overlap: pd.DataFrame, effect: pd.DataFrame, score: str, n_random: int
) -> tuple[Claim, ...]:
    """Whether a mask's weights lie in heads, and whether they work there."""
    row = overlap.set_index("matrix").loc["all"]
    listed = ", ".join(map(head_name, heads))
    p = max(row.p_random, row.p_heads)
    supported = p <= _LEVEL + 1e-9
    how = (
        "lie in these heads more often than chance"
        if supported
        else "are not shown to lie in these heads more often than chance"
    )
    where = Claim(
        "mask_in_heads",
        "supported" if supported else "not supported",
        f"The mask's weights {how} ({listed}): {percent(row.share)} of its {int(row.entries)}, of random "
        f"masks {percent(row.random)} ({percent(row.random_low)} to {percent(row.random_high)}), in as many "
        f"random heads {percent(row.heads_mean)} ({percent(row.heads_low)} to {percent(row.heads_high)}).",
        float(p),
    )
    arms = effect.set_index("arm")
    if not arms.n_weights["in heads"]:
        return where, Claim("works_in_heads", "not testable", "The mask has no weight in these heads.")
    if n_random < round(1 / _LEVEL) - 1:
        few = f"{n_random} random masks are too few to be below 95 % of them; use at least 19."
        return where, Claim("works_in_heads", "not testable", few)
    inside, random = arms.loc["in heads"], arms.loc["random"]
    holds = bool(inside.score < min(random.low, arms.score["unedited"]))
    verb = "lower" if holds else "are not shown to lower"
    works = Claim(
        "works_in_heads",
        "supported" if holds else "not supported",
        f"The {int(inside.n_weights)} weights in these heads {verb} the {score} more than all random weights "
        f"of equal number: {arms.score['unedited']:.3g} to {inside.score:.3g}, random {random.score:.3g} "
        f"({random.low:.3g} to {random.high:.3g}); the whole mask {arms.score['mask']:.3g}, without these "
        f"heads {arms.score['elsewhere']:.3g}.",
    )
    return where, works
