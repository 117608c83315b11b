"""Turns away what another site's page sends to this server through its reader's browser.

A server on the loopback interface is out of reach for strangers, but not for the pages that its owner visits. They can
post to it, open websockets to it, and, by a name that leads first to their own server and then to 127.0.0.1 (DNS
rebinding), read what it answers. Two headers that a page can't forge tell them apart: ``Host`` must be an address,
``localhost`` or this machine's name, and not a name of someone else's; ``Origin``, where a browser sends one, must be
the host itself.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send


class OwnOriginOnly:
    """Passes on requests and websockets that were meant for this server; the others get 403 and a reason.

    Parameters
    ----------
    app
        The application behind it.
    names
        More host names that lead here, such as a proxy's.
    """

    def __init__(self, app: ASGIApp, names: Collection[str] = ()) -> None:
        self._app = app
        self._names = {"localhost", socket.gethostname().lower(), *(name.lower() for name in names)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or turn it away."""
        reason = self._reason(scope) if scope["type"] in {"http", "websocket"} else None
        if reason is None:
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": reason})
        else:
            await PlainTextResponse(f"{reason}\n", status_code=403)(scope, receive, send)

    def _reason(self, scope: Scope) -> str | None:
        host, origin = "", None
        for name, value in scope["headers"]:
            if name == b"host":
                host = value.decode("latin-1").lower()
            elif name == b"origin":
                origin = value.decode("latin-1").lower()
        if not self._is_ours(host):
            return f"the host {host!r} is not this server's; start it with --allow-host NAME if it is"
        if origin is not None and _place(origin) != _place(f"//{host}"):
            return f"a page of {origin!r} may not use this server"
        return None

    def _is_ours(self, host: str) -> bool:
        name, _ = _place(f"//{host}")
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return name in self._names or name.endswith(".localhost")
        return True


def _place(address: str) -> tuple[str, int | None]:
    """A host's name and its port; None where it is the scheme's own, since a proxy may have taken the scheme off."""
    try:
        parts = urlsplit(address)
        port = parts.port
    except ValueError:
        return "", None
    return parts.hostname or "", None if port in {80, 443} else port
