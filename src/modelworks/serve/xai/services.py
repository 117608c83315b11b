"""What xAI's clients can ask, each as requests to our own API."""

from __future__ import annotations

import json
import os
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message
from starlette.types import ASGIApp
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware
from xai_sdk.proto import auth_pb2, chat_pb2, deferred_pb2, embed_pb2, models_pb2, usage_pb2

from modelworks.serve.errors import RequestError
from modelworks.serve.within import AnsweredError, Caller, ask
from modelworks.serve.xai.chat import Chunks, chat_body, completion, moment, refused
from modelworks.serve.xai.kept import ChatChunks, as_chat, is_kept, response_body

_CHAT = "/v1/chat/completions"
_DEFERRED_S = 86400
"""How long a request that waits is kept: as long as it may wait."""

Write = Callable[[Message], Awaitable[bool]]
"""Sends one message of several; false if the client is gone."""


class Services:
    """Each method takes a message and gives one, or writes several.

    Parameters
    ----------
    app
        The application that answers; outermost, so that nothing is left out.
    """

    def __init__(self, app: ASGIApp) -> None:
        trusted = os.environ.get("FORWARDED_ALLOW_IPS", "127.0.0.1")
        inner: Any = app  # uvicorn and Starlette type the same thing differently
        self._app: Any = ProxyHeadersMiddleware(inner, trusted_hosts=trusted)  # as uvicorn puts it around it

    async def _get(self, caller: Caller, path: str) -> Any:
        return json.loads(await ask(self._app, caller, "GET", path))

    async def _post(self, caller: Caller, path: str, body: dict[str, Any], **options: Any) -> bytes:
        return await ask(self._app, caller, "POST", path, _packed(body), **options)

    async def complete(
        self, asked: chat_pb2.GetCompletionsRequest, caller: Caller
    ) -> chat_pb2.GetChatCompletionResponse:
        """Answer a conversation."""
        if is_kept(asked):
            return completion(as_chat(json.loads(await self._post(caller, "/v1/responses", response_body(asked)))))
        return completion(json.loads(await self._post(caller, _CHAT, chat_body(asked))))

    async def stream(self, asked: chat_pb2.GetCompletionsRequest, caller: Caller, write: Write) -> None:
        """Answer a conversation in chunks."""
        chunks, kept = Chunks(), ChatChunks()

        async def take(chunk: dict[str, Any]) -> bool:
            return await write(chunks.chunk(chunk))

        async def take_kept(event: dict[str, Any]) -> bool:
            chunk = kept.chunk(event)
            return chunk is None or await take(chunk)

        if is_kept(asked):
            await self._post(caller, "/v1/responses", response_body(asked) | {"stream": True}, take=take_kept)
        else:
            body = chat_body(asked) | {"stream": True, "stream_options": {"include_usage": True}}
            await self._post(caller, _CHAT, body, take=take)

    async def kept(
        self, asked: chat_pb2.GetStoredCompletionRequest, caller: Caller
    ) -> chat_pb2.GetChatCompletionResponse:
        """An answer that was kept."""
        return completion(as_chat(await self._get(caller, f"/v1/responses/{_id('response_id', asked.response_id)}")))

    async def forget(
        self, asked: chat_pb2.DeleteStoredCompletionRequest, caller: Caller
    ) -> chat_pb2.DeleteStoredCompletionResponse:
        """Keep an answer no longer."""
        await ask(self._app, caller, "DELETE", f"/v1/responses/{_id('response_id', asked.response_id)}")
        return chat_pb2.DeleteStoredCompletionResponse(response_id=asked.response_id)

    async def defer(self, asked: chat_pb2.GetCompletionsRequest, caller: Caller) -> deferred_pb2.StartDeferredResponse:
        """Have a conversation answered when there is time: as a batch of one, which outlives this process."""
        if is_kept(asked):
            raise refused("store_messages", "not accepted for what is deferred, nor is previous_response_id")
        line = _packed({"custom_id": "deferred", "method": "POST", "url": _CHAT, "body": chat_body(asked)})
        form = {"purpose": "batch", "expires_after[anchor]": "created_at", "expires_after[seconds]": str(_DEFERRED_S)}
        sent = httpx.Request("POST", "http://localhost", data=form, files={"file": ("deferred.jsonl", line)})
        kind = sent.headers["content-type"]
        file = json.loads(await ask(self._app, caller, "POST", "/v1/files", sent.read(), kind=kind))
        body = {"input_file_id": file["id"], "endpoint": _CHAT, "completion_window": "24h"}
        batch = json.loads(await self._post(caller, "/v1/batches", body))
        return deferred_pb2.StartDeferredResponse(request_id=batch["id"])

    async def deferred(
        self, asked: deferred_pb2.GetDeferredRequest, caller: Caller
    ) -> chat_pb2.GetDeferredCompletionResponse:
        """What has become of it."""
        batch = await self._get(caller, f"/v1/batches/{_id('request_id', asked.request_id)}")
        if batch["status"] == "expired":
            return chat_pb2.GetDeferredCompletionResponse(status=deferred_pb2.EXPIRED)
        if batch["status"] in {"failed", "cancelled"}:
            errors = batch["errors"]["data"] if batch["errors"] else [{"message": f"it was {batch['status']}"}]
            raise AnsweredError(400, errors[0])
        if batch["status"] != "completed":
            return chat_pb2.GetDeferredCompletionResponse(status=deferred_pb2.PENDING)
        written = await self._get(caller, f"/v1/files/{batch['output_file_id'] or batch['error_file_id']}/content")
        answer = written["response"]
        if answer["status_code"] != 200:
            raise AnsweredError(answer["status_code"], answer["body"]["error"])
        return chat_pb2.GetDeferredCompletionResponse(status=deferred_pb2.DONE, response=completion(answer["body"]))

    async def embed(self, asked: embed_pb2.EmbedRequest, caller: Caller) -> embed_pb2.EmbedResponse:
        """Turn texts into vectors."""
        packed = asked.encoding_format == embed_pb2.FORMAT_BASE64
        texts = [one.string if one.WhichOneof("input") == "string" else {"image_url": ""} for one in asked.input]
        body = {"model": asked.model, "input": texts, "encoding_format": "base64" if packed else "float"}
        answer = json.loads(await self._post(caller, "/v1/embeddings", body))
        field = "base64_array" if packed else "float_array"
        return embed_pb2.EmbedResponse(
            model=answer["model"],
            embeddings=[
                embed_pb2.Embedding(
                    index=one["index"], embeddings=[embed_pb2.FeatureVector(**{field: one["embedding"]})]
                )
                for one in answer["data"]
            ],
            usage=usage_pb2.EmbeddingUsage(num_text_embeddings=len(texts)),
        )

    async def models(self, _: Empty, caller: Caller) -> models_pb2.ListLanguageModelsResponse:
        """What is served, to whoever asks."""
        listed = await self._get(caller, "/v1/models")
        return models_pb2.ListLanguageModelsResponse(models=[_model(one) for one in listed["data"]])

    async def model(self, asked: models_pb2.GetModelRequest, caller: Caller) -> models_pb2.LanguageModel:
        """One model."""
        return _model(await self._get(caller, f"/v1/models/{asked.name}"))

    async def key(self, _: Empty, caller: Caller) -> auth_pb2.ApiKey:
        """The key that asks."""
        account = await self._get(caller, "/v1/account")
        key = await self._get(caller, f"/v1/account/keys/{account['key']}")
        return auth_pb2.ApiKey(
            redacted_api_key=key["prefix"],
            user_id=key["user"],
            name=key["name"],
            create_time=moment(key["created"]),
            team_id=account["team"] or "",
            acls=key["scopes"],
            api_key_id=key["id"],
        )


def _packed(body: dict[str, Any]) -> bytes:
    """A body as JSON. Half a surrogate, which a schema can hold, goes on to the API, which takes none."""
    try:
        return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode(errors="surrogatepass")
    except RecursionError:
        raise RequestError("a schema is nested too deep", code="invalid_value") from None


def _id(field: str, given: str) -> str:
    """An id as a part of a path."""
    if not given.isascii() or not given.replace("_", "").isalnum():
        raise RequestError(f"{field}: there is no {given[:64]!r}", status=404, code="not_found", param=field)
    return given


def _model(listed: dict[str, Any]) -> models_pb2.LanguageModel:
    return models_pb2.LanguageModel(
        name=listed["id"],
        input_modalities=[models_pb2.Modality.Value(one.upper()) for one in listed["input_modalities"]],
        output_modalities=[models_pb2.TEXT],
        created=moment(listed["created"]),
        max_prompt_length=listed["context_length"],
    )
