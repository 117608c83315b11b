"""``/v1/batches``: requests that are answered when there is time.

A batch's requests go through the application itself, in the name of the key that asked for the batch, so that all that
holds for a request holds for them: what the tier includes, what is set aside and used, the queue, where they wait
behind those that somebody waits for. Each result is kept before the next is looked at, and a batch whose process has
died is gone on with by another one. What is refused because there is too much to do is asked again, until the batch's
time is over.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Annotated, Any, Literal

import httpx
from fastapi import APIRouter, Query, Request
from pydantic import Field
from starlette.types import ASGIApp, Receive, Scope, Send

from modelworks.serve.access import Access, owner_of, principal_of, scope_of
from modelworks.serve.errors import RequestError, error_body
from modelworks.serve.files import listed, no_file
from modelworks.serve.requests import Fields, parse, read_body
from modelworks.serve.storage import ENDED, Batch, Line, Result, Storage
from modelworks.spec.errors import InputError, OperationError

_LOG = logging.getLogger("modelworks.batches")
MOST_LINES = 50_000
_LARGEST_REQUEST = 64 << 10
"""Bytes of what asks for a batch."""
_MOST_ERRORS = 100
"""Of a file that is not accepted, how many lines are named."""
_LOOK_S = 2.0
"""How often a process looks for a batch that nobody works on."""
_BEAT_S = 2.0
_BATCHES = 4
"""Batches that a process works on at once."""
_FORGET_S = 3600.0
_AT_ONCE = 16
"""Requests of a batch that are asked at once, at most; a tier allows half of its own."""
_BUSY = frozenset({429, 503})
_TRIES_OF_FAILURES = 3
_LONGEST_WAIT_S = 60.0
"""A request that is to wait for longer lets the whole batch rest."""

Endpoint = Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"]


class BatchRequest(Fields):
    """``POST /v1/batches``."""

    input_file_id: Annotated[str, Field(min_length=1, max_length=64)]
    endpoint: Endpoint
    completion_window: Literal["24h"]
    metadata: Annotated[dict[str, Annotated[str, Field(max_length=512)]], Field(max_length=16)] | None = None


def batch_routes(storage: Storage, worker: BatchWorker) -> APIRouter:
    """The routes.

    Parameters
    ----------
    storage : Storage
        Where batches are.
    worker : BatchWorker
        Told that there is a new one.
    """
    routes = APIRouter(prefix="/batches", tags=["batches"])
    schema = {"content": {"application/json": {"schema": BatchRequest.model_json_schema()}}, "required": True}

    @routes.post("", openapi_extra={"requestBody": schema})
    async def create(request: Request) -> dict[str, Any]:
        """Have the requests of a file answered."""
        asked = parse(BatchRequest, await read_body(request, _LARGEST_REQUEST))
        principal, owner = principal_of(request), owner_of(request)
        if principal is not None and (needed := scope_of(asked.endpoint)) not in principal.scopes:
            raise RequestError(
                f"endpoint: this key lacks the scope {needed}", status=403, code="insufficient_scope", param="endpoint"
            )
        file = await asyncio.to_thread(storage.file, owner, asked.input_file_id)
        if file is None:
            raise no_file(asked.input_file_id)
        if file.purpose != "batch":
            raise RequestError(
                f"input_file_id: a file sent with purpose 'batch' is needed, not {file.purpose!r}",
                code="invalid_value",
                param="input_file_id",
            )
        batch = Batch(
            id=f"batch_{secrets.token_hex(16)}",
            owner=owner,
            key_id=principal.key_id if principal is not None else None,
            endpoint=asked.endpoint,
            input_file=asked.input_file_id,
            window_s=86400.0,
            created=time.time(),
            metadata=asked.metadata or {},
        )
        await asyncio.to_thread(storage.put_batch, batch)
        worker.wake()
        return described(batch)

    @routes.get("")
    async def batches(
        request: Request, after: str | None = None, limit: Annotated[int, Query(ge=1, le=100)] = 20
    ) -> dict[str, Any]:
        """The batches, the newest first."""
        found = await asyncio.to_thread(storage.batches, owner_of(request), after=after, limit=limit + 1)
        return listed([described(one) for one in found], limit)

    @routes.get("/{batch_id}")
    async def batch(request: Request, batch_id: str) -> dict[str, Any]:
        """One of them."""
        return found(await asyncio.to_thread(storage.batch, owner_of(request), batch_id), batch_id)

    @routes.post("/{batch_id}/cancel")
    async def cancel(request: Request, batch_id: str) -> dict[str, Any]:
        """Answer no more of it; what has been answered stays."""
        asked = await asyncio.to_thread(storage.cancel_batch, owner_of(request), batch_id)
        worker.wake()
        return found(asked, batch_id)

    def found(batch: Batch | None, batch_id: str) -> dict[str, Any]:
        if batch is None:
            raise RequestError(f"there is no batch {batch_id[:64]!r}", status=404, code="not_found")
        return described(batch)

    return routes


def described(batch: Batch) -> dict[str, Any]:
    """A batch in OpenAI's shape."""
    ended = {state: batch.ended if batch.state == state else None for state in ENDED}
    times = {
        "created_at": batch.created,
        "in_progress_at": batch.begun,
        "expires_at": batch.expires,
        "finalizing_at": batch.ended if batch.state == "completed" else None,
        "cancelling_at": batch.asked_to_end,
    } | {f"{state}_at": at for state, at in ended.items()}
    return {
        "id": batch.id,
        "object": "batch",
        "endpoint": batch.endpoint,
        "input_file_id": batch.input_file,
        "completion_window": "24h",
        "status": batch.state,
        "output_file_id": batch.output_file,
        "error_file_id": batch.error_file,
        "errors": {"object": "list", "data": batch.errors} if batch.errors else None,
        "request_counts": {"total": batch.total, "completed": batch.completed, "failed": batch.failed},
        "metadata": batch.metadata,
    } | {name: int(at) if at is not None else None for name, at in times.items()}


class BatchWorker:
    """Works on batches as long as the application runs.

    Parameters
    ----------
    app
        The application that answers; outermost, so that nothing is left out.
    storage : Storage
        Where batches are.
    access : Access, optional
        Who keeps the accounts.
    """

    def __init__(self, app: ASGIApp, storage: Storage, access: Access | None) -> None:
        self._app = app
        self._storage = storage
        self._access = access
        self._awake = asyncio.Event()
        self._working: set[asyncio.Task[None]] = set()

    def wake(self) -> None:
        """There is something to do."""
        self._awake.set()

    async def run(self) -> None:
        """Work until the task is cancelled. What is begun then is gone on with by whoever comes next."""
        forgot = -math.inf
        try:
            while True:
                self._awake.clear()
                try:
                    if time.monotonic() - forgot >= _FORGET_S:
                        await asyncio.to_thread(self._storage.forget)
                        forgot = time.monotonic()
                    while len(self._working) < _BATCHES and await self._claimed():
                        pass
                except (InputError, OperationError) as error:
                    _LOG.error("batches wait: %s", error)
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._awake.wait(), _LOOK_S)
        finally:
            working = set(self._working)
            for task in working:
                task.cancel()
            await asyncio.gather(*working, return_exceptions=True)

    async def _claimed(self) -> bool:
        """Begin with a batch that nobody works on, if there is one."""
        name = secrets.token_hex(16)
        batch = await asyncio.to_thread(self._storage.claim_batch, name)
        if batch is None:
            return False
        work = _Work(self._app, self._storage, self._access, name, batch)
        self._working.add(task := asyncio.create_task(work.run(), name=batch.id))
        task.add_done_callback(self._ended)
        return True

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._working.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _LOG.error("the batch %s waits", task.get_name(), exc_info=error)
        self.wake()


class _Work:
    """One process at one batch, under a name of its own: what another has taken over meanwhile isn't written to."""

    def __init__(self, app: ASGIApp, storage: Storage, access: Access | None, name: str, batch: Batch) -> None:
        self._app = app
        self._storage = storage
        self._access = access
        self._name = name
        self._batch = batch
        self._rest_s = 0.0
        """How long to let the batch rest: a tier's limit is reached for longer than one holds it for."""

    async def run(self) -> None:
        """Answer what hasn't been, and end the batch."""
        batch = self._batch
        if batch.state == "cancelling":
            await self._end("cancelled")
            return
        content = await asyncio.to_thread(self._storage.content, batch.owner, batch.input_file)
        lines, errors = await asyncio.to_thread(read_lines, content, batch.endpoint)
        del content
        if errors:
            await self._end("failed", errors)
            return
        if batch.state == "validating":
            await asyncio.to_thread(self._storage.begin_batch, self._name, batch.id, len(lines))
        done = await asyncio.to_thread(self._storage.answered, batch.id)
        answering = asyncio.create_task(self._answer([line for line in lines if line.number not in done]))
        try:
            state = await self._watched(answering)
        finally:
            answering.cancel()
            await asyncio.wait({answering})
        if state == "completed" and self._rest_s:
            wait_s = min(self._rest_s, max(batch.expires - time.time(), 0))
            await asyncio.to_thread(self._storage.rest_batch, self._name, batch.id, wait_s)
            return
        if state == "expired":
            await self._give_up(lines)
        if state is not None:
            await self._end(state)

    async def _watched(self, answering: asyncio.Task[None]) -> str | None:
        """What the work ends with: done, its time over, cancelled, or taken over by another (None)."""
        while True:
            held = await asyncio.to_thread(self._storage.beat_batch, self._name, self._batch.id)
            if held is None:
                return None
            if held.state == "cancelling":
                return "cancelled"
            if time.time() >= held.expires:
                return "expired"
            await asyncio.wait({answering}, timeout=_BEAT_S)
            if answering.done():
                answering.result()
                return "completed"

    async def _give_up(self, lines: list[Line]) -> None:
        error = {"code": "batch_expired", "message": "its time was over before it was answered"}
        done = await asyncio.to_thread(self._storage.answered, self._batch.id)
        for line in lines:
            if line.number not in done:
                await self._put(line, None, error)

    async def _end(self, state: str, errors: Sequence[dict[str, Any]] = ()) -> None:
        await asyncio.to_thread(self._storage.end_batch, self._name, self._batch.id, state, errors)

    async def _answer(self, lines: list[Line]) -> None:
        """Have lines answered, several at once."""
        parallel = _AT_ONCE
        if self._access is not None and self._batch.key_id is not None:
            with suppress(RequestError):  # then each line says why
                parallel = min(parallel, max(1, (await self._access.still(self._batch.key_id)).tier.parallel // 2))
        waiting = iter(lines)

        async def one_by_one() -> None:
            for line in waiting:
                if self._rest_s:
                    return
                await self._line(line)

        async with asyncio.TaskGroup() as group:
            for _ in range(min(parallel, len(lines))):
                group.create_task(one_by_one())

    async def _line(self, line: Line) -> None:
        failures = 0
        while True:
            answer = await self._ask(line.body)
            busy = answer.status_code in _BUSY
            failures += answer.status_code >= 500 and not busy
            if not busy and (answer.status_code < 500 or failures == _TRIES_OF_FAILURES):
                await self._put(line, answer)
                return
            wait_s = float(answer.headers.get("retry-after", 1))
            if wait_s > _LONGEST_WAIT_S:
                self._rest_s = wait_s
                return
            await asyncio.sleep(max(wait_s, 1.0))

    async def _ask(self, body: dict[str, Any]) -> httpx.Response:
        principal = None
        if self._access is not None and self._batch.key_id is not None:
            try:
                principal = replace(await self._access.still(self._batch.key_id), batch=True)
            except RequestError as error:
                return httpx.Response(error.status, json=error_body(error))
            except OperationError:
                return httpx.Response(503)

        async def in_its_name(scope: Scope, receive: Receive, send: Send) -> None:
            scope["state"] = {"admitted": True, "principal": principal}
            await self._app(scope, receive, send)

        transport = httpx.ASGITransport(in_its_name, raise_app_exceptions=False, client=("batch", 0))
        options: dict[str, Any] = {"base_url": "http://localhost", "timeout": None, "trust_env": False}
        async with httpx.AsyncClient(transport=transport, **options) as client:
            return await client.post(self._batch.endpoint, json=body)

    async def _put(self, line: Line, answer: httpx.Response | None, error: dict[str, Any] | None = None) -> None:
        response = None
        if answer is not None:
            request_id = f"req_{secrets.token_hex(16)}"
            response = {"status_code": answer.status_code, "request_id": request_id, "body": answer.json()}
        written = {
            "id": f"batch_req_{secrets.token_hex(16)}",
            "custom_id": line.custom_id,
            "response": response,
            "error": error,
        }
        good = answer is not None and answer.is_success
        result = Result(line.number, good, json.dumps(written, separators=(",", ":")))
        await asyncio.to_thread(self._storage.put_result, self._name, self._batch.id, result)


def read_lines(content: bytes | None, endpoint: str) -> tuple[list[Line], list[dict[str, Any]]]:
    """The requests of a batch's file, or what is wrong with it, in OpenAI's shape.

    Parameters
    ----------
    content : bytes, optional
        JSON Lines in UTF-8; None if the file is gone.
    endpoint : str
        Where all of them must be meant for.
    """
    if content is None:
        return [], [_error("file_not_found", "the file is gone", None, "input_file_id")]
    lines: list[Line] = []
    errors: list[dict[str, Any]] = []
    known: set[str] = set()
    for number, text in _texts(content):
        try:
            line = _line(number, text, endpoint, known)
        except RequestError as error:
            errors.append(_error(error.code or "invalid_json_line", str(error), number + 1, error.param))
            if len(errors) >= _MOST_ERRORS:
                break
            continue
        known.add(line.custom_id)
        lines.append(line)
        if len(lines) > MOST_LINES:
            return [], [_error("too_many_requests", f"over {MOST_LINES:,} lines", None, None)]
    if not lines and not errors:
        errors = [_error("empty_file", "the file holds no requests", None, None)]
    return lines, errors


def _texts(content: bytes) -> Iterator[tuple[int, bytes]]:
    for number, text in enumerate(content.split(b"\n")):
        if text.strip():
            yield number, text


class _GivenLine(Fields):
    custom_id: Annotated[str, Field(min_length=1, max_length=512)]
    method: Literal["POST"]
    url: str
    body: dict[str, Any]


def _line(number: int, text: bytes, endpoint: str, known: set[str]) -> Line:
    given = parse(_GivenLine, text)
    if given.url != endpoint:
        raise RequestError(
            f"url: {endpoint!r} is accepted, the batch's endpoint", code="mismatched_endpoint", param="url"
        )
    if given.custom_id in known:
        raise RequestError(
            f"custom_id: {given.custom_id[:64]!r} is used twice", code="duplicate_custom_id", param="custom_id"
        )
    if given.body.get("stream"):
        raise RequestError("body.stream: a batch's answers don't stream", code="invalid_value", param="body.stream")
    return Line(number, given.custom_id, given.body)


def _error(code: str, message: str, line: int | None, param: str | None) -> dict[str, Any]:
    return {"code": code, "message": message, "line": line, "param": param}
