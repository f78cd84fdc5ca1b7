"""The folder of one run: claimed by its settings, weights and samples, and continued by nothing else.

    run.json        who the folder belongs to; written first
    points.jsonl    finished measurements, a line each, appended as they are made

A line that a crash or a full disk cut off is dropped and measured again. A folder that was made for a run
which then finished nothing is removed again.

Not claimed: protection against two processes that run in one folder at once.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tl_tomsparse._artifacts import is_leftover, read_json, write_bytes, write_json
from tl_tomsparse._checks import TomsparseError
from tl_tomsparse._points import PointRecord

FORMAT = 1
_START = ("command", "versions", "device")  # may differ when a run is continued
_PACKAGES = ("tl-tomsparse", "transformer-lens", "transformers", "torch", "numpy")
_POINT = {"key", "chosen", "margin", "nll"}


def check_folder(out: Path, settings: Mapping[str, Any], *, unknown: Collection[str] = ()) -> None:
    """Refuse a folder that cannot be written, or that holds something else, before any model is loaded.

    Args:
        out: the folder.
        settings: of what shall be in it.
        unknown: settings that are not known yet, and may be any.

    Raises:
        TomsparseError: a file, a folder with other files or another run, or a place that is not writable.
    """
    with _as_refusal(out):
        if out.exists() and not out.is_dir():
            raise TomsparseError(f"{out} is a file; pass a folder for --out.")
        place = next(parent for parent in (out, *out.absolute().parents) if parent.exists())
        if not place.is_dir():
            raise TomsparseError(f"{out} lies below {place}, which is a file; pass another folder for --out.")
        if not os.access(place, os.W_OK | os.X_OK):
            raise PermissionError(f"{place} is not writable")
        if out.is_dir() and any(not is_leftover(path) for path in out.iterdir()):
            found, asked = dict(_run_file(out)["settings"]), dict(settings)
            for name in unknown:
                found.pop(name, None)
                asked.pop(name, None)
            _check_same(out, "settings", found, asked)


def claim_folder(out: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Make the folder this run's own, or see that it is already.

    Args:
        out: an existing folder.
        facts: "settings", "identity" and "samples", which a continued run must share, and "command",
            "versions" and "device", which are noted anew at each start.

    Returns:
        The facts with "format", and under "earlier_starts" what differed when the run was started before.

    Raises:
        TomsparseError: a run of other settings, weights or samples.
    """
    for path in out.iterdir():  # of a run that was killed while it wrote
        if is_leftover(path):
            path.unlink()
    claimed: dict[str, Any] = {"format": FORMAT, **facts, "earlier_starts": []}
    if (out / "run.json").exists():
        earlier = _run_file(out)
        _check_same(out, "settings", earlier["settings"], claimed["settings"])
        for name, value in (
            ("weights", earlier["identity"]["fingerprint"] == claimed["identity"]["fingerprint"]),
            ("stories or texts", earlier["samples"] == claimed["samples"]),
        ):
            if not value:
                raise TomsparseError(
                    f"The folder {out} holds a run with other {name}, which have changed since. "
                    "Pass a new folder."
                )
        start = {name: earlier[name] for name in _START}
        same = start == {name: claimed[name] for name in _START}
        claimed["earlier_starts"] = earlier["earlier_starts"] + ([] if same else [start])
    write_json(out / "run.json", claimed)
    return claimed


def versions() -> dict[str, str]:
    """Of what numbers depend on, for `run.json`."""
    return {name: version(name) for name in _PACKAGES} | {"python": platform.python_version()}


@contextmanager
def opened_folder(out: Path) -> Iterator[None]:
    """The folder, made if need be; what was made here and is still empty at the end is removed again.

    Raises:
        TomsparseError: it cannot be made or written.
    """
    made = [place for place in (out, *out.parents) if not place.exists()]
    try:
        with _as_refusal(out):
            out.mkdir(parents=True, exist_ok=True)
            yield
    finally:
        with suppress(OSError):  # the first one that is not empty
            for place in made:
                place.rmdir()


def read_points(path: Path) -> list[PointRecord]:
    """Finished measurements of a file that another process may be appending to."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return [record for line in lines if (record := _point(line)) is not None]


@contextmanager
def stored_points(path: Path) -> Iterator[tuple[list[PointRecord], Callable[[PointRecord], None]]]:
    """Finished measurements, and a function that appends one."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    finished = [record for line in lines if (record := _point(line)) is not None]
    if len(finished) < len(lines):
        write_bytes(path, "".join(json.dumps(record) + "\n" for record in finished).encode())
    with path.open("ab", buffering=0) as file:

        def store(record: PointRecord) -> None:
            whole = file.tell()
            line = (json.dumps(record) + "\n").encode()
            try:
                written = file.write(line)
                if written < len(line):  # a disk that is nearly full takes a part of it
                    file.write(line[written:])
            except OSError:
                file.truncate(whole)
                raise

        yield finished, store


def _point(line: bytes) -> PointRecord | None:
    try:
        record = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return record if isinstance(record, dict) and record.keys() >= _POINT else None


def _run_file(out: Path) -> dict[str, Any]:
    if not (out / "run.json").exists():
        raise TomsparseError(f"The folder {out} holds other files and no run; pass a new or empty folder.")
    found = read_json(out / "run.json")
    needed = {"settings", "identity", "samples", "earlier_starts", *_START}
    if not isinstance(found, dict) or found.get("format") != FORMAT or not found.keys() >= needed:
        raise TomsparseError(
            f"The folder {out} holds a run of another version of tl_tomsparse; pass a new folder."
        )
    return found


def _check_same(out: Path, what: str, found: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    differs = ", ".join(
        f"{name} {found.get(name)!r} (now {asked.get(name)!r})"
        for name in sorted({*asked, *found})
        if found.get(name) != asked.get(name)
    )
    if differs:
        raise TomsparseError(
            f"The folder {out} holds another run, with other {what}: {differs}. Pass a new folder, or the "
            f"earlier {what}."
        )


@contextmanager
def _as_refusal(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise TomsparseError(
            f"Cannot write to {out}: {error.strerror or error}. Free some space or pass another folder "
            "for --out; what is finished is kept, and the same command continues."
        ) from error
