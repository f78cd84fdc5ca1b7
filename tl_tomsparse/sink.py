"""The attention sink: the angle between queries and the key of one token, and how much attention it gets.

    angle:      degrees of arccos(q_i . k_t / (|q_i| |k_t|)), queries i after t; after or before the rotation
    attention:  a(layer, head, sample) = mean over queries i >= t of A[i, t]     (Gu et al., arXiv 2410.10781)
    sink rate:  share of (layer, head, sample) with a > eps
    sink shift: share of the sinks whose a moved by more than a threshold          (arXiv 2504.04238)

t is 0 by default: BOS, where rows begin with it; it may be another one in each row. Padding never counts.
In layers with a sliding window, queries that lie beyond it count as attending to t with 0. Nothing is claimed
about why a token is a sink.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor

from tl_tomsparse._checks import TomsparseError
from tl_tomsparse._intervals import agreed_interval, mean_intervals, proportion_interval
from tl_tomsparse._model import ModelView, view
from tl_tomsparse._sink_token import check_threshold, key_name, positions_of, stated
from tl_tomsparse._stream import Current, Measure, stream
from tl_tomsparse.rotary import GROUPS, RotaryLayout, with_rotation
from tl_tomsparse.samples import Samples

if TYPE_CHECKING:
    import pandas as pd

_DEGREES = 180
_CELLS, _CELLS_ON_CPU = 1 << 25, 1 << 18  # products of queries and keys held at once; in a CPU's cache


@dataclass(frozen=True, eq=False)
class BosAngles:
    """Angles in degrees between queries and the key of one token, and the other keys.

    Attributes:
        to_sink: for each layer `[n, heads]`, float64: mean over the queries of a sample after the token.
        to_others: the same for all other keys at or before the query, its own included.
        by_position: for each layer `[heads, pos]`: mean over samples of the angle to the token, by query
            position; nan up to the token, and where no sample is that long.
        degrees: for each layer `[heads, 180]`, int64: how many queries have an angle to the token of 0 to 1
            degrees, of 1 to 2 degrees, and so on.
        cosine: for each layer `[heads, pairs]`: what each frequency adds to the cosine with the token's key,
            a mean over queries of samples. What is not rotated is left out.
        cosine_groups: for each layer `[groups, heads, pairs]`: the same in each of up to 20 groups of samples
            (the n-th sample is in group n mod 20), for intervals.
        layout: frequencies and pairs.
        position: of the token in each row; a tuple of one for each row where they differ.
        rotated: whether queries and keys are taken after the rotation.
        bos: whether rows begin with BOS.
        ids: of the samples.
    """

    to_sink: Mapping[int, Float[Tensor, "n heads"]]
    to_others: Mapping[int, Float[Tensor, "n heads"]]
    by_position: Mapping[int, Float[Tensor, "heads pos"]]
    degrees: Mapping[int, Int64[Tensor, "heads 180"]]
    cosine: Mapping[int, Float[Tensor, "heads pairs"]]
    cosine_groups: Mapping[int, Float[Tensor, "groups heads pairs"]]
    layout: RotaryLayout
    position: int | tuple[int, ...]
    rotated: bool
    bos: bool
    ids: tuple[str, ...]

    def __repr__(self) -> str:
        """One line."""
        return f"BosAngles({len(self.ids)} samples, {key_name(self.position, self.bos)})"

    def to_frame(self, *, seed: int = 0) -> pd.DataFrame:
        """One row a layer and head: mean angle to the token and to other keys, and their difference, each
        with a 95 % bootstrap interval over samples (`_low`, `_high`).
        """
        import pandas as pd

        frames = []
        for layer, sink in self.to_sink.items():
            columns: dict[str, Any] = {"layer": layer, "head": range(sink.shape[1])}
            others = self.to_others[layer]
            for name, values in (("to_sink", sink), ("to_others", others), ("difference", sink - others)):
                columns[name], columns[f"{name}_low"], columns[f"{name}_high"] = mean_intervals(
                    values.numpy(), seed=seed
                )
            frames.append(pd.DataFrame(columns))
        return pd.concat(frames, ignore_index=True)


@dataclass(frozen=True, eq=False)
class SinkAttention:
    """How much attention one token gets.

    Attributes:
        attention: for each layer `[n, heads]`, float64: mean over the queries of a sample from the token on;
            those that a sliding window keeps from it count with 0.
        position: of the token in each row; a tuple of one for each row where they differ.
        bos: whether rows begin with BOS.
        ids: of the samples.
    """

    attention: Mapping[int, Float[Tensor, "n heads"]]
    position: int | tuple[int, ...]
    bos: bool
    ids: tuple[str, ...]

    def __repr__(self) -> str:
        """One line."""
        token = key_name(self.position, self.bos)
        return f"SinkAttention({len(self.ids)} samples, {token}, sink rate {self.rate():.3f} at 0.3)"

    def rate(self, eps: float = 0.3) -> float:
        """The share of (layer, head, sample) whose attention to the token exceeds eps."""
        check_threshold(eps)
        return float(self._above(eps).mean())

    def rate_interval(self, eps: float = 0.3, *, seed: int = 0) -> tuple[float, float]:
        """The ends of the 95 % bootstrap interval of `rate` over samples; all heads of a sample are drawn
        together. Where all samples have the same share, it tells what as many samples may have missed (exact
        binomial at 0 and 1).

        Args:
            eps: as for `rate`.
            seed: of the draws.
        """
        check_threshold(eps)
        shares = self._above(eps).mean(1)
        if (shares == shares[0]).all():
            return agreed_interval(float(shares[0]), len(shares))
        _, low, high = mean_intervals(shares[:, None].numpy(), seed=seed)
        return float(low[0]), float(high[0])

    def _above(self, eps: float) -> Tensor:
        """`[n, heads of all layers]`: 1 where the attention exceeds eps."""
        return torch.cat([(a > eps).double() for a in self.attention.values()], 1)

    def to_frame(self, *, eps: float = 0.3, seed: int = 0) -> pd.DataFrame:
        """One row a layer and head: mean attention with its 95 % bootstrap interval over samples (low, high),
        and the share of samples in which it exceeds eps, rate, with its exact binomial one (rate_low,
        rate_high).
        """
        import pandas as pd

        check_threshold(eps)
        frames = []
        for layer, values in self.attention.items():
            mean, low, high = mean_intervals(values.numpy(), seed=seed)
            columns = {"layer": layer, "head": range(values.shape[1]), "attention": mean, "low": low}
            above = (values > eps).sum(0)
            ends = np.array([proportion_interval(int(k), len(values)) for k in above])
            columns |= {"high": high, "rate": (above / len(values)).double()}
            columns |= {"rate_low": ends[:, 0], "rate_high": ends[:, 1]}
            frames.append(pd.DataFrame(columns))
        return pd.concat(frames, ignore_index=True)


def bos_angles(
    model: Any,
    samples: Samples,
    *,
    position: int | Int[Tensor, " rows"] = 0,
    rotated: bool = True,
    batch_tokens: int | None = None,
    show_progress: bool = True,
) -> BosAngles:
    """Angles between each query and the key of one token, for every head, against the other keys.

    Args:
        model: `HookedTransformer` or `TransformerBridge`, in evaluation mode; inside `edit.applied(model)`
            the edited one is measured.
        samples: rows of tokens.
        position: of the token, counted from 0: one for all rows, or an integer tensor `[rows]` of one for
            each; 0 is BOS where rows begin with it.
        rotated: after the rotation, as attention compares them, or before it.
        batch_tokens: most tokens in one batch, padding included.
        show_progress: a progress bar over samples.

    Raises:
        TomsparseError: no layer with a rotation; training mode; a position that some row does not have, or
            that is its last one; a tensor of positions that has another shape or no integers.
    """
    seen = with_rotation(model)
    at = positions_of(seen, samples, position)
    now = Current()
    measure = angles_measure(seen, samples, now, at=at, rotated=rotated)
    stream(
        seen, samples, measure.hooks, now,
        description="angles", batch_tokens=batch_tokens, show_progress=show_progress,
    )  # fmt: skip
    return measure.result()


def angles_measure(
    seen: ModelView, samples: Samples, now: Current, *, at: Int64[Tensor, " rows"], rotated: bool = True
) -> Measure[BosAngles]:
    """`bos_angles` as a measure, so that others can be taken in the same pass; `at` is the position of the
    token in each row.
    """
    rotations = seen.rotations_at(samples.lengths.tolist())[0]
    n, longest = samples.tokens.shape
    n_groups = min(GROUPS, n)
    to_sink: dict[int, Tensor] = {}
    to_others: dict[int, Tensor] = {}
    by_position: dict[int, Tensor] = {}
    histograms: dict[int, Tensor] = {}
    cosine: dict[int, Tensor] = {}
    queries: dict[int, Tensor] = {}

    def begin(layer: int, heads: int, device: torch.device) -> None:
        for kept in (to_sink, to_others):
            kept[layer] = torch.full((n, heads), torch.nan, dtype=torch.float64)
        by_position[layer] = torch.zeros(heads, longest, dtype=torch.float64)
        histograms[layer] = torch.zeros(heads, _DEGREES, dtype=torch.int64)
        pairs = len(rotations[layer].frequencies)
        cosine[layer] = torch.zeros(n_groups, heads, pairs, dtype=torch.float64, device=device)

    def store(layer: int, part: str, value: Tensor) -> None:
        if not rotated:
            places = torch.arange(value.shape[1], device=value.device)[None].expand(value.shape[:2])
            value = rotations[layer].turn(value, places, back=True)
        if part == "q":
            queries[layer] = _directions(value)
            return
        q, k = queries.pop(layer), _directions(value)
        k = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
        token = at[now.rows].to(k.device)
        key = k[torch.arange(len(k), device=k.device), token].double()
        heads = q.shape[2]
        if layer not in to_sink:
            begin(layer, heads, q.device)
        after = _beyond(now.mask, token)
        count = after.sum(1).double()
        degrees = torch.einsum("bqhd,bhd->bhq", q.double(), key).clamp(-1, 1).arccos().rad2deg()
        chosen = degrees * after[:, None]
        to_sink[layer][now.rows] = (chosen.sum(-1) / count[:, None]).cpu()
        by_position[layer][:, : chosen.shape[-1]] += chosen.sum(0).cpu()
        histograms[layer] += _histogram(degrees, after)
        # Besides the token, a query sees as many keys as its position says.
        pairs = (after * torch.arange(after.shape[1], device=after.device)).sum(1).double()
        to_others[layer][now.rows] = (_other_angles(q, k, after, token) / pairs[:, None]).cpu()
        mean = torch.einsum("bqhd,bq->bhd", q.double(), after / count[:, None])
        first, second = (axes.to(q.device) for axes in (rotations[layer].first, rotations[layer].second))
        parts = mean[..., first] * key[..., first] + mean[..., second] * key[..., second]
        cosine[layer].index_add_(0, (now.rows % n_groups).to(parts.device), parts)

    def result() -> BosAngles:
        counts = _beyond(samples.attention_mask, at).sum(0).double()
        counts[counts == 0] = torch.nan
        sizes = torch.arange(n).remainder(n_groups).bincount()[:, None, None]
        return BosAngles(
            to_sink=to_sink,
            to_others=to_others,
            by_position={layer: total / counts for layer, total in by_position.items()},
            degrees=histograms,
            cosine={layer: total.sum(0).cpu() / n for layer, total in cosine.items()},
            cosine_groups={layer: total.cpu() / sizes for layer, total in cosine.items()},
            layout=RotaryLayout.of(seen.model, length=int(samples.lengths.max())),
            position=stated(at),
            rotated=rotated,
            bos=samples.bos,
            ids=samples.ids,
        )

    return Measure(seen.rotated_hooks(rotations, store), result)


def _beyond(mask: Tensor, token: Tensor) -> Tensor:
    """`[batch, pos]`: True at real tokens after the one of each row."""
    return mask & (torch.arange(mask.shape[1], device=mask.device) > token[:, None])


def _directions(value: Tensor) -> Tensor:
    """Of length one, in float32 or better."""
    exact = value if value.dtype == torch.float64 else value.float()
    return exact / exact.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(exact.dtype).tiny)


def _histogram(degrees: Tensor, counted: Tensor) -> Tensor:
    """`[heads, 180]` from angles `[batch, heads, query]`; those of exactly 180 are with the last."""
    heads = degrees.shape[1]
    bins = (
        degrees.long().clamp_max(_DEGREES - 1)
        + _DEGREES * torch.arange(heads, device=degrees.device)[:, None]
    )
    chosen = bins.transpose(1, 2)[counted]
    return torch.bincount(chosen.flatten(), minlength=heads * _DEGREES).view(heads, _DEGREES).cpu()


def _other_angles(q: Tensor, k: Tensor, after: Tensor, token: Tensor) -> Tensor:
    """`[batch, heads]`, float64: sum of the angles in degrees of each query that counts with every key at or
    before it but that of the row's token. Some queries at a time, so that no `[query, key]` is held for a
    whole row.
    """
    batch, length, heads, _ = q.shape
    cells = _CELLS_ON_CPU if q.device.type == "cpu" else _CELLS
    step = max(1, cells // (batch * heads * length))
    total = torch.zeros(batch, heads, dtype=torch.float64, device=q.device)
    for start in range(int(token.min()) + 1, length, step):
        end = min(start + step, length)
        cosine = torch.einsum("bqhd,bkhd->bhqk", q[:, start:end], k[:, :end])
        visible = torch.ones(end - start, end, dtype=torch.bool, device=q.device).tril(start)
        angles = cosine.clamp_(-1, 1).arccos_().mul_(visible)
        # Where the token is not among these keys, no query here counts.
        its_own = token.clamp_max(end - 1)[:, None, None, None].expand(-1, heads, end - start, 1)
        angles.scatter_(-1, its_own, 0.0)
        total += torch.einsum("bhq,bq->bh", angles.sum(-1, dtype=torch.float64), after[:, start:end].double())
    return total.rad2deg()


def sink_attention(
    model: Any,
    samples: Samples,
    *,
    position: int | Int[Tensor, " rows"] = 0,
    batch_tokens: int | None = None,
    show_progress: bool = True,
) -> SinkAttention:
    """The attention that one token gets from every head: of any model that shows its attention pattern.

    Args:
        model: `HookedTransformer` or `TransformerBridge`, in evaluation mode; inside `edit.applied(model)`
            the edited one is measured.
        samples: rows of tokens.
        position: of the token, counted from 0: one for all rows, or an integer tensor `[rows]` of one for
            each; 0 is BOS where rows begin with it.
        batch_tokens: most tokens in one batch, padding included.
        show_progress: a progress bar over samples.

    Raises:
        TomsparseError: training mode; a position that some row does not have, or that is its last one; a
            tensor of positions that has another shape or no integers; no attention pattern is shown.
    """
    seen = view(model)
    at = positions_of(seen, samples, position)
    now = Current()
    measure = attention_measure(seen, samples, now, at=at)
    stream(
        seen, samples, measure.hooks, now,
        description="sink", batch_tokens=batch_tokens, show_progress=show_progress,
    )  # fmt: skip
    return measure.result()


def attention_measure(
    seen: ModelView, samples: Samples, now: Current, *, at: Int64[Tensor, " rows"]
) -> Measure[SinkAttention]:
    """`sink_attention` as a measure, so that others can be taken in the same pass; `at` is the position of
    the token in each row.
    """
    attention: dict[int, Tensor] = {}

    def store(layer: int, pattern: Tensor) -> None:
        token = at[now.rows].to(now.mask.device)
        looks = _beyond(now.mask, token - 1)
        row = torch.arange(len(token), device=token.device)
        share = pattern[row, :, :, token].double() * looks[:, None]
        kept = attention.setdefault(layer, torch.full((len(samples), pattern.shape[1]), torch.nan).double())
        kept[now.rows] = (share.sum(-1) / looks.sum(1)[:, None]).cpu()

    def result() -> SinkAttention:
        if not attention:
            raise TomsparseError(f"{seen.name} shows no attention pattern (hook_pattern never fires).")
        return SinkAttention(attention, stated(at), samples.bos, samples.ids)

    return Measure(seen.pattern_hooks(store), result)


def sink_shift(
    before: SinkAttention, after: SinkAttention, *, eps: float = 0.3, threshold: float = 0.01
) -> pd.DataFrame:
    """How many of the sinks move: attention to the token changes by more than a threshold.

    Args:
        before: of the unedited model.
        after: of the edited one, on the same samples and the same token.
        eps: what attends to the token by more than this is a sink (before).
        threshold: change of the mean attention that counts; the paper's is 0.01.

    Returns:
        One row a layer and a last one for all ("layer" -1): sinks (how many of heads times samples), shifted
        (share of these), its exact 95 % interval (low, high; heads and samples taken as independent), and
        mean_change over the sinks.

    Raises:
        TomsparseError: other samples, another token or other layers; eps or threshold outside [0, 1).
    """
    import pandas as pd

    for value in (eps, threshold):
        check_threshold(value)
    check_alike(before, after)
    rows = []
    total: list[tuple[Tensor, Tensor]] = []
    for layer, values in before.attention.items():
        sinks, change = values > eps, after.attention[layer] - values
        total.append((sinks.flatten(), change.flatten()))
        rows.append(_shifted(layer, sinks, change, threshold))
    every, moved = (torch.cat(parts) for parts in zip(*total))
    rows.append(_shifted(-1, every, moved, threshold))
    return pd.DataFrame(rows)


def check_alike(before: BosAngles | SinkAttention, after: BosAngles | SinkAttention) -> None:
    """Refuse to compare what was measured on other samples, another token, with another BOS or otherwise."""
    for what in ("ids", "position", "bos", "rotated"):
        first, second = getattr(before, what, None), getattr(after, what, None)
        if first != second:
            shown = "other samples" if what == "ids" else f"{what}={first} and {what}={second}"
            raise TomsparseError(f"Before and after have {shown}; measure both on the same samples alike.")
    layers = [sorted(x.to_sink if isinstance(x, BosAngles) else x.attention) for x in (before, after)]
    if layers[0] != layers[1]:
        raise TomsparseError(f"Before and after have other layers, {layers[0]} and {layers[1]}.")


def _shifted(layer: int, sinks: Tensor, change: Tensor, threshold: float) -> dict[str, Any]:
    n, moved = int(sinks.sum()), int((sinks & (change.abs() > threshold)).sum())
    low, high = proportion_interval(moved, n)
    share = moved / n if n else float("nan")
    mean = float(change[sinks].mean()) if n else float("nan")
    return {"layer": layer, "sinks": n, "shifted": share, "low": low, "high": high, "mean_change": mean}
