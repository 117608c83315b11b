"""One answer on its way to the client: whole, or as server-sent events.

The common case, a chat with one choice, is sent as the engine's chunks are, several in one write when several are
ready. Everything else (several choices, text completions with log-probabilities) goes through JSON.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from starlette.types import Send

from modelworks.serve.access import Outcome
from modelworks.serve.choices import Batches, Choice, legacy_logprobs, merged, total_usage, whole_answer
from modelworks.serve.engine import Endpoint, Engine
from modelworks.serve.metrics import Metrics
from modelworks.serve.requests import ChatRequest, CompletionRequest

_DONE = b"data: [DONE]\n\n"
STREAM_HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
_NO_CHOICES = ('"choices":[]', '"choices": []')


@dataclass
class Answer:
    """The answer of one request."""

    endpoint: Endpoint
    streams: list[Batches]
    choices: list[Choice]
    streaming: bool
    usage_wanted: bool

    @classmethod
    def of(
        cls,
        asked: ChatRequest | CompletionRequest,
        engine: Engine,
        metrics: Metrics,
        longest: int | None = None,
        outcomes: list[Outcome] | None = None,
    ) -> Answer:
        """The answer to a request; nothing runs before it is sent.

        Parameters
        ----------
        asked : ChatRequest or CompletionRequest
            The request.
        engine : Engine
            Who answers.
        metrics : Metrics
            Who measures.
        longest : int, optional
            Tokens of each choice, at most, whatever the request says.
        outcomes : list of Outcome, optional
            Where what each choice has used is added.
        """
        endpoint: Endpoint = "chat" if isinstance(asked, ChatRequest) else "completions"
        bodies: list[dict[str, Any]] = [asked.body()]
        if isinstance(asked, CompletionRequest):
            bodies = [bodies[0] | {"prompt": prompt} for prompt in asked.prompts()]
        bodies = [capped(body, longest) for body in bodies]
        count = asked.n or 1
        bodies = [_nth(body, choice) for body in bodies for choice in range(count)]
        model = asked.model
        streams = [metrics.measured(model, engine.stream(endpoint, model, body), outcomes) for body in bodies]
        echo = isinstance(asked, CompletionRequest) and asked.echo
        choices = [Choice(index, body["prompt"] if echo else "") for index, body in enumerate(bodies)]
        return cls(endpoint, streams, choices, bool(asked.stream), asked.usage_wanted)

    async def send(self, send: Send) -> None:
        """Run the answer and send it. Headers go out with the first chunk, so a refusal before it has a status."""
        if not self.streaming:
            await self._send_whole(send)
            return
        events = self._passed_on() if self.endpoint == "chat" and len(self.streams) == 1 else self._rewritten()
        started = False
        async with aclosing(events):
            async for event in events:
                if not started:
                    await send({"type": "http.response.start", "status": 200, "headers": STREAM_HEADERS})
                    started = True
                await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": _DONE, "more_body": False})

    async def _send_whole(self, send: Send) -> None:
        async with aclosing(merged(self.streams)) as batches:
            async for index, batch in batches:
                for chunk in batch:
                    self.choices[index].add(json.loads(chunk))
        content = json.dumps(whole_answer(self.endpoint, self.choices), separators=(",", ":")).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": content, "more_body": False})

    async def _passed_on(self) -> AsyncGenerator[bytes, None]:
        async with aclosing(self.streams[0]) as batches:
            async for batch in batches:
                if not self.usage_wanted and _is_usage(batch[-1]):
                    batch = batch[:-1]
                if batch:
                    yield ("data: " + "\n\ndata: ".join(batch) + "\n\n").encode()

    async def _rewritten(self) -> AsyncGenerator[bytes, None]:
        """Chunks of all choices under one id, each choice with its own index; the usage of all at the end."""
        head: dict[str, Any] = {}
        async with aclosing(merged(self.streams)) as batches:
            async for index, batch in batches:
                events = []
                for chunk in map(json.loads, batch):
                    head = head or {key: chunk[key] for key in ("id", "object", "created", "model")}
                    events += self._events(index, chunk, head)
                if events:
                    yield b"".join(events)
        if self.usage_wanted:
            yield _event(head | {"choices": [], "usage": total_usage(self.choices)})

    def _events(self, index: int, chunk: dict[str, Any], head: dict[str, Any]) -> list[bytes]:
        choice = self.choices[index]
        written = len(choice.text)
        first = not choice.head
        choice.add(chunk)
        events = []
        for part in chunk["choices"]:
            part["index"] = index
            if self.endpoint == "completions":
                tokens = (part.get("logprobs") or {}).get("content")
                part["logprobs"] = legacy_logprobs(tokens, written) if tokens else None
                part["text"] = choice.text if first else part["text"]
            events.append(_event(head | {"choices": [part]}))
        return events


def _is_usage(chunk: str) -> bool:
    """Whether a chunk says nothing but the usage; a quote inside generated text is escaped and can't match."""
    return '"usage":' in chunk and any(mark in chunk for mark in _NO_CHOICES)


def capped(body: dict[str, Any], longest: int | None) -> dict[str, Any]:
    """An engine's request whose answer has so many tokens at most; as it is where there is no such limit."""
    return body if longest is None else body | {"max_tokens": min(body.get("max_tokens") or longest, longest)}


def _nth(body: dict[str, Any], choice: int) -> dict[str, Any]:
    """The request of one choice out of several: with a seed, each has its own."""
    return body | {"seed": body["seed"] + choice} if "seed" in body else body


def _event(content: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(content, separators=(",", ":")).encode() + b"\n\n"
