"""Which of the paper's claims about position hold for this model and mask, in words computed from numbers.

    mask_at_dominant_frequencies   more of the mask's Q and K entries make frequencies that hold half of a
                                   head's squared norm than of random masks (matched by matrix and by row)
    mask_at_slow_frequencies       the same of the slower half of each layer's frequencies
    mask_of_low_rank               the rank of the masked W_Q and W_K (mean over layers, each of the two) is
                                   lower than that of random masks matched by row and of those by column
    query_norms_change             norms of queries at dominant frequencies change more than under random
                                   edits
    key_norms_change               the same of keys
    queries_turn                   at sink heads queries turn towards orthogonal to the token's key, and more
                                   than under random edits
    sinks_move                     more of the sinks shift than under random edits

(arXiv 2504.04238.) A claim about masks is decided by its p-value among random masks. A claim about an edit
needs its change beyond the mean of the random edits to be on the claimed side (bootstrap over samples and
random edits) *and* to be beyond 95 % of the random edits one by one; so does the one about rank. The claims
that can be tested are one family with Holm-adjusted p-values at 0.05. What cannot be tested (no rotation, no
sink, too few samples or random edits) says so and why.

NOT claimed: a cause; and nothing about other models.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tl_tomsparse._checks import check_choice
from tl_tomsparse._sink_token import key_name
from tl_tomsparse.verdict import ALPHA, Claim, Test, decide, percent

if TYPE_CHECKING:
    import pandas as pd

    from tl_tomsparse.position import PositionEffects

FEWEST_SAMPLES = 10  # below, drawing them again says nothing
_FEWEST_RANDOM = round(1 / ALPHA) - 1


def position_verdict(found: PositionEffects, *, edit: str = "mask") -> list[Claim]:
    """The claims about one edit, each supported, not supported or not testable; see the module docstring.

    Args:
        found: from [`position_effects`][].
        edit: the name of the edit that claims are about.

    Raises:
        TomsparseError: there is no such edit.
    """
    check_choice("edit", edit, tuple(found.n_weights))
    reader = _Reader(found, edit)
    return decide(
        [
            reader.share("mask_at_dominant_frequencies", "dominant"),
            reader.share("mask_at_slow_frequencies", "slow"),
            reader.rank(),
            reader.norm("query_norms_change", "norm_q"),
            reader.norm("key_norms_change", "norm_k"),
            reader.turn(),
            reader.sinks(),
        ]
    )


class _Reader:
    def __init__(self, found: PositionEffects, edit: str) -> None:
        self.found = found
        self.token = key_name(found.meta["position"], found.meta["bos"])
        summary = self._of(found.summary, edit)
        self._summary = summary.set_index("measure") if len(summary) else summary
        self._shares, self._ranks = self._of(found.shares, edit), self._of(found.ranks, edit)
        self._empty = None if found.n_weights[edit] else "the mask is empty, so nothing was edited."
        without = found.meta["no_rotation"]
        self._bare = without and f"no layer of this model rotates queries and keys ({without})."

    @staticmethod
    def _of(frame: pd.DataFrame, edit: str) -> pd.DataFrame:
        return frame[frame.edit == edit] if len(frame) else frame

    def share(self, name: str, frequencies: str) -> Test:
        obstacle = self._empty or self._bare
        if obstacle is None and self._shares.empty:
            obstacle = "nothing of the mask is in Q or K of a layer with a rotation."
        if obstacle is not None:
            return Test(name, obstacle, 1.0, False, str)
        rows = self._shares[self._shares.frequencies == frequencies].set_index("match")
        p = float(rows.p.max())
        more = bool((rows.share > rows.random_mean).all())

        def sentence(supported: bool) -> str:
            own, random = rows.share.iloc[0], rows.loc["matrix"]
            if supported:
                how = "more often than in random masks"
            elif p <= ALPHA and not more:
                how = "less often than in random masks, or not in both kinds of them"
            else:
                how = "not shown more often than in random masks"
            of_slow = percent(self.found.meta["dominant_slow"])
            where = {
                "dominant": "the frequencies that hold half of each head's squared norm (of which "
                f"{of_slow} are slow)",
                "slow": "the slower half of the frequencies",
            }[frequencies]
            by_row = rows.loc["row"]
            return (
                f"Masked weights of Q and K make {where} {how}: {percent(own)} of them, in random masks "
                f"{percent(random.random_mean)} ({percent(random.random_low)} to "
                f"{percent(random.random_high)}), in those with the same input channels "
                f"{percent(by_row.random_mean)} ({percent(by_row.random_low)} to "
                f"{percent(by_row.random_high)})."
            )

        return Test(name, None, p, more, sentence)

    def rank(self) -> Test:
        name = "mask_of_low_rank"
        obstacle = self._empty
        if obstacle is None and self._ranks.empty:
            obstacle = "nothing of the mask is in Q or K."
        if (obstacle := obstacle or self._few_random()) is not None:
            return Test(name, obstacle, 1.0, False, str)
        rows = self._ranks[self._ranks.layer == -1]
        kinds = ("row", "column")
        p = float(max(rows[f"p_{kind}"].max() for kind in kinds))
        holds = all(self._beyond(count) for kind in kinds for count in rows[f"as_low_{kind}"])

        def sentence(supported: bool) -> str:
            each = "; ".join(
                f"W_{row.matrix} {row.rank:.1f}, matched by input channel {row.random_row:.1f} "
                f"({row.random_row_low:.1f} to {row.random_row_high:.1f}), by output channel "
                f"{row.random_column:.1f} ({row.random_column_low:.1f} to {row.random_column_high:.1f})"
                for row in rows.itertuples()
            )
            how = "is lower" if supported else "is not shown to be lower"
            return f"The rank of the masked matrices {how} than that of matched random masks: {each}."

        return Test(name, None, p, holds, sentence)

    def norm(self, name: str, measure: str) -> Test:
        part = {"norm_q": "queries", "norm_k": "keys"}[measure]
        if (obstacle := self._empty or self._bare or self._few()) is not None:
            return Test(name, obstacle, 1.0, False, str)
        row = self._summary.loc[measure]

        def sentence(supported: bool) -> str:
            more = "change more" if supported else "are not shown to change more"
            return (
                f"Norms of {part} at dominant frequencies {more} than under random edits: by "
                f"{percent(row.value)}, under random edits {self._random(row, percent)}."
            )

        return Test(name, None, float(row.p_above), self._beyond(row.as_high), sentence)

    def turn(self) -> Test:
        name = "queries_turn"
        if (obstacle := self._empty or self._bare or self._few() or self._no_sinks("turn")) is not None:
            return Test(name, obstacle, 1.0, False, str)
        row, others = self._summary.loc["turn"], self._summary.loc["turn_others"]
        towards, beyond = bool(row.high < 0), self._beyond(row.as_low)

        def sentence(supported: bool) -> str:
            if supported:
                how = f"turn towards orthogonal to the key of {self.token}, more than under random edits"
            elif towards:
                how = f"turn towards orthogonal to the key of {self.token}, but not shown is more than"
                how += " under random edits"
            elif row.low > 0:
                how = f"turn away from orthogonal to the key of {self.token}"
            else:
                how = f"are not shown to turn towards orthogonal to the key of {self.token}"
            return (
                f"At the sink heads queries {how}: the distance from 90 degrees changes by "
                f"{_degrees(row.value)} degrees (95 % interval {_degrees(row.low)} to {_degrees(row.high)}), "
                f"under random edits by {self._random(row, _degrees)}; that of the other keys by "
                f"{_degrees(others.value)}."
            )

        return Test(name, None, float(row.p_below), towards and beyond, sentence)

    def sinks(self) -> Test:
        name, measure = "sinks_move", "sinks_shifted"
        if (obstacle := self._empty or self._few() or self._no_sinks(measure)) is not None:
            return Test(name, obstacle, 1.0, False, str)
        row = self._summary.loc[measure]

        def sentence(supported: bool) -> str:
            how = "displaces more of the sinks" if supported else "is not shown to displace more of the sinks"
            return (
                f"The edit {how} than random edits: attention to {self.token} moves by more than "
                f"{self.found.meta['threshold']:g} in {percent(row.value)} of them (95 % interval "
                f"{percent(row.low)} to {percent(row.high)}), under random edits in "
                f"{self._random(row, percent)}."
            )

        return Test(name, None, float(row.p_above), self._beyond(row.as_high), sentence)

    # ---- what stands in the way

    def _few(self) -> str | None:
        n = self.found.meta["n_samples"]
        if n < FEWEST_SAMPLES:
            return f"{n} samples are too few; use at least {FEWEST_SAMPLES}."
        return self._few_random()

    def _few_random(self) -> str | None:
        n = self.found.meta["n_random"]
        if n >= _FEWEST_RANDOM:
            return None
        return f"{n} random edits are too few to be beyond 95 % of them; use at least {_FEWEST_RANDOM}."

    def _no_sinks(self, measure: str) -> str | None:
        if measure in self._summary.index:
            return None
        where = " with a rotation" if self.found.sink_heads and measure == "turn" else ""
        return f"no head{where} attends to {self.token} by more than {self.found.meta['eps']:g} on average."

    def _beyond(self, as_far: float) -> bool:
        n = self.found.meta["n_random"]
        return (1 + as_far) / (1 + n) <= ALPHA + 1e-9

    def _random(self, row: Any, shown: Any) -> str:
        n = self.found.meta["n_random"]
        return f"{shown(row.random)} ({shown(row.random_low)} to {shown(row.random_high)} over {n})"


def _degrees(value: float) -> str:
    return f"{value:+.2f}"
