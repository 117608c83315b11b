"""A store with the real SmolLM2 in it, and a real server on a free port; both once for all tests."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
import uvicorn

from modelworks.assistant.database import Database
from modelworks.assistant.kept import DatabaseStorage
from modelworks.serve.api import create_app
from modelworks.serve.llamacpp import EngineSettings, LlamaCppEngine
from modelworks.serve.store import Store
from modelworks.spec.errors import OperationError

MODEL = "smollm2-135m"
SLOTS = 2
CONTEXT = 1024


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store that holds SmolLM2-135M-Instruct, pulled as a user pulls it."""
    store = Store(tmp_path_factory.mktemp("models"))
    try:
        store.pull(MODEL)
    except OperationError as error:
        pytest.skip(f"SmolLM2 can't be fetched on this machine: {error}")
    return store


@pytest.fixture(scope="session")
def gguf(store: Store) -> Path:
    """SmolLM2's GGUF file."""
    return store.path(MODEL)


@pytest.fixture(scope="session")
def address(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where our server listens."""
    storage = DatabaseStorage(Database(tmp_path_factory.mktemp("kept") / "modelworks.db"))
    engine = LlamaCppEngine(store, EngineSettings(slots=SLOTS, threads=1, context=CONTEXT))
    app = create_app(engine, store, body_limit=1 << 20, preload=MODEL, storage=storage)
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])))
    thread.start()
    while not server.started and thread.is_alive():
        thread.join(0.05)
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    thread.join(30)
    with contextlib.suppress(OSError):
        listener.close()


@pytest.fixture(scope="session")
def client(address: str) -> openai.OpenAI:
    """The official client, speaking with our server."""
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=120)
