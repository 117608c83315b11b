"""The tools of this server: the program's own, those that the sandbox allows, and those of MCP servers."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from modelworks.assistant.tools.builtin import NOW, PYTHON, SEARCH_DOCUMENTS
from modelworks.assistant.tools.calculator import CALCULATOR
from modelworks.assistant.tools.mcp_client import McpServer
from modelworks.assistant.tools.tool import Tool
from modelworks.sandbox import unavailable
from modelworks.serve.config import ToolsConfig


class Toolbox:
    """What a conversation can be given.

    Parameters
    ----------
    config
        What the operator allows.
    """

    def __init__(self, config: ToolsConfig) -> None:
        self._config = config
        self._servers: Sequence[McpServer] = [McpServer(name, one) for name, one in config.mcp.items()]

    async def tools(self) -> list[Tool]:
        """All tools that can be called now. A server that can't be reached has those that it had last."""
        listed = await asyncio.gather(*(server.tools() for server in self._servers))
        own = [CALCULATOR, NOW, SEARCH_DOCUMENTS]
        if self._config.python and await asyncio.to_thread(unavailable) is None:
            own.append(PYTHON)
        return [*own, *(tool for tools in listed for tool in tools)]

    async def missing(self) -> list[str]:
        """What the operator wanted and can't be had, in one sentence each."""
        reasons = [server.error for server in self._servers]
        if self._config.python:
            reasons.append(await asyncio.to_thread(unavailable))
        return [reason for reason in reasons if reason]

    @property
    def reaches_out(self) -> bool:
        """Whether what is said to a tool can leave this machine."""
        return any(one.url is not None for one in self._config.mcp.values())

    async def close(self) -> None:
        """End the servers that were started."""
        for server in self._servers:
            await server.close()
