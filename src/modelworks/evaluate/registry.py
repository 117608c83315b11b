"""Our own suites of questions, beside the generated long contexts and lm-evaluation-harness's tasks.

A suite is a module with a ``VERSION`` and the functions ``check`` and ``outcomes``. It gives one outcome after another;
what has come is kept, so that a stopped evaluation goes on. Its module is imported when it is asked for.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

PICTURES = ("pictures", "chartqa", "docvqa", "mmmu", "realworldqa")
"""The suites of questions about pictures."""
SUITES: dict[str, str] = {
    "character": "modelworks.evaluate.character",
    **dict.fromkeys(PICTURES, "modelworks.evaluate.pictures"),
}
"""The module of each suite by the name that ``--task`` takes."""


@dataclass(frozen=True)
class Outcome:
    """How one sample went.

    Attributes
    ----------
    sample
        What tells it from the suite's other samples, the same for every model.
    scores
        By metric, the more the better, 0 to 1: 0 or 1 where an answer is right or wrong. The first is the one that the
        suite is known by.
    detail
        What helps to understand the score, such as the answer; it becomes JSON. Scores are also given by its ``kind``
        and, within that, by what it is ``about``, where it says so.
    """

    sample: str
    scores: Mapping[str, float]
    detail: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Asked:
    """What a suite is asked to do.

    Attributes
    ----------
    model
        The model as it was given: a run, a folder, a GGUF file, or the address of a server.
    limit
        How many samples at most; all of them if None.
    seed
        Of what is drawn.
    served_as
        The model's name at its server, where `model` is an address.
    done
        The samples whose outcomes are known; a suite leaves them out.
    task
        The suite's name, where a module has several.
    data, kinds, hint
        Of questions about pictures: their files, the kinds of picture, and what is said behind each question.
    """

    model: str
    limit: int | None = None
    seed: int = 0
    served_as: str | None = None
    done: Collection[str] = ()
    task: str = ""
    data: Path | None = None
    kinds: str = ""
    hint: str | None = None


class Suite(Protocol):
    """What a suite's module offers."""

    VERSION: str

    def check(self, asked: Asked) -> Mapping[str, Any]:
        """Refuse what can't be asked; what the report's settings say besides, on which the outcomes depend."""
        ...

    def outcomes(self, asked: Asked) -> Iterator[tuple[int | None, Outcome]]:
        """How many samples there are in all, or None if that isn't known, with each outcome."""
        ...


def own_suite(name: str) -> Suite:
    """A suite's module by the suite's name, which must be one of `SUITES`."""
    suite: Suite = import_module(SUITES[name])
    return suite
