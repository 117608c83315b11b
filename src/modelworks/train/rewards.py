"""What a reply to a task is worth: small functions from texts to a value from 0 to 1, and their weighted sum.

A model that is rewarded finds what the reward overlooks. So an answer counts where it stands between the marks and
nowhere else, and passed tests say so by a word that the reply's code isn't given: code that ends the program early, or
prints that all is well, has passed nothing.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal, InvalidOperation
from itertools import repeat

from modelworks import sandbox
from modelworks.data.tasks import Task
from modelworks.spec.errors import OperationError
from modelworks.spec.reinforcement import RewardsSpec

_NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?")
_CODE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)```", re.DOTALL)
_MODULE = "reply.py"
_CHECK = """
run, say, word, space = exec, print, input(), {{}}
run("from reply import *", space)
for test in {tests!r}:
    run(test, space)
say(word)
"""
"""The program that is run: what the reply names anew is not what runs the tests."""
_MEMORY_BYTES = 256 << 20
_PROCESSES = 8


def follows_format(reply: str, marks: Sequence[str]) -> float:
    """1 if something stands between the marks, each of them once, and nothing behind them."""
    opening, closing = marks
    _, opened, rest = reply.partition(opening)
    inside, closed, behind = rest.partition(closing)
    stands = opened and closed and inside.strip() and not behind.strip()
    return float(bool(stands) and opening not in rest and reply.count(closing) == 1)


def answer_in(reply: str, marks: Sequence[str]) -> str | None:
    """What stands between the last opening mark and the closing one; without marks, the last number or else all."""
    if not marks:
        numbers = _NUMBER.findall(reply)
        return numbers[-1] if numbers else reply.strip()
    _, opened, rest = reply.rpartition(marks[0])
    inside, closed, _ = rest.partition(marks[1])
    return inside.strip() if opened and closed else None


def is_answer(reply: str, expected: str, marks: Sequence[str]) -> float:
    """1 if the reply's answer is the expected one: the same number however written, else the same words in any case."""
    given = answer_in(reply, marks)
    if given is None:
        return 0.0
    numbers = [_number(text) for text in (given, expected)]
    if numbers[1] is not None:
        return float(numbers[0] == numbers[1])
    return float(given.casefold().split() == expected.casefold().split())


def code_in(reply: str) -> str:
    """The last fenced block of Python in a reply, or all of it."""
    blocks = _CODE.findall(reply)
    return str(blocks[-1]) if blocks else reply


def passes_tests(reply: str, tests: Sequence[str], time_s: float) -> float:
    """1 if the reply's code runs and every test with it, each of them raising nothing, in the sandbox and within its
    limits: so much time, 256 MiB of memory, 8 processes, no network.

    Raises
    ------
    OperationError
        If there can't be a sandbox here; nothing is run without one.
    """
    word = secrets.token_hex(16)
    limits = sandbox.Limits(
        wall_s=time_s,
        cpu_s=max(1, round(time_s)),
        memory_bytes=_MEMORY_BYTES,
        disk_bytes=16 << 20,
        file_bytes=8 << 20,
        output_bytes=64 << 10,
        processes=_PROCESSES,
    )
    result = sandbox.run(_CHECK.format(tests=list(tests)), limits, stdin=f"{word}\n", files={_MODULE: code_in(reply)})
    return float(result.exit_code == 0 and result.stdout.endswith(f"{word}\n"))


def refuse_without_sandbox() -> None:
    """Raise `OperationError` if code can't be run here."""
    if (missing := sandbox.unavailable()) is not None:
        raise OperationError(f"data.files has tasks with tests, which replies' code is to be run for: {missing}")


def values(task: Task, reply: str, spec: RewardsSpec) -> dict[str, float]:
    """The values of a reply that its task has, by the names of their weights, and their weighted sum as `reward`."""
    found: dict[str, float] = {}
    if task.tests:
        found["tests"] = passes_tests(reply, task.tests, spec.tests_time)
    if task.answer is not None:
        found["answer"] = is_answer(reply, task.answer, spec.marks)
        if spec.marks:
            found["format"] = follows_format(reply, spec.marks)
    return found | {"reward": sum(getattr(spec, name) * value for name, value in found.items())}


def values_of(tasks: Sequence[Task], replies: Sequence[str], spec: RewardsSpec) -> list[dict[str, float]]:
    """The values of several replies, in order; codes run side by side, on as many cores as there are."""
    if not any(task.tests for task in tasks):
        return [values(task, reply, spec) for task, reply in zip(tasks, replies, strict=True)]
    with ThreadPoolExecutor(os.cpu_count() or 1) as threads:
        return list(threads.map(values, tasks, replies, repeat(spec)))


def _number(text: str) -> Decimal | None:
    try:
        number = Decimal(text.replace(",", "").strip())
    except InvalidOperation:
        return None
    return number if number.is_finite() else None
