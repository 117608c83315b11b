"""OpenAI's newer interface, ``/v1/responses``, over the chat engines: items in, items out.

A request is turned into a chat, and the chat's chunks into items: reasoning, a message, calls of functions. What a
response was made of is kept, so that the next request can name it instead of sending all again.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import aclosing
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator
from starlette.types import Send

from modelworks.serve.answer import STREAM_HEADERS
from modelworks.serve.choices import Batches, Choice, total_usage
from modelworks.serve.errors import RequestError
from modelworks.serve.requests import ChatRequest, Fields, Name, parse, refuse
from modelworks.spec.errors import OperationError

ID_PATTERN = r"^resp_[0-9a-f]{48}$"
_PASSED_ON = ("temperature", "top_p", "top_logprobs", "stream", "parallel_tool_calls", "search_parameters")
_PARAMS = {"messages": "input", "response_format": "text.format", "max_completion_tokens": "max_output_tokens"}
"""A chat's fields, and what they are called here."""


class _Effort(Fields):
    effort: Literal["none", "minimal", "low", "medium", "high"] | None = None


class _Format(Fields):
    type: Literal["text", "json_object", "json_schema"] = "text"
    name: Name = "answer"
    schema_: dict[str, Any] | None = Field(None, alias="schema")

    def plain(self) -> dict[str, Any]:
        if self.type != "json_schema":
            return {"type": self.type}
        return {"type": self.type, "json_schema": {"name": self.name, "schema": self.schema_ or {}}}


class _Text(Fields):
    format: _Format | None = None


class _Tool(Fields):
    type: str
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None

    @field_validator("type")
    @classmethod
    def _is_function(cls, kind: str) -> str:
        if kind != "function":
            raise refuse(f"a tool of type {kind[:40]!r} is not accepted: function is")
        return kind


class _NamedTool(Fields):
    type: Literal["function"] = "function"
    name: str


class ResponsesRequest(Fields):
    """``POST /v1/responses``."""

    model: Annotated[str, Field(min_length=1, max_length=256)]
    input: str | list[dict[str, Any]]
    """A text, or items: messages, calls of functions and what they gave."""
    instructions: str | None = None
    previous_response_id: Annotated[str, Field(pattern=ID_PATTERN)] | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    include: list[str] | None = None
    text: _Text | None = None
    tools: list[_Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | _NamedTool | None = None
    parallel_tool_calls: bool | None = None
    reasoning: _Effort | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    stream: bool | None = None
    background: bool | None = None
    search_parameters: dict[str, Any] | None = None

    @field_validator("tools", mode="before")
    @classmethod
    def _all_functions(cls, tools: Any) -> Any:
        # First, so that a tool that only OpenAI has is named and not its missing name.
        for tool in tools if isinstance(tools, list) else []:
            if isinstance(tool, dict) and isinstance(kind := tool.get("type"), str) and kind != "function":
                raise refuse(f"a tool of type {kind[:40]!r} is not accepted: function is")
        return tools

    @model_validator(mode="after")
    def _can_be_done(self) -> ResponsesRequest:
        if self.background:
            raise refuse("background is not supported: a stream, or a batch, is")
        return self

    @property
    def logprobs_wanted(self) -> bool:
        """Whether the text's tokens are asked for."""
        return bool(self.top_logprobs) or "message.output_text.logprobs" in (self.include or [])

    def items(self) -> list[dict[str, Any]]:
        """The input as items."""
        given = [{"role": "user", "content": self.input}] if isinstance(self.input, str) else self.input
        return [item if "id" in item else {"id": _new("msg"), **item} for item in given]

    def chat(self, before: list[dict[str, Any]]) -> ChatRequest:
        """The chat that it comes to, after the items of earlier responses.

        Raises
        ------
        RequestError
            If an item or a field is not accepted; it names the field.
        """
        messages = [{"role": "system", "content": self.instructions}] if self.instructions else []
        messages += list(_messages([*before, *self.items()]))
        chat = self.model_dump(include=set(_PASSED_ON), exclude_none=True) | {"model": self.model, "messages": messages}
        if self.logprobs_wanted:
            chat |= {"logprobs": True, "top_logprobs": self.top_logprobs or 0}
        else:
            chat.pop("top_logprobs", None)
        if self.max_output_tokens is not None:
            chat["max_completion_tokens"] = self.max_output_tokens
        if self.text and self.text.format:
            chat["response_format"] = self.text.format.plain()
        if self.reasoning and self.reasoning.effort:
            chat["reasoning_effort"] = self.reasoning.effort
        if self.tools:
            chat["tools"] = [
                {"type": "function", "function": tool.model_dump(exclude={"type"}, exclude_none=True)}
                for tool in self.tools
            ]
            chat["tool_choice"] = self.tool_choice or "auto"
            if isinstance(self.tool_choice, _NamedTool):
                chat["tool_choice"] = {"type": "function", "function": {"name": self.tool_choice.name}}
        elif self.tool_choice not in (None, "none", "auto"):
            chat["tool_choice"] = "required"
        try:
            return parse(ChatRequest, json.dumps(chat).encode())
        except RequestError as error:
            field, _, rest = (error.param or "").partition(".")
            param = ".".join(filter(None, (_PARAMS.get(field, field), rest if field != "messages" else "")))
            message = str(error).removeprefix(f"{error.param}: ")
            raise RequestError(f"{param}: {message}" if param else message, code=error.code, param=param) from None


def shown(item: dict[str, Any]) -> dict[str, Any]:
    """An item as it is listed: a message's text as a part."""
    if item.get("type", "message") != "message" or not isinstance(item.get("content"), str):
        return item
    kind = "output_text" if item.get("role") == "assistant" else "input_text"
    part = {"type": kind, "text": item["content"]} | ({"annotations": []} if kind == "output_text" else {})
    return {"type": "message", "status": "completed", **item, "content": [part]}


def _messages(items: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The messages that items come to; calls that follow each other belong to one message."""
    calls: list[dict[str, Any]] = []
    for place, item in enumerate(items):
        kind = item.get("type", "message" if "role" in item else None)
        if kind == "function_call":
            function = {"name": _text(item, "name", place), "arguments": _text(item, "arguments", place)}
            calls.append({"id": _text(item, "call_id", place), "type": "function", "function": function})
            continue
        if calls:
            yield {"role": "assistant", "content": None, "tool_calls": calls}
            calls = []
        if kind == "message":
            yield {"role": item.get("role"), "content": _content(item.get("content"), place)}
        elif kind == "function_call_output":
            output = _content(item.get("output"), place)
            yield {"role": "tool", "tool_call_id": _text(item, "call_id", place), "content": output}
        elif kind != "reasoning":
            known = "message, function_call, function_call_output and reasoning are"
            raise RequestError(
                f"input: item {place} of type {str(kind)[:40]!r} is not accepted: {known}",
                code="invalid_value",
                param="input",
            )
    if calls:
        yield {"role": "assistant", "content": None, "tool_calls": calls}


def _text(item: dict[str, Any], field: str, place: int) -> str:
    value = item.get(field)
    if not isinstance(value, str):
        raise RequestError(f"input: item {place} needs {field}, a text", code="invalid_value", param="input")
    return value


def _content(content: Any, place: int) -> Any:
    if not isinstance(content, list):
        return content
    parts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in {"input_text", "output_text", "text"}:
            parts.append({"type": "text", "text": part.get("text")})
        elif kind == "refusal":
            parts.append({"type": "text", "text": part.get("refusal")})
        elif kind == "input_image":
            parts.append({"type": "image_url", "image_url": {"url": part.get("image_url")}})
        else:
            raise RequestError(
                f"input: a part of type {str(kind)[:40]!r} in item {place} is not accepted: "
                "input_text, output_text and input_image are",
                code="invalid_value",
                param="input",
            )
    return parts


class Response:
    """A response while it is made: its items, and the events that tell of them.

    Parameters
    ----------
    asked : ResponsesRequest
        The request.
    batches : AsyncGenerator of list of str
        The chunks of the chat that it comes to.
    keep : callable, optional
        Awaited with the whole response before its end is told, so that what is known to have ended can be found.
    """

    def __init__(
        self, asked: ResponsesRequest, batches: Batches, keep: Callable[[dict[str, Any]], Awaitable[None]] | None = None
    ) -> None:
        self.id = _new("resp")
        self._asked = asked
        self._batches = batches
        self._keep = keep
        self._created = time.time()
        self._choice = Choice(0)
        self._items: list[dict[str, Any]] = []
        self._status = "in_progress"
        self._error: dict[str, Any] | None = None
        self._number = 0

    async def finish(self) -> None:
        """Let all be said."""
        async with aclosing(self.events()) as events:
            async for _ in events:
                pass

    async def send(self, send: Send) -> None:
        """Send its events as they happen; nothing before the first chunk, so that a refusal has a status."""
        started = False
        try:
            async with aclosing(self.events()) as events:
                async for event in events:
                    if not started:
                        await send({"type": "http.response.start", "status": 200, "headers": STREAM_HEADERS})
                        started = True
                    await send({"type": "http.response.body", "body": event, "more_body": True})
        except OperationError as error:
            if started:
                await send({"type": "http.response.body", "body": self._fail(str(error)), "more_body": True})
            raise
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Its events as they happen, in the order that OpenAI's have."""
        begun = False
        async with aclosing(self._batches) as batches:
            async for batch in batches:
                events = [] if begun else [self._of("response.created"), self._of("response.in_progress")]
                begun = True
                for chunk in map(json.loads, batch):
                    events += self._take(chunk)
                if events:
                    yield b"".join(events)
        finish = self._choice.finish
        self._status = "incomplete" if finish == "length" else "completed"
        closing = b"".join(self._close())
        if self._keep is not None:
            await self._keep(self.described())
        yield closing + self._of(f"response.{self._status}")

    def _fail(self, message: str) -> bytes:
        self._status, self._error = "failed", {"code": "server_error", "message": message}
        return self._of("response.failed")

    def described(self) -> dict[str, Any]:
        """The response as it is now."""
        asked = self._asked
        cut = {"reason": "max_output_tokens"} if self._status == "incomplete" else None
        plain = (
            asked.text.format.model_dump(by_alias=True, exclude_none=True) if asked.text and asked.text.format else {}
        )
        return {
            "id": self.id,
            "object": "response",
            "created_at": self._created,
            "status": self._status,
            "error": self._error,
            "incomplete_details": cut,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "model": self._choice.head.get("model", asked.model),
            "output": self._items,
            "parallel_tool_calls": asked.parallel_tool_calls is not False,
            "previous_response_id": asked.previous_response_id,
            "reasoning": {"effort": asked.reasoning.effort if asked.reasoning else None, "summary": None},
            "store": asked.store is not False,
            "temperature": asked.temperature,
            "text": {"format": plain or {"type": "text"}},
            "tool_choice": asked.tool_choice.model_dump()
            if isinstance(asked.tool_choice, _NamedTool)
            else asked.tool_choice or "auto",
            "tools": [tool.model_dump() | {"strict": False} for tool in asked.tools or []],
            "top_p": asked.top_p,
            "truncation": "disabled",
            "usage": self._usage(),
            "metadata": asked.metadata or {},
        }

    def _usage(self) -> dict[str, Any] | None:
        if self._choice.usage is None:
            return None
        used = total_usage([self._choice])
        return {
            "input_tokens": used["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": self._choice.usage.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": used["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": used["total_tokens"],
        }

    def _take(self, chunk: dict[str, Any]) -> Iterator[bytes]:
        """The events of the next chunk."""
        self._choice.add(chunk)
        for choice in chunk["choices"]:
            delta = choice.get("delta") or {}
            if delta.get("reasoning_content"):
                yield from self._reason(delta["reasoning_content"])
            if delta.get("content"):
                yield from self._say(delta["content"], (choice.get("logprobs") or {}).get("content") or [])
            for call in delta.get("tool_calls") or []:
                yield from self._call(call)

    def _reason(self, text: str) -> Iterator[bytes]:
        if not self._open("reasoning"):
            item: dict[str, Any] = {
                "id": _new("rs"),
                "type": "reasoning",
                "summary": [],
                "content": [],
                "status": "in_progress",
            }
            yield from self._begin(item)
            item["content"] = [{"type": "reasoning_text", "text": ""}]
            yield self._in("response.content_part.added", content_index=0, part=item["content"][0])
        self._items[-1]["content"][0]["text"] += text
        yield self._in("response.reasoning_text.delta", content_index=0, delta=text)

    def _say(self, text: str, logprobs: list[dict[str, Any]]) -> Iterator[bytes]:
        if not self._open("message"):
            item: dict[str, Any] = {"id": _new("msg"), "type": "message", "role": "assistant", "content": []}
            item["status"] = "in_progress"
            yield from self._begin(item)
            item["content"] = [{"type": "output_text", "text": "", "annotations": [], "logprobs": []}]
            yield self._in("response.content_part.added", content_index=0, part=item["content"][0])
        part = self._items[-1]["content"][0]
        part["text"] += text
        part["logprobs"] += logprobs
        yield self._in("response.output_text.delta", content_index=0, delta=text, logprobs=logprobs)

    def _call(self, call: dict[str, Any]) -> Iterator[bytes]:
        function = call.get("function") or {}
        if not self._open("function_call") or (call.get("id") and call["id"] != self._items[-1]["call_id"]):
            item = {"id": _new("fc"), "type": "function_call", "call_id": call.get("id") or _new("call")}
            yield from self._begin(item | {"name": "", "arguments": "", "status": "in_progress"}, function.get("name"))
        item = self._items[-1]
        if arguments := function.get("arguments"):
            item["arguments"] += arguments
            yield self._in("response.function_call_arguments.delta", delta=arguments)

    def _open(self, kind: str) -> bool:
        return bool(self._items) and self._items[-1]["type"] == kind and self._items[-1]["status"] == "in_progress"

    def _begin(self, item: dict[str, Any], name: str | None = None) -> Iterator[bytes]:
        yield from self._close()
        if name is not None:
            item["name"] = name
        self._items.append(item)
        yield self._of("response.output_item.added", output_index=len(self._items) - 1, item=item)

    def _close(self) -> Iterator[bytes]:
        """End the item that is being said."""
        if not self._items or self._items[-1]["status"] != "in_progress":
            return
        item = self._items[-1]
        item["status"] = self._status if self._status == "incomplete" else "completed"
        if item["type"] == "function_call":
            yield self._in("response.function_call_arguments.done", arguments=item["arguments"], name=item["name"])
        else:
            part = item["content"][0]
            if item["type"] == "reasoning":
                yield self._in("response.reasoning_text.done", content_index=0, text=part["text"])
            else:
                part["annotations"] = [_cited(url) for url in self._choice.citations]
                text = {"text": part["text"], "logprobs": part["logprobs"]}
                yield self._in("response.output_text.done", content_index=0, **text)
            yield self._in("response.content_part.done", content_index=0, part=part)
        yield self._of("response.output_item.done", output_index=len(self._items) - 1, item=item)

    def _in(self, kind: str, **fields: Any) -> bytes:
        """An event of the last item."""
        return self._of(kind, item_id=self._items[-1]["id"], output_index=len(self._items) - 1, **fields)

    def _of(self, kind: str, **fields: Any) -> bytes:
        if not fields:
            fields = {"response": self.described()}
        content = json.dumps({"type": kind, "sequence_number": self._number, **fields}, separators=(",", ":"))
        self._number += 1
        return f"event: {kind}\ndata: {content}\n\n".encode()


def _cited(url: str) -> dict[str, Any]:
    """A source of the answer as a whole."""
    return {"type": "url_citation", "url": url, "title": url, "start_index": 0, "end_index": 0}


def _new(kind: str) -> str:
    return f"{kind}_{secrets.token_hex(24)}"
