"""The whole path in one folder: stories, sensitivities, sweep, mask, effect on others, position, page.

    run.json                          what was asked, of which weights, by which versions: written first
    sensitivity_{tom,general}.*       the two Fisher diagonals
    points.jsonl                      every finished measurement, appended as it is made
    mask*.safetensors                 the chosen mask and its controls
    results.json, *.parquet           every number
    report.html                       the page

Each file is written whole or not at all. A run that was stopped continues in the same folder; a folder of
another run is refused. Sensitivities come from stories of the split "train", kappa from "dev", and what is
reported from "test"; real text is cut into three parts in the same way. Position (a pass over a few stories
for each random mask) is measured anew when a run is continued; the same numbers come out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from tl_tomsparse._artifacts import write_bytes, write_json
from tl_tomsparse._checks import TomsparseError, check_choice, check_kappa, check_positive
from tl_tomsparse._folder import check_folder, claim_folder, opened_folder, stored_points, versions
from tl_tomsparse._material import Material, make_material, read_text, stored_sensitivity
from tl_tomsparse._model import MATRICES, view
from tl_tomsparse._points import json_rows
from tl_tomsparse._progress import teller
from tl_tomsparse.edit import SparseEdit
from tl_tomsparse.effect import Effect, effect
from tl_tomsparse.experiment import KappaChoice, KappaSweep, arm_masks, auto_kappas, choose_kappa, kappa_sweep
from tl_tomsparse.mask import SparseMask
from tl_tomsparse.models import load_model
from tl_tomsparse.patterns import AttentionPattern, attention_pattern
from tl_tomsparse.position import PositionEffects, position_effects
from tl_tomsparse.position_verdict import position_verdict
from tl_tomsparse.samples import Samples
from tl_tomsparse.stories import Story
from tl_tomsparse.verdict import Claim, verdict

if TYPE_CHECKING:
    import pandas as pd

Dtype = Literal["float32", "bfloat16", "float16", "float64"]


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
        windows: text windows for the general sensitivity; a quarter as many (at least 10) for the perplexity
            of the effect, half of these for the sweep's, which is measured ten times as often.
        position_stories: held-out stories on which position is measured (of twins only one).
        length: tokens of a window.
        kappas: sparsities of the sweep, or "auto".
        matrices: which weights.
        sweep_masks: random masks at each point of the sweep, whose rule looks at their mean.
        random_masks: random masks beside the effect and the position.
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
    position_stories: int = 40
    length: int = 128
    kappas: Literal["auto"] | tuple[float, ...] = "auto"
    matrices: tuple[str, ...] = ("Q", "K")
    sweep_masks: int = 5
    random_masks: int = 20
    seed: int = 0
    device: str | None = None
    dtype: Dtype = "float32"
    prepend_bos: bool = True

    def check(self) -> None:
        """Refuse what can be refused before any work.

        Raises:
            TomsparseError: a count below one, an unknown matrix or dtype, a kappa outside [0, 1], a text
                file that cannot be read.
        """
        for count in ("stories", "dev_stories", "test_stories", "windows", "position_stories"):
            check_positive(count, getattr(self, count))
        for count in ("sweep_masks", "random_masks"):
            check_positive(count, getattr(self, count))
        for matrix in self.matrices:
            check_choice("matrices", matrix, MATRICES)
        if not self.matrices:
            raise TomsparseError("No matrices were asked for; name at least one, for example Q,K.")
        check_choice("dtype", self.dtype, get_args(Dtype))
        if self.kappas != "auto":
            for kappa in self.kappas:
                check_kappa(kappa)
            if not any(self.kappas):
                raise TomsparseError(
                    f"kappas={self.kappas!r} has nothing but 0, which edits no weight; add one above 0."
                )
        if self.length < 2:
            raise TomsparseError(
                f"length={self.length!r} must be at least 2: one token is predicted from another."
            )
        if self.seed < 0:
            raise TomsparseError(f"seed={self.seed!r} must be 0 or more.")
        for path in self.text:
            read_text(Path(path))


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
        position: on held-out stories, of the edit "mask".
        position_claims: read off it.
        patterns: attention over the shortest of these stories of the head that attends most to its first
            token, unedited and under the mask.
        stories: the held-out stories, for showing some.
    """

    settings: RunSettings
    facts: dict[str, Any]
    sweep: KappaSweep = field(repr=False)
    choice: KappaChoice
    masks: Mapping[str, SparseMask]
    effect: Effect = field(repr=False)
    claims: Sequence[Claim]
    position: PositionEffects = field(repr=False)
    position_claims: Sequence[Claim]
    patterns: tuple[AttentionPattern, AttentionPattern] = field(repr=False)
    stories: Sequence[Story] = field(repr=False)


def run_pipeline(
    settings: RunSettings,
    folder: str | Path,
    *,
    command: str | None = None,
    progress: Callable[[str], None] | None = None,
    show_progress: bool = True,
) -> RunResult:
    """Run everything that is not yet in the folder, and write the page.

    Args:
        settings: what to do.
        folder: where; new, empty, or of the same run.
        command: what was typed, to be recorded; by default this call.
        progress: told what begins; by default it is written beside the progress bars, where these are shown.
        show_progress: show progress bars.

    Raises:
        TomsparseError: settings that cannot be met, a folder of another run, a model that cannot be loaded or
            used, a full disk.
    """
    from tl_tomsparse.report import write_report

    settings.check()
    out = Path(folder)
    check_folder(out, _plain(settings))
    progress = teller(progress, show_progress)
    progress("Loading the model")
    model = load_model(
        settings.model, backend=settings.backend, device=settings.device, dtype=getattr(torch, settings.dtype)
    )
    _check_model(model, settings)
    progress("Making stories and texts")
    material = make_material(model, settings)
    with opened_folder(out):
        facts = claim_folder(
            out, _facts(model, settings, material, command or f"run_pipeline({settings!r}, ...)")
        )
        progress(f"Sensitivity of {facts['n_weights']:,} weights to {len(material.tom)} false-belief answers")
        tom = stored_sensitivity(
            model,
            material.tom,
            settings.matrices,
            out / "sensitivity_tom.safetensors",
            show_progress=show_progress,
        )
        progress(f"Sensitivity to {len(material.general)} windows of general text")
        general = stored_sensitivity(
            model,
            material.general,
            settings.matrices,
            out / "sensitivity_general.safetensors",
            show_progress=show_progress,
        )
        with stored_points(out / "points.jsonl") as (finished, store):
            kappas = auto_kappas(tom) if settings.kappas == "auto" else settings.kappas
            progress(f"Sweep over {len({0.0, *kappas})} sparsities on {len(material.dev)} dev stories")
            shared: dict[str, Any] = {
                "seed": settings.seed,
                "prepend_bos": settings.prepend_bos,
                "on_point": store,
                "resume": finished,
                "show_progress": show_progress,
            }
            sweep = kappa_sweep(
                model,
                tom,
                general,
                dev_stories=material.dev,
                dev_text=material.dev_text,
                kappas=kappas,
                n_random=settings.sweep_masks,
                **shared,
            )
            choice = choose_kappa(sweep)
            masks = arm_masks(tom, general, choice.kappa)
            progress(f"Effect of {len(masks['mask'])} weights on {len(material.test)} held-out stories")
            found = effect(
                model,
                masks,
                stories=material.test,
                text=material.test_text,
                kappa=choice.kappa,
                n_random=settings.random_masks,
                **shared,
            )
        progress(f"Position on {len(material.position)} held-out stories")
        position, patterns = _position(model, material.position, masks["mask"], settings, show_progress)
        result = RunResult(
            settings,
            facts,
            sweep,
            choice,
            masks,
            effect=found,
            claims=verdict(found),
            position=position,
            position_claims=position_verdict(position),
            patterns=patterns,
            stories=material.test,
        )
        progress("Writing the page")
        _write_results(out, result)
        write_report(out / "report.html", result)
    return result


def _position(
    model: Any, samples: Samples, mask: SparseMask, settings: RunSettings, show_progress: bool
) -> tuple[PositionEffects, tuple[AttentionPattern, AttentionPattern]]:
    edit = SparseEdit.mean(model, mask)
    found = position_effects(
        model,
        samples,
        {"mask": edit},
        n_random=settings.random_masks,
        seed=settings.seed,
        show_progress=show_progress,
    )
    heads = found.before.attention.to_frame()
    top = heads.loc[heads.attention.idxmax()]
    asked: dict[str, Any] = {
        "heads": [(int(top.layer), int(top["head"]))],
        "sample": samples.ids[int(samples.lengths.argmin())],
    }
    before = attention_pattern(model, samples, **asked)
    with edit.applied(model):
        return found, (before, attention_pattern(model, samples, **asked))


def _facts(model: Any, settings: RunSettings, material: Material, command: str) -> dict[str, Any]:
    model_view = view(model)

    def count(matrices: Collection[str]) -> int:
        return sum(model_view.weight(key).numel() for key in model_view.keys(matrices))

    return {
        "settings": _plain(settings),
        "command": command,
        "identity": model_view.identity().to_dict(),
        "n_weights": count(settings.matrices),
        "n_all_weights": count(model_view.matrices),
        "samples": material.digest,
        "bos_token": model_view.tokenizer.bos_token if settings.prepend_bos else None,
        "device": str(model_view.device),
        "versions": versions(),
    }


def _check_model(model: Any, settings: RunSettings) -> None:
    """Refuse what only the model tells: its basis and matrices, kappas that choose nothing or all."""
    model_view = view(model)
    model_view.require_raw_basis()
    sizes = [model_view.weight(key).numel() for key in model_view.keys(settings.matrices)]
    if settings.kappas == "auto":
        return
    top = max(settings.kappas)
    if not round(top * max(sizes)):
        raise TomsparseError(
            f"kappas={settings.kappas!r} choose no weight: the largest of these matrices of "
            f"{model_view.name} has {max(sizes):,} weights, so use at least {1 / max(sizes):.1g}."
        )
    if any(round(top * size) == size for size in sizes):
        raise TomsparseError(
            f"kappa={top!r} chooses all weights of a matrix, and none is left to take the mean of; "
            "use smaller kappas."
        )


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
        "choice": result.choice.table.reset_index(),
        "mask_entries": result.masks["mask"].to_frame(),
        **_position_frames(result.position),
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
            "position_verdict": [claim.to_dict() for claim in result.position_claims],
            "position": result.position.to_dict(),
            "sweep": result.sweep.to_dict(),
            **{name: json_rows(frames[name]) for name in ("answers", "mask_entries")},
        },
    )


def _position_frames(position: PositionEffects) -> dict[str, pd.DataFrame]:
    """Those that have rows: without a rotation some have none."""
    frames = {
        "position": position.summary,
        "position_heads": position.heads,
        "position_frequencies": position.frequencies,
        "position_cosines": position.cosines,
        "position_sinks": position.sinks,
        "position_degrees": position.degrees,
        "position_by_frequency": position.by_frequency,
        "position_shares": position.shares,
        "position_ranks": position.ranks,
    }
    return {name: frame for name, frame in frames.items() if len(frame)}
