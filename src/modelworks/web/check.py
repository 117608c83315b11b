"""`modelworks up --check`: the whole line walked once, headless: a spec in, a model to talk to out.

Every stage does the real thing at a small size: text is read and packed, a Grok-shaped network is trained in a
background process, stopped and resumed, released and verified; the server is a process of its own, talked to over
HTTP. A stage that fails ends the walk, and those behind it are left out.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.resources import files
from pathlib import Path

import httpx
import psutil
from rich.console import Console
from rich.table import Table

from modelworks.assistant.chat import Assistant
from modelworks.assistant.store import ConversationStore
from modelworks.data import prepare
from modelworks.launch import local
from modelworks.serve.llamacpp import EngineSettings, LlamaCppEngine
from modelworks.serve.store import Store
from modelworks.spec.errors import InputError, OperationError
from modelworks.spec.files import dumps, loads_run
from modelworks.spec.home import data_folder, home
from modelworks.spec.run import RunSpec
from modelworks.train.record import RunRecord, Status
from modelworks.web.chat import FIRST_MODEL

RUN = "check"
STAGE_S = 240.0
"""How long one stage may take."""
SMALLER = [
    f"name={RUN}",
    "model.layers=2",
    "model.hidden=128",
    "model.heads=2",
    "model.kv_heads=1",
    "model.vocab=1024",
    "model.context=256",
    "model.moe.expert_hidden=128",
    "data.max_bytes=1_000_000",
    "data.validation_fraction=0.1",
    "train.seq_len=128",
    "train.global_batch=8",
    "train.tokens=40_960",
    "train.validate_every=20",
    "train.validation_tokens=4096",
    "train.compile=false",
    "checkpoint.every_steps=10",
]
"""The first run's spec, made so small that two cores train it in seconds."""
_QUESTION = "Name one animal."


@dataclass(frozen=True)
class Stage:
    """What became of one stage."""

    name: str
    seconds: float
    result: str
    """``passed``, ``failed`` or ``left out``."""
    detail: str = ""

    @property
    def passed(self) -> bool:
        """Whether it did what it should."""
        return self.result == "passed"

    def as_dict(self) -> dict[str, object]:
        """Plain values."""
        return asdict(self)


@dataclass
class Walk:
    """What one stage hands to the next."""

    spec: RunSpec | None = None
    url: str = ""
    server: subprocess.Popen[bytes] | None = None
    conversation_id: str = ""
    log: Path | None = None
    answers: dict[str, str] = field(default_factory=dict)


def check(console: Console | None) -> list[Stage]:
    """Walk the line and report each stage; `console`, if given, is told where the walk is."""
    stages: list[Stage] = []
    walk = Walk()
    with _home():
        try:
            for name, work in _STAGES:
                if stages and not stages[-1].passed:
                    stages.append(Stage(name, 0.0, "left out"))
                    continue
                with console.status(f"{name} ...") if console else contextlib.nullcontext():
                    stages.append(_stage(name, work, walk))
        finally:
            _end(walk)
    return stages


def print_table(stages: list[Stage], console: Console) -> None:
    """The stages as a table for people."""
    colours = {"passed": "green", "failed": "red", "left out": "dim"}
    table = Table("stage", "seconds", "result", "detail")
    table.columns[1].justify = "right"
    for stage in stages:
        result = f"[{colours[stage.result]}]{stage.result}[/]"
        table.add_row(stage.name, f"{stage.seconds:.1f}", result, stage.detail)
    table.add_section()
    table.add_row("all", f"{sum(stage.seconds for stage in stages):.1f}", "", "")
    console.print(table)


def _stage(name: str, work: Callable[[Walk], str], walk: Walk) -> Stage:
    began = time.monotonic()
    try:
        detail, result = work(walk), "passed"
    except (InputError, OperationError, httpx.HTTPError, TimeoutError) as error:
        detail, result = str(error) or type(error).__name__, "failed"
    return Stage(name, round(time.monotonic() - began, 2), result, detail)


@contextmanager
def _home() -> Iterator[None]:
    """A temporary home folder, unless one is given by the environment."""
    if os.environ.get("MODELWORKS_HOME"):
        yield
        return
    with tempfile.TemporaryDirectory(prefix="modelworks-check-") as folder:
        os.environ["MODELWORKS_HOME"] = folder
        try:
            yield
        finally:
            del os.environ["MODELWORKS_HOME"]


# --- the stages -------------------------------------------------------------------------------------------------------


def _spec(walk: Walk) -> str:
    text = (files("modelworks.web") / "first_run.toml").read_text(encoding="utf-8")
    walk.spec = loads_run(text, SMALLER, where="first_run.toml")
    if loads_run(dumps(walk.spec)) != walk.spec:
        raise OperationError("the spec that was written doesn't read back equal")
    return f"{walk.spec.model.parameters.total:,} parameters, {walk.spec.train.steps} steps"


def _data(walk: Walk) -> str:
    assert walk.spec is not None
    packed = prepare(walk.spec.data, walk.spec.model.vocab, data_folder())
    return f"{packed.tokens('train'):,} tokens to train on, {packed.tokens('validation'):,} held out"


def _train(walk: Walk) -> str:
    assert walk.spec is not None
    local.start(walk.spec)
    quarter = walk.spec.train.steps // 4
    status = _wait(lambda status: status.step >= quarter)
    with contextlib.suppress(OperationError):  # a fast machine may have trained it to its end
        RunRecord(RUN).stop(STAGE_S)
    return f"stopped at step {RunRecord(RUN).status().step}, loss {status.loss or 0:.2f}"


def _resume(walk: Walk) -> str:
    assert walk.spec is not None
    if RunRecord(RUN).status().state != "finished":
        local.resume(RUN)
    steps = walk.spec.train.steps
    status = _wait(lambda status: status.step >= steps)
    return f"trained to step {status.step}, loss {status.loss or 0:.2f}"


def _release(_walk: Walk) -> str:
    status = _wait(lambda status: status.released)
    folder = RunRecord(RUN).folder / "release"
    found = sorted(path.suffix for path in folder.rglob("*") if path.suffix in {".safetensors", ".gguf"})
    if set(found) != {".safetensors", ".gguf"}:
        raise OperationError(f"the release in {folder} has {found or 'nothing'}, not both safetensors and GGUF")
    return f"safetensors and GGUF, offered to the chat as {status.served_as}"


def _pull(_walk: Walk) -> str:
    model = Store().pull(FIRST_MODEL)
    return f"{model.name}, {model.bytes / 1e6:.0f} MB, checksum verified"


def _converse(walk: Walk) -> str:
    async def talk() -> str:
        engine = LlamaCppEngine(Store(), EngineSettings(slots=1))
        store = ConversationStore(home() / "modelworks.db")
        assistant = Assistant(store, engine, {"max_tokens": 24, "temperature": 0})
        try:
            walk.conversation_id = store.create(FIRST_MODEL).id
            answer = await assistant.ask(walk.conversation_id, _QUESTION, None, FIRST_MODEL)
            await asyncio.wait_for(answer.finished.wait(), STAGE_S)
        finally:
            await assistant.close()
            await engine.close()
            store.close()
        if answer.state != "complete" or not answer.text.strip():
            raise OperationError(f"the answer is {answer.state}: {answer.notice or 'it is empty'}")
        return answer.text

    return f"asked and stored; the answer has {len(asyncio.run(talk()))} characters"


def _serve(walk: Walk) -> str:
    walk.log = home() / "check-server.log"
    with walk.log.open("wb") as log:
        command = [sys.executable, "-m", "modelworks", "up", "--port", "0", "--no-run"]
        walk.server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    deadline = time.monotonic() + STAGE_S
    while time.monotonic() < deadline:
        if walk.server.poll() is not None:
            raise OperationError(f"the server ended at once: {walk.log.read_text(errors='replace').strip()[-400:]}")
        with contextlib.suppress(OSError, ValueError, httpx.HTTPError):
            walk.url = json.loads((home() / "up.json").read_text())["url"]
            if httpx.get(f"{walk.url}/health", timeout=5).is_success:
                return walk.url
        time.sleep(0.1)
    raise OperationError("the server doesn't answer")


def _chat(walk: Walk) -> str:
    for model in (FIRST_MODEL, RUN):
        request = {
            "model": model,
            "messages": [{"role": "user", "content": _QUESTION}],
            "max_tokens": 24,
            "stream": True,
        }
        text, pieces = "", 0
        with httpx.stream("POST", f"{walk.url}/v1/chat/completions", json=request, timeout=STAGE_S) as response:
            if not response.is_success:
                raise OperationError(f"{model}: HTTP {response.status_code}: {response.read().decode()[:300]}")
            for line in response.iter_lines():
                if not line.startswith("data: {"):
                    continue
                for choice in json.loads(line.removeprefix("data: "))["choices"]:
                    text += choice["delta"].get("content") or ""
                    pieces += 1
        if pieces < 2:
            raise OperationError(f"{model} did not stream: {pieces} pieces")
        walk.answers[model] = text
    if not walk.answers[FIRST_MODEL].strip():
        raise OperationError(f"{FIRST_MODEL} said nothing")
    return f"{FIRST_MODEL} and {RUN} answer in a stream"


def _pages(walk: Walk) -> str:
    for path, sign in (("/", "Write a message"), ("/runs", RUN), (f"/runs/{RUN}", "Validation"), ("/models", RUN)):
        _page(walk, path, sign)
    return "chat, runs, models"


def _found(walk: Walk) -> str:
    _page(walk, f"/c/{walk.conversation_id}", _QUESTION)
    return "the conversation is on its page, in another process than the one that stored it"


_STAGES: list[tuple[str, Callable[[Walk], str]]] = [
    ("spec", _spec),
    ("data", _data),
    ("train", _train),
    ("resume", _resume),
    ("release", _release),
    ("pull", _pull),
    ("conversation", _converse),
    ("serve", _serve),
    ("chat", _chat),
    ("pages", _pages),
    ("found again", _found),
]


def _page(walk: Walk, path: str, sign: str) -> None:
    response = httpx.get(walk.url + path, timeout=30)
    if not response.is_success or sign not in response.text:
        raise OperationError(f"the page {path} answers {response.status_code} and doesn't show {sign!r}")


def _wait(reached: Callable[[Status], bool]) -> Status:
    """Wait for the run to reach something; it fails if its process ends before."""
    record, deadline = RunRecord(RUN), time.monotonic() + STAGE_S
    while time.monotonic() < deadline:
        status = record.status()
        if reached(status):
            return status
        gone = status.pid is not None and not psutil.pid_exists(status.pid)
        if not status.active and (gone or status.state != "finished") and not reached(record.status()):
            raise OperationError(f"the run is {status.state}: {status.message or record.log(3)}")
        time.sleep(0.2)
    raise OperationError(f"the run is {record.status().state} after {STAGE_S:.0f} s, at step {record.status().step}")


def _end(walk: Walk) -> None:
    """End what the walk started."""
    if walk.server is not None and walk.server.poll() is None:
        walk.server.send_signal(signal.SIGTERM)
        try:
            walk.server.wait(15)
        except subprocess.TimeoutExpired:
            walk.server.kill()
            walk.server.wait()
    with contextlib.suppress(InputError, OperationError):
        RunRecord(RUN).stop(60)
