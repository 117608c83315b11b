"""Tasks whose answers can be checked: prompts as the chat template writes them, and what a reply is held against.

A task is a JSON record ``{"prompt": ..., "answer": ...}`` or ``{"prompt": ..., "tests": [...]}``. The prompt is a text,
which is then the user's, or messages (also as ``messages``); the answer a text or a number; the tests are Python, each
of which passes if it raises nothing. Arithmetic is made up instead where there are no files: the problem of a number is
always the same, and one that comes twice is left out, so that none that is held out is trained on.

What is kept is a prompt's tokens up to where the reply begins, and beside them ``SPLIT.tasks.jsonl`` with the rest.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, BinaryIO, ClassVar

import numpy as np

from modelworks.data.dialogues import Dialogue, DialoguePacking, dialogue_from
from modelworks.data.order import shuffled
from modelworks.data.packed import SPLITS, PackedDataset, Split, SplitWriter
from modelworks.data.records import BadRecord, Make
from modelworks.data.templates import TemplateProcess
from modelworks.spec.errors import InputError, OperationError
from modelworks.spec.reinforcement import TasksSpec

_STAND_IN = {"role": "assistant", "content": "0"}
"""Where the template opens a reply and ends it shows in a dialogue that has one."""


@dataclass(frozen=True)
class Task:
    """What is asked, and what a reply is held against: an answer or tests."""

    asked: Dialogue
    answer: str | None
    tests: tuple[str, ...]
    prompt: tuple[int, ...] = ()
    """Once it is prepared: tokens up to where the reply begins."""

    @property
    def utf8(self) -> bytes:
        """What is asked as text, by which a task is told from others."""
        return self.asked.utf8


def task_from(value: Any, file: str, line: int) -> Task | BadRecord:
    """The task in one record of JSON."""
    if not isinstance(value, dict):
        return BadRecord(file, line, "no task: a record with 'prompt' and either 'answer' or 'tests' is needed")
    given, answer, tests = value.get("messages", value.get("prompt")), value.get("answer"), value.get("tests")
    messages = [{"role": "user", "content": given}] if isinstance(given, str) else given
    if not isinstance(messages, list):
        return BadRecord(file, line, "no task: a prompt, as 'messages' or 'prompt', is needed")
    if (answer is None) == (tests is None):
        return BadRecord(file, line, "no task: either 'answer' or 'tests' is needed")
    asked = dialogue_from({"messages": [*messages, _STAND_IN]}, file, line)
    if isinstance(asked, BadRecord):
        return asked
    if [one["role"] for one in asked.messages[-2:-1]] != ["user"]:
        return BadRecord(file, line, "the prompt's last message isn't the user's, which is needed")
    asked = replace(asked, messages=asked.messages[:-1])
    if answer is not None:
        if isinstance(answer, bool) or not isinstance(answer, str | int | float) or not str(answer).strip():
            return BadRecord(file, line, f"the answer is {answer!r}: a text or a number is needed")
        return Task(asked, str(answer), ())
    tests = [tests] if isinstance(tests, str) else tests
    if not isinstance(tests, list) or not tests or not all(isinstance(one, str) and one.strip() for one in tests):
        return BadRecord(file, line, "the tests are no list of Python texts")
    return Task(asked, None, tuple(tests))


def problem(number: int, spec: TasksSpec) -> tuple[str, int]:
    """The problem of a number, and its result."""
    drawn = random.Random(f"{number}")
    terms = [drawn.randrange(10 ** drawn.randint(1, spec.digits)) for _ in range(spec.terms)]
    operations = drawn.choices(spec.operations, k=spec.terms - 1)
    text, sums = str(terms[0]), [terms[0]]
    for operation, term in zip(operations, terms[1:], strict=True):
        text += f" {operation} {term}"
        if operation == "*":
            sums[-1] *= term
        else:
            sums.append(term if operation == "+" else -term)
    return text, sum(sums)


class TaskPacking(DialoguePacking):
    """One preparation of tasks."""

    _what = "tasks"
    _beside = "tasks.jsonl"
    _make: ClassVar[Make[Any]] = staticmethod(task_from)
    _end: int | None = None

    def _read(self) -> Iterator[Any]:
        if self._spec.files:
            yield from super()._read()
            return
        spec = self._spec.tasks
        for number in range(spec.count):
            text, result = problem(number, spec)
            yield task_from({"prompt": spec.prompt.replace("{problem}", text), "answer": result}, "tasks", number)

    def _added(
        self, template: TemplateProcess, record: Any, split: Split, writer: SplitWriter, answers_file: BinaryIO
    ) -> bool:
        """Write a task to its split, unless it is a bad record."""
        whole = replace(record.asked, messages=[*record.asked.messages, _STAND_IN])
        encoded = self._encoded(template, whole, last_only=True)
        if encoded is None:
            return False
        ids, answers = encoded
        begin, last = answers.index(1), len(answers) - 1 - answers[::-1].index(1)
        if ids[last] not in self._special_ids:
            raise InputError(
                "data.chat_template is not accepted: it puts no special token behind an answer, where a reply ends"
            )
        self._end = ids[last]
        writer.add(ids[:begin], len(record.utf8))
        beside = {"asked": record.asked.messages, "answer": record.answer, "tests": record.tests}
        answers_file.write(json.dumps(beside).encode() + b"\n")
        return True

    def _manifest(self, writers: dict[Any, SplitWriter], dtype: np.dtype) -> dict[str, Any]:
        return super()._manifest(writers, dtype) | {"end": self._end}


class TaskDataset(PackedDataset):
    """Prepared tasks, by their numbers."""

    @property
    def separator(self) -> int:
        """A token that no task holds, to fill up sequences with."""
        return int(self.manifest["separator"])

    @property
    def end(self) -> int:
        """The token that ends a reply."""
        return int(self.manifest["end"])

    def fitting(self, split: Split, longest: int) -> np.ndarray:
        """The numbers of the tasks whose prompts have at most so many tokens, in order."""
        return np.flatnonzero(np.diff(self._starts[split]) <= longest)

    def tasks(self, split: Split, position: int, count: int, longest: int, seed: int) -> list[Task]:
        """The next tasks of a run, of those whose prompts have at most `longest` tokens.

        Parameters
        ----------
        position
            How many were taken before. Beyond an epoch it goes on with the next, shuffled anew.
        seed
            Of the shuffle.

        Raises
        ------
        InputError
            If no prompt of the split is so short.
        """
        numbers = self.fitting(split, longest)
        if not numbers.size:
            raise InputError(
                f"train.seq_len is not accepted: no prompt of the {split} split has {longest} tokens or less, which "
                "grpo.max_new_tokens leaves of it; a longer one is"
            )
        epochs, within = np.divmod(np.arange(position, position + count, dtype=np.int64), len(numbers))
        found = []
        for epoch, place in zip(epochs, within, strict=True):
            item = shuffled(np.array([place]), len(numbers), seed, int(epoch))[0]
            found.append(self.task(split, int(numbers[item])))
        return found

    def task(self, split: Split, number: int) -> Task:
        """One task of a split."""
        starts = self._starts[split]
        prompt = self.span(split, int(starts[number]), int(starts[number + 1] - starts[number]))
        kept = json.loads(self._kept[split][number])
        asked = Dialogue(kept["asked"], split, number)
        return Task(asked, kept["answer"], tuple(kept["tests"]), tuple(int(token) for token in prompt))

    @cached_property
    def has_tests(self) -> bool:
        """Whether replies to some tasks are code."""
        return any(json.loads(line)["tests"] for lines in self._kept.values() for line in lines)

    @cached_property
    def _starts(self) -> dict[str, np.ndarray]:
        return {split: self.documents(split).astype(np.int64) for split in SPLITS}

    @cached_property
    def _kept(self) -> dict[str, list[str]]:
        try:
            return {
                split: (self.folder / f"{split}.tasks.jsonl").read_text(encoding="utf-8").splitlines()
                for split in SPLITS
            }
        except OSError as error:
            raise OperationError(f"{self.folder} holds no prepared tasks: {error}") from None
