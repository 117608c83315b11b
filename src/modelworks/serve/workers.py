"""Several processes that answer on one port, under uvicorn's supervisor.

The parent opens the port, starts the workers, and starts another one where one has died. SIGTERM and Ctrl-C end all of
them, each after its answers (`ServeConfig.drain_s`); SIGHUP has all of them read the configuration again. What they
measure is kept in files that they share, so that `/metrics` of any of them shows all (prometheus_client's multiprocess
mode).
"""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path

import uvicorn
from prometheus_client.multiprocess import mark_process_dead
from uvicorn.config import STARTUP_FAILURE
from uvicorn.supervisors.multiprocess import Multiprocess, Process

from modelworks.serve.config import load_config
from modelworks.serve.listen import announce, check_share, open_port, port_for_xai
from modelworks.serve.metrics import MULTIPROCESS
from modelworks.spec.errors import OperationError

_LOG = logging.getLogger("modelworks.workers")
PLAN = "MODELWORKS_WORKER"
"""The environment variable in which a worker finds what it serves."""
_PARENT_LOOK_S = 1.0


@dataclass(frozen=True)
class WorkerPlan:
    """What a worker serves."""

    config: str
    """The configuration file."""
    workers: int
    hosts: tuple[str, ...] = ()
    log: str | None = None
    xai: str | None = None
    """Where xAI's clients are answered."""

    @classmethod
    def given(cls) -> WorkerPlan:
        """The plan that the parent has left for this worker."""
        values = json.loads(os.environ[PLAN])
        return cls(**values | {"hosts": tuple(values["hosts"])})


def run_workers(
    config_file: Path,
    workers: int,
    factory: str,
    *,
    host: str,
    port: int,
    hosts: Collection[str] = (),
    log: str | None = None,
    keys: bool = False,
    grpc_port: int | None = None,
) -> None:
    """Serve a configuration by several processes until this one is told to end.

    Parameters
    ----------
    config_file : Path
        The engines.
    workers : int
        How many processes answer.
    factory : str
        ``module:function`` that makes a worker's application from `WorkerPlan.given`.
    host, port, hosts, log, keys, grpc_port
        As for one process.

    Raises
    ------
    InputError
        If the file can't be used, or names an engine inside the process; or a port can't be opened.
    OperationError
        If a worker can't start.
    """
    config = load_config(config_file)
    check_share(config, workers, str(config_file))
    listener = open_port(host, port)
    metrics = tempfile.TemporaryDirectory(prefix="modelworks-metrics-")
    with listener, port_for_xai(host, grpc_port) as xai, metrics as folder:
        os.environ[MULTIPROCESS] = folder
        plan = WorkerPlan(str(config_file.absolute()), workers, tuple(hosts), log, xai)
        os.environ[PLAN] = json.dumps(asdict(plan))
        announce(listener, f"{', '.join(config.engines)} by {workers} workers", keys, xai)
        settings = uvicorn.Config(
            factory,
            factory=True,
            workers=workers,
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=math.ceil(config.drain_s),
        )
        supervisor = Supervisor(settings, [listener])
        supervisor.run()
        if supervisor.failed:
            raise OperationError("a worker could not start; what it said is above")


class Supervisor(Multiprocess):
    """uvicorn's, with two differences. SIGHUP is passed on instead of starting the workers anew: their answers go on.
    And a worker is replaced when it has died, and not when it says nothing for a while: on a busy machine it says
    nothing while it starts, and whoever waits for its word hears no signal."""

    def __init__(self, config: uvicorn.Config, sockets: list[socket.socket]) -> None:
        super().__init__(config, sockets)
        self.failed = False
        """Whether a worker could not start."""

    def handle_hup(self) -> None:
        """Have all workers read the configuration again."""
        for process in self.processes:
            if process.pid is not None and process.exitcode is None:
                os.kill(process.pid, signal.SIGHUP)

    def keep_subprocess_alive(self) -> None:
        """Start another worker where one has died, and stop counting what the dead one was doing."""
        for index, process in enumerate(self.processes):
            if self.should_exit.is_set() or process.process.is_alive():
                continue
            process.join()
            if process.pid is not None:
                mark_process_dead(process.pid)  # type: ignore[no-untyped-call]
            if process.exitcode == STARTUP_FAILURE:
                self.failed = True
                self.should_exit.set()
                return
            _LOG.warning("a worker has died (%s); another one begins", process.exitcode)
            self.processes[index] = Process(self.config, self.sockets)
            self.processes[index].start()


def end_with_parent() -> None:
    """Have this worker end when its parent has died, however it did."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_PARENT_LOOK_S)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True, name="parent").start()
