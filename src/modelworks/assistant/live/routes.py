"""Live sources over HTTP: ``/v1/sources``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from fastapi import APIRouter, Body, Request
from pydantic import Field

from modelworks.assistant.bodies import StrictBody, asked, refusals
from modelworks.assistant.chat import Assistant
from modelworks.assistant.live.store import LONGEST_INTERVAL_S, SHORTEST_INTERVAL_S, Kind, Source

_Interval = Annotated[float, Field(ge=SHORTEST_INTERVAL_S, le=LONGEST_INTERVAL_S)]


class NewSource(StrictBody):
    """``POST /v1/sources``."""

    kind: Kind
    address: Annotated[str, Field(min_length=1, max_length=4096)]
    """Of a feed or a site; a folder; ``searxng`` or ``brave``; a search of X."""
    name: Annotated[str, Field(max_length=100)] = ""
    """Left out, it is taken from the address."""
    interval_s: _Interval | None = None
    """Left out, what fits its kind."""
    whole: bool = False
    """Whether the pages are read that a feed's entries lead to."""
    shared: bool = False
    """Whether it is everybody's; an administrator alone may say so."""


class SourceChanges(StrictBody):
    """``PATCH /v1/sources/{id}``: what is left out stays as it is."""

    name: Annotated[str, Field(min_length=1, max_length=100)] | None = None
    interval_s: _Interval | None = None
    paused: bool | None = None


def source_routes(of: Callable[[Request], Assistant]) -> APIRouter:
    """The routes; `of` gives the assistant of whoever asks, who sees the own sources and everybody's."""
    routes = APIRouter(prefix="/sources", tags=["sources"])

    @routes.get("")
    async def sources(request: Request) -> dict[str, Any]:
        """All sources, and the kinds that can be added."""
        live = await of(request).sources()
        found = [described(one) for one in await asked(live.store.all)]
        return {"object": "list", "data": found, "kinds": live.kinds, "engines": live.engines}

    @routes.post("")
    async def add(request: Request, given: Annotated[NewSource, Body()]) -> dict[str, Any]:
        """Add a source; it is refreshed at once, in the background."""
        live = await of(request).sources()
        with refusals():
            return described(await live.add(**given.model_dump()))

    @routes.get("/{source_id}")
    async def source(request: Request, source_id: str) -> dict[str, Any]:
        """One of them, with how it is."""
        return described(await asked((await of(request).sources()).store.source, source_id))

    @routes.patch("/{source_id}")
    async def change(request: Request, source_id: str, given: Annotated[SourceChanges, Body()]) -> dict[str, Any]:
        """Change its name or interval, pause it or go on with it."""
        live = await of(request).sources()
        with refusals():
            return described(await live.change(source_id, **given.model_dump()))

    @routes.post("/{source_id}/refresh")
    async def refresh(request: Request, source_id: str) -> dict[str, Any]:
        """Have it refreshed now."""
        live = await of(request).sources()
        with refusals():
            return described(await live.refresh(source_id))

    @routes.delete("/{source_id}")
    async def remove(request: Request, source_id: str) -> dict[str, Any]:
        """Remove it with what was read of it; what answers were given of it stays with them."""
        await asked((await of(request).sources()).store.remove, source_id)
        return {"id": source_id, "object": "source", "deleted": True}

    return routes


def described(source: Source) -> dict[str, Any]:
    """A source as the API has it."""
    return {"object": "source"} | vars(source)
