"""The engine to read, and for traces: one replica, told as it happens, in SimPy.

The same scenario and the same failures as in `montecarlo`, but as processes that act: a job that works, saves and is
interrupted; failures that come at their times; a repair shop with so many technicians; maintenance. Nothing here is a
formula over spans of time, which makes it slow, easy to follow, and a check of the formulas there.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import simpy

from modelworks.simulate.failures import FailureStream
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
)
from modelworks.simulate.scenario import Scenario

Steps = Generator[simpy.Event, Any, None]


@dataclass(frozen=True)
class Failure:
    """One failure of the stream, or a lemon's relapse."""

    cause: int
    detect_s: float
    repair_s: float
    relapse_s: float
    outage_s: float
    restart: float
    lot: float
    foreseen: bool
    again: bool = False


@dataclass(frozen=True)
class Pause:
    """A planned interruption: maintenance, or another number of nodes."""

    seconds: float
    name: str
    nodes: int | None = None


@dataclass(frozen=True)
class Happening:
    """A line of a trace."""

    time_s: float
    what: str
    """failure, drain, pause, running, node back, checkpoint restored, finished."""
    cause: str = ""
    scope: str = ""
    nodes: tuple[int, ...] = ()
    lost_work_s: float = 0.0
    down_s: float = 0.0
    transient: bool = True
    size: int = 0


@dataclass
class History:
    """What one replica went through."""

    outcome: Outcome
    happenings: list[Happening] = field(default_factory=list)


def replay(scenario: Scenario, stream: FailureStream, replica: int = 0) -> History:
    """Let one replica of a stream meet its failures."""
    return _Replica(scenario, stream.only(replica)).run()


class _Replica:
    """The job and the shop."""

    def __init__(self, scenario: Scenario, stream: FailureStream) -> None:
        self.s, self.stream, self.table = scenario, stream, scenario.cause_table
        self.env = simpy.Environment()
        self.technicians = simpy.Resource(self.env, scenario.technicians)
        self.returned = self.env.event()
        """Happens, and is renewed, whenever nodes come back."""
        self.started = self.env.event()
        """Happens, and is renewed, whenever the job is up."""
        self.running = False
        self.out = 0
        """Nodes out of service."""
        self.size = int(scenario.capacity.nodes[0])
        self.work = self.held = self.durable = 0.0
        """Work done; what the best checkpoint holds; what storage holds."""
        self.life = 0
        """How often the job was started: a write that outlives its job is void."""
        self.regrowth = 0
        self.books = np.zeros(len(REASONS))
        causes = len(scenario.causes)
        self.blame = np.zeros(causes)
        self.interruptions, self.drains = np.zeros(causes, np.int64), np.zeros(causes, np.int64)
        self.planned, self.finished = 0, False
        self.histogram = np.zeros(scenario.nodes + scenario.hot + scenario.pool + 1, np.int64)
        self.happenings: list[Happening] = []
        self.job = self.env.process(self._job())

    def run(self) -> History:
        """Run until the tokens are done or the time is over."""
        self.env.process(self._failures())
        if np.isfinite(self.s.maintenance_every_s):
            self.env.process(self._maintenance())
        if len(self.s.capacity.nodes) > 1:
            self.env.process(self._growth())
        over = self.env.timeout(self.s.horizon_s)
        self.env.run(until=simpy.AnyOf(self.env, [over, self.job]))
        if not self.finished:
            # An interrupt books what was under way when the time ran out.
            self.job.interrupt(None)
            self.env.run(until=self.job)
        outcome = Outcome(
            elapsed_s=np.array([self.env.now]),
            there_s=self.s.capacity.node_seconds(np.array([self.env.now])) / self.s.nodes,
            useful_s=np.array([self.work]),
            finished=np.array([self.finished]),
            interruptions=self.interruptions[None],
            drains=self.drains[None],
            planned=np.array([self.planned]),
            reasons_s=self.books[None],
            causes_s=self.blame[None],
            nodes_out=self.histogram,
        )
        return History(outcome, self.happenings)

    # --- the job ------------------------------------------------------------------------------------------------------

    def _job(self) -> Steps:
        """Work until something interrupts; recover; until the work is done or the time is over."""
        event = yield from self._attempt(self._working)
        while event is not None:
            if isinstance(event, Failure):
                event = yield from self._recover(event)
            elif isinstance(event, Pause):
                event = yield from self._paused(event)
            else:
                event = yield from self._attempt(self._working)
        self.running = False

    def _attempt(self, activity: Callable[[], Steps]) -> Generator[simpy.Event, Any, Any]:
        """Do something until it ends (returns "go on", or None once all work is done) or is interrupted."""
        try:
            yield from activity()
        except simpy.Interrupt as interrupt:
            return interrupt.cause
        return None if self.finished else "go on"

    def _working(self) -> Steps:
        """Work and save in turns; ends when the work is done."""
        plan, speed = self.s.checkpoints, self.size / self.s.nodes * (1.0 - self.s.check_share)
        self.running, self.life = True, self.life + 1
        self.held = self.durable if not plan.fast else self.held
        self.started, started = self.env.event(), self.started
        started.succeed()
        self._tell("running", size=self.size)
        made = 0
        while True:
            missing = (self.s.target_s - self.work) / speed
            last = missing <= plan.every_s
            yield from self._spend(missing if last else plan.every_s, speed)
            if last:
                self.work, self.finished = self.s.target_s, True
                self._tell("finished")
                return
            made += 1
            yield from self._stall(plan.stall_s)
            if plan.fast:
                self.held = self.work
            if made % plan.ratio == 0:
                yield from self._stall(plan.durable_stall_s)
                self.env.process(self._write(self.work, self.life))

    def _spend(self, seconds: float, speed: float) -> Steps:
        """Work for so long, or until an interrupt, and book it."""
        begin = self.env.now
        try:
            yield self.env.timeout(seconds)
        finally:
            worked = self.env.now - begin
            self.work += worked * speed
            self.books[CHECKS] += worked * self.s.check_share
            self.books[FEWER] += worked * (1.0 - self.s.check_share - speed)

    def _stall(self, seconds: float) -> Steps:
        """Stand still for a checkpoint."""
        begin = self.env.now
        try:
            yield self.env.timeout(seconds)
        finally:
            self.books[CHECKPOINTS] += self.env.now - begin

    def _write(self, work: float, life: int) -> Steps:
        """Write a checkpoint to storage behind the job."""
        yield self.env.timeout(self.s.checkpoints.lag_s)
        if self.running and self.life == life:
            self.durable = work
            if not self.s.checkpoints.fast:
                self.held = work

    # --- interruptions ------------------------------------------------------------------------------------------------

    def _recover(self, failure: Failure) -> Generator[simpy.Event, Any, Any]:
        """Lose what wasn't saved, wait to notice it, find nodes, restart."""
        s, plan, cause = self.s, self.s.checkpoints, failure.cause
        was_running, self.running = self.running, False
        facts = s.causes[cause].facts
        silent, slow = facts.kind == "silent", facts.kind == "straggler"
        gentle = slow or (failure.foreseen and not failure.again and not silent)
        (self.drains if gentle else self.interruptions)[cause] += 1
        resizes = s.elastic and bool(self.table["elastic"][cause]) and not silent
        survives = bool(self.table["survives"][cause]) and plan.fast
        speed = self.size / s.nodes * (1.0 - s.check_share)

        slowed = min(failure.detect_s * facts.slowdown * speed, self.work) if slow else 0.0
        self.work -= slowed
        self._charge(STRAGGLERS, slowed, cause)
        kept = self.held if survives else self.durable
        if not was_running:
            kept = self.work
        if silent:
            kept = min(kept, max(self.work - failure.detect_s * speed, 0.0))
        if resizes:
            kept = max(self.work - s.work.step_time_s * speed, 0.0)
        kept = self.work if gentle else min(kept, self.work)
        lost, self.work = self.work - kept, kept
        self._charge(LOST_WORK, lost, cause)
        self.held = kept
        self.durable = kept if gentle else min(self.durable, kept)

        unseen = 0.0 if silent or gentle else failure.detect_s
        took = failure.repair_s > 0 and s.causes[cause].nodes > 0
        nodes = self._sent_to_repair(failure, unseen) if took else ()
        begin = self.env.now

        def stages() -> Steps:
            yield from self._down(DETECTION, unseen, cause)
            yield from self._find_nodes(cause, took, failure, resizes)
            read = plan.fast_read_s if survives else plan.read_s
            saving = plan.stall_s + plan.durable_stall_s if gentle else 0.0
            yield from self._down(
                RESTART, s.resize_s if resizes else (s.restart_s + read) * failure.restart + saving, cause
            )

        place = len(self.happenings)
        event = yield from self._attempt(stages)
        self.happenings.insert(
            place,
            Happening(
                time_s=begin,
                what="drain" if gentle else "failure",
                cause=s.causes[cause].name,
                scope=facts.scope,
                nodes=nodes,
                lost_work_s=lost,
                down_s=self.env.now - begin,
                transient=not took,
                size=self.size,
            ),
        )
        return event

    def _find_nodes(self, cause: int, took: bool, failure: Failure, resizes: bool) -> Steps:
        """Wait for as many nodes as the job needs; or, elastic, go on with what there is."""
        s = self.s
        needed = self._needed()
        pause = (s.replace_s if self.out > s.hot else s.swap_s) if took else 0.0
        wanted = needed
        if s.elastic:
            wanted = max(self._fillable(needed), min(s.least_nodes, needed))
            pause = 0.0 if wanted < needed else pause
        while needed + s.hot + s.pool - self.out < wanted:
            begin = self.env.now
            try:
                yield self.returned
            finally:
                self._book_down(WAITING, self.env.now - begin, cause)
            pause = s.swap_s
        self.size = wanted
        if s.elastic and wanted < needed:
            self.regrowth += 1
            self.env.process(self._regrow(self.regrowth))
        yield from self._down(WAITING, pause + failure.outage_s + (0.0 if resizes else s.drain_s), cause)

    def _paused(self, pause: Pause) -> Generator[simpy.Event, Any, Any]:
        """Save, stop, go on with nothing lost."""
        plan = self.s.checkpoints
        self.running = False
        self.planned += 1
        self.held = self.durable = self.work
        if pause.nodes is not None:
            self.size = pause.nodes
        self._tell("pause", cause=pause.name, size=self.size)
        seconds = pause.seconds + plan.stall_s + plan.durable_stall_s
        return (yield from self._attempt(lambda: self._down(MAINTENANCE, seconds, None)))

    def _down(self, reason: int, seconds: float, cause: int | None) -> Steps:
        """Be down for so long, or until an interrupt, and book it."""
        begin = self.env.now
        try:
            yield self.env.timeout(seconds)
        finally:
            self._book_down(reason, self.env.now - begin, cause)

    def _book_down(self, reason: int, seconds: float, cause: int | None) -> None:
        self.books[reason] += seconds
        if cause is not None:
            self.blame[cause] += seconds

    def _charge(self, reason: int, work: float, cause: int) -> None:
        self.books[reason] += work
        self.blame[cause] += work

    # --- what happens around the job ----------------------------------------------------------------------------------

    def _failures(self) -> Steps:
        stream = self.stream
        for row in np.flatnonzero(np.isfinite(stream.time_s[:, 0])):
            yield self.env.timeout(max(0.0, float(stream.time_s[row, 0]) - self.env.now))
            failure = Failure(
                cause=int(stream.cause[row, 0]),
                detect_s=float(stream.detect_s[row, 0]),
                repair_s=float(stream.repair_s[row, 0]),
                relapse_s=float(stream.relapse_s[row, 0]),
                outage_s=float(stream.outage_s[row, 0]),
                restart=float(stream.restart[row, 0]),
                lot=float(stream.lot[row, 0]),
                foreseen=bool(stream.foreseen[row, 0]),
            )
            used = not self.s.elastic or failure.lot * self._needed() < self.size
            if used and self.job.is_alive:
                self.job.interrupt(failure)

    def _sent_to_repair(self, failure: Failure, unseen: float) -> tuple[int, ...]:
        number = self.s.causes[failure.cause].nodes
        first = min(int(failure.lot * self.size), self.size - number)
        self.out += number
        self.env.process(self._repair(failure, number, unseen))
        return tuple(range(first, first + number))

    def _repair(self, failure: Failure, number: int, unseen: float) -> Steps:
        """Wait for a technician, be repaired, be tested, come back; a lemon then fails again."""
        yield self.env.timeout(unseen)
        self.histogram[self.out] += 1
        with self.technicians.request() as technician:
            yield technician
            yield self.env.timeout(failure.repair_s)
        if number == 1:
            yield self.env.timeout(self.s.burn_in_s)
        self.out -= number
        self.returned, returned = self.env.event(), self.returned
        returned.succeed()
        if np.isfinite(failure.relapse_s) and not failure.again:
            yield self.env.timeout(failure.relapse_s)
            if self.job.is_alive:
                repair_s = float(self.table["repair_s"][failure.cause])
                relapsed = {**vars(failure), "again": True, "repair_s": repair_s, "relapse_s": float("inf")}
                self.job.interrupt(Failure(**relapsed))

    def _maintenance(self) -> Steps:
        s = self.s
        while True:
            yield self.env.timeout(s.maintenance_every_s)
            yield from self._until_running()
            if self.job.is_alive:
                self.job.interrupt(Pause(s.maintenance_s + s.restart_s + s.checkpoints.read_s, "maintenance"))

    def _growth(self) -> Steps:
        """Take in batches of nodes as they arrive or get power, and let go of those that lose it."""
        for time_s in self.s.capacity.times_s[1:]:
            yield self.env.timeout(float(time_s) - self.env.now)
            yield from self._until_running()
            self._change_size("build-out")

    def _regrow(self, number: int) -> Steps:
        """Take nodes that have come back into a shrunk job, as soon as they fill a replica of the model."""
        while number == self.regrowth:
            if self._fillable(self._needed()) > self.size:
                yield from self._until_running()
                if number == self.regrowth:
                    self._change_size("more nodes")
                    yield self.env.timeout(0)
                    if self.size == self._needed():
                        return
            else:
                yield self.returned

    def _change_size(self, why: str) -> None:
        s, needed = self.s, self._needed()
        size = self._fillable(needed) if s.elastic else needed
        if size != self.size and self.job.is_alive:
            seconds = s.resize_s if s.elastic else s.restart_s + s.checkpoints.read_s
            self.job.interrupt(Pause(seconds, why, size))

    def _until_running(self) -> Steps:
        while not self.running:
            yield self.started

    def _needed(self) -> int:
        return int(self.s.capacity.at(np.array([self.env.now]))[0])

    def _fillable(self, needed: int) -> int:
        """Nodes that an elastic job can use: whole replicas of the model, or all."""
        available = needed + self.s.hot + self.s.pool - self.out
        if available >= needed:
            return needed
        return max(available // self.s.group_nodes * self.s.group_nodes, 0)

    def _tell(self, what: str, **more: Any) -> None:
        self.happenings.append(Happening(time_s=float(self.env.now), what=what, **more))
