"""What a run's folder says of its nodes: who failed, who is left out, and when a run is given up."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from modelworks.launch import health
from modelworks.launch.submission import (
    NodeLog,
    Submission,
    failing_nodes,
    futile,
    node_events,
    note_vanished,
    read_submission,
    versions,
)
from modelworks.spec.files import dumps
from modelworks.spec.run import RunSpec

MakeRun = Callable[..., RunSpec]


def test_a_submission_is_read_as_it_was_written(tmp_path: Path) -> None:
    given = Submission("slurm", "12", excluded=["n1"], versions=versions(), details={"namespace": "a"})
    given.write(tmp_path)
    assert read_submission(tmp_path) == given
    assert read_submission(tmp_path / "elsewhere") is None


def test_only_a_node_that_neither_ended_nor_was_told_to_has_vanished(tmp_path: Path) -> None:
    for node, rest in {"ended": ["ended"], "told": ["told to end"], "gone": [], "unfit": ["unhealthy"]}.items():
        log = NodeLog(tmp_path, node, "1.0")
        for event in ["began", *rest] if node != "unfit" else rest:
            log.write(event)  # type: ignore[arg-type]
    for _ in range(2):
        note_vanished(tmp_path, "1.0")
    assert failing_nodes(tmp_path, 1) == ["gone", "unfit"]
    assert [event["event"] for event in node_events(tmp_path)["gone"]] == ["began", "vanished"]


def test_failures_are_counted_by_attempt(tmp_path: Path) -> None:
    for attempt in ("1.0", "1.0", "1.1"):
        NodeLog(tmp_path, "bad", attempt).write("lost a process")
    NodeLog(tmp_path, "unlucky", "1.0").write("lost a process")
    assert failing_nodes(tmp_path, 2) == ["bad"]
    assert failing_nodes(tmp_path, 3) == []


def test_a_line_that_broke_off_is_passed_over(tmp_path: Path) -> None:
    NodeLog(tmp_path, "n1", "1.0").write("began")
    with (tmp_path / "nodes" / "n1.jsonl").open("a") as file:
        file.write('{"time": 12')
    assert [event["event"] for event in node_events(tmp_path)["n1"]] == ["began"]


def test_attempts_without_a_newer_checkpoint_are_counted_from_the_last_one_back(tmp_path: Path) -> None:
    def begin(attempt: str) -> int:
        NodeLog(tmp_path, "n1", attempt).write("began")
        return futile(tmp_path, attempt)

    assert [begin(f"7.{number}") for number in range(3)] == [0, 1, 2]
    (tmp_path / "checkpoints" / "step-00000010").mkdir(parents=True)
    assert begin("7.3") == 0
    assert begin("7.4") == 1
    assert begin("8.0") == 0, "a run that was submitted anew is tried anew"


@pytest.fixture
def folder(make_run: MakeRun, tmp_path: Path) -> Callable[..., Path]:
    def prepared(**launch: object) -> Path:
        (tmp_path / "run.toml").write_text(dumps(make_run("checked", 10, dict(launch))))
        return tmp_path

    return prepared


def test_a_fit_node_passes_the_health_check(folder: Callable[..., Path]) -> None:
    run = folder()
    Submission("slurm", "1", versions=versions()).write(run)
    assert health.main([str(run), "--node", "n1", "--attempt", "1.0"]) == 0
    assert failing_nodes(run, 1) == []


@pytest.mark.parametrize(
    ("launch", "expected", "sentence"),
    [
        ({"free_disk": 1 << 60}, {}, "bytes left, and launch.free_disk asks for 1,152,921,504,606,846,976"),
        ({"free_memory": 1 << 60}, {}, "bytes of memory are free, and launch.free_memory asks for"),
        ({}, {"torch": "1.0"}, "torch is 2.13"),
    ],
)
def test_what_a_node_lacks_is_said_and_counts_against_it(
    folder: Callable[..., Path],
    capfd: pytest.CaptureFixture[str],
    launch: dict[str, int],
    expected: dict[str, str],
    sentence: str,
) -> None:
    run = folder(**launch)
    Submission("slurm", "1", versions={**versions(), **expected}).write(run)
    assert health.main([str(run), "--node", "n1", "--attempt", "1.0"]) == health.UNHEALTHY
    assert sentence in capfd.readouterr().err
    assert failing_nodes(run, 1) == ["n1"]


def test_a_run_that_gets_no_further_is_given_up(folder: Callable[..., Path], capfd: pytest.CaptureFixture[str]) -> None:
    run = folder(attempts=2)
    Submission("slurm", "1", versions=versions()).write(run)
    for number in range(2):
        NodeLog(run, "n1", f"1.{number}").write("began")
    assert health.main([str(run), "--node", "n1", "--attempt", "1.2"]) == health.GIVEN_UP
    assert "given up: 2 attempts in a row" in capfd.readouterr().err
