"""A conversation's tools over HTTP, and the answer to a call that waits for consent."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Body, Request
from pydantic import Field

from modelworks.assistant.bodies import StrictBody, asked
from modelworks.assistant.chat import Assistant
from modelworks.assistant.owned import NotFoundError
from modelworks.assistant.tools.loop import Calling
from modelworks.serve.errors import RequestError
from modelworks.spec.errors import InputError


class ChosenTools(StrictBody):
    """The tools that a conversation has from here on, and no others."""

    on: Annotated[list[Annotated[str, Field(min_length=1, max_length=64)]], Field(max_length=256)]


class Consent(StrictBody):
    """What is said to a call that waits."""

    verdict: Literal["allow", "always", "refuse"]
    """``always`` also allows this tool's later calls in the conversation."""


def tool_routes(of: Callable[[Request], Assistant]) -> APIRouter:
    """The routes; `of` gives the assistant of whoever asks."""
    routes = APIRouter()

    @routes.get("/{chat_id}/tools")
    async def tools(request: Request, chat_id: str) -> dict[str, Any]:
        """What there is, which of it the conversation has (`on`), and what the operator wanted and can't be had."""
        calling = await _calling(of(request), chat_id)
        return await _tools(calling, chat_id)

    @routes.put("/{chat_id}/tools")
    async def choose(request: Request, chat_id: str, given: Annotated[ChosenTools, Body()]) -> dict[str, Any]:
        """Give the conversation these tools; what was allowed always asks again."""
        calling = await _calling(of(request), chat_id)
        known = [tool.name for tool in await calling.toolbox.tools()]
        for name in given.on:
            if name not in known:
                raise RequestError(f"on: there is no tool {name!r}; there are {', '.join(known)}", code="invalid_value")
        await asked(calling.store.turn_on, chat_id, given.on)
        return await _tools(calling, chat_id)

    @routes.post("/{chat_id}/messages/{message_id}/calls/{number}")
    async def decide(
        request: Request, chat_id: str, message_id: int, number: int, given: Annotated[Consent, Body()]
    ) -> dict[str, Any]:
        """Allow or refuse a call that waits; an answer that the server's end has cut short goes on with it."""
        assistant = of(request)
        await _calling(assistant, chat_id)
        try:
            await assistant.decide(chat_id, message_id, number, given.verdict)
        except NotFoundError as error:
            raise RequestError(str(error), status=404, code="not_found") from None
        except InputError as error:
            raise RequestError(str(error), status=409, code="not_waiting") from None
        return {"answer_id": message_id, "number": number, "verdict": given.verdict}

    return routes


async def _calling(assistant: Assistant, chat_id: str) -> Calling:
    """The tools of this server, for a conversation of whoever asks."""
    await asked(assistant.store.conversation, chat_id)
    if assistant.calling is None:
        raise RequestError("this server has no tools", status=404, code="not_found")
    return assistant.calling


async def _tools(calling: Calling, chat_id: str) -> dict[str, Any]:
    chosen = await asyncio.to_thread(calling.store.chosen, chat_id)
    data = [
        {
            "name": tool.name,
            "description": tool.description,
            "asks": tool.asks and tool.name not in chosen.always,
            "on": tool.name in chosen.on,
        }
        for tool in await calling.toolbox.tools()
    ]
    return {"data": data, "missing": await calling.toolbox.missing()}
