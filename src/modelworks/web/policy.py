"""What a browser is told about the pages: where they may load from and send to, and that nobody may frame them.

A second wall behind `web.markdown`: should a stranger's words ever become part of a page, their event handlers don't
run (``script-src-attr``), and there is nowhere that they could send what they found (``connect-src``, ``img-src``,
``form-action``). NiceGUI needs inline scripts and ``eval`` for its own.
"""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

POLICY = "; ".join(
    (
        "default-src 'self'",
        "script-src 'self' 'unsafe-inline' 'unsafe-eval'",
        "script-src-attr 'none'",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "font-src 'self' data:",
        "connect-src 'self'",
        "worker-src 'self' blob:",
        "object-src 'none'",
        "base-uri 'none'",
        "form-action 'self'",
        "frame-ancestors 'none'",
    )
)
_HEADERS = (
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"same-origin"),  # with no-referrer, a browser's form says that it comes from nowhere
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
)
_DOCUMENTATION = "/v1/docs"
"""FastAPI's page takes its script from elsewhere, which the policy would forbid."""


class PagePolicy:
    """Adds the policy's headers to every answer.

    Parameters
    ----------
    app
        The application behind it.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and its answer with more headers."""
        if scope["type"] != "http" or scope["path"].startswith(_DOCUMENTATION):
            await self._app(scope, receive, send)
            return

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = list(message.get("headers", ()))
                named = {name.lower() for name, _ in own}  # a page's own word is the stricter one
                message = {**message, "headers": [*own, *(each for each in _HEADERS if each[0] not in named)]}
            await send(message)

        await self._app(scope, receive, sending)
