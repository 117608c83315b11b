"""Chats that xAI's clients want kept, or go on from one that was: they are responses of our API (``/v1/responses``)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from xai_sdk.proto import chat_pb2

from modelworks.serve.xai.chat import chat_body, refused

_NOT_TOGETHER = ("stop", "seed", "frequency_penalty", "presence_penalty")
_MOVED = {"max_tokens": "max_output_tokens"}
_KINDS = {"text": "input_text", "image_url": "input_image"}


def is_kept(asked: chat_pb2.GetCompletionsRequest) -> bool:
    """Whether a chat is to be kept, or goes on from one that was."""
    return asked.store_messages or bool(asked.previous_response_id)


def response_body(asked: chat_pb2.GetCompletionsRequest) -> dict[str, Any]:
    """The body of ``/v1/responses`` that a request comes to.

    Raises
    ------
    RequestError
        If it asks for what is not done here, or not with chats that are kept.
    """
    chat = chat_body(asked)
    name = next((name for name in _NOT_TOGETHER if name in chat), "n" if asked.n > 1 else None)
    if name is not None:
        raise refused(name, "not accepted together with store_messages or previous_response_id")
    same = ("model", "temperature", "top_p", "top_logprobs", "parallel_tool_calls", "search_parameters", "max_tokens")
    body = {_MOVED.get(field, field): chat[field] for field in same if field in chat}
    body |= {"input": list(_items(chat["messages"])), "store": asked.store_messages}
    if asked.previous_response_id:
        body["previous_response_id"] = asked.previous_response_id
    if "logprobs" in chat:
        body["include"] = ["message.output_text.logprobs"]
    if "tools" in chat:
        body["tools"] = [{"type": tool["type"], **tool.get("function", {})} for tool in chat["tools"]]
    if "tool_choice" in chat:
        choice = chat["tool_choice"]
        body["tool_choice"] = {"type": "function", **choice["function"]} if isinstance(choice, dict) else choice
    if "response_format" in chat:
        given = chat["response_format"]
        body["text"] = {"format": {"type": given["type"], **given.get("json_schema", {})}}
    if "reasoning_effort" in chat:
        body["reasoning"] = {"effort": chat["reasoning_effort"]}
    return body


def _items(messages: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for message in messages:
        parts = [_part(part) for part in message["content"] or []]
        if message["role"] == "tool":
            yield {"type": "function_call_output", "call_id": message.get("tool_call_id", ""), "output": parts}
            continue
        calls = message.get("tool_calls", [])
        if parts or not calls:
            yield {"role": message["role"], "content": parts or None}
        for call in calls:
            yield {"type": "function_call", "call_id": call["id"], **call["function"]}


def _part(part: dict[str, Any]) -> dict[str, Any]:
    plain: dict[str, Any] = {"type": _KINDS.get(part["type"], part["type"])}
    if part["type"] == "image_url":
        return plain | {"image_url": part["image_url"]["url"]}
    return plain | {"text": part.get("text")}


def as_chat(response: dict[str, Any]) -> dict[str, Any]:
    """A response as a chat's answer."""
    text, reasoning = "", ""
    calls: list[dict[str, Any]] = []
    logprobs: list[dict[str, Any]] = []
    for item in response["output"]:
        if item["type"] == "function_call":
            function = {"name": item["name"], "arguments": item["arguments"]}
            calls.append({"id": item["call_id"], "function": function})
        for part in item.get("content", []) if item["type"] != "function_call" else []:
            if item["type"] == "reasoning":
                reasoning += part["text"]
            else:
                text += part["text"]
                logprobs += part.get("logprobs") or []
    message = {"content": text, "reasoning_content": reasoning, "tool_calls": calls}
    choice = {"index": 0, "message": message, "finish_reason": _finish(response)}
    return _head(response) | {
        "choices": [choice | {"logprobs": {"content": logprobs}}],
        "usage": _usage(response),
        "citations": _citations(response),
    }


class ChatChunks:
    """The events of a response as the chunks of a chat."""

    def __init__(self) -> None:
        self._head: dict[str, Any] = {}
        self._calls = 0

    def chunk(self, event: dict[str, Any]) -> dict[str, Any] | None:
        """What an event comes to, if anything."""
        response = event.get("response")
        if response is not None:
            self._head = _head(response)
        match event["type"]:
            case "response.output_text.delta":
                logprobs = {"content": event.get("logprobs") or []}
                return self._of({"content": event["delta"]}, logprobs=logprobs)
            case "response.reasoning_text.delta":
                return self._of({"reasoning_content": event["delta"]})
            case "response.output_item.done" if event["item"]["type"] == "function_call":
                item, index = event["item"], self._calls
                self._calls += 1
                function = {"name": item["name"], "arguments": item["arguments"]}
                return self._of({"tool_calls": [{"index": index, "id": item["call_id"], "function": function}]})
            case "response.completed" | "response.incomplete":
                end = self._of({}, finish_reason=_finish(event["response"]))
                return end | {"usage": _usage(event["response"]), "citations": _citations(event["response"])}
        return None

    def _of(self, delta: dict[str, Any], **more: Any) -> dict[str, Any]:
        return self._head | {"choices": [{"index": 0, "delta": delta, **more}]}


def _head(response: dict[str, Any]) -> dict[str, Any]:
    return {"id": response["id"], "model": response["model"], "created": response["created_at"]}


def _finish(response: dict[str, Any]) -> str:
    if response["status"] == "incomplete":
        return "length"
    return "tool_calls" if any(item["type"] == "function_call" for item in response["output"]) else "stop"


def _usage(response: dict[str, Any]) -> dict[str, Any]:
    used = response["usage"] or {"input_tokens": 0, "output_tokens": 0}
    cached = (used.get("input_tokens_details") or {}).get("cached_tokens", 0)
    return {
        "prompt_tokens": used["input_tokens"],
        "completion_tokens": used["output_tokens"],
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def _citations(response: dict[str, Any]) -> list[str]:
    messages = [item for item in response["output"] if item["type"] == "message"]
    noted = [note for item in messages for part in item["content"] for note in part.get("annotations") or []]
    return list(dict.fromkeys(note["url"] for note in noted if note["type"] == "url_citation"))
