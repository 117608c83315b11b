"""Conversations over HTTP: asked, read, followed while they are written, and taken up again by a message's id.

When a question's answer has begun, both are in the database, and the reply says their ids: that is what is
acknowledged. A client that loses its connection, or whose server is killed, reads the message's events again from
where it was (``Last-Event-ID`` or ``offset``); an answer that the server's end cut short goes on after ``resume``.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Body, Header, Query, Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from modelworks.assistant.chat import Assistant, Part
from modelworks.assistant.store import Conversation, Message
from modelworks.serve.errors import RequestError, UnavailableError
from modelworks.spec.errors import InputError, OperationError

_LONGEST = 1 << 20


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)


class NewConversation(_Body):
    """``POST /v1/chats``."""

    model: Annotated[str, Field(min_length=1, max_length=256)]


class Question(_Body):
    """``POST /v1/chats/{id}/messages``."""

    text: Annotated[str, Field(min_length=1, max_length=_LONGEST)]
    parent_id: int | None = None
    """The message behind which it stands; left out, the last one of the branch that is shown."""
    model: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    """Who answers; left out, the conversation's model."""


def conversation_routes(of: Callable[[Request], Assistant]) -> APIRouter:
    """The routes; `of` gives the assistant of whoever asks, who sees the conversations of that one alone."""
    routes = APIRouter(prefix="/chats", tags=["chats"])

    @routes.post("")
    async def create(request: Request, given: Annotated[NewConversation, Body()]) -> dict[str, Any]:
        """Begin a conversation."""
        return _conversation(await _asked(of(request).store.create, given.model))

    @routes.get("")
    async def conversations(request: Request) -> dict[str, Any]:
        """All conversations, the latest first."""
        return {"data": [_conversation(one) for one in await _asked(of(request).store.conversations)]}

    @routes.get("/{chat_id}/messages")
    async def thread(request: Request, chat_id: str) -> dict[str, Any]:
        """The branch that is shown."""
        return {"data": [_message(one) for one in await _asked(of(request).store.thread, chat_id)]}

    @routes.post("/{chat_id}/messages")
    async def ask(request: Request, chat_id: str, given: Annotated[Question, Body()]) -> dict[str, Any]:
        """Ask; when this replies, the question is kept and its answer has begun."""
        assistant = of(request)
        chat = await _asked(assistant.store.conversation, chat_id)
        parent = given.parent_id if given.parent_id is not None else chat.leaf_id
        try:
            answer = await assistant.ask(chat_id, given.text, parent, given.model or chat.model)
        except InputError as error:
            raise RequestError(str(error), code="invalid_value") from None
        return {"question_id": answer.message.parent_id, "answer_id": answer.message.id}

    @routes.get("/{chat_id}/messages/{message_id}")
    async def message(request: Request, chat_id: str, message_id: int) -> dict[str, Any]:
        """One message as it is kept."""
        return _message((await _asked(of(request).store.path, chat_id, message_id))[-1])

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
        try:
            answer = await of(request).resume(chat_id, message_id)
        except InputError as error:
            raise RequestError(str(error), status=409, code="not_resumable") from None
        return {"answer_id": answer.message.id, "offset": len(answer.text)}

    @routes.post("/{chat_id}/stop")
    async def stop(request: Request, chat_id: str) -> dict[str, Any]:
        """End the answer that is being written, where it stands."""
        assistant = of(request)
        await _asked(assistant.store.conversation, chat_id)
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
    return vars(one) | {"object": "chat.message", "versions": list(one.versions)}


async def _asked(work: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return await asyncio.to_thread(work, *arguments)
    except InputError as error:
        raise RequestError(str(error), status=404, code="not_found") from None
    except OperationError:
        raise UnavailableError("the conversations can't be reached now") from None
