"""The whole path in one folder: stories, sensitivities, sweep, mask, effect on held-out stories, verdict, page.

    run.json                          what was asked, of which weights, by which versions: written first
    sensitivity_{tom,general}.*       the two Fisher diagonals
    points.jsonl                      every finished measurement, appended as it is made
    mask*.safetensors                 the chosen mask and its controls
    results.json, *.parquet           every number
    report.html                       the page

Each file is written whole or not at all. A run that was stopped continues in the same folder; a folder of another run is refused.
Sensitivities come from stories of the split "train", kappa from "dev", and what is reported from "test"; real text is cut into
three parts in the same way.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from tl_tomsparse._artifacts import read_json, write_bytes, write_json
from tl_tomsparse._checks import TomsparseError, check_choice, check_kappa, check_positive
from tl_tomsparse._model import MATRICES, view
from tl_tomsparse._points import PointRecord
from tl_tomsparse.effect import Effect, effect
from tl_tomsparse.experiment import KappaChoice, KappaSweep, arm_masks, auto_kappas, choose_kappa, kappa_sweep
from tl_tomsparse.mask import SparseMask
from tl_tomsparse.models import load_model
from tl_tomsparse.samples import Samples, story_samples, text_samples
from tl_tomsparse.sensitivity import Sensitivity, fisher_diagonal
from tl_tomsparse.stories import Story, generate_stories, generate_texts
from tl_tomsparse.verdict import Claim, verdict

Dtype = Literal["float32", "bfloat16", "float16", "float64"]
_FORMAT = 1
_PACKAGES = ("tl-tomsparse", "transformer-lens", "transformers", "torch", "numpy")


@dataclass(frozen=True)
class RunSettings:
    """What a run is asked for.

    Attributes:
        model: None for the embedded model, a directory, or a hub name.
        backend: "bridge" or "hooked".
        stories: false-belief stories ("train") for the sensitivity.
        dev_stories: stories of the sweep.
        test_stories: held-out stories of the effect.
        text: files of real text; none for generated text.
        windows: text windows for the general sensitivity; half as many for each perplexity.
        length: tokens of a window.
        kappas: sparsities of the sweep, or "auto".
        matrices: which weights.
        random_masks: random masks at each point.
        seed: of stories, text and random masks.
        device: by default the GPU if there is one.
        dtype: of the weights.
        prepend_bos: begin every sample with the BOS token.
    """

    model: str | None = None
    backend: Literal["bridge", "hooked"] = "bridge"
    stories: int = 200
    dev_stories: int = 36
    test_stories: int = 240
    text: tuple[str, ...] = ()
    windows: int = 200
    length: int = 128
    kappas: Literal["auto"] | tuple[float, ...] = "auto"
    matrices: tuple[str, ...] = ("Q", "K")
    random_masks: int = 20
    seed: int = 0
    device: str | None = None
    dtype: Dtype = "float32"
    prepend_bos: bool = True

    def check(self) -> None:
        """Refuse what can be refused before any work.

        Raises:
            TomsparseError: a count below one, an unknown matrix or dtype, a kappa outside [0, 1], a text file that cannot be read.
        """
        for name in ("stories", "dev_stories", "test_stories", "windows", "random_masks"):
            check_positive(name, getattr(self, name))
        for matrix in self.matrices:
            check_choice("matrices", matrix, MATRICES)
        if not self.matrices:
            raise TomsparseError("No matrices were asked for; name at least one, for example Q,K.")
        check_choice("dtype", self.dtype, get_args(Dtype))
        if self.kappas != "auto":
            for kappa in self.kappas:
                check_kappa(kappa)
            if not any(self.kappas):
                raise TomsparseError(f"kappas={self.kappas!r} has nothing but 0, which edits no weight; add one above 0.")
        for path in self.text:
            _read_text(Path(path))


@dataclass(frozen=True, eq=False)
class RunResult:
    """Everything that a run found.

    Attributes:
        settings: what was asked.
        facts: the model, its identity, versions and counts, as in `run.json`.
        sweep, choice: on dev stories.
        masks: "mask", "general_only", "tom_only" at the chosen kappa.
        effect: on held-out stories.
        claims: read off the effect.
        stories: the held-out stories, for showing some.
    """

    settings: RunSettings
    facts: dict[str, Any]
    sweep: KappaSweep = field(repr=False)
    choice: KappaChoice
    masks: Mapping[str, SparseMask]
    effect: Effect = field(repr=False)
    claims: Sequence[Claim]
    stories: Sequence[Story] = field(repr=False)


def run_pipeline(
    settings: RunSettings,
    folder: str | Path,
    *,
    progress: Callable[[str], None] = lambda _message: None,
    show_progress: bool = True,
) -> RunResult:
    """Run everything that is not yet in the folder, and write the page.

    Args:
        settings: what to do.
        folder: where; new, empty, or of the same run.
        progress: told what begins.
        show_progress: show progress bars.

    Raises:
        TomsparseError: settings that cannot be met, a folder of another run, a model that cannot be loaded or used, a full disk.
    """
    from tl_tomsparse.report import write_report

    settings.check()
    out = Path(folder)
    _check_folder(out, settings)
    progress("Loading the model")
    model = load_model(
        settings.model, backend=settings.backend, device=settings.device, dtype=getattr(torch, settings.dtype)
    )
    with _folder(out):
        facts = _claim_folder(out, settings, model)
        material = _material(model, settings)
        progress(f"Sensitivity of {facts['n_weights']:,} weights to {len(material.tom)} false-belief answers")
        tom = _sensitivity(model, material.tom, settings, out / "sensitivity_tom.safetensors", show_progress)
        progress(f"Sensitivity to {len(material.general)} windows of general text")
        general = _sensitivity(model, material.general, settings, out / "sensitivity_general.safetensors", show_progress)
        with _points(out / "points.jsonl") as (finished, store):
            kappas = auto_kappas(tom) if settings.kappas == "auto" else settings.kappas
            progress(f"Sweep over {len({0.0, *kappas})} sparsities on {len(material.dev)} dev stories")
            shared = {
                "n_random": settings.random_masks,
                "seed": settings.seed,
                "prepend_bos": settings.prepend_bos,
                "on_point": store,
                "resume": finished,
                "show_progress": show_progress,
            }
            sweep = kappa_sweep(
                model, tom, general, dev_stories=material.dev, dev_text=material.dev_text, kappas=kappas, **shared
            )
            choice = choose_kappa(sweep)
            masks = arm_masks(tom, general, choice.kappa)
            progress(f"Effect of {len(masks['mask'])} weights on {len(material.test)} held-out stories")
            found = effect(
                model, masks, stories=material.test, text=material.test_text, kappa=choice.kappa, **shared
            )
        claims = verdict(found)
        result = RunResult(settings, facts, sweep, choice, masks, found, claims, material.test)
        progress("Writing the page")
        _write_results(out, result)
        write_report(out / "report.html", result)
    return result


@dataclass(frozen=True, eq=False)
class _Material:
    tom: Samples
    general: Samples
    dev: list[Story]
    dev_text: Samples
    test: list[Story]
    test_text: Samples


def _material(model: Any, settings: RunSettings) -> _Material:
    """All samples, made (and refused) before the long work begins."""
    length = min(settings.length, view(model).n_ctx)
    texts = _texts(settings)
    bos = settings.prepend_bos

    def windows(part: str, n: int) -> Samples:
        return text_samples(model, texts[part], n=n, length=length, prepend_bos=bos, seed=settings.seed)

    train = generate_stories(settings.stories, seed=settings.seed, split="train", conditions=("false_belief",))
    half = max(1, settings.windows // 2)
    return _Material(
        story_samples(model, train, prepend_bos=bos),
        windows("train", settings.windows),
        generate_stories(settings.dev_stories, seed=settings.seed, split="dev"),
        windows("dev", max(1, half // 2)),
        generate_stories(settings.test_stories, seed=settings.seed, split="test"),
        windows("test", half),
    )


def _texts(settings: RunSettings) -> dict[str, list[str]]:
    parts = ("train", "dev", "test")
    if not settings.text:
        # About 110 tokens a text; longer windows need more of them.
        each = 1 + settings.windows * max(1, settings.length // 64)
        return {part: generate_texts(each, seed=settings.seed, split=part) for part in parts}
    whole = "\n".join(_read_text(Path(path)) for path in settings.text)
    cuts = [0, len(whole) * 6 // 10, len(whole) * 8 // 10, len(whole)]
    return {part: [whole[start:end]] for part, start, end in zip(parts, cuts, cuts[1:])}


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TomsparseError(f"The text file {path} cannot be read: {error}. Pass a file of UTF-8 text.") from error


def _sensitivity(model: Any, samples: Samples, settings: RunSettings, path: Path, show_progress: bool) -> Sensitivity:
    if path.exists():
        return Sensitivity.load(path)
    partial = path.with_suffix(".partial.safetensors")
    values = fisher_diagonal(
        model, samples, matrices=settings.matrices, checkpoint=partial, show_progress=show_progress
    )
    values.save(path)
    partial.unlink(missing_ok=True)
    return values


@contextmanager
def _points(path: Path) -> Iterator[tuple[list[PointRecord], Callable[[PointRecord], None]]]:
    """Finished measurements, and a function that appends one; a line cut off by a crash is dropped."""
    finished: list[PointRecord] = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                finished.append(json.loads(line))
            except json.JSONDecodeError:
                break
        write_bytes(path, "".join(json.dumps(record) + "\n" for record in finished).encode())
    with path.open("a", encoding="utf-8") as lines:

        def store(record: PointRecord) -> None:
            lines.write(json.dumps(record) + "\n")
            lines.flush()

        yield finished, store


def _check_folder(out: Path, settings: RunSettings) -> None:
    """Refuse a folder that holds something else, before the model is loaded."""
    if out.exists() and not out.is_dir():
        raise TomsparseError(f"{out} is a file; pass a folder for --out.")
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not (out / "run.json").exists():
        raise TomsparseError(f"The folder {out} holds other files and no run; pass a new or empty folder.")
    earlier = read_json(out / "run.json")
    asked = _plain(settings)
    found = earlier.get("settings", {})
    if earlier.get("format") != _FORMAT or found != asked:
        differs = ", ".join(
            f"{name} {found.get(name)!r} (now {asked.get(name)!r})"
            for name in sorted({*asked, *found})
            if found.get(name) != asked.get(name)
        )
        raise TomsparseError(
            f"The folder {out} holds another run: {differs or 'of another version'}. Pass a new folder, or the earlier settings."
        )


def _claim_folder(out: Path, settings: RunSettings, model: Any) -> dict[str, Any]:
    model_view = view(model)
    model_view.require_eval()
    model_view.require_raw_basis()
    keys = model_view.keys(settings.matrices)
    facts = {
        "format": _FORMAT,
        "settings": _plain(settings),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "identity": model_view.identity().to_dict(),
        "n_weights": sum(model_view.weight(key).numel() for key in keys),
        "n_parameters": sum(parameter.numel() for parameter in model_view.parameters() if parameter.is_floating_point()),
        "device": str(model_view.device),
        "versions": {name: version(name) for name in _PACKAGES} | {"python": platform.python_version()},
    }
    if (out / "run.json").exists():
        earlier = read_json(out / "run.json")
        if earlier["identity"]["fingerprint"] != facts["identity"]["fingerprint"]:
            raise TomsparseError(
                f"The folder {out} holds a run on other weights of the same name; the model has changed. Pass a new folder."
            )
        return dict(earlier)
    write_json(out / "run.json", facts)
    return facts


@contextmanager
def _folder(out: Path) -> Iterator[None]:
    """The folder; if it was made here and nothing was finished in it, it is removed again."""
    existed = out.is_dir()
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not os.access(out, os.W_OK):
            raise PermissionError(f"{out} is not writable")
        yield
    except OSError as error:
        raise TomsparseError(f"Cannot write to {out}: {error}. Free some space or pass another folder for --out.") from error
    finally:
        if not existed and out.is_dir() and not any(out.iterdir()):
            out.rmdir()


def _plain(settings: RunSettings) -> dict[str, Any]:
    return dict(json.loads(json.dumps(asdict(settings))))


def _write_results(out: Path, result: RunResult) -> None:
    names = {"mask": "mask", "general_only": "mask_general_only", "tom_only": "mask_tom_only"}
    for arm, mask in result.masks.items():
        mask.save(out / f"{names[arm]}.safetensors")
    frames = {
        "sweep": result.sweep.frame,
        "accuracy": result.effect.accuracy,
        "random": result.effect.random,
        "perplexity": result.effect.perplexity,
        "differences": result.effect.differences,
        "answers": result.effect.answers,
        "mask_entries": result.masks["mask"].to_frame(),
    }
    for name, frame in frames.items():
        write_bytes(out / f"{name}.parquet", frame.to_parquet(index=False))
    write_json(
        out / "results.json",
        {
            **result.facts,
            "verdict": [claim.to_dict() for claim in result.claims],
            "choice": result.choice.to_dict(),
            "effect": result.effect.to_dict(),
            "sweep": result.sweep.to_dict(),
        },
    )
