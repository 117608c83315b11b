"""``/v1/files``: files that requests refer to by name, such as those of batches."""

from __future__ import annotations

import asyncio
import re
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException
from starlette.types import Message, Receive

from modelworks.serve.access import owner_of, principal_of
from modelworks.serve.errors import RequestError
from modelworks.serve.storage import LASTS_S, Order, Storage, StoredFile

LARGEST = 64 << 20
"""Bytes of a file."""
PURPOSES = ("batch", "user_data")
"""What a file may be sent for."""
_LONGEST_NAME = 255
_SHORTEST_S, _LONGEST_S = 3600.0, LASTS_S
_FORM = {
    "type": "object",
    "required": ["file", "purpose"],
    "properties": {
        "file": {"type": "string", "format": "binary"},
        "purpose": {"enum": list(PURPOSES)},
        "expires_after[anchor]": {"enum": ["created_at"]},
        "expires_after[seconds]": {"type": "integer", "minimum": _SHORTEST_S, "maximum": _LONGEST_S},
    },
}


def file_routes(storage: Storage, largest: int = LARGEST) -> APIRouter:
    """The routes.

    Parameters
    ----------
    storage : Storage
        Where files are.
    largest : int
        The most bytes of one.
    """
    routes = APIRouter(prefix="/files", tags=["files"])

    @routes.post(
        "", openapi_extra={"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": _FORM}}}}
    )
    async def upload(request: Request) -> dict[str, Any]:
        """Keep a file."""
        principal = principal_of(request)
        most = principal.tier.file_bytes if principal is not None else None
        form = await limited_form(request, largest)
        file, purpose = form.get("file"), form.get("purpose")
        if not isinstance(file, UploadFile):
            raise _wrong("file", "a file is needed, as a part of multipart/form-data")
        if purpose not in PURPOSES:
            raise _wrong("purpose", f"{' or '.join(map(repr, PURPOSES))} is accepted")
        lasts_s = _lasts_s(form.get("expires_after[anchor]"), form.get("expires_after[seconds]"))
        content = await file.read()
        kept = await asyncio.to_thread(
            storage.put_file,
            owner_of(request),
            plain_name(file.filename),
            str(purpose),
            content,
            lasts_s=lasts_s,
            most=most,
        )
        return described(kept)

    @routes.get("")
    async def files(
        request: Request,
        purpose: str | None = None,
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
        order: Order = "desc",
    ) -> dict[str, Any]:
        """The files, by age."""
        found = await asyncio.to_thread(
            storage.files, owner_of(request), purpose=purpose, after=after, limit=limit + 1, order=order
        )
        return listed([described(one) for one in found], limit)

    @routes.get("/{file_id}")
    async def file(request: Request, file_id: str) -> dict[str, Any]:
        """One of them."""
        found = await asyncio.to_thread(storage.file, owner_of(request), file_id)
        if found is None:
            raise no_file(file_id)
        return described(found)

    @routes.get("/{file_id}/content")
    async def content(request: Request, file_id: str) -> Response:
        """What is in it; never as a page."""
        found = await asyncio.to_thread(storage.content, owner_of(request), file_id)
        if found is None:
            raise no_file(file_id)
        headers = {"Content-Disposition": "attachment", "X-Content-Type-Options": "nosniff"}
        return Response(found, media_type="application/octet-stream", headers=headers)

    @routes.delete("/{file_id}")
    async def delete(request: Request, file_id: str) -> dict[str, Any]:
        """Remove one."""
        if not await asyncio.to_thread(storage.remove_file, owner_of(request), file_id):
            raise no_file(file_id)
        return {"id": file_id, "object": "file", "deleted": True}

    return routes


def described(file: StoredFile) -> dict[str, Any]:
    """A file in OpenAI's shape."""
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.size,
        "created_at": int(file.created),
        "expires_at": int(file.expires),
        "filename": file.name,
        "purpose": file.purpose,
        "status": "processed",
    }


def listed(found: list[dict[str, Any]], limit: int) -> dict[str, Any]:
    """A list of so many, of which one more was looked for."""
    data = found[:limit]
    first, last = (data[0]["id"], data[-1]["id"]) if data else (None, None)
    return {"object": "list", "data": data, "first_id": first, "last_id": last, "has_more": len(found) > limit}


def no_file(file_id: str) -> RequestError:
    """What is said of a file that isn't there, or is somebody else's."""
    return RequestError(f"there is no file {file_id[:64]!r}", status=404, code="not_found")


async def limited_form(request: Request, largest: int) -> dict[str, Any]:
    """The form's fields; nothing is read beyond the limit."""
    limited = Request(request.scope, _limited(request.receive, largest + (64 << 10), largest))
    try:
        return dict(await limited.form(max_files=1, max_fields=8))
    except MultiPartException as error:
        raise RequestError(f"the body is not multipart/form-data: {error.message}") from None


def _limited(receive: Receive, most: int, shown: int) -> Receive:
    size = 0

    async def limited() -> Message:
        nonlocal size
        message = await receive()
        size += len(message.get("body", b""))
        if size > most:
            raise RequestError(
                f"the file is over the limit of {shown:,} bytes", status=413, code="request_too_large", param="file"
            )
        return message

    return limited


def _lasts_s(anchor: Any, seconds: Any) -> float:
    if anchor is None and seconds is None:
        return LASTS_S
    if anchor != "created_at":
        raise _wrong("expires_after.anchor", "'created_at' is accepted")
    if not isinstance(seconds, str) or not re.fullmatch(r"[0-9]{1,9}", seconds):
        raise _wrong("expires_after.seconds", "a whole number is needed")
    if not _SHORTEST_S <= int(seconds) <= _LONGEST_S:
        raise _wrong("expires_after.seconds", f"{_SHORTEST_S:.0f} to {_LONGEST_S:.0f} is accepted")
    return float(seconds)


def plain_name(name: str | None) -> str:
    """A file's name without folders and control characters; nothing is ever opened by it."""
    last = re.split(r"[/\\]", name or "")[-1]
    return "".join(each for each in last if each.isprintable())[:_LONGEST_NAME] or "file"


def _wrong(param: str, reason: str) -> RequestError:
    return RequestError(f"{param}: {reason}", code="invalid_value", param=param)
