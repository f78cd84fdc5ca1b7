"""The whole path on a tiny random model: what a run leaves, how it continues, and what it refuses."""

from __future__ import annotations

import errno
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from tests import tiny
from tl_tomsparse import _fisher_progress, _folder, _material, experiment, pipeline, sensitivity
from tl_tomsparse._checks import TomsparseError
from tl_tomsparse._model import view
from tl_tomsparse._points import PointMeter
from tl_tomsparse.edit import SparseEdit
from tl_tomsparse.mask import SparseMask
from tl_tomsparse.models import load_model
from tl_tomsparse.pipeline import RunResult, RunSettings, run_pipeline
from tl_tomsparse.sensitivity import Sensitivity

TENSORS = ("mask", "mask_general_only", "mask_tom_only", "sensitivity_tom", "sensitivity_general")
FRAMES = ("sweep", "accuracy", "random", "perplexity", "differences", "answers", "choice", "mask_entries")
POSITION = ("heads", "sinks", "by_frequency", "shares", "ranks")  # of the summary's neighbours, those in JSON
FRAMES += ("position", *(f"position_{name}" for name in (*POSITION, "frequencies", "cosines", "degrees")))
STARTS = ("command", "versions", "device", "earlier_starts")


def settings(**changes: Any) -> RunSettings:
    base = RunSettings(
        model=str(tiny.long_directory()), stories=4, dev_stories=4, test_stories=6, windows=20, length=16,
        kappas=(0.01,), random_masks=3, device="cpu",
    )  # fmt: skip
    return replace(base, **changes)


def run(folder: Path, **changes: Any) -> RunResult:
    return run_pipeline(settings(**changes), folder, show_progress=False)


def numbers(folder: Path) -> str:
    found = json.loads((folder / "results.json").read_text())
    return json.dumps({name: value for name, value in found.items() if name not in STARTS})


@pytest.fixture(scope="module", autouse=True)
def small_batches():
    """So that even a few samples are several batches."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sensitivity, "_BATCH_TOKENS", {"cpu": 200})
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, RunResult]:
    folder = tmp_path_factory.mktemp("runs") / "one"
    return folder, run(folder)


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished[0], tmp_path / "run"))


def test_a_run_leaves_whole_files_and_nothing_else(finished):
    folder, result = finished
    expected = {"run.json", "points.jsonl", "results.json", "report.html"}
    expected |= {f"{name}.safetensors" for name in TENSORS} | {f"{name}.parquet" for name in FRAMES}
    assert {path.name for path in folder.iterdir()} == expected
    lines = (folder / "points.jsonl").read_text().splitlines()
    assert len({json.loads(line)["key"] for line in lines}) == len(lines)
    assert len(result.masks["mask"]) > 0


def test_results_have_command_versions_and_what_is_asked(finished):
    found = json.loads((finished[0] / "results.json").read_text())
    assert found["command"].startswith("run_pipeline(RunSettings(")
    assert {"tl-tomsparse", "transformer-lens", "torch", "python"} <= found["versions"].keys()
    assert found["versions"]["torch"] == torch.__version__.partition("+")[0] or torch.__version__
    assert found["settings"]["test_stories"] == 6
    assert found["earlier_starts"] == []
    model = load_model(tiny.long_directory(), device="cpu")
    assert found["identity"]["fingerprint"] == view(model).identity().fingerprint
    assert found["n_weights"] == sum(view(model).weight(key).numel() for key in view(model).keys(("Q", "K")))


def test_parquet_and_json_agree(finished):
    folder, _ = finished
    found = json.loads((folder / "results.json").read_text())
    tables = {name: found["effect"][name] for name in ("accuracy", "random", "perplexity", "differences")}
    tables |= {"sweep": found["sweep"]["points"], "choice": found["choice"]["table"]}
    tables |= {name: found[name] for name in ("answers", "mask_entries")}
    tables |= {f"position_{name}": found["position"][name] for name in POSITION}
    tables["position"] = found["position"]["summary"]
    assert {*tables, "position_frequencies", "position_cosines", "position_degrees"} == set(FRAMES)
    for name, rows in tables.items():
        frame = pd.read_parquet(folder / f"{name}.parquet")
        assert len(frame) == len(rows) > 0
        assert list(frame.columns) == list(rows[0])
        for column in frame.columns:
            for stored, plain in zip(frame[column], (row[column] for row in rows)):
                if plain is None:
                    assert pd.isna(stored)
                else:
                    assert stored == (pytest.approx(plain, abs=1e-12) if isinstance(plain, float) else plain)


def test_masks_load_back_and_know_their_model(finished):
    folder, result = finished
    model = load_model(tiny.long_directory(), device="cpu")
    other = load_model(tiny.directory("llama", seed=1), device="cpu")
    for arm, name in (("mask", "mask"), ("general_only", "mask_general_only"), ("tom_only", "mask_tom_only")):
        mask = SparseMask.load(folder / f"{name}.safetensors")
        assert mask == result.masks[arm]
        SparseEdit.mean(model, mask)
        with pytest.raises(TomsparseError, match="fingerprint"):
            SparseEdit.mean(other, mask)
    tom = Sensitivity.load(folder / "sensitivity_tom.safetensors")
    general = Sensitivity.load(folder / "sensitivity_general.safetensors")
    again = experiment.arm_masks(tom, general, result.choice.kappa)
    assert again["mask"] == result.masks["mask"]


def test_a_finished_run_says_the_same_again_and_measures_nothing(finished, copied, monkeypatch):
    monkeypatch.setattr(PointMeter, "_record", lambda *_: pytest.fail("measured again"))
    monkeypatch.setattr(_material, "fisher_diagonal", lambda *_, **__: pytest.fail("differentiated again"))
    run(copied)
    assert (copied / "results.json").read_bytes() == (finished[0] / "results.json").read_bytes()
    assert (copied / "report.html").read_bytes() == (finished[0] / "report.html").read_bytes()


def test_another_command_is_noted(copied):
    run_pipeline(settings(), copied, command="tomsparse run", show_progress=False)
    found = json.loads((copied / "results.json").read_text())
    assert found["command"] == "tomsparse run"
    assert [start["command"][:12] for start in found["earlier_starts"]] == ["run_pipeline"]


class Stop:
    """Raises in the middle of the n-th call of a method."""

    def __init__(self, monkeypatch, owner: Any, name: str, n: int, error: BaseException) -> None:
        original, calls = getattr(owner, name), iter(range(1, 10**6))

        def method(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == n:
                raise error
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, method)


@pytest.mark.parametrize(
    ("owner", "name", "n"),
    [
        (sensitivity, "row_losses", 1),
        (sensitivity, "row_losses", 3),
        (PointMeter, "_record", 2),
        (PointMeter, "_record", 9),
    ],
    ids=["at once", "sensitivity", "sweep", "effect"],
)
def test_a_stopped_run_continues_to_the_same_numbers(finished, tmp_path, monkeypatch, owner, name, n):
    monkeypatch.setattr(_fisher_progress, "_CHECKPOINT_SECONDS", 0.0)
    with monkeypatch.context() as patch:
        Stop(patch, owner, name, n, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "run")
    assert not (tmp_path / "run" / "results.json").exists()
    before = (tmp_path / "run" / "points.jsonl").read_bytes() if name == "_record" else b""
    assert len(before.splitlines()) == (n - 1 if name == "_record" else 0)
    run(tmp_path / "run")
    assert numbers(tmp_path / "run") == numbers(finished[0])
    assert (tmp_path / "run" / "points.jsonl").read_bytes().startswith(before)
    for tensors in TENSORS:
        path = f"{tensors}.safetensors"
        assert (tmp_path / "run" / path).read_bytes() == (finished[0] / path).read_bytes()
    assert not list((tmp_path / "run").glob("*partial*"))


@pytest.mark.parametrize("tail", [b'{"key": "ab', b"\xff\xfe\x00\n", b'{"key": 3}\n', b"[]\n", b"\n"])
def test_a_damaged_line_is_measured_again(finished, copied, tail):
    lines = (copied / "points.jsonl").read_bytes().splitlines(keepends=True)
    (copied / "points.jsonl").write_bytes(b"".join(lines[:-2]) + lines[-1] + tail)
    run(copied)
    assert numbers(copied) == numbers(finished[0])
    assert sorted((copied / "points.jsonl").read_bytes().splitlines(keepends=True)) == sorted(lines)


def test_a_full_disk_while_points_are_written_leaves_whole_lines(tmp_path, monkeypatch):
    written = []

    class Disk:
        """A file on a disk that takes half a line of the third write, then nothing."""

        def __init__(self, file: Any) -> None:
            self._file = file

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

        def __enter__(self) -> Disk:
            return self

        def __exit__(self, *_: object) -> None:
            self._file.close()

        def write(self, data: bytes) -> int:
            written.append(data)
            if len(written) < 3:
                return int(self._file.write(data))
            if len(written) == 3:
                return int(self._file.write(data[: len(data) // 2]))
            raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "points.jsonl"
    original = Path.open
    monkeypatch.setattr(Path, "open", lambda *args, **kwargs: Disk(original(*args, **kwargs)))
    record = {"key": "a", "chosen": [0], "margin": [1.0], "nll": [2.0]}

    def store_three() -> None:
        with _folder.opened_folder(tmp_path), _folder.stored_points(path) as (_, store):
            for _ in range(3):
                store(record)

    with pytest.raises(TomsparseError, match=r"No space left on device.*the same command continues"):
        store_three()
    monkeypatch.undo()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [record] * 2


def test_a_full_disk_at_the_start_leaves_no_folder(tmp_path, monkeypatch):
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(TomsparseError, match="No space left on device"):
        run(tmp_path / "deep" / "run")
    assert not list(tmp_path.iterdir())


def test_folders_of_others_are_refused_before_the_model_is_loaded(finished, copied, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "load_model", lambda *_, **__: pytest.fail("loaded"))
    (tmp_path / "file").write_text("mine")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "notes.txt").write_text("mine")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "run.json").write_text('{"format": 0}')
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "run.json").write_text("{")
    for folder, match in (
        (tmp_path / "file", "is a file; pass a folder"),
        (tmp_path / "file" / "below", "which is a file; pass another folder"),
        (tmp_path / "foreign", "holds other files and no run; pass a new"),
        (tmp_path / "old", "another version of tl_tomsparse; pass a new folder"),
        (tmp_path / "broken", "not a JSON file"),
    ):
        with pytest.raises(TomsparseError, match=match):
            run(folder)
    with pytest.raises(TomsparseError, match=r"another run, .*seed 0 \(now 1\), stories 4 \(now 5\)"):
        run(copied, seed=1, stories=5)
    monkeypatch.setattr(_folder.os, "access", lambda *_: False)
    with pytest.raises(TomsparseError, match="is not writable"):
        run(tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "file", "foreign", "old", "run"]
    assert (tmp_path / "foreign" / "notes.txt").read_text() == "mine"


def test_other_weights_or_text_under_the_same_name_are_refused(tmp_path):
    model, text = tmp_path / "model", tmp_path / "text.txt"
    shutil.copytree(tiny.long_directory(), model)
    text.write_text("Sally puts the ball in the basket. " * 400)
    asked = {"model": str(model), "text": (str(text),)}
    run(tmp_path / "run", **asked)
    before = (tmp_path / "run" / "results.json").read_bytes()
    text.write_text("Anna puts the ball in the box. " * 400)
    with pytest.raises(TomsparseError, match="other stories or texts, which have changed since"):
        run(tmp_path / "run", **asked)
    shutil.copy(tiny.directory("llama", seed=1) / "model.safetensors", model / "model.safetensors")
    with pytest.raises(TomsparseError, match="other weights, which have changed since"):
        run(tmp_path / "run", **asked)
    assert (tmp_path / "run" / "results.json").read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"stories": 0}, "stories=0 must be at least 1"),
        ({"test_stories": -1}, "test_stories=-1"),
        ({"windows": 0}, "windows=0"),
        ({"position_stories": 0}, "position_stories=0"),
        ({"random_masks": 0}, "random_masks=0"),
        ({"length": 1}, "length=1 must be at least 2"),
        ({"seed": -1}, "seed=-1 must be 0 or more"),
        ({"kappas": (0.5, 1.5)}, r"kappa=1.5 is outside \[0, 1\]"),
        ({"kappas": (float("nan"),)}, "kappa=nan is outside"),
        ({"kappas": (0.0,)}, "add one above 0"),
        ({"kappas": ()}, "add one above 0"),
        ({"matrices": ("Q", "Z")}, "matrices='Z' is not one of"),
        ({"matrices": ()}, "name at least one"),
        ({"dtype": "int8"}, "dtype='int8' is not one of"),
        ({"text": ("nowhere.txt",)}, "nowhere.txt cannot be read: No such file"),
    ],
)
def test_settings_are_refused_before_the_model_is_loaded(tmp_path, monkeypatch, changes, match):
    monkeypatch.setattr(pipeline, "load_model", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(TomsparseError, match=match):
        run(tmp_path / "run", **changes)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "holds no text"),
        (b" \n", "holds no text"),
        (b"\xff\xfe\x80", "not UTF-8"),
        (b"a\0b", "no text file"),
    ],
)
def test_text_that_is_none_is_refused(tmp_path, content, match):
    (tmp_path / "text").write_bytes(content)
    with pytest.raises(TomsparseError, match=match):
        run(tmp_path / "run", text=(str(tmp_path / "text"),))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (
            {"model": str(tiny.directory("llama"))},
            "reads 128; use shorter texts or a model with a longer",
        ),
        ({"length": 5000}, "The train part of the general text: length=5000 is more than"),
        ({"kappas": (1e-7,)}, "choose no weight: the largest of these matrices of .* has 1,024 weights"),
        ({"kappas": (1.0,)}, "none is left to take the mean of"),
        ({"backend": "nothing"}, "backend='nothing' is not one of"),
        ({"device": "nowhere"}, "device='nowhere' cannot be used here"),
        ({"model": "no/such-model"}, "'no/such-model' cannot be loaded.*pass a local directory"),
    ],
)
def test_what_the_model_tells_is_refused_before_long_work(tmp_path, monkeypatch, changes, match):
    monkeypatch.setattr(_material, "fisher_diagonal", lambda *_, **__: pytest.fail("long work"))
    with pytest.raises(TomsparseError, match=match):
        run(tmp_path / "run", **changes)
    assert not list(tmp_path.iterdir())


def test_short_text_and_a_tokenizer_without_bos_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(_material, "fisher_diagonal", lambda *_, **__: pytest.fail("long work"))
    (tmp_path / "text").write_text("Sally puts the ball in the basket.")
    with pytest.raises(TomsparseError, match=r"give more text, .*\(--text, --windows, --length\)"):
        run(tmp_path / "run", text=(str(tmp_path / "text"),))
    model = load_model(tiny.long_directory(), device="cpu")
    model.tokenizer.bos_token = None
    monkeypatch.setattr(pipeline, "load_model", lambda *_, **__: model)
    with pytest.raises(TomsparseError, match=r"no BOS token; pass prepend_bos=False \(--no-bos\)"):
        run(tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("backend", tiny.BACKENDS)
@pytest.mark.parametrize("kind", ["qwen2", "neox"])
def test_other_architectures_and_smallest_sizes_run(tmp_path, kind, backend):
    matrices = ("Q", "K", "V", "O", "in", "out")
    result = run(
        tmp_path / "run", model=str(tiny.long_directory(kind)), backend=backend, matrices=matrices,
        prepend_bos=False,
        stories=1, dev_stories=1, test_stories=1, windows=1, random_masks=1, kappas="auto",
    )  # fmt: skip
    assert {matrix for _, matrix in result.masks["mask"].shapes} == set(matrices)
    page = (tmp_path / "run" / "report.html").read_text()
    assert "W_out" in page
    assert "BOS token</dt><dd>none" in page


@pytest.mark.skipif(len(tiny.BACKENDS) < 2, reason="TransformerLens 4 has one backend")
def test_both_backends_find_the_same(finished, tmp_path):
    _, bridge = finished
    hooked = run(tmp_path / "run", backend="hooked")
    assert hooked.facts["n_all_weights"] == bridge.facts["n_all_weights"]
    assert hooked.masks["mask"] == bridge.masks["mask"]
    for name in ("accuracy", "perplexity"):
        pd.testing.assert_frame_equal(getattr(hooked.effect, name), getattr(bridge.effect, name), rtol=1e-3)
