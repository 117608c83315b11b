"""Evaluations cell by cell: a length and a depth, a task and a length; what is done is kept, so that it can go on.

An answer is found if each of its tokens is the most likely one after the prompt and the right tokens before it: what
greedy decoding gives, in one pass. Where several answers are asked for, each is judged with the right ones before it.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from modelworks.evaluate.haystack import Haystack, Sample, held_out
from modelworks.evaluate.models import Model
from modelworks.evaluate.questions import BENCHMARKS
from modelworks.evaluate.tasks import RULER, needle
from modelworks.spec.errors import InputError, OperationError
from modelworks.spec.home import write_atomically

TaskName = Literal["needle", "ruler", "position-perplexity"]
TASKS: tuple[str, ...] = get_args(TaskName)
Progress = Callable[[int, int, str], None]
"""Told how many cells are done, of how many, and which is the last."""
FOUND = 0.95
"""From this score on a length counts as one that the model works at (RULER takes 0.856, a model's score at 4k)."""
_BUCKETS = 16


def task_name(given: str) -> TaskName:
    """A suite by its name.

    Raises
    ------
    InputError
        If there is no such suite.
    """
    for name in get_args(TaskName):
        if given == name:
            return name  # type: ignore[no-any-return]
    raise InputError(f"--task {given} is not accepted: {', '.join([*TASKS, *BENCHMARKS])} are")


@dataclass(frozen=True)
class Cell:
    """One thing that is measured."""

    task: str
    length: int
    depth: float | None = None

    @property
    def key(self) -> str:
        """What it is called in a report that is not finished."""
        return f"{self.task} {self.length} {self.depth}"


def evaluate(
    model: Model,
    task: TaskName,
    lengths: Sequence[int] = (),
    depths: int = 11,
    samples: int = 1,
    seed: int = 0,
    out: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Evaluate a model on one of the suites.

    Parameters
    ----------
    model
        The model.
    task
        `needle`: one hidden line, asked at each length and depth. `ruler`: each of RULER's kinds of task at each
        length. `position-perplexity`: held-out text of each length, the loss by position.
    lengths
        Tokens of a prompt with its answer; the model's context, a half, a quarter and an eighth of it if empty.
    depths
        How many depths between the beginning and the end of the text, both included.
    samples
        Prompts per cell.
    seed
        Of all that is generated.
    out
        Where the report goes; what is done stands in ``OUT.part`` until then, and the same call goes on from there.
    progress
        Told of each cell.

    Returns
    -------
    dict
        ``task``, ``model``, ``version``, ``network`` (context, rotary base and scaling), ``seed``, ``samples``;
        ``cells`` with ``task``, ``length``, ``depth`` and ``score`` (or ``positions``: ``from``, ``to``, ``nats``,
        ``perplexity``); and ``by_length``, the mean score of each.

    Raises
    ------
    InputError
        If a length is beyond the model's context, or too short for the task.
    OperationError
        If the report can't be written.
    """
    lengths = list(lengths) or sorted({model.context // part for part in (1, 2, 4, 8)})
    _check(model, lengths, depths, samples)
    spec = model.decoder.spec
    head: dict[str, Any] = {
        "task": task,
        "model": model.name,
        "version": model.version,
        "network": spec.model_dump(include={"context", "rope_base", "rope_scaling"}, exclude_none=True),
        "seed": seed,
        "samples": samples,
    }
    cells = list(_cells(task, lengths, depths))
    haystack = Haystack(model.encode)
    done = Kept(out, head)
    rows: list[dict[str, Any]] = []
    for number, cell in enumerate(cells):
        measured = done.found.get(cell.key)
        if measured is None:
            if progress is not None:
                progress(number, len(cells), cell.key)
            measured = (
                _positions(model, cell.length, samples)
                if task == "position-perplexity"
                else {"score": _score(model, haystack, cell, samples, seed)}
            )
            done.keep(cell.key, measured)
        rows.append({"task": cell.task, "length": cell.length, "depth": cell.depth} | measured)
    report = head | {"cells": rows}
    if task != "position-perplexity":
        report["by_length"] = {
            str(length): statistics.fmean(row["score"] for row in rows if row["length"] == length) for length in lengths
        }
    done.finish(report)
    return report


def _check(model: Model, lengths: Sequence[int], depths: int, samples: int) -> None:
    for length in lengths:
        if length < 64:
            raise InputError(f"--lengths {length} is not accepted: 64 tokens or more are")
        if length > model.context:
            raise InputError(
                f"--lengths {length} is not accepted: {model.name} takes {model.context} tokens; more are tried with "
                f"--set model.context={length}"
            )
    if depths < 1:
        raise InputError(f"--depths {depths} is not accepted: 1 or more are")
    if samples < 1:
        raise InputError(f"--samples {samples} is not accepted: 1 or more are")


def _cells(task: TaskName, lengths: Sequence[int], depths: int) -> Iterator[Cell]:
    for length in lengths:
        if task == "needle":
            for step in range(depths):
                yield Cell(task, length, step / max(1, depths - 1))
        elif task == "ruler":
            for name in RULER:
                yield Cell(name, length)
        else:
            yield Cell(task, length)


def _score(model: Model, haystack: Haystack, cell: Cell, samples: int, seed: int) -> float:
    """The share of a cell's answers that the model finds."""
    found = asked = 0
    for number in range(samples):
        name = f"{seed} {cell.key} {number}"
        sample = (
            needle(haystack, cell.length, cell.depth, name)
            if cell.depth is not None
            else RULER[cell.task](haystack, cell.length, name)
        )
        found += sum(answered(model, sample))
        asked += len(sample.answers)
    return found / asked


def answered(model: Model, sample: Sample) -> list[bool]:
    """Which of a sample's answers the model finds."""
    states = model.states(sample.ids[:-1])
    found = []
    for start, end in sample.answers:
        likeliest = model.logits(states[start - 1 : end - 1]).argmax(-1).tolist()
        found.append(likeliest == sample.ids[start:end])
    return found


def _positions(model: Model, length: int, samples: int) -> dict[str, Any]:
    """The mean cross-entropy of held-out text in sixteen equal parts of the positions."""
    texts, needed = [], samples * (length + 1)
    ids: list[int] = []
    for lines in held_out(True):
        texts.append("\n".join(lines))
        ids += model.encode(texts[-1] + "\n")
        if len(ids) >= needed:
            break
    if len(ids) < needed:
        raise InputError(
            f"--lengths {length} with --samples {samples} is not accepted: there are {len(ids)} tokens of held-out text"
        )
    nats = torch.stack(
        [model.nats(ids[start : start + length + 1]) for start in range(0, samples * length, length)]
    ).double()
    edges = [length * part // _BUCKETS for part in range(_BUCKETS + 1)]
    means = [float(nats[:, first:last].mean()) for first, last in itertools.pairwise(edges)]
    return {
        "positions": [
            {"from": first, "to": last, "nats": mean, "perplexity": math.exp(mean)}
            for first, last, mean in zip(edges[:-1], edges[1:], means, strict=True)
        ]
    }


class Kept:
    """The cells of a report that is not finished: a file of one JSON line each, behind one that says of what."""

    def __init__(self, out: Path | None, head: dict[str, Any]) -> None:
        self._out = out
        self.found: dict[str, dict[str, Any]] = {}
        self._part = None if out is None else out.with_name(f"{out.name}.part")
        if self._part is None:
            return
        text = self._part.read_text(encoding="utf-8") if self._part.is_file() else ""
        whole = text[: text.rfind("\n") + 1].splitlines()  # what was killed while it wrote left half a line
        if whole and whole[0] == json.dumps(head):
            self.found = dict(json.loads(line) for line in whole[1:])
        self._write("\n".join([json.dumps(head), *(json.dumps(entry) for entry in self.found.items())]), "w")

    def keep(self, key: str, measured: dict[str, Any]) -> None:
        """Note a cell."""
        self.found[key] = measured
        if self._part is not None:
            self._write(json.dumps([key, measured]), "a")

    def finish(self, report: dict[str, Any]) -> None:
        """Write the whole report in the place of its parts."""
        if self._out is not None and self._part is not None:
            try:
                write_atomically(self._out, json.dumps(report, indent=1) + "\n")
                self._part.unlink(missing_ok=True)
            except OSError as error:
                raise OperationError(f"{self._out} cannot be written: {error.strerror or error}") from None

    def _write(self, line: str, mode: Literal["w", "a"]) -> None:
        assert self._part is not None
        try:
            self._part.parent.mkdir(parents=True, exist_ok=True)
            with self._part.open(mode, encoding="utf-8") as file:
                file.write(f"{line}\n")
        except OSError as error:
            raise OperationError(f"{self._part} cannot be written: {error.strerror or error}") from None
