"""What answers: the protocol that the API, the pages and the terminal speak with an engine.

An engine has one verb, `stream`: an OpenAI request in, OpenAI chunks out, as JSON texts and several at a time when
several are ready, so that the API can pass them on without looking inside. `chat` and `complete` are built on it for
callers who want text.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Literal

Endpoint = Literal["chat", "completions"]
Message = dict[str, Any]


@dataclass(frozen=True)
class ModelCard:
    """What an engine says of a model that it serves."""

    name: str
    context: int
    """Tokens that one chat may hold, prompt and answer together."""
    created: int
    source: str
    license: str
    tools: bool = False
    """Whether its own chat template describes tools."""
    images: bool = False
    """Whether its messages may hold images."""
    search: bool = False
    """Whether it knows xAI's `search_parameters`."""
    title: str = ""
    """What people are shown instead of the name; empty where that says enough."""


@dataclass(frozen=True)
class Usage:
    """Tokens of one request."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    """Of the prompt's, those that were still in the slot's cache."""


@dataclass(frozen=True)
class Delta:
    """The next piece of an answer. The last piece has a finish reason and the usage."""

    text: str = ""
    finish_reason: str | None = None
    usage: Usage | None = None
    tool_calls: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Activity:
    """How busy a model is."""

    running: int
    """Requests that have a slot."""
    waiting: int
    """Requests that wait for one."""


class Engine(ABC):
    """Something that serves models."""

    @abstractmethod
    def activity(self) -> dict[str, Activity]:
        """How busy each model is that was asked for since the start."""

    @abstractmethod
    async def models(self) -> list[ModelCard]:
        """What is served."""

    @abstractmethod
    async def card(self, model: str) -> ModelCard:
        """One of the models.

        Raises
        ------
        UnknownModelError
            If it isn't served.
        """

    @abstractmethod
    def stream(self, endpoint: Endpoint, model: str, body: dict[str, Any]) -> AsyncGenerator[list[str], None]:
        """Answer an OpenAI request with OpenAI chunks, each a JSON text; the last one carries ``usage``.

        Closing the iterator stops the answer.

        Raises
        ------
        RequestError
            If the model is unknown, the prompt too long, or a field not acceptable; before the first chunk.
        OperationError
            If the engine fails.
        """

    @abstractmethod
    async def embed(self, model: str, texts: list[str]) -> tuple[list[list[float]], int]:
        """One vector of unit length per text, and the number of tokens read."""

    def capacity(self, model: str) -> int | None:
        """Requests that a model is given at once; None if the engine lets all wait in a queue of its own."""
        return None

    async def start(self) -> None:  # noqa: B027 (an engine inside this process has nothing to do)
        """Begin whatever goes on beside the answers, such as checks; called before the first request."""

    async def load(self, model: str) -> None:  # noqa: B027 (an engine whose models are always ready has nothing to do)
        """Make a model ready, so that the first answer doesn't wait for it."""

    @abstractmethod
    async def close(self) -> None:
        """Stop all answers and free all models."""

    async def chat(self, model: str, messages: list[Message], **options: Any) -> AsyncGenerator[Delta, None]:
        """Answer a conversation; options are OpenAI's (temperature, top_p, max_tokens, stop, seed, ...)."""
        async with aclosing(self.stream("chat", model, {"messages": messages, **options})) as batches:
            async for delta in _deltas(batches):
                yield delta

    async def complete(self, model: str, prompt: str, **options: Any) -> AsyncGenerator[Delta, None]:
        """Continue a text; options as in `chat`."""
        async with aclosing(self.stream("completions", model, {"prompt": prompt, **options})) as batches:
            async for delta in _deltas(batches):
                yield delta


async def _deltas(batches: AsyncIterator[list[str]]) -> AsyncIterator[Delta]:
    """Texts of one batch joined into one piece; the end, with its usage, as the last piece."""
    finish: str | None = None
    usage: Usage | None = None
    async for batch in batches:
        text = ""
        calls: list[dict[str, Any]] = []
        for chunk in map(json.loads, batch):
            usage = usage_of(chunk) or usage
            for choice in chunk["choices"]:
                delta = choice.get("delta", choice)
                text += delta.get("content") or choice.get("text") or ""
                calls += delta.get("tool_calls") or []
                finish = choice.get("finish_reason") or finish
        if text or calls:
            yield Delta(text, tool_calls=tuple(calls))
    yield Delta(finish_reason=finish or "stop", usage=usage)


def usage_of(chunk: dict[str, Any]) -> Usage | None:
    """The tokens that a chunk reports, if it does."""
    given = chunk.get("usage")
    if not given:
        return None
    cached = (given.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
    return Usage(given["prompt_tokens"], given["completion_tokens"], cached)
