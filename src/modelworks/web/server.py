"""The server: the API and the pages on one port, and what must happen when it begins and ends."""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Response

from modelworks import __version__
from modelworks.assistant.chat import Assistant
from modelworks.assistant.database import default_database
from modelworks.assistant.kept import DatabaseKeeper
from modelworks.assistant.store import ConversationStore
from modelworks.serve.api import create_app
from modelworks.serve.llamacpp import EngineSettings, LlamaCppEngine
from modelworks.serve.store import Store
from modelworks.spec.errors import InputError
from modelworks.spec.home import home
from modelworks.web.services import Services

SAMPLING = {"temperature": 0.7, "top_p": 0.9, "repeat_penalty": 1.1, "max_tokens": 1024}
"""How the chat samples; small models repeat themselves without a penalty."""
_CACHE_FOR_EVER = {"Cache-Control": "public, max-age=31536000, immutable"}


@dataclass(frozen=True)
class Server:
    """The server's application and the rooms behind it."""

    app: FastAPI
    services: Services


def build(settings: EngineSettings | None = None, database: Path | None = None, hosts: Collection[str] = ()) -> Server:
    """Build the server over this machine's models and conversations. Once per process: NiceGUI is one per process.

    `hosts` are names that browsers may call it by, beside those of `modelworks.serve.origin`.

    Raises
    ------
    OperationError
        If the database can't be used.
    """
    store = Store()
    engine = LlamaCppEngine(store, settings or EngineSettings())
    assistant = Assistant(ConversationStore(database or default_database()), engine, SAMPLING)
    services = Services(store, engine, assistant)
    app = create_app(engine, store, hosts=hosts, keeper=DatabaseKeeper())
    _close_first(app, assistant)
    _add_static(app)
    _add_pages(app, services)
    return Server(app, services)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens on a port, before anything else is started.

    Raises
    ------
    InputError
        If the port is in use or may not be used, or the host isn't an address of this machine.
    """
    if not 0 <= port <= 65535:
        raise InputError(f"--port {port} is not accepted: a number from 1 to 65535 is (0 takes a free one)")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(128)
    except OSError as error:
        reason = "is in use by another program" if error.errno == 98 else f"cannot be used: {error.strerror or error}"
        raise InputError(f"port {port} on {host} {reason}; give another one with --port") from None
    return listener


def url_of(listener: socket.socket) -> str:
    """The address under which a browser on this machine finds what listens on a socket."""
    host, port = listener.getsockname()[:2]
    if host in {"0.0.0.0", "::"}:  # noqa: S104 (compared with, not bound to)
        host = "127.0.0.1"
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def _close_first(app: FastAPI, assistant: Assistant) -> None:
    """End and store all answers before the engine is closed."""
    inner = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(running: FastAPI) -> AsyncIterator[Any]:
        async with inner(running) as state:
            try:
                yield state
            finally:
                await assistant.close()

    app.router.lifespan_context = lifespan


def _add_static(app: FastAPI) -> None:
    from modelworks.web.frame import script, style_sheet

    for name, content, kind in (
        ("style.css", style_sheet(), "text/css"),
        ("modelworks.js", script(), "text/javascript"),
    ):
        response = Response(content, media_type=kind, headers=_CACHE_FOR_EVER)
        app.add_api_route(
            f"/_modelworks/{__version__}/{name}", lambda response=response: response, include_in_schema=False
        )


def _add_pages(app: FastAPI, services: Services) -> None:
    # NiceGUI would keep its own storage in the working folder.
    os.environ.setdefault("NICEGUI_STORAGE_PATH", str(home() / "nicegui"))
    from nicegui import ui

    from modelworks.web import chat, models, plan, runs, supercomputer
    from modelworks.web.frame import FAVICON

    for page in (chat, plan, supercomputer, runs, models):
        page.register(services)
    ui.run_with(
        app,
        mount_path="/",
        title="Modelworks",
        favicon=FAVICON,
        dark=None,
        tailwind=False,
        show_welcome_message=False,
        reconnect_timeout=10.0,
    )
