"""Finding things again by distance, and two kinds of text, as a section of a study.

    key_value, induction    from 16 tokens to the longest distance that the context has room for
    perplexity              prose, patterns

for the unedited model, the mask, general text alone, and the study's first random masks. What was measured
for an arm is a file of the study's folder as soon as it is finished, and is read again if it was the same
edit of the same weights on the same items. The claims are a family of their own (see `_battery_claims`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from tl_tomsparse._artifacts import write_bytes
from tl_tomsparse._battery_claims import battery_claims, changes_of, changes_table
from tl_tomsparse._checks import TomsparseError
from tl_tomsparse._model import view
from tl_tomsparse._points import edit_key
from tl_tomsparse._study_arms import Arm, main_arms
from tl_tomsparse._study_claims import StudyClaim
from tl_tomsparse.battery import PreparedBattery, prepare_battery, score_table
from tl_tomsparse.mask import SparseMask

if TYPE_CHECKING:
    import pandas as pd

    from tl_tomsparse._study_settings import StudySettings

_TASKS = ("key_value", "induction", "perplexity")
_FEWEST_WINDOWS = 10  # for a claim about perplexity


def _empty() -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame()


@dataclass(frozen=True, eq=False)
class BatterySection:
    """What a study says about finding things again, and about two kinds of text.

    Attributes:
        claims: a family of their own.
        scores: one row an arm and subset: family, seed, and the columns of `Battery.frame`; subsets of
            key_value and induction are distances in tokens, those of perplexity kinds of text.
        changes: one row a comparison ("mask - before", "mask - random_matrix", "general_only - before") and
            subset, "all" for all distances together: comparison, task, subset, value (change of accuracy,
            or ratio of perplexities), low, high (bootstrap 95 % by group; random masks are drawn again as
            well), p (of "no change").
        obstacle: why there is nothing of this; None where there is.
    """

    claims: list[StudyClaim] = field(default_factory=list)
    scores: pd.DataFrame = field(default_factory=_empty, repr=False)
    changes: pd.DataFrame = field(default_factory=_empty, repr=False)
    obstacle: str | None = None


def study_battery(
    model: Any, masks: Mapping[str, SparseMask], settings: StudySettings, out: Path, show_progress: bool
) -> BatterySection:
    """Measure the arms on one battery, and say what that supports."""
    prepared = prepared_battery(model, settings)
    if isinstance(prepared, str):
        return BatterySection(obstacle=prepared)
    arms = main_arms(model, masks, settings)
    bar = tqdm(arms, desc="battery", disable=not show_progress)
    return battery_section(arms, measure_arms(model, prepared, bar, out), settings)


def prepared_battery(model: Any, settings: StudySettings) -> PreparedBattery | str:
    """Its items, or why there are none."""
    if not settings.localisation_items:
        return "Not asked: localisation_items is 0."
    try:
        return prepare_battery(
            model,
            tasks=_TASKS,
            n_localisation=settings.localisation_items,
            n_windows=max(_FEWEST_WINDOWS, settings.windows // 8),
            seed=settings.seed,
            prepend_bos=settings.prepend_bos,
        )
    except TomsparseError as error:
        return f"Not testable here: {error}"


def measure_arms(model: Any, prepared: PreparedBattery, arms: Iterable[Arm], out: Path) -> list[pd.DataFrame]:
    """The items of each arm as `Battery.items` has them, read from the folder where they are there."""
    base = f"{view(model).identity().fingerprint} {prepared.digest}"
    found = []
    for arm in arms:
        path = out / f"battery_{arm.family}{'' if arm.seed is None else f'_{arm.seed}'}.parquet"
        key = edit_key(base, arm.what)
        items = _stored(path, key)
        if items is None:
            items = _measure(model, prepared, arm)
            items.attrs["key"] = key
            write_bytes(path, items.to_parquet(index=False))
        items.attrs.clear()
        found.append(items)
    return found


def _measure(model: Any, prepared: PreparedBattery, arm: Arm) -> pd.DataFrame:
    if arm.what is None or not len(arm.what):
        return prepared.measure(model).items
    try:
        with arm.what.applied(model):
            return prepared.measure(model).items
    except TomsparseError as error:
        raise TomsparseError(f"At {arm.label}: {error}") from error


def _stored(path: Path, key: str) -> pd.DataFrame | None:
    """The items of a file, if it is whole and of this key."""
    import pandas as pd

    try:
        items = pd.read_parquet(BytesIO(path.read_bytes()))
    except (OSError, ValueError):  # none, or none of ours
        return None
    return items if items.attrs.get("key") == key else None


def battery_section(
    arms: Sequence[Arm], measured: Sequence[pd.DataFrame], settings: StudySettings
) -> BatterySection:
    """Tables and claims from the items of each arm."""
    import pandas as pd

    scores = []
    items: dict[str, list[pd.DataFrame]] = {}
    sizes: dict[str, int] = {}
    for arm, some in zip(arms, measured, strict=True):
        table = score_table(some, settings.seed)
        table.insert(0, "family", arm.family)
        table.insert(1, "seed", arm.seed)
        scores.append(table)
        items.setdefault(arm.family, []).append(some)
        sizes[arm.family] = 0 if arm.what is None else len(arm.what)
    changes = changes_of(items, n_draws=settings.n_draws, seed=settings.seed)
    return BatterySection(
        battery_claims(items, changes, sizes["mask"], settings),
        pd.concat([table.astype({"seed": "Int64"}) for table in scores], ignore_index=True),
        changes_table(changes),
    )
