"""Signs of life: how a process that hangs is told from one that works.

Three ideas. A process writes two counters into a small file of its own: one from a thread, twice a second, as long as
it runs at all, and one from the training loop at every step, with how long that step may take. Whoever started the
processes looks at what changes, and times it by its own clock: no clock of another process or node matters, and a look
that itself comes late (a machine that slept) counts for nothing. And where one hangs, all stand still, since the others
wait for it: so the thread also writes where the loop is, and whether that is in an exchange with others. A process that
is late is named, and killed by the one who asked; what follows is what follows any lost process.
"""

from __future__ import annotations

import math
import os
import struct
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

_PLACE_BYTES = 80
_SIGNS = struct.Struct(f"<QQd?{_PLACE_BYTES}s")
"""Beats of the thread, beats of the loop, the seconds that the loop has for what it does now, whether it waits for
others, and the function that it is in."""
_BEAT_S = 0.5
_AUTO_S = 30.0
_STEPS = 10.0
"""A step may take so many times the longest of the last ones."""
_SETTLED = 3
"""Steps after which their time is believed; the ones before may compile."""
_STARTUP_S = 60.0
"""How long a process may take to its first sign of life."""
_SILENT_S = 4 * _BEAT_S
"""A thread that has been silent for so long while the loop stands still doesn't run."""
_BETWEEN = ("torch._ops", "torch.utils._contextlib")
"""Modules that only call on behalf of others."""
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
        self._waits, self._place = False, ""
        threading.Thread(target=self._live, name="pulse", daemon=True).start()

    def beat(self, patience_s: float) -> None:
        """The loop goes on, and its next sign may take so long."""
        self._loop, self._patience_s = self._loop + 1, patience_s
        self._write()

    def _live(self) -> None:
        while True:
            self._alive += 1
            self._waits, self._place = whereabouts(threading.main_thread())
            self._write()
            time.sleep(_BEAT_S)

    def _write(self) -> None:
        place = self._place.encode()[:_PLACE_BYTES]
        os.pwrite(self._file, _SIGNS.pack(self._alive, self._loop, self._patience_s, self._waits, place), 0)


def whereabouts(thread: threading.Thread) -> tuple[bool, str]:
    """Whether a thread waits in an exchange with other processes, and the function that it is in."""
    frame = sys._current_frames().get(thread.ident or 0)
    while frame is not None and frame.f_globals.get("__name__", "") in _BETWEEN:
        frame = frame.f_back
    if frame is None:
        return False, ""
    module, function = str(frame.f_globals.get("__name__", "")), frame.f_code.co_name
    waits = module.startswith("torch.distributed") or (module.startswith("modelworks.train.") and function == "wait")
    return waits, f"{module}.{function}"


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

        Where the loops of several stand still, which they do together since they wait for each other, it is one that
        doesn't run at all, or else one that doesn't wait, and of several the one that has stood still longest. Where
        all wait, what they wait for may be on another machine, whose own looker has as much time once more.
        """
        now = time.monotonic()
        late: dict[int, str] = {}
        standing: dict[int, tuple[bool, bool, float, str]] = {}
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
            alive, loop, patience_s, waits, place = signs
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
                where = f", in {place}" if place else ""
                words = f"has been in one step for {still_s:.0f} s{where}"
                stopped = silent_s > _SILENT_S
                if stopped:
                    words = f"has been in one step for {still_s:.0f} s, without a sign of life for {silent_s:.0f} s"
                if stopped or not waits or still_s > 2 * patience_s:
                    standing[number] = (stopped, not waits, still_s, words)
        if standing and not late:
            number = max(standing, key=lambda key: standing[key][:3])
            late[number] = standing[number][3]
        return late

    def _read(self, number: int) -> tuple[int, int, float, bool, str] | None:
        try:
            content = pulse_file(self._folder, number).read_bytes()
        except OSError:
            return None
        if len(content) != _SIGNS.size:
            return None
        alive, loop, patience_s, waits, place = _SIGNS.unpack(content)
        return alive, loop, patience_s, waits, place.rstrip(b"\0").decode(errors="replace")
