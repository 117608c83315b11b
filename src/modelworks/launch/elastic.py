"""The processes of one run on this machine, under torchrun's agent: started together, and again when one is lost.

The agent runs in a thread of the process that asked for it, so that the processes are its children: they can be
signalled by it, and they notice when it is gone. What ends a process decides what follows. A code that says "no
attempt will do better" ends the run; anything else (killed, out of memory, lost its peers) starts all processes again,
which take up the last checkpoint, as long as attempts get further than the ones before them.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import uuid
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent

logger = logging.getLogger(__name__)
ATTEMPTS_WITHOUT_PROGRESS = 3
_ATTEMPTS = 1_000_000
"""What the agent is told; how many are useful is decided by the progress they make."""
_MONITOR_S = 0.2
_SHUTDOWN_S = 5
"""How long a process whose peers are lost may take to end before it is killed."""


@dataclass(frozen=True)
class Failure:
    """How the first process failed: its number, its exit code (negative for a signal) and its last words."""

    rank: int
    exit_code: int
    last_words: str

    def __str__(self) -> str:
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
    """

    def __init__(
        self,
        arguments: Collection[str],
        count: int,
        log_folder: Path,
        final_codes: Collection[int],
        progress: Callable[[], float],
    ) -> None:
        self.failure: Failure | None = None
        """What ended the work, once it has ended badly."""
        self.restarts = 0
        self._final_codes, self._progress = frozenset(final_codes), progress
        self._reached, self._futile, self._stopping = progress(), 0, False
        self._agent = _agent(list(arguments), count, log_folder, self._on_failure)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="agent", daemon=True)
        self._thread.start()

    def wait(self, timeout_s: float) -> bool:
        """Wait until the work has ended, well or badly; whether it has."""
        self._thread.join(timeout_s)
        if self._error is not None:
            raise self._error
        return not self._thread.is_alive()

    def signal(self, number: int) -> None:
        """Send a signal to every process; what they end with is then the end."""
        self._stopping = True
        for worker in self._agent.get_worker_group().workers:
            if isinstance(worker.id, int):
                _send(worker.id, number)

    def kill(self) -> None:
        """End every process at once."""
        while self._thread.is_alive():
            self.signal(signal.SIGKILL)
            self._thread.join(_MONITOR_S)

    def _run(self) -> None:
        try:
            self._agent.run()
        except BaseException as error:  # noqa: BLE001 - it belongs to whoever waits
            self._error = error

    def _on_failure(self, failure: Failure) -> bool:
        """Whether another attempt is worth it."""
        reached = self._progress()
        self._futile = 0 if reached > self._reached else self._futile + 1
        self._reached = max(reached, self._reached)
        if self._stopping or failure.exit_code in self._final_codes or self._futile >= ATTEMPTS_WITHOUT_PROGRESS:
            self.failure = failure
            return False
        self.restarts += 1
        logger.warning("%s; all are started again from the last checkpoint", failure)
        return True


def _agent(
    arguments: list[str], count: int, log_folder: Path, on_failure: Callable[[Failure], bool]
) -> LocalElasticAgent:
    """torchrun's agent for one machine, which asks `on_failure` before it starts the processes again."""
    from torch.distributed.elastic import rendezvous
    from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.elastic.rendezvous import registry

    class Agent(LocalElasticAgent):
        def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
            result: RunResult = super()._monitor_workers(worker_group)
            if result.state == WorkerState.FAILED and not on_failure(_first_failure(result, log_folder)):
                self._remaining_restarts = 0
            return result

    # The agent's own words are for its developers.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    meeting = rendezvous.RendezvousParameters(
        backend="c10d",
        endpoint="127.0.0.1:0",
        run_id=uuid.uuid4().hex,
        min_nodes=1,
        max_nodes=1,
        local_addr="127.0.0.1",
        is_host="true",
    )
    spec = WorkerSpec(
        role="train",
        local_world_size=count,
        entrypoint=sys.executable,
        args=tuple(arguments),
        rdzv_handler=registry.get_rendezvous_handler(meeting),
        max_restarts=_ATTEMPTS,
        monitor_interval=_MONITOR_S,
        local_addr="127.0.0.1",
    )
    logs = DefaultLogsSpecs(str(log_folder), redirects=Std.ALL, tee={0: Std.ERR})
    return Agent(spec, logs, shutdown_timeout=_SHUTDOWN_S)


def _first_failure(result: Any, log_folder: Path) -> Failure:
    """The failure that came before the others, which may only have lost their peer: a final code or a signal first."""
    failures = sorted(result.failures.values(), key=lambda failure: (failure.exitcode == 1, failure.timestamp))
    first = failures[0]
    logs = sorted(log_folder.glob(f"*/attempt_*/{first.local_rank}/stderr.log"), key=lambda path: path.stat().st_mtime)
    lines = logs[-1].read_text(encoding="utf-8", errors="replace").split("\n") if logs else []
    words = [line.strip() for line in lines if line.strip()]
    return Failure(first.local_rank, first.exitcode, words[-1] if words else "it printed nothing")


def _send(process: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, number)
