"""Signs of life: who is late, by the looker's own clock."""

import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))
from processes import together

from modelworks.train import watchdog
from modelworks.train.ranks import Ranks
from modelworks.train.watchdog import Pulse, Watchdog, limit_s, patience_s, pulse_file


class Clock:
    """A monotonic clock that the test moves on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(watchdog.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def _signs(
    folder: Path, number: int, alive: int, loop: int, patience: float = math.inf, waits: bool = False, place: str = ""
) -> None:
    pulse_file(folder, number).write_bytes(watchdog._SIGNS.pack(alive, loop, patience, waits, place.encode()))


def _look(dog: Watchdog, clock: Clock, seconds: float) -> dict[int, str]:
    clock.now += seconds
    return dict(dog.hung())


def test_a_process_without_a_sign_of_life_is_late_and_one_in_a_long_step_is_not(tmp_path: Path, clock: Clock) -> None:
    dog = Watchdog(tmp_path, 2, limit_s=10.0)
    dog.started()
    for beat in range(12):
        _signs(tmp_path, 0, alive=beat, loop=3)
        _signs(tmp_path, 1, alive=min(beat, 5), loop=3)
        late = _look(dog, clock, 2.0)
        assert set(late) == ({1} if beat > 10 else set())
    assert late[1] == "has given no sign of life for 12 s"


def test_of_loops_that_stand_still_together_the_first_one_is_named(tmp_path: Path, clock: Clock) -> None:
    dog = Watchdog(tmp_path, 3, limit_s=10.0)
    dog.started()
    late: dict[int, str] = {}
    for beat in range(8):
        for number in range(3):
            _signs(tmp_path, number, alive=beat, loop=min(beat, 1 if number == 2 else 2), patience=10.0)
        late = late or _look(dog, clock, 2.0)
    assert late == {2: "has been in one step for 12 s"}


def test_of_loops_that_stand_still_together_the_one_that_does_not_wait_is_named(tmp_path: Path, clock: Clock) -> None:
    dog = Watchdog(tmp_path, 3, limit_s=10.0)
    dog.started()
    late: dict[int, str] = {}
    for beat in range(9):
        for number in range(3):
            # The others have been in the step for longer.
            loop = min(beat, 2 if number == 1 else 1)
            place = "modelworks.data.packed.sequences" if number == 1 else "torch.distributed.all_reduce"
            _signs(tmp_path, number, beat, loop, 10.0, waits=number != 1, place=place)
        late = late or _look(dog, clock, 2.0)
    assert late == {1: "has been in one step for 12 s, in modelworks.data.packed.sequences"}


def test_of_loops_that_stand_still_together_one_that_is_stopped_is_named_before_its_time(
    tmp_path: Path, clock: Clock
) -> None:
    dog = Watchdog(tmp_path, 3, limit_s=10.0)
    dog.started()
    late: dict[int, str] = {}
    for beat in range(8):
        for number in range(3):
            _signs(tmp_path, number, min(beat, 3) if number == 1 else beat, 1, 10.0, waits=number == 1)
        late = late or _look(dog, clock, 2.0)
    assert late == {1: "has been in one step for 12 s, without a sign of life for 6 s"}


def test_where_all_wait_the_one_that_hangs_elsewhere_has_its_time_before_one_of_them_is_named(
    tmp_path: Path, clock: Clock
) -> None:
    dog = Watchdog(tmp_path, 2, limit_s=10.0)
    dog.started()
    looks = []
    for beat in range(14):
        for number in range(2):
            _signs(tmp_path, number, beat, 1, 10.0, waits=True)
        looks.append(bool(_look(dog, clock, 2.0)))
    assert looks.index(True) == 11  # after 22 s; the first look only begins to count


def hang(ranks: Ranks, folder: Path, kind: str) -> None:
    """Exchange something again and again; the second process comes to a stand in the fourth exchange."""
    pulse = Pulse(pulse_file(folder, ranks.rank))
    exchange, pid = dist.all_reduce, os.getpid()

    def stuck(*arguments: Any, **named: Any) -> Any:
        if kind == "asleep":
            time.sleep(9)
        else:
            subprocess.Popen(["/bin/sh", "-c", f"sleep 9; kill -CONT {pid}"])
            os.kill(pid, signal.SIGSTOP)
        return exchange(*arguments, **named)

    for step in range(6):
        pulse.beat(3.0)
        time.sleep(0.1 * ranks.rank)
        try:
            dist.all_reduce = stuck if step == 3 and ranks.rank == 1 else exchange
            ranks.sum(torch.ones(3))
        finally:
            dist.all_reduce = exchange
    pulse.beat(math.inf)


@pytest.mark.parametrize("kind", ["asleep", "stopped"])
def test_of_real_processes_the_one_that_hangs_in_an_exchange_is_named(tmp_path: Path, kind: str) -> None:
    """Those that wait for it have been in the step as long."""
    named: list[dict[int, str]] = []
    done = threading.Event()

    def look() -> None:
        dog = Watchdog(tmp_path, 3, limit_s=6.0)
        dog.started()
        while not done.wait(0.2):
            if late := dict(dog.hung()):
                named.append(late)

    looker = threading.Thread(target=look)
    looker.start()
    try:
        together(3, hang, tmp_path, kind)
    finally:
        done.set()
        looker.join()
    assert named
    assert set(named[0]) == {1}, named
    assert ("stuck" if kind == "asleep" else "without a sign of life") in named[0][1]


def test_a_process_that_never_gives_a_sign_is_late_after_a_minute(tmp_path: Path, clock: Clock) -> None:
    dog = Watchdog(tmp_path, 1, limit_s=10.0)
    dog.started()
    late = [bool(_look(dog, clock, 2.0)) for _ in range(32)]
    assert late.index(True) == 30


def test_a_look_that_comes_late_itself_counts_for_nothing(tmp_path: Path, clock: Clock) -> None:
    dog = Watchdog(tmp_path, 1, limit_s=10.0)
    dog.started()
    _signs(tmp_path, 0, alive=1, loop=1, patience=10.0)
    assert not _look(dog, clock, 1.0)
    assert not _look(dog, clock, 3600.0)  # The machine slept.
    assert [bool(_look(dog, clock, 2.0)) for _ in range(6)] == [False] * 5 + [True]


def test_processes_that_were_started_again_have_all_their_time(tmp_path: Path, clock: Clock) -> None:
    dog = Watchdog(tmp_path, 1, limit_s=10.0)
    dog.started()
    _signs(tmp_path, 0, alive=1, loop=1, patience=10.0)
    for _ in range(6):
        late = _look(dog, clock, 2.0)
    assert not late
    dog.started()
    assert not _look(dog, clock, 2.0)


@pytest.mark.parametrize(("hang", "seconds"), [("auto", 30.0), (5.0, 5.0), (0, math.inf)])
def test_the_limit_is_the_specs(hang: float, seconds: float) -> None:
    assert limit_s(hang) == seconds  # type: ignore[arg-type]


def test_a_step_may_take_ten_times_the_longest_of_the_last_ones_and_the_first_as_long_as_they_like() -> None:
    assert patience_s(5.0, [9.0, 9.0]) == math.inf
    assert patience_s(5.0, [1.0, 4.0, 2.0]) == 40.0
    assert patience_s(50.0, [1.0, 4.0, 2.0]) == 50.0
    assert patience_s(0, [1.0, 4.0, 2.0]) == math.inf


def test_a_process_beats_by_itself_until_it_is_stopped(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from modelworks.train.watchdog import Pulse; "
        "Pulse(Path(sys.argv[1])); print('up', flush=True); time.sleep(600)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(pulse_file(tmp_path, 0))], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        dog = Watchdog(tmp_path, 1, limit_s=4.0)
        deadline = time.monotonic() + 6
        while time.monotonic() < deadline:
            assert not dog.hung()
            time.sleep(0.2)
        process.send_signal(signal.SIGSTOP)
        deadline = time.monotonic() + 60
        while not dog.hung():
            assert time.monotonic() < deadline
            time.sleep(0.2)
        assert psutil.Process(process.pid).status() == psutil.STATUS_STOPPED
    finally:
        process.kill()
        process.communicate()


def test_the_loop_says_how_long_it_will_be(tmp_path: Path) -> None:
    pulse = Pulse(pulse_file(tmp_path, 0))
    pulse.beat(12.5)
    pulse.beat(7.5)
    _, loop, patience, *_ = watchdog._SIGNS.unpack(pulse_file(tmp_path, 0).read_bytes())
    assert (loop, patience) == (2, 7.5)
