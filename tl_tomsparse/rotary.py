"""Which rotary frequencies carry the norm of queries and keys, and what each adds to the attention logit.

    z_m = x_i + 1j x_j        the m-th pair of dimensions of a head, turned by theta_m a position
    norm of frequency m:      |z_m|; rotation leaves it as it is
    query p, key s:           q(p) . k(s) = sum_m Re(q_m(p) conj(k_m(s))) + dimensions that are not turned

RoPE: Su et al., arXiv 2104.09864. The frequencies are the model's own, with any scaling, found and checked on
its activations. That masked weights lie where the norm is large is the claim of arXiv 2504.04238; nothing is
claimed here about why.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_tomsparse._checks import TomsparseError, check_positive
from tl_tomsparse._intervals import group_reach
from tl_tomsparse._model import ModelView, Rotation, view
from tl_tomsparse._stream import Current, Measure, stream
from tl_tomsparse.samples import Samples, check_samples

if TYPE_CHECKING:
    import pandas as pd

Part = Literal["q", "k"]
GROUPS = 20


@dataclass(frozen=True, eq=False)
class RotaryLayer:
    """The rotation of one layer.

    Attributes:
        frequencies: `[pairs]`, float64, radians a position, as the model uses them.
        pairs: `[pairs, 2]` the two dimensions of a head that each frequency turns, from the first towards the
            second.
        pairing: "half" (m, m + rotary_dim / 2), or "adjacent" (2m, 2m + 1).
    """

    frequencies: Float[Tensor, " pairs"]
    pairs: Int[Tensor, "pairs 2"]
    pairing: Literal["half", "adjacent"]

    @property
    def rotary_dim(self) -> int:
        """How many dimensions of a head are turned; the rest pass unchanged."""
        return 2 * len(self.frequencies)

    @property
    def slow(self) -> Bool[Tensor, " pairs"]:
        """Which frequencies are of the slower half; with an odd number the middle one is not (ours)."""
        slow = torch.zeros(len(self.frequencies), dtype=torch.bool)
        slow[self.frequencies.argsort(stable=True)[: len(slow) // 2]] = True
        return slow

    @property
    def wavelengths(self) -> Float[Tensor, " pairs"]:
        """Tokens for a full turn."""
        return 2 * math.pi / self.frequencies


class RotaryLayout(Mapping[int, RotaryLayer]):
    """How each layer of a model turns queries and keys by their position; maps layers to [`RotaryLayer`][].

    Found where the model keeps its frequencies and checked against its own rotated queries and keys (where
    `hook_rot_q` never fires: against its attention pattern).

    Attributes:
        n_ctx: the context length in tokens, to compare wavelengths with.
        without: for each layer with attention but no rotation, why.
    """

    def __init__(self, layers: Mapping[int, RotaryLayer], n_ctx: int, without: Mapping[int, str]) -> None:
        self._layers, self.n_ctx, self.without = dict(layers), n_ctx, dict(without)

    @classmethod
    def of(cls, model: Any, *, length: int | None = None) -> RotaryLayout:
        """The layout of a model.

        Args:
            model: `HookedTransformer` or `TransformerBridge`, in evaluation mode.
            length: of rows in tokens. It matters only to models that turn long rows by other frequencies
                (LongRoPE); by default rows of a few hundred tokens.

        Raises:
            TomsparseError: no layer has a rotation; the message says why.
        """
        seen = with_rotation(model)
        if length is not None:
            check_positive("length", length)
        rotations, reasons = seen.rotations if length is None else seen.rotations_at((length,))
        return cls({layer: _public(rotation) for layer, rotation in rotations.items()}, seen.n_ctx, reasons)

    def __getitem__(self, layer: int) -> RotaryLayer:
        """The rotation of a layer."""
        return self._layers[layer]

    def __iter__(self) -> Iterator[int]:
        """Layers with a rotation."""
        return iter(self._layers)

    def __len__(self) -> int:
        """How many layers have a rotation."""
        return len(self._layers)

    def __repr__(self) -> str:
        """One line."""
        counts = sorted({len(layer.frequencies) for layer in self.values()})
        return f"RotaryLayout({len(self)} layers, {counts} frequencies a head, context {self.n_ctx})"

    def to_frame(self) -> pd.DataFrame:
        """One row a layer and frequency: layer, frequency (number), radians, wavelength, first, second."""
        import pandas as pd

        rows = [
            {
                "layer": layer,
                "frequency": m,
                "radians": float(rotation.frequencies[m]),
                "wavelength": float(rotation.wavelengths[m]),
                "first": int(rotation.pairs[m, 0]),
                "second": int(rotation.pairs[m, 1]),
            }
            for layer, rotation in self.items()
            for m in range(len(rotation.frequencies))
        ]
        return pd.DataFrame(rows)


@dataclass(frozen=True, eq=False)
class FrequencyNorms:
    """Norms of queries and keys by frequency, over all real positions of some samples.

    Attributes:
        layout: frequencies and pairs.
        rms, mean, largest: for each (layer, "q" or "k") `[heads, pairs]`, float64: root mean square, mean and
            maximum of the norm of a pair over positions and samples. Keys have key-value heads, not expanded.
        logit: for each layer `[heads, pairs]`, float64: the mean over queries and the keys at or before them
            of what the frequency adds to q . k / sqrt(d_head), the attention logit of most models (Gemma has
            another scale, and caps it; in layers with a sliding window keys before it count, too).
        logit_first: the same for the first token alone as key: BOS, where rows begin with it.
        squares: for each (layer, "q" or "k") `[groups, heads, pairs]`, float64: mean square of the norm in
            each of up to 20 groups of samples (the n-th sample is in group n mod 20), for intervals.
        n_positions: how many positions were seen.
        bos: whether rows begin with BOS.
    """

    layout: RotaryLayout
    rms: Mapping[tuple[int, str], Float[Tensor, "heads pairs"]]
    mean: Mapping[tuple[int, str], Float[Tensor, "heads pairs"]]
    largest: Mapping[tuple[int, str], Float[Tensor, "heads pairs"]]
    logit: Mapping[int, Float[Tensor, "heads pairs"]]
    logit_first: Mapping[int, Float[Tensor, "heads pairs"]]
    squares: Mapping[tuple[int, str], Float[Tensor, "groups heads pairs"]]
    n_positions: int
    bos: bool

    def __repr__(self) -> str:
        """One line."""
        return f"FrequencyNorms({self.layout!r}, {self.n_positions} positions)"

    def to_frame(self) -> pd.DataFrame:
        """One row a layer, part, head and frequency: radians, wavelength, rms with its 95 % interval (low,
        high: Student's t over the groups' mean squares; nan with one sample), mean, largest, share (of the
        head's squared norm over turned dimensions); of queries also logit and logit_first.
        """
        import pandas as pd

        frames = []
        for (layer, part), rms in self.rms.items():
            heads, pairs = rms.shape
            rotation = self.layout[layer]
            reach = torch.from_numpy(group_reach(self.squares[layer, part].numpy()))
            low, high = ((rms**2 + side * reach).clamp_min(0).sqrt() for side in (-1, 1))
            frame = pd.DataFrame(
                {
                    "layer": layer,
                    "part": part,
                    "head": torch.arange(heads).repeat_interleave(pairs).numpy(),
                    "frequency": torch.arange(pairs).repeat(heads).numpy(),
                    "radians": rotation.frequencies.repeat(heads).numpy(),
                    "wavelength": rotation.wavelengths.repeat(heads).numpy(),
                    "rms": rms.flatten().numpy(),
                    "low": low.flatten().numpy(),
                    "high": high.flatten().numpy(),
                    "mean": self.mean[layer, part].flatten().numpy(),
                    "largest": self.largest[layer, part].flatten().numpy(),
                    "share": (rms**2 / (rms**2).sum(1, keepdim=True)).flatten().numpy(),
                }
            )
            if part == "q":
                frame["logit"] = self.logit[layer].flatten().numpy()
                frame["logit_first"] = self.logit_first[layer].flatten().numpy()
            frames.append(frame)
        return pd.concat(frames, ignore_index=True)

    def dominant(self, *, share: float | None = None, top: int | None = None) -> pd.DataFrame:
        """The frequencies that hold a head's norm, strongest first.

        Args:
            share: the smallest set that holds at least this share of the head's squared norm (over turned
                dimensions); 0.5 if neither rule is given.
            top: instead, this many.

        Returns:
            The rows of `to_frame` that are dominant, with `order` from 0 in each head.

        Raises:
            TomsparseError: both rules, a share outside (0, 1], or fewer than one.
        """
        if share is not None and top is not None:
            raise TomsparseError("Pass share or top, not both.")
        if top is not None:
            check_positive("top", top)
        part = 0.5 if share is None else share
        if not 0 < part <= 1:
            raise TomsparseError(f"share={share} is not in (0, 1].")
        frame = self.to_frame()
        heads = ["layer", "part", "head"]
        frame = frame.sort_values([*heads, "share"], ascending=[True, True, True, False], kind="stable")
        frame["order"] = frame.groupby(heads).cumcount()
        if top is not None:
            return frame[frame.order < top].reset_index(drop=True)
        before = frame.groupby(heads).share.cumsum() - frame.share
        return frame[before < part * (1 - 1e-12)].reset_index(drop=True)


def frequency_norms(
    model: Any, samples: Samples, *, batch_tokens: int | None = None, show_progress: bool = True
) -> FrequencyNorms:
    """How much of queries and keys each rotary frequency carries.

    Every real position counts, BOS included; padding never does. Memory does not grow with the number of
    samples. Inside `edit.applied(model)` these are the norms of the edited model.

    Args:
        model: `HookedTransformer` or `TransformerBridge`, in evaluation mode.
        samples: rows of tokens; what is supervised does not matter.
        batch_tokens: most tokens in one batch, padding included.
        show_progress: a progress bar over samples.

    Raises:
        TomsparseError: no layer with a rotation; training mode; samples longer than the context.
    """
    seen = with_rotation(model)
    check_samples(seen, samples)
    now = Current()
    measure = norms_measure(seen, samples, now)
    stream(
        seen, samples, measure.hooks, now,
        description="frequency norms", batch_tokens=batch_tokens, show_progress=show_progress,
    )  # fmt: skip
    return measure.result()


def norms_measure(seen: ModelView, samples: Samples, now: Current) -> Measure[FrequencyNorms]:
    """`frequency_norms` as a measure, so that others can be taken in the same pass."""
    rotations = seen.rotations_at(samples.lengths.tolist())[0]
    layout = RotaryLayout.of(seen.model, length=int(samples.lengths.max()))
    sums = _Sums(layout, len(samples))
    queries: dict[int, Tensor] = {}

    def store(layer: int, part: str, value: Tensor) -> None:
        sums.add(layer, part, value, now)
        if part == "q":
            queries[layer] = value
        else:
            sums.add_logits(layer, queries.pop(layer), value, now.mask, seen.d_head)

    n = int(samples.attention_mask.sum())
    return Measure(seen.rotated_hooks(rotations, store), lambda: sums.result(n, samples.bos))


class _Sums:
    """Running sums over positions, in float64."""

    def __init__(self, layout: RotaryLayout, n_samples: int) -> None:
        self.layout, self.n_groups = layout, min(GROUPS, n_samples)
        self.sizes = torch.zeros(self.n_groups, dtype=torch.float64)  # positions in each group
        self.squares: dict[tuple[int, str], Tensor] = {}
        self.norms: dict[tuple[int, str], Tensor] = {}
        self.largest: dict[tuple[int, str], Tensor] = {}
        self.logits: dict[int, Tensor] = {}
        self.logits_first: dict[int, Tensor] = {}
        self.n_pairs = 0

    def _pairs(self, layer: int, value: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The dimensions of each pair, `[batch, pos, heads, pairs]`, zero at padding, float32 or better."""
        exact = value if value.dtype == torch.float64 else value.float()
        first, second = self.layout[layer].pairs.unbind(1)
        exact = exact * mask[:, :, None, None]
        return _taken(exact, first), _taken(exact, second)

    def add(self, layer: int, part: str, value: Tensor, now: Current) -> None:
        first, second = self._pairs(layer, value, now.mask)
        square = first * first + second * second
        key = (layer, part)
        group = (now.rows % self.n_groups).to(value.device)
        if key == (next(iter(self.layout)), "q"):
            self.sizes.index_add_(0, group.cpu(), now.mask.sum(1).double().cpu())
        if key not in self.squares:
            zeros = torch.zeros(square.shape[2:], dtype=torch.float64, device=value.device)
            self.squares[key] = zeros.expand(self.n_groups, -1, -1).clone()
            self.norms[key], self.largest[key] = zeros, zeros
        self.squares[key].index_add_(0, group, square.sum(1, dtype=torch.float64))
        self.largest[key] = torch.maximum(self.largest[key], square.amax((0, 1)).sqrt())
        self.norms[key] = self.norms[key] + square.sqrt_().sum((0, 1), dtype=torch.float64)

    def add_logits(self, layer: int, q: Tensor, k: Tensor, mask: Tensor, d_head: int) -> None:
        """Sums over queries and the keys up to each: a running sum over keys, so no pattern is made."""
        groups = (k.shape[2], q.shape[2] // k.shape[2])
        seen, first = 0.0, 0.0
        for of_q, of_k in zip(self._pairs(layer, q, mask), self._pairs(layer, k, mask)):
            of_q, of_k = of_q.unflatten(2, groups), of_k.double()
            seen += (of_q * of_k.cumsum(1)[:, :, :, None]).sum((0, 1)).flatten(0, 1)
            first += (of_q.sum(1, dtype=torch.float64) * of_k[:, 0, :, None]).sum(0).flatten(0, 1)
        for store, now in ((self.logits, seen), (self.logits_first, first)):
            store[layer] = store.get(layer, 0.0) + now * d_head**-0.5
        if layer == next(iter(self.layout)):
            lengths = mask.sum(1).long()
            self.n_pairs += int((lengths * (lengths + 1) // 2).sum())

    def result(self, n: int, bos: bool) -> FrequencyNorms:
        return FrequencyNorms(
            layout=self.layout,
            rms={key: (value.sum(0) / n).sqrt().cpu() for key, value in self.squares.items()},
            mean={key: (value / n).cpu() for key, value in self.norms.items()},
            largest={key: value.cpu() for key, value in self.largest.items()},
            logit={layer: (value / self.n_pairs).cpu() for layer, value in self.logits.items()},
            logit_first={layer: (value / n).cpu() for layer, value in self.logits_first.items()},
            squares={key: value.cpu() / self.sizes[:, None, None] for key, value in self.squares.items()},
            n_positions=n,
            bos=bos,
        )


def _taken(value: Tensor, index: Tensor) -> Tensor:
    """Some of the last axis; a view where they are evenly spaced, as pairs are."""
    step = int(index[1] - index[0]) if len(index) > 1 else 1
    start, stop = int(index[0]), int(index[-1]) + 1
    if step > 0 and torch.equal(index, torch.arange(start, stop, step)):
        return value[..., start:stop:step]
    return value[..., index.to(value.device)]


def with_rotation(model: Any) -> ModelView:
    """The view of a model that has a rotation in some layer; refuses others by reason."""
    seen = view(model)
    rotations, reasons = seen.rotations
    if not rotations:
        why = "; ".join(f"layer {layer}: {reason}" for layer, reason in list(reasons.items())[:3])
        why = why or "it offers no Q or K"
        raise TomsparseError(f"{seen.name} has no layer whose queries and keys are rotated ({why}).")
    return seen


def _public(rotation: Rotation) -> RotaryLayer:
    pairs = torch.stack([rotation.first, rotation.second], 1)
    return RotaryLayer(rotation.frequencies, pairs, "adjacent" if rotation.adjacent else "half")
