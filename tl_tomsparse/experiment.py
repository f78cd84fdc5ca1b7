"""How many weights to edit: a sweep over sparsity on dev stories beside its placebos, and a rule to choose.

    mask          top(task) - top(general)       at sparsity kappa
    random        as many entries in each matrix, anywhere; many seeds
    general_only  top(general)
    tom_only      top(task)

[`kappa_sweep`][] measures all four and [`choose_kappa`][] picks one kappa from it. The claim is made
elsewhere: `effect` measures once more, on stories and text that nothing was chosen on.

NOT claimed: that a kappa of a small model compares with the paper's 1e-5, found on models of a billion
weights; the number of
weights is reported beside it. Nor that the numbers of a sweep are estimates: the best of many points
flatters itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from tqdm.auto import tqdm

from tl_tomsparse._checks import TomsparseError, check_kappa, check_positive
from tl_tomsparse._points import MEASURES, Measures, Operator, PointMeter, PointRecord, check_split, json_rows
from tl_tomsparse._prepared import prepare_scoring, prepare_text
from tl_tomsparse.mask import SparseMask
from tl_tomsparse.ranking import Quota, rank_entries
from tl_tomsparse.samples import Samples
from tl_tomsparse.stories.story import Story

if TYPE_CHECKING:
    import pandas as pd

    from tl_tomsparse.sensitivity import Sensitivity

Arm = Literal["mask", "random", "general_only", "tom_only"]
ARMS: tuple[Arm, ...] = ("mask", "random", "general_only", "tom_only")
_LARGE = 1_000_000  # entries of a matrix above which the paper's range of kappas holds enough of them
_AUTO_POINTS, _AUTO_TOP = 10, 0.3  # small models bear the loss of many weights


def auto_kappas(sensitivity: Sensitivity) -> tuple[float, ...]:
    """The kappas of `kappa_sweep(kappas="auto")`, from 0 (unedited) upwards.

    Where the median matrix has more than a million entries, the paper's range: 0 to 5e-5 in steps of 2e-6.
    In smaller models that would be no entry at all, so there ten values in equal ratios from one entry in
    the median matrix to 0.3.
    """
    size = median(values.numel() for values in sensitivity.values.values())
    if size > _LARGE:
        return tuple(round(2e-6 * step, 7) for step in range(26))
    grid = np.geomspace(1 / size, max(_AUTO_TOP, 1 / size), _AUTO_POINTS)
    return (0.0, *sorted({float(f"{kappa:.3g}") for kappa in grid}))


def arm_masks(
    tom: Sensitivity, general: Sensitivity, kappa: float, *, quota: Quota = "matrix"
) -> dict[str, SparseMask]:
    """The masks of the arms "mask", "general_only" and "tom_only" at one kappa."""
    return _masks(
        rank_entries(tom, kappa_max=kappa, quota=quota).top(kappa),
        rank_entries(general, kappa_max=kappa, quota=quota).top(kappa),
    )


def _masks(tom: SparseMask, general: SparseMask) -> dict[str, SparseMask]:
    return {"mask": tom - general, "general_only": general, "tom_only": tom}


@dataclass(frozen=True, eq=False)
class KappaSweep:
    """Accuracies and perplexity at every kappa and arm, on dev stories and text.

    Attributes:
        frame: one row a point: kappa, arm, seed (missing but for "random"), n_weights (entries edited),
            false_belief, true_belief, reality, memory, second_order (accuracies; missing where nothing is
            asked), paired, perplexity. At kappa 0 every arm is the unedited model.
        n: number of questions (for "paired": stories) behind each accuracy.
        meta: how it was made.
    """

    frame: pd.DataFrame = field(repr=False)
    n: dict[str, int]
    meta: dict[str, Any] = field(repr=False)

    def to_frame(self) -> pd.DataFrame:
        """A copy of the table, one row a point."""
        return self.frame.copy()

    def arm(self, arm: Arm) -> pd.DataFrame:
        """The rows of one arm by kappa; for "random" the mean over seeds."""
        rows = self.frame[self.frame.arm == arm].drop(columns=["arm", "seed"])
        return rows.groupby("kappa").mean()

    def band(self, measure: str) -> pd.DataFrame:
        """The random masks at each kappa: mean over seeds, low and high (the extremes)."""
        grouped = self.frame[self.frame.arm == "random"].groupby("kappa")[measure]
        return grouped.agg(mean="mean", low="min", high="max")

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values for JSON."""
        return {"points": json_rows(self.frame), "n": self.n, **self.meta}


def kappa_sweep(
    model: Any,
    tom: Sensitivity,
    general: Sensitivity,
    *,
    dev_stories: Sequence[Story],
    dev_text: Samples,
    kappas: Sequence[float] | Literal["auto"] = "auto",
    n_random: int = 20,
    seed: int = 0,
    operator: Operator = "mean",
    quota: Quota = "matrix",
    prepend_bos: bool = True,
    batch_tokens: int | None = None,
    on_point: Callable[[PointRecord], None] | None = None,
    resume: Iterable[Mapping[str, Any]] = (),
    show_progress: bool = True,
) -> KappaSweep:
    """Edit at many sparsities, with every control, and measure answers and perplexity on the dev split.

    Weights are edited in place and restored bit for bit; tokens are prepared once; equal masks are measured
    once.

    Args:
        model: unedited, in eval mode.
        tom: sensitivity on the task's samples.
        general: sensitivity on general text, of the same matrices.
        dev_stories: not of the split "test": what is chosen here is reported there.
        dev_text: general text for perplexity.
        kappas: shares of each matrix to choose, or "auto" (see `auto_kappas`). 0, the unedited model, is
            always added.
        n_random: random masks at each kappa.
        seed: the random masks have the seeds `seed`, `seed + 1`, ...
        operator: what masked entries become: "mean" of the matrix's unmasked entries, or "zero".
        quota: "matrix" chooses the same share of each matrix, "global" of all together.
        prepend_bos: begin every prompt with the BOS token.
        batch_tokens: most tokens in one batch; by default chosen for the device.
        on_point: called with a JSON-able record of each point as soon as it is measured; store them, and an
            interrupted sweep continues from `resume`.
        resume: stored records of an interrupted sweep. Records of other weights, masks, stories or text are
            ignored.
        show_progress: show a progress bar over points.

    Raises:
        TomsparseError: a kappa outside [0, 1], sensitivities of other weights, test stories, a model in
            training mode, or losses that are not finite.
    """
    import pandas as pd

    check_positive("n_random", n_random)
    check_split(
        dev_stories, ("test",), "what is chosen here is reported there; pass stories of the split 'dev'"
    )
    wanted = auto_kappas(tom) if isinstance(kappas, str) else kappas
    for kappa in wanted:
        check_kappa(kappa)
    grid = sorted({0.0, *map(float, wanted)})
    ranked = [rank_entries(which, kappa_max=grid[-1], quota=quota) for which in (tom, general)]
    _masks(
        ranked[0].top(0.0), ranked[1].top(0.0)
    )  # refuses sensitivities of different weights before long work
    scoring = prepare_scoring(
        model, dev_stories, prepend_bos=prepend_bos, batch_tokens=batch_tokens, pack=True
    )
    text = prepare_text(model, dev_text, batch_tokens=batch_tokens)
    meter = PointMeter(model, scoring, text, operator=operator, on_point=on_point, resume=resume)
    measures = Measures(scoring.questions)
    n_tokens = int(text.n_tokens.sum())
    rows: list[dict[str, Any]] = []

    def add(kappa: float, arm: Arm, mask: SparseMask, number: int | None) -> None:
        label = f"kappa={kappa:g}, arm {arm!r}" + ("" if number is None else f", seed {number}")
        point = meter.measure(mask, label)
        row: dict[str, Any] = {"kappa": kappa, "arm": arm, "seed": number, "n_weights": len(mask)}
        row |= dict.fromkeys(MEASURES, np.nan)
        row |= {name: measures.accuracy(point.correct, name) for name in measures.names}
        rows.append({**row, "perplexity": float(np.exp(point.nll.sum() / n_tokens))})
        progress.update()

    total = len(grid) * (len(ARMS) - 1 + n_random)
    with tqdm(total=total, desc="kappa sweep", disable=not show_progress) as progress:
        for kappa in grid:
            masks = _masks(ranked[0].top(kappa), ranked[1].top(kappa))
            add(kappa, "mask", masks["mask"], None)
            add(kappa, "general_only", masks["general_only"], None)
            add(kappa, "tom_only", masks["tom_only"], None)
            for number in range(seed, seed + n_random):
                add(kappa, "random", masks["mask"].random_like(number), number)
    frame = pd.DataFrame(rows).astype({"seed": "Int64"})
    meta = {
        "operator": operator,
        "quota": quota,
        "n_random": n_random,
        "seed": seed,
        "prepend_bos": prepend_bos,
        "n_stories": measures.n_stories,
        "n_text_tokens": n_tokens,
    }
    return KappaSweep(frame, {name: int(count.sum()) for name, count in measures.totals.items()}, meta)


@dataclass(frozen=True, eq=False)
class KappaChoice:
    """The kappa chosen from a sweep, and why.

    Attributes:
        kappa: the chosen one.
        qualified: whether it meets all conditions of `choose_kappa`; if not, no kappa does.
        reason: one sentence.
        table: one row a kappa: n_weights, drop (fall of false-belief accuracy under the mask),
            specific_drop (that minus the mean fall under random masks), perplexity_ratio, a column for each
            condition, qualified.
    """

    kappa: float
    qualified: bool
    reason: str
    table: pd.DataFrame = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values for JSON."""
        table = json_rows(self.table.reset_index())
        return {"kappa": self.kappa, "qualified": self.qualified, "reason": self.reason, "table": table}


def choose_kappa(
    sweep: KappaSweep, *, max_perplexity_rise: float = 0.05, max_share: float = 0.5
) -> KappaChoice:
    """Choose one sparsity from a sweep of the dev split, by this rule (ours):

    Let drop(kappa) be the fall of false-belief accuracy from the unedited model. A kappa qualifies if under
    the mask

    1. drop > 0,
    2. perplexity of general text rises by at most `max_perplexity_rise`,
    3. the mean drop under random masks is at most `max_share` of the mask's,
    4. true belief and reality (where asked) each fall by at most `max_share` of the mask's drop.

    Among those that qualify the one with the largest specific drop is chosen: drop under the mask minus
    mean drop under random masks; ties go to the smaller kappa. If none qualifies, the one with the largest
    specific drop of all, and the choice says so. Being the largest of many, the dev drop flatters itself:
    only the effect on other stories counts.

    Raises:
        TomsparseError: the sweep asks no false-belief question, or every mask of it is empty.
    """
    before = sweep.arm("mask").loc[0.0]
    if np.isnan(before.false_belief):
        raise TomsparseError("The sweep has no false-belief question to choose kappa by; add such stories.")
    mask, random = sweep.arm("mask"), sweep.arm("random")
    table = mask[["n_weights"]].copy()
    table["drop"] = before.false_belief - mask.false_belief
    random_drop = before.false_belief - random.false_belief
    table["specific_drop"] = table["drop"] - random_drop
    table["perplexity_ratio"] = mask.perplexity / before.perplexity
    table["falls"] = table["drop"] > 0
    table["perplexity_stays"] = table.perplexity_ratio <= 1 + max_perplexity_rise
    table["random_stays"] = random_drop <= max_share * table["drop"]
    for name in ("true_belief", "reality"):
        falls = before[name] - mask[name]
        table[f"{name}_stays"] = falls.isna() | (falls <= max_share * table["drop"])
    conditions = ["falls", "perplexity_stays", "random_stays", "true_belief_stays", "reality_stays"]
    table["qualified"] = table[conditions].all(axis=1)
    table = table[table.n_weights > 0]
    if table.empty:
        raise TomsparseError("Every mask of the sweep is empty; sweep larger kappas.")
    pool = table[table.qualified] if table.qualified.any() else table
    kappa = float(pool.specific_drop.idxmax())  # the first of equals, which is the smallest
    row = table.loc[kappa]
    numbers = (
        f"with {int(row.n_weights)} weights edited, false-belief accuracy falls by {row['drop']:.3f} "
        f"({row.specific_drop:.3f} more than under random masks) and perplexity is "
        f"{row.perplexity_ratio:.3f} times what it was"
    )
    if row.qualified:
        reason = f"kappa={kappa:g} has the largest specific drop of the {len(pool)} that qualify: {numbers}."
    else:
        missed = ", ".join(name.replace("_", " ") for name in conditions if not row[name])
        reason = (
            f"No kappa qualifies; kappa={kappa:g} has the largest specific drop: {numbers}. Missed: {missed}."
        )
    return KappaChoice(kappa, bool(row.qualified), reason, table)
