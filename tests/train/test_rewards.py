"""What replies are worth: answers, format, and code that is run in the sandbox against tests."""

from __future__ import annotations

import time

import psutil
import pytest

from modelworks import sandbox
from modelworks.data.dialogues import Dialogue
from modelworks.data.tasks import Task
from modelworks.spec.errors import OperationError
from modelworks.spec.reinforcement import RewardsSpec
from modelworks.train import rewards
from modelworks.train.rewards import answer_in, code_in, follows_format, is_answer, passes_tests, values, values_of

MARKS = ["<answer>", "</answer>"]
ASKED = Dialogue([{"role": "user", "content": "?"}], "f", 1)
sandboxed = pytest.mark.skipif(sandbox.unavailable() is not None, reason=str(sandbox.unavailable()))


@pytest.mark.parametrize(
    ("reply", "given", "follows"),
    [
        ("I add. <answer>46</answer>", "46", 1),
        ("<answer> 46 </answer>\n", "46", 1),
        ("<answer>46</answer> or so", "46", 0),
        ("<answer>45</answer><answer>46</answer>", "46", 0),
        ("<answer>46", None, 0),
        ("46</answer>", None, 0),
        ("<answer></answer>", "", 0),
        ("46", None, 0),
        ("", None, 0),
    ],
)
def test_an_answer_is_what_stands_between_the_marks(reply: str, given: str | None, follows: int) -> None:
    assert answer_in(reply, MARKS) == given
    assert follows_format(reply, MARKS) == follows


def test_without_marks_the_last_number_is_the_answer() -> None:
    assert answer_in("12 and 34 make 46.", []) == "46"
    assert answer_in("1,234.5", []) == "1,234.5"
    assert answer_in(" blue ", []) == "blue"


@pytest.mark.parametrize(
    ("given", "expected", "right"),
    [
        ("46", "46", 1), ("46.0", "46", 1), ("1,046", "1046", 1), ("-7", "-7", 1), ("+46", "46", 1),
        ("47", "46", 0), ("forty-six", "46", 0), ("nan", "46", 0), ("4 6", "46", 0),
        ("Blue", "blue", 1), ("dark  blue", "Dark blue", 1), ("blue!", "blue", 0), ("nan", "nan", 1),
    ],
)  # fmt: skip
def test_a_right_answer_is_the_same_number_or_the_same_words(given: str, expected: str, right: int) -> None:
    assert is_answer(f"<answer>{given}</answer>", expected, MARKS) == right
    assert is_answer(given, expected, MARKS) == 0


def test_a_reply_is_worth_the_weighted_sum_of_what_its_task_has() -> None:
    task, spec = Task(ASKED, "46", ()), RewardsSpec(answer=2.0, format=0.5)
    assert values(task, "<answer>46</answer>", spec) == {"answer": 1.0, "format": 1.0, "reward": 2.5}
    assert values(task, "<answer>45</answer>", spec) == {"answer": 0.0, "format": 1.0, "reward": 0.5}
    assert values(task, "46", RewardsSpec(marks=[], format=0.0)) == {"answer": 1.0, "reward": 1.0}


def test_code_is_the_last_fenced_block_or_the_whole_reply() -> None:
    assert code_in("So:\n```python\nx = 1\n```\nor\n```\nx = 2\n```\n") == "x = 2\n"
    assert code_in("x = 3") == "x = 3"


TESTS = ["assert twice(2) == 4", "assert twice('a') == 'aa'"]
RIGHT = "```python\ndef twice(x):\n    return 2 * x\n```"


@sandboxed
@pytest.mark.parametrize(
    ("reply", "passed"),
    [
        (RIGHT, 1),
        ("def twice(x):\n    return 2 * x", 1),
        ("def twice(x):\n    return 4", 0),
        ("def thrice(x):\n    return 3 * x", 0),
        ("Here you are!", 0),
        ("import sys\nsys.exit(0)", 0),
        ("import os\ndef twice(x):\n    os._exit(0)", 0),
        ("exec = print = lambda *_: None\ndef twice(x): return 4", 0),
        ("print('passed')\ndef twice(x): return 4", 0),
        ("def twice(x):\n    return 'x' * (1 << 40)", 0),
        ("import socket\nsocket.create_connection(('127.0.0.1', 80))\ndef twice(x): return 2 * x", 0),
        ("raise SystemExit", 0),
        ("\ud800", 0),
    ],
)
def test_code_is_worth_something_if_all_tests_pass_with_it(reply: str, passed: int) -> None:
    assert passes_tests(reply, TESTS, 60.0) == passed


@sandboxed
def test_code_without_end_and_code_that_multiplies_are_ended_with_all_that_they_started() -> None:
    begun = time.monotonic()
    endless = "while True:\n    pass"
    bomb = "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass"
    asked = [Task(ASKED, None, ("assert True",))] * 2
    found = values_of(asked, [endless, bomb], RewardsSpec(tests_time=2.0))
    assert [one["tests"] for one in found] == [0.0, 0.0]
    assert time.monotonic() - begun < 60
    assert not [one for one in psutil.Process().children(recursive=True) if "bwrap" in one.name()]


def test_code_is_never_run_where_there_is_no_sandbox(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[object] = []
    monkeypatch.setattr(sandbox.execution, "unavailable", lambda: "code is not run: no bwrap")
    monkeypatch.setattr(sandbox, "unavailable", lambda: "code is not run: no bwrap")
    monkeypatch.setattr(sandbox.execution.subprocess, "Popen", lambda *given, **_: started.append(given))
    with pytest.raises(OperationError, match=r"data\.files has tasks with tests, .*: code is not run: no bwrap"):
        rewards.refuse_without_sandbox()
    with pytest.raises(OperationError, match="no bwrap"):
        passes_tests(RIGHT, TESTS, 5.0)
    assert not started
