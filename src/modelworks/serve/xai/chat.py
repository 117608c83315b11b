"""xAI's chat messages as OpenAI's requests, and OpenAI's answers as xAI's messages.

What xAI's protocol has and ours doesn't is handed on under its name where our API refuses it by itself, so that both
say the same; what our API would pass over is refused here, because a caller who asks for it counts on it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from google.protobuf.json_format import MessageToDict
from google.protobuf.timestamp_pb2 import Timestamp
from xai_sdk.proto import chat_pb2, sample_pb2, usage_pb2

from modelworks.serve.choices import Choice
from modelworks.serve.errors import RequestError

_ROLES = {
    chat_pb2.ROLE_USER: "user",
    chat_pb2.ROLE_ASSISTANT: "assistant",
    chat_pb2.ROLE_SYSTEM: "system",
    chat_pb2.ROLE_FUNCTION: "function",
    chat_pb2.ROLE_TOOL: "tool",
    chat_pb2.ROLE_DEVELOPER: "developer",
}
_EFFORTS = {
    chat_pb2.EFFORT_NONE: "none",
    chat_pb2.EFFORT_LOW: "low",
    chat_pb2.EFFORT_MEDIUM: "medium",
    chat_pb2.EFFORT_HIGH: "high",
    chat_pb2.EFFORT_XHIGH: "xhigh",
}
_FORMATS = {
    chat_pb2.FORMAT_TYPE_TEXT: "text",
    chat_pb2.FORMAT_TYPE_JSON_OBJECT: "json_object",
    chat_pb2.FORMAT_TYPE_JSON_SCHEMA: "json_schema",
}
_TOOL_MODES = {
    chat_pb2.TOOL_MODE_AUTO: "auto",
    chat_pb2.TOOL_MODE_NONE: "none",
    chat_pb2.TOOL_MODE_REQUIRED: "required",
}
_SEARCH_MODES = {
    chat_pb2.OFF_SEARCH_MODE: "off",
    chat_pb2.ON_SEARCH_MODE: "on",
    chat_pb2.AUTO_SEARCH_MODE: "auto",
}
_FINISHES = {
    "stop": sample_pb2.REASON_STOP,
    "length": sample_pb2.REASON_MAX_LEN,
    "tool_calls": sample_pb2.REASON_TOOL_CALLS,
}
_PLAIN = ("model", "n", "max_tokens", "seed", "top_logprobs", "parallel_tool_calls")
_FRACTIONS = ("temperature", "top_p", "frequency_penalty", "presence_penalty")
_NOT_DONE = ("use_encrypted_content", "agent_count", "guidelines", "include")


def chat_body(asked: chat_pb2.GetCompletionsRequest) -> dict[str, Any]:
    """The body of ``/v1/chat/completions`` that a request comes to.

    Raises
    ------
    RequestError
        If it asks for what nobody here does.
    """
    _check_done(asked)
    body: dict[str, Any] = {"messages": [_message(message) for message in asked.messages], **_settings(asked)}
    if asked.logprobs:
        body["logprobs"] = True
    if asked.stop:
        body["stop"] = list(asked.stop)
    if asked.tools:
        body["tools"] = [_tool(tool) for tool in asked.tools]
    if asked.HasField("tool_choice"):
        body["tool_choice"] = _tool_choice(asked.tool_choice)
    if asked.HasField("response_format"):
        body["response_format"] = _format(asked.response_format)
    if asked.HasField("reasoning_effort"):
        body["reasoning_effort"] = _named(_EFFORTS, asked.reasoning_effort)
    return body


def _check_done(asked: chat_pb2.GetCompletionsRequest) -> None:
    """Refuse what our API has no field for and a caller counts on."""
    if name := next((name for name in _NOT_DONE if getattr(asked, name)), None):
        raise refused(name, "this server doesn't do that: leave it out")
    if any(message.encrypted_content for message in asked.messages):
        raise refused("messages", "encrypted content is not read here: send the messages themselves")


def _settings(asked: chat_pb2.GetCompletionsRequest) -> dict[str, Any]:
    """Fields that have one name everywhere, as far as they are given, and where to search."""
    given = {field.name for field, _ in asked.ListFields()}
    body = {name: getattr(asked, name) for name in _PLAIN if name in given}
    body |= {name: _decimal(getattr(asked, name)) for name in _FRACTIONS if name in given}
    body["model"] = asked.model
    if "search_parameters" in given:
        body["search_parameters"] = _search(asked.search_parameters)
    return body


def _decimal(value: float) -> float:
    """The number that was meant: of 0.7, four bytes keep 0.699999988."""
    return float(f"{value:.7g}")


def _message(message: chat_pb2.Message) -> dict[str, Any]:
    plain: dict[str, Any] = {"role": _named(_ROLES, message.role)}
    plain["content"] = [_part(part) for part in message.content] or None
    if message.tool_calls:
        plain["tool_calls"] = [
            {"id": call.id, "function": {"name": call.function.name, "arguments": call.function.arguments}}
            for call in message.tool_calls
        ]
    if message.tool_call_id:
        plain["tool_call_id"] = message.tool_call_id
    return plain


def _part(part: chat_pb2.Content) -> dict[str, Any]:
    kind = part.WhichOneof("content")
    if kind == "image_url" and part.image_url.WhichOneof("source") != "file_id":
        return {"type": kind, "image_url": {"url": part.image_url.image_url}}
    if kind == "image_url":
        return {"type": "image_file"}
    return {"type": kind or "nothing", "text": part.text}


def _tool(tool: chat_pb2.Tool) -> dict[str, Any]:
    kind = tool.WhichOneof("tool") or "nothing"
    if kind != "function":
        return {"type": kind}
    return {"type": kind, "function": _function(tool.function)}


def _function(function: chat_pb2.Function) -> dict[str, Any]:
    """A function that may be called; what isn't JSON stays a text, and is refused as one."""
    plain = {"name": function.name, "description": function.description}
    return plain | ({"parameters": _json(function.parameters)} if function.parameters else {})


def _tool_choice(choice: chat_pb2.ToolChoice) -> Any:
    """Which function is to be called."""
    if choice.WhichOneof("tool_choice") == "function_name":
        return {"type": "function", "function": {"name": choice.function_name}}
    return _named(_TOOL_MODES, choice.mode)


def _format(given: chat_pb2.ResponseFormat) -> dict[str, Any]:
    kind = _named(_FORMATS, given.format_type)
    return {"type": kind} | ({"json_schema": {"schema": _json(given.schema)}} if kind == "json_schema" else {})


def _search(given: chat_pb2.SearchParameters) -> dict[str, Any]:
    plain: dict[str, Any] = {"return_citations": given.return_citations}
    if given.mode:
        plain["mode"] = _named(_SEARCH_MODES, given.mode)
    if given.HasField("max_search_results"):
        plain["max_search_results"] = given.max_search_results
    for name in ("from_date", "to_date"):
        if given.HasField(name):
            plain[name] = _day(name, getattr(given, name))
    if given.sources:
        plain["sources"] = [_source(source) for source in given.sources]
    return plain


def _day(name: str, when: Timestamp) -> str:
    try:
        return str(when.ToDatetime().date())
    except (ValueError, OverflowError):
        raise refused(f"search_parameters.{name}", "a time of the years 1 to 9999 is accepted") from None


def _source(source: chat_pb2.Source) -> dict[str, Any]:
    kind = source.WhichOneof("source") or "nothing"
    if kind == "nothing":
        return {"type": kind}
    fields = MessageToDict(
        getattr(source, kind), preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    return {"type": kind} | {name: value for name, value in fields.items() if value != []}


def _named(names: dict[Any, str], value: int) -> str:
    return names.get(value, str(value))


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def refused(field: str, why: str) -> RequestError:
    """What is said of a field that is not accepted."""
    return RequestError(f"{field}: {why}", code="invalid_value", param=field)


def completion(answer: dict[str, Any]) -> chat_pb2.GetChatCompletionResponse:
    """An answer that doesn't stream."""
    return chat_pb2.GetChatCompletionResponse(
        id=answer.get("id", ""),
        model=answer.get("model", ""),
        created=moment(answer.get("created", 0)),
        outputs=[_output(choice) for choice in answer["choices"]],
        usage=_usage(answer["usage"]),
        citations=answer.get("citations") or [],
    )


def _output(choice: dict[str, Any]) -> chat_pb2.CompletionOutput:
    message = choice["message"]
    return chat_pb2.CompletionOutput(
        index=choice["index"],
        finish_reason=_finish(choice["finish_reason"]),
        logprobs=_logprobs(choice.get("logprobs")),
        message=chat_pb2.CompletionMessage(
            role=chat_pb2.ROLE_ASSISTANT,
            content=message.get("content") or "",
            reasoning_content=message.get("reasoning_content") or "",
            tool_calls=[_call(call) for call in message.get("tool_calls") or []],
        ),
    )


class Chunks:
    """The chunks of a stream. Calls of functions come in pieces, and xAI's clients take each as a whole: they are held
    back until they are."""

    def __init__(self) -> None:
        self._calls: dict[int, Choice] = {}

    def chunk(self, given: dict[str, Any]) -> chat_pb2.GetChatCompletionChunk:
        """The next chunk."""
        return chat_pb2.GetChatCompletionChunk(
            id=given.get("id", ""),
            model=given.get("model", ""),
            created=moment(given.get("created", 0)),
            outputs=[self._output(choice) for choice in given["choices"]],
            usage=_usage(given["usage"]) if given.get("usage") else None,
            citations=given.get("citations") or [],
        )

    def _output(self, choice: dict[str, Any]) -> chat_pb2.CompletionOutputChunk:
        index, delta, finish = choice.get("index", 0), choice.get("delta") or {}, choice.get("finish_reason")
        if delta.get("tool_calls"):
            self._calls.setdefault(index, Choice(index)).add({"choices": [choice]})
        return chat_pb2.CompletionOutputChunk(
            index=index,
            finish_reason=_finish(finish) if finish else sample_pb2.REASON_INVALID,
            logprobs=_logprobs(choice.get("logprobs")),
            delta=chat_pb2.Delta(
                role=chat_pb2.ROLE_ASSISTANT,
                content=delta.get("content") or "",
                reasoning_content=delta.get("reasoning_content") or "",
                tool_calls=list(self._whole_calls(index)) if finish else [],
            ),
        )

    def _whole_calls(self, index: int) -> Iterator[chat_pb2.ToolCall]:
        if (held := self._calls.pop(index, None)) is not None:
            yield from map(_call, held.whole("chat")["message"]["tool_calls"])


def _call(call: dict[str, Any]) -> chat_pb2.ToolCall:
    function = call["function"]
    return chat_pb2.ToolCall(
        id=call["id"],
        type=chat_pb2.TOOL_CALL_TYPE_CLIENT_SIDE_TOOL,
        function=chat_pb2.FunctionCall(name=function["name"], arguments=function["arguments"]),
    )


def _finish(reason: str) -> Any:
    return _FINISHES.get(reason, sample_pb2.REASON_STOP)


def _logprobs(given: dict[str, Any] | None) -> chat_pb2.LogProbs | None:
    if not given or not given.get("content"):
        return None
    return chat_pb2.LogProbs(
        content=[
            chat_pb2.LogProb(
                **_token(one),
                top_logprobs=[chat_pb2.TopLogProb(**_token(top)) for top in one.get("top_logprobs") or []],
            )
            for one in given["content"]
        ]
    )


def _token(one: dict[str, Any]) -> dict[str, Any]:
    return {"token": one["token"], "logprob": one["logprob"], "bytes": bytes(one.get("bytes") or [])}


def _usage(used: dict[str, Any]) -> usage_pb2.SamplingUsage:
    """Tokens; those of images are among the prompt's, as no engine tells them apart."""
    cached = (used.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    return usage_pb2.SamplingUsage(
        prompt_tokens=used["prompt_tokens"],
        completion_tokens=used["completion_tokens"],
        total_tokens=used["prompt_tokens"] + used["completion_tokens"],
        prompt_text_tokens=used["prompt_tokens"],
        cached_prompt_text_tokens=cached,
    )


def moment(seconds: float) -> Timestamp:
    """Seconds since 1970 as a message."""
    return Timestamp(seconds=int(seconds))
