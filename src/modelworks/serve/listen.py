"""Opens a port and serves the API on it. A port in use, or an address that isn't ours, is said in one sentence."""

from __future__ import annotations

import errno
import socket
from collections.abc import Collection

import uvicorn

from modelworks.serve.api import create_app
from modelworks.serve.llamacpp import EngineSettings, LlamaCppEngine
from modelworks.serve.store import Store
from modelworks.spec.errors import InputError


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
    store: Store, model: str, settings: EngineSettings, *, host: str, port: int, hosts: Collection[str] = ()
) -> None:
    """Serve a store's models until the process is told to end; `model` is loaded before the first request."""
    listener = open_port(host, port)
    with listener:
        app = create_app(LlamaCppEngine(store, settings), store, preload=model, hosts=hosts)
        shown = f"[{host}]" if ":" in host else host
        print(f"{model} on http://{shown}:{listener.getsockname()[1]}/v1 (Ctrl-C ends it)", flush=True)
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5)
        uvicorn.Server(config).run([listener])
