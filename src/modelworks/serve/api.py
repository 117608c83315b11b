"""The OpenAI-compatible API: checks what comes in, hands it to an engine, passes on what comes out.

An answer runs beside a watch on the connection: when the client is gone, the answer is cancelled, and with it the
engine's work. The usual stream (one choice) is passed on as the engine's own bytes. Nothing is sent before the first
chunk is there, so that whatever can be refused is refused with a status and OpenAI's error shape.
"""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import math
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager
from typing import Any, Literal

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from modelworks import __version__
from modelworks.serve.access import Access, KeysOnly, Outcome, owner_of, principal_of
from modelworks.serve.answer import Answer, capped
from modelworks.serve.batches import BatchWorker, batch_routes
from modelworks.serve.engine import Engine, ModelCard
from modelworks.serve.errors import RequestError, UnavailableError, UnknownModelError, error_body
from modelworks.serve.fairness import FairQueue
from modelworks.serve.files import file_routes
from modelworks.serve.gate import Gate, Visit
from modelworks.serve.metrics import Metrics
from modelworks.serve.origin import OwnOriginOnly
from modelworks.serve.requests import ChatRequest, CompletionRequest, EmbeddingRequest, parse, read_body
from modelworks.serve.responses import Response as MadeResponse
from modelworks.serve.responses import ResponsesRequest, shown
from modelworks.serve.storage import Kept, Storage
from modelworks.serve.store import Store
from modelworks.serve.tracing import begin_tracing, end_tracing
from modelworks.spec.errors import OperationError

_LOG = logging.getLogger("modelworks.api")
_CLIENT_GONE = 499
_BODY_LIMIT = 8 << 20


def create_app(
    engine: Engine,
    store: Store,
    *,
    body_limit: int = _BODY_LIMIT,
    preload: str | None = None,
    hosts: Collection[str] = (),
    access: Access | None = None,
    queue: FairQueue | None = None,
    storage: Storage | None = None,
    routers: Collection[APIRouter] = (),
    door: Callable[[ASGIApp], ASGIApp] | None = None,
) -> FastAPI:
    """The application: ``/v1/*``, ``/health`` and ``/metrics``; the rest of the paths is free for pages.

    Parameters
    ----------
    engine : Engine
        What answers. It is closed when the application ends.
    store : Store
        The models that can be served.
    body_limit : int
        The most bytes of a request.
    preload : str, optional
        A model to load before the first request is taken.
    hosts : collection of str
        Names that lead to this server beside its addresses, ``localhost`` and this machine's name.
    access : Access, optional
        Who keeps the accounts. Without it everything is open; with it nothing but `access.OPEN_PATHS` is.
    queue : FairQueue, optional
        Where requests wait for the engine; without it they wait in the engine.
    storage : Storage, optional
        Where responses, files and batches are kept; without it none is.
    routers : collection of APIRouter, optional
        More routes under ``/v1``, such as those of the accounts.
    door : callable, optional
        What lets people in to the pages, where there are any: a layer around the application, inside of the one that
        turns other sites' pages away.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        begin_tracing()
        await engine.start()
        if access is not None:
            await access.start()
        if preload:
            await engine.load(preload)
        chores = [asyncio.create_task(metrics.keep_showing(), name="metrics")]
        if worker is not None:
            chores.append(asyncio.create_task(worker.run(), name="batches"))
        yield
        for chore in chores:
            chore.cancel()
        await asyncio.gather(*chores, return_exceptions=True)
        await engine.close()
        if access is not None:
            await access.close()
        await asyncio.to_thread(end_tracing)

    app = FastAPI(title="Modelworks", version=__version__, lifespan=lifespan, docs_url="/v1/docs", redoc_url=None)
    if access is not None:
        app.add_middleware(KeysOnly, access=access, refuse=_error_response)
    if door is not None:
        app.add_middleware(door)
    app.add_middleware(OwnOriginOnly, names=hosts)
    app.state.engine, app.state.store = engine, store
    metrics = Metrics(engine, queue)
    gate = Gate(metrics, access, queue)
    app.state.metrics, app.state.gate = metrics, gate
    _add_generation(app, engine, metrics, gate, body_limit)
    _add_responses(app, engine, metrics, gate, body_limit, storage)
    _add_embeddings(app, engine, metrics, gate, body_limit)
    _add_models(app, engine)
    worker = None
    if storage is not None:
        worker = BatchWorker(app, storage, access)
        routers = [*routers, file_routes(storage), batch_routes(storage, worker)]
    for router in routers:
        app.include_router(router, prefix="/v1")

    @app.get("/health")
    async def health() -> dict[str, str]:
        """Answers as long as the server runs."""
        return {"status": "ok"}

    @app.get("/metrics")
    async def metrics_page() -> Response:
        """Figures for Prometheus."""
        return Response(metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")

    _add_errors(app)
    return app


def _add_generation(app: FastAPI, engine: Engine, metrics: Metrics, gate: Gate, body_limit: int) -> None:
    @app.post("/v1/chat/completions", openapi_extra=_documented(ChatRequest))
    async def chat_completions(request: Request) -> Response:
        """Answer a conversation."""
        return await answered(request, "chat", ChatRequest)

    @app.post("/v1/completions", openapi_extra=_documented(CompletionRequest))
    async def completions(request: Request) -> Response:
        """Continue a text."""
        return await answered(request, "completions", CompletionRequest)

    async def answered(request: Request, endpoint: str, kind: type[ChatRequest] | type[CompletionRequest]) -> Response:
        model = "unknown"
        try:
            asked = parse(kind, await read_body(request, body_limit))
            card = await engine.card(asked.model)
            model = card.name
        except RequestError as error:
            metrics.count(endpoint, model, error.status)
            return _error_response(error)

        async def answer(send: Send) -> None:
            async with gate.visit(request, asked, card, endpoint) as visit, _noted(visit):
                given = Answer.of(asked, engine, metrics, visit.answer_tokens, visit.outcomes)
                await given.send(send)

        return _Cancellable(answer, lambda status: metrics.count(endpoint, model, status))


def _add_responses(
    app: FastAPI, engine: Engine, metrics: Metrics, gate: Gate, body_limit: int, storage: Storage | None
) -> None:
    @app.post("/v1/responses", openapi_extra=_documented(ResponsesRequest))
    async def create(request: Request) -> Response:
        """Answer in items; the response is kept unless `store` is false."""
        model, owner = "unknown", owner_of(request)
        try:
            asked = parse(ResponsesRequest, await read_body(request, body_limit))
            before = await found(request, asked.previous_response_id) if asked.previous_response_id else None
            items = [*before.items, *before.response["output"]] if before else []
            chat = asked.chat(items)
            card = await engine.card(asked.model)
            model = card.name
        except RequestError as error:
            metrics.count("responses", model, error.status)
            return _error_response(error)

        async def keep(response: dict[str, Any]) -> None:
            assert storage is not None
            await asyncio.to_thread(storage.put_response, owner, Kept(response, [*items, *asked.items()]))

        async def answer(send: Send) -> None:
            async with gate.visit(request, chat, card, "responses") as visit, _noted(visit):
                body = capped(chat.body(), visit.answer_tokens)
                batches = metrics.measured(model, engine.stream("chat", model, body), visit.outcomes)
                made = MadeResponse(asked, batches, keep if storage is not None and asked.store is not False else None)
                if asked.stream:
                    await made.send(send)
                else:
                    await made.finish()
                    await JSONResponse(made.described())(request.scope, request.receive, send)

        return _Cancellable(answer, lambda status: metrics.count("responses", model, status))

    @app.get("/v1/responses/{response_id}")
    async def get(request: Request, response_id: str) -> dict[str, Any]:
        """A response that was kept."""
        return (await found(request, response_id)).response

    @app.get("/v1/responses/{response_id}/input_items")
    async def input_items(request: Request, response_id: str, order: Literal["asc", "desc"] = "desc") -> dict[str, Any]:
        """What a response was made of."""
        items = [shown(item) for item in (await found(request, response_id)).items]
        items = items if order == "asc" else items[::-1]
        first, last = (items[0]["id"], items[-1]["id"]) if items else ("", "")
        return {"object": "list", "data": items, "first_id": first, "last_id": last, "has_more": False}

    @app.delete("/v1/responses/{response_id}")
    async def delete(request: Request, response_id: str) -> dict[str, Any]:
        """Forget a response."""
        if storage is None or not await asyncio.to_thread(storage.remove_response, owner_of(request), response_id):
            raise _no_response(response_id)
        return {"id": response_id, "object": "response", "deleted": True}

    async def found(request: Request, response_id: str) -> Kept:
        kept = (
            await asyncio.to_thread(storage.response, owner_of(request), response_id) if storage is not None else None
        )
        if kept is None:
            raise _no_response(response_id)
        return kept


def _no_response(response_id: str) -> RequestError:
    return RequestError(f"there is no response {response_id[:64]!r}", status=404, code="not_found")


def _add_embeddings(app: FastAPI, engine: Engine, metrics: Metrics, gate: Gate, body_limit: int) -> None:
    @app.post("/v1/embeddings", openapi_extra=_documented(EmbeddingRequest))
    async def embeddings(request: Request) -> Response:
        """Turn texts into vectors of unit length."""
        model = "unknown"
        try:
            asked = parse(EmbeddingRequest, await read_body(request, body_limit))
            card = await engine.card(asked.model)
            model = card.name
        except RequestError as error:
            metrics.count("embeddings", model, error.status)
            return _error_response(error)

        async def answer(send: Send) -> None:
            async with gate.visit(request, asked, card, "embeddings") as visit, _noted(visit):
                vectors, tokens = await engine.embed(model, asked.input)
                visit.outcomes.append(Outcome(prompt_tokens=tokens))
                coded = [_base64(vector) for vector in vectors] if asked.encoding_format == "base64" else vectors
                data = [{"object": "embedding", "index": index, "embedding": one} for index, one in enumerate(coded)]
                usage = {"prompt_tokens": tokens, "total_tokens": tokens}
                whole = JSONResponse({"object": "list", "model": model, "data": data, "usage": usage})
                await whole(request.scope, request.receive, send)

        return _Cancellable(answer, lambda status: metrics.count("embeddings", model, status))


@asynccontextmanager
async def _noted(visit: Visit) -> AsyncIterator[None]:
    """What a request ended with, for those who keep account; one that is cut off keeps what it began with."""
    try:
        yield
        visit.status = 200
    except Exception as error:
        visit.status = _status(error)
        raise


def _add_models(app: FastAPI, engine: Engine) -> None:
    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        """What is served, to whoever asks."""
        principal = principal_of(request)
        cards = [card for card in await engine.models() if principal is None or principal.tier.has(card.name)]
        return {"object": "list", "data": [_described(card) for card in cards]}

    @app.get("/v1/models/{name:path}")
    async def model(request: Request, name: str) -> dict[str, Any]:
        """One model."""
        principal = principal_of(request)
        if principal is not None and not principal.tier.has(name):
            raise UnknownModelError(
                name, [card.name for card in await engine.models() if principal.tier.has(card.name)]
            )
        return _described(await engine.card(name))


def _add_errors(app: FastAPI) -> None:
    @app.api_route("/v1/{path:path}", methods=["GET", "POST", "PUT", "PATCH", "DELETE"], include_in_schema=False)
    async def nothing_here(request: Request) -> Response:
        raise RequestError(f"there is no {request.method} {request.url.path}", status=404, code="unknown_url")

    @app.exception_handler(RequestError)
    async def refused(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestError)
        return _error_response(error)

    @app.exception_handler(RequestValidationError)
    async def not_accepted(_: Request, error: Exception) -> Response:
        # Without what was given: it may be a password.
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        param = ".".join(str(part) for part in first["loc"][1:])
        where = f"{param}: " if param else ""
        return _error_response(RequestError(f"{where}{first['msg']}", code="invalid_value", param=param or None))

    @app.exception_handler(OperationError)
    async def failed(_: Request, error: Exception) -> Response:
        return _error_response(error)

    @app.exception_handler(ClientDisconnect)
    async def left(_: Request, error: Exception) -> Response:
        # In the middle of its own request: nobody reads this, and nothing is wrong with us.
        return Response(status_code=_CLIENT_GONE)

    @app.exception_handler(Exception)
    async def broken(_: Request, error: Exception) -> Response:
        _LOG.error("an error of ours", exc_info=error)
        return _error_response(OperationError(f"an error of ours: {type(error).__name__}; the server's log has it"))

    @app.exception_handler(HTTPException)
    async def turned_away(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return _error_response(RequestError(str(error.detail), status=error.status_code))


def _described(card: ModelCard) -> dict[str, Any]:
    return {
        "id": card.name,
        "object": "model",
        "created": card.created,
        "owned_by": card.source,
        "context_length": card.context,
        "license": card.license,
        "input_modalities": ["text", "image"] if card.images else ["text"],
    }


def _documented(kind: Any) -> dict[str, Any]:
    schema = kind.model_json_schema(ref_template="#/components/schemas/{model}")
    schema.pop("$defs", None)
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _base64(vector: list[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()


def _error_response(error: Exception) -> Response:
    headers = {}
    if isinstance(error, RequestError) and error.retry_after_s is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    if isinstance(error, RequestError) and error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error_body(error), _status(error), headers)


def _status(error: Exception) -> int:
    if isinstance(error, UnavailableError):
        return 503
    return error.status if isinstance(error, RequestError) else 500


class _Cancellable(Response):
    """Runs an answer beside a watch on the connection, and ends it when the client is gone."""

    def __init__(self, work: Callable[[Send], Awaitable[None]], count: Callable[[int], None]) -> None:
        super().__init__()
        self._work = work
        self._count = count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answering = asyncio.ensure_future(self._answer(scope, receive, send))
        watching = asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait({answering, watching}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone = not answering.done()
            answering.cancel()
            watching.cancel()
            await asyncio.wait({answering, watching})
            if gone:
                self._count(_CLIENT_GONE)
        if not gone:
            answering.result()

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def noting(message: Any) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._work(noting)
            self._count(200)
        except (RequestError, OperationError) as error:
            self._count(_status(error))
            if started:
                await send({"type": "http.response.body", "body": _event(error_body(error)), "more_body": False})
            else:
                await _error_response(error)(scope, receive, send)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _event(content: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(content).encode() + b"\n\n"
