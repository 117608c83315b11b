"""Opens a port and serves the API on it. A port in use, or an address that isn't ours, is said in one sentence."""

from __future__ import annotations

import asyncio
import errno
import logging
import math
import os
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import APIRouter, FastAPI, Request

from modelworks.serve.access import Access, principal_of
from modelworks.serve.api import create_app
from modelworks.serve.config import EngineConfig, ServeConfig, load_config
from modelworks.serve.errors import RequestError
from modelworks.serve.fairness import FairQueue
from modelworks.serve.llamacpp import EngineSettings, LlamaCppEngine
from modelworks.serve.routing import Member, Router
from modelworks.serve.shared import share_turns
from modelworks.serve.storage import Storage
from modelworks.serve.store import Store
from modelworks.spec.errors import InputError

_LOG = logging.getLogger("modelworks.routing")
_GRACE_S = 5
"""How long answers may take to end when the process does, where no configuration says so."""


def open_port(host: str, port: int, option: str = "--port") -> socket.socket:
    """A socket that listens; port 0 takes a free one. `option` is what chose it.

    Raises
    ------
    InputError
        If the port is in use, may not be opened, or the address isn't this machine's.
    """
    try:
        return socket.create_server((host, port), family=_family(host), backlog=2048)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise InputError(
                f"port {port} on {host} is in use; another {option} is accepted, 0 takes a free one"
            ) from None
        reason = error.strerror or str(error)
        raise InputError(f"cannot listen on {host}:{port} ({reason}); an address of this machine is accepted") from None


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


@contextmanager
def port_for_xai(host: str, port: int | None) -> Iterator[str | None]:
    """Hold a port for `serve.xai.server`, in this process and in others; ``host:port``, or None without one.

    Raises
    ------
    InputError
        If xAI's package isn't installed, or as `open_port`.
    """
    if port is None:
        yield None
        return
    try:
        import modelworks.serve.xai.server  # noqa: F401
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        raise InputError(
            f"--grpc-port {port} is not accepted: the package {package} is not installed; pip install 'modelworks[xai]'"
        ) from None
    with open_port(host, port, "--grpc-port") as free:
        port = free.getsockname()[1]
    # gRPC opens its sockets itself. This one never listens: it keeps the port for those that share it.
    with socket.socket(_family(host)) as held:
        for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):
            held.setsockopt(socket.SOL_SOCKET, option, 1)
        held.bind((host, port))
        yield f"{_shown(host)}:{port}"


def also_for_xai(app: FastAPI, address: str | None, grace_s: float = _GRACE_S) -> None:
    """Have an application answer xAI's clients as well, where there is an address for them."""
    if address is not None:
        from modelworks.serve.xai.server import answer_xai

        answer_xai(app, address, grace_s)


def serve(
    store: Store,
    model: str,
    settings: EngineSettings,
    *,
    host: str,
    port: int,
    hosts: Collection[str] = (),
    access: Access | None = None,
    storage: Storage | None = None,
    routers: Collection[APIRouter] = (),
    grpc_port: int | None = None,
) -> None:
    """Serve a store's models until the process is told to end; `model` is loaded before the first request."""
    listener = open_port(host, port)
    with listener, port_for_xai(host, grpc_port) as xai:
        engine = LlamaCppEngine(store, settings)
        app = create_app(engine, store, preload=model, hosts=hosts, access=access, storage=storage, routers=routers)
        also_for_xai(app, xai)
        announce(listener, model, access is not None, xai)
        config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=_GRACE_S)
        uvicorn.Server(config).run([listener])


def gateway(
    config_file: Path,
    store: Store,
    *,
    host: str,
    port: int,
    hosts: Collection[str] = (),
    access: Access | None = None,
    storage: Storage | None = None,
    routers: Collection[APIRouter] = (),
    grpc_port: int | None = None,
) -> None:
    """Serve the engines of a configuration file until the process is told to end.

    SIGHUP, and with accounts ``POST /v1/admin/reload``, read the file again; answers that run go on. A file that can't
    be used changes nothing.

    Raises
    ------
    InputError
        If the file can't be used, or a port can't be opened.
    """
    configured = Configured(config_file, store)
    listener = open_port(host, port)
    with listener, port_for_xai(host, grpc_port) as xai:
        app = configured.app(hosts, access, storage, routers)
        what, drain_s = ", ".join(configured.config.engines), configured.config.drain_s
        also_for_xai(app, xai, drain_s)
        announce(listener, what, access is not None, xai)
        config = uvicorn.Config(
            app, log_level="warning", access_log=False, timeout_graceful_shutdown=math.ceil(drain_s)
        )
        uvicorn.Server(config).run([listener])


class Configured:
    """The engines of a configuration file, and the queue before them; the file can be read again while they run.

    Parameters
    ----------
    config_file : Path
        The file.
    store : Store
        The models of an entry with ``embedded = true``.
    share : int
        How many processes stand before the same engines: each gives them its part of their `concurrency`.

    Raises
    ------
    InputError
        If the file can't be used.
    """

    def __init__(self, config_file: Path, store: Store, share: int = 1) -> None:
        self._file, self._store, self._share = config_file, store, share
        self.config = self._loaded()
        shared = shared_among(self.config, share)
        self.router = Router(shared, lambda engine: _embedded(store, engine))
        self.queue = FairQueue(self.router.capacity, shared.queue.waiting, shared.queue.wait_s)

    def _loaded(self) -> ServeConfig:
        config = load_config(self._file)
        check_share(config, self._share, str(self._file))
        return config

    async def reload(self) -> ServeConfig:
        """Read the file again; answers that run go on. A file that can't be used changes nothing.

        Raises
        ------
        InputError
            If it can't be used.
        """
        again = await asyncio.to_thread(self._loaded)
        shared = shared_among(again, self._share)
        await self.router.reload(shared)
        self.queue.change(shared.queue.waiting, shared.queue.wait_s)
        self.config = again
        return again

    def routes(self, access: Access | None) -> list[APIRouter]:
        """What an administrator asks. Without accounts there is no one who could be told from the others: then SIGHUP
        alone reads the file again."""
        return [admin_routes(self.router, self._asked_again, access)] if access is not None else []

    async def _asked_again(self) -> ServeConfig:
        """Read the file again here, and have the other processes do so."""
        if self._share == 1:
            return await self.reload()
        config = await asyncio.to_thread(self._loaded)
        os.kill(os.getppid(), signal.SIGHUP)
        return config

    def app(
        self, hosts: Collection[str], access: Access | None, storage: Storage | None, routers: Collection[APIRouter]
    ) -> FastAPI:
        """The gateway as an application."""
        every = [*self.routes(access), *routers]
        app = create_app(
            self.router, self._store, hosts=hosts, access=access, queue=self.queue, storage=storage, routers=every
        )
        self.attach(app)
        return app

    def attach(self, app: FastAPI) -> None:
        """Read the file again on SIGHUP, and share turns with other processes, as long as an application runs."""
        _on_hangup(app, self.reload)
        share_turns(app, self.queue)


def check_share(config: ServeConfig, share: int, where: str) -> None:
    """Refuse what can't be answered by several processes.

    Raises
    ------
    InputError
        If an engine is inside the process.
    """
    inside = next((name for name, engine in config.engines.items() if engine.embedded), None)
    if share > 1 and inside is not None:
        raise InputError(
            f"{where}: engines.{inside}.embedded = true is not accepted with --workers {share}: llama.cpp answers in "
            "one process; engines with a url, or --workers 1, are accepted"
        )


def shared_among(config: ServeConfig, share: int) -> ServeConfig:
    """The configuration for one of so many processes: of what engines and the queue take, each has its part."""
    if share == 1:
        return config
    engines = {
        name: engine.model_copy(update={"concurrency": -(-engine.concurrency // share)})
        for name, engine in config.engines.items()
    }
    queue = config.queue.model_copy(update={"waiting": -(-config.queue.waiting // share)})
    return config.model_copy(update={"engines": engines, "queue": queue})


def admin_routes(
    router: Router, reload: Callable[[], Awaitable[ServeConfig]], access: Access | None = None
) -> APIRouter:
    """What an operator asks of a running gateway."""
    routes = APIRouter(prefix="/admin", tags=["admin"])

    @routes.post("/reload")
    async def read_again(request: Request) -> dict[str, Any]:
        """Read the configuration file again; answers that run go on."""
        try:
            config = await reload()
        except InputError as error:
            raise RequestError(str(error), code="invalid_configuration") from None
        principal = principal_of(request)
        if access is not None and principal is not None:
            await access.note(principal.user, "reload the configuration", ", ".join(sorted(config.engines)))
        return {"engines": sorted(config.engines)}

    @routes.get("/engines")
    async def engines() -> dict[str, Any]:
        """The engines, and how they are."""
        return {"data": [described(member) for member in router.members()]}

    return routes


def described(member: Member) -> dict[str, Any]:
    """An engine, and how it is, as plain values."""
    return {
        "name": member.name,
        "well": member.well,
        "running": member.load,
        "concurrency": member.capacity,
        "models": sorted(member.cards),
    }


def _embedded(store: Store, config: EngineConfig) -> LlamaCppEngine:
    return LlamaCppEngine(store, EngineSettings(slots=config.slots, threads=config.threads, context=config.context))


def _on_hangup(app: FastAPI, reload: Callable[[], Awaitable[object]]) -> None:
    """Read the configuration again on SIGHUP, as long as the application runs."""
    inner = app.router.lifespan_context
    reading: set[asyncio.Task[None]] = set()

    async def again() -> None:
        try:
            await reload()
        except InputError as error:
            _LOG.error("the configuration stays as it was: %s", error)

    def begin() -> None:
        task = asyncio.get_running_loop().create_task(again())
        reading.add(task)
        task.add_done_callback(reading.discard)

    @asynccontextmanager
    async def lifespan(running: FastAPI) -> AsyncIterator[Any]:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGHUP, begin)
        try:
            async with inner(running) as state:
                yield state
        finally:
            loop.remove_signal_handler(signal.SIGHUP)

    app.router.lifespan_context = lifespan


def announce(listener: socket.socket, what: str, keys: bool, xai: str | None = None) -> None:
    """Say where what is served."""
    host, port = listener.getsockname()[:2]
    needed = "; a key is needed" if keys else ""
    print(f"{what} on http://{_shown(host)}:{port}/v1 (Ctrl-C ends it{needed})", flush=True)
    if xai is not None:
        print(f"for xai-sdk on {xai}, without TLS", flush=True)


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host
