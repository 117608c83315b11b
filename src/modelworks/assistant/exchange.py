"""Conversations out and in over HTTP: exports, imports, and links that everybody may follow."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any
from urllib.parse import quote

from fastapi import APIRouter, Query, Request, Response

from modelworks.assistant.bodies import asked
from modelworks.assistant.chat import Assistant
from modelworks.assistant.exports import KINDS, Form, export
from modelworks.assistant.imports import LARGEST, bring_in
from modelworks.assistant.shares import Share
from modelworks.assistant.store import ConversationStore
from modelworks.serve.requests import read_body

_FILE = {"schema": {"type": "string", "format": "binary"}}
_IMPORTED = {"required": True, "content": {"application/json": _FILE, "application/zip": _FILE}}


def exchange_routes(of: Callable[[Request], Assistant]) -> APIRouter:
    """The routes; `of` gives the assistant of whoever asks."""
    routes = APIRouter()

    @routes.post("/import", openapi_extra={"requestBody": _IMPORTED})
    async def import_(request: Request) -> dict[str, Any]:
        """Import ChatGPT's, Open WebUI's or our own export, sent as the body; all of it or nothing."""
        store = of(request).store
        done = await asked(bring_in, store, await read_body(request, LARGEST))
        return {"imported": [vars(one) | {"object": "chat"} for one in done.new], "already_there": done.known}

    @routes.get("/shares")
    async def shares(request: Request) -> dict[str, Any]:
        """What is shared."""
        return {"data": [_share(one) for one in await asked(of(request).store.shares.all)]}

    @routes.delete("/shares/{share_id}")
    async def revoke(request: Request, share_id: str) -> dict[str, Any]:
        """Close a link for good."""
        await asked(of(request).store.shares.revoke, share_id)
        return {"id": share_id, "object": "share", "deleted": True}

    @routes.post("/{chat_id}/shares")
    async def share(request: Request, chat_id: str) -> dict[str, Any]:
        """Share the branch that is shown, as it is now, with everybody who has the link."""
        return _share(await asked(of(request).store.shares.create, chat_id))

    @routes.get("/{chat_id}/export", response_class=Response)
    async def export_(
        request: Request, chat_id: str, form: Annotated[Form, Query(alias="format")] = "json"
    ) -> Response:
        """A conversation as a file: ``json`` is the whole tree, ``markdown`` and ``pdf`` the branch that is shown."""
        return await exported(of(request).store, chat_id, form)

    return routes


async def exported(store: ConversationStore, chat_id: str, form: Form) -> Response:
    """A conversation as a download."""
    name, content = await asked(partial(export, store, chat_id, form))
    headers = {"Content-Disposition": f"attachment; filename*=UTF-8''{quote(name)}", "Cache-Control": "no-store"}
    return Response(content, media_type=KINDS[form][1], headers=headers)


def _share(one: Share) -> dict[str, Any]:
    return vars(one) | {"object": "share", "path": one.path}
