"""A study that is killed, and goes on as if it had not been; see also the interruptions in `test_study`."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import tiny
import torch

import tl_tomsparse as tt
from tl_tomsparse import _material
from tl_tomsparse._artifacts import is_leftover, write_bytes
from tl_tomsparse._folder import check_folder, claim_folder, opened_folder

SETTINGS = tt.StudySettings(
    stories=16, dev_stories=1, test_stories=2, windows=10, length=32, random_masks=1, tune_steps=2,
    kappa=0.02, n_draws=50, head_stories=0,
)  # fmt: skip
SCRIPT = """
import json, sys
import torch
import tl_tomsparse as tt
torch.set_num_threads(1)
model = tt.load_model(sys.argv[1], device="cpu")
settings = tt.StudySettings(**json.loads(sys.argv[3]))
tt.study(model, sys.argv[2], settings, progress=lambda words: print(words, flush=True), show_progress=False)
"""


def start(out: Path) -> subprocess.Popen[bytes]:
    usual = vars(tt.StudySettings())
    settings = {name: value for name, value in vars(SETTINGS).items() if value != usual[name]}
    root = str(Path(tt.__file__).parents[1])
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tiny.long_directory()), str(out), json.dumps(settings)],
        stdout=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )


def written(out: Path) -> int:
    """How much is finished: files, and lines of points."""
    points = out / "points.jsonl"
    lines = points.read_bytes().count(b"\n") if points.exists() else 0
    return lines + (len(list(out.iterdir())) if out.exists() else 0)


def test_a_study_that_was_killed_ends_as_one_that_was_not(tmp_path: Path) -> None:
    model = tt.load_model(tiny.long_directory(), device="cpu")
    whole = tt.study(model, tmp_path / "whole", SETTINGS, show_progress=False)
    end = written(tmp_path / "whole")
    rng = random.Random(0)
    killed = tmp_path / "killed"
    for share in (0.05, 0.45):  # among the sensitivities, and among the points
        until = round(end * (share + 0.3 * rng.random()))
        process = start(killed)
        while written(killed) < until and process.poll() is None:
            time.sleep(0.002)
        time.sleep(0.02 * rng.random())
        assert process.poll() is None, "it ended before it could be killed"
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert not (killed / "study.json").exists()
    found = tt.study(model, killed, SETTINGS, show_progress=False)
    for table in ("arms", "accuracy", "comparisons", "overlaps", "losses"):
        pd.testing.assert_frame_equal(getattr(found, table), getattr(whole, table), check_exact=True)
    assert (killed / "study.json").read_bytes() == (tmp_path / "whole" / "study.json").read_bytes()
    names = [{path.name for path in (tmp_path / folder).iterdir()} for folder in ("whole", "killed")]
    assert names[0] == names[1]  # nothing half-finished is left


def test_a_run_killed_in_its_first_write_can_be_started_again(tmp_path: Path) -> None:
    out = tmp_path / "run"
    half = "import os, sys; from pathlib import Path; from tl_tomsparse import _artifacts\n"
    half += "with _artifacts._whole(Path(sys.argv[1]) / 'run.json') as path:\n"
    half += "    path.write_bytes(b'{\"form'); os.kill(os.getpid(), 9)"
    out.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(Path(tt.__file__).parents[1])}
    assert subprocess.run([sys.executable, "-c", half, str(out)], env=environment).returncode == -9
    (left,) = out.iterdir()
    assert is_leftover(left)
    check_folder(out, {})
    facts = {"settings": {}, "identity": {"fingerprint": ""}, "samples": ""}
    with opened_folder(out):
        claim_folder(out, facts | {"command": "", "versions": {}, "device": ""})
    assert [path.name for path in out.iterdir()] == ["run.json"]
    (tmp_path / "other").mkdir()
    write_bytes(tmp_path / "other" / "notes.txt", b"mine")
    with pytest.raises(tt.TomsparseError, match="holds other files"):
        check_folder(tmp_path / "other", {})


def test_half_a_sensitivity_goes_when_the_whole_one_is_there(tmp_path: Path) -> None:
    """A kill between writing the one and removing the other leaves both."""
    model = tiny.model("llama")
    samples = tt.story_samples(model, [tiny.story()])
    path, half = tmp_path / "s.safetensors", tmp_path / "s.partial.safetensors"
    first = _material.stored_sensitivity(model, samples, ("Q",), path, show_progress=False)
    half.write_bytes(b"half")
    again = _material.stored_sensitivity(model, samples, ("Q",), path, show_progress=False)
    assert not half.exists()
    assert all(torch.equal(first[key], again[key]) for key in first)
