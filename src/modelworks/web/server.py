"""The server: the API and the pages on one port, and what must happen when it begins and ends."""

from __future__ import annotations

import os
import socket
import tomllib
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from starlette.staticfiles import StaticFiles

from modelworks import __version__
from modelworks.assistant.chat import Assistant
from modelworks.assistant.conversations import conversation_routes
from modelworks.assistant.database import default_database
from modelworks.assistant.documents.library import Library
from modelworks.assistant.documents.routes import document_routes
from modelworks.assistant.documents.store import DocumentStore
from modelworks.assistant.gateway import AccountAccess, access_if_wanted, account_routes, administration_routes
from modelworks.assistant.kept import DatabaseStorage
from modelworks.assistant.live.knowledge import Live
from modelworks.assistant.live.routes import source_routes
from modelworks.assistant.oidc import Provider
from modelworks.assistant.personal import PersonalEngine
from modelworks.assistant.retrieval import Embedder
from modelworks.assistant.store import ConversationStore
from modelworks.assistant.tools.loop import Calling
from modelworks.assistant.tools.store import ToolStore
from modelworks.assistant.tools.toolbox import Toolbox
from modelworks.serve.access import Principal
from modelworks.serve.api import create_app
from modelworks.serve.config import ToolsConfig, live_of, load_config, oidc_of
from modelworks.serve.engine import Engine
from modelworks.serve.fairness import FairQueue
from modelworks.serve.listen import Configured
from modelworks.serve.llamacpp import EngineSettings, LlamaCppEngine
from modelworks.serve.routing import Member
from modelworks.serve.store import Store
from modelworks.spec.errors import InputError
from modelworks.spec.fields import validate
from modelworks.spec.home import home
from modelworks.web.policy import PagePolicy
from modelworks.web.services import Services
from modelworks.web.shared import shared_routes
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
    titles: bool = True,
    any_folder: bool = False,
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
    titles : bool
        Whether models give conversations their titles.
    any_folder : bool
        Whether any folder may be a live source, where there are neither users nor a configuration.

    Raises
    ------
    InputError
        If the configuration can't be used.
    OperationError
        If the database can't be used.
    """
    config = load_config(config_file) if config_file is not None else None
    oidc, wanted = oidc_of(config), live_of(config)
    store, access = Store(), access_if_wanted(config_file)
    behind = Engines(store, settings or EngineSettings(), config_file, access)
    conversations = ConversationStore(database or default_database())
    embedding_model = os.environ.get("MODELWORKS_EMBEDDING_MODEL")
    embedder = Embedder(behind.engine, embedding_model) if embedding_model else None
    library = Library(DocumentStore(conversations.database), embedder)
    any_folder = any_folder and access is None and config is None
    live = Live(conversations.database, wanted, embedder, any_folder) if wanted.on else None
    calling = Calling(Toolbox(_tools(config_file)), ToolStore(conversations.database))
    assistant = Assistant(conversations, behind.engine, SAMPLING, titles, library, live, calling)
    services = Services(store, behind.engine, assistant, access=access, members=behind.members)

    def library_of(request: Request) -> Library:
        own = services.of(request).assistant.library
        assert own is not None
        return own

    app = create_app(
        behind.engine,
        store,
        hosts=hosts,
        access=access,
        queue=behind.queue,
        storage=DatabaseStorage(access.accounts.database if access is not None else assistant.store.database),
        routers=[
            *behind.routers,
            conversation_routes(lambda request: services.of(request).assistant),
            document_routes(library_of),
            *([source_routes(lambda request: services.of(request).assistant)] if live is not None else []),
        ],
        door=(lambda inner: SignedIn(inner, access)) if access is not None else None,
    )
    behind.attach(app)
    app.include_router(document_routes(library_of, prefix="/c"), include_in_schema=False)  # the pages' own, by session
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
    app.include_router(shared_routes(services))
    _close_first(app, assistant)
    _add_static(app)
    _add_pages(app, services)
    app.add_middleware(PagePolicy)
    return Server(app, services)


def _tools(config_file: Path | None) -> ToolsConfig:
    """What the configuration allows; without one, what ``tools.toml`` beside the data does, and else Python."""
    if config_file is not None:
        return load_config(config_file).tools
    own = home() / "tools.toml"
    try:
        return validate(ToolsConfig, tomllib.loads(own.read_text(encoding="utf-8")), str(own))
    except FileNotFoundError:
        return ToolsConfig(python=True)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"{own} can't be read: {error}") from None


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
    """Begin to refresh sources; end and store all answers before the engine is closed."""
    inner = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(running: FastAPI) -> AsyncIterator[Any]:
        async with inner(running) as state:
            if assistant.live is not None:
                assistant.live.start()
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
    app.mount(f"/_modelworks/{__version__}/katex", _Unchanging(directory=Path(__file__).parent / "static" / "katex"))


class _Unchanging(StaticFiles):
    """Files that a browser asks for once: their address has the version."""

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response: Response = super().file_response(*args, **kwargs)
        response.headers.update(_CACHE_FOR_EVER)
        return response


def _add_pages(app: FastAPI, services: Services) -> None:
    # NiceGUI would keep its own storage in the working folder.
    os.environ.setdefault("NICEGUI_STORAGE_PATH", str(home() / "nicegui"))
    import nicegui.elements.mermaid  # noqa: F401 (its files are served from then on, to `static/drawings.js`)
    from nicegui import ui
    from nicegui.language import Language
    from nicegui.translations import translations

    from modelworks.web import admin, chat, models, plan, runs, sources, supercomputer
    from modelworks.web.frame import FAVICON
    from modelworks.web.language import say

    more = [*([admin] if services.access is not None else []), *([sources] if services.assistant.live else [])]
    for page in (chat, plan, supercomputer, runs, models, *more):
        page.register(services)
    names: dict[str, Language] = {"en": "en-US", "pl": "pl"}
    for code, name in names.items():
        translations[name] = translations["en-US"] | {
            "connection_lost": say("The connection is lost.", to=code),
            "trying_to_reconnect": say(
                "What was asked goes on at the server; it is shown as soon as it can be reached.", to=code
            ),
            "message_too_long": say("This is too long to be sent as a message.", to=code),
            "message_too_long_body": say("Add it as a document.", to=code),
        }
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
