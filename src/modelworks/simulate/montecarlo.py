"""The engine for answers: all replicas at once, one event of each per pass, in NumPy.

Between two events of a replica nothing random happens, so its progress is a formula (`Checkpoints.progress`). A pass
takes each replica from its last event to its next one, whichever comes first: a failure of its stream, a lemon's
relapse, maintenance, a change of size, the end. The work of a pass doesn't depend on how long the time between is, so
the cost grows with the number of failures and not with the days.

Down time is booked as it passes and not in advance: a failure that strikes a restart ends it, and what was left of it
never happened.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from modelworks.simulate.failures import FailureStream, draw
from modelworks.simulate.outcome import (
    CHECKPOINTS,
    CHECKS,
    DETECTION,
    FEWER,
    LOST_WORK,
    MAINTENANCE,
    REASONS,
    RESTART,
    STRAGGLERS,
    WAITING,
    Outcome,
    together,
)
from modelworks.simulate.scenario import Scenario

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
FAILURES_AT_ONCE = 6_000_000
"""Failures that are held in memory at the same time; 40 bytes each."""
MOST_REPLICAS_AT_ONCE = 4096
FAILURE, RELAPSE, PLANNED, RESIZE, END = range(5)
_SLOTS = 16
"""Places for nodes under repair to begin with; as many are added whenever they are needed."""


def simulate(scenario: Scenario, samples: int, seed: int, progress: Callable[[float], None] | None = None) -> Outcome:
    """Simulate `samples` replicas of a scenario; the same seed gives the same outcome.

    Parameters
    ----------
    progress
        Told the share that is done.
    """
    failures = max(1.0, sum(cause.per_s for cause in scenario.causes) * scenario.horizon_s)
    at_once = int(np.clip(FAILURES_AT_ONCE / failures, 1, min(samples, MOST_REPLICAS_AT_ONCE)))
    sizes = [min(at_once, samples - done) for done in range(0, samples, at_once)]
    seeds = np.random.SeedSequence(seed).spawn(len(sizes))
    outcomes = []
    for number, (size, own) in enumerate(zip(sizes, seeds, strict=True)):

        def within(share: float, number: int = number) -> None:
            if progress is not None:
                progress((number + share) / len(sizes))

        outcomes.append(follow(scenario, draw(scenario, size, own), within))
    return together(outcomes)


def first_stream(scenario: Scenario, samples: int, seed: int, replica: int = 0) -> FailureStream:
    """The failures that one of the first replicas of `simulate` meets."""
    failures = max(1.0, sum(cause.per_s for cause in scenario.causes) * scenario.horizon_s)
    at_once = int(np.clip(FAILURES_AT_ONCE / failures, 1, min(samples, MOST_REPLICAS_AT_ONCE)))
    batches = -(-samples // at_once)
    own = np.random.SeedSequence(seed).spawn(batches)[0]
    return draw(scenario, min(at_once, samples), own).only(min(replica, min(at_once, samples) - 1))


def follow(scenario: Scenario, stream: FailureStream, progress: Callable[[float], None] | None = None) -> Outcome:
    """Take the replicas of a stream through the scenario."""
    state = _Replicas(scenario, stream)
    passes = 0
    while state.live.any():
        state.advance()
        passes += 1
        if progress is not None and passes % 64 == 0:
            progress(float(np.minimum(state.now / scenario.horizon_s, 1.0).mean()))
    return state.outcome()


class _Replicas:
    """Where all replicas stand. Arrays over replicas; those of nodes under repair over (replicas, slots)."""

    def __init__(self, scenario: Scenario, stream: FailureStream) -> None:
        self.s, self.stream, self.table = scenario, stream, scenario.cause_table
        r = self.r = stream.replicas
        self.every = np.arange(r)
        self.growing = len(scenario.capacity.nodes) > 1
        self.flat = {name: getattr(stream, name).ravel() for name in stream.__dataclass_fields__}
        self.rows = stream.time_s.shape[0]
        self.pointer = np.zeros(r, np.int64)
        self.now = np.zeros(r)
        self.up = np.zeros(r)
        """When the job runs, or ran, since."""
        self.work = np.zeros(r)
        """Work at the last start."""
        self.durable = np.zeros(r)
        """Work that storage holds."""
        self.size = np.full(r, scenario.capacity.nodes[0], np.int64)
        self.live = np.ones(r, bool)
        self.finished = np.zeros(r, bool)
        self.planned_at = np.full(r, scenario.maintenance_every_s)
        self.grow_at = np.full(r, scenario.capacity.times_s[1] if len(scenario.capacity.times_s) > 1 else np.inf)
        self.resize_at = np.full(r, np.inf)
        self.relapse_at = np.full(r, np.inf)
        # The down time that is going on, by reason, and whose fault it is (-1: nobody's).
        self.down = {reason: np.zeros(r) for reason in (DETECTION, WAITING, RESTART)}
        self.culprit = np.full(r, -1)
        self.technician = np.zeros((r, scenario.technicians))
        """When each technician is free."""
        self.back = np.zeros((r, _SLOTS))
        """When the nodes of a slot are in service again."""
        self.gone = np.zeros((r, _SLOTS), np.int64)
        """How many nodes a slot holds."""
        self.relapse = np.full((r, _SLOTS), np.inf)
        self.first_failure = np.zeros((r, _SLOTS), np.int64)
        """The failure in the stream by which a slot's nodes went."""
        causes = len(scenario.causes)
        self.interruptions = np.zeros((r, causes), np.int64)
        self.drains = np.zeros((r, causes), np.int64)
        self.planned = np.zeros(r, np.int64)
        self.reasons = np.zeros((len(REASONS), r))
        self.causes = np.zeros((r, causes))
        self.histogram = np.zeros(scenario.nodes + scenario.hot + scenario.pool + 1, np.int64)

    # --- one pass -----------------------------------------------------------------------------------------------------

    def advance(self) -> None:
        """Take every live replica to its next event."""
        s = self.s
        place = np.minimum(self.pointer, self.rows - 1) * self.r + self.every
        failure_at = np.where(self.pointer < self.rows, self.flat["time_s"][place], np.inf)
        planned_at = np.maximum(self.planned_at, self.up)
        resize_at = np.maximum(np.minimum(self.grow_at, self.resize_at), self.up)
        times = np.stack([failure_at, self.relapse_at, planned_at, resize_at, np.full(self.r, s.horizon_s)])
        kind = times.argmin(axis=0)
        at = np.maximum(times[kind, self.every], self.now)
        self._book_down(at)
        done = self._run_until(at)
        self.idle = np.zeros(self.r, bool)
        if s.causes:
            self._fail(kind, at, done, place)
        self._plan(kind, at, done)
        self._resize(kind, at, done)
        self._book_run(done)
        end = self.live & (kind == END)
        if end.any():
            self.live &= ~end
            self.work[end] = done["work"][end]
            self.now[end] = s.horizon_s
        self.now = np.where(self.live, np.where(self.idle, np.minimum(at, self.up), at), self.now)

    def _book_down(self, at: Floats) -> None:
        """Book the down time between the last event and now, in the order in which its reasons follow each other."""
        left = np.where(self.live, np.maximum(np.minimum(at, self.up) - self.now, 0.0), 0.0)
        if not left.any():
            return
        blamed = self.culprit >= 0
        self.causes[self.every[blamed], self.culprit[blamed]] += left[blamed]
        for reason, pending in self.down.items():
            passed = np.minimum(pending, left)
            pending -= passed
            left -= passed
            self.reasons[reason] += np.where(blamed, passed, 0.0)
            self.reasons[MAINTENANCE] += np.where(blamed, 0.0, passed)

    def _run_until(self, at: Floats) -> dict[str, Floats]:
        """Let the jobs run until `at`: what they have done by then; those that finish before that are over."""
        s = self.s
        running = np.where(self.live, np.maximum(at - np.maximum(self.up, self.now), 0.0), 0.0)
        speed = self.size / s.nodes * (1.0 - s.check_share)
        worked, held, durable = s.checkpoints.progress(running)
        if np.isfinite(s.target_s):
            missing = (s.target_s - self.work) / np.maximum(speed, 1e-300)
            finishing = self.live & (worked >= missing)
            if finishing.any():
                needed = s.checkpoints.running_s(missing[finishing])
                running[finishing], worked[finishing] = needed, missing[finishing]
                self.now[finishing] = np.maximum(self.up, self.now)[finishing] + needed
                self.work[finishing] = s.target_s
                self.live &= ~finishing
                self.finished |= finishing
        return {
            "running": running,
            "worked": worked,
            "work": self.work + worked * speed,
            "held": self.work + held * speed,
            "durable": np.where(durable > 0, self.work + durable * speed, self.durable),
            "speed": speed,
        }

    def _book_run(self, done: dict[str, Floats]) -> None:
        """Book the running time of all jobs that were stopped; the others go on as if nothing had been."""
        s = self.s
        running, worked = np.where(self.idle, 0.0, done["running"]), np.where(self.idle, 0.0, done["worked"])
        self.reasons[CHECKPOINTS] += running - worked
        self.reasons[CHECKS] += worked * s.check_share
        self.reasons[FEWER] += worked * (1.0 - s.check_share - done["speed"])

    # --- failures -----------------------------------------------------------------------------------------------------

    def _fail(self, kind: npt.NDArray[np.int64], at: Floats, done: dict[str, Floats], place: Any) -> None:
        s, table, flat = self.s, self.table, self.flat
        fresh = self.live & (kind == FAILURE)
        again = self.live & (kind == RELAPSE)
        self.pointer += fresh
        struck = fresh | again
        if not struck.any():
            return
        if again.any():
            rows = self.every[again]
            slot = self.relapse[rows].argmin(axis=1)
            place[rows] = self.first_failure[rows, slot]
            self.relapse[rows, slot] = np.inf
            self.relapse_at[rows] = self.relapse[rows].min(axis=1)
        cause = flat["cause"][place].astype(np.int64)
        if s.elastic:
            # A failure of a node that a shrunk job doesn't use is nobody's concern.
            unused = fresh & (flat["lot"][place] * s.capacity.at(at) >= self.size)
            self.idle |= unused
            struck &= ~unused
            if not struck.any():
                return
        took = np.where(fresh, flat["repair_s"][place] > 0, again) & (table["nodes"][cause] > 0)
        silent, slow = table["silent"][cause], table["straggler"][cause]
        foreseen = flat["foreseen"][place] & ~again & ~silent
        gentle = foreseen | slow
        rows = self.every[struck]
        self.interruptions[rows, cause[rows]] += ~gentle[rows]
        self.drains[rows, cause[rows]] += gentle[rows]

        detect = flat["detect_s"][place].astype(float)
        slowed = np.where(slow, np.minimum(detect * table["slowdown"][cause] * done["speed"], done["work"]), 0.0)
        now = done["work"] - slowed
        held = np.where(table["survives"][cause], done["held"], done["durable"])
        if not s.checkpoints.fast:
            held = done["durable"]
        kept = np.where(silent, np.minimum(held, np.maximum(now - detect * done["speed"], 0.0)), held)
        resizes = table["elastic"][cause] & ~silent if s.elastic else np.zeros(self.r, bool)
        if s.elastic:
            kept = np.where(resizes, np.maximum(now - s.work.step_time_s * done["speed"], 0.0), kept)
        kept = np.where(gentle, now, np.minimum(kept, now))
        durable = np.where(gentle, now, np.minimum(done["durable"], kept))
        unseen = np.where(silent | gentle, 0.0, detect)

        size, wait = self._replace(struck, at + unseen, took, cause, place, again)
        wait += s.drain_s * ~resizes + flat["outage_s"][place]
        read = np.where(table["survives"][cause] & s.checkpoints.fast, s.checkpoints.fast_read_s, s.checkpoints.read_s)
        saving = np.where(gentle, s.checkpoints.durable_stall_s + s.checkpoints.stall_s, 0.0)
        restart = (s.restart_s + read) * flat["restart"][place] + saving
        restart = np.where(resizes, s.resize_s, restart)

        share = np.maximum(done["speed"], 1e-300)
        self._book_work(struck, cause, LOST_WORK, (now - kept) / share, done)
        self._book_work(struck, cause, STRAGGLERS, slowed / share, done)
        self._stop(struck, at, kept, durable, unseen, wait, restart)
        self.culprit = np.where(struck, cause, self.culprit)
        self.size = np.where(struck, size, self.size)

    def _book_work(self, struck: Bools, cause: Any, reason: int, seconds: Floats, done: dict[str, Floats]) -> None:
        """Book work that has to be done again: what it took, shrunk or checked as the job was then."""
        useful = np.where(struck, seconds * done["speed"], 0.0)
        self.reasons[reason] += useful
        rows = self.every[struck]
        self.causes[rows, cause[rows]] += useful[rows]

    def _stop(
        self, stopped: Bools, at: Floats, work: Floats, durable: Floats, detect: Floats, wait: Floats, restart: Floats
    ) -> None:
        self.work = np.where(stopped, work, self.work)
        self.durable = np.where(stopped, durable, self.durable)
        for reason, seconds in ((DETECTION, detect), (WAITING, wait), (RESTART, restart)):
            self.down[reason] = np.where(stopped, seconds, self.down[reason])
        self.up = np.where(stopped, at + detect + wait + restart, self.up)

    # --- nodes under repair -------------------------------------------------------------------------------------------

    def _replace(
        self, struck: Bools, at: Floats, took: Bools, cause: Any, place: Any, again: Bools
    ) -> tuple[npt.NDArray[np.int64], Floats]:
        """Send failed nodes to repair and fill their places: the job's new size, and how long that takes."""
        s = self.s
        lost = struck & took
        away = self.back > at[:, None]
        out = np.einsum("rk,rk->r", away, self.gone)
        rows = np.flatnonzero(lost)
        if rows.size:
            out[rows] += self._send_to_repair(rows, away, at, cause, place, again)
            np.add.at(self.histogram, out[rows], 1)
        wait = np.where(took, np.where(out > s.hot, s.replace_s, s.swap_s), 0.0)
        needed = s.capacity.at(at) if self.growing else self.size
        available = needed + (s.hot + s.pool) - out
        wanted = needed
        if s.elastic:
            needed = s.capacity.at(at)
            available = needed + s.hot + s.pool - out
            wanted = np.maximum(self._fillable(available, needed), np.minimum(s.least_nodes, needed))
            wait = np.where(wanted < needed, 0.0, wait)
            self._regrow(struck, at, wanted, needed, available)
        for row in np.flatnonzero(struck & (available < wanted)):
            wait[row] = self._until_back(row, at[row], int(wanted[row] - available[row])) - at[row] + s.swap_s
        return wanted, wait

    def _send_to_repair(
        self, rows: Any, away: npt.NDArray[np.bool_], at: Floats, cause: Any, place: Any, again: Bools
    ) -> npt.NDArray[np.int64]:
        """Book a technician and a slot for the nodes that each of `rows` lost; how many those are."""
        s, causes, begin, place = self.s, cause[rows], at[rows], place[rows]
        repair = np.where(again[rows], self.table["repair_s"][causes], self.flat["repair_s"][place])
        free = self.technician.argmin(axis=1)[rows]
        done = np.maximum(self.technician[rows, free], begin) + repair
        self.technician[rows, free] = done
        nodes = self.table["nodes"][causes]
        back = done + np.where(nodes == 1, s.burn_in_s, 0.0)
        relapse = np.where(again[rows], np.inf, back + self.flat["relapse_s"][place])
        taken = away | (self.relapse < np.inf)
        slot = taken.argmin(axis=1)[rows]
        full = taken[rows, slot]
        if full.any():
            slot[full] = self.back.shape[1]
            self._add_slots()
        self.back[rows, slot], self.gone[rows, slot] = back, nodes
        self.relapse[rows, slot], self.first_failure[rows, slot] = relapse, place
        self.relapse_at[rows] = np.minimum(self.relapse_at[rows], relapse)
        return np.asarray(nodes)

    def _fillable(self, available: Any, needed: Any) -> Any:
        """Nodes that an elastic job can use: whole replicas of the model, or all."""
        groups = np.maximum(available // self.s.group_nodes * self.s.group_nodes, 0)
        return np.where(available >= needed, needed, np.minimum(groups, needed))

    def _regrow(self, rows: Bools, at: Floats, size: Any, needed: Any, available: Any) -> None:
        """Set the time at which a shrunk job can take in one more replica of the model."""
        self.resize_at = np.where(rows, np.inf, self.resize_at)
        for row in np.flatnonzero(rows & (size < needed)):
            grown = min(int(needed[row]), int(size[row] // self.s.group_nodes + 1) * self.s.group_nodes)
            self.resize_at[row] = self._until_back(row, at[row], grown - int(available[row]))

    def _until_back(self, row: Any, at: float, missing: int) -> float:
        """When so many more nodes of a replica are in service."""
        if missing <= 0:
            return at
        back, gone = self.back[row], self.gone[row]
        order = np.argsort(back, kind="stable")
        order = order[back[order] > at]
        returned = np.cumsum(gone[order])
        first = int(np.searchsorted(returned, missing))
        return float(back[order[first]]) if first < len(order) else float("inf")

    def _add_slots(self) -> None:
        more = ((0, 0), (0, _SLOTS))
        self.back, self.gone = np.pad(self.back, more), np.pad(self.gone, more)
        self.relapse = np.pad(self.relapse, more, constant_values=np.inf)
        self.first_failure = np.pad(self.first_failure, more)

    # --- what is planned ----------------------------------------------------------------------------------------------

    def _plan(self, kind: npt.NDArray[np.int64], at: Floats, done: dict[str, Floats]) -> None:
        s = self.s
        due = self.live & (kind == PLANNED)
        if not due.any():
            return
        self._pause(due, at, done, s.maintenance_s + s.restart_s + s.checkpoints.read_s)
        self.planned_at = np.where(due, at + s.maintenance_every_s, self.planned_at)

    def _resize(self, kind: npt.NDArray[np.int64], at: Floats, done: dict[str, Floats]) -> None:
        """Take in nodes that have arrived or come back, or leave those that have no power any more."""
        s = self.s
        due = self.live & (kind == RESIZE)
        if not due.any():
            return
        times = np.append(s.capacity.times_s, np.inf)
        needed = s.capacity.at(at)
        self.grow_at = np.where(due, times[np.searchsorted(times, at, side="right")], self.grow_at)
        size = needed
        if s.elastic:
            available = needed + s.hot + s.pool - np.einsum("rk,rk->r", self.back > at[:, None], self.gone)
            size = self._fillable(available, needed)
            self._regrow(due, at, size, needed, available)
        changed = due & (size != self.size)
        self._pause(changed, at, done, s.resize_s if s.elastic else s.restart_s + s.checkpoints.read_s)
        self.size = np.where(due, size, self.size)
        self.idle |= due & ~changed

    def _pause(self, paused: Bools, at: Floats, done: dict[str, Floats], seconds: float) -> None:
        """Save the state, stop for so long, and go on; nothing is lost."""
        if not paused.any():
            return
        s, nothing = self.s, np.zeros(self.r)
        saving = s.checkpoints.durable_stall_s + s.checkpoints.stall_s
        self._stop(paused, at, done["work"], done["work"], nothing, nothing, np.full(self.r, seconds + saving))
        self.culprit = np.where(paused, -1, self.culprit)
        self.planned += paused

    def outcome(self) -> Outcome:
        """The books, closed."""
        return Outcome(
            elapsed_s=self.now,
            there_s=self.s.capacity.node_seconds(self.now) / self.s.nodes,
            useful_s=self.work,
            finished=self.finished,
            interruptions=self.interruptions,
            drains=self.drains,
            planned=self.planned,
            reasons_s=self.reasons.T,
            causes_s=self.causes,
            nodes_out=self.histogram,
        )
