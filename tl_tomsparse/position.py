"""What edits do to position, in one call: sinks, angles and rotary norms before, after, and under placebos.

    change       edited - unedited, a mean over samples
    placebo      the same operator on random masks: mean and range over seeds
    beyond       change - mean change of the placebos, samples and masks drawn again (crossed)

A *sink head* attends to the token by more than eps on average, unedited. Its *turn* is the change of
|angle - 90 degrees| between queries and the token's key: negative towards orthogonal.

NOT claimed: that what moves here is why answers change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from jaxtyping import Int, Int64
from torch import Tensor
from tqdm.auto import tqdm

from tl_tomsparse._checks import TomsparseError, check_positive
from tl_tomsparse._model import ModelView, view
from tl_tomsparse._points import json_rows
from tl_tomsparse._position_changes import Clusters, Comparison, Position, measure_position, summary
from tl_tomsparse._sink_token import check_threshold, positions_of
from tl_tomsparse.edit import SparseEdit
from tl_tomsparse.enrichment import Kind, mask_by_frequency, mask_rank, share_at_frequencies
from tl_tomsparse.mask import Match, SparseMask
from tl_tomsparse.rotary import FrequencyNorms
from tl_tomsparse.samples import Samples

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False)
class PositionEffects:
    """What edits do to sinks, angles and rotary norms, beside random edits.

    Attributes:
        before: the unedited model.
        after: under each edit.
        summary: one row an edit and measure: edit, measure, value, low, high (bootstrap 95 % over samples),
            random (mean over seeds), random_low, random_high (range over seeds), beyond (value - random),
            beyond_low, beyond_high, p_above and p_below (of "not above" and "not below" the random mean,
            doubled), as_high and as_low (how many random edits are). Measures: "sinks_shifted" (share of the
            sinks), "sink_rate" (change of the share of heads whose attention to the token is above eps),
            "attention" (mean change at sink heads), "turn" and "turn_others" (degrees, mean over sink
            heads, of the token's key and of the other keys), "norm_q" and "norm_k" (the relative change,
            without its sign, of the RMS norm at a head's dominant frequencies; mean over heads). Norms are
            compared in groups of samples, the rest sample by sample. Where all samples have the same share of
            sinks, low and high tell what as many samples may have missed.
        heads: one row an edit, measure ("attention", "angle", "angle_others", and with `unrotated`
            "angle_unrotated", "angle_others_unrotated"), layer and head: before, after, change, low, high
            (bootstrap 95 % over samples), random, random_low, random_high of the change.
        frequencies: one row an edit, layer, part, head and frequency: radians, wavelength, before, after (RMS
            norm) with their 95 % intervals (before_low, before_high, after_low, after_high), random,
            random_low, random_high (RMS norm); of queries also what the frequency adds to the attention
            logit: logit_before, logit_after, and with the first token as key logit_first_before,
            logit_first_after.
        cosines: one row an edit, layer, head and frequency: radians, wavelength, before, after (what the
            frequency adds to the cosine between queries and the token's key, after the rotation; see
            [`BosAngles`][]) with their 95 % intervals (before_low, before_high, after_low, after_high:
            Student's t over groups of samples), random, random_low, random_high.
        sinks: one row an edit and layer (-1: all): see [`sink_shift`][]; beside it random, random_low,
            random_high of the share that shifted.
        degrees: one row an edit, heads ("all" or "sink") and degree: degree (0: angles of 0 to 1 between
            queries and the token's key), before, after (shares of the queries), random, random_low,
            random_high (shares).
        by_frequency: see [`mask_by_frequency`][], of each edit's mask, matched by matrix and by row.
        shares: see [`share_at_frequencies`][], of each edit's mask at the frequencies that are "dominant" in
            each head of the unedited model, and at the "slow" half of each layer's (column `frequencies`).
        ranks: see [`mask_rank`][], of each edit's mask.
        sink_heads: (layer, head) pairs.
        n_weights: of each edit.
        meta: position, bos, eps, threshold, no_rotation (why no layer has one, or None), dominant_slow (the
            share of heads' dominant frequencies that are of the slower half), and how it was made.

    Frames about rotation are empty where no layer has one, those about masks where nothing of a mask is in Q
    or K (of such layers). [`position_verdict`][] reads claims off these numbers.
    """

    before: Position = field(repr=False)
    after: Mapping[str, Position] = field(repr=False)
    summary: pd.DataFrame = field(repr=False)
    heads: pd.DataFrame = field(repr=False)
    frequencies: pd.DataFrame = field(repr=False)
    cosines: pd.DataFrame = field(repr=False)
    sinks: pd.DataFrame = field(repr=False)
    degrees: pd.DataFrame = field(repr=False)
    by_frequency: pd.DataFrame = field(repr=False)
    shares: pd.DataFrame = field(repr=False)
    ranks: pd.DataFrame = field(repr=False)
    sink_heads: tuple[tuple[int, int], ...]
    n_weights: dict[str, int]
    meta: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """The frames but for `frequencies`, `cosines` and `degrees`, as plain values for JSON."""
        names = ("summary", "heads", "sinks", "by_frequency", "shares", "ranks")
        tables = {name: json_rows(getattr(self, name)) for name in names}
        return {**tables, "sink_heads": self.sink_heads, "n_weights": self.n_weights, **self.meta}


def position_effects(
    model: Any,
    samples: Samples,
    edits: Mapping[str, SparseEdit],
    *,
    match: Match = "matrix",
    n_random: int = 20,
    seed: int = 0,
    position: int | Int[Tensor, " rows"] = 0,
    eps: float = 0.3,
    threshold: float = 0.01,
    unrotated: bool = False,
    n_draws: int = 10_000,
    batch_tokens: int | None = None,
    show_progress: bool = True,
) -> PositionEffects:
    """Measure sinks, angles and norms of the unedited model, under each edit, and under random edits.

    Args:
        model: unedited, in evaluation mode.
        samples: rows of tokens; intervals take them as independent.
        edits: by name.
        match: what random masks have in common with an edit's; see [`SparseMask.random_like`][].
        n_random: random edits beside each edit; a claim needs at least 19.
        seed: they have the seeds `seed`, `seed + 1`, ...; also of the bootstrap.
        position: of the token that is asked about, counted from 0: one for all rows, or an integer tensor
            `[rows]` of one for each; 0 is BOS where rows begin with it.
        eps: what attends to the token by more than this is a sink.
        threshold: change of attention that counts as a shift; the paper's is 0.01.
        unrotated: also measure angles before the rotation, which takes longer.
        n_draws: how often samples are drawn again.
        batch_tokens: most tokens in one batch, padding included.
        show_progress: a progress bar over edits.

    Raises:
        TomsparseError: no edits; an active edit; edits of other weights, or without a rule to use on random
            masks; training mode; a position that some row does not have, or that is its last one; a tensor of
            positions that has another shape or no integers.
    """
    if not edits:
        raise TomsparseError("edits is empty; pass for example {'mask': SparseEdit.mean(model, mask)}.")
    seen = view(model)
    counts = {"n_random": n_random, "n_draws": n_draws}
    at = check_measurable(seen, samples, position, (eps, threshold), counts)
    seeds = range(seed, seed + n_random)
    placebos = {
        name: [edit.on(model, edit.mask.random_like(number, match=match)) for number in seeds]
        for name, edit in edits.items()
    }
    after: dict[str, Position] = {}
    tables = _Tables()
    total = 1 + len(edits) * (1 + n_random)
    with tqdm(total=total, desc="position", disable=not show_progress) as bar:

        def measured(edit: SparseEdit | None = None) -> Position:
            with nullcontext() if edit is None else edit.applied(model):
                found = measure_position(seen, samples, at, batch_tokens, unrotated=unrotated)
            bar.update()
            return found

        before = measured()
        change = Comparison(before, eps, threshold)
        clusters = Clusters(n_draws, seed)
        for name, edit in edits.items():
            after[name] = measured(edit)
            random = [change.of(measured(placebo)) for placebo in placebos[name]]
            own = change.of(after[name])
            tables.add("summary", name, summary(own.measures, [one.measures for one in random], clusters))
            tables.add("heads", name, change.heads(after[name], random, seed))
            tables.add("frequencies", name, change.frequencies(after[name], random))
            tables.add("cosines", name, change.cosines(after[name], random))
            tables.add("sinks", name, change.sinks(after[name], random))
            tables.add("degrees", name, change.degrees(after[name], random))
            tables.add_mask(model, name, edit.mask, before.norms, n_random, seed)
    meta = {
        "position": before.attention.position,
        "bos": samples.bos,
        "eps": eps,
        "threshold": threshold,
        "match": match,
        "no_rotation": None if before.norms is not None else _why_not(seen),
        "dominant_slow": None if before.norms is None else _slow_share(before.norms),
        "n_random": n_random,
        "seed": seed,
        "n_samples": len(samples),
        "operators": {name: edit.operator for name, edit in edits.items()},
    }
    n_weights = {name: len(edit) for name, edit in edits.items()}
    return PositionEffects(
        before, after, **tables.frames(), sink_heads=tuple(change.sink_heads), n_weights=n_weights, meta=meta
    )


def check_measurable(
    seen: ModelView,
    samples: Samples,
    position: int | Int[Tensor, " rows"],
    thresholds: Sequence[float],
    counts: Mapping[str, int],
) -> Int64[Tensor, " rows"]:
    """The position of the token in each row; refuses what cannot be measured before and after edits that are
    made here.
    """
    for name, count in counts.items():
        check_positive(name, count)
    for value in thresholds:
        check_threshold(value)
    at = positions_of(seen, samples, position)
    if seen.active_edits:
        raise TomsparseError(
            f"{seen.name} has an active edit, {seen.active_edits[-1]}; edits are applied here, so call this "
            "outside of the block."
        )
    return at


def _slow_share(norms: FrequencyNorms) -> float:
    """The share of all heads' dominant frequencies that are of the slower half."""
    dominant = norms.dominant()
    slow = [bool(norms.layout[row.layer].slow[row.frequency]) for row in dominant.itertuples()]
    return sum(slow) / len(slow)


def _why_not(seen: ModelView) -> str:
    """Why no layer has a rotation."""
    reasons = list(dict.fromkeys(seen.rotations[1].values()))
    return "; ".join(reasons) or "it offers no Q or K"


class _Tables:
    """The frames of all edits, one below the other."""

    def __init__(self) -> None:
        names = (
            "summary", "heads", "frequencies", "cosines", "sinks", "degrees",
            "by_frequency", "shares", "ranks",
        )  # fmt: skip
        self._parts: dict[str, list[pd.DataFrame]] = {name: [] for name in names}

    def add(self, table: str, edit: str, frame: pd.DataFrame) -> None:
        """The rows of one edit."""
        if len(frame):
            frame.insert(0, "edit", edit)
            self._parts[table].append(frame)

    def add_mask(
        self,
        model: Any,
        edit: str,
        mask: SparseMask,
        norms: FrequencyNorms | None,
        n_random: int,
        seed: int,
    ) -> None:
        """What is asked of an edit's mask."""
        if len(mask.restrict(matrices=("Q", "K"))):
            self.add("ranks", edit, mask_rank(model, mask, n_random=n_random, seed=seed))
        if norms is None or not len(mask.restrict(matrices=("Q", "K"), layers=list(norms.layout))):
            return
        kinds: tuple[Kind, ...] = ("matrix", "row")
        for match in kinds:
            self.add("by_frequency", edit, mask_by_frequency(model, mask, match=match, seed=seed))
        for name, frequencies in (("dominant", norms.dominant()), ("slow", "slow")):
            shares = share_at_frequencies(model, mask, frequencies, seed=seed)
            shares.insert(0, "frequencies", name)
            self.add("shares", edit, shares)

    def frames(self) -> dict[str, pd.DataFrame]:
        """All of them."""
        import pandas as pd

        return {
            name: pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()
            for name, parts in self._parts.items()
        }
