"""Conversations over HTTP: asked, read, followed while they are written, and taken up again by a message's id.

When a question's answer has begun, both are in the database, and the reply says their ids: that is what is
acknowledged. A client that loses its connection, or whose server is killed, reads the message's events again from
where it was (``Last-Event-ID`` or ``offset``); an answer that the server's end cut short goes on after ``resume``.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Body, Header, Query, Request
from fastapi.responses import StreamingResponse
from pydantic import Field

from modelworks.assistant.belongings import belonging_routes
from modelworks.assistant.bodies import StrictBody, asked, refusals
from modelworks.assistant.chat import Assistant, Part
from modelworks.assistant.exchange import exchange_routes
from modelworks.assistant.store import LONGEST_TITLE
from modelworks.assistant.talk import Conversation, Found, Message
from modelworks.assistant.tools.routes import tool_routes
from modelworks.serve.errors import RequestError
from modelworks.spec.errors import InputError
from modelworks.spec.modes import REGULAR

_LONGEST = 1 << 20


class NewConversation(StrictBody):
    """``POST /v1/chats``."""

    model: Annotated[str, Field(min_length=1, max_length=256)]
    mode: Annotated[str, Field(max_length=32)] = REGULAR
    """``regular``, ``fun``, or a persona's id."""
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    """Left out, the server's own."""
    folder_id: Annotated[str, Field(max_length=32)] | None = None
    look_up: bool = False
    """Whether answers are looked up in one's sources."""


class ConversationChanges(StrictBody):
    """``PATCH /v1/chats/{id}``: what is left out stays as it is."""

    title: Annotated[str, Field(min_length=1, max_length=LONGEST_TITLE)] = ""
    model: Annotated[str, Field(min_length=1, max_length=256)] = ""
    mode: Annotated[str, Field(max_length=32)] = ""
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    """``null`` is the server's own."""
    folder_id: Annotated[str, Field(max_length=32)] | None = None
    """``null`` takes it out of its folder."""
    pinned: bool = False
    look_up: bool = False


class Question(StrictBody):
    """``POST /v1/chats/{id}/messages``."""

    text: Annotated[str, Field(min_length=1, max_length=_LONGEST)]
    parent_id: int | None = None
    """The message behind which it stands; left out, the last one of the branch that is shown."""
    model: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    """Who answers; left out, the conversation's model."""


def conversation_routes(of: Callable[[Request], Assistant]) -> APIRouter:
    """The routes; `of` gives the assistant of whoever asks, who sees the conversations of that one alone."""
    routes = APIRouter(prefix="/chats", tags=["chats"])
    routes.include_router(belonging_routes(of))  # these first: a folder is no conversation
    routes.include_router(exchange_routes(of))
    routes.include_router(tool_routes(of))

    @routes.post("")
    async def create(request: Request, given: Annotated[NewConversation, Body()]) -> dict[str, Any]:
        """Begin a conversation."""
        assistant = of(request)
        await assistant.may(given.mode)
        return _conversation(await asked(partial(assistant.store.create, **given.model_dump())))

    @routes.get("")
    async def conversations(
        request: Request,
        query: Annotated[str, Query(max_length=1000)] = "",
        folder_id: Annotated[str, Query(max_length=32)] = "",
    ) -> dict[str, Any]:
        """All conversations, those that are pinned first, then the latest; with a query, those found, the best first.

        What is found comes with the message and a piece of it, and where in that the words are that were looked for.
        """
        store = of(request).store
        if query.strip():
            found = [_found(one) for one in await asked(store.search, query)]
        else:
            found = [_conversation(one) for one in await asked(store.conversations)]
        return {"data": [one for one in found if not folder_id or one["folder_id"] == folder_id]}

    @routes.get("/{chat_id}")
    async def conversation(request: Request, chat_id: str) -> dict[str, Any]:
        """One conversation, without its messages."""
        return _conversation(await asked(of(request).store.conversation, chat_id))

    @routes.patch("/{chat_id}")
    async def change(request: Request, chat_id: str, given: Annotated[ConversationChanges, Body()]) -> dict[str, Any]:
        """Change a conversation's title, model, mode, temperature, folder or pin, or whether it is looked up."""
        assistant = of(request)
        await asked(assistant.store.conversation, chat_id)
        changes = given.model_dump(exclude_unset=True)
        if "mode" in changes:
            await assistant.may(changes["mode"])
        return _conversation(await asked(partial(assistant.store.change, chat_id, **changes)))

    @routes.delete("/{chat_id}")
    async def delete(request: Request, chat_id: str) -> dict[str, Any]:
        """Remove a conversation for good, with what is shared of it."""
        with refusals():
            await of(request).remove(chat_id)
        return {"id": chat_id, "object": "chat", "deleted": True}

    @routes.get("/{chat_id}/messages")
    async def thread(request: Request, chat_id: str) -> dict[str, Any]:
        """The branch that is shown."""
        return {"data": [_message(one) for one in await asked(of(request).store.thread, chat_id)]}

    @routes.post("/{chat_id}/messages")
    async def ask(request: Request, chat_id: str, given: Annotated[Question, Body()]) -> dict[str, Any]:
        """Ask; when this replies, the question is kept and its answer has begun."""
        assistant = of(request)
        chat = await asked(assistant.store.conversation, chat_id)
        parent = given.parent_id if given.parent_id is not None else chat.leaf_id
        try:
            answer = await assistant.ask(chat_id, given.text, parent, given.model or chat.model)
        except InputError as error:
            raise RequestError(str(error), code="invalid_value") from None
        return {"question_id": answer.message.parent_id, "answer_id": answer.message.id}

    @routes.get("/{chat_id}/messages/{message_id}")
    async def message(request: Request, chat_id: str, message_id: int) -> dict[str, Any]:
        """One message as it is kept."""
        return _message((await asked(of(request).store.path, chat_id, message_id))[-1])

    @routes.get("/{chat_id}/messages/{message_id}/events", response_class=StreamingResponse)
    async def events(
        request: Request,
        chat_id: str,
        message_id: int,
        offset: Annotated[int, Query(ge=0)] = 0,
        last_event_id: Annotated[str | None, Header()] = None,
    ) -> StreamingResponse:
        """A message as server-sent events, from a place in its text on and up to its end."""
        if last_event_id is not None and last_event_id.isdecimal() and len(last_event_id) < 10:
            offset = int(last_event_id)
        parts = of(request).follow(chat_id, message_id, offset)
        try:
            first = await anext(parts)
        except InputError as error:
            raise RequestError(str(error), status=404, code="not_found") from None

        async def sent() -> AsyncIterator[bytes]:
            try:
                yield _event(first)
                async for part in parts:
                    yield _event(part)
            finally:
                await parts.aclose()

        return StreamingResponse(sent(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})

    @routes.post("/{chat_id}/messages/{message_id}/resume")
    async def resume(request: Request, chat_id: str, message_id: int) -> dict[str, Any]:
        """Go on with an answer that was cut short; one that is being written goes on anyway."""
        assistant = of(request)
        await asked(assistant.store.conversation, chat_id)
        try:
            answer = await assistant.resume(chat_id, message_id)
        except InputError as error:
            raise RequestError(str(error), status=409, code="not_resumable") from None
        return {"answer_id": answer.message.id, "offset": len(answer.text)}

    @routes.post("/{chat_id}/stop")
    async def stop(request: Request, chat_id: str) -> dict[str, Any]:
        """End the answer that is being written, where it stands."""
        assistant = of(request)
        await asked(assistant.store.conversation, chat_id)
        await assistant.stop(chat_id)
        return {"stopped": True}

    return routes


def _event(part: Part) -> bytes:
    """The event's id is where the text ends with it: what a client that comes again sends as ``Last-Event-ID``."""
    content = orjson.dumps({"offset": part.offset, "text": part.text, "state": part.state, "notice": part.notice})
    return b"id: %d\ndata: %b\n\n" % (part.offset + len(part.text), content)


def _conversation(one: Conversation) -> dict[str, Any]:
    return vars(one) | {"object": "chat"}


def _message(one: Message) -> dict[str, Any]:
    kept = {"versions": list(one.versions), "calls": [vars(call) for call in one.calls]}
    return vars(one) | {"object": "chat.message"} | kept


def _found(one: Found) -> dict[str, Any]:
    piece = {"text": one.snippet.text, "hits": one.snippet.hits} if one.snippet is not None else None
    return _conversation(one.conversation) | {"message_id": one.message_id, "snippet": piece}
