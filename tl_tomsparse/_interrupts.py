"""Ctrl-C held back while a context manager writes on entering and undoes on leaving.

Python raises KeyboardInterrupt between any two instructions of the main thread. Two places are fatal for a
block that must be undone: the middle of `__enter__`, where something is written and no `with` is there yet to
undo it, and the first instruction of `__exit__`, before any line of it has run. No `try` inside the context
manager covers the second. So, for the time of the block, a handler stands before the one that is there: it
keeps an interrupt that hits the two methods for later, and passes every other one on.

Not claimed: the same for other signals, or where SIGINT has no Python handler (then nothing is raised
either).
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any


class HeldInterrupts:
    """Keeps interrupts that hit the methods of one object, from `hold` until `release`.

    Args:
        owner: whose methods are meant, called with it as `self`.
        methods: of them the code objects.
    """

    def __init__(self, owner: object, *methods: CodeType) -> None:
        self._owner = owner
        self._methods = methods
        self._previous: Callable[[int, FrameType | None], Any] | int | None = None
        self._kept: tuple[int, FrameType | None] | None = None

    def hold(self) -> None:
        """Stand before the present handler; call it first in `__enter__`."""
        if _in_main_thread() and callable(previous := signal.getsignal(signal.SIGINT)):
            self._previous = previous
            signal.signal(signal.SIGINT, self._handle)

    def deliver(self) -> None:
        """Pass on an interrupt that was kept; this raises, as a rule KeyboardInterrupt."""
        if self._kept is not None and callable(self._previous):
            kept, self._kept = self._kept, None
            self._previous(*kept)

    def release(self) -> None:
        """Put the old handler back, unless another one was set meanwhile; pass on what was kept."""
        if _in_main_thread() and signal.getsignal(signal.SIGINT) == self._handle:
            signal.signal(signal.SIGINT, self._previous)
        self.deliver()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        place = frame
        while place is not None:
            if place.f_code in self._methods and place.f_locals.get("self") is self._owner:
                self._kept = (number, frame)
                return
            place = place.f_back
        if callable(self._previous):
            self._previous(number, frame)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
