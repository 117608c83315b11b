"""Ctrl-C and SIGTERM as a request to save and stop.

Before the first step there is nothing to save and a signal ends the work at once. While steps are made the first
signal is noted, and the loop stops after the step that it is in; a second Ctrl-C ends the work at once.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class Interrupted(BaseException):
    """A signal asked for the end at once. Like `KeyboardInterrupt` it is no error and passes by `except Exception`."""

    def __init__(self, received: int) -> None:
        super().__init__(f"stopped by {signal.Signals(received).name}")
        self.received = received


def exit_code(received: int) -> int:
    """What a process ends with that was asked to: 130 after Ctrl-C, as shells have it, and 0 after SIGTERM, which a
    scheduler or service sends to a run that it means to go on with."""
    return 130 if received == signal.SIGINT else 0


class Interrupt:
    """While entered, notes SIGINT and SIGTERM instead of dying of them.

    In a thread other than the main one, where Python allows no handlers, it notes nothing.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        """The signal that asked for the end."""
        self.graceful = False
        """Whether the first signal is only noted."""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        again = self.received is not None
        self.received = number
        if not self.graceful or (again and number == signal.SIGINT):
            raise Interrupted(number)


class ParentInterrupt(Interrupt):
    """An `Interrupt` of a process that isn't to outlive its parent: once that is gone, SIGTERM counts as received."""

    def __init__(self) -> None:
        self._parent = os.getppid()
        super().__init__()

    @property
    def received(self) -> int | None:
        """The signal that asked for the end."""
        return self._received or (signal.SIGTERM if self._orphaned() else None)

    @received.setter
    def received(self, number: int | None) -> None:
        self._received = number

    def _orphaned(self) -> bool:
        parent = multiprocessing.parent_process()
        if parent is not None:  # A fork server stands between, and outlives it.
            return not parent.is_alive()
        return os.getppid() != self._parent
