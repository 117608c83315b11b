"""Opens a port and serves the API on it. A port in use, or an address that isn't ours, is said in one sentence."""

from __future__ import annotations

import asyncio
import errno
import logging
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import APIRouter, FastAPI

from modelworks.serve.access import Access
from modelworks.serve.api import create_app
from modelworks.serve.config import EngineConfig, ServeConfig, load_config
from modelworks.serve.errors import RequestError
from modelworks.serve.fairness import FairQueue
from modelworks.serve.llamacpp import EngineSettings, LlamaCppEngine
from modelworks.serve.responses import Keeper
from modelworks.serve.routing import Member, Router
from modelworks.serve.store import Store
from modelworks.spec.errors import InputError

_LOG = logging.getLogger("modelworks.routing")


def open_port(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 takes a free one.

    Raises
    ------
    InputError
        If the port is in use, may not be opened, or the address isn't this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise InputError(
                f"port {port} on {host} is in use; another --port is accepted, 0 takes a free one"
            ) from None
        reason = error.strerror or str(error)
        raise InputError(f"cannot listen on {host}:{port} ({reason}); an address of this machine is accepted") from None


def serve(
    store: Store,
    model: str,
    settings: EngineSettings,
    *,
    host: str,
    port: int,
    hosts: Collection[str] = (),
    access: Access | None = None,
    keeper: Keeper | None = None,
    routers: Collection[APIRouter] = (),
) -> None:
    """Serve a store's models until the process is told to end; `model` is loaded before the first request."""
    listener = open_port(host, port)
    with listener:
        engine = LlamaCppEngine(store, settings)
        app = create_app(engine, store, preload=model, hosts=hosts, access=access, keeper=keeper, routers=routers)
        _run(app, listener, model, access is not None)


def gateway(
    config_file: Path,
    store: Store,
    *,
    host: str,
    port: int,
    hosts: Collection[str] = (),
    access: Access | None = None,
    keeper: Keeper | None = None,
    routers: Collection[APIRouter] = (),
) -> None:
    """Serve the engines of a configuration file until the process is told to end.

    SIGHUP, and with accounts ``POST /v1/admin/reload``, read the file again; answers that run go on. A file that can't
    be used changes nothing.

    Raises
    ------
    InputError
        If the file can't be used, or the port can't be opened.
    """
    config = load_config(config_file)
    listener = open_port(host, port)
    with listener:
        router = Router(config, lambda engine: _embedded(store, engine))
        queue = FairQueue(router.capacity, config.queue.waiting, config.queue.wait_s)

        async def reload() -> ServeConfig:
            again = await asyncio.to_thread(load_config, config_file)
            await router.reload(again)
            queue.change(again.queue.waiting, again.queue.wait_s)
            return again

        # Without accounts there is no one who could be told from the others: then SIGHUP alone reads the file again.
        admin = [admin_routes(router, reload)] if access is not None else []
        app = create_app(
            router, store, hosts=hosts, access=access, queue=queue, keeper=keeper, routers=[*admin, *routers]
        )
        _on_hangup(app, reload)
        _run(app, listener, ", ".join(config.engines), access is not None)


def admin_routes(router: Router, reload: Callable[[], Awaitable[ServeConfig]]) -> APIRouter:
    """What an operator asks of a running gateway."""
    routes = APIRouter(prefix="/admin", tags=["admin"])

    @routes.post("/reload")
    async def read_again() -> dict[str, Any]:
        """Read the configuration file again; answers that run go on."""
        try:
            config = await reload()
        except InputError as error:
            raise RequestError(str(error), code="invalid_configuration") from None
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


def _run(app: FastAPI, listener: socket.socket, what: str, keys: bool) -> None:
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    needed = "; a key is needed" if keys else ""
    print(f"{what} on http://{shown}:{port}/v1 (Ctrl-C ends it{needed})", flush=True)
    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=5)
    uvicorn.Server(config).run([listener])
