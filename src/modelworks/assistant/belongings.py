"""A person's folders and personas over HTTP, beside the conversations (`assistant.conversations`)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Body, Request
from pydantic import Field

from modelworks.assistant.bodies import StrictBody, asked
from modelworks.assistant.chat import Assistant
from modelworks.assistant.folders import Folder
from modelworks.assistant.personas import LONGEST_PROMPT, Persona
from modelworks.spec.modes import BUILT_IN


class FolderName(StrictBody):
    """What a folder is called."""

    name: Annotated[str, Field(min_length=1, max_length=100)]


class NewPersona(StrictBody):
    """A way to answer."""

    name: Annotated[str, Field(min_length=1, max_length=60)]
    prompt: Annotated[str, Field(min_length=1, max_length=LONGEST_PROMPT)]
    """What a model is told first."""


class PersonaChanges(StrictBody):
    """What is left out stays as it is."""

    name: Annotated[str, Field(min_length=1, max_length=60)] | None = None
    prompt: Annotated[str, Field(min_length=1, max_length=LONGEST_PROMPT)] | None = None


def belonging_routes(of: Callable[[Request], Assistant]) -> APIRouter:
    """The routes; `of` gives the assistant of whoever asks."""
    routes = APIRouter()

    @routes.get("/folders")
    async def folders(request: Request) -> dict[str, Any]:
        """All folders, by name."""
        return {"data": [_folder(one) for one in await asked(of(request).store.folders.all)]}

    @routes.post("/folders")
    async def create_folder(request: Request, given: Annotated[FolderName, Body()]) -> dict[str, Any]:
        """Make a folder."""
        return _folder(await asked(of(request).store.folders.create, given.name))

    @routes.patch("/folders/{folder_id}")
    async def rename_folder(request: Request, folder_id: str, given: Annotated[FolderName, Body()]) -> dict[str, Any]:
        """Give a folder another name."""
        return _folder(await asked(of(request).store.folders.rename, folder_id, given.name))

    @routes.delete("/folders/{folder_id}")
    async def delete_folder(request: Request, folder_id: str) -> dict[str, Any]:
        """Remove a folder; its conversations stay, in none."""
        await asked(of(request).store.folders.delete, folder_id)
        return {"id": folder_id, "object": "folder", "deleted": True}

    @routes.get("/personas")
    async def personas(request: Request) -> dict[str, Any]:
        """The modes that are there for everybody, and the personas that one has written."""
        assistant = of(request)
        kinds = await assistant.modes()
        ours = [{"id": mode, "object": "mode", "prompt": text} for mode, text in BUILT_IN.items() if mode in kinds]
        own = await asked(assistant.store.personas.all) if "own" in kinds else []
        return {"data": [*ours, *(_persona(one) for one in own)]}

    @routes.post("/personas")
    async def create_persona(request: Request, given: Annotated[NewPersona, Body()]) -> dict[str, Any]:
        """Write a persona."""
        assistant = of(request)
        await assistant.may("own")
        return _persona(await asked(assistant.store.personas.create, given.name, given.prompt))

    @routes.patch("/personas/{persona_id}")
    async def change_persona(
        request: Request, persona_id: str, given: Annotated[PersonaChanges, Body()]
    ) -> dict[str, Any]:
        """Give a persona another name or prompt; the next answer of its conversations is by it."""
        change = partial(of(request).store.personas.change, persona_id, given.name, given.prompt)
        return _persona(await asked(change))

    @routes.delete("/personas/{persona_id}")
    async def delete_persona(request: Request, persona_id: str) -> dict[str, Any]:
        """Remove a persona; its conversations go on in the regular mode."""
        await asked(of(request).store.personas.delete, persona_id)
        return {"id": persona_id, "object": "persona", "deleted": True}

    return routes


def _folder(one: Folder) -> dict[str, Any]:
    return vars(one) | {"object": "folder"}


def _persona(one: Persona) -> dict[str, Any]:
    return vars(one) | {"object": "persona"}
