"""The same question for whole heads, as a section of a study: which heads, and whether the mask works there.

On few stories of their own: heads are found on dev stories and measured on held-out ones. Knock-outs are kept
in the study's folder. The claims are a family of their own, with its own error level (see `locate_heads`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tl_tomsparse._checks import TomsparseError
from tl_tomsparse._study_stories import BELIEFS, Stories, belief_stories
from tl_tomsparse.head_protocol import heads_and_mask
from tl_tomsparse.heads import KnockoutMeter
from tl_tomsparse.locate import locate_heads, with_enough_sets
from tl_tomsparse.mask import SparseMask
from tl_tomsparse.verdict import Claim

if TYPE_CHECKING:
    import pandas as pd

    from tl_tomsparse._study_settings import StudySettings


@dataclass(frozen=True, eq=False)
class HeadSection:
    """What a study says about heads.

    Attributes:
        claims: which heads are found, what they do, and the mask in them.
        figures: by title.
        frames: by title.
        obstacle: why there is nothing of this; None where there is.
    """

    claims: list[Claim] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict, repr=False)
    frames: dict[str, pd.DataFrame] = field(default_factory=dict, repr=False)
    obstacle: str | None = None


def study_heads(
    model: Any,
    mask: SparseMask,
    settings: StudySettings,
    own: Stories | None,
    out: Path,
    show_progress: bool,
) -> HeadSection:
    """Find heads, measure them, and cross them with the mask."""
    from tl_tomsparse import plot

    if not settings.head_stories:
        return HeadSection(obstacle="Not asked: head_stories is 0.")
    meters = {}
    try:
        for split in ("dev", "test"):
            meters[split] = KnockoutMeter(
                model,
                belief_stories(settings, split, own),
                categories=BELIEFS,
                prepend_bos=settings.prepend_bos,
                checkpoint=out / f"heads_{split}.safetensors",
                show_progress=show_progress,
            )
        with_enough_sets(meters["dev"].heads)
    except TomsparseError as error:
        return HeadSection(obstacle=f"Not testable here: {error}")
    located = locate_heads(
        meters["dev"],
        test=meters["test"],
        baselines=("random", "single"),
        n_random=max(19, settings.random_masks),
        seed=settings.seed,
    )
    crossed = None
    if located.heads and len(mask.restrict(matrices=("Q", "K", "V", "O"))):
        crossed = heads_and_mask(
            model,
            mask,
            located.heads,
            meters["test"],
            n_random=max(19, settings.random_masks),
            seed=settings.seed,
            show_progress=show_progress,
        )
    section = plot.heads_section(located, crossed=crossed)
    frames = {title: frame for title, frame in section["frames"].items() if frame is not None and len(frame)}
    return HeadSection(section["claims"], section["figures"], frames)
