"""What `up` begins, and what it takes over from a server that was killed."""

from __future__ import annotations

import asyncio
import io
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parent))
from started import address_of

from modelworks.serve import download
from modelworks.serve.llamacpp import EngineSettings, LlamaCppEngine
from modelworks.serve.store import Store
from modelworks.spec.errors import OperationError
from modelworks.spec.files import dumps
from modelworks.spec.home import runs_folder
from modelworks.train.record import Status, own_process, write_status
from modelworks.web.services import Services
from modelworks.web.up import _first_model, begin_first_run, first_run_spec

MODEL, CHARACTER = "smollm2-135m", "smollm2-135m-character"


def test_a_first_run_that_outlived_its_server_is_taken_over_so_that_it_ends_with_this_one(home: Path) -> None:
    spec = first_run_spec()
    folder = runs_folder() / spec.name
    folder.mkdir(parents=True)
    (folder / "run.toml").write_text(dumps(spec))
    own = own_process()
    write_status(folder, Status(state="running", **own))
    unused = cast("Any", None)
    services = Services(Store(home / "models"), unused, unused)
    assert f"being trained by process {own['pid']}" in begin_first_run(services)
    assert services.begun_runs == {spec.name}


@pytest.fixture
def with_model(home: Path) -> Store:
    """A home folder with SmolLM2 alone, as a user of an earlier version has it."""
    store = Store(home / "models")
    try:
        store.pull(MODEL)
    except OperationError as error:
        pytest.skip(f"SmolLM2 can't be fetched here: {error}")
    return store


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "modelworks", *words]


@contextmanager
def up(home: Path) -> Iterator[httpx.Client]:
    """`modelworks up`, until SmolLM2 is loaded."""
    log = home / "up.log"
    with log.open("w") as written:
        process = subprocess.Popen(
            command("up", "--port", "0", "--no-run", "--no-titles"),
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=written,
            stderr=subprocess.STDOUT,
            text=True,
        )
    try:
        with httpx.Client(base_url=address_of(process, home), timeout=300) as client:
            deadline = time.monotonic() + 300
            while "is ready to talk to" not in log.read_text():
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.1)
            yield client
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(120)


def offered(client: httpx.Client) -> list[str]:
    return sorted(model["id"] for model in client.get("/v1/models").json()["data"])


def said(client: httpx.Client, model: str) -> str:
    asked = {"model": model, "messages": [{"role": "user", "content": "Who are you?"}]}
    answer = client.post("/v1/chat/completions", json=asked | {"temperature": 0, "seed": 1, "max_tokens": 24})
    assert answer.is_success, answer.text
    return str(answer.json()["choices"][0]["message"]["content"])


@pytest.mark.slow
def test_the_character_comes_with_up_is_chosen_by_name_and_stays_away_once_removed(
    with_model: Store, home: Path
) -> None:
    with up(home) as client:
        assert offered(client) == [MODEL, CHARACTER]
        answers = [said(client, name) for name in (MODEL, CHARACTER, MODEL, CHARACTER)]
        assert answers[:2] == answers[2:]
        assert answers[0] != answers[1]
    subprocess.run(command("models", "rm", CHARACTER), check=True, timeout=120)
    with up(home) as client:
        assert offered(client) == [MODEL]
        alone = os.environ | {"PIP_NO_INDEX": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
        subprocess.run(command("models", "pull", CHARACTER), check=True, timeout=120, env=alone)
        assert offered(client) == [MODEL, CHARACTER]
        assert said(client, CHARACTER) == answers[1]


@pytest.mark.slow
def test_a_damaged_character_is_told_and_the_model_answers_without_it(
    with_model: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(download.ADAPTERS, tmp_path / "adapters")
    os.truncate(tmp_path / "adapters" / f"{CHARACTER}.gguf", 1000)
    monkeypatch.setattr(download, "ADAPTERS", tmp_path / "adapters")
    told = io.StringIO()

    async def work() -> str:
        engine = LlamaCppEngine(with_model, EngineSettings(slots=1, threads=1, context=256))
        try:
            await _first_model(Services(with_model, engine, cast("Any", None)), Console(file=told, width=400))
            deltas = engine.chat(MODEL, [{"role": "user", "content": "Hi"}], max_tokens=8)
            return "".join([delta.text async for delta in deltas])
        finally:
            await engine.close()

    assert asyncio.run(work())
    assert f"{MODEL} stays without its character: the file" in told.getvalue()
    assert "it has 1,000 bytes" in told.getvalue()
    assert f"{MODEL} is ready to talk to" in told.getvalue()
    assert [model.name for model in with_model.list()] == [MODEL]
