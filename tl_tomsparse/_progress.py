"""What long work says of itself."""

from __future__ import annotations

import sys
from collections.abc import Callable

from tqdm.auto import tqdm


def teller(progress: Callable[[str], None] | None, show_progress: bool) -> Callable[[str], None]:
    """Where to say what begins: as the caller asked, else beside the bars, where these are shown."""
    if progress is not None:
        return progress
    if not show_progress:
        return lambda _message: None
    return lambda message: tqdm.write(message, file=sys.stderr)
