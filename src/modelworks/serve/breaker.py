"""Keeps requests away from an engine that fails, and lets one through now and then to see whether it still does."""

from __future__ import annotations

import time
from collections.abc import Callable

FAILURES = 3
"""In a row, after which the circuit opens."""
OPEN_S = 2.0
"""How long it is open for the first time; twice as long after each trial that fails."""
LONGEST_OPEN_S = 60.0


class Breaker:
    """A circuit breaker: closed, open for a time, then half open for one trial (Nygard, Release It!, 2007, ch. 5).

    Parameters
    ----------
    clock
        Gives the time in seconds; only differences count.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._failures = 0
        self._open_until = 0.0
        self._open_s = OPEN_S

    @property
    def closed(self) -> bool:
        """Whether a request may go through now; a trial counts as one."""
        return self._failures < FAILURES or self._clock() >= self._open_until

    @property
    def seconds(self) -> float:
        """Until the next request may go through."""
        return 0.0 if self.closed else self._open_until - self._clock()

    def begin(self) -> None:
        """A request goes through. If it is a trial, others are kept away until its beginning is known."""
        if self._failures >= FAILURES:
            self._open_until = self._clock() + self._open_s

    def begun(self) -> None:
        """An answer has begun: a trial has closed the circuit, and one more failure opens it again."""
        self._failures = min(self._failures, FAILURES - 1)

    def succeeded(self) -> None:
        """A request was answered to its end."""
        self._failures, self._open_s, self._open_until = 0, OPEN_S, 0.0

    def failed(self) -> None:
        """A request was not answered, or its answer broke off."""
        self._failures += 1
        if self._failures >= FAILURES:
            if self._open_until:  # it has been open since it last answered to the end
                self._open_s = min(2 * self._open_s, LONGEST_OPEN_S)
            self._open_until = self._clock() + self._open_s
