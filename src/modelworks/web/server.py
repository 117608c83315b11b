"""The server: the API and the pages on one port, and what must happen when it begins and ends."""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, Response

from modelworks import __version__
from modelworks.assistant.chat import Assistant
from modelworks.assistant.conversations import conversation_routes
from modelworks.assistant.database import default_database
from modelworks.assistant.gateway import AccountAccess, access_if_wanted, account_routes, administration_routes
from modelworks.assistant.kept import DatabaseStorage
from modelworks.assistant.oidc import Provider
from modelworks.assistant.personal import PersonalEngine
from modelworks.assistant.store import ConversationStore
from modelworks.serve.access import Principal
from modelworks.serve.api import create_app
from modelworks.serve.config import load_config, oidc_of
from modelworks.serve.engine import Engine
from modelworks.serve.fairness import FairQueue
from modelworks.serve.listen import Configured
from modelworks.serve.llamacpp import EngineSettings, LlamaCppEngine
from modelworks.serve.routing import Member
from modelworks.serve.store import Store
from modelworks.spec.errors import InputError
from modelworks.spec.home import home
from modelworks.web.policy import PagePolicy
from modelworks.web.services import Services
from modelworks.web.sign_in import OIDC_PATH, SignedIn, oidc_routes, sign_in_routes

SAMPLING = {"temperature": 0.7, "top_p": 0.9, "repeat_penalty": 1.1, "max_tokens": 1024}
"""How the chat samples; small models repeat themselves without a penalty."""
_CACHE_FOR_EVER = {"Cache-Control": "public, max-age=31536000, immutable"}


@dataclass(frozen=True)
class Server:
    """The server's application and the rooms behind it."""

    app: FastAPI
    services: Services


def build(
    settings: EngineSettings | None = None,
    database: Path | None = None,
    hosts: Collection[str] = (),
    config_file: Path | None = None,
) -> Server:
    """Build the server over this machine's models and conversations. Once per process: NiceGUI is one per process.

    Parameters
    ----------
    settings : EngineSettings, optional
        Of the engine inside this process.
    database : Path, optional
        Where conversations are kept; left out, where `default_database` says. Users are always there.
    hosts : collection of str
        Names that browsers may call it by, beside those of `modelworks.serve.origin`.
    config_file : Path, optional
        The engines that answer instead of the one inside this process, as a gateway has them.

    Raises
    ------
    InputError
        If the configuration can't be used.
    OperationError
        If the database can't be used.
    """
    oidc = oidc_of(load_config(config_file) if config_file is not None else None)
    store, access = Store(), access_if_wanted(config_file)
    behind = Engines(store, settings or EngineSettings(), config_file, access)
    assistant = Assistant(ConversationStore(database or default_database()), behind.engine, SAMPLING)
    services = Services(store, behind.engine, assistant, access=access, members=behind.members)
    app = create_app(
        behind.engine,
        store,
        hosts=hosts,
        access=access,
        queue=behind.queue,
        storage=DatabaseStorage(access.accounts.database if access is not None else assistant.store.database),
        routers=[*behind.routers, conversation_routes(lambda request: services.of(request).assistant)],
        door=(lambda inner: SignedIn(inner, access)) if access is not None else None,
    )
    behind.attach(app)
    if access is not None:
        accounts = access.accounts

        def personal(principal: Principal) -> PersonalEngine:
            return PersonalEngine(behind.engine, principal, accounts, app.state.gate, app.state.metrics)

        services.personal = personal
        others = {}
        if oidc is not None:
            others[f"Sign in with {oidc.name}"] = OIDC_PATH
            app.include_router(oidc_routes(access, Provider(oidc)))
        app.include_router(sign_in_routes(access, others))
    _close_first(app, assistant)
    _add_static(app)
    _add_pages(app, services)
    app.add_middleware(PagePolicy)
    return Server(app, services)


class Engines:
    """What answers: the engine inside this process, or those of a configuration."""

    def __init__(
        self, store: Store, settings: EngineSettings, config_file: Path | None, access: AccountAccess | None
    ) -> None:
        self.queue: FairQueue | None = None
        self.members: Callable[[], list[Member]] | None = None
        self.routers: list[APIRouter] = []
        self._configured: Configured | None = None
        self.engine: Engine
        if config_file is None:
            self.engine = LlamaCppEngine(store, settings)
        else:
            self._configured = Configured(config_file, store)
            self.engine, self.queue = self._configured.router, self._configured.queue
            self.members = self._configured.router.members
            self.routers += self._configured.routes(access)
        if access is not None:
            self.routers += [account_routes(access), administration_routes(access)]

    def attach(self, app: FastAPI) -> None:
        """Have SIGHUP read the configuration again."""
        if self._configured is not None:
            self._configured.attach(app)


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

    from modelworks.web import admin, chat, models, plan, runs, supercomputer
    from modelworks.web.frame import FAVICON

    for page in (chat, plan, supercomputer, runs, models, *([admin] if services.access is not None else [])):
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
