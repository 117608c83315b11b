"""Tasks whose answers can be checked: what is made up, what is read, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest

from modelworks.data.preparation import prepare
from modelworks.data.records import BadRecord
from modelworks.data.tasks import Task, TaskDataset, problem, task_from
from modelworks.data.tokenizer import train_tokenizer
from modelworks.spec.chatml import CHATML
from modelworks.spec.errors import InputError
from modelworks.spec.fields import validate
from modelworks.spec.reinforcement import TasksSpec
from modelworks.spec.run import DataSpec


@pytest.fixture
def tokenizer(home: Path) -> Path:
    file = home / "words" / "tokenizer.json"
    file.parent.mkdir()
    train_tokenizer(["What is 12 + 34?"] * 3, 300).save(str(file))
    return file


def tasks_of(tokenizer: Path, **data: Any) -> TaskDataset:
    spec = validate(DataSpec, {"source": "tasks", "tokenizer": str(tokenizer), "validation_fraction": 0.2} | data)
    return cast(TaskDataset, prepare(spec, 300, tokenizer.parent / "prepared"))


@pytest.mark.parametrize("operations", [["+"], ["+", "-", "*"]], ids=["sums", "all"])
def test_a_problems_result_is_what_python_makes_of_it(operations: list[Any]) -> None:
    spec = TasksSpec(operations=operations, terms=4, digits=3)
    found = [problem(number, spec) for number in range(200)]
    assert found == [problem(number, spec) for number in range(200)]
    assert all(eval(text) == result for text, result in found)
    assert {mark for text, _ in found for mark in text if mark in "+-*"} == set(operations)
    assert max(len(word) for text, _ in found for word in text.split()) == 3


def test_no_made_up_problem_is_on_both_sides_and_the_order_goes_on_where_it_was(tokenizer: Path) -> None:
    made = tasks_of(tokenizer, tasks={"count": 300, "digits": 1, "operations": ["+"]})
    sides = [
        {made.task(split, number).asked.messages[0]["content"] for number in made.fitting(split, 999)}
        for split in ("train", "validation")
    ]
    assert not sides[0] & sides[1]
    assert 0.1 < len(sides[1]) / len(sides[0] | sides[1]) < 0.3
    assert len(sides[0] | sides[1]) + made.manifest["duplicates"] == 300
    whole = made.tasks("train", 0, 150, 999, seed=3)
    assert whole == made.tasks("train", 0, 100, 999, seed=3) + made.tasks("train", 100, 50, 999, seed=3)
    epoch = len(sides[0])
    assert len({task.utf8 for task in made.tasks("train", 0, epoch, 999, seed=3)}) == epoch


def test_a_prompt_is_what_the_template_writes_up_to_the_reply(tokenizer: Path) -> None:
    from jinja2 import Template
    from tokenizers import Tokenizer

    made = tasks_of(tokenizer, tasks={"count": 3})
    task = made.tasks("train", 0, 1, 999, seed=0)[0]
    words = Tokenizer.from_file(str(tokenizer))
    written = Template(CHATML).render(messages=task.asked.messages, add_generation_prompt=True)
    assert words.decode(list(task.prompt), skip_special_tokens=False) == written
    assert made.end == words.token_to_id("<|im_end|>")
    with pytest.raises(InputError, match=r"no prompt of the train split has 5 tokens or less"):
        made.tasks("train", 0, 1, 5, seed=0)


def test_tasks_are_read_from_files(tokenizer: Path) -> None:
    file = tokenizer.parent / "tasks.jsonl"
    records = [
        {"prompt": "2 + 2?", "answer": 4},
        {"messages": [{"role": "system", "content": "Be."}, {"role": "user", "content": "Sky?"}], "answer": "blue"},
        {"prompt": "Write twice(x).", "tests": ["assert twice(2) == 4", "assert twice(0) == 0"]},
    ]  # fmt: skip
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    read = tasks_of(tokenizer, files=[str(file)], validation_fraction=0.0)
    found = [read.task("train", number) for number in read.fitting("train", 999)]
    assert [(task.answer, task.tests) for task in found] == [
        ("4", ()), ("blue", ()), (None, ("assert twice(2) == 4", "assert twice(0) == 0")),
    ]  # fmt: skip
    assert found[1].asked.messages == records[1]["messages"]
    assert read.has_tests


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ("4", "no task"),
        ({"answer": "4"}, "a prompt, as 'messages' or 'prompt', is needed"),
        ({"prompt": "2 + 2?"}, "either 'answer' or 'tests' is needed"),
        ({"prompt": "2 + 2?", "answer": "4", "tests": ["x"]}, "either 'answer' or 'tests' is needed"),
        ({"prompt": " ", "answer": "4"}, "message 1, the user's, is empty"),
        ({"prompt": "2 + 2?", "answer": ""}, "the answer is '': a text or a number is needed"),
        ({"prompt": "2 + 2?", "answer": True}, "the answer is True: a text or a number is needed"),
        ({"prompt": "twice", "tests": []}, "the tests are no list of Python texts"),
        ({"prompt": "twice", "tests": [3]}, "the tests are no list of Python texts"),
        ({"messages": [{"role": "system", "content": "x"}], "answer": "4"}, "isn't the user's"),
        ({"messages": [], "answer": "4"}, "isn't the user's"),
    ],
    ids=str,
)
def test_what_is_no_task_is_said(record: Any, reason: str) -> None:
    found = task_from(record, "f", 1)
    assert isinstance(found, BadRecord)
    assert reason in found.reason
    assert isinstance(task_from({"prompt": "2 + 2?", "answer": 4.0}, "f", 1), Task)


def test_a_template_that_does_not_end_an_answer_is_refused(tokenizer: Path) -> None:
    plain = tokenizer.parent / "plain.jinja"
    plain.write_text("{% for one in messages %}{{ one['content'] }}\n{% endfor %}")
    with pytest.raises(InputError, match=r"data\.chat_template is not accepted: it puts no special token behind"):
        tasks_of(tokenizer, chat_template=str(plain))
