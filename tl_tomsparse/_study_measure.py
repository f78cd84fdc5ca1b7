"""What a study measures: the choice of kappa, every arm, trained weights, changes of the loss, overlaps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from tqdm.auto import tqdm

from tl_tomsparse._artifacts import read_safetensors, write_safetensors
from tl_tomsparse._overlap import Overlap, overlap
from tl_tomsparse._points import Point, PointMeter, PointRecord, edit_key
from tl_tomsparse._study_arms import FEW, Arm, given
from tl_tomsparse._study_material import Material, merged
from tl_tomsparse._study_stories import CHUNKS
from tl_tomsparse.edit import SparseEdit
from tl_tomsparse.experiment import KappaChoice, auto_kappas, choose_kappa, kappa_sweep
from tl_tomsparse.loss_change import TERMS, LossChange, loss_change
from tl_tomsparse.mask import SparseMask
from tl_tomsparse.ranking import top_fraction
from tl_tomsparse.sensitivity import Sensitivity
from tl_tomsparse.tune import tune

if TYPE_CHECKING:
    from tl_tomsparse._study_settings import StudySettings

_TUNED, _LOSS = "tomsparse.tuned", "tomsparse.loss_change"
_TERMS = tuple(term for term in TERMS if term != "diagonal")
Stored = Callable[[PointRecord], None]


def choose(
    model: Any,
    material: Material,
    sensitivities: Mapping[str, Sensitivity],
    settings: StudySettings,
    progress: Callable[[str], None],
    bars: Mapping[str, Any],
) -> KappaChoice:
    kappas = auto_kappas(sensitivities["task"])
    progress(f"Choosing one of {len(kappas)} sparsities on {len(material.dev)} dev stories")
    sweep = kappa_sweep(
        model,
        sensitivities["task"],
        sensitivities["general"],
        dev_stories=material.dev,
        dev_text=material.dev_text,
        kappas=kappas,
        n_random=min(FEW, settings.random_masks),
        seed=settings.seed,
        prepend_bos=settings.prepend_bos,
        **bars,
    )
    return choose_kappa(sweep)


def study_meter(model: Any, material: Material, store: Stored, resume: Iterable[PointRecord]) -> PointMeter:
    """Measures edits on the held-out questions and text."""
    return PointMeter(model, material.scoring, material.text, operator="mean", on_point=store, resume=resume)


def measure(
    model: Any,
    material: Material,
    arms: Sequence[Arm],
    meter: PointMeter,
    mask: SparseMask,
    settings: StudySettings,
    out: Path,
    progress: Callable[[str], None],
    show_progress: bool,
) -> tuple[dict[str, list[Point]], list[dict[str, Any]]]:
    """The points of every family, and what each arm is."""
    points: dict[str, list[Point]] = {}
    rows: list[dict[str, Any]] = []

    def take(arm: Arm) -> None:
        points.setdefault(arm.family, []).append(meter.measure(arm.what, arm.label))
        n_weights = 0 if arm.what is None else len(arm.what)
        rows.append({"family": arm.family, "seed": arm.seed, "dose": arm.dose, "n_weights": n_weights})

    progress(f"{len(arms)} edits on {len(material.scoring.questions)} held-out questions")
    for arm in tqdm(arms, desc="arms", disable=not show_progress):
        take(arm)
    to_train = masks_to_train(mask, settings)
    if to_train:
        progress(f"Training {len(mask)} weights, and as many random ones, {len(to_train)} times")
        for which in tqdm(to_train, desc="training", disable=not show_progress):
            take(tuned_arm(model, which, material, settings, out))
    return points, rows


class MaskArm(NamedTuple):
    """The mask, or a random one of a seed, by its family."""

    family: str
    seed: int | None
    mask: SparseMask

    def path(self, out: Path, name: str) -> Path:
        """The file of what was made of it."""
        return out / f"{name}{'' if self.seed is None else f'_{self.seed}'}.safetensors"


def _with_random(
    family: str, random: str, mask: SparseMask, settings: StudySettings, n: int
) -> list[MaskArm]:
    seeds = range(settings.seed, settings.seed + min(n, settings.random_masks))
    return [MaskArm(family, None, mask), *(MaskArm(random, seed, mask.random_like(seed)) for seed in seeds)]


def masks_to_train(mask: SparseMask, settings: StudySettings) -> list[MaskArm]:
    """The mask and random ones; nothing if the mask is empty."""
    return _with_random("tuned", "tuned_random", mask, settings, FEW) if len(mask) else []


def masks_to_predict(mask: SparseMask, settings: StudySettings) -> list[MaskArm]:
    """Those whose change of the loss is predicted."""
    return _with_random("mask", "random_matrix", mask, settings, settings.few_masks)


def tuned_arm(model: Any, which: MaskArm, material: Material, settings: StudySettings, out: Path) -> Arm:
    """The trained edit, read from its file if it is there."""
    path, header = which.path(out, which.family), _header(_TUNED, which)
    stored = _read(path, header)
    if stored is not None:
        edit = SparseEdit.zero(model, which.mask)
        after = {key: stored[0][_name(key)] for key in edit.before}
        trained = replace(edit, after=after, operator="tuned")
        return Arm(which.family, which.seed, partial(given, trained))
    found = tune(
        model, which.mask, material.task, steps=settings.tune_steps, seed=settings.seed, show_progress=False
    ).edit
    write_safetensors(path, {_name(key): value for key, value in found.after.items()}, header)
    return Arm(which.family, which.seed, partial(given, found))


def loss_changes(
    model: Any, material: Material, which: Iterable[MaskArm], sensitivity: Sensitivity, out: Path
) -> dict[tuple[str, int | None], LossChange]:
    """Of these masks, on held-out false-belief answers; read from their files if they are there."""
    found: dict[tuple[str, int | None], LossChange] = {}
    for arm in which:
        path, header = arm.path(out, f"loss_{arm.family}"), _header(_LOSS, arm)
        stored = _read(path, header)
        if stored is not None:
            samples = {term: stored[0][term].numpy() for term in _TERMS}
            change = LossChange(samples, float(stored[1]["diagonal"]), len(arm.mask))
        else:
            edit = SparseEdit.mean(model, arm.mask)
            change = loss_change(model, edit, material.answers, sensitivity=sensitivity, show_progress=False)
            tensors = {term: torch.from_numpy(values) for term, values in change.samples.items()}
            write_safetensors(path, tensors, {**header, "diagonal": change.diagonal})
        found[arm.family, arm.seed] = change
    return found


def _header(kind: str, which: MaskArm) -> dict[str, Any]:
    """What a file is of: the weights, and the entries."""
    return {"kind": kind, "key": edit_key(which.mask.identity.fingerprint, which.mask)}


def _read(path: Path, header: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    """A file, if it is there and of this."""
    if not path.exists():
        return None
    tensors, found = read_safetensors(path, header["kind"])
    return (tensors, found) if found.get("key") == header["key"] else None


def mask_overlaps(
    masks: Mapping[str, SparseMask], sensitivities: Mapping[str, Sensitivity], kappa: float
) -> tuple[list[dict[str, Any]], dict[str, Overlap]]:
    """Of the mask with each control; and of masks from disjoint parts of the stories, of growing size.

    Apart from the rows, those that claims are about: of "halves" of the stories, and of "seeds" of stories
    where there are two.
    """
    rows: list[dict[str, Any]] = []
    general = top_fraction(sensitivities["general"], kappa)

    def add(a: str, b: str, share: float, found: Overlap) -> Overlap:
        rows.append(
            {
                "a": a,
                "b": b,
                "share": share,
                "common": found.common,
                "size_a": found.sizes[0],
                "size_b": found.sizes[1],
                "jaccard": found.jaccard,
                "expected_jaccard": found.expected_jaccard,
                "p": found.p,
            }
        )
        return found

    found = {
        control: add("mask", control, 1.0, overlap(masks["mask"], other, without=general))
        for control, other in masks.items()
        if control not in ("mask", "tom_only")  # of which the mask is a part
    }
    told = {"seeds": found["other_stories"]} if "other_stories" in found else {}
    width = 1
    while width <= CHUNKS // 2:
        parts = (range(width), range(width, 2 * width))
        pair = [top_fraction(merged(sensitivities, part), kappa) - general for part in parts]
        told["halves"] = add("part", "other part", width / CHUNKS, overlap(*pair, without=general))
        width *= 2
    return rows, told


def _name(key: tuple[int, str]) -> str:
    return f"{key[0]}.{key[1]}"
