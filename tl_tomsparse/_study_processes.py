"""Several processes at one study: each loads the model, takes every n-th of the arms that are not measured
yet, and appends to a file of its own in the study's folder.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from tl_tomsparse._checks import TomsparseError
from tl_tomsparse._folder import read_points, stored_points
from tl_tomsparse._model import view
from tl_tomsparse._points import PointMeter, PointRecord
from tl_tomsparse._study_arms import make_arms
from tl_tomsparse._study_material import make_masks, make_material, read_sensitivities
from tl_tomsparse._study_measure import to_train, tuned_arm
from tl_tomsparse._study_stories import Stories

if TYPE_CHECKING:
    from tl_tomsparse._study_settings import StudySettings

Load = Callable[[], Any]


def others_points(out: Path) -> list[PointRecord]:
    """What other processes have measured, now or in an earlier start."""
    found: list[PointRecord] = []
    for path in sorted(out.glob("points_*.jsonl")):
        found += read_points(path)
    return found


class Job(NamedTuple):
    """What every process of a study is told."""

    load: Load
    settings: StudySettings
    out: Path
    kappa: float
    fingerprint: str
    processes: int
    own: Stories | None


def measure_in_processes(job: Job) -> None:
    """All arms, measured side by side.

    Raises:
        TomsparseError: a process failed, or loaded other weights.
    """
    from torch.multiprocessing import spawn
    from torch.multiprocessing.spawn import ProcessException

    try:
        spawn(_work, (job,), nprocs=job.processes)
    except ProcessException as error:
        last = str(error).strip().splitlines()[-1].removeprefix(f"{TomsparseError.__module__}.")
        raise TomsparseError(
            f"A process of the study failed: {last}. What is finished is kept; the same call continues."
        ) from error


def _work(number: int, job: Job) -> None:
    """One process' share; runs in a process of its own."""
    load, settings, out, kappa, fingerprint, processes, own = job
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))
    model = load()
    if view(model).identity().fingerprint != fingerprint:
        raise TomsparseError("load() gives a model with other weights than the one that is studied")
    material = make_material(model, settings, own)
    sensitivities = read_sensitivities(material, out)
    with stored_points(out / f"points_{number}.jsonl") as (_, store):
        meter = PointMeter(
            model,
            material.scoring,
            material.text,
            operator="mean",
            on_point=store,
            resume=[*read_points(out / "points.jsonl"), *others_points(out)],
        )
        masks = make_masks(sensitivities, kappa)
        for arm in islice(make_arms(model, masks, sensitivities, kappa, settings), number, None, processes):
            meter.measure(arm.what, f"arm {arm.family!r}")
        for which in to_train(masks["mask"], settings)[number::processes]:
            meter.measure(tuned_arm(model, which, material, settings, out).what, f"arm {which.family!r}")
