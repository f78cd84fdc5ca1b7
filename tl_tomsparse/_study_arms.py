"""The arms of a study: every mask and edit that is measured on the held-out stories, by family.

before                       the unedited model
mask                         the mask under the study's operator
tom_only                     the task's entries with those that general text has too
general_only, lowest, ...    controls that are not random
random_<match>               random masks, one arm a seed
operator_<name>              other operators on the mask; "_random" on random masks
dose_<kappa>                 the mask at other sparsities; "_random" random masks of that size
rescue_<share>               the share of the mask with the largest sensitivity left as it is;
                             "_random" a random share left as it is
tuned, tuned_random          entries of the mask, and of random masks, trained on train stories
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import torch

from tl_tomsparse._draws import distinct, stream
from tl_tomsparse._model import view
from tl_tomsparse._random_masks import Match
from tl_tomsparse.edit import SparseEdit
from tl_tomsparse.mask import SparseMask
from tl_tomsparse.ranking import top_fraction
from tl_tomsparse.sensitivity import Sensitivity

if TYPE_CHECKING:
    from tl_tomsparse._study_settings import StudySettings

MATCHES: tuple[Match, ...] = get_args(Match)
SHARES = (0.25, 0.5, 0.75)
DOSES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 2.0)  # times the chosen kappa
FACTORS = {"zero": 0.0, "flip": -1.0, "half": 0.5, "amplify": 1.5, "double": 2.0}  # times the masked weights
FEW = 5  # random masks beside what takes long; fewer have no mean to speak of

_NO_ENTRIES = np.empty(0, np.int64)


@dataclass(frozen=True, eq=False)
class Arm:
    """One thing to measure.

    Attributes:
        family: what it is one of; all arms of a random family are drawn again together.
        seed: of a random one.
        make: gives the edit, None for the unedited model; called when it is needed, once.
        dose: what varies: kappa, the share that is left as it is, or the factor.
    """

    family: str
    seed: int | None
    make: Callable[[], SparseEdit | None] = lambda: None
    dose: float | None = None

    @cached_property
    def what(self) -> SparseEdit | None:
        """The edit."""
        return self.make()

    @property
    def label(self) -> str:
        """Its name in an error."""
        return f"arm {self.family!r}" + ("" if self.seed is None else f", seed {self.seed}")


def given(edit: SparseEdit) -> SparseEdit:
    """An edit that is made already, for `Arm.make`."""
    return edit


def matches_for(model: Any, mask: SparseMask) -> tuple[Match, ...]:
    """The kinds of random masks that this model and mask allow: "pair" only where all is rotated."""
    rotated = view(model).rotations[0]
    used = [key for key, index in mask.entries.items() if len(index)]
    turned = all(matrix in ("Q", "K") and layer in rotated for layer, matrix in used)
    return tuple(match for match in MATCHES if match != "pair" or turned)


def main_arms(model: Any, masks: Mapping[str, SparseMask], settings: StudySettings) -> list[Arm]:
    """The few arms of what takes long: no edit, the mask, general text alone, the first random masks."""
    mask = masks["mask"]
    edit = SparseEdit.mean(model, mask)
    seeds = range(settings.seed, settings.seed + min(FEW, settings.random_masks))
    return [
        Arm("before", None),
        Arm("mask", None, partial(given, edit)),
        Arm("general_only", None, partial(edit.on, model, masks["general_only"])),
        *(Arm("random_matrix", seed, partial(_on_random, edit, model, mask, seed)) for seed in seeds),
    ]


def make_arms(
    model: Any,
    masks: Mapping[str, SparseMask],
    sensitivities: Mapping[str, Sensitivity],
    kappa: float,
    settings: StudySettings,
) -> Iterator[Arm]:
    """All arms but the tuned ones, one after the other."""
    mask, seeds = masks["mask"], range(settings.seed, settings.seed + settings.random_masks)
    few = seeds[: min(settings.few_masks, len(seeds))]
    edit = SparseEdit.mean(model, mask)
    yield Arm("before", None)
    yield Arm("mask", None, partial(given, edit))
    for name, control in masks.items():
        if name != "mask":
            yield Arm(name, None, partial(edit.on, model, control))
    for match in matches_for(model, mask):
        for seed in seeds:
            yield Arm(f"random_{match}", seed, partial(_on_random, edit, model, mask, seed, match))
    operators = {"zero": SparseEdit.zero(model, mask)}
    operators |= {name: SparseEdit.scale(model, mask, FACTORS[name]) for name in FACTORS if name != "zero"}
    operators["resample"] = SparseEdit.resample(model, mask, seed=settings.seed)
    for name, other in operators.items():
        factor = FACTORS.get(name)
        yield Arm(f"operator_{name}", None, partial(given, other), factor)
        # A claim compares amplified ones.
        for seed in seeds[:FEW] if name == "amplify" else few:
            random = partial(_on_random, other, model, mask, seed)
            yield Arm(f"operator_{name}_random", seed, random, factor)
    for dose in DOSES:
        if kappa * dose > 0.5:
            continue
        less = top_fraction(sensitivities["task"], kappa * dose)
        less = less - top_fraction(sensitivities["general"], kappa * dose)
        yield Arm(f"dose_{dose:g}", None, partial(edit.on, model, less), kappa * dose)
        for seed in few:
            random = partial(_on_random, edit, model, less, seed)
            yield Arm(f"dose_{dose:g}_random", seed, random, kappa * dose)
    for share in SHARES:
        rest = mask - most_sensitive(sensitivities["task"], mask, share)
        yield Arm(f"rescue_{share:g}", None, partial(edit.restrict, rest), share)
        for seed in seeds[:FEW]:
            yield Arm(f"rescue_{share:g}_random", seed, partial(_rescued, edit, share, seed), share)


def most_arms(settings: StudySettings, n_masks: int) -> int:
    """How many arms there are at most, before there is a mask."""
    n = settings.random_masks
    few, five = min(settings.few_masks, n), min(FEW, n)
    operators = len(FACTORS) + 1 + len(FACTORS) * few + five
    return 1 + n_masks + len(MATCHES) * n + operators + len(DOSES) * (1 + few) + len(SHARES) * (1 + five)


def _on_random(
    edit: SparseEdit, model: Any, mask: SparseMask, seed: int, match: Match = "matrix"
) -> SparseEdit:
    return edit.on(model, mask.random_like(seed, match=match, model=model))


def _rescued(edit: SparseEdit, share: float, seed: int) -> SparseEdit:
    return edit.restrict(edit.mask - random_part(edit.mask, share, seed))


def most_sensitive(sensitivity: Sensitivity, mask: SparseMask, share: float) -> SparseMask:
    """The share of each matrix' masked entries with the largest sensitivity."""
    entries = {}
    for key, index in mask.entries.items():
        values = sensitivity[key].flatten().cpu()[index]
        entries[key] = index[values.argsort(descending=True, stable=True)[: round(share * len(index))]]
    return SparseMask(mask.identity, mask.shapes, entries)


def random_part(mask: SparseMask, share: float, seed: int) -> SparseMask:
    """A random share of each matrix' masked entries."""
    entries = {}
    for at, (key, index) in enumerate(mask.entries.items()):
        wanted = round(share * len(index))
        chosen = distinct(stream(seed, 77, at), len(index), wanted) if wanted else _NO_ENTRIES
        entries[key] = index[torch.from_numpy(chosen)]
    return SparseMask(mask.identity, mask.shapes, entries)
