"""Puts chunks together: several streams into one answer, and a stream into a whole.

A request for `n` choices, or with several prompts, runs as that many streams; their chunks get the choice's index and
one common id. A request that doesn't stream is the same stream, put together at its end, so that it too can be called
off at any moment.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from modelworks.serve.engine import Endpoint, Usage, usage_of

Batches = AsyncGenerator[list[str], None]


async def merged(streams: list[Batches]) -> AsyncGenerator[tuple[int, list[str]], None]:
    """Batches of all streams as they come, each with its stream's index. Closing it closes all."""
    if len(streams) == 1:
        async with aclosing(streams[0]) as only:
            async for batch in only:
                yield 0, batch
        return
    arrived: asyncio.Queue[tuple[int, list[str] | None]] = asyncio.Queue()

    async def forward(index: int, stream: Batches) -> None:
        try:
            async with aclosing(stream):
                async for batch in stream:
                    arrived.put_nowait((index, batch))
        finally:
            arrived.put_nowait((index, None))

    tasks = [asyncio.create_task(forward(index, stream)) for index, stream in enumerate(streams)]
    open_streams = len(tasks)
    try:
        while open_streams:
            index, news = await arrived.get()
            if news is not None:
                yield index, news
                continue
            open_streams -= 1
            await tasks[index]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Choice:
    """One choice of an answer, put together from its chunks."""

    def __init__(self, index: int, echo: str = "") -> None:
        self.index = index
        self.text = echo
        self.head: dict[str, Any] = {}
        self.usage: Usage | None = None
        self.finish = "stop"
        self.citations: list[str] = []
        """Addresses of what was found while it was written, where the engine searches."""
        self._echo = echo
        self._logprobs: list[dict[str, Any]] = []
        self._calls: dict[int, dict[str, Any]] = {}
        self._reasoning = ""

    def add(self, chunk: dict[str, Any]) -> None:
        """Take the next chunk."""
        self.head = self.head or {key: chunk[key] for key in ("id", "created", "model") if key in chunk}
        self.usage = usage_of(chunk) or self.usage
        self.citations = chunk.get("citations") or self.citations
        for choice in chunk["choices"]:
            delta = choice.get("delta", choice)
            self.text += delta.get("content") or choice.get("text") or ""
            self._reasoning += delta.get("reasoning_content") or ""
            self.finish = choice.get("finish_reason") or self.finish
            self._logprobs += (choice.get("logprobs") or {}).get("content") or []
            for call in delta.get("tool_calls") or []:
                self._add_call(call)

    def _add_call(self, part: dict[str, Any]) -> None:
        call = self._calls.setdefault(
            part["index"], {"id": "", "type": "function", "function": {"name": "", "arguments": ""}}
        )
        call["id"] = part.get("id") or call["id"]
        for key, text in (part.get("function") or {}).items():
            call["function"][key] += text or ""

    def whole(self, endpoint: Endpoint) -> dict[str, Any]:
        """The choice as an answer that doesn't stream has it."""
        if endpoint == "completions":
            logprobs = legacy_logprobs(self._logprobs, len(self._echo)) if self._logprobs else None
            return {"index": self.index, "text": self.text, "logprobs": logprobs, "finish_reason": self.finish}
        calls = [self._calls[index] for index in sorted(self._calls)]
        message: dict[str, Any] = {"role": "assistant", "content": self.text if self.text or not calls else None}
        if self._reasoning:
            message["reasoning_content"] = self._reasoning
        if calls:
            message["tool_calls"] = calls
        logprobs = {"content": self._logprobs} if self._logprobs else None
        return {"index": self.index, "message": message, "logprobs": logprobs, "finish_reason": self.finish}


def whole_answer(endpoint: Endpoint, choices: list[Choice]) -> dict[str, Any]:
    """The answer of a request that doesn't stream."""
    kind = "chat.completion" if endpoint == "chat" else "text_completion"
    cited = list(dict.fromkeys(url for choice in choices for url in choice.citations))
    answer = choices[0].head | {
        "object": kind,
        "choices": [choice.whole(endpoint) for choice in choices],
        "usage": total_usage(choices),
    }
    return answer | {"citations": cited} if cited else answer


def total_usage(choices: list[Choice]) -> dict[str, Any]:
    """The tokens of all choices; a prompt that several choices share counts once for each, as it was read for each."""
    read = sum(choice.usage.prompt_tokens for choice in choices if choice.usage)
    cached = sum(choice.usage.cached_tokens for choice in choices if choice.usage)
    written = sum(choice.usage.completion_tokens for choice in choices if choice.usage)
    return {
        "prompt_tokens": read,
        "completion_tokens": written,
        "total_tokens": read + written,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def legacy_logprobs(tokens: list[dict[str, Any]], offset: int = 0) -> dict[str, Any]:
    """Log-probabilities of a chat in the form that text completions have.

    Parameters
    ----------
    tokens : list
        Tokens, each with `token`, `logprob` and `top_logprobs`.
    offset : int
        Where in the text the first one begins, in characters.
    """
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token["token"])
    return {
        "tokens": [token["token"] for token in tokens],
        "token_logprobs": [token["logprob"] for token in tokens],
        "top_logprobs": [{top["token"]: top["logprob"] for top in token["top_logprobs"]} for token in tokens],
        "text_offset": offsets,
    }
