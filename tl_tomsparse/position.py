"""What edits do to position, in one call: sinks, angles and rotary norms before, after, and under placebos.

    change       edited - unedited, a mean over samples
    placebo      the same operator on random masks: mean and range over seeds
    beyond       change - mean change of the placebos, samples and masks drawn again (crossed)

A *sink head* attends to the token by more than eps on average, unedited. Its *turn* is the change of
|angle - 90 degrees| between queries and the token's key: negative towards orthogonal.

NOT claimed: that what moves here is why answers change.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from tl_tomsparse._checks import TomsparseError, check_positive
from tl_tomsparse._intervals import ClusterBootstrap, mean_intervals
from tl_tomsparse._model import ModelView, view
from tl_tomsparse._stream import Current, stream
from tl_tomsparse.edit import SparseEdit
from tl_tomsparse.enrichment import mask_by_frequency, mask_rank, share_at_frequencies
from tl_tomsparse.mask import Match, SparseMask
from tl_tomsparse.rotary import FrequencyNorms, norms_measure
from tl_tomsparse.samples import Samples
from tl_tomsparse.sink import (
    BosAngles,
    SinkAttention,
    angles_measure,
    attention_measure,
    check_position,
    check_threshold,
    sink_shift,
)

if TYPE_CHECKING:
    import pandas as pd

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Position:
    """Position measures of a model, unedited or under one edit.

    Attributes:
        attention: to the token.
        angles: to its key; None where no layer has a rotation.
        norms: by frequency; None where no layer has a rotation.
    """

    attention: SinkAttention
    angles: BosAngles | None
    norms: FrequencyNorms | None


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
            sinks), "attention" (mean change at sink heads), "turn" and "turn_others" (degrees, mean over sink
            heads, of the token's key and of the other keys), "norm_q" and "norm_k" (the relative change,
            without its sign, of the RMS norm at a head's dominant frequencies; mean over heads). Norms are
            compared in groups of samples, the rest sample by sample.
        heads: one row an edit, measure ("attention", "angle", "angle_others"), layer and head: before, after,
            change, low, high (bootstrap 95 % over samples), random, random_low, random_high of the change.
        frequencies: one row an edit, layer, part, head and frequency: radians, wavelength, before, after (RMS
            norm), random, random_low, random_high (RMS norm).
        sinks: one row an edit and layer (-1: all): see [`sink_shift`][]; beside it random, random_low,
            random_high of the share that shifted.
        by_frequency: see [`mask_by_frequency`][], of each edit's mask.
        shares: see [`share_at_frequencies`][], of each edit's mask at the dominant frequencies.
        ranks: see [`mask_rank`][], of each edit's mask.
        sink_heads: (layer, head) pairs.
        n_weights: of each edit.
        meta: position, bos, eps, threshold, and how it was made.

    Frames about rotation are empty where no layer has one, those about masks where nothing of a mask is in Q
    or K of such layers.
    """

    before: Position = field(repr=False)
    after: Mapping[str, Position] = field(repr=False)
    summary: pd.DataFrame = field(repr=False)
    heads: pd.DataFrame = field(repr=False)
    frequencies: pd.DataFrame = field(repr=False)
    sinks: pd.DataFrame = field(repr=False)
    by_frequency: pd.DataFrame = field(repr=False)
    shares: pd.DataFrame = field(repr=False)
    ranks: pd.DataFrame = field(repr=False)
    sink_heads: tuple[tuple[int, int], ...]
    n_weights: dict[str, int]
    meta: dict[str, Any]


def position_effects(
    model: Any,
    samples: Samples,
    edits: Mapping[str, SparseEdit],
    *,
    match: Match = "matrix",
    n_random: int = 20,
    seed: int = 0,
    position: int = 0,
    eps: float = 0.3,
    threshold: float = 0.01,
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
        position: of the token that is asked about, the same in every row; 0 is BOS where rows begin with it.
        eps: what attends to the token by more than this is a sink.
        threshold: change of attention that counts as a shift; the paper's is 0.01.
        n_draws: how often samples are drawn again.
        batch_tokens: most tokens in one batch, padding included.
        show_progress: a progress bar over edits.

    Raises:
        TomsparseError: no edits; an active edit; edits of other weights, or without a rule to use on random
            masks; training mode; a position that some row does not have, or that is its last one.
    """
    if not edits:
        raise TomsparseError("edits is empty; pass for example {'mask': SparseEdit.mean(model, mask)}.")
    for name, count in (("n_random", n_random), ("n_draws", n_draws)):
        check_positive(name, count)
    for value in (eps, threshold):
        check_threshold(value)
    seen = view(model)
    check_position(seen, samples, position)
    if seen.active_edits:
        raise TomsparseError(
            f"{seen.name} has an active edit, {seen.active_edits[-1]}; edits are applied here, so call this "
            "outside of the block."
        )
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
                found = _measure(seen, samples, position, batch_tokens)
            bar.update()
            return found

        before = measured()
        change = _Change(before, eps, threshold)
        clusters = _Clusters(n_draws, seed)
        for name, edit in edits.items():
            after[name] = measured(edit)
            random = [change.of(measured(placebo)) for placebo in placebos[name]]
            own = change.of(after[name])
            tables.add("summary", name, _summary(own, random, clusters))
            tables.add("heads", name, change.heads(after[name], random, seed))
            tables.add("frequencies", name, change.frequencies(after[name], random))
            tables.add("sinks", name, change.sinks(after[name], random))
            tables.add_mask(model, name, edit.mask, before.norms, seed)
    meta = {
        "position": position,
        "bos": samples.bos,
        "eps": eps,
        "threshold": threshold,
        "match": match,
        "n_random": n_random,
        "seed": seed,
        "n_samples": len(samples),
        "operators": {name: edit.operator for name, edit in edits.items()},
    }
    n_weights = {name: len(edit) for name, edit in edits.items()}
    return PositionEffects(
        before, after, **tables.frames(), sink_heads=tuple(change.sink_heads), n_weights=n_weights, meta=meta
    )


def _measure(seen: ModelView, samples: Samples, position: int, batch_tokens: int | None) -> Position:
    """Everything in one pass over the samples."""
    now = Current()
    attention = attention_measure(seen, samples, now, position=position)
    angles = angles_measure(seen, samples, now, position=position) if seen.rotations[0] else None
    norms = norms_measure(seen, samples, now) if seen.rotations[0] else None
    hooks = [hook for measure in (attention, angles, norms) if measure for hook in measure.hooks]
    stream(seen, samples, hooks, now, description="position", batch_tokens=batch_tokens, show_progress=False)
    return Position(
        attention.result(), angles.result() if angles else None, norms.result() if norms else None
    )


@dataclass(frozen=True, eq=False)
class _Changes:
    """What one edit changed.

    Attributes:
        measures: for each measure of the summary, what each sample (group) adds to a sum, and its count.
        heads: for each measure of the heads, the mean change, `[layers * heads]`.
        norms: for each (layer, part) the RMS norm `[heads, pairs]`.
        shifted: for each layer, and -1 for all, the share of the sinks that shifted.
    """

    measures: dict[str, tuple[Floats, Floats]]
    heads: dict[str, Floats]
    norms: Mapping[tuple[int, str], Tensor]
    shifted: dict[int, float]


class _Change:
    """Compares what edits did with the unedited model."""

    def __init__(self, before: Position, eps: float, threshold: float) -> None:
        self.before, self.eps, self.threshold = before, eps, threshold
        self.sink_heads = [
            (layer, head)
            for layer, share in before.attention.attention.items()
            for head in (share.nanmean(0) > eps).nonzero()[:, 0].tolist()
        ]
        self.dominant = {} if before.norms is None else _dominant(before.norms)

    def of(self, after: Position) -> _Changes:
        """The changes of one edit."""
        per_head = {name: _joined(values) for name, values in self._per_head(after).items()}
        heads = {name: np.nanmean(values, 0) for name, values in per_head.items()}
        norms = {} if after.norms is None else after.norms.rms
        return _Changes(dict(self._measures(after)), heads, norms, self._shifted(after))

    def heads(self, after: Position, random: Sequence[_Changes], seed: int) -> pd.DataFrame:
        """See `PositionEffects.heads`."""
        import pandas as pd

        frames = []
        for name, change in self._per_head(after).items():
            values = _joined(change)
            mean, low, high = mean_intervals(values, seed=seed)
            old = np.nanmean(_joined(self._levels(self.before)[name]), 0)
            places = [(layer, head) for layer, one in change.items() for head in range(one.shape[1])]
            frame = pd.DataFrame(places, columns=["layer", "head"])
            frame.insert(0, "measure", name)
            drawn = np.stack([one.heads[name] for one in random])
            frame = frame.assign(before=old, after=old + mean, change=mean, low=low, high=high)
            frames.append(frame.assign(**_range(drawn)))
        return pd.concat(frames, ignore_index=True)

    def frequencies(self, after: Position, random: Sequence[_Changes]) -> pd.DataFrame:
        """See `PositionEffects.frequencies`."""
        import pandas as pd

        if self.before.norms is None or after.norms is None:
            return pd.DataFrame()
        names = ["layer", "part", "head", "frequency", "radians", "wavelength"]
        frame = self.before.norms.to_frame()[[*names, "rms"]].rename(columns={"rms": "before"})

        def flat(norms: Mapping[tuple[int, str], Tensor]) -> Floats:
            return np.concatenate([one.flatten().numpy() for one in norms.values()])

        drawn = np.stack([flat(one.norms) for one in random])
        return frame.assign(after=flat(after.norms.rms), **_range(drawn))

    def sinks(self, after: Position, random: Sequence[_Changes]) -> pd.DataFrame:
        """See `PositionEffects.sinks`."""
        frame = self._shift(after)
        drawn = np.array([[one.shifted[layer] for layer in frame.layer] for one in random])
        return frame.assign(**_range(drawn))

    def _shift(self, after: Position) -> pd.DataFrame:
        return sink_shift(self.before.attention, after.attention, eps=self.eps, threshold=self.threshold)

    def _shifted(self, after: Position) -> dict[int, float]:
        return self._shift(after).set_index("layer").shifted.to_dict()

    def _levels(self, of: Position) -> dict[str, Mapping[int, Tensor]]:
        """For each measure of the heads `[n, heads]` by layer."""
        levels: dict[str, Mapping[int, Tensor]] = {"attention": of.attention.attention}
        if of.angles is not None:
            levels |= {"angle": of.angles.to_sink, "angle_others": of.angles.to_others}
        return levels

    def _per_head(self, after: Position) -> dict[str, dict[int, Tensor]]:
        old, new = self._levels(self.before), self._levels(after)
        return {
            name: {layer: new[name][layer] - value for layer, value in values.items()}
            for name, values in old.items()
        }

    def _measures(self, after: Position) -> Iterator[tuple[str, tuple[Floats, Floats]]]:
        old, new = self.before.attention.attention, after.attention.attention
        sinks = {layer: share > self.eps for layer, share in old.items()}
        moved = {
            layer: (new[layer] - share).abs().gt(self.threshold) & sinks[layer]
            for layer, share in old.items()
        }
        counts = [torch.cat(list(which.values()), 1).sum(1).double() for which in (moved, sinks)]
        if counts[1].any():
            yield "sinks_shifted", (counts[0].numpy(), counts[1].numpy())
        if self.sink_heads:
            yield "attention", _over(self.sink_heads, {layer: new[layer] - old[layer] for layer in old})
        if self.before.angles is not None and after.angles is not None:
            for name, which in (("turn", "to_sink"), ("turn_others", "to_others")):
                first, second = getattr(self.before.angles, which), getattr(after.angles, which)
                turn = {layer: (second[layer] - 90).abs() - (first[layer] - 90).abs() for layer in first}
                if turned := [(layer, head) for layer, head in self.sink_heads if layer in turn]:
                    yield name, _over(turned, turn)
        if self.before.norms is not None and after.norms is not None:
            for part in "qk":
                yield f"norm_{part}", self._norm_change(self.before.norms, after.norms, part)

    def _norm_change(self, before: FrequencyNorms, after: FrequencyNorms, part: str) -> tuple[Floats, Floats]:
        """For each group of samples: the relative change at each head's dominant frequencies, its mean over
        heads.
        """
        relative = []
        for key, chosen in self.dominant.items():
            if key[1] == part:
                old, new = ((norms.squares[key] * chosen).sum(-1).sqrt() for norms in (before, after))
                relative.append((new / old - 1).abs())
        values = torch.cat(relative, 1).mean(1).numpy()
        return values, np.ones(len(values))


def _dominant(norms: FrequencyNorms) -> dict[tuple[int, str], Tensor]:
    """For each (layer, part) `[heads, pairs]`: True at the dominant frequencies of a head."""
    chosen = {key: torch.zeros(rms.shape, dtype=torch.bool) for key, rms in norms.rms.items()}
    for row in norms.dominant().itertuples():
        chosen[row.layer, row.part][row.head, row.frequency] = True
    return chosen


def _joined(values: Mapping[int, Tensor]) -> Floats:
    """`[n, layers * heads]`"""
    return torch.cat(list(values.values()), 1).numpy()


def _over(heads: Sequence[tuple[int, int]], values: Mapping[int, Tensor]) -> tuple[Floats, Floats]:
    """The mean over some heads for each sample; samples without a value (too short) do not count."""
    mean = torch.stack([values[layer][:, head] for layer, head in heads], 1).nanmean(1)
    known = mean.isfinite()
    return mean.where(known, torch.zeros_like(mean)).numpy(), known.double().numpy()


def _range(drawn: Floats) -> dict[str, Floats]:
    """Mean and extremes over random edits, the first axis."""
    return {"random": drawn.mean(0), "random_low": drawn.min(0), "random_high": drawn.max(0)}


class _Clusters:
    """Bootstraps over samples and over groups of samples, made once for each number of them."""

    def __init__(self, n_draws: int, seed: int) -> None:
        self._n_draws, self._seed = n_draws, seed
        self._made: dict[int, ClusterBootstrap] = {}

    def __call__(self, n: int) -> ClusterBootstrap:
        """The one for n clusters. Changes are continuous, so there is nothing to smooth."""
        if n not in self._made:
            self._made[n] = ClusterBootstrap(n, n_draws=self._n_draws, seed=self._seed, smooth=False)
        return self._made[n]


def _summary(own: _Changes, random: Sequence[_Changes], clusters: _Clusters) -> pd.DataFrame:
    """See `PositionEffects.summary`."""
    import pandas as pd

    rows = []
    for name, (values, counts) in own.measures.items():
        drawn = np.stack([one.measures[name][0] for one in random], 1)
        bootstrap = clusters(len(values))
        change = bootstrap.ratio(values, counts)
        beyond = bootstrap.ratio(values[:, None] - drawn, counts)
        each = drawn.sum(0) / counts.sum()
        row = {"measure": name, "value": change.value, "low": change.low, "high": change.high}
        row |= _range(each)
        row |= {"beyond": beyond.value, "beyond_low": beyond.low, "beyond_high": beyond.high}
        row |= {"p_above": beyond.p_above(), "p_below": beyond.p_below()}
        row |= {"as_high": int((each >= change.value).sum()), "as_low": int((each <= change.value).sum())}
        rows.append(row)
    return pd.DataFrame(rows)


class _Tables:
    """The frames of all edits, one below the other."""

    def __init__(self) -> None:
        names = ("summary", "heads", "frequencies", "sinks", "by_frequency", "shares", "ranks")
        self._parts: dict[str, list[pd.DataFrame]] = {name: [] for name in names}

    def add(self, table: str, edit: str, frame: pd.DataFrame) -> None:
        """The rows of one edit."""
        if len(frame):
            frame.insert(0, "edit", edit)
            self._parts[table].append(frame)

    def add_mask(
        self, model: Any, edit: str, mask: SparseMask, norms: FrequencyNorms | None, seed: int
    ) -> None:
        """What is asked of an edit's mask."""
        if norms is None or not len(mask.restrict(matrices=("Q", "K"), layers=list(norms.layout))):
            return
        self.add("by_frequency", edit, mask_by_frequency(model, mask, seed=seed))
        self.add("shares", edit, share_at_frequencies(model, mask, norms.dominant(), seed=seed))
        self.add("ranks", edit, mask_rank(model, mask, matches=("matrix", "row"), seed=seed))

    def frames(self) -> dict[str, pd.DataFrame]:
        """All of them."""
        import pandas as pd

        return {
            name: pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()
            for name, parts in self._parts.items()
        }
