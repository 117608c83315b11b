"""Several processes that answer on one port, under uvicorn's supervisor.

The parent opens the port, starts the workers, and starts another one where one has died. SIGTERM and Ctrl-C end all of
them, each after its answers (`ServeConfig.drain_s`); SIGHUP has all of them read the configuration again. What they
measure is kept in files that they share, so that `/metrics` of any of them shows all (prometheus_client's multiprocess
mode).
"""

from __future__ import annotations

import json
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
from uvicorn.supervisors import Multiprocess

from modelworks.serve.config import load_config
from modelworks.serve.listen import announce, check_share, open_port

PLAN = "MODELWORKS_WORKER"
"""The environment variable in which a worker finds what it serves."""
METRICS_FOLDER = "PROMETHEUS_MULTIPROC_DIR"
_PARENT_LOOK_S = 1.0


@dataclass(frozen=True)
class WorkerPlan:
    """What a worker serves."""

    config: str
    """The configuration file."""
    workers: int
    hosts: tuple[str, ...] = ()
    log: str | None = None

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
    host, port, hosts, log, keys
        As for one process.

    Raises
    ------
    InputError
        If the file can't be used, or names an engine inside the process; or the port can't be opened.
    """
    config = load_config(config_file)
    check_share(config, workers, str(config_file))
    listener = open_port(host, port)
    with listener, tempfile.TemporaryDirectory(prefix="modelworks-metrics-") as folder:
        os.environ[METRICS_FOLDER] = folder
        os.environ[PLAN] = json.dumps(asdict(WorkerPlan(str(config_file.absolute()), workers, tuple(hosts), log)))
        announce(listener, f"{', '.join(config.engines)} by {workers} workers", keys)
        settings = uvicorn.Config(
            factory,
            factory=True,
            workers=workers,
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=math.ceil(config.drain_s),
        )
        Supervisor(settings, [listener]).run()


class Supervisor(Multiprocess):
    """uvicorn's, which passes SIGHUP on instead of starting the workers anew: their answers go on."""

    def __init__(self, config: uvicorn.Config, sockets: list[socket.socket]) -> None:
        super().__init__(config, sockets)
        self._known: set[int] = set()

    def handle_hup(self) -> None:
        """Have all workers read the configuration again."""
        for process in self.processes:
            if process.pid is not None and process.exitcode is None:
                os.kill(process.pid, signal.SIGHUP)

    def keep_subprocess_alive(self) -> None:
        """Start another worker where one has died, and stop counting what the dead one was doing."""
        super().keep_subprocess_alive()
        alive = {process.pid for process in self.processes if process.pid is not None}
        for pid in self._known - alive:
            mark_process_dead(pid)
        self._known = alive


def end_with_parent() -> None:
    """Have this worker end when its parent has died, however it did."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_PARENT_LOOK_S)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True, name="parent").start()
