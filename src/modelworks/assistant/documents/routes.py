"""A conversation's documents over HTTP: ``/v1/chats/{id}/documents``, and the same for the pages."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from starlette.datastructures import UploadFile

from modelworks.assistant.bodies import asked
from modelworks.assistant.documents.library import LARGEST, Library
from modelworks.assistant.documents.store import Document, Passage
from modelworks.serve.access import principal_of
from modelworks.serve.errors import RequestError, UnavailableError
from modelworks.serve.files import limited_form, plain_name
from modelworks.spec.errors import InputError, OperationError

_FORM_BYTES = 64 << 10
"""What a form has besides its file, at most."""
_FORM = {
    "type": "object",
    "required": ["file"],
    "properties": {"file": {"type": "string", "format": "binary"}},
}


def document_routes(of: Callable[[Request], Library], prefix: str = "/chats", largest: int = LARGEST) -> APIRouter:
    """The routes.

    Parameters
    ----------
    of
        Gives the library of whoever asks, who sees the documents of that one alone.
    prefix
        Of the conversations' paths.
    largest
        The most bytes of a file.
    """
    routes = APIRouter(prefix=prefix, tags=["chats"])

    @routes.post(
        "/{chat_id}/documents",
        openapi_extra={"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": _FORM}}}},
    )
    async def add(request: Request, chat_id: str) -> dict[str, Any]:
        """Add a document or an image; it is read in the background (``state`` says how that is going)."""
        library, principal = of(request), principal_of(request)
        await asked(library.store.documents, chat_id)  # before a stranger's file is received
        size = request.headers.get("content-length", "")
        if size.isdigit() and int(size) > largest + _FORM_BYTES:
            raise RequestError(
                f"file: the file is over the limit of {largest:,} bytes",
                status=413,
                code="request_too_large",
                param="file",
            )
        form = await limited_form(request, largest)
        file = form.get("file")
        if not isinstance(file, UploadFile):
            raise RequestError(
                "file: a file is needed, as a part of multipart/form-data", code="invalid_value", param="file"
            )
        try:
            path = await asyncio.to_thread(_kept, file)
            most = principal.tier.file_bytes if principal is not None else None
            document = await library.add(chat_id, plain_name(file.filename), path, most)
        except InputError as error:
            raise RequestError(str(error), status=409, code="too_many_documents") from None
        except OperationError:
            raise UnavailableError("the conversations can't be reached now") from None
        finally:
            await file.close()
        return described(document, library)

    @routes.get("/{chat_id}/documents")
    async def documents(request: Request, chat_id: str) -> dict[str, Any]:
        """A conversation's documents, the oldest first."""
        library = of(request)
        found = await asked(library.store.documents, chat_id)
        return {"object": "list", "data": [described(one, library) for one in found]}

    @routes.get("/{chat_id}/documents/{document_id}")
    async def document(request: Request, chat_id: str, document_id: str) -> dict[str, Any]:
        """One of them."""
        library = of(request)
        return described(await asked(library.store.document, chat_id, document_id), library)

    @routes.get("/{chat_id}/documents/{document_id}/passages")
    async def passages(request: Request, chat_id: str, document_id: str) -> dict[str, Any]:
        """What was read in it."""
        store = of(request).store
        await asked(store.document, chat_id, document_id)
        return {"object": "list", "data": [passage(one) for one in await asked(store.passages, [document_id])]}

    @routes.delete("/{chat_id}/documents/{document_id}")
    async def remove(request: Request, chat_id: str, document_id: str) -> dict[str, Any]:
        """Remove one; if it is being read, that ends."""
        try:
            await of(request).remove(chat_id, document_id)
        except InputError as error:
            raise RequestError(str(error), status=404, code="not_found") from None
        return {"id": document_id, "object": "chat.document", "deleted": True}

    @routes.get("/{chat_id}/messages/{message_id}/sources")
    async def sources(request: Request, chat_id: str, message_id: int) -> dict[str, Any]:
        """The passages that an answer was given, by the numbers under which it names them."""
        found = await asked(of(request).store.sources, chat_id, message_id)
        return {"object": "list", "data": [passage(one) | {"number": number} for number, one in found.items()]}

    return routes


def described(document: Document, library: Library) -> dict[str, Any]:
    """A document as the API has it."""
    progress = library.progress(document.id)
    shown = {"done": progress.done, "total": progress.total} if progress is not None else None
    return {"object": "chat.document"} | vars(document) | {"progress": shown}


def passage(one: Passage) -> dict[str, Any]:
    """A passage as the API has it."""
    return {"object": "chat.passage"} | vars(one)


def _kept(file: UploadFile) -> Path:
    """The file's copy, for its owner alone; whoever gets it removes it."""
    with tempfile.NamedTemporaryFile(prefix="modelworks-document-", delete=False) as copy:
        try:
            shutil.copyfileobj(file.file, copy)
        except BaseException:
            Path(copy.name).unlink(missing_ok=True)
            raise
    return Path(copy.name)
