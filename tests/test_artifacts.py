"""Files are written whole or not at all, and refused when they are not what they should be."""

import json
import math
import os
import stat
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tl_tomsparse import _artifacts as artifacts
from tl_tomsparse._checks import TomsparseError

TENSORS = {"0.Q": torch.arange(5), "1.K": torch.randn(3, 4).T, "empty": torch.zeros(0, dtype=torch.int64)}
HEADER = {"kind": "tomsparse.mask", "names": ["é", "b"], "n": 3}


def test_safetensors_roundtrip_and_equal_bytes(tmp_path: Path) -> None:
    artifacts.write_safetensors(tmp_path / "a.safetensors", TENSORS, HEADER)
    artifacts.write_safetensors(tmp_path / "b.safetensors", dict(reversed(TENSORS.items())), HEADER)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    tensors, header = artifacts.read_safetensors(tmp_path / "a.safetensors", "tomsparse.mask")
    assert header == {**HEADER, "format": artifacts.FORMAT}
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


def test_json_is_valid_whatever_is_in_it(tmp_path: Path) -> None:
    value = {
        1: np.float32(0.5),
        "nan": math.nan,
        "t": torch.tensor([1, 2]),
        "p": tmp_path,
        "s": {2, 1},
        "inf": [math.inf],
    }
    artifacts.write_json(tmp_path / "a.json", value)
    text = (tmp_path / "a.json").read_text()
    assert "NaN" not in text
    assert artifacts.read_json(tmp_path / "a.json") == json.loads(text)
    expected = {"1": 0.5, "nan": None, "t": [1, 2], "p": str(tmp_path), "s": [1, 2], "inf": [None]}
    assert json.loads(text) == expected
    with pytest.raises(TypeError, match="object cannot be written"):
        artifacts.write_json(tmp_path / "b.json", object())
    assert not (tmp_path / "b.json").exists()


def test_files_get_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    usual = stat.S_IMODE((tmp_path / "plain").stat().st_mode)
    artifacts.write_text(tmp_path / "text", "one\r\ntwo\n")
    artifacts.write_safetensors(tmp_path / "tensors", TENSORS, HEADER)
    assert (tmp_path / "text").read_bytes() == b"one\r\ntwo\n"
    assert stat.S_IMODE((tmp_path / "text").stat().st_mode) == usual
    assert stat.S_IMODE((tmp_path / "tensors").stat().st_mode) == usual


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failure_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException, step: str
) -> None:
    path = tmp_path / "mask.safetensors"
    path.write_bytes(b"old")

    def fail(*_: object) -> None:
        raise failure

    monkeypatch.setattr(*((os, "fsync", fail) if step == "fsync" else (Path, "replace", fail)))
    expected = TomsparseError if isinstance(failure, OSError) else KeyboardInterrupt
    for write in (
        lambda: artifacts.write_safetensors(path, TENSORS, HEADER),
        lambda: artifacts.write_json(path, [1]),
        lambda: artifacts.write_bytes(path, b"new"),
    ):
        with pytest.raises(expected, match=r"No space left|^$"):
            write()
        assert [file.name for file in tmp_path.iterdir()] == ["mask.safetensors"]
        assert path.read_bytes() == b"old"


@pytest.mark.skipif(sys.platform == "win32", reason="no file size limit to stand in for a full disk")
def test_a_full_disk_is_one_clear_message_and_leaves_nothing(tmp_path: Path) -> None:
    import resource

    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, old[1]))  # beyond it, writing fails as on a full disk
    try:
        with pytest.raises(TomsparseError, match=r"Cannot write .*x\.safetensors: .*too large"):
            artifacts.write_safetensors(tmp_path / "x.safetensors", {"a": torch.zeros(100_000)}, HEADER)
        with pytest.raises(TomsparseError, match=r"Cannot write .*x\.bin: File too large"):
            artifacts.write_bytes(tmp_path / "x.bin", b"x" * 100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder_is_named_with_the_cure(tmp_path: Path) -> None:
    with pytest.raises(TomsparseError, match="create the folder first"):
        artifacts.write_text(tmp_path / "no" / "file.txt", "x")
    with pytest.raises(TomsparseError, match="create the folder first"):
        artifacts.write_safetensors(tmp_path / "no" / "file.safetensors", TENSORS, HEADER)


def test_refusals_on_reading(tmp_path: Path) -> None:
    path = tmp_path / "f.safetensors"
    read = artifacts.read_safetensors
    with pytest.raises(TomsparseError, match=r"Cannot read .*No such file"):
        read(path, "tomsparse.mask")
    with pytest.raises(TomsparseError, match="Cannot read"):
        read(tmp_path, "tomsparse.mask")
    artifacts.write_safetensors(path, TENSORS, HEADER)
    with pytest.raises(TomsparseError, match=r"is a tomsparse\.mask, and a tomsparse\.sensitivity is needed"):
        read(path, "tomsparse.sensitivity")
    whole = path.read_bytes()
    for size in (0, 4, 40, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(TomsparseError, match="not a whole safetensors file"):
            read(path, "tomsparse.mask")
    artifacts.write_safetensors(path, TENSORS, {**HEADER, "format": 99})
    with pytest.raises(TomsparseError, match="update tl_tomsparse"):
        read(path, "tomsparse.mask")
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(TomsparseError, match="not one that tl_tomsparse wrote"):
        read(path, "tomsparse.mask")
    save_file({"a": torch.zeros(1)}, path, metadata={"tomsparse": "[1"})
    with pytest.raises(TomsparseError, match="damaged"):
        read(path, "tomsparse.mask")
    (tmp_path / "j.json").write_text('{"a": ')
    with pytest.raises(TomsparseError, match="not a JSON file"):
        artifacts.read_json(tmp_path / "j.json")
    with pytest.raises(TomsparseError, match="Cannot read"):
        artifacts.read_json(tmp_path / "none.json")
