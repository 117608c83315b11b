"""Tools for models whose chat template knows none.

The tools are described in the system message, and the model answers a call as JSON inside ``<tool_call>`` tags, the
convention of Nous Research's Hermes models. When a call is required, the answer is bound by a JSON schema of the
calls that are allowed, so that even a small model's call can be parsed. Either way the caller sees OpenAI's
``tool_calls``.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"


@dataclass(frozen=True)
class ToolPrompt:
    """A request whose tools were put into words."""

    body: dict[str, Any]
    required: bool

    @classmethod
    def of(cls, body: dict[str, Any]) -> ToolPrompt | None:
        """The request without tool fields, or None if it needs no rewriting."""
        tools = body.get("tools") or []
        choice = body.get("tool_choice") or "auto"
        if not tools and not any(_has_calls(message) for message in body["messages"]):
            return None
        plain = {key: value for key, value in body.items() if key not in {"tools", "tool_choice"}}
        plain["messages"] = [_in_words(message) for message in body["messages"]]
        if not tools or choice == "none":
            return cls(plain, required=False)
        functions = [tool["function"] for tool in tools]
        if isinstance(choice, dict):
            functions = [one for one in functions if one["name"] == choice["function"]["name"]]
        required = choice != "auto"
        plain["messages"] = _with_system(plain["messages"], _description(functions, required))
        if required:
            plain["response_format"] = {"type": "json_schema", "json_schema": {"schema": _calls_schema(functions)}}
        return cls(plain, required)

    async def translate(self, batches: AsyncGenerator[list[str], None]) -> AsyncGenerator[list[str], None]:
        """The stream with calls taken out of the text. Text that may be a call is held back until it is known."""
        text = _HeldText(self.required)
        async with aclosing(batches):
            async for batch in batches:
                yield [
                    json.dumps(chunk, separators=(",", ":")) for one in batch for chunk in text.pass_on(json.loads(one))
                ]


class _HeldText:
    """Text that may turn out to be a call."""

    def __init__(self, required: bool) -> None:
        self._required = required
        self._text = ""
        self._holding = True

    def pass_on(self, chunk: dict[str, Any]) -> list[dict[str, Any]]:
        """What can be said of the answer now that this chunk is known."""
        choice = chunk["choices"][0] if chunk["choices"] else {}
        delta = choice.get("delta", {})
        if self._holding and delta.get("content"):
            self._text += delta["content"]
            self._holding = self._required or _may_be_call(self._text)
            delta["content"] = None if self._holding else self._text
        if not choice.get("finish_reason") or not self._holding or not self._text:
            return [chunk]
        calls = _parse(self._text, self._required)
        if calls:
            choice["finish_reason"] = "tool_calls"
        return [_copy_with(chunk, {"tool_calls": calls} if calls else {"content": self._text}), chunk]


def _has_calls(message: dict[str, Any]) -> bool:
    return bool(message.get("tool_calls")) or message.get("role") == "tool"


def _in_words(message: dict[str, Any]) -> dict[str, Any]:
    """A past call, or a tool's answer, as plain text."""
    if message.get("role") == "tool":
        return {"role": "user", "content": f"<tool_response>\n{message.get('content') or ''}\n</tool_response>"}
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        name, arguments = json.dumps(call["function"]["name"]), call["function"].get("arguments") or "{}"
        calls.append(f'{_OPEN}\n{{"name": {name}, "arguments": {arguments}}}\n{_CLOSE}')
    return {"role": "assistant", "content": "\n".join([message.get("content") or "", *calls]).strip()}


def _with_system(messages: list[dict[str, Any]], text: str) -> list[dict[str, Any]]:
    if messages[0].get("role") in {"system", "developer"} and isinstance(messages[0].get("content"), str):
        return [{"role": "system", "content": f"{messages[0]['content']}\n\n{text}"}, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]


def _description(functions: list[dict[str, Any]], required: bool) -> str:
    described = "\n".join(json.dumps({"type": "function", "function": one}) for one in functions)
    call = '{"name": <function name>, "arguments": <object of arguments>}'
    how = f"Answer with one call, as JSON: {call}" if required else f"To call one, answer {_OPEN}{call}{_CLOSE}"
    return f"You can call these functions:\n<tools>\n{described}\n</tools>\n{how}"


def _calls_schema(functions: list[dict[str, Any]]) -> dict[str, Any]:
    calls = []
    for function in functions:
        arguments = function.get("parameters") or {"type": "object"}
        calls.append(
            {
                "type": "object",
                "properties": {"name": {"const": function["name"]}, "arguments": arguments},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    return calls[0] if len(calls) == 1 else {"anyOf": calls}


def _may_be_call(text: str) -> bool:
    start = text.lstrip()
    return start.startswith(_OPEN) or _OPEN.startswith(start)


def _parse(text: str, required: bool) -> list[dict[str, Any]]:
    """The calls in a finished answer; none if it isn't one."""
    parts = [text] if required else [part.partition(_CLOSE)[0] for part in text.split(_OPEN)[1:]]
    calls = []
    for index, part in enumerate(parts):
        try:
            call = json.loads(part)
            function = {"name": call["name"], "arguments": json.dumps(call["arguments"])}
        except (ValueError, TypeError, KeyError):
            return []
        calls.append({"index": index, "id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function})
    return calls


def _copy_with(chunk: dict[str, Any], delta: dict[str, Any]) -> dict[str, Any]:
    choice = chunk["choices"][0] | {"delta": delta, "finish_reason": None}
    kept = {key: value for key, value in chunk.items() if key not in {"usage", "timings"}}
    return kept | {"choices": [choice]}
