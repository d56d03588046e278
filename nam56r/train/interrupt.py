"""Ctrl-C and SIGTERM: the first asks for a stop after the step, the second ends the process."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Self

# torchrun hands a Ctrl-C on to processes that got it from the terminal already
SAME_PRESS_S = 0.5


class Interrupt:
    """While entered, notes in `asked` that a stop was asked for; calls `notify` then, and `leave` before the end."""

    def __init__(self, notify: Callable[[], None], leave: Callable[[], None]):
        self.asked = False
        self._notify, self._leave, self._at = notify, leave, 0.0

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._caught) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _caught(self, number: int, frame: FrameType | None) -> None:
        if not self.asked:
            self.asked, self._at = True, time.monotonic()
            self._notify()
        elif time.monotonic() - self._at > SAME_PRESS_S:
            self._leave()
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
