"""What leaves the pages: a shared conversation, which everybody may read who has its link, and files to download.

A shared page is plain HTML without any script; nothing is on it but the title and what was said. Search engines are
told to stay away, and no address is given on when a link in it is followed.
"""

from __future__ import annotations

import asyncio
import html

from fastapi import APIRouter, Request, Response
from starlette.responses import HTMLResponse

from modelworks import __version__
from modelworks.assistant.exchange import exported
from modelworks.assistant.exports import Form
from modelworks.assistant.shares import SharedMessage, shared
from modelworks.serve.errors import RequestError
from modelworks.spec.errors import InputError, OperationError
from modelworks.web.language import language_of, say
from modelworks.web.markdown import render
from modelworks.web.services import Services

_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self' 'unsafe-inline'; img-src data:; "
    "form-action 'none'; base-uri 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Robots-Tag": "noindex, nofollow, noarchive",
}


def shared_routes(services: Services) -> APIRouter:
    """``/s/ID`` for everybody, and ``/c/ID/export/FORM`` for whoever's conversation it is."""
    routes = APIRouter(include_in_schema=False)

    @routes.api_route("/s/{share_id:path}", methods=["GET", "HEAD"])
    async def page(request: Request, share_id: str) -> Response:
        to = language_of(request)
        try:
            title, messages = await asyncio.to_thread(shared, services.assistant.store.database, share_id)
        except InputError:
            nothing = say("There is nothing here", to=to)
            reason = say("The link is wrong, or it was revoked.", to=to)
            return HTMLResponse(_document(nothing, f"<h1>{nothing}</h1><p>{reason}</p>", to), 404, _HEADERS)
        except OperationError:
            later = say("This can't be read now", to=to)
            return HTMLResponse(_document(later, f"<h1>{later}</h1>", to), 503, _HEADERS)
        turns = await asyncio.to_thread(lambda: "".join(map(_turn, messages)))
        note = say("Shared from a conversation with a language model. Models make mistakes.", to=to)
        content = f"<h1>{html.escape(title)}</h1>{turns}<p class='muted'>{note}</p>"
        return HTMLResponse(_document(title, content, to), 200, _HEADERS)

    @routes.get("/c/{conversation_id}/export/{form}")
    async def download(request: Request, conversation_id: str, form: Form) -> Response:
        try:
            return await exported(services.of(request).assistant.store, conversation_id, form)
        except RequestError as error:
            said = html.escape(str(error))
            return HTMLResponse(_document(said, f"<h1>{said}</h1>", "en"), error.status, _HEADERS)

    return routes


def _turn(message: SharedMessage) -> str:
    if message.role == "user":
        return f"<div class='turn user'><div class='bubble'>{html.escape(message.content)}</div></div>"
    who = html.escape(message.model or "")
    return (
        f"<div class='turn model'><div class='who'>{who}</div><div class='said'>{render(message.content)}</div></div>"
    )


def _document(title: str, content: str, language: str) -> str:
    from modelworks.web.frame import LOGO

    return f"""<!doctype html><html lang="{language}"><head><meta charset="utf-8">
<title>{html.escape(title)} · Modelworks</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">
<meta name="robots" content="noindex, nofollow"><link rel="icon" href="data:,">
<link rel="stylesheet" href="/_modelworks/{__version__}/style.css"></head>
<body class="shared"><main class="column-text">
<div class="brand">{LOGO}<span>Modelworks</span></div>{content}</main></body></html>"""
