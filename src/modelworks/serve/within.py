"""A request to the application from inside its own process, for those who reach it by another protocol than HTTP.

The application is called as a server calls it, with its outermost layer first, so that all that holds for a request
over HTTP holds for this one: the key and its scopes, the tier, turns, what is counted and written down, and that an
answer ends when nobody waits for it any more. What is not here is a socket.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp, Message, Scope

from modelworks.serve.events import Events

_PASSED_ON = ("authorization", "traceparent", "x-forwarded-for", "x-forwarded-proto")
_STATUS_OF = {
    "authentication_error": 401,
    "permission_error": 403,
    "rate_limit_error": 429,
    "invalid_request_error": 400,
}
Take = Callable[[dict[str, Any]], Awaitable[bool]]
"""Takes one event of a stream; false if nobody wants more of it."""


@dataclass(frozen=True)
class Caller:
    """Who asks, as the connection shows it."""

    host: str
    port: int
    headers: dict[str, str]
    """Names in small letters; of them, those that concern who asks are passed on."""


class AnsweredError(Exception):
    """The application has refused, or failed.

    Parameters
    ----------
    status : int
        The HTTP status.
    error : dict
        What is under ``error`` in OpenAI's shape.
    retry_after_s : int, optional
        Seconds after which the same request may be accepted.
    """

    def __init__(self, status: int, error: dict[str, Any], retry_after_s: int | None = None) -> None:
        super().__init__(str(error.get("message") or f"the server answered {status}"))
        self.status = status
        self.code = str(error.get("code") or "")
        self.param = str(error.get("param") or "")
        self.retry_after_s = retry_after_s


async def ask(
    app: ASGIApp,
    caller: Caller,
    method: str,
    path: str,
    content: bytes = b"",
    *,
    kind: str = "application/json",
    take: Take | None = None,
) -> bytes:
    """Send a request and wait for its end; cancelling it is what hanging up is over HTTP.

    Parameters
    ----------
    app
        The application.
    caller : Caller
        In whose name.
    method, path : str
        What is asked; the path is not quoted.
    content : bytes
        The body, and `kind` its media type.
    take : callable, optional
        Given each event of an answer that streams.

    Returns
    -------
    bytes
        The body of an answer that doesn't stream.

    Raises
    ------
    AnsweredError
        If it is refused, or fails, before its first event or after it.
    """
    reply = _Reply(take)
    body = [{"type": "http.request", "body": content, "more_body": False}]

    async def receive() -> Message:
        if body:
            return body.pop()
        await reply.unwanted.wait()
        return {"type": "http.disconnect"}

    try:
        await app(_scope(caller, method, path, content, kind), receive, reply.send)
    except Exception:
        # One that the application has answered with 500, and written down, goes on to the server that called it. One
        # in the middle of an answer must not make the part that was sent look like the whole.
        if reply.status < 500:
            raise
    return reply.whole()


def _scope(caller: Caller, method: str, path: str, content: bytes, kind: str) -> Scope:
    headers = [(name, caller.headers[name]) for name in _PASSED_ON if name in caller.headers]
    headers += [("host", "localhost"), ("content-type", kind), ("content-length", str(len(content)))]
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "2",
        "method": method,
        "scheme": "http",
        "path": path,
        "root_path": "",
        "query_string": b"",
        "headers": [(name.encode(), value.encode("latin-1", "replace")) for name, value in headers],
        "client": (caller.host, caller.port),
        "server": ("localhost", None),
    }


class _Reply:
    """What the application sends."""

    def __init__(self, take: Take | None) -> None:
        self.status = 0
        self.unwanted = asyncio.Event()
        self._take = take
        self._events: Events | None = None
        self._retry_after_s: int | None = None
        self._parts: list[bytes] = []
        self._error: dict[str, Any] | None = None

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = dict(message.get("headers", ()))
            self.status = message["status"]
            self._retry_after_s = int(headers[b"retry-after"]) if b"retry-after" in headers else None
            if self._take is not None and headers.get(b"content-type", b"").startswith(b"text/event-stream"):
                self._events = Events()
        elif self._events is None:
            self._parts.append(message.get("body", b""))
        else:
            await self._pass_on(self._events.take(message.get("body", b"")))

    async def _pass_on(self, events: list[str]) -> None:
        assert self._take is not None
        for event in map(json.loads, events):
            if event.get("error"):
                self._error = event["error"]
            elif not self.unwanted.is_set() and not await self._take(event):
                self.unwanted.set()

    def whole(self) -> bytes:
        if self._error is not None:
            unavailable = 503 if self._error.get("code") == "unavailable" else 500
            raise AnsweredError(_STATUS_OF.get(str(self._error.get("type")), unavailable), self._error)
        body = b"".join(self._parts)
        if not 200 <= self.status < 300:
            raise AnsweredError(self.status, _error_in(body), self._retry_after_s)
        return body


def _error_in(body: bytes) -> dict[str, Any]:
    try:
        error = json.loads(body)["error"]
    except (ValueError, KeyError, TypeError):
        return {"message": body[:500].decode(errors="replace").strip()}
    return error if isinstance(error, dict) else {"message": str(error)}
