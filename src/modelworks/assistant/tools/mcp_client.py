"""A server of the Model Context Protocol, by its SDK: its tools are listed and called.

One task holds the connection, as the SDK's scopes demand, and does one request after the other. When the server dies
or doesn't answer, the connection is closed, and the next request opens another. The server's own words, also those
that describe its tools, are a stranger's: they are cut, hold none of the marks that end a turn, and say whose they are.
"""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from modelworks.assistant.documents.prompt import harmless
from modelworks.assistant.tools.tool import Place, Tool
from modelworks.serve.config import McpConfig
from modelworks.spec.errors import InputError, OperationError

_LIST_EVERY_S = 60.0
_PATIENCE_S = 10.0
"""How long an answer is held up by a list of tools."""
_CONNECT_S, _SILENT_S = 30.0, 300.0
"""How long a connection, and the next word of a server by HTTP, may take; as the SDK has it."""
_MOST_TOOLS = 64
_LONGEST_DESCRIPTION = 1000
_LONGEST_SCHEMA = 20_000
_LONGEST_RESULT = 1 << 20
"""Characters that are taken of a result; what is told of it is far less."""


@dataclass
class _Request:
    work: Callable[[Any], Awaitable[Any]]
    taken: asyncio.Future[asyncio.Task[Any]]
    """By which connection."""
    done: asyncio.Future[Any]
    """Cancelled, the work is given up."""
    begun: bool = False


class McpServer:
    """One server that the operator has named."""

    def __init__(self, name: str, config: McpConfig) -> None:
        self.name, self._config = name, config
        self.error: str | None = None
        """Why it can't be used now, in one sentence."""
        self._tools: list[Tool] = []
        self._asked = self._listed = 0.0
        self._listing: asyncio.Task[None] | None = None
        self._requests: asyncio.Queue[_Request] = asyncio.Queue()
        self._task: asyncio.Task[None] | None = None

    async def tools(self) -> list[Tool]:
        """Its tools; those that it had last while it can't be reached, or is slow to answer."""
        if self._listing is None and (time.monotonic() - self._listed > _LIST_EVERY_S or not self._listed):
            self._asked = time.monotonic()
            self._listing = asyncio.create_task(self._list(), name=f"tools of the MCP server {self.name}")
        if self._listing is not None:
            patience = max(self._asked + _PATIENCE_S - time.monotonic(), 0)
            await asyncio.wait([self._listing], timeout=patience)
        return self._tools

    async def _list(self) -> None:
        try:
            found = await self._ask(lambda client: client.list_tools())
            self._tools, self.error = self._apart([self._tool(one) for one in found.tools[:_MOST_TOOLS]])
        except OperationError as error:
            self.error = str(error)
        finally:
            self._listed, self._listing = time.monotonic(), None

    async def close(self) -> None:
        """End the connection, and the process if it is one."""
        if self._listing is not None:
            self._listing.cancel()
        while not self._requests.empty():
            request = self._requests.get_nowait()
            if not request.taken.done():
                request.taken.set_exception(OperationError(f"the MCP server {self.name} is being ended"))
        await self._end(self._task)

    async def _end(self, task: asyncio.Task[None] | None) -> None:
        if task is not None:
            task.cancel()
            await asyncio.wait([task])

    def _apart(self, tools: list[Tool]) -> tuple[list[Tool], str | None]:
        """The tools whose names are theirs alone: consent to one is no consent to another."""
        times = Counter(tool.name for tool in tools)
        same = [name for name, count in times.items() if count > 1]
        error = f"the MCP server {self.name} has several tools that would be called {', '.join(same)}" if same else None
        return [tool for tool in tools if times[tool.name] == 1], error

    def _tool(self, given: Any) -> Tool:
        schema = given.input_schema if isinstance(given.input_schema, dict) else {}
        if len(repr(schema)) > _LONGEST_SCHEMA:
            raise OperationError(f"the MCP server {self.name} describes a tool at too great length")
        words = harmless((given.description or given.name)[:_LONGEST_DESCRIPTION], one_line=True)
        return Tool(
            re.sub(r"[^A-Za-z0-9_-]", "_", f"{self.name}__{given.name}")[:64],
            f"A tool of the server {self.name}, which describes it so: {words}",
            _harmless(schema) or {"type": "object"},
            partial(self._call, given.name),
            asks=True,
            stranger=True,
            checked=False,
        )

    async def _call(self, name: str, arguments: dict[str, Any], place: Place) -> str:
        result = await self._ask(lambda client: client.call_tool(name, arguments))
        text = _words(result)
        if result.is_error:
            raise InputError(text[:2000] or f"{name} failed and gave no reason")
        return text

    async def _ask(self, work: Callable[[Any], Awaitable[Any]]) -> Any:
        """Have something done in its turn. `wait_s` counts from there on: others may be long before it."""
        loop = asyncio.get_running_loop()
        request = _Request(work, loop.create_future(), loop.create_future())
        self._requests.put_nowait(request)
        task = None
        try:
            while not request.taken.done():
                if self._task is None or self._task.done():
                    self._task = asyncio.create_task(self._serve(), name=f"MCP server {self.name}")
                waited: list[asyncio.Future[Any]] = [request.taken, self._task]
                await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            task = request.taken.result()
            waited = [request.done, task]
            await asyncio.wait(waited, timeout=self._config.wait_s, return_when=asyncio.FIRST_COMPLETED)
            if not request.done.done() and not task.done():
                await self._end(task)  # it may hang for good; another request begins anew
                raise OperationError(f"the MCP server {self.name} didn't answer within {self._config.wait_s:g} s")
            if not request.done.done():
                reason = _reason(None if task.cancelled() else task.exception())
                raise OperationError(f"the MCP server {self.name} can't be used: {reason}")
            return request.done.result()
        finally:
            if task is not None and not request.begun:
                task.cancel()  # nobody else would end a connection that is never made
            request.taken.cancel()
            request.done.cancel()

    async def _serve(self) -> None:
        from mcp import Client, MCPError

        request = await self._taken()
        async with Client(self._transport(), client_info=None, cache=None) as client:
            # Only the text of a result is taken; a pattern in a stranger's schema for the rest could hold everybody up.
            client.session.validate_tool_result = _not_held_against_its_schema  # type: ignore[method-assign]
            while True:
                try:
                    result = await _unless_given_up(request, client)
                except MCPError as error:
                    if "closed" in str(error).lower():
                        raise
                    if not request.done.done():
                        request.done.set_exception(OperationError(f"the MCP server {self.name} says: {error}"))
                else:
                    if not request.done.done():
                        request.done.set_result(result)
                request = await self._taken()

    async def _taken(self) -> _Request:
        """The next request that somebody still waits for."""
        while True:
            request = await self._requests.get()
            if not request.taken.done():
                task = asyncio.current_task()
                assert task is not None
                request.taken.set_result(task)
                return request

    def _transport(self) -> Any:
        from mcp.client.stdio import StdioServerParameters, stdio_client

        if self._config.url is not None:
            return _over_http(self._config.url, self._config.key)
        assert self._config.command is not None
        environment = {name: os.environ[name] for name in self._config.env if name in os.environ}
        return stdio_client(
            StdioServerParameters(command=self._config.command[0], args=self._config.command[1:], env=environment)
        )


@asynccontextmanager
async def _over_http(url: str, key: str | None) -> AsyncGenerator[Any, None]:
    """The streams to a server; the key goes to its own origin alone, as the SDK follows redirects no further."""
    import httpx2
    from mcp.client.streamable_http import streamable_http_client

    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    timeout = httpx2.Timeout(_CONNECT_S, read=_SILENT_S)
    async with (
        httpx2.AsyncClient(headers=headers, timeout=timeout) as client,
        streamable_http_client(url, http_client=client) as streams,
    ):
        yield streams


async def _not_held_against_its_schema(name: str, result: Any) -> None:
    """In place of the SDK's own check."""


def _harmless(value: Any) -> Any:
    """A schema whose every word is without the marks that end a turn, also those that it names things by."""
    if isinstance(value, dict):
        return {harmless(str(name)): _harmless(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_harmless(one) for one in value]
    return harmless(value) if isinstance(value, str) else value


async def _unless_given_up(request: _Request, client: Any) -> Any:
    """What the work gives; it is ended, and the server is told so, when nobody waits for it any more."""
    request.begun = True
    work = asyncio.ensure_future(request.work(client))
    try:
        await asyncio.wait([work, request.done], return_when=asyncio.FIRST_COMPLETED)
        return work.result() if work.done() else None
    finally:
        if not work.done():
            work.cancel()
            await asyncio.wait([work])


def _words(result: Any) -> str:
    """What of a result is text; of what isn't, that it was there."""
    parts: list[str] = []
    for one in result.content:
        text = getattr(one, "text", None)
        parts.append(text if isinstance(text, str) else f"[{one.type}, which can't be shown]")
    return "\n".join(parts)[:_LONGEST_RESULT] or "It gave nothing."


def _reason(error: BaseException | None) -> str:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if error is None:
        return "it broke off"
    return " ".join(str(error).split())[:300] or type(error).__name__
