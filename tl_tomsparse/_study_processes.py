"""Several processes at one study: each takes what none has taken yet and leaves it in the study's folder,
where the study then reads all of it.

    first               sensitivities
    once there is a     edits, trained weights, changes of the loss, the battery
    kappa

The first process is the study's own; each of the others loads the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import takewhile
from multiprocessing import parent_process
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from time import sleep
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from tqdm.auto import tqdm

from tl_tomsparse._checks import TomsparseError
from tl_tomsparse._folder import read_points, stored_points
from tl_tomsparse._model import view
from tl_tomsparse._points import PointMeter, PointRecord
from tl_tomsparse._study_arms import Arm, main_arms, make_arms
from tl_tomsparse._study_battery import measure_arms, prepared_battery
from tl_tomsparse._study_material import (
    Material,
    make_masks,
    make_material,
    make_sensitivities,
    read_sensitivities,
    sensitivity_path,
)
from tl_tomsparse._study_measure import (
    loss_changes,
    masks_to_predict,
    masks_to_train,
    study_meter,
    tuned_arm,
)
from tl_tomsparse._study_stories import Stories
from tl_tomsparse.mask import SparseMask
from tl_tomsparse.sensitivity import Sensitivity

if TYPE_CHECKING:
    from tl_tomsparse._study_settings import StudySettings

Load = Callable[[], Any]
Item = TypeVar("Item")
_PHASES = ("sensitivities", "arms", "training", "loss changes", "battery")
_PAUSE = 0.1  # seconds between looks at what others do


def others_points(out: Path) -> list[PointRecord]:
    """What other processes have measured, now or in an earlier start."""
    found: list[PointRecord] = []
    for path in sorted(out.glob("points_*.jsonl")):
        found += read_points(path)
    return found


class Job(NamedTuple):
    """What every process of a study is told; `turns` counts what is taken of each kind, `kappa` is 0 until it
    is chosen.
    """

    load: Load
    settings: StudySettings
    out: Path
    fingerprint: str
    samples: str
    own: Stories | None
    turns: Mapping[str, Any]
    kappa: Any


def check_load(load: object) -> None:
    """Refuse a function that other processes cannot be given."""
    try:
        ForkingPickler.dumps(load)  # what multiprocessing will send
    except Exception as error:  # of many kinds, depending on which part of it cannot be sent
        raise TomsparseError(
            f"load={load!r} cannot be sent to another process ({error}); pass a function of a module, such "
            "as functools.partial(load_model, path)."
        ) from error


def make_job(
    load: Load, settings: StudySettings, out: Path, fingerprint: str, samples: str, own: Stories | None
) -> Job:
    """A job of which nothing is taken yet; `fingerprint` and `samples` are of its weights and material."""
    shared = torch.multiprocessing.get_context("spawn").Value
    turns = {phase: shared("q", 0) for phase in _PHASES}
    return Job(load, settings, out, fingerprint, samples, own, turns, shared("d", 0.0))


class Work(NamedTuple):
    """What is made of a kappa: the masks, and every edit but trained ones."""

    kappa: float
    sensitivities: Mapping[str, Sensitivity]
    masks: Mapping[str, SparseMask]
    arms: list[Arm]


def make_work(
    model: Any, sensitivities: Mapping[str, Sensitivity], kappa: float, settings: StudySettings
) -> Work:
    """The same in every process."""
    masks = make_masks(sensitivities, kappa)
    return Work(kappa, sensitivities, masks, list(make_arms(model, masks, sensitivities, kappa, settings)))


class Helpers:
    """Further processes, beside the one that this is made in; to be used in a `with` block.

    Args:
        job: the same for all.
        processes: how many, with this one.
        show_progress: show progress bars.

    Raises:
        TomsparseError: (in the block) a process failed, or loaded other weights.
    """

    def __init__(self, job: Job, processes: int, show_progress: bool) -> None:
        self._job, self._processes, self._show_progress = job, processes, show_progress
        self._fewer = max(1, torch.get_num_threads() // processes)

    def __enter__(self) -> Helpers:
        from torch.multiprocessing import spawn

        self._context = spawn(_work, (self._job, self._fewer), nprocs=self._processes - 1, join=False)
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._context.processes:  # at the end of an undisturbed study they have ended
            process.terminate()
            process.join()

    def sensitivities(self, model: Any, material: Material) -> None:
        """Until all of them are in the folder."""
        with _threads(self._fewer):
            _sensitivities(model, material, self._job, self._watched)
        while not all(sensitivity_path(self._job.out, name).exists() for name in material.tasks):
            if self._check():  # all were interrupted, and what they had taken is left to this process
                break
            sleep(_PAUSE)

    def edits(self, model: Any, material: Material, work: Work, meter: PointMeter) -> None:
        """Until everything that takes a kappa is in the folder."""
        self._job.kappa.value = work.kappa
        with _threads(self._fewer):
            _edits(model, material, work, self._job, meter, self._watched)
        while not self._check():
            sleep(_PAUSE)

    def _watched(self, phase: str, items: Sequence[Item]) -> Iterator[Item]:
        words = f"{phase} ({self._processes} processes)"
        with tqdm(total=len(items), desc=words, disable=not self._show_progress) as bar:
            for item in _taken(self._job, phase, items):
                self._check()
                yield item
                bar.update(min(len(items), self._job.turns[phase].value - 1) - bar.n)  # of all processes

    def _check(self) -> bool:
        """Whether all have ended; raises if one of them failed."""
        from torch.multiprocessing.spawn import ProcessException

        try:
            return self._context.join(timeout=0)
        except ProcessException as error:
            last = str(error).strip().splitlines()[-1].removeprefix(f"{TomsparseError.__module__}.")
            raise TomsparseError(
                f"A process of the study failed: {last}. What is finished is kept; the same call continues."
            ) from error


@contextmanager
def _threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _taken(job: Job, phase: str, items: Sequence[Item]) -> Iterator[Item]:
    """Those that no other process takes."""
    turn = job.turns[phase]
    while True:
        with turn.get_lock():
            at, turn.value = turn.value, turn.value + 1
        if at >= len(items):
            return
        yield items[at]


def _work(number: int, job: Job, threads: int) -> None:
    """What one of the further processes does."""
    torch.set_num_threads(threads)
    model = job.load()
    if view(model).identity().fingerprint != job.fingerprint:
        raise TomsparseError("load() gives a model with other weights than the one that is studied")
    material = make_material(model, job.settings, job.own)
    if material.digest != job.samples:
        raise TomsparseError("load() gives a model with another tokenizer, or texts have changed since")

    def mine(phase: str, items: Sequence[Item]) -> Iterator[Item]:
        return takewhile(lambda _: not _alone(), _taken(job, phase, items))

    _sensitivities(model, material, job, mine)
    while not job.kappa.value and not _alone():
        sleep(_PAUSE)
    if _alone():
        return
    with stored_points(job.out / f"points_{number}.jsonl") as (_, store):
        resume = [*read_points(job.out / "points.jsonl"), *others_points(job.out)]
        meter = study_meter(model, material, store, resume)
        work = make_work(model, read_sensitivities(material, job.out), job.kappa.value, job.settings)
        _edits(model, material, work, job, meter, mine)


def _alone() -> bool:
    """Whether the process is gone that this one works for."""
    first = parent_process()
    return first is not None and not first.is_alive()


Mine = Callable[[str, Sequence[Any]], Iterator[Any]]


def _sensitivities(model: Any, material: Material, job: Job, mine: Mine) -> None:
    make_sensitivities(model, material, mine("sensitivities", list(material.tasks)), job.settings, job.out)


def _edits(model: Any, material: Material, work: Work, job: Job, meter: PointMeter, mine: Mine) -> None:
    settings, out, masks = job.settings, job.out, work.masks
    for arm in mine("arms", work.arms):
        meter.measure(arm.what, arm.label)
    for which in mine("training", masks_to_train(masks["mask"], settings)):
        arm = tuned_arm(model, which, material, settings, out)
        meter.measure(arm.what, arm.label)
    predicted = mine("loss changes", masks_to_predict(masks["mask"], settings))
    loss_changes(model, material, predicted, work.sensitivities["task"], out)
    prepared = prepared_battery(model, settings)
    if not isinstance(prepared, str):
        measure_arms(model, prepared, mine("battery", main_arms(model, masks, settings)), out)
