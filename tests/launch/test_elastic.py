"""Processes under the agent: who failed first, who hangs, and what ends the work."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from modelworks.launch.elastic import Processes
from modelworks.train.worker import PRELOADED

pytestmark = pytest.mark.slow
SCRIPT = """
import os, pathlib, signal, sys, time
folder, rank = pathlib.Path(sys.argv[1]), int(os.environ["RANK"])
attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
(folder / f"pid-{rank}-{attempt}").write_text(str(os.getpid()))
"""


class Named:
    """A watch that names a process once its file is there."""

    def __init__(self, file: Path, number: int) -> None:
        self._file, self._number, self.starts = file, number, 0

    def started(self) -> None:
        self.starts += 1

    def hung(self) -> Mapping[int, str]:
        return {self._number: "stood still"} if self.starts == 1 and self._file.exists() else {}


Run = Callable[..., Processes]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    """Runs a script on three processes until it has ended."""
    started: list[Processes] = []

    def start(code: str, watch: Named | None = None, progress: Callable[[], float] = lambda: 0.0) -> Processes:
        script = tmp_path / "script.py"
        script.write_text(SCRIPT + code)
        assert sys.executable
        # What the other tests' processes need, which come from the same server.
        work = Processes([str(script), str(tmp_path)], 3, tmp_path / "logs", {2, 3}, progress, watch, preload=PRELOADED)
        started.append(work)
        deadline = time.monotonic() + 90
        while not work.wait(0.1):
            assert time.monotonic() < deadline
        return work

    yield start
    for work in started:
        work.kill()


def test_a_hung_process_is_killed_named_and_all_are_started_again(
    run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    code = "if attempt == 0: time.sleep(600)\n"
    watch = Named(tmp_path / "pid-2-0", 2)
    work = run(code, watch)
    assert (work.failure, work.restarts, watch.starts) == (None, 1, 2)
    assert "process 2 stood still and was killed; all are started again" in caplog.text


def test_a_process_that_is_stopped_does_not_hold_up_the_others_start(run: Run) -> None:
    # The first one is killed, the second is stopped and so hears no request to end.
    code = """
if attempt == 0:
    if rank == 1: os.kill(os.getpid(), signal.SIGSTOP)
    if rank == 0: time.sleep(1); os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)
"""
    begun = time.monotonic()
    work = run(code)
    assert (work.failure, work.restarts) == (None, 1)
    assert time.monotonic() - begun < 25  # torchrun's own patience with such a process is 30 s.


def test_of_several_failures_the_final_one_is_told(run: Run) -> None:
    code = "time.sleep(0.1 * rank); print(f'word {rank}', file=sys.stderr); sys.exit(3 if rank == 2 else 1)"
    failure = run(code).failure
    assert failure is not None
    assert (failure.rank, failure.exit_code, failure.last_words) == (2, 3, "word 2")


def test_attempts_that_get_nowhere_are_given_up(run: Run) -> None:
    work = run("sys.exit(7 if rank == 1 else 0)")
    assert work.failure is not None
    assert (work.failure.rank, work.failure.exit_code, work.restarts) == (1, 7, 2)


def test_progress_earns_another_attempt(run: Run, tmp_path: Path) -> None:
    def attempts() -> float:
        return float(len(list(tmp_path.glob("pid-0-*"))))

    work = run("sys.exit(7 if attempt < 5 else 0)", progress=attempts)
    assert (work.failure, work.restarts) == (None, 5)
