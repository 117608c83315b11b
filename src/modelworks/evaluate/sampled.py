"""An evaluation by samples: our own suites and lm-evaluation-harness's tasks, together in one report that is kept."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx

from modelworks.evaluate.comparison import standard_error
from modelworks.evaluate.harness import Served, ask_tasks, find_tasks
from modelworks.evaluate.models import found_model, load_model
from modelworks.evaluate.registry import PICTURES, SUITES, Asked, own_suite
from modelworks.evaluate.reports import KIND, Answers, is_address, now, place_of, software, write_report
from modelworks.evaluate.scores import wilson
from modelworks.spec.errors import InputError, OperationError

Progress = Callable[[int, int | None, str], None]


@dataclass(frozen=True)
class Sampling:
    """What is asked of a model.

    Attributes
    ----------
    tasks
        Our suites and lm-evaluation-harness's tasks, groups and tags.
    limit
        Samples of each task; all of them if None.
    shots
        Solved examples in each prompt; the tasks' own number if None.
    seed
        Of what is drawn.
    include
        A folder with further tasks.
    trusted
        Whether tasks may run code.
    chat
        Ask a server by its chat.
    served_as
        The model's name at its server.
    tokenizer
        A folder whose tokenizer cuts texts as the server does.
    data, kinds, hint
        Of questions about pictures: their files, the kinds of picture, and what is said behind each question.
    """

    tasks: tuple[str, ...]
    limit: int | None = None
    shots: int | None = None
    seed: int = 0
    include: Path | None = None
    trusted: bool = False
    chat: bool = False
    served_as: str | None = None
    tokenizer: str | None = None
    data: Path | None = None
    kinds: str = ""
    hint: str | None = None


def check_sampling(models: Sequence[str], sampling: Sampling, progress: Progress | None = None) -> None:
    """Refuse what can't be evaluated, before anything is loaded or written.

    Raises
    ------
    InputError
        If there is no such model or task, or a number is out of its range.
    OperationError
        If lm-evaluation-harness is needed and isn't installed.
    """
    if not sampling.tasks:
        raise InputError("--task is empty: names of tasks with commas between them are accepted")
    for field, value, least in (("--limit", sampling.limit, 1), ("--shots", sampling.shots, 0)):
        if value is not None and value < least:
            raise InputError(f"{field} {value} is not accepted: {least} or more is")
    for field, given in (("--data", sampling.data), ("--kinds", sampling.kinds), ("--hint", sampling.hint)):
        if given not in (None, "") and not set(sampling.tasks) & set(PICTURES):
            raise InputError(f"{field} {given} is not accepted: --task {', '.join(PICTURES)} take it")
    for model in models:
        for name in sampling.tasks:
            if name in SUITES:
                own_suite(name).check(_asked(name, model, sampling))
        if not is_address(model):
            found_model(model)
    if theirs := _theirs(sampling):
        find_tasks(theirs, sampling.include, trusted=sampling.trusted, progress=progress)


def evaluate_samples(
    model: str,
    sampling: Sampling,
    overrides: Sequence[str] = (),
    out: Path | None = None,
    progress: Progress | None = None,
) -> tuple[dict[str, Any], Path]:
    """Evaluate a model, and keep the report beside it, or in `out`.

    What is interrupted goes on when it is called again with the same arguments.

    Returns
    -------
    report, path
        ``kind``, ``model``, ``version``, ``digest``, ``date``, ``software``, ``settings``, ``tasks`` (``version``,
        ``shots``, ``samples``, ``higher_is_better``), ``scores`` by task and metric (``value``, ``standard_error``) and
        ``samples`` by task, metric and sample.

    Raises
    ------
    InputError
        If a model or task can't be had, or a task needs what a server doesn't give.
    OperationError
        If a server fails, or the report can't be written.
    """
    check_sampling([model], sampling, progress)
    settings: dict[str, Any] = {
        "tasks": list(sampling.tasks),
        "limit": sampling.limit,
        "shots": sampling.shots,
        "seed": sampling.seed,
        "include": None if sampling.include is None else str(sampling.include),
        "set": list(overrides),
    }
    for name in sampling.tasks:
        if name in SUITES:
            settings |= {name: depends} if (depends := own_suite(name).check(_asked(name, model, sampling))) else {}
    theirs = _theirs(sampling)
    about: dict[str, Any] = {"model": model, "version": "served", "digest": None}
    asked: Any = None
    if is_address(model):
        name = sampling.served_as or _served_name(model)
        settings |= {"served_as": name, "chat": sampling.chat, "tokenizer": sampling.tokenizer}
        asked = Served(model, name, sampling.chat, sampling.tokenizer)
    else:
        asked = load_model(model, overrides)
        about |= {"version": asked.version, "digest": asked.digest}
    answers = Answers(model, about | {"settings": settings})
    found: dict[str, dict[str, Any]] = {"tasks": {}, "scores": {}, "samples": {}}
    if theirs:
        manager = find_tasks(theirs, sampling.include, trusted=sampling.trusted)
        found = ask_tasks(
            asked,
            manager,
            theirs,
            answers,
            limit=sampling.limit,
            shots=sampling.shots,
            seed=sampling.seed,
            trusted=sampling.trusted,
            progress=progress,
        )
    for name in sampling.tasks:
        if name in SUITES:
            for part, values in _of_suite(
                _asked(name, model, sampling, settings.get("served_as")), answers, progress
            ).items():
                found[part][name] = values
    report = {"kind": KIND, **about, "date": now(), "software": software(), "settings": settings, **found}
    path = out or place_of(report)
    write_report(report, path)
    answers.finish()
    return report, path


def _theirs(sampling: Sampling) -> list[str]:
    return [name for name in sampling.tasks if name not in SUITES]


def _asked(name: str, model: str, sampling: Sampling, served_as: str | None = None) -> Asked:
    return Asked(
        model,
        sampling.limit,
        sampling.seed,
        served_as,
        task=name,
        data=sampling.data,
        kinds=sampling.kinds,
        hint=sampling.hint,
    )


def _of_suite(asked: Asked, answers: Answers, progress: Progress | None) -> dict[str, Any]:
    """One of our suites: what is known already, then what it gives."""
    name, suite, prefix = asked.task, own_suite(asked.task), f"{asked.task} "
    done = {key.removeprefix(prefix): kept for key, kept in answers.items() if key.startswith(prefix)}
    asked = replace(asked, done=frozenset(done))
    for total, outcome in suite.outcomes(asked):
        kept = {"scores": dict(outcome.scores), "detail": dict(outcome.detail)}
        answers.keep({f"{prefix}{outcome.sample}": kept})
        done[outcome.sample] = kept
        if progress is not None:
            progress(len(done), total, name)
    by_metric: dict[str, dict[str, float]] = {}
    groups: dict[str, list[str]] = {}
    for sample, kept in sorted(done.items()):
        for metric, value in kept["scores"].items():
            by_metric.setdefault(metric, {})[sample] = float(value)
        kind, about = kept["detail"].get("kind"), kept["detail"].get("about")
        for group in (kind, kind and about and f"{kind}: {about}"):
            if group:
                groups.setdefault(group, []).append(sample)
    task = {
        "version": suite.VERSION,
        "shots": None,
        "samples": len(done),
        "higher_is_better": dict.fromkeys(by_metric, True),
        "by_kind": {group: _of_group(by_metric, groups[group]) for group in sorted(groups)},
        "details": {sample: kept["detail"] for sample, kept in sorted(done.items()) if kept["detail"]},
    }
    scores = {
        metric: {
            **_share(list(values.values())),
            "standard_error": standard_error(metric, list(values.values())) if len(values) > 1 else None,
        }
        for metric, values in by_metric.items()
    }
    return {"tasks": task, "scores": scores, "samples": by_metric}


def _of_group(by_metric: dict[str, dict[str, float]], samples: Sequence[str]) -> dict[str, Any]:
    """The scores of some samples, by each metric that they have."""
    found = {metric: [values[sample] for sample in samples if sample in values] for metric, values in by_metric.items()}
    return {metric: {**_share(values), "samples": len(values)} for metric, values in found.items() if values}


def _share(values: list[float]) -> dict[str, Any]:
    """The mean of scores from 0 to 1, and its 95 % Wilson interval."""
    value = sum(values) / len(values)
    return {"value": value, "interval": list(wilson(value, len(values)))}


def _served_name(address: str) -> str:
    """The name of the only model at a server."""
    key = os.environ.get("OPENAI_API_KEY", "")
    try:
        answer = httpx.get(
            f"{address.rstrip('/')}/models", headers={"Authorization": f"Bearer {key}"} if key else {}, timeout=30
        )
        names = [model["id"] for model in answer.raise_for_status().json()["data"]]
    except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
        raise OperationError(f"{address}/models cannot be read: {' '.join(str(error).split())}") from None
    if len(names) != 1:
        raise InputError(f"--served-as is needed: {address} has {', '.join(names) or 'no model'}")
    return str(names[0])
