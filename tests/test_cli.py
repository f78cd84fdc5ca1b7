"""`tomsparse` as it is typed: what it prints, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers.utils import logging
from typer.testing import CliRunner, Result

from tests import tiny
from tl_tomsparse import __version__
from tl_tomsparse._points import PointMeter
from tl_tomsparse.cli import app
from tl_tomsparse.pipeline import RunSettings

SMALL = (
    "--stories 2 --dev-stories 2 --test-stories 2 --windows 2 --length 16 --kappas 0,1e-2 --random-masks 1 "
    "--device cpu --quiet"
)


def tomsparse(monkeypatch, *arguments: str) -> Result:
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/tomsparse", *arguments])
    return CliRunner().invoke(app, list(arguments))


def run(monkeypatch, out: Path, *arguments: str) -> Result:
    return tomsparse(
        monkeypatch,
        "run",
        "--out",
        str(out),
        "--model",
        str(tiny.long_directory()),
        *SMALL.split(),
        *arguments,
    )


def test_version_and_help(monkeypatch):
    assert tomsparse(monkeypatch, "--version").stdout.strip() == __version__
    shown = tomsparse(monkeypatch, "run", "--help")
    assert shown.exit_code == 0
    for option in ("--model", "--kappas", "--matrices", "--seed", "--device", "--dtype", "--out", "--no-bos"):
        assert option in shown.stdout


def test_defaults_are_those_of_the_settings(monkeypatch, tmp_path):
    seen: list[RunSettings] = []

    def stop(settings: RunSettings, *_: Any, **__: Any) -> None:
        seen.append(settings)
        raise KeyboardInterrupt

    monkeypatch.setattr("tl_tomsparse.cli.run_pipeline", stop)
    assert tomsparse(monkeypatch, "run", "--out", str(tmp_path / "run")).exit_code == 130
    assert seen == [RunSettings()]


def test_a_run_prints_every_claim_and_where_the_page_is(monkeypatch, tmp_path):
    ended = run(monkeypatch, tmp_path / "run")
    assert ended.exit_code == 0, ended.output
    found = json.loads((tmp_path / "run" / "results.json").read_text())
    for claim in (*found["verdict"], *found["position_verdict"]):
        assert claim["status"] in ended.stdout
        assert claim["sentence"] in ended.stdout
    assert ended.stdout.strip().endswith(str(tmp_path / "run" / "report.html"))
    assert found["command"].startswith(f"tomsparse run --out {tmp_path}")
    assert found["settings"]["kappas"] == [0.0, 0.01]
    assert "%|" not in ended.stderr
    assert not logging.is_progress_bar_enabled()


def test_ctrl_c_says_how_to_continue_and_the_same_command_does(monkeypatch, tmp_path):
    original = PointMeter._record

    def interrupt(self: PointMeter, *arguments: Any) -> Any:
        record = original(self, *arguments)
        if len(self._records) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return record

    with monkeypatch.context() as patch:
        patch.setattr(PointMeter, "_record", interrupt)
        stopped = run(monkeypatch, tmp_path / "run")
    assert stopped.exit_code == 130
    assert f"The same command continues in {tmp_path / 'run'}" in stopped.stderr
    assert "Traceback" not in stopped.output
    assert len((tmp_path / "run" / "points.jsonl").read_text().splitlines()) == 2
    assert run(monkeypatch, tmp_path / "run").exit_code == 0
    assert run(monkeypatch, tmp_path / "whole").exit_code == 0
    found = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("run", "whole")]
    assert found[0].pop("command") != found[1].pop("command")
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kappas", "a,b"], "kappas='a,b' is not a list of numbers"),
        (["--kappas", ""], "kappas='' is not a list of numbers"),
        (["--kappas", "0.1,1.5"], "kappa=1.5 is outside [0, 1]"),
        (["--stories", "0"], "stories=0 must be at least 1"),
        (["--matrices", "Q,Z"], "matrices='Z' is not one of 'Q', 'K'"),
        (["--matrices", ","], "name at least one, for example Q,K"),
        (["--text", "nowhere.txt"], "nowhere.txt cannot be read"),
        (["--model", "/nowhere"], "There is no model directory '/nowhere'"),
        (["--device", "nowhere"], "device='nowhere' cannot be used here"),
    ],
)
def test_bad_input_ends_in_one_message_and_leaves_nothing(monkeypatch, tmp_path, arguments, message):
    ended = run(monkeypatch, tmp_path / "run", *arguments)
    assert ended.exit_code == 2
    last = ended.stderr.strip().splitlines()[-1]
    assert last.startswith("tomsparse: ")
    assert message in last
    assert "Traceback" not in ended.output
    assert ended.stdout == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments", [["--dtype", "int8"], ["--backend", "x"], ["--stories", "few"], ["--what"]]
)
def test_what_cannot_be_read_is_a_usage_error(monkeypatch, tmp_path, arguments):
    ended = run(monkeypatch, tmp_path / "run", *arguments)
    assert ended.exit_code == 2
    assert arguments[0] in ended.stderr
    assert not list(tmp_path.iterdir())
