"""Runs on a Ray cluster of several nodes on this machine, one of which is lost."""

from __future__ import annotations

import contextlib
import importlib.util
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from weights import tensors_of

from modelworks.engine_command import record_of
from modelworks.launch.submission import node_events
from modelworks.model import checkpoint
from modelworks.spec.home import runs_folder
from modelworks.spec.run import RunSpec

MakeRun = Callable[..., RunSpec]
WriteRun = Callable[[RunSpec], Path]
Modelworks = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head without processors, and two nodes of one each; a test that takes one away adds another."""
    if importlib.util.find_spec("ray") is None:
        pytest.skip("Ray is not installed: pip install 'modelworks[ray]'")
    with pytest.MonkeyPatch.context() as environment:
        for name, value in {
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_memory_monitor_refresh_ms": "0",
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1",
            # A node that refuses connections is lost after three seconds; a slow one still has its time.
            "RAY_health_check_period_ms": "1000",
            "RAY_health_check_failure_threshold": "3",
            "OMP_NUM_THREADS": "1",
        }.items():
            environment.setenv(name, value)
        from ray.cluster_utils import Cluster

        before = {process.pid for process in psutil.process_iter()}
        started = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        try:
            for _ in range(2):
                started.add_node(num_cpus=1)
            yield started
        finally:
            address = started.address
            started.shutdown()
            _end_those_of(address, before)


def _end_those_of(address: str, before: set[int]) -> None:
    """Ray's own processes of this cluster that its shutdown has left."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            mine = any(address in word for word in process.cmdline()) or process.name().startswith("ray::")
            if mine and process.pid not in before:
                process.kill()


def _wait_for(happened: Callable[[], bool], run: str, timeout_s: float = 300) -> None:
    deadline = time.monotonic() + timeout_s
    while not happened():
        if time.monotonic() > deadline:
            log = runs_folder() / run / "train.log"
            raise AssertionError(f"{record_of(run).status()}\n{log.read_text(errors='replace')[-6000:]}")
        time.sleep(0.1)


def _step(run: str) -> int:
    metrics = runs_folder() / run / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


@pytest.mark.slow
def test_a_run_that_loses_a_ray_node_ends_on_another_with_the_weights_of_an_undisturbed_one(
    cluster: Any, make_run: MakeRun, write_run: WriteRun, modelworks: Modelworks
) -> None:
    steps = 250
    launch = {"cpus_per_node": 1, "ray": {"address": cluster.address}}
    modelworks("train", write_run(make_run("lost", steps, launch)), "--on", "ray", "--json")
    _wait_for(lambda: _step("lost") >= 20 and bool(checkpoint.folders(runs_folder() / "lost")), "lost")
    victim = cluster.worker_nodes.copy().pop()
    cluster.remove_node(victim, allow_graceful=False)
    assert _step("lost") < steps
    cluster.add_node(num_cpus=1)

    _wait_for(lambda: record_of("lost").status().state == "finished", "lost", timeout_s=420)
    events = node_events(runs_folder() / "lost")
    assert len(events) == 3
    attempts = {event["attempt"] for of_node in events.values() for event in of_node}
    assert {attempt.rpartition(".")[2] for attempt in attempts} == {"0", "1"}

    modelworks("train", write_run(make_run("whole", steps)), "--nproc", "2")
    losses = {run: [row["loss"] for row in record_of(run).metrics()] for run in ("lost", "whole")}
    assert losses["lost"] == losses["whole"]
    weights = tensors_of("lost", steps)
    assert len(weights) > 50
    assert weights == tensors_of("whole", steps)


@pytest.mark.slow
def test_a_run_on_ray_is_stopped_and_resumed(
    cluster: Any, make_run: MakeRun, write_run: WriteRun, modelworks: Modelworks
) -> None:
    launch = {"cpus_per_node": 1, "ray": {"address": cluster.address}}
    path = write_run(make_run("told", 250, launch, checkpoint={"every_steps": 100_000}))
    modelworks("train", path, "--on", "ray", "--json")
    _wait_for(lambda: _step("told") >= 5, "told")
    stopped = modelworks("runs", "stop", "told", "--json", "--wait", "120")
    assert (stopped["state"], stopped["ended"]) == ("stopped", True)
    made = len(record_of("told").metrics())
    assert 0 < made < 250
    assert checkpoint.step_of(checkpoint.folders(runs_folder() / "told")[0]) == made, "it was saved where it stopped"
    modelworks("runs", "resume", "told")
    _wait_for(lambda: record_of("told").status().state == "finished", "told")
    assert [row["step"] for row in record_of("told").metrics()] == list(range(1, 251))


def test_a_dry_run_says_what_ray_is_asked_for(
    typed: Callable[..., subprocess.CompletedProcess[str]], make_run: MakeRun, write_run: WriteRun
) -> None:
    done = typed("train", write_run(make_run("dry", 10)), "--on", "ray", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "STRICT_SPREAD" in done.stdout
    assert done.stdout.count("'CPU': 1.0") == 2
    assert not (runs_folder() / "dry").exists()
