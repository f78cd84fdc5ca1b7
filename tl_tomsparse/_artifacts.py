"""Files that are written whole or not at all, and read only when they are what they should be.

Every file is first written beside its destination under a temporary name, flushed to the disk, and then
renamed over the destination, which is atomic on one file system. A failure on the way (a full disk, an
interrupt) removes the temporary file and leaves an older file of that name as it was. Tensors go to
safetensors, never to pickle, with one JSON header under the metadata key `tomsparse`:
`{"kind": ..., "format": ..., ...}`.

Not claimed: protection against two processes that write the same file at once (the last rename wins, whole),
or against bytes that change on the disk later.
"""

from __future__ import annotations

import json
import math
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tl_tomsparse._checks import TomsparseError

FORMAT = 1
"""The newest layout of our safetensors files that this version writes and reads."""

_HEADER_KEY = "tomsparse"


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write `data` to `path`, whole or not at all.

    Raises:
        TomsparseError: the folder does not exist, or the disk is full or not writable.
    """
    with _whole(Path(path)) as temporary:
        temporary.write_bytes(data)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8, newlines as they are, whole or not at all; raises as [`write_bytes`][] does."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON; raises as [`write_bytes`][] does.

    Numbers of numpy and torch become plain ones, paths become text, NaN and infinities become null, because
    JSON has no word for them and other readers refuse the file.
    """
    write_text(path, json.dumps(_plain(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        TomsparseError: there is no such file, or it is not JSON.
    """
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise _cannot_read(path, error) from error
    except ValueError as error:
        raise TomsparseError(
            f"{path} is not a JSON file ({error}); was it edited or cut off? Make it again."
        ) from error


def write_safetensors(path: str | Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write named tensors and a JSON header, whole or not at all; equal content gives equal bytes.

    Args:
        path: destination; an existing file is replaced.
        tensors: any shapes and dtypes; written from the CPU, contiguous.
        header: JSON values; needs `kind`, for example `"tomsparse.mask"`. `format` is added.

    Raises:
        TomsparseError: the folder does not exist, or the disk is full or not writable.
    """
    text = json.dumps(_plain({"format": FORMAT, **header}), sort_keys=True, allow_nan=False)
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with _whole(Path(path)) as temporary:
        try:
            save_file(stored, temporary, metadata={_HEADER_KEY: text})
        except SafetensorError as error:  # how this library reports a full disk
            raise OSError(str(error)) from error


def read_safetensors(path: str | Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file that [`write_safetensors`][] wrote: its tensors (on the CPU) and its header.

    Raises:
        TomsparseError: no such file; not safetensors, or cut off; not ours; another kind; a newer format.
    """
    path = Path(path)
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            header = _header(path, metadata.get(_HEADER_KEY), kind)
            return {name: file.get_tensor(name) for name in sorted(file.keys())}, header
    except OSError as error:
        raise _cannot_read(path, error) from error
    except SafetensorError as error:
        raise TomsparseError(
            f"{path} is not a whole safetensors file ({error}); was it cut off, or is it something else? "
            "Make it again."
        ) from error


def _header(path: Path, text: str | None, kind: str) -> dict[str, Any]:
    """The header, once it is known to be ours, of this kind, and readable by this version."""
    if text is None:
        raise TomsparseError(
            f"{path} is a safetensors file, but not one that tl_tomsparse wrote; a {kind} is needed."
        )
    try:
        header: dict[str, Any] = dict(json.loads(text))
        found, version = str(header["kind"]), int(header["format"])
    except (ValueError, TypeError, KeyError) as error:
        raise TomsparseError(
            f"{path} has a damaged tl_tomsparse header ({error}); make the file again."
        ) from error
    if found != kind:
        raise TomsparseError(
            f"{path} is a {found}, and a {kind} is needed; load it with the class that saved it."
        )
    if version > FORMAT:
        raise TomsparseError(
            f"{path} has format {version}, and this version of tl_tomsparse reads up to {FORMAT}; "
            "update tl_tomsparse."
        )
    return header


def is_leftover(path: Path) -> bool:
    """Whether this is a temporary file, which only a killed process leaves behind."""
    return re.fullmatch(r"\..+\.[0-9a-f]{8}\.tmp", path.name) is not None


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, renamed to it when the block ends well and removed when it does not."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        try:
            temporary.touch(exist_ok=False)
            mode = temporary.stat().st_mode
            yield temporary
            temporary.chmod(mode)  # safetensors puts a file in its place that only the owner may read
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
        except OSError as error:
            cure = "create the folder first" if not path.parent.is_dir() else "free or choose another place"
            reason = error.strerror or str(error)
            raise TomsparseError(
                f"Cannot write {path}: {reason}; {cure}. Nothing was left behind."
            ) from error
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    _flush_folder(path.parent)


def _flush_folder(folder: Path) -> None:
    """Make the rename itself lasting, where the system can (Windows cannot open a folder)."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _cannot_read(path: Path, error: OSError) -> TomsparseError:
    return TomsparseError(f"Cannot read {path}: {error.strerror or error}; check the path.")


def _plain(value: Any) -> Any:
    """`value` with everything that JSON has no word for turned into what is nearest."""
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in (sorted(value) if isinstance(value, set | frozenset) else value)]
    if isinstance(value, bool | int | str) or value is None:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Tensor) or hasattr(value, "tolist"):  # torch, numpy, pandas
        return _plain(value.tolist())
    if isinstance(value, os.PathLike | torch.dtype | torch.device):
        return str(value)
    raise TypeError(f"{type(value).__name__} cannot be written as JSON.")
