"""Stub engines in processes of their own, and gateways over them, for the tests."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import uvicorn
from fastapi import FastAPI

STUB = Path(__file__).with_name("stub_engine.py")
HELLO = [{"role": "user", "content": "hello"}]


def plain_client(**options: Any) -> httpx.Client:
    """A client for http; without certificates, which take longer to read than most tests."""
    return httpx.Client(verify=False, trust_env=False, timeout=30, **options)


class Stub:
    """One stub engine; see `tests/serve/stub_engine.py` for what it can be told to do."""

    def __init__(self, *models: str, port: int = 0) -> None:
        command = [sys.executable, str(STUB), "--rate", "200", "--tokens", "8", "--port", str(port)]
        for model in models or ("stub",):
            command += ["--model", model]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())
        self._client = plain_client(base_url=f"http://127.0.0.1:{self.port}")
        self.url = f"http://127.0.0.1:{self.port}/v1"

    def control(self, **what: Any) -> None:
        """Say what it shall do from now on."""
        self._client.post("/control", json=what)

    def seen(self) -> dict[str, Any]:
        """What has happened."""
        found: dict[str, Any] = self._client.get("/seen").json()
        return found

    def end(self) -> None:
        """Kill it."""
        self._client.close()
        self._process.kill()
        self._process.wait()


@contextlib.contextmanager
def serving(app: FastAPI) -> Iterator[str]:
    """An application behind a real port."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])))
    thread.start()
    while not server.started and thread.is_alive():
        thread.join(0.02)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)
        listener.close()


def client_of(address: str, key: str = "none") -> openai.OpenAI:
    """The official client."""
    return openai.OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0, http_client=plain_client())


def text_of(chunks: Any) -> str:
    """What a streamed answer says."""
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def numbers_of(text: str) -> list[int]:
    """The numbers of a stub's tokens."""
    return [int(word.partition("@")[0]) for word in text.split()]


def wait_for(condition: Callable[[], Any], seconds: float = 10) -> Any:
    """What a condition gives as soon as it is true."""
    until = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < until, "it did not come true in time"
        time.sleep(0.02)
    return value
