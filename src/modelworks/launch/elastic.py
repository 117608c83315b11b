"""A node's processes of one run, under torchrun's agent: started together, and again when one is lost.

The agents of several nodes meet (`launch.meeting`); what one of them starts again, all do. The agent runs in a thread
of the process that asked for it, and has the processes forked from a server (`launch.forked`), so that another attempt
begins at once; they notice when the process that asked is gone. What ends a process decides what follows. A code that
says "no attempt will do better" ends the run; anything else (killed, out of memory, hung, lost its peers) starts all
processes again, which take up the last checkpoint, as long as attempts get further than the ones before them. Once one
has failed the others have nothing to wait for: they are given a moment for their last words and are then killed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import psutil

from modelworks.launch import forked
from modelworks.launch.losses import LostError

if TYPE_CHECKING:
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent

    from modelworks.launch.meeting import Meeting

logger = logging.getLogger(__name__)
ATTEMPTS_WITHOUT_PROGRESS = 3
_ATTEMPTS = 1_000_000
"""What the agent is told; how many are useful is decided by the progress they make."""
_LOST_PEERS = 1
"""What a process ends with whose peers are gone (or that has a defect): no fault of its node."""
_MONITOR_S = 0.2
_LAST_WORDS_S = 2.0
"""How long a process whose peers are lost may take to end before it is killed."""
_MEETING_S = 3.0
"""How long an agent that was told to end may take to notice; one that waits for other nodes never does."""


class Watch(Protocol):
    """What tells processes that hang from those that work."""

    def started(self) -> None:
        """The processes are about to be started, or started again."""

    def hung(self) -> Mapping[int, str]:
        """Those to be killed by number, with what is to be said of each."""


@dataclass(frozen=True)
class Failure:
    """How the first process failed: its number, its exit code (negative for a signal) and its last words."""

    rank: int
    exit_code: int
    last_words: str
    hung: bool = False

    def __str__(self) -> str:
        if self.hung:
            return f"process {self.rank} {self.last_words} and was killed"
        if self.exit_code < 0:
            return f"process {self.rank} was ended by {signal.Signals(-self.exit_code).name}"
        return f"process {self.rank} ended with code {self.exit_code}: {self.last_words}"


class Processes:
    """Equal processes that work together, each with its number in the environment as torchrun gives it.

    Parameters
    ----------
    arguments
        What follows Python's own name.
    count
        How many.
    log_folder
        Where each one's output is kept; the first one's errors are shown as well.
    final_codes
        Exit codes after which there is no other attempt.
    progress
        A number that grows as the work gets on.
    watch
        Finds the processes that hang, which are then killed.
    meeting
        Where they meet those of other nodes; they are alone without it.
    preload
        Modules that the processes import, to be imported once for all of them.

    Raises
    ------
    LostError
        While waiting, if the other nodes are gone.
    """

    def __init__(
        self,
        arguments: Collection[str],
        count: int,
        log_folder: Path,
        final_codes: Collection[int],
        progress: Callable[[], float],
        watch: Watch | None = None,
        meeting: Meeting | None = None,
        preload: Collection[str] = (),
    ) -> None:
        from modelworks.launch.meeting import Meeting

        self.failure: Failure | None = None
        """What ended the work, once it has ended badly."""
        self.restarts = 0
        """How often a failure here had all start again."""
        self._final_codes, self._progress = frozenset(final_codes), progress
        self._reached, self._futile, self._stopping = progress(), 0, False
        self._meeting = meeting or Meeting()
        forked.preload(preload)
        ends = _Ends(log_folder, self._final_codes, watch)
        self._agent = _agent(list(arguments), count, log_folder, ends, self, self._meeting)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="agent", daemon=True)
        self._thread.start()

    def wait(self, timeout_s: float) -> bool:
        """Wait until the work has ended, well or badly; whether it has."""
        from torch.distributed.elastic.rendezvous.api import RendezvousError

        self._thread.join(timeout_s)
        if isinstance(self._error, RendezvousError) and self._stopping:
            return True
        if isinstance(self._error, RendezvousError):
            raise LostError(f"the other nodes are lost: {self._error}") from self._error
        if self._error is not None:
            raise self._error
        return not self._thread.is_alive()

    @property
    def stopping(self) -> bool:
        """Whether the processes were told to end."""
        return self._stopping

    @property
    def at_work(self) -> bool:
        """Whether there are processes now; between attempts there are none."""
        return any(_alive(worker.id) for worker in self._agent.get_worker_group().workers)

    def signal(self, number: int) -> None:
        """Send a signal to every process; what they end with is then the end."""
        self._stopping = True
        for worker in self._agent.get_worker_group().workers:
            if isinstance(worker.id, int):
                _send(worker.id, number)

    def kill(self) -> None:
        """End every process at once; an agent that waits for other nodes is left to itself and starts no more."""
        deadline = time.monotonic() + _MEETING_S
        while self._thread.is_alive() and (self.at_work or time.monotonic() < deadline):
            self.signal(signal.SIGKILL)
            self._thread.join(_MONITOR_S)

    def _run(self) -> None:
        try:
            self._agent.run()
        except BaseException as error:  # noqa: BLE001 - it belongs to whoever waits
            self._error = error
        finally:
            self._agent.get_worker_group().spec.rdzv_handler.shutdown()

    def goes_on_after(self, failure: Failure) -> bool:
        """Whether another attempt is worth it."""
        reached = self._progress()
        self._futile = 0 if reached > self._reached else self._futile + 1
        self._reached = max(reached, self._reached)
        if self._stopping or failure.exit_code in self._final_codes or self._futile >= ATTEMPTS_WITHOUT_PROGRESS:
            self.failure = failure
            return False
        if failure.exit_code != _LOST_PEERS:
            self._meeting.note_loss(str(failure))
        self.restarts += 1
        logger.warning("%s; all are started again from the last checkpoint", failure)
        return True


class _Ends:
    """Looks after how the processes of one attempt end."""

    def __init__(self, log_folder: Path, final_codes: Collection[int], watch: Watch | None) -> None:
        self._log_folder, self._final_codes, self._watch = log_folder, final_codes, watch

    def starting(self) -> None:
        """The processes are about to be started."""
        if self._watch is not None:
            self._watch.started()

    def look(self, processes: Mapping[int, BaseProcess]) -> Failure | None:
        """Kill what hangs; if any process has failed, end them all and say which failure came before the others."""
        hung: dict[int, str] = {}
        if self._watch is not None and all(process.exitcode is None for process in processes.values()):
            hung.update(self._watch.hung())
            for number in hung:
                _kill(processes[number])
        if not any(process.exitcode for process in processes.values()):
            return None
        deadline = time.monotonic() + _LAST_WORDS_S
        while time.monotonic() < deadline and any(process.exitcode is None for process in processes.values()):
            time.sleep(0.02)
        codes = {number: code for number, process in processes.items() if (code := process.exitcode)}
        for process in processes.values():
            _kill(process)

        def order(number: int) -> tuple[bool, bool, bool]:
            return number not in hung, codes[number] not in self._final_codes, codes[number] == 1

        first = min(codes, key=order)
        if first in hung:
            return Failure(first, codes[first], hung[first], hung=True)
        return Failure(first, codes[first], self._last_words(first))

    def _last_words(self, number: int) -> str:
        logs = sorted(
            self._log_folder.glob(f"*/attempt_*/{number}/stderr.log"), key=lambda path: path.stat().st_mtime_ns
        )
        lines = logs[-1].read_text(encoding="utf-8", errors="replace").split("\n") if logs else []
        words = [line.strip() for line in lines if line.strip()]
        return words[-1] if words else "it printed nothing"


def _agent(
    arguments: list[str], count: int, log_folder: Path, ends: _Ends, work: Processes, meeting: Meeting
) -> LocalElasticAgent:
    """torchrun's agent for one node, which asks `work` before it starts the processes again."""
    from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.elastic.multiprocessing.api import MultiprocessContext
    from torch.distributed.elastic.rendezvous.api import RendezvousClosedError, RendezvousError

    handler = meeting.handler()

    class Agent(LocalElasticAgent):
        processes: Mapping[int, BaseProcess]

        def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
            if work.stopping:
                raise RendezvousClosedError("the processes were told to end before they were started")
            ends.starting()
            started: dict[int, int] = super()._start_workers(worker_group)
            assert isinstance(self._pcontext, MultiprocessContext)
            # Not `multiprocessing.active_children`, which leaves out what has ended already.
            assert self._pcontext._pc is not None
            self.processes = dict(enumerate(self._pcontext._pc.processes))
            return started

        def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
            failure = ends.look(self.processes)
            result: RunResult = super()._monitor_workers(worker_group)
            if failure is not None and not work.goes_on_after(failure):
                self._remaining_restarts = 0
                with contextlib.suppress(RendezvousError):
                    handler.set_closed()  # no other node is to wait for this one
            return result

        def _rendezvous(self, worker_group: WorkerGroup) -> None:
            super()._rendezvous(worker_group)
            # A restart's number is the round's, and so the same on all nodes.
            self._remaining_restarts = _ATTEMPTS - handler.round

    # The agent's own words are for its developers.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    spec = WorkerSpec(
        role="train",
        local_world_size=count,
        entrypoint=forked.run,
        args=(arguments, dict(os.environ)),
        rdzv_handler=handler,
        max_restarts=_ATTEMPTS,
        monitor_interval=_MONITOR_S,
    )
    logs = DefaultLogsSpecs(str(log_folder), redirects=Std.ALL, tee={0: Std.ERR})
    return Agent(spec, logs, start_method="forkserver")


def _kill(process: BaseProcess) -> None:
    """End a process and those that it has started, and wait until it has ended."""
    if process.exitcode is None and process.pid is not None:
        # It leads a group of its own from its first moment on, but that moment may be to come.
        for end in (os.killpg, os.kill):
            with contextlib.suppress(ProcessLookupError):
                end(process.pid, signal.SIGKILL)
        process.join(_LAST_WORDS_S)


def _alive(process: Any) -> bool:
    if not isinstance(process, int):
        return False
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _send(process: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, number)
