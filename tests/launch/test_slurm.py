"""Runs on a real Slurm of three nodes on this machine: a node is lost, a task is killed, a job is told to go."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from slurm_cluster import SlurmCluster, missing
from weights import tensors_of

from modelworks.engine_command import record_of
from modelworks.launch.slurm import script
from modelworks.launch.submission import failing_nodes, node_events, read_submission
from modelworks.model import checkpoint
from modelworks.spec.home import runs_folder
from modelworks.spec.run import RunSpec

MakeRun = Callable[..., RunSpec]
WriteRun = Callable[[RunSpec], Path]
Modelworks = Callable[..., dict[str, Any]]
Typed = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[SlurmCluster]:
    if reason := missing():
        pytest.skip(reason)
    with SlurmCluster(3) as started:
        for name, value in started.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        yield started
        monkeypatch.undo()


def _wait_for(happened: Callable[[], bool], cluster: SlurmCluster, run: str, timeout_s: float = 240) -> None:
    deadline = time.monotonic() + timeout_s
    while not happened():
        if time.monotonic() > deadline:
            log = runs_folder() / run / "train.log"
            said = log.read_text(errors="replace")[-6000:] if log.exists() else "nothing"
            raise AssertionError(f"{record_of(run).status()}\n{said}\n{cluster.log()}")
        time.sleep(0.05)


def _step(run: str) -> int:
    metrics = runs_folder() / run / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def _saved(run: str) -> int:
    folders = checkpoint.folders(runs_folder() / run)
    return checkpoint.step_of(folders[0]) if folders else 0


def _finished(run: str) -> bool:
    return record_of(run).status().state == "finished"


def _losses(run: str) -> list[float]:
    return [row["loss"] for row in record_of(run).metrics()]


def _nodes(run: str) -> list[str]:
    """The nodes of a run's job, the first one first."""
    submission = read_submission(runs_folder() / run)
    assert submission is not None
    listed = subprocess.run(
        ["squeue", "-h", "-j", submission.job, "-o", "%N"], capture_output=True, text=True
    ).stdout.strip()
    names = subprocess.run(["scontrol", "show", "hostnames", listed], capture_output=True, text=True, check=True)
    return names.stdout.split()


def _kill(process: psutil.Process) -> None:
    """Kill a process that may have gone meanwhile."""
    try:
        process.send_signal(signal.SIGKILL)
    except psutil.NoSuchProcess:
        return


def _events(run: str) -> dict[str, list[dict[str, Any]]]:
    return node_events(runs_folder() / run)


@pytest.mark.slow
def test_a_run_that_loses_a_node_is_requeued_and_ends_with_the_weights_of_an_undisturbed_one(
    cluster: SlurmCluster, make_run: MakeRun, write_run: WriteRun, modelworks: Modelworks
) -> None:
    steps = 120
    submitted = modelworks("train", write_run(make_run("lost", steps)), "--on", "slurm", "--json")
    assert submitted["nodes"] == 2
    _wait_for(lambda: _step("lost") >= 20 and _saved("lost") >= 10, cluster, "lost")
    _, victim = _nodes("lost")
    killed = cluster.processes_of(victim)
    assert len(killed) >= 3, "the node's daemon, its step and its task"
    for process in killed:
        _kill(process)
    reached = _step("lost")
    assert reached < steps

    _wait_for(lambda: _finished("lost"), cluster, "lost", timeout_s=420)
    submission = read_submission(runs_folder() / "lost")
    assert submission is not None
    assert submission.job == submitted["job"], "the same job was requeued"
    began = {node: [e["attempt"] for e in events if e["event"] == "began"] for node, events in _events("lost").items()}
    assert all(f"{submission.job}.1" in attempts for node, attempts in began.items() if node != victim), began
    assert f"{submission.job}.1" not in began[victim]

    modelworks("train", write_run(make_run("whole", steps)), "--nproc", "2")
    assert _losses("lost") == _losses("whole")
    weights = tensors_of("lost", steps)
    assert len(weights) > 50
    assert weights == tensors_of("whole", steps)


@pytest.mark.slow
def test_a_job_that_is_told_to_go_saves_and_is_requeued_and_one_that_is_stopped_waits_to_be_resumed(
    cluster: SlurmCluster, make_run: MakeRun, write_run: WriteRun, modelworks: Modelworks
) -> None:
    steps = 250
    path = write_run(make_run("told", steps, checkpoint={"every_steps": 100_000}))
    job = modelworks("train", path, "--on", "slurm", "--json")["job"]
    _wait_for(lambda: _step("told") >= 5, cluster, "told")
    # What Slurm sends before the time limit goes to the tasks in the same way.
    subprocess.run(["scancel", "--signal=TERM", job], check=True)
    _wait_for(lambda: _saved("told") > 0, cluster, "told")
    saved = _saved("told")
    _wait_for(lambda: _step("told") > saved, cluster, "told")

    stopped = modelworks("runs", "stop", "told", "--json", "--wait", "120")
    assert (stopped["state"], stopped["ended"]) == ("stopped", True)
    again = _saved("told")
    assert saved < again < steps
    assert again == len(record_of("told").metrics())
    listed = subprocess.run(["squeue", "-h", "-o", "%i"], capture_output=True, text=True, check=True)
    assert listed.stdout.split() == []

    said = modelworks("runs", "resume", "told")["text"]
    assert "slurm's job" in said
    _wait_for(lambda: _finished("told"), cluster, "told")
    assert [row["step"] for row in record_of("told").metrics()] == list(range(1, steps + 1))
    _wait_for(lambda: "told finished after 250 steps" in record_of("told").log(), cluster, "told")
    assert "told finished after 250 steps" in modelworks("runs", "log", "told")["text"]


@pytest.mark.slow
def test_a_node_whose_task_is_killed_in_two_attempts_is_left_out_of_the_third(
    cluster: SlurmCluster, make_run: MakeRun, write_run: WriteRun, modelworks: Modelworks
) -> None:
    steps = 120
    modelworks("train", write_run(make_run("bad-node", steps)), "--on", "slurm", "--json")
    for wanted in (10, 25):
        _wait_for(
            lambda wanted=wanted: _step("bad-node") >= wanted and bool(cluster.tasks_of("n2")), cluster, "bad-node"
        )
        for task in cluster.tasks_of("n2"):
            _kill(task)
        _wait_for(lambda: not cluster.tasks_of("n2"), cluster, "bad-node")
    _wait_for(lambda: _finished("bad-node"), cluster, "bad-node", timeout_s=420)
    folder = runs_folder() / "bad-node"
    submission = read_submission(folder)
    assert submission is not None
    assert failing_nodes(folder, 2) == submission.excluded == ["n2"]
    assert [event["event"] for event in node_events(folder)["n2"]] == ["began", "vanished", "began", "vanished"]
    assert "n3" in node_events(folder)
    assert [row["step"] for row in record_of("bad-node").metrics()] == list(range(1, steps + 1))


@pytest.mark.slow
def test_slurm_itself_accepts_every_option_that_a_script_can_have(cluster: SlurmCluster, make_run: MakeRun) -> None:
    launch = {
        "time": "2h",
        "cpus_per_node": 2,
        "memory_per_node": "1000MiB",
        "environment": {"NAME": "two words"},
        "setup": ["true"],
        "slurm": {"partition": "main", "switches": 1, "array": 3, "options": ["--nice=10"]},
    }
    spec = make_run("options", 10, launch)
    text = script(spec, runs_folder() / "options", ["n3"])
    tested = subprocess.run(["sbatch", "--test-only"], input=text, capture_output=True, text=True)
    assert tested.returncode == 0, tested.stderr
    assert "using 4 processors on nodes n[1-2]" in tested.stderr


@pytest.mark.slow
def test_a_job_that_slurm_refuses_leaves_nothing_behind(
    cluster: SlurmCluster, make_run: MakeRun, write_run: WriteRun, home: Path
) -> None:
    path = write_run(make_run("refused", 10, {"slurm": {"partition": "nowhere"}}))
    done = subprocess.run(
        [sys.executable, "-m", "modelworks", "train", str(path), "--on", "slurm"], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "Invalid partition name specified" in " ".join(done.stderr.split())
    assert not (runs_folder() / "refused").exists()


def test_a_dry_run_prints_the_whole_script_and_writes_nothing(home: Path, tmp_path: Path) -> None:
    path = tmp_path / "big.toml"
    path.write_text(
        'name = "big"\nmodel = "grok-1"\n[train]\nglobal_batch = 1024\n[cluster]\npreset = "h100-superpod"\n'
        'gpus = 256\n[launch]\ntime = "1d"\n[launch.slurm]\naccount = "research"\nswitches = 1\n'
    )
    done = subprocess.run(
        [sys.executable, "-m", "modelworks", "train", str(path), "--on", "slurm", "--dry-run"],
        capture_output=True,
        text=True,
        env={key: value for key, value in os.environ.items() if key != "PATH"} | {"PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    wanted = {
        "#SBATCH --nodes=32",
        "#SBATCH --gpus-per-node=8",
        "#SBATCH --ntasks-per-node=1",
        "#SBATCH --requeue",
        "#SBATCH --signal=TERM@180",
        "#SBATCH --time=1-00:00:00",
        "#SBATCH --switches=1@0-00:10:00",
        "#SBATCH --account=research",
    }
    assert wanted <= set(lines)
    assert subprocess.run(["bash", "-n"], input=done.stdout, text=True, capture_output=True).returncode == 0
    assert not runs_folder().exists()


def test_words_in_a_spec_cannot_become_shell_commands(make_run: MakeRun, tmp_path: Path) -> None:
    launch = {"environment": {"NAME": "$(touch pwned); `touch pwned` '\""}}
    text = script(make_run("shell", 10, launch), tmp_path / "a folder; touch pwned", [])
    only_exports = "\n".join(line for line in text.splitlines() if line.startswith("export NAME"))
    done = subprocess.run(
        ["bash", "-c", only_exports + '\nprintf %s "$NAME"'], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert done.stdout == launch["environment"]["NAME"]
    assert "'" + str(tmp_path / "a folder; touch pwned") + "'" in text
    assert list(tmp_path.glob("pwned")) == []


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--on", "slurm", "--nodes", "0"], "--nodes 0 is not accepted"),
        (["--on", "slurm", "--nodes", "3"], "launch.nodes = 3 doesn't divide cluster.gpus = 2"),
        (["--on", "moon"], "--on moon is not accepted: local, slurm, kubernetes, ray are"),
        (["--nodes", "2"], "--nodes 2 is not accepted: this machine is one node"),
        (["--on", "slurm", "--dry-run", "--rank", "1"], "--rank 1 is not accepted here"),
        (["--out", "job.sh"], "job.sh is not accepted here"),
        (["--on", "slurm", "--set", 'launch.slurm.options=["nice"]'], "'nice' is not accepted"),
    ],
)
def test_bad_options_are_one_sentence(
    typed: Typed, make_run: MakeRun, write_run: WriteRun, options: list[str], sentence: str
) -> None:
    done = typed("train", write_run(make_run("bad", 10, {"nodes": 1})), *options)
    assert done.returncode == 2, done.stderr
    assert sentence in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
