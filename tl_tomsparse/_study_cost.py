"""What a study will cost, before it begins: tokens counted, a pass over some of them timed."""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING, Any

from tl_tomsparse._study_arms import most_arms
from tl_tomsparse._study_material import Material, n_masks

if TYPE_CHECKING:
    from tl_tomsparse._study_settings import StudySettings

_GRADIENT = 3  # passes forward that one forward and back is worth


def cost(model: Any, material: Material, settings: StudySettings) -> str:
    """In words; the time is that of the faster of two passes over the held-out text, for as many tokens as
    there are to read.
    """
    each, arms = tokens_of(material, settings)
    gradients = sum(int(samples.attention_mask.sum()) for samples in material.tasks.values())
    a_pass = min(_timed(material, model) for _ in range(2))  # the first one warms up
    seconds = a_pass / material.text.reads.n_tokens * (arms * each + _GRADIENT * gradients)
    return (
        f"To do: sensitivities to {len(material.tasks)} sets of samples ({gradients:,} tokens), and up to "
        f"{arms} edits on {each:,} tokens each, some {duration(seconds)} in one process; then "
        "training, predicted losses, heads and localisation, and the choice of kappa where it is not given. "
        "What is finished is not done again."
    )


def _timed(material: Material, model: Any) -> float:
    began = perf_counter()
    material.text.nll(model)
    return perf_counter() - began


def tokens_of(material: Material, settings: StudySettings) -> tuple[int, int]:
    """Tokens that each arm reads, and how many arms there are at most."""
    each = material.scoring.reads.n_tokens + material.text.reads.n_tokens
    return each, most_arms(settings, n_masks(material))


def duration(seconds: float) -> str:
    """In the largest unit of which there are two."""
    for unit, length in (("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} seconds"
