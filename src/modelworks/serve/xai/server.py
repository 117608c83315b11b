"""The gRPC server: it listens, bounds what a connection may send, and says refusals as gRPC says them."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import unquote

import grpc
from fastapi import FastAPI
from google.protobuf.any_pb2 import Any as Packed
from google.protobuf.duration_pb2 import Duration
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import DecodeError, Message
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status
from xai_sdk.proto import chat_pb2, deferred_pb2, embed_pb2, models_pb2

from modelworks.serve.errors import RequestError
from modelworks.serve.within import AnsweredError, Caller
from modelworks.serve.xai.services import Services, Write

_LOG = logging.getLogger("modelworks.xai")
_CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    499: grpc.StatusCode.CANCELLED,
    501: grpc.StatusCode.UNIMPLEMENTED,
    503: grpc.StatusCode.UNAVAILABLE,
}
_LARGEST = 8 << 20
"""Bytes of a message, before and after it is unpacked: as of a body over HTTP."""
_MOST_CALLS = 2048
"""Calls at once, of all connections; over HTTP so many connections wait to be taken."""
_OPTIONS = (
    ("grpc.max_receive_message_length", _LARGEST),
    ("grpc.max_concurrent_streams", 256),
    ("grpc.max_metadata_size", 16 << 10),
    ("grpc.so_reuseport", 1),
    # xai-sdk pings every 30 seconds, also when it asks nothing; who does so more than every ten is disconnected.
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.max_connection_idle_ms", 900_000),
)
_LONGEST_REASON = 1000
"""Characters of a refusal: it is told twice in the trailers, of which a client takes 8 KiB."""
_HERE = "chats (Chat), models (Models), embeddings (Embedder) and the key (Auth) are here"

Context = Any
"""`grpc.aio.ServicerContext`; gRPC has no types."""


def answer_xai(app: FastAPI, address: str, grace_s: float) -> None:
    """Answer xAI's clients as long as an application runs.

    Parameters
    ----------
    app : FastAPI
        What answers.
    address : str
        ``host:port`` to listen on, which other processes may listen on as well.
    grace_s : float
        Seconds that answers may take to end when the application does.
    """
    inner = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(running: FastAPI) -> AsyncIterator[Any]:
        async with inner(running) as state:
            server = grpc.aio.server(
                handlers=[_Handlers(Services(app))], options=_OPTIONS, maximum_concurrent_rpcs=_MOST_CALLS
            )
            server.add_insecure_port(address)
            await server.start()
            try:
                yield state
            finally:
                await server.stop(grace_s)

    app.router.lifespan_context = lifespan


class _Handlers(grpc.GenericRpcHandler):  # type: ignore[misc]
    """Finds what answers a method; those that aren't here are refused with a sentence."""

    def __init__(self, services: Services) -> None:
        chats = chat_pb2.GetCompletionsRequest
        self._methods = {
            "/xai_api.Chat/GetCompletion": _one(services.complete, chats),
            "/xai_api.Chat/GetCompletionChunk": _many(services.stream, chats),
            "/xai_api.Chat/GetStoredCompletion": _one(services.kept, chat_pb2.GetStoredCompletionRequest),
            "/xai_api.Chat/DeleteStoredCompletion": _one(services.forget, chat_pb2.DeleteStoredCompletionRequest),
            "/xai_api.Chat/StartDeferredCompletion": _one(services.defer, chats),
            "/xai_api.Chat/GetDeferredCompletion": _one(services.deferred, deferred_pb2.GetDeferredRequest),
            "/xai_api.Embedder/Embed": _one(services.embed, embed_pb2.EmbedRequest),
            "/xai_api.Models/ListLanguageModels": _one(services.models, Empty),
            "/xai_api.Models/GetLanguageModel": _one(services.model, models_pb2.GetModelRequest),
            "/xai_api.Auth/get_api_key_info": _one(services.key, Empty),
        }

    def service(self, details: Any) -> Any:
        return self._methods.get(details.method) or _nothing(details.method)


def _one(answer: Callable[[Any, Caller], Awaitable[Message]], kind: type[Message]) -> Any:
    async def handle(content: bytes, context: Context) -> bytes:
        async with _refusals(context):
            message = await answer(_read(kind, content), _caller(context))
            return bytes(message.SerializeToString())

    return grpc.unary_unary_rpc_method_handler(handle)


def _many(answer: Callable[[Any, Caller, Write], Awaitable[None]], kind: type[Message]) -> Any:
    async def handle(content: bytes, context: Context) -> None:
        async def write(message: Message) -> bool:
            try:
                await context.write(message.SerializeToString())
            except grpc.aio.BaseError:
                return False  # hung up in this moment
            return True

        async with _refusals(context):
            await answer(_read(kind, content), _caller(context), write)

    return grpc.unary_stream_rpc_method_handler(handle)


def _nothing(method: str) -> Any:
    async def handle(_: bytes, context: Context) -> None:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, f"{method[:100]} is not done by this server: {_HERE}")

    return grpc.unary_unary_rpc_method_handler(handle)


def _read(kind: type[Message], content: bytes) -> Message:
    try:
        return kind.FromString(content)
    except DecodeError:
        raise RequestError(f"the message is no {kind.DESCRIPTOR.full_name}") from None


@asynccontextmanager
async def _refusals(context: Context) -> AsyncIterator[None]:
    """What the application refuses, with gRPC's code for it, and when to come again."""
    try:
        yield
    except (AnsweredError, RequestError) as error:
        refusal = error
    except Exception as error:  # noqa: BLE001
        # What an exception says may hold what the request held, and gRPC would send and log it.
        _LOG.exception("an error of ours")
        refusal = AnsweredError(500, {"message": f"an error of ours: {type(error).__name__}; the server's log has it"})
    else:
        return
    code = _CODES.get(refusal.status, grpc.StatusCode.INTERNAL)
    message = str(refusal)[:_LONGEST_REASON]
    await context.abort(code, message, _trailing(code, message, refusal))


def _trailing(
    code: grpc.StatusCode, message: str, refusal: AnsweredError | RequestError
) -> tuple[tuple[str, str | bytes], ...]:
    """The refusal for programs: Google's model of errors, and for a wait the header's name as well."""
    details: list[Message] = []
    if refusal.code or refusal.param:
        details.append(ErrorInfo(reason=refusal.code, domain="modelworks", metadata={"param": refusal.param or ""}))
    wait = refusal.retry_after_s
    if wait is not None:
        details.append(RetryInfo(retry_delay=Duration(seconds=int(wait))))
    packed = [Packed() for _ in details]
    for one, detail in zip(packed, details, strict=True):
        one.Pack(detail)
    status = Status(code=code.value[0], message=message, details=packed).SerializeToString()
    return (("grpc-status-details-bin", status), *((("retry-after", str(int(wait))),) if wait is not None else ()))


def _caller(context: Context) -> Caller:
    headers: dict[str, str] = {}
    for name, value in context.invocation_metadata() or ():
        if isinstance(value, str):
            headers.setdefault(name, value)
    kind, _, address = unquote(context.peer()).partition(":")
    host, _, port = address.rpartition(":")
    return Caller(host.strip("[]") or kind, int(port) if port.isdigit() else 0, headers)
