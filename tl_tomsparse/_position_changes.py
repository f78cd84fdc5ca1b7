"""Position measures of one state of a model, and how two states differ; a part of `position`.

change of a measure    what each sample (or group of samples) adds to a sum, and its count, so that any
                       choice of samples gives sum / count
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Int64
from numpy.typing import NDArray
from torch import Tensor

from tl_tomsparse._intervals import ClusterBootstrap, Estimate, agreed_interval, group_reach, mean_intervals
from tl_tomsparse._model import ModelView
from tl_tomsparse._stream import Current, stream
from tl_tomsparse.rotary import FrequencyNorms, norms_measure
from tl_tomsparse.samples import Samples
from tl_tomsparse.sink import BosAngles, SinkAttention, angles_measure, attention_measure, sink_shift

if TYPE_CHECKING:
    import pandas as pd

Floats = NDArray[np.float64]
Sums = Mapping[str, tuple[Floats, Floats]]
"""For each measure what each sample (or group of them) adds to a sum, and how much it counts."""
_COUNTED = {"sinks_shifted": (0.0, 1.0), "sink_rate": (-1.0, 1.0)}  # the least and the most of a sample


@dataclass(frozen=True, eq=False)
class Position:
    """Position measures of a model, unedited or under one edit.

    Attributes:
        attention: to the token.
        angles: to its key; None where no layer has a rotation.
        norms: by frequency; None where no layer has a rotation.
        unrotated: angles before the rotation; None where they were not asked for.
    """

    attention: SinkAttention
    angles: BosAngles | None
    norms: FrequencyNorms | None
    unrotated: BosAngles | None = None


def measure_position(
    seen: ModelView,
    samples: Samples,
    at: Int64[Tensor, " rows"],
    batch_tokens: int | None,
    *,
    unrotated: bool = False,
) -> Position:
    """Everything in one pass over the samples, of the token at this position in each row."""
    now, turned = Current(), bool(seen.rotations[0])
    attention = attention_measure(seen, samples, now, at=at)
    angles = angles_measure(seen, samples, now, at=at) if turned else None
    norms = norms_measure(seen, samples, now) if turned else None
    back = None
    if turned and unrotated:
        back = angles_measure(seen, samples, now, at=at, rotated=False)
    hooks = [hook for measure in (attention, angles, norms, back) if measure for hook in measure.hooks]
    stream(seen, samples, hooks, now, description="position", batch_tokens=batch_tokens, show_progress=False)
    return Position(
        attention.result(),
        angles.result() if angles else None,
        norms.result() if norms else None,
        back.result() if back else None,
    )


@dataclass(frozen=True, eq=False)
class Changes:
    """What one edit changed.

    Attributes:
        measures: of the summary.
        heads: for each measure of the heads, the mean change, `[layers * heads]`.
        norms: for each (layer, part) the RMS norm `[heads, pairs]`.
        cosine: for each layer what each frequency adds to the cosine with the token's key, `[heads, pairs]`.
        shifted: for each layer, and -1 for all, the share of the sinks that shifted.
        degrees: of "all" heads and of "sink" heads the share of the queries at each degree, `[180]`.
    """

    measures: Sums
    heads: dict[str, Floats]
    norms: Mapping[tuple[int, str], Tensor]
    cosine: Mapping[int, Tensor]
    shifted: dict[int, float]
    degrees: dict[str, Floats]


class Comparison:
    """Compares what edits did with the unedited model."""

    def __init__(self, before: Position, eps: float, threshold: float) -> None:
        self.before, self.eps, self.threshold = before, eps, threshold
        self.sink_heads = [
            (layer, head)
            for layer, share in before.attention.attention.items()
            for head in (share.nanmean(0) > eps).nonzero()[:, 0].tolist()
        ]
        self.dominant = {} if before.norms is None else dominant_pairs(before.norms)

    def of(self, after: Position) -> Changes:
        """The changes of one edit."""
        per_head = {name: _joined(values) for name, values in self._per_head(after).items()}
        heads = {name: np.nanmean(values, 0) for name, values in per_head.items()}
        norms = {} if after.norms is None else after.norms.rms
        cosine = {} if after.angles is None else after.angles.cosine
        measures, degrees = dict(self._measures(after)), self._degrees(after)
        return Changes(measures, heads, norms, cosine, self._shifted(after), degrees)

    def heads(self, after: Position, random: Sequence[Changes], seed: int) -> pd.DataFrame:
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

    def frequencies(self, after: Position, random: Sequence[Changes]) -> pd.DataFrame:
        """See `PositionEffects.frequencies`."""
        import pandas as pd

        if self.before.norms is None or after.norms is None:
            return pd.DataFrame()
        names = ["layer", "part", "head", "frequency", "radians", "wavelength"]
        old, new = self.before.norms.to_frame(), after.norms.to_frame()
        frame = old[names].copy()
        for one, state in ((old, "before"), (new, "after")):
            frame[state] = one["rms"]
            for end in ("low", "high"):
                frame[f"{state}_{end}"] = one[end]
            for logit in ("logit", "logit_first"):
                frame[f"{logit}_{state}"] = one[logit]

        return frame.assign(**_range(np.stack([_flat(one.norms) for one in random])))

    def cosines(self, after: Position, random: Sequence[Changes]) -> pd.DataFrame:
        """See `PositionEffects.cosines`."""
        import pandas as pd

        if self.before.norms is None or self.before.angles is None or after.angles is None:
            return pd.DataFrame()
        # The same layers, heads and frequencies as the norms of queries have.
        names = ["layer", "head", "frequency", "radians", "wavelength"]
        norms = self.before.norms.to_frame()
        frame = norms[norms.part == "q"][names].reset_index(drop=True)
        for angles, state in ((self.before.angles, "before"), (after.angles, "after")):
            mean = _flat(angles.cosine)
            reach = _flat({n: group_reach(one.numpy()) for n, one in angles.cosine_groups.items()})
            frame[state], frame[f"{state}_low"], frame[f"{state}_high"] = mean, mean - reach, mean + reach
        return frame.assign(**_range(np.stack([_flat(one.cosine) for one in random])))

    def degrees(self, after: Position, random: Sequence[Changes]) -> pd.DataFrame:
        """See `PositionEffects.degrees`."""
        import pandas as pd

        old, new = self._degrees(self.before), self._degrees(after)
        frames = []
        for heads, share in old.items():
            frame = pd.DataFrame({"degree": np.arange(len(share)), "before": share, "after": new[heads]})
            frame.insert(0, "heads", heads)
            frames.append(frame.assign(**_range(np.stack([one.degrees[heads] for one in random]))))
        return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()

    def sinks(self, after: Position, random: Sequence[Changes]) -> pd.DataFrame:
        """See `PositionEffects.sinks`."""
        frame = self._shift(after)
        drawn = np.array([[one.shifted[layer] for layer in frame.layer] for one in random])
        return frame.assign(**_range(drawn))

    def _shift(self, after: Position) -> pd.DataFrame:
        return sink_shift(self.before.attention, after.attention, eps=self.eps, threshold=self.threshold)

    def _shifted(self, after: Position) -> dict[int, float]:
        return self._shift(after).set_index("layer").shifted.to_dict()

    def _degrees(self, of: Position) -> dict[str, Floats]:
        if of.angles is None:
            return {}
        counts = of.angles.degrees
        sinks = [counts[layer][head] for layer, head in self.sink_heads if layer in counts]
        found = {"all": torch.cat(list(counts.values())).sum(0)}
        if sinks:
            found["sink"] = torch.stack(sinks).sum(0)
        return {heads: (total.double() / total.sum()).numpy() for heads, total in found.items()}

    def _levels(self, of: Position) -> dict[str, Mapping[int, Tensor]]:
        """For each measure of the heads `[n, heads]` by layer."""
        levels: dict[str, Mapping[int, Tensor]] = {"attention": of.attention.attention}
        if of.angles is not None:
            levels |= {"angle": of.angles.to_sink, "angle_others": of.angles.to_others}
        if (back := of.unrotated) is not None:
            levels |= {"angle_unrotated": back.to_sink, "angle_others_unrotated": back.to_others}
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
        known = torch.cat([share.isfinite() for share in old.values()], 1).sum(1).double().numpy()
        above = [
            torch.cat([share > self.eps for share in levels.values()], 1).sum(1).double().numpy()
            for levels in (old, new)
        ]
        yield "sink_rate", (above[1] - above[0], known)
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


def dominant_pairs(norms: FrequencyNorms) -> dict[tuple[int, str], Tensor]:
    """For each (layer, part) `[heads, pairs]`: True at the dominant frequencies of a head."""
    chosen = {key: torch.zeros(rms.shape, dtype=torch.bool) for key, rms in norms.rms.items()}
    for row in norms.dominant().itertuples():
        chosen[row.layer, row.part][row.head, row.frequency] = True
    return chosen


def _flat(values: Mapping[Any, Tensor | NDArray[Any]]) -> Floats:
    """All numbers in one row."""
    return np.concatenate([np.asarray(one).flatten() for one in values.values()])


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


class Clusters:
    """Bootstraps over samples, groups of samples or groups of stories, made once for each number of them.

    Args:
        n_draws: how often they are drawn again.
        seed: of the draws.
        smooth: see [`ClusterBootstrap`][]; for counts, not for continuous changes.
    """

    def __init__(self, n_draws: int, seed: int, *, smooth: bool = False) -> None:
        self._options: dict[str, Any] = {"n_draws": n_draws, "seed": seed, "smooth": smooth}
        self._made: dict[int, ClusterBootstrap] = {}

    def __call__(self, n: int) -> ClusterBootstrap:
        """The one for n clusters."""
        if n not in self._made:
            self._made[n] = ClusterBootstrap(n, **self._options)
        return self._made[n]


def summary(
    own: Sums, random: Sequence[Sums], clusters: Clusters, *, whole: Sums | None = None
) -> pd.DataFrame:
    """One row a measure: the change of one edit beside those of random ones; see `PositionEffects.summary`.

    Args:
        own: of the edit.
        random: of each random edit.
        clusters: what is drawn again.
        whole: of an edit that this one is a part of: adds to_whole (change - the whole's change) with its
            interval (to_whole_low, to_whole_high).
    """
    import pandas as pd

    rows = []
    for name, (values, counts) in own.items():
        drawn = np.stack([one[name][0] for one in random], 1)
        bootstrap = clusters(len(values))
        change = bootstrap.ratio(values, counts)
        low, high = _ends(name, change, values, counts)
        beyond = bootstrap.ratio(values[:, None] - drawn, counts)
        each = drawn.sum(0) / counts.sum()
        row = {"measure": name, "value": change.value, "low": low, "high": high}
        row |= _range(each)
        row |= {"beyond": beyond.value, "beyond_low": beyond.low, "beyond_high": beyond.high}
        row |= {"p_above": beyond.p_above(), "p_below": beyond.p_below()}
        row |= {"as_high": int((each >= change.value).sum()), "as_low": int((each <= change.value).sum())}
        if whole is not None:
            gap = bootstrap.ratio(values - whole[name][0], counts)
            row |= {"to_whole": gap.value, "to_whole_low": gap.low, "to_whole_high": gap.high}
        rows.append(row)
    return pd.DataFrame(rows)


def _ends(name: str, change: Estimate, values: Floats, counts: Floats) -> tuple[float, float]:
    """Of the interval; that the samples seen all have the same share is no proof that all others do."""
    shares = values[counts > 0] / counts[counts > 0]
    if name not in _COUNTED or (shares != shares[0]).any():
        return change.low, change.high
    lowest, highest = _COUNTED[name]
    return agreed_interval(change.value, len(shares), lowest=lowest, highest=highest)
