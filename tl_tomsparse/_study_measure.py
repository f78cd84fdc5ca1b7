"""What a study measures: the choice of kappa, every arm, trained weights, changes of the loss, overlaps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from tqdm.auto import tqdm

from tl_tomsparse._artifacts import read_safetensors, write_safetensors
from tl_tomsparse._overlap import Overlap, overlap
from tl_tomsparse._points import Point, PointMeter
from tl_tomsparse._study_arms import FEW, Arm, make_arms
from tl_tomsparse._study_material import Material, merged
from tl_tomsparse._study_stories import CHUNKS
from tl_tomsparse.edit import SparseEdit
from tl_tomsparse.experiment import auto_kappas, choose_kappa, kappa_sweep
from tl_tomsparse.loss_change import TERMS, LossChange, loss_change
from tl_tomsparse.mask import SparseMask
from tl_tomsparse.ranking import top_fraction
from tl_tomsparse.sensitivity import Sensitivity
from tl_tomsparse.tune import tune

if TYPE_CHECKING:
    from tl_tomsparse._study_settings import StudySettings

_TUNED, _LOSS = "tomsparse.tuned", "tomsparse.loss_change"
_TERMS = tuple(term for term in TERMS if term != "diagonal")


def choose(
    model: Any,
    material: Material,
    sensitivities: Mapping[str, Sensitivity],
    settings: StudySettings,
    progress: Callable[[str], None],
    bars: Mapping[str, Any],
) -> float:
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
    return choose_kappa(sweep).kappa


def measure(
    model: Any,
    material: Material,
    masks: Mapping[str, SparseMask],
    sensitivities: Mapping[str, Sensitivity],
    kappa: float,
    settings: StudySettings,
    out: Path,
    progress: Callable[[str], None],
    bars: Mapping[str, Any],
) -> tuple[dict[str, list[Point]], list[dict[str, Any]]]:
    """The points of every family, and what each arm is."""
    meter = PointMeter(
        model,
        material.scoring,
        material.text,
        operator="mean",
        on_point=bars["on_point"],
        resume=bars["resume"],
    )
    points: dict[str, list[Point]] = {}
    rows: list[dict[str, Any]] = []

    def take(arm: Arm) -> None:
        label = f"arm {arm.family!r}" + ("" if arm.seed is None else f", seed {arm.seed}")
        points.setdefault(arm.family, []).append(meter.measure(arm.what, label))
        n_weights = 0 if arm.what is None else len(arm.what)
        rows.append({"family": arm.family, "seed": arm.seed, "dose": arm.dose, "n_weights": n_weights})

    arms = list(make_arms(model, masks, sensitivities, kappa, settings))
    n_questions = len(material.scoring.questions)
    progress(f"{len(arms)} edits on {n_questions} held-out questions")
    for arm in tqdm(arms, desc="arms", disable=not bars["show_progress"]):
        take(arm)
    trained = to_train(masks["mask"], settings)
    if trained:
        size = len(masks["mask"])
        progress(f"Training {size} weights, and as many random ones, {len(trained)} times")
        for which in tqdm(trained, desc="training", disable=not bars["show_progress"]):
            take(tuned_arm(model, which, material, settings, out))
    return points, rows


class Trained(NamedTuple):
    """Entries to be trained: those of the mask, or random ones of a seed."""

    family: str
    seed: int | None
    mask: SparseMask


def to_train(mask: SparseMask, settings: StudySettings) -> list[Trained]:
    """The mask and random ones; nothing if the mask is empty."""
    seeds = range(settings.seed, settings.seed + min(FEW, settings.random_masks))
    random = (Trained("tuned_random", seed, mask.random_like(seed)) for seed in seeds)
    return [Trained("tuned", None, mask), *random] if len(mask) else []


def tuned_arm(model: Any, which: Trained, material: Material, settings: StudySettings, out: Path) -> Arm:
    """The trained edit, read from its file if it is there."""
    name = which.family if which.seed is None else f"{which.family}_{which.seed}"
    edit = _tuned(model, which.mask, material, settings, out / f"{name}.safetensors")
    return Arm(which.family, which.seed, edit)


def _tuned(
    model: Any, mask: SparseMask, material: Material, settings: StudySettings, path: Path
) -> SparseEdit:
    if path.exists():
        edit, (tensors, _) = SparseEdit.zero(model, mask), read_safetensors(path, _TUNED)
        return replace(edit, after={key: tensors[_stored(key)] for key in edit.before}, operator="tuned")
    trained = tune(
        model, mask, material.task, steps=settings.tune_steps, seed=settings.seed, show_progress=False
    ).edit
    header = {"kind": _TUNED, "identity": mask.identity.to_dict()}
    write_safetensors(path, {_stored(key): value for key, value in trained.after.items()}, header)
    return trained


def loss_changes(
    model: Any,
    material: Material,
    mask: SparseMask,
    sensitivity: Sensitivity,
    settings: StudySettings,
    out: Path,
    show_progress: bool,
) -> dict[tuple[str, int | None], LossChange]:
    """Of the mask and of random ones, on held-out false-belief answers."""
    seeds = range(settings.seed, settings.seed + min(FEW, settings.random_masks))
    named = [("mask", None, mask), *(("random_matrix", s, mask.random_like(s)) for s in seeds)]
    found: dict[tuple[str, int | None], LossChange] = {}
    for family, seed, which in tqdm(named, desc="loss changes", disable=not show_progress):
        path = out / f"loss_{family}{'' if seed is None else f'_{seed}'}.safetensors"
        if path.exists():
            tensors, header = read_safetensors(path, _LOSS)
            samples = {term: tensors[term].numpy() for term in _TERMS}
            found[family, seed] = LossChange(samples, float(header["diagonal"]), len(which))
            continue
        edit = SparseEdit.mean(model, which)
        change = loss_change(model, edit, material.answers, sensitivity=sensitivity, show_progress=False)
        tensors = {term: torch.from_numpy(values) for term, values in change.samples.items()}
        write_safetensors(path, tensors, {"kind": _LOSS, "diagonal": change.diagonal})
        found[family, seed] = change
    return found


def mask_overlaps(
    masks: Mapping[str, SparseMask], sensitivities: Mapping[str, Sensitivity], kappa: float
) -> tuple[list[dict[str, Any]], Overlap]:
    """Of the mask with each control; and of masks from disjoint parts of the stories, of growing size."""
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

    for control, other in masks.items():
        if control != "mask":
            add("mask", control, 1.0, overlap(masks["mask"], other, without=general))
    width = 1
    while width <= CHUNKS // 2:
        parts = (range(width), range(width, 2 * width))
        pair = [top_fraction(merged(sensitivities, part), kappa) - general for part in parts]
        halves = add("part", "other part", width / CHUNKS, overlap(*pair, without=general))
        width *= 2
    return rows, halves


def _stored(key: tuple[int, str]) -> str:
    return f"{key[0]}.{key[1]}"
