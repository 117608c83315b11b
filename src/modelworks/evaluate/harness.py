"""Tasks of EleutherAI's lm-evaluation-harness, asked of a model that is loaded or served.

A task is a description in YAML with data from the Hugging Face Hub or from files. Descriptions that a user includes run
no code: Python functions, metrics that are scripts and templates that leave their sandbox are refused, unless the user
trusts them. What the model answers is kept request by request, so that a stopped evaluation goes on.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import yaml  # type: ignore[import-untyped]

from modelworks.evaluate.comparison import standard_error
from modelworks.evaluate.registry import SUITES
from modelworks.evaluate.reports import Answers
from modelworks.evaluate.suite import TASKS
from modelworks.evaluate.task_index import library_tasks, task_manager
from modelworks.spec.errors import InputError, OperationError

if TYPE_CHECKING:
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager

Progress = Callable[[int, int, str], None]
_CHUNK = 64
"""Requests whose answers are kept together."""
_DATA = ("json", "csv", "parquet", "arrow", "text")
"""The kinds of file that an included task may read."""
_ON_HUB = re.compile(r"\w[\w.-]*/\w[\w.-]*(?<!\.py)")
_PLAIN = "tag:yaml.org,2002:"


@dataclass(frozen=True)
class Served:
    """A model behind an OpenAI-compatible API.

    Attributes
    ----------
    address
        Such as ``http://localhost:8000/v1``.
    name
        The model's name there.
    chat
        Ask by ``/chat/completions`` instead of ``/completions``.
    tokenizer
        A Hugging Face folder whose tokenizer cuts texts as the server does; log-likelihoods take it.
    """

    address: str
    name: str
    chat: bool = False
    tokenizer: str | None = None


def refuse_missing_harness() -> None:
    """Refuse to begin without the library.

    Raises
    ------
    OperationError
        If it isn't installed.
    """
    if find_spec("lm_eval") is None:
        raise OperationError("lm-evaluation-harness isn't installed: pip install 'modelworks[eval]'")


def find_tasks(
    names: Sequence[str], include: Path | None = None, *, trusted: bool = False, progress: Progress | None = None
) -> TaskManager:
    """Look tasks up by name.

    Parameters
    ----------
    names
        Of tasks, groups or tags.
    include
        A folder with further tasks.
    trusted
        Whether they may bring code.
    progress
        Told of the library's files that were looked through, where its tasks aren't known yet.

    Raises
    ------
    InputError
        If there is no such task, or an included one brings code.
    OperationError
        If lm-evaluation-harness isn't installed.
    """
    refuse_missing_harness()
    if include is not None:
        if not include.is_dir():
            raise InputError(f"--include {include} is not accepted: a folder with tasks in YAML is")
        if not trusted:
            _refuse_code(include)
    known = library_tasks(progress)
    if include is None:
        _refuse_unknown(names, known)  # before the library is imported, which takes seconds
    with _quiet():
        manager = task_manager(known, include)
    _refuse_unknown(names, manager.task_index)
    return manager


def _refuse_unknown(names: Sequence[str], known: Collection[str]) -> None:
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, [*TASKS, *SUITES, *known], 3)
            hint = f"; near it are {', '.join(near)}" if near else ""
            raise InputError(f"--task {name} is not accepted: there is no such task{hint}")


def _refuse_code(folder: Path) -> None:
    for path in sorted(path for path in folder.rglob("*") if path.suffix in (".yaml", ".yml")):
        _refuse_code_of(path, folder.resolve())


def _refuse_code_of(path: Path, folder: Path) -> None:
    """Refuse a description that names a function, a script or a file outside its folder."""
    trust = "; --trust-task-code accepts it"
    try:
        node = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        if node is None:
            return
        for tag in _tags(node):
            if not tag.startswith(_PLAIN) or tag.startswith(f"{_PLAIN}python"):
                raise InputError(f"--include {path}: {tag} runs code of the task's{trust}")
        task = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"--include {path}: cannot be read as YAML: {' '.join(str(error).split())}") from None
    from lm_eval.api.metrics import perplexity  # noqa: F401 - fills the registry
    from lm_eval.api.registry import metric_registry

    for inner in _mappings(task):
        for metric in inner.get("metric_list") or []:
            name = metric.get("metric") if isinstance(metric, dict) else metric
            if name not in metric_registry or (isinstance(metric, dict) and metric.get("hf_evaluate")):
                raise InputError(f"--include {path}: the metric {name} is a script{trust}")
        data = inner.get("dataset_path")
        if isinstance(data, str) and data not in _DATA and (not _ON_HUB.fullmatch(data) or Path(data).exists()):
            raise InputError(
                f"--include {path}: dataset_path = {data} may run code: {', '.join(_DATA)} or OWNER/NAME on the Hub "
                f"are accepted{trust}"
            )
        options = inner.get("dataset_kwargs")
        if inner.get("unsafe_code") or (isinstance(options, dict) and options.get("trust_remote_code")):
            raise InputError(f"--include {path}: it asks to run code{trust}")
        parents = inner.get("include") or []
        for parent in parents if isinstance(parents, list) else [parents]:
            if not (path.parent / str(parent)).resolve().is_relative_to(folder):
                raise InputError(f"--include {path}: include = {parent} leaves the folder{trust}")
            if (path.parent / str(parent)).suffix not in (".yaml", ".yml"):
                _refuse_code_of(path.parent / str(parent), folder)


def _tags(node: yaml.Node, seen: set[int] | None = None) -> Iterator[str]:
    seen = set() if seen is None else seen
    if id(node) in seen:
        return
    seen.add(id(node))
    yield node.tag
    if isinstance(node, yaml.SequenceNode):
        for inner in node.value:
            yield from _tags(inner, seen)
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield from _tags(key, seen)
            yield from _tags(value, seen)


def _mappings(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else []:
        yield from _mappings(inner)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's notes and bars: progress is told by us."""
    from tqdm import tqdm  # type: ignore[import-untyped]

    logger, level, init = logging.getLogger("lm_eval"), logging.getLogger("lm_eval").level, tqdm.__init__

    def without_bar(self: Any, *given: Any, **named: Any) -> None:
        init(self, *given, **(named | {"disable": True}))

    logger.setLevel(logging.ERROR)
    tqdm.__init__ = without_bar
    try:
        yield
    finally:
        tqdm.__init__ = init
        logger.setLevel(level)


@contextmanager
def _sandboxed_templates() -> Iterator[None]:
    """Render the prompts' templates where they reach no Python objects but the documents' fields."""
    from jinja2.sandbox import SandboxedEnvironment
    from lm_eval import utils

    plain = utils.env
    sandbox = SandboxedEnvironment(loader=plain.loader, undefined=plain.undefined, keep_trailing_newline=True)
    sandbox.filters.update(plain.filters)
    utils.env = sandbox
    try:
        yield
    finally:
        utils.env = plain


def ask_tasks(
    model: Any,
    manager: TaskManager,
    names: Sequence[str],
    answers: Answers,
    *,
    limit: int | None = None,
    shots: int | None = None,
    seed: int = 0,
    trusted: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Ask a model the samples of tasks.

    Parameters
    ----------
    model
        A `models.Model`, or `Served`.
    manager, names
        The tasks, from `find_tasks`.
    answers
        What is known already, and where new answers are kept.
    limit
        Samples of each task; all of them if None.
    shots
        Solved examples in each prompt; the tasks' own number if None.
    seed
        Of the examples and of what is drawn.
    trusted
        Whether tasks may run code, such as what a model wrote.

    Returns
    -------
    dict
        ``tasks`` with each one's ``version``, ``shots``, ``samples`` and ``higher_is_better``; ``scores`` with
        ``value`` and ``standard_error`` by task and metric; ``samples`` by task, metric and sample.

    Raises
    ------
    InputError
        If a task needs log-probabilities that a server doesn't give, or its data can't be had.
    OperationError
        If a server fails.
    """
    from lm_eval import simple_evaluate
    from requests import RequestException

    with _quiet(), _sandboxed_templates():
        try:
            tasks = manager.load(list(names))["tasks"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"--task {','.join(names)}: cannot be loaded: {_sentence(error)}") from None
        for name, task in tasks.items():
            if getattr(task, "UNSAFE_CODE", False) and not trusted:
                raise InputError(f"--task {name} runs code that a model writes: --trust-task-code accepts it")
        asked: LM
        if isinstance(model, Served):
            asked = _served(model, [name for name, task in tasks.items() if task.OUTPUT_TYPE != "generate_until"])
        else:
            from modelworks.evaluate.loaded import LoadedModel

            asked = LoadedModel(model, seed)
        try:
            found = simple_evaluate(
                model=_remembering(asked, answers, progress),
                tasks=list(names),
                task_manager=manager,
                num_fewshot=shots,
                limit=limit,
                bootstrap_iters=0,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
                apply_chat_template=isinstance(model, Served) and model.chat,
                confirm_run_unsafe_code=trusted,
            )
        except (httpx.HTTPError, RequestException, ConnectionError) as error:
            raise OperationError(f"{getattr(model, 'address', model)}: {_sentence(error)}") from None
    return _report(found)


def _sentence(error: BaseException) -> str:
    return " ".join((str(error) or type(error).__name__).split())[:300]


def _served(model: Served, likelihoods: Sequence[str]) -> LM:
    """The library's own client for a server."""
    from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI

    base, tasks = model.address.rstrip("/"), ", ".join(likelihoods)
    if tasks and model.chat:
        raise InputError(f"--chat is not accepted for {tasks}: log-probabilities of given texts take /completions")
    if tasks:
        _refuse_silent(model, base, tasks)
    try:
        if model.chat:
            return LocalChatCompletion(base_url=f"{base}/chat/completions", model=model.name)
        return LocalCompletionsAPI(
            base_url=f"{base}/completions",
            model=model.name,
            tokenizer=model.tokenizer,
            tokenizer_backend="None" if model.tokenizer is None else "huggingface",
            tokenized_requests=False,
            max_retries=3,
        )
    except (OSError, ValueError) as error:
        raise InputError(f"--tokenizer {model.tokenizer}: cannot be loaded: {_sentence(error)}") from None


def _refuse_silent(model: Served, base: str, tasks: str) -> None:
    """Refuse a server that doesn't give the log-probabilities of a prompt's own tokens."""
    key = os.environ.get("OPENAI_API_KEY", "")
    body = {"model": model.name, "prompt": "one two three four", "max_tokens": 1, "logprobs": 1, "echo": True}
    try:
        answer = httpx.post(
            f"{base}/completions", json=body, headers={"Authorization": f"Bearer {key}"} if key else {}, timeout=60
        )
    except httpx.HTTPError as error:
        raise OperationError(f"{base} cannot be reached: {_sentence(error)}") from None
    try:
        given = answer.raise_for_status().json()["choices"][0]["logprobs"]["token_logprobs"]
    except (httpx.HTTPStatusError, ValueError, LookupError, TypeError):
        given = []
    if not isinstance(given, list) or len(given) < 3:
        raise InputError(
            f"--task {tasks}: log-probabilities of given texts are needed, which {base} doesn't give for prompts: the "
            "model's run, folder or GGUF file is accepted, and for a server tasks that generate"
        )
    if model.tokenizer is None:
        raise InputError(
            f"--task {tasks}: --tokenizer is needed, a Hugging Face folder, which says where a text is cut"
        )


def _remembering(asked: LM, answers: Answers, progress: Progress | None) -> LM:
    """A model that asks another what isn't known yet, and keeps its answers."""
    from lm_eval.api.model import LM

    class Remembering(LM):  # type: ignore[misc,unused-ignore]
        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            return [(value, greedy) for value, greedy in self._answered("loglikelihood", requests)]

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            return self._answered("loglikelihood_rolling", requests)

        def generate_until(self, requests: list[Any]) -> list[str]:
            return self._answered("generate_until", requests)

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> Any:
            return asked.apply_chat_template(chat_history, add_generation_prompt=add_generation_prompt)

        def chat_template(self, chat_template: bool | str = False) -> str | None:
            found: str | None = asked.chat_template(chat_template)
            return found

        @property
        def tokenizer_name(self) -> str:
            return str(asked.tokenizer_name)

        def _answered(self, kind: str, requests: list[Any]) -> list[Any]:
            keys, repeats = [], dict[str, int]()
            for request in requests:
                key = _key(kind, request.args)
                repeats[key] = repeats.get(key, 0) + 1
                keys.append(f"{key} {repeats[key]}" if request.repeats > 1 else key)
            missing = {key: request for key, request in zip(keys, requests, strict=True) if key not in answers}
            ordered = sorted(missing, key=lambda key: len(str(missing[key].args[0])))
            total, done = len(set(keys)), len(set(keys)) - len(missing)
            size = _CHUNK if kind == "loglikelihood" else 1
            for start in range(0, len(ordered), size):
                if progress is not None:
                    progress(done + start, total, kind.replace("_", " "))
                part = ordered[start : start + size]
                given = getattr(asked, kind)([missing[key] for key in part])
                if any(answer is None for answer in given):
                    raise OperationError("the server answered no text")
                answers.keep(dict(zip(part, given, strict=True)))
            return [answers[key] for key in keys]

    return Remembering()


def _key(kind: str, args: tuple[Any, ...]) -> str:
    return hashlib.sha256(json.dumps([kind, args], default=str).encode()).hexdigest()[:32]


def _report(found: Any) -> dict[str, Any]:
    """What is kept of the library's results."""
    tasks: dict[str, Any] = {}
    scores: dict[str, Any] = {}
    outcomes: dict[str, Any] = {}
    for task, rows in found["samples"].items():
        by_metric: dict[str, dict[str, Any]] = {}
        for row in rows:
            for metric in row["metrics"]:
                value = _outcome(row[metric])
                if value is not None:
                    sample = f"{row['doc_id']}-{row['doc_hash'][:12]}"
                    by_metric.setdefault(f"{metric},{row['filter']}", {})[sample] = value
        outcomes[task] = by_metric
        higher = found["higher_is_better"].get(task, {})
        tasks[task] = {
            "version": found["versions"].get(task),
            "shots": found["n-shot"].get(task),
            "samples": found["n-samples"][task]["effective"],
            "higher_is_better": {metric: higher.get(metric.partition(",")[0], True) for metric in by_metric},
        }
    for task, values in found["results"].items():
        scores[task] = {
            metric: {"value": value, "standard_error": _error_of(metric, outcomes.get(task, {}))}
            for metric, value in values.items()
            if "," in metric and "_stderr," not in metric and isinstance(value, (int, float))
        }
    return {"tasks": tasks, "scores": scores, "samples": outcomes}


def _error_of(metric: str, outcomes: dict[str, dict[str, Any]]) -> float | None:
    values = list(outcomes.get(metric, {}).values())
    return standard_error(metric.partition(",")[0], values) if len(values) > 1 else None


def _outcome(value: Any) -> float | list[float] | None:
    """A sample's number, or its log-likelihood with its words or bytes; None where it has no number."""
    if isinstance(value, (int, float)):
        return float(value)
    if isinstance(value, (tuple, list)) and len(value) == 2 and all(isinstance(part, (int, float)) for part in value):
        return [float(part) for part in value]
    return None
