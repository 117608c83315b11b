"""Runs on Ray: one actor per node, in a placement group that puts each on a node of its own.

A driver, ``python -m modelworks.launch.ray_cluster FOLDER``, stays on the machine that submitted the run. It asks Ray
for the nodes, starts the same per-node program there as every other engine does, and when a node or its part is lost
lets go of all and asks again, without the nodes that failed too often. An actor holds its program's standard input
open, so the program ends when the actor, and with it the node, is gone.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

from modelworks.launch.engine import Job, log_tail
from modelworks.launch.health import needs_gpus
from modelworks.launch.submission import (
    Submission,
    failing_nodes,
    final_codes,
    note_vanished,
    versions,
)
from modelworks.spec.errors import InputError, OperationError
from modelworks.spec.fields import validate
from modelworks.spec.home import home
from modelworks.spec.run import RunSpec

_LOOK_S = 0.5
_START_S = 60.0
_FINAL = {2, 3}
_NODE_ID = "ray.io/node-id"


class Ray:
    """A Ray cluster, from the machine that submits."""

    name = "ray"

    def render(self, spec: RunSpec, folder: Path) -> str:
        """The resources that Ray is asked for, and what it starts there."""
        where = {"address": spec.launch.ray.address, "strategy": "STRICT_SPREAD", "bundles": bundles(spec)}
        command = shlex.join(node_command(folder, spec.nodes, 0, "FIRST-NODE:PORT", "NODE", "1"))
        return f"{where}\nMODELWORKS_HOME={shlex.quote(str(home()))} {command}\n"

    def submit(self, spec: RunSpec, folder: Path) -> Submission:
        """Start the driver in the background.

        Raises
        ------
        InputError
            If Ray isn't installed here.
        """
        if importlib.util.find_spec("ray") is None:
            raise InputError("ray is not installed here: pip install 'modelworks[ray]'")
        # The driver reads the submission, and is part of it.
        Submission(self.name, "", versions=versions()).write(folder)
        with (folder / "train.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "modelworks.launch.ray_cluster", str(folder)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {"PYTHONUNBUFFERED": "1"},
                start_new_session=True,
            )
        details = {
            "pid": process.pid,
            "started": psutil.Process(process.pid).create_time(),
            "host": socket.gethostname(),
        }
        submission = Submission(self.name, str(process.pid), versions=versions(), details=details)
        submission.write(folder)
        return submission

    def job(self, folder: Path, submission: Submission) -> Job:
        """Where the driver stands."""
        if submission.details["host"] != socket.gethostname():
            return Job("running", f"Ray's driver is process {submission.job} on {submission.details['host']}")
        if _driver(submission) is None:
            return Job("gone", f"Ray's driver, process {submission.job}, has ended")
        waiting = (folder / ".ray-waits").exists()
        words = f"Ray's driver is process {submission.job}"
        return Job("waiting", f"{words}; it waits for nodes") if waiting else Job("running", words)

    def stop(self, folder: Path, submission: Submission) -> None:
        """Let the driver end the run."""
        replace(submission, stop=True).write(folder)
        driver = _driver(submission)
        if driver is None:
            raise OperationError(f"Ray's driver, process {submission.job}, isn't on this machine, or has ended")
        driver.send_signal(signal.SIGTERM)

    def log(self, folder: Path, submission: Submission, lines: int) -> str:
        """What the nodes have printed, which is in the run's folder."""
        return log_tail(folder / "train.log", lines)


def bundles(spec: RunSpec) -> list[dict[str, float]]:
    """What each node is asked for."""
    processes = spec.cluster.gpus // spec.nodes
    one: dict[str, float] = {"CPU": float(spec.launch.cpus_per_node or processes)}
    if needs_gpus(spec):
        one["GPU"] = float(processes)
    if spec.launch.memory_per_node is not None:
        one["memory"] = float(spec.launch.memory_per_node)
    return [dict(one) for _ in range(spec.nodes)]


def node_command(folder: Path, nodes: int, node: int, meet: str, name: str, attempt: str) -> list[str]:
    """The per-node program, as an actor starts it."""
    given = [f"--nodes={nodes}", f"--node={node}", f"--meet={meet}", f"--name={name}", f"--attempt={attempt}"]
    return [sys.executable, "-m", "modelworks.node_command", str(folder), *given, "--with-parent"]


class NodeProgram:
    """Starts the per-node program beside the actor that it is made into, and tells how it ended."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._stopping = False

    def where(self) -> tuple[str, str, int]:
        """This node's id in Ray, its address, and a port that is free there."""
        import ray

        address = ray.util.get_node_ip_address()
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = int(probe.getsockname()[1])
        return ray.get_runtime_context().get_node_id(), address, port

    def run(self, command: list[str], check: list[str], variables: dict[str, str], log: str) -> int:
        """Check the node and run the program to its end; returns its exit code."""
        with Path(log).open("ab") as output:
            environment = os.environ | variables
            code = subprocess.run(check, stdout=output, stderr=output, env=environment, check=False).returncode
            if code or self._stopping:
                return code
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=output, stderr=output, env=environment
            )
            return self._process.wait()

    def stop(self) -> None:
        """Tell the program to save and end."""
        self._stopping = True
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()


class _Driver:
    """One run's way through its attempts."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._spec = validate(RunSpec, tomllib.loads((folder / "run.toml").read_text(encoding="utf-8")), str(folder))
        self._stop = threading.Event()
        self._submitted = f"{time.time():.0f}"
        self._waits = folder / ".ray-waits"

    def run(self) -> int:
        """Make attempts until the run has ended; returns the exit code."""
        import ray

        address = self._spec.launch.ray.address
        ray.init(
            address=None if address == "local" else address,
            include_dashboard=False,
            log_to_driver=False,
            configure_logging=False,
        )
        # Not before, since Ray puts a handler of its own in its place, which ends the process at once.
        signal.signal(signal.SIGTERM, lambda number, frame: self._stop.set())
        number = 0
        try:
            while True:
                attempt = f"{self._submitted}.{number}"
                codes = self._attempt(attempt)
                note_vanished(self._folder, attempt)
                if codes is None or self._stop.is_set() or all(code == 0 for code in codes):
                    return 0
                if final := (final_codes(self._folder, attempt) | set(codes)) & _FINAL:
                    return max(final)
                print(f"attempt {number} ended with {codes}; another one begins")
                number += 1
        finally:
            self._waits.unlink(missing_ok=True)
            ray.shutdown()

    def _attempt(self, attempt: str) -> list[int] | None:
        """One attempt: the nodes' exit codes (-1 for a node that is lost), or nothing if it was never begun."""
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        group = self._group()
        try:
            if not self._granted(group):
                return None
            actor = ray.remote(NodeProgram)
            strategies = [PlacementGroupSchedulingStrategy(group, index) for index in range(self._spec.nodes)]
            actors = [
                actor.options(
                    num_cpus=bundle["CPU"],
                    num_gpus=bundle.get("GPU", 0),
                    max_concurrency=2,
                    scheduling_strategy=strategy,
                ).remote()
                for bundle, strategy in zip(bundles(self._spec), strategies, strict=True)
            ]
            try:
                places = ray.get([one.where.remote() for one in actors], timeout=_START_S * 5)
            except (ray.exceptions.RayError, TimeoutError):
                return [-1] * len(actors)
            return self._watch(actors, self._begin(actors, places, attempt))
        finally:
            ray.util.remove_placement_group(group)

    def _begin(self, actors: list[Any], places: list[tuple[str, str, int]], attempt: str) -> list[Any]:
        _, host, port = places[0]
        variables = {"MODELWORKS_HOME": str(home()), "PYTHONUNBUFFERED": "1", **self._spec.launch.environment}
        log, folder, runs = str(self._folder / "train.log"), str(self._folder), []
        for number, (one, (name, _, _)) in enumerate(zip(actors, places, strict=True)):
            command = node_command(self._folder, len(actors), number, f"{host}:{port}", name, attempt)
            check = [sys.executable, "-m", "modelworks.launch.health", folder, "--node", name, "--attempt", attempt]
            runs.append(one.run.remote(command, check, variables, log))
        return runs

    def _watch(self, actors: list[Any], runs: list[Any]) -> list[int]:
        """Wait for all nodes; one that fails or is lost ends the others."""
        import ray

        codes: dict[int, int] = {}
        told = 0
        while len(codes) < len(runs):
            left = [run for place, run in enumerate(runs) if place not in codes]
            for done in ray.wait(left, timeout=_LOOK_S)[0]:
                try:
                    codes[runs.index(done)] = ray.get(done)
                except ray.exceptions.RayError:
                    codes[runs.index(done)] = -1
            if told == 0 and (self._stop.is_set() or any(codes.values())):
                told = 1
                for one in actors:
                    one.stop.remote()
                deadline = time.monotonic() + self._spec.launch.grace
            if told == 1 and time.monotonic() > deadline:
                told = 2
                for one in actors:
                    ray.kill(one)
        return [codes[place] for place in range(len(runs))]

    def _group(self) -> Any:
        import ray

        failing = failing_nodes(self._folder, self._spec.launch.exclude_after)
        selector = [{_NODE_ID: f"!in({','.join(failing)})"}] * self._spec.nodes if failing else None
        return ray.util.placement_group(bundles(self._spec), strategy="STRICT_SPREAD", bundle_label_selector=selector)

    def _granted(self, group: Any) -> bool:
        """Wait for the nodes; not if the run is to stop."""
        self._waits.touch()
        try:
            while not group.wait(timeout_seconds=1):
                if self._stop.is_set():
                    return False
        finally:
            self._waits.unlink(missing_ok=True)
        return True


def _driver(submission: Submission) -> psutil.Process | None:
    """The driver's process, if it lives on this machine."""
    if submission.details.get("host") != socket.gethostname():
        return None
    try:
        process = psutil.Process(submission.details["pid"])
        same = abs(process.create_time() - submission.details["started"]) < 2.0
        return process if same and process.status() != psutil.STATUS_ZOMBIE else None
    except psutil.NoSuchProcess:
        return None


def main(arguments: list[str]) -> int:
    """Drive a run that was submitted; returns the exit code."""
    try:
        return _Driver(Path(arguments[0])).run()
    except (ConnectionError, RuntimeError) as error:
        print(f"Ray cannot be used: {str(error).splitlines()[0]}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
