"""Further wordings, for training only: the more constructions are seen, the less a new one matters.

They are in `wordings.txt`: under "# kind" one template a line, written as those of `tl_tomsparse.stories`.
"""

from __future__ import annotations

from pathlib import Path


def read(file: Path) -> dict[str, tuple[str, ...]]:
    """Templates by kind."""
    found: dict[str, list[str]] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.startswith("# "):
            templates = found.setdefault(line.removeprefix("# "), [])
        elif line:
            templates.append(line)
    return {kind: tuple(templates) for kind, templates in found.items()}


EXTRA = read(Path(__file__).with_name("wordings.txt"))
