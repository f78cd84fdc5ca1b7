"""A finished study as files, and back.

run.json                           who the folder belongs to
mask_<name>.safetensors            the mask and its controls
<table>.parquet                    arms, accuracy, comparisons, overlaps, losses
questions.parquet                  every held-out question as it was put
answers.safetensors                which arm has which question right; losses of text
heads.json, heads_<title>.parquet  figures and tables about heads
localisation_<table>.parquet       scores and changes of finding things again
study.json                         facts and claims; written last, so a study without it is not finished
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import nan
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tl_tomsparse._artifacts import read_json, read_safetensors, write_bytes, write_json, write_safetensors
from tl_tomsparse._checks import TomsparseError, check_same_weights
from tl_tomsparse._model import ModelIdentity
from tl_tomsparse._study_answers import Answers
from tl_tomsparse._study_battery import BatterySection
from tl_tomsparse._study_claims import StudyClaim
from tl_tomsparse._study_heads import HeadSection
from tl_tomsparse.mask import SparseMask
from tl_tomsparse.verdict import Claim

if TYPE_CHECKING:
    import pandas as pd

    from tl_tomsparse.study import Study

_TABLES = ("arms", "accuracy", "comparisons", "overlaps", "losses")
_LOCALISATION = ("scores", "changes")
_ANSWERS = "tomsparse.answers"
_NUMBERS = ("value", "low", "high")  # of a claim


def write_study(out: Path, study: Study) -> None:
    """Every file but the page, each whole or not at all."""
    (out / "study.json").unlink(missing_ok=True)  # while tables and claims may differ
    for name, mask in study.masks.items():
        mask.save(out / f"mask_{name}.safetensors")
    for table in _TABLES:
        _write_table(out / f"{table}.parquet", getattr(study, table))
    answers = study.answers
    _write_table(out / "questions.parquet", answers.questions)
    header = {"kind": _ANSWERS, "families": answers.families, "text": answers.text}
    tensors = {name: torch.from_numpy(getattr(answers, name)) for name in ("correct", "nll", "n_tokens")}
    write_safetensors(out / "answers.safetensors", tensors, header | {"samples": study.facts["samples"]})
    heads = study.heads
    for title, frame in heads.frames.items():
        _write_table(_head_table(out, title), frame)
    figures = {title: json.loads(figure.to_json()) for title, figure in heads.figures.items()}
    write_json(
        out / "heads.json", {"obstacle": heads.obstacle, "figures": figures, "frames": list(heads.frames)}
    )
    for name in _LOCALISATION:
        _write_table(out / f"localisation_{name}.parquet", getattr(study.battery, name))
    families: dict[str, Sequence[Claim]] = {
        "claims": study.claims,
        "heads": heads.claims,
        "battery": study.battery.claims,
    }
    lists: dict[str, Any] = {name: [claim.to_dict() for claim in some] for name, some in families.items()}
    lists |= {"masks": list(study.masks), "no_battery": study.battery.obstacle}
    write_json(out / "study.json", study.facts | lists)


def read_parts(folder: Path) -> dict[str, Any]:
    """What a `Study` is made of, by attribute; see `read_study`."""
    facts = _facts(folder)
    claims, about_heads, names = (facts.pop(name) for name in ("claims", "heads", "masks"))
    about_battery, obstacle = facts.pop("battery"), facts.pop("no_battery")
    masks = {name: SparseMask.load(folder / f"mask_{name}.safetensors") for name in names}
    for name, mask in masks.items():
        _check_weights(folder, f"mask_{name}.safetensors", mask.identity, facts["identity"])
    heads = read_json(folder / "heads.json")
    return {
        "claims": [StudyClaim(**_with_nan(claim)) for claim in claims],
        **{table: _read_table(folder / f"{table}.parquet") for table in _TABLES},
        "masks": masks,
        "heads": _heads(folder, heads, [Claim(**claim) for claim in about_heads]),
        "battery": BatterySection(
            [StudyClaim(**_with_nan(claim)) for claim in about_battery],
            obstacle=obstacle,
            **{name: _read_table(folder / f"localisation_{name}.parquet") for name in _LOCALISATION},
        ),
        "answers": _answers(folder, facts["samples"]),
        "kappa": facts["kappa"],
        "facts": facts,
    }


def _facts(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise TomsparseError(f"There is no folder {folder}; pass the folder that a study was written to.")
    owner = read_json(folder / "run.json") if (folder / "run.json").exists() else None
    if not isinstance(owner, dict) or not owner.keys() >= {"command", "settings", "identity", "samples"}:
        raise TomsparseError(f"The folder {folder} holds no study; pass the folder that one was written to.")
    if owner["command"] != "study":
        where = folder / "study"
        cure = f"pass {where}" if (where / "run.json").exists() else "add --study to its command to make one"
        raise TomsparseError(f"The folder {folder} holds a run and not a study; {cure}.")
    again = "the same command, or the same call of `study`, continues it"
    if not (folder / "study.json").exists():
        raise TomsparseError(f"The study in {folder} is not finished; {again}.")
    facts = read_json(folder / "study.json")
    needed = ("questions.parquet", "answers.safetensors", "heads.json")
    if not facts.keys() >= {"masks", "battery"} or not all((folder / name).exists() for name in needed):
        raise TomsparseError(
            f"The study in {folder} was written by an earlier version, or lacks files; {again} and measures "
            "nothing again."
        )
    _check_weights(folder, "study.json", ModelIdentity.from_dict(facts["identity"]), owner["identity"])
    for name in ("settings", "samples"):
        _check_same(folder, "study.json", facts[name], owner[name])
    return dict(facts)


def _check_weights(folder: Path, name: str, found: ModelIdentity, expected: dict[str, Any]) -> None:
    owner = ModelIdentity.from_dict(expected)
    check_same_weights(str(folder / name), found, f"the study in {folder}", owner)


def _check_same(folder: Path, name: str, found: Any, expected: Any) -> None:
    if found != expected:
        raise TomsparseError(
            f"{folder / name} is of another study than {folder / 'run.json'}: {found!r} is not "
            f"{expected!r}. Put the file of this study back, or run the study again in a new folder."
        )


def _answers(folder: Path, samples: str) -> Answers:
    tensors, header = read_safetensors(folder / "answers.safetensors", _ANSWERS)
    _check_same(folder, "answers.safetensors", header["samples"], samples)
    questions = _read_table(folder / "questions.parquet")
    questions["options"] = [tuple(options) for options in questions.options]
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    return Answers(questions, tuple(header["families"]), **arrays, text=header["text"])


def _heads(folder: Path, stored: Mapping[str, Any], claims: list[Claim]) -> HeadSection:
    import plotly.graph_objects as go

    figures = {title: go.Figure(figure) for title, figure in stored["figures"].items()}
    frames = {title: _read_table(_head_table(folder, title)) for title in stored["frames"]}
    return HeadSection(claims, figures, frames, stored["obstacle"])


def _head_table(folder: Path, title: str) -> Path:
    return folder / f"heads_{title.replace(' ', '_')}.parquet"


def _write_table(path: Path, frame: pd.DataFrame) -> None:
    write_bytes(path, frame.to_parquet())


def _read_table(path: Path) -> pd.DataFrame:
    import pandas as pd

    try:
        return pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise TomsparseError(
            f"Cannot read {path} ({error}); the same call of `study` writes it again."
        ) from error


def _with_nan(claim: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no word for nan."""
    return {name: nan if name in _NUMBERS and value is None else value for name, value in claim.items()}
