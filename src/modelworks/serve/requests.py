"""The API's requests, as OpenAI defines them, checked before any engine sees them.

Fields that OpenAI knows and we don't are ignored, as clients send many; fields that we know are held to their type and
range. `body()` turns a request into the plain fields that an engine takes.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError
from starlette.requests import Request

from modelworks.serve.errors import RequestError

_DEEPEST_SCHEMA = 32
_LONGEST_SCHEMA = 2_000
_MOST_CHOICES = 16
_MOST_STOPS = 16
_DEFAULT_COMPLETION_TOKENS = 16
_IMAGE_BYTES = 4096
_DISCARDED = 8
"""How many times the limit is read and thrown away, so that a client that is still sending gets its answer."""

Penalty = Annotated[float, Field(ge=-2, le=2)]
Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
Kind = TypeVar("Kind", bound="Fields")


def refuse(message: str) -> PydanticCustomError:
    """What a validator raises."""
    return PydanticCustomError("refused", "{message}", {"message": message})


class Fields(BaseModel):
    """A request's fields, or a part of them."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, hide_input_in_errors=True)


class _Function(Fields):
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None

    @field_validator("parameters")
    @classmethod
    def _bounded(cls, schema: dict[str, Any] | None) -> dict[str, Any] | None:
        return _checked_schema(schema)


class _Tool(Fields):
    type: Literal["function"]
    function: _Function


class _NamedFunction(Fields):
    name: str


class _NamedTool(Fields):
    type: Literal["function"] = "function"
    function: _NamedFunction


class _Called(Fields):
    name: str
    arguments: str = "{}"


class _ToolCall(Fields):
    id: str = ""
    type: Literal["function"] = "function"
    function: _Called


class _Message(Fields):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[dict[str, Any]] | None = None
    tool_calls: list[_ToolCall] | None = None
    tool_call_id: str | None = None

    @field_validator("content", mode="before")
    @classmethod
    def _joined(cls, content: Any) -> Any:
        """Content in parts becomes one text, unless there is an image among them. Images are never fetched."""
        if not isinstance(content, list):
            return content
        parts = [_part(part) for part in content]
        if any(part["type"] == "image_url" for part in parts):
            return parts
        return "".join(part["text"] for part in parts)

    @property
    def holds_image(self) -> bool:
        return isinstance(self.content, list)

    @model_validator(mode="after")
    def _says_something(self) -> _Message:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise refuse(f"content is missing: a message of role {self.role} needs text")
        return self

    def plain(self) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role}
        message["content"] = self.content or ""
        if self.tool_calls:
            message["tool_calls"] = [call.model_dump() for call in self.tool_calls]
        if self.tool_call_id:
            message["tool_call_id"] = self.tool_call_id
        return message


def _part(part: Any) -> dict[str, Any]:
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        raise refuse("each part of content must be an object with a type, such as {type: text, text: ...}")
    if part["type"] == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if part["type"] == "image_url":
        url = part.get("image_url")
        url = url.get("url") if isinstance(url, dict) else url
        if not isinstance(url, str) or not url.startswith("data:image/"):
            raise refuse("image URLs are not fetched: send the image itself as a data: URL")
        return {"type": "image_url", "image_url": {"url": url}}
    raise refuse(f"a part of type {part['type'][:40]!r} is not accepted: text and image_url are")


class _Schema(Fields):
    name: Name = "answer"
    schema_: dict[str, Any] = Field(alias="schema", default_factory=dict)

    @field_validator("schema_")
    @classmethod
    def _bounded(cls, schema: dict[str, Any]) -> dict[str, Any]:
        return _checked_schema(schema) or {}


class _Format(Fields):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: _Schema | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> _Format:
        if self.type == "json_schema" and self.json_schema is None:
            raise refuse("json_schema is missing: the type json_schema needs one")
        return self

    def plain(self) -> dict[str, Any] | None:
        if self.type == "json_schema" and self.json_schema:
            return {"type": "json_schema", "json_schema": {"name": "answer", "schema": self.json_schema.schema_}}
        return {"type": "json_object"} if self.type == "json_object" else None


class _StreamOptions(Fields):
    include_usage: bool | None = None


class Generation(Fields):
    """What chat and text completions have in common."""

    model: Annotated[str, Field(min_length=1, max_length=256)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=1 << 30)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repeat_penalty: Annotated[float, Field(gt=0, le=2)] | None = None
    stop: list[Annotated[str, Field(min_length=1, max_length=1024)]] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    n: Annotated[int, Field(ge=1, le=_MOST_CHOICES)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    cache_prompt: bool | None = None

    @field_validator("max_tokens")
    @classmethod
    def _fits(cls, tokens: int | None) -> int | None:
        return min(tokens, (1 << 31) - 1) if tokens is not None else None

    @field_validator("stop", mode="before")
    @classmethod
    def _as_list(cls, stop: Any) -> Any:
        stops = [stop] if isinstance(stop, str) else stop
        if isinstance(stops, list) and len(stops) > _MOST_STOPS:
            raise refuse(f"{len(stops)} stop texts are not accepted: up to {_MOST_STOPS} are")
        return stops

    @field_validator("logit_bias")
    @classmethod
    def _token_ids(cls, bias: dict[str, float] | None) -> dict[str, float] | None:
        if bias and not all(key.isascii() and key.isdigit() and len(key) < 9 for key in bias):
            raise refuse("each key must be a token's number")
        return bias

    @property
    def longest_answer(self) -> int | None:
        """Tokens that an answer may have, if the request says so."""
        return self.max_tokens

    @property
    def usage_wanted(self) -> bool:
        """Whether a stream ends with the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampling(self) -> dict[str, Any]:
        """The fields that both kinds of request pass on."""
        passed = {"max_tokens", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty"}
        passed |= {"repeat_penalty", "stop", "seed", "logit_bias", "cache_prompt"}
        return self.model_dump(include=passed, exclude_none=True)


class ChatRequest(Generation):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[_Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: _Format | None = None
    tools: list[_Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | _NamedTool | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high"] | None = None
    search_parameters: dict[str, Any] | None = None
    """xAI's: whether and where an engine that can looks for what is new."""

    @field_validator("search_parameters")
    @classmethod
    def _known_mode(cls, search: dict[str, Any] | None) -> dict[str, Any] | None:
        if search is not None and search.get("mode", "auto") not in {"off", "auto", "on"}:
            raise refuse("mode must be off, auto or on")
        return _checked_schema(search)

    @model_validator(mode="after")
    def _fields_agree(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise refuse("top_logprobs needs logprobs to be true")
        names = [tool.function.name for tool in self.tools or []]
        if len(set(names)) < len(names):
            raise refuse("tools holds two functions of one name")
        if self.tool_choice not in (None, "none", "auto") and not names:
            raise refuse("tool_choice asks for a call and tools is empty")
        if isinstance(self.tool_choice, _NamedTool) and self.tool_choice.function.name not in names:
            raise refuse(f"tool_choice names {self.tool_choice.function.name[:64]!r}; tools has {', '.join(names)}")
        if names and self.response_format and self.response_format.type != "text":
            raise refuse("response_format and tools can't be used together")
        return self

    @property
    def longest_answer(self) -> int | None:
        """Tokens that the answer may have, if the request says so."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def holds_images(self) -> bool:
        """Whether a message holds an image."""
        return any(message.holds_image for message in self.messages)

    @property
    def searches(self) -> bool:
        """Whether the answer may look for what is new."""
        return self.search_parameters is not None and self.search_parameters.get("mode", "auto") != "off"

    @property
    def mode(self) -> str:
        """The way of answering: ``think`` for a reasoning effort over ``low``, else ``fast``."""
        return "think" if self.reasoning_effort in {"medium", "high"} else "fast"

    @property
    def prompt_bytes(self) -> int:
        """Bytes of all messages and tools; an image counts as what it is for a model, not by its file."""
        size = 0
        for message in self.messages:
            parts = message.content if isinstance(message.content, list) else [{"text": message.content or ""}]
            size += sum(_prompt_bytes(part["text"]) if "text" in part else _IMAGE_BYTES for part in parts)
            size += sum(len(call.function.arguments) for call in message.tool_calls or [])
        return size + sum(len(str(tool.function.parameters or "")) for tool in self.tools or [])

    @property
    def longest_prompt_bytes(self) -> int:
        """Bytes of its one prompt."""
        return self.prompt_bytes

    def body(self) -> dict[str, Any]:
        """The fields that an engine takes."""
        body = self.sampling() | {"messages": [message.plain() for message in self.messages]}
        if self.max_completion_tokens is not None:
            body["max_tokens"] = min(self.max_completion_tokens, (1 << 31) - 1)
        if self.logprobs:
            body |= {"logprobs": True, "top_logprobs": self.top_logprobs or 0}
        if self.response_format and (plain := self.response_format.plain()):
            body["response_format"] = plain
        passed = {"parallel_tool_calls", "reasoning_effort", "search_parameters"}
        body |= self.model_dump(include=passed, exclude_none=True)
        if self.tools:
            choice = self.tool_choice
            body["tools"] = [tool.model_dump(exclude_none=True) for tool in self.tools]
            body["tool_choice"] = choice.model_dump() if isinstance(choice, _NamedTool) else choice or "auto"
        return body


class CompletionRequest(Generation):
    """``POST /v1/completions``."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = None
    best_of: int | None = None
    suffix: str | None = None

    @field_validator("prompt", mode="before")
    @classmethod
    def _well_formed(cls, prompt: Any) -> Any:
        kinds = {type(part) for part in prompt} if isinstance(prompt, list) else set()
        if (isinstance(prompt, str) and prompt) or kinds == {int} or (kinds == {str} and all(prompt)):
            return prompt
        if kinds == {list} and all(part and all(type(token) is int for token in part) for part in prompt):
            return prompt
        raise refuse(
            "a text that is not empty, a list of texts, of token numbers or of lists of such numbers is accepted"
        )

    @model_validator(mode="after")
    def _can_be_done(self) -> CompletionRequest:
        if self.suffix:
            raise refuse("suffix is not supported: these models continue a text, they don't fill it in")
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise refuse("best_of must be left out or equal to n")
        if self.echo and not isinstance(self.prompts()[0], str):
            raise refuse("echo needs the prompt as text")
        if len(self.prompts()) * (self.n or 1) > _MOST_CHOICES * 8:
            raise refuse(f"prompts times n must not be over {_MOST_CHOICES * 8}")
        return self

    def prompts(self) -> list[str] | list[list[int]]:
        """Each prompt by itself."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt

    @property
    def longest_answer(self) -> int | None:
        """Tokens that each answer may have."""
        return self.max_tokens if self.max_tokens is not None else _DEFAULT_COMPLETION_TOKENS

    @property
    def prompt_bytes(self) -> int:
        """Bytes of all prompts; one that is given as tokens counts four bytes for each."""
        return sum(map(_prompt_bytes, self.prompts()))

    @property
    def longest_prompt_bytes(self) -> int:
        """Bytes of the longest prompt."""
        return max(map(_prompt_bytes, self.prompts()))

    def body(self) -> dict[str, Any]:
        """The fields that an engine takes, without the prompt."""
        body = self.sampling()
        body.setdefault("max_tokens", _DEFAULT_COMPLETION_TOKENS)
        if self.logprobs is not None:
            body["logprobs"] = max(self.logprobs, 1)
        return body


class EmbeddingRequest(Fields):
    """``POST /v1/embeddings``."""

    model: Annotated[str, Field(min_length=1, max_length=256)]
    input: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=2048)]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None

    @field_validator("input", mode="before")
    @classmethod
    def _as_list(cls, given: Any) -> Any:
        return [given] if isinstance(given, str) else given

    @field_validator("dimensions")
    @classmethod
    def _not_shortened(cls, dimensions: int | None) -> int | None:
        if dimensions is not None:
            raise refuse("these embeddings can't be shortened: leave dimensions out")
        return dimensions

    @property
    def prompt_bytes(self) -> int:
        """Bytes of all texts."""
        return sum(map(_prompt_bytes, self.input))

    @property
    def longest_prompt_bytes(self) -> int:
        """Bytes of the longest text."""
        return max(map(_prompt_bytes, self.input))


def _prompt_bytes(prompt: str | list[int]) -> int:
    return len(prompt.encode(errors="surrogatepass")) if isinstance(prompt, str) else 4 * len(prompt)


def parse(kind: type[Kind], content: bytes) -> Kind:
    """Read a request.

    Raises
    ------
    RequestError
        If it is not JSON, or a field is not accepted; it names the field.
    """
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        if first["type"] == "json_invalid":
            raise RequestError(f"the body is not JSON: {first['msg']}") from None
        param = ".".join(str(part) for part in first["loc"])
        where = f"{param}: " if param else ""
        raise RequestError(f"{where}{first['msg']}", code="invalid_value", param=param or None) from None


async def read_body(request: Request, limit: int) -> bytes:
    """The request's body; one that is over the limit is thrown away as it comes."""
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size <= limit:
            parts.append(part)
        elif size > limit * _DISCARDED:
            break
    if size > limit:
        raise RequestError(f"the body is over the limit of {limit:,} bytes", status=413, code="request_too_large")
    return b"".join(parts)


def _checked_schema(schema: dict[str, Any] | None) -> dict[str, Any] | None:
    """A JSON schema that llama.cpp can turn into a grammar in bounded time and memory."""
    level: list[Any] = [schema]
    count = 0
    for _ in range(_DEEPEST_SCHEMA):
        level = [inner for value in level for inner in _inside(value)]
        count += len(level)
        if not level:
            return schema
        if count > _LONGEST_SCHEMA:
            raise refuse(f"the schema has more than {_LONGEST_SCHEMA} parts")
    raise refuse(f"the schema is nested deeper than {_DEEPEST_SCHEMA}")


def _inside(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []
