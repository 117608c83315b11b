"""Signs of life: how a process that hangs is told from one that works.

Three ideas. A process writes two counters into a small file of its own: one from a thread, twice a second, as long as
it runs at all, and one from the training loop at every step, with how long that step may take. Whoever started the
processes looks at what changes, and times it by its own clock: no clock of another process or node matters, and a look
that itself comes late (a machine that slept) counts for nothing. A process that is late is named, and killed by the one
who asked; what follows is what follows any lost process.
"""

from __future__ import annotations

import math
import os
import struct
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

_SIGNS = struct.Struct("<QQd")
"""Beats of the thread, beats of the loop, and the seconds that the loop has for what it does now."""
_BEAT_S = 0.5
_AUTO_S = 30.0
_STEPS = 10.0
"""A step may take so many times the longest of the last ones."""
_SETTLED = 3
"""Steps after which their time is believed; the ones before may compile."""
_STARTUP_S = 60.0
"""How long a process may take to its first sign of life."""
_GAP_S = 5.0
"""Between two looks that are further apart, the looker itself stood still."""


def limit_s(hang: float | Literal["auto"]) -> float:
    """``guard.hang`` in seconds; infinite where nothing counts as hung."""
    return _AUTO_S if hang == "auto" else hang or math.inf


def patience_s(hang: float | Literal["auto"], step_times: list[float]) -> float:
    """How long the next step may take, after steps that took so long; infinite as long as there are few of them."""
    if len(step_times) < _SETTLED:
        return math.inf
    return max(limit_s(hang), _STEPS * max(step_times))


def pulse_file(folder: Path, number: int | str) -> Path:
    """The file of a process, by its number among those of its machine."""
    return folder / f"pulse-{number}"


class Pulse:
    """This process's signs of life, in a file."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        self._alive, self._loop, self._patience_s = 0, 0, math.inf
        threading.Thread(target=self._live, name="pulse", daemon=True).start()

    def beat(self, patience_s: float) -> None:
        """The loop goes on, and its next sign may take so long."""
        self._loop, self._patience_s = self._loop + 1, patience_s
        self._write()

    def _live(self) -> None:
        while True:
            self._alive += 1
            self._write()
            time.sleep(_BEAT_S)

    def _write(self) -> None:
        os.pwrite(self._file, _SIGNS.pack(self._alive, self._loop, self._patience_s), 0)


@dataclass
class _Seen:
    """What was last seen of a process, and when it last changed."""

    alive: int
    loop: int
    alive_at: float
    loop_at: float


class Watchdog:
    """Looks for signs of life of the processes that one has started.

    Parameters
    ----------
    folder
        Where their files are, on this machine.
    count
        How many processes there are.
    limit_s
        How long one may give no sign of life at all.
    """

    def __init__(self, folder: Path, count: int, limit_s: float) -> None:
        self._folder, self._count, self._limit_s = folder, count, limit_s
        self._seen: dict[int, _Seen] = {}
        self._looked_at = self._begun_at = time.monotonic()

    def started(self) -> None:
        """The processes were started, or started again."""
        for number in range(self._count):
            pulse_file(self._folder, number).unlink(missing_ok=True)
        self._seen.clear()
        self._looked_at = self._begun_at = time.monotonic()

    def hung(self) -> Mapping[int, str]:
        """The processes that are late, each with what is to be said of it.

        Where the loops of several stand still, which they do together since they wait for each other, it is the one
        that has stood still longest.
        """
        now = time.monotonic()
        late: dict[int, str] = {}
        standing: dict[int, tuple[float, str]] = {}
        if math.isinf(self._limit_s):
            return late
        slept, self._looked_at = now - self._looked_at > _GAP_S, now
        if slept:
            self._begun_at = now
        for number in range(self._count):
            signs = self._read(number)
            if signs is None:
                if now - self._begun_at > max(_STARTUP_S, self._limit_s):
                    late[number] = f"has given no sign of life since it was started {now - self._begun_at:.0f} s ago"
                continue
            alive, loop, patience_s = signs
            seen = self._seen.get(number)
            if seen is None or slept:
                self._seen[number] = _Seen(alive, loop, now, now)
                continue
            if alive != seen.alive:
                seen.alive, seen.alive_at = alive, now
            if loop != seen.loop:
                seen.loop, seen.loop_at = loop, now
            if (silent_s := now - seen.alive_at) > self._limit_s:
                late[number] = f"has given no sign of life for {silent_s:.0f} s"
            elif (still_s := now - seen.loop_at) > patience_s:
                standing[number] = (still_s, f"has been in one step for {still_s:.0f} s")
        if standing and not late:
            number = max(standing, key=lambda key: standing[key][0])
            late[number] = standing[number][1]
        return late

    def _read(self, number: int) -> tuple[int, int, float] | None:
        try:
            content = pulse_file(self._folder, number).read_bytes()
        except OSError:
            return None
        return _SIGNS.unpack(content) if len(content) == _SIGNS.size else None
