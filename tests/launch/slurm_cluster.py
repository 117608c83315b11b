"""A real Slurm on this machine: a controller, several node daemons, and their authentication, in one folder.

Everything listens on the loopback interface, on ports that were free. What belongs to the cluster is known by the
configuration file in its environment, so that tests can find the processes of one node, and so that nothing outlives
the cluster.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

import psutil

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "sinfo", "squeue", "scancel")
_CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/sock,cred_expire=10
CredType=cred/munge
SlurmctldPort={controller}
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,bf_interval=5
EnforcePartLimits=ALL
ReturnToService=2
SlurmdTimeout=8
MessageTimeout=60
KillWait=30
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdSpoolDir={folder}/spool/%n
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    """Why no cluster can be started here, if so."""
    absent = [program for program in PROGRAMS if shutil.which(program) is None]
    if absent:
        return f"Slurm is not installed ({', '.join(absent)} missing): apt-get install slurm-wlm munge"
    return None if os.geteuid() == 0 else "Slurm's daemons need root here"


class SlurmCluster:
    """Nodes ``n1`` to ``n<count>`` of two CPUs each; use it in a `with` statement."""

    def __init__(self, count: int) -> None:
        self.nodes = [f"n{number}" for number in range(1, count + 1)]
        self._folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # sockets' paths must be short
        self._file = self._folder / "slurm.conf"
        self._daemons: list[subprocess.Popen[bytes]] = []

    @property
    def environment(self) -> dict[str, str]:
        """What Slurm's commands need."""
        return {"SLURM_CONF": str(self._file)}

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _start(self) -> None:
        self._folder.chmod(0o755)
        for name in ("munge", "state", "spool", "log"):
            (self._folder / name).mkdir(mode=0o755)
        key = self._folder / "munge" / "key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        controller, *ports = _free_ports(1 + len(self.nodes))
        nodes = "\n".join(
            f"NodeName={name} NodeHostname={platform.node()} NodeAddr=127.0.0.1 Port={port} CPUs=2 RealMemory=2000"
            for name, port in zip(self.nodes, ports, strict=True)
        )
        self._file.write_text(
            _CONFIGURATION.format(host=platform.node(), folder=self._folder, controller=controller, nodes=nodes)
        )
        munge = self._folder / "munge"
        files = [f"--{kind}-file={munge / kind}" for kind in ("key", "pid", "log", "seed")]
        self._daemon("munged", "-F", f"--socket={munge / 'sock'}", *files)
        self._wait_for(lambda: (munge / "sock").exists(), "munged to listen")
        self._daemon("slurmctld", "-D", "-f", str(self._file))
        for node in self.nodes:
            self._daemon("slurmd", "-D", "-f", str(self._file), "-N", node)
        self._wait_for(lambda: self._asked("sinfo", "-h", "-o", "%T").split() == ["idle"], "all nodes to be idle")

    def processes_of(self, node: str) -> list[psutil.Process]:
        """The daemon, the steps and the tasks of a node."""
        mine = []
        for process in self._processes():
            with contextlib.suppress(psutil.Error):
                words, environment = process.cmdline(), process.environ()
                daemon = words[:1] == ["slurmd"] and words[-1] == node
                step = f"slurmd-{node}.log" in _open_logs(process, self._folder)
                if daemon or step or environment.get("SLURMD_NODENAME") == node:
                    mine.append(process)
        return mine

    def tasks_of(self, node: str) -> list[psutil.Process]:
        """The tasks of a node that belong to runs."""
        found = []
        for process in self.processes_of(node):
            with contextlib.suppress(psutil.Error):
                if "modelworks.node_command" in process.cmdline():
                    found.append(process)
        return found

    def revive(self, node: str) -> None:
        """Start a node's daemon again."""
        self._daemon("slurmd", "-D", "-f", str(self._file), "-N", node)

    def log(self) -> str:
        """The controller's log, for a test that fails."""
        path = self._folder / "log" / "slurmctld.log"
        return path.read_text(errors="replace")[-4000:] if path.exists() else ""

    def close(self) -> None:
        """End everything that belongs to the cluster and remove its folder."""
        deadline = time.monotonic() + 30
        while (left := list(self._processes())) and time.monotonic() < deadline:
            for process in left:
                with contextlib.suppress(psutil.Error):
                    process.send_signal(signal.SIGKILL)
            for daemon in self._daemons:
                daemon.poll()
            time.sleep(0.1)
        for daemon in self._daemons:
            daemon.kill()
            daemon.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _processes(self) -> Iterator[psutil.Process]:
        """Every living process that was started for this cluster, by it or by its jobs."""
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                living = process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE
                mine = process.environ().get("SLURM_CONF") == str(self._file)
                # A step's daemon has no environment left, but it writes to its node's log.
                if living and (mine or _open_logs(process, self._folder)):
                    yield process

    def _daemon(self, *command: str) -> None:
        log = (self._folder / "log" / "daemons.log").open("ab")
        with log:
            daemon = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**os.environ, **self.environment},
            )
        self._daemons.append(daemon)

    def _asked(self, *command: str) -> str:
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **self.environment})
        return done.stdout

    def _wait_for(self, happened: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + 90
        while not happened():
            if time.monotonic() > deadline:
                raise AssertionError(
                    f"waited in vain for {what}: {(self._folder / 'log' / 'daemons.log').read_text()}\n{self.log()}"
                )
            time.sleep(0.2)


def _open_logs(process: psutil.Process, folder: Path) -> list[str]:
    """The names of a cluster's logs that a step's daemon has open."""
    if "slurmstepd" not in process.name():
        return []
    found = []
    with contextlib.suppress(OSError):
        for handle in Path(f"/proc/{process.pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                path = handle.readlink()
                if path.parent == folder / "log":
                    found.append(path.name)
    return found


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
