"""The scripts in `benchmarks/` run, on small numbers, and print what they say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SMALL = ["--layers", "2", "--heads", "2", "--d-model", "16", "--out", "1", "--stories", "1"]
CASES = {
    "position.py --n 2 --longest 12 --repeat 1": [
        "frequency_norms",
        "all three in one pass",
        "run_with_cache",
    ],
    " ".join(["heads.py speed --measurements 4 --rounds 1", *SMALL]): ["reload", "batched, shared prefix"],
    "heads.py recovery --repeats 1 --numbers 50": ["balanced, 2 % out", "correlation"],
}


@pytest.mark.parametrize("command", CASES)
def test_it_runs(command: str) -> None:
    script, *options = command.split()
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / script), *options], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    for words in CASES[command]:
        assert words in done.stdout
