"""How well a model reads pictures: our own, ChartQA, DocVQA, MMMU and RealWorldQA, as suites of questions.

A model is asked through its server, or here where it is a run or a folder, a few questions at the same time. A
benchmark's first score is the one that it is known by.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, nullcontext
from pathlib import Path
from typing import Any

from modelworks.data.pictures import kinds_of
from modelworks.data.pictures.written import LINES
from modelworks.evaluate.endpoint import Chat, Endpoint
from modelworks.evaluate.questions import BENCHMARKS, Question, files_of, generated, published, written
from modelworks.evaluate.registry import Asked, Outcome
from modelworks.evaluate.reports import is_address
from modelworks.evaluate.scores import anls, choice, exact, open_answer, relaxed
from modelworks.evaluate.sight import Sight
from modelworks.spec.errors import InputError

VERSION = "1"
GENERATED = 400
"""Questions about generated pictures, if no number is given."""
_AT_ONCE = 4
_LONGEST_ANSWER = 256
"""Tokens."""
_METRICS: dict[str, Callable[[str, tuple[str, ...]], float]] = {"exact": exact, "relaxed": relaxed, "anls": anls}


def check(asked: Asked) -> dict[str, Any]:
    """The files of the questions, with their sizes and times, and what is said behind each question.

    Raises
    ------
    InputError
        If the data isn't there or is another's.
    """
    files = [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in _files(asked)]
    return {"files": files, "kinds": list(_kinds(asked)), "hint": _hint(asked)}


def outcomes(asked: Asked) -> Iterator[tuple[int | None, Outcome]]:
    """Each question's scores: the benchmark's own, then others that apply.

    Raises
    ------
    InputError
        If no question has an answer, or the model doesn't see.
    OperationError
        If the model doesn't answer.
    """
    files, limit = _files(asked), asked.limit
    if limit is None and asked.data is None:
        limit = GENERATED
    named = ((_sample(question), question) for question in itertools.islice(_questions(asked, files, limit), limit))
    first = next(named, None)
    if first is None:
        raise InputError(f"--data {asked.data} has no question with an answer")
    left = ((sample, question) for sample, question in itertools.chain([first], named) if sample not in asked.done)
    with _chat(asked) as chat:
        for sample, question, given in _answered(chat, left, _hint(asked)):
            detail = {
                "kind": question.kind,
                "about": question.about,
                "question": " ".join(part for part in question.content if isinstance(part, str)),
                "answers": list(question.answers),
                "given": given,
            }
            yield limit, Outcome(sample, _scores(question, given, BENCHMARKS[asked.task].metric), detail)


def _chat(asked: Asked) -> AbstractContextManager[Chat]:
    """What is asked: a server's model, or a network here."""
    return (
        closing(Endpoint(asked.model, asked.served_as)) if is_address(asked.model) else nullcontext(Sight(asked.model))
    )


def _sample(question: Question) -> str:
    """What tells a question from others, also from those of other files or another seed."""
    whole = hashlib.blake2b(digest_size=6)
    for part in question.content:
        whole.update(part.encode() if isinstance(part, str) else part)
    return f"{question.id}-{whole.hexdigest()}"


def _hint(asked: Asked) -> str:
    return BENCHMARKS[asked.task].hint if asked.hint is None else asked.hint


def _kinds(asked: Asked) -> tuple[str, ...]:
    return kinds_of(asked.kinds) if asked.task == "pictures" else ()


def _files(asked: Asked) -> list[Path]:
    """The files of the questions, known to be there before any is asked."""
    if asked.task != "pictures":
        if asked.data is None:
            raise InputError(
                f"--task {asked.task} takes --data PATH: the benchmark's parquet files from the Hugging Face hub"
            )
        return files_of(asked.task, asked.data)
    if asked.data is None:
        return []
    if not (asked.data / LINES).is_file():
        raise InputError(f"--data {asked.data} holds no {LINES}: a folder of `modelworks data pictures` is accepted")
    return [asked.data / LINES]


def _questions(asked: Asked, files: list[Path], limit: int | None) -> Iterator[Question]:
    if asked.task != "pictures":
        return published(asked.task, files)
    if asked.data is None:
        return generated(limit or GENERATED, asked.seed, _kinds(asked))
    return written(asked.data, _kinds(asked))


def _answered(chat: Chat, questions: Iterator[tuple[str, Question]], hint: str) -> Iterator[tuple[str, Question, str]]:
    """Each question with what was answered, in their order; some are asked at the same time."""

    def answer(question: Question) -> str:
        content = [*question.content, hint] if hint else list(question.content)
        return chat.ask(_joined(content), _LONGEST_ANSWER)

    pool = ThreadPoolExecutor(_AT_ONCE)
    try:
        while group := list(itertools.islice(questions, _AT_ONCE)):
            given = pool.map(answer, [question for _, question in group])
            for (sample, question), said in zip(group, given, strict=True):
                yield sample, question, said
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _joined(content: list[str | bytes]) -> list[str | bytes]:
    """Texts that follow one another as one."""
    joined: list[str | bytes] = []
    for part in content:
        if joined and isinstance(part, str) and isinstance(joined[-1], str):
            joined[-1] = f"{joined[-1]}\n{part}"
        else:
            joined.append(part)
    return joined


def _scores(question: Question, given: str, metric: str) -> dict[str, float]:
    """The benchmark's own score of an answer, then the others."""
    if metric != "accuracy":
        scores = {name: score(given, question.answers) for name, score in _METRICS.items()}
        return {metric: scores[metric]} | scores
    if question.options:
        return {metric: float(choice(given, question.options) in question.answers)}
    return {metric: open_answer(given, question.answers)}
