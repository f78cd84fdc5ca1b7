"""Which part of a mask carries what its edit does: the same edit on one part alone, and on all but this part.

    part            entries of the mask, chosen by matrix, rotary frequency or head; "not part": the others
    placebo         the same operator on random masks that match the *part*: mean and range over seeds
    to the whole    change under the part - change under the whole mask, paired by sample or story

A part that carries an effect shows it alone, and the rest does not. Parts overlap, and their changes need
not add up. Slow and fast are the slower and the faster half of a layer's frequencies; dominant ones hold half
of a head's squared norm on the samples; sink heads attend to the token by more than eps (all of this
unedited; ours).

NOT claimed: that parts act alone in the whole edit as they do here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from tl_tomsparse._checks import TomsparseError, check_same_weights
from tl_tomsparse._model import view
from tl_tomsparse._points import Measures, check_split
from tl_tomsparse._position_changes import (
    Clusters,
    Comparison,
    Floats,
    Position,
    Sums,
    measure_position,
    summary,
)
from tl_tomsparse._prepared import prepare_scoring, prepare_text
from tl_tomsparse.edit import SparseEdit
from tl_tomsparse.effect import HELD_OUT
from tl_tomsparse.enrichment import at_frequencies
from tl_tomsparse.mask import Match, SparseMask
from tl_tomsparse.position import check_measurable
from tl_tomsparse.rotary import FrequencyNorms
from tl_tomsparse.samples import Samples
from tl_tomsparse.stories.story import Story

if TYPE_CHECKING:
    import pandas as pd

WHOLE = "whole"
ROTARY = ("dominant", "slow", "fast")


@dataclass(frozen=True, eq=False)
class ComponentEffects:
    """What parts of an edit do, beside random edits that match each part.

    Attributes:
        frame: one row a component and measure: component, entries, share (of the whole mask's entries),
            measure, value, low, high (bootstrap 95 %), random (mean over seeds), random_low, random_high
            (range over seeds), beyond (value - random), beyond_low, beyond_high, p_above, p_below, as_high,
            as_low, to_whole (value - the whole mask's value), to_whole_low, to_whole_high, and note: why
            there are no numbers, else empty. Measures are those of [`PositionEffects`][]'s summary; where
            stories are given, changes of accuracy (categories, "paired"), drawn again by group of stories;
            where text is given, "log_perplexity", the change of the loss in nats a token.
        components: the masks by name, the whole one first.
        before: accuracies of the unedited model, and its "log_perplexity".
        sink_heads: (layer, head) pairs.
        meta: how it was made.
    """

    frame: pd.DataFrame = field(repr=False)
    components: Mapping[str, SparseMask] = field(repr=False)
    before: dict[str, float]
    sink_heads: tuple[tuple[int, int], ...]
    meta: dict[str, Any]


def mask_components(
    model: Any,
    mask: SparseMask,
    *,
    norms: FrequencyNorms | None = None,
    sink_heads: Collection[tuple[int, int]] = (),
) -> dict[str, SparseMask]:
    """Parts of a mask, and for each part the rest of the mask ("not ...").

    Args:
        model: that the mask was made from.
        mask: any.
        norms: of the unedited model; without them there are no parts by rotary frequency.
        sink_heads: (layer, head) pairs; all matrices of these heads are meant, K and V by the key-value head
            that serves them.

    Returns:
        "Q", "K", "dominant", "slow", "fast", "sink heads", each followed by its rest; some may be empty.

    Raises:
        TomsparseError: a mask of other weights.
    """
    seen = view(model)
    check_same_weights("The mask", mask.identity, "the model", seen.identity())
    parts = {matrix: mask.restrict(matrices=(matrix,)) for matrix in ("Q", "K")}
    if norms is not None:
        rotated = mask.restrict(matrices=("Q", "K"), layers=list(norms.layout))
        for name, which in (("dominant", norms.dominant()), ("slow", "slow"), ("fast", "fast")):
            parts[name] = at_frequencies(model, mask, which) if len(rotated) else rotated
    group = seen.n_heads // seen.n_kv_heads
    served = {(layer, head // group) for layer, head in sink_heads}
    parts["sink heads"] = mask.restrict(matrices=("Q", "O"), heads=set(sink_heads)) | mask.restrict(
        matrices=("K", "V"), heads=served
    )
    found = {}
    for name, part in parts.items():
        found[name], found[f"not {name}"] = part, mask - part
    return found


def component_effects(
    model: Any,
    samples: Samples,
    edit: SparseEdit,
    *,
    components: Mapping[str, SparseMask] | None = None,
    stories: Sequence[Story] = (),
    text: Samples | None = None,
    match: Match = "matrix",
    n_random: int = 20,
    seed: int = 0,
    position: int | Int[Tensor, " rows"] = 0,
    eps: float = 0.3,
    threshold: float = 0.01,
    n_draws: int = 10_000,
    prepend_bos: bool = True,
    batch_tokens: int | None = None,
    show_progress: bool = True,
) -> ComponentEffects:
    """Measure an edit, and the same operator on each part of its mask, beside random edits.

    Args:
        model: unedited, in evaluation mode.
        samples: rows of tokens on which position is measured.
        edit: whose mask is taken apart; its operator is used on every part.
        components: parts by name, of the edit's mask; those of [`mask_components`][] by default.
        stories: held-out ones whose questions are answered; none for position alone.
        text: held-out text whose loss is measured; none to leave it out.
        match: what random masks have in common with a part; "column" keeps its heads and frequencies, so
            that it asks whether the *entries* there matter. See [`SparseMask.random_like`][].
        n_random: random edits beside each part; a claim needs at least 19.
        seed: they have the seeds `seed`, `seed + 1`, ...; also of the bootstrap.
        position, eps, threshold: as in [`position_effects`][].
        n_draws: how often samples and groups of stories are drawn again.
        prepend_bos: begin every prompt of the stories with the BOS token.
        batch_tokens: most tokens in one batch, padding included.
        show_progress: a progress bar over edits.

    Raises:
        TomsparseError: an active edit; an edit of other weights, or without a rule to use on other masks; an
            empty mask; a component that is no part of the mask; stories that are not held out; training mode;
            a position that some row does not have, or that is its last one; a tensor of positions that has
            another shape or no integers.
    """
    seen = view(model)
    counts = {"n_random": n_random, "n_draws": n_draws}
    at = check_measurable(seen, samples, position, (eps, threshold), counts)
    _check_parts(edit.mask, components)
    check_split(stories, ("train", "dev"), HELD_OUT)
    meter = _Meter(model, samples, stories, text, at, prepend_bos, batch_tokens)
    before = meter.state()
    comparison = Comparison(before.position, eps, threshold)
    standard = components is None
    if components is None:
        norms, sinks = before.position.norms, comparison.sink_heads
        components = mask_components(model, edit.mask, norms=norms, sink_heads=sinks)
    parts = {WHOLE: edit.mask, **components}
    same_as = {name: _first_equal(part, parts) for name, part in parts.items() if len(part)}
    masks = {
        name: [parts[name], *(parts[name].random_like(seed + n, match=match) for n in range(n_random))]
        for name in dict.fromkeys(same_as.values())
    }
    edits = {name: [edit.on(model, mask) for mask in some] for name, some in masks.items()}
    changes: dict[str, list[_Sums]] = {}
    with tqdm(total=sum(map(len, edits.values())), desc="components", disable=not show_progress) as bar:
        for name, some in edits.items():
            changes[name] = []
            for one in some:
                changes[name].append(meter.sums(before, meter.state(one), comparison))
                bar.update()
    frame = _Frame(parts, Clusters(n_draws, seed), Clusters(n_draws, seed, smooth=True))
    for name in parts:
        if name in same_as:
            frame.add(name, changes[same_as[name]], changes[WHOLE][0])
        else:
            frame.add_empty(name, "no entries", changes[WHOLE][0])
    if standard and before.position.norms is None:
        for name in ROTARY:
            frame.add_empty(name, "no layer has a rotation", changes[WHOLE][0])
    meta = {
        "operator": edit.operator,
        "match": match,
        "n_random": n_random,
        "seed": seed,
        "position": before.position.attention.position,
        "bos": samples.bos,
        "eps": eps,
        "threshold": threshold,
        "n_samples": len(samples),
        "n_stories": len(stories),
    }
    levels = meter.levels(before)
    return ComponentEffects(frame.whole(), parts, levels, tuple(comparison.sink_heads), meta)


class _State(NamedTuple):
    """What was measured of a model under one edit: position, right answers, losses of text samples."""

    position: Position
    correct: NDArray[np.bool_] | None
    nll: Floats | None


class _Sums(NamedTuple):
    """Changes under one edit: continuous ones, and of counts of right answers."""

    continuous: Sums
    answers: Sums


class _Meter:
    """Measures states of one model on fixed samples, stories and text."""

    def __init__(
        self,
        model: Any,
        samples: Samples,
        stories: Sequence[Story],
        text: Samples | None,
        at: Tensor,
        prepend_bos: bool,
        batch_tokens: int | None,
    ) -> None:
        self.model, self.samples, self.at, self.batch_tokens = model, samples, at, batch_tokens
        self.scoring, self.counted = None, None
        if stories:
            self.scoring = prepare_scoring(
                model, stories, prepend_bos=prepend_bos, batch_tokens=batch_tokens, pack=True
            )
            self.counted = Measures(self.scoring.questions)
        self.text = None if text is None else prepare_text(model, text, batch_tokens=batch_tokens)

    def state(self, edit: SparseEdit | None = None) -> _State:
        """The model under an edit."""
        with nullcontext() if edit is None else edit.applied(self.model):
            return _State(
                measure_position(view(self.model), self.samples, self.at, self.batch_tokens),
                None if self.scoring is None else self.scoring.outcome(self.model).margin > 0,
                None if self.text is None else self.text.nll(self.model),
            )

    def sums(self, before: _State, after: _State, comparison: Comparison) -> _Sums:
        """How one state differs from the unedited one."""
        continuous = dict(comparison.of(after.position).measures)
        if self.text is not None and before.nll is not None and after.nll is not None:
            continuous["log_perplexity"] = after.nll - before.nll, self.text.n_tokens.astype(np.float64)
        answers = {}
        if self.counted is not None and before.correct is not None and after.correct is not None:
            for name, total in self.counted.totals.items():
                old, new = (self.counted.counts(one, name) for one in (before.correct, after.correct))
                answers[name] = new - old, total
        return _Sums(continuous, answers)

    def levels(self, state: _State) -> dict[str, float]:
        """See `ComponentEffects.before`."""
        found = {}
        if self.counted is not None and state.correct is not None:
            found = {name: self.counted.accuracy(state.correct, name) for name in self.counted.names}
        if self.text is not None and state.nll is not None:
            found["log_perplexity"] = float(state.nll.sum() / self.text.n_tokens.sum())
        return found


class _Frame:
    """See `ComponentEffects.frame`."""

    def __init__(self, parts: Mapping[str, SparseMask], samples: Clusters, stories: Clusters) -> None:
        self._parts, self._samples, self._stories = parts, samples, stories
        self._rows: list[pd.DataFrame] = []

    def add(self, name: str, changes: Sequence[_Sums], whole: _Sums) -> None:
        """A component: the changes under it, then those under its random edits."""
        own, random = changes[0], changes[1:]
        for which, clusters in (("answers", self._stories), ("continuous", self._samples)):
            rows = summary(
                getattr(own, which), [getattr(one, which) for one in random], clusters,
                whole=getattr(whole, which),
            )  # fmt: skip
            if len(rows):
                self._insert(name, rows.assign(note=""))

    def add_empty(self, name: str, why: str, whole: _Sums) -> None:
        """A component without numbers."""
        import pandas as pd

        measures = [*whole.answers, *whole.continuous]
        self._insert(name, pd.DataFrame({"measure": measures}).assign(note=why))

    def whole(self) -> pd.DataFrame:
        """All rows."""
        import pandas as pd

        if not self._rows:  # no sink, no rotation, no stories, no text
            return pd.DataFrame(columns=["component", "entries", "share", "measure", "note"])
        frame = pd.concat(self._rows, ignore_index=True)
        return frame[[name for name in frame if name != "note"] + ["note"]]

    def _insert(self, name: str, rows: pd.DataFrame) -> None:
        entries = len(self._parts.get(name, ()))
        rows.insert(0, "component", name)
        rows.insert(1, "entries", entries)
        rows.insert(2, "share", entries / len(self._parts[WHOLE]))
        self._rows.append(rows)


def _first_equal(mask: SparseMask, parts: Mapping[str, SparseMask]) -> str:
    return next(name for name, part in parts.items() if part == mask)


def _check_parts(whole: SparseMask, parts: Mapping[str, SparseMask] | None) -> None:
    if not len(whole):
        raise TomsparseError("The edit has no entries; make it from a mask that is not empty.")
    for name, part in (parts or {}).items():
        if name == WHOLE:
            raise TomsparseError(f"A component is called {WHOLE!r}, the name of the edit itself; rename it.")
        if beyond := len(part - whole):
            raise TomsparseError(
                f"The component {name!r} has {beyond} entries that are not in the edit's mask; a component "
                "is a part of it (mask & other)."
            )
