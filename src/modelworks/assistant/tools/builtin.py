"""The tools that come with the program, beside the calculator: the time, documents, and Python in the sandbox."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from functools import partial
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from modelworks.assistant.tools.tool import Place, Tool
from modelworks.sandbox import Limits, run
from modelworks.spec.errors import InputError

_MOST_PASSAGES = 6
_LIMITS = Limits(wall_s=30, cpu_s=20)
_PROGRAMS = ThreadPoolExecutor(2, thread_name_prefix="sandbox")
"""Programs at a time; the others wait for their turn, and hold up nothing else."""
_ENDS = {
    "time": "it was ended because it took too long",
    "memory": "it was ended because it took too much memory",
    "output": "it was ended because it printed too much",
    "killed": "it was ended",
}


async def _now(arguments: dict[str, Any], place: Place) -> str:
    name = arguments.get("zone")
    try:
        now = datetime.now(ZoneInfo(name)) if name else datetime.now().astimezone()
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise InputError(f"zone: {name!r} is no time zone; a name such as Europe/Warsaw is accepted") from None
    return now.strftime("%A, %Y-%m-%d %H:%M:%S %Z (UTC%z), week %V")


NOW = Tool(
    "now",
    "Tells the date, the time and the day of the week, here or in a time zone.",
    {
        "type": "object",
        "properties": {"zone": {"type": "string", "description": "such as Europe/Warsaw; left out, the server's"}},
        "additionalProperties": False,
    },
    _now,
)


async def _search(arguments: dict[str, Any], place: Place) -> str:
    if place.library is None:
        return "There are no documents in this conversation."
    documents = await asyncio.to_thread(place.library.store.documents, place.conversation_id)
    ready = [one.id for one in documents if one.state == "ready"]
    if not ready:
        return "There are no documents in this conversation."
    found = await place.library.retrieval.best(ready, arguments["query"], _MOST_PASSAGES)
    if not found:
        return "Nothing was found in the documents; other words may find it."
    return "\n\n".join(f"{passage.where}\n{passage.text.strip()}" for passage in found)


SEARCH_DOCUMENTS = Tool(
    "search_documents",
    "Looks in the documents of this conversation for the passages that fit a question or some words best.",
    {
        "type": "object",
        "properties": {"query": {"type": "string", "minLength": 1}},
        "required": ["query"],
        "additionalProperties": False,
    },
    _search,
    stranger=True,
)


async def _python(arguments: dict[str, Any], place: Place) -> str:
    stop = threading.Event()
    try:
        running = partial(run, arguments["code"], _LIMITS, stop=stop)
        result = await asyncio.get_running_loop().run_in_executor(_PROGRAMS, running)
    finally:
        stop.set()
    parts = [result.stdout.rstrip()] if result.stdout.strip() else []
    if result.stderr.strip():
        parts.append(f"stderr:\n{result.stderr.rstrip()}")
    if result.ended != "finished":
        parts.append(_ENDS[result.ended])
    elif result.exit_code:
        parts.append(f"exit code {result.exit_code}")
    return "\n".join(parts) or "It printed nothing."


PYTHON = Tool(
    "python",
    "Runs a Python program with the standard library, and gives what it prints. It has no network, no files but those "
    "that it makes, and keeps nothing between calls.",
    {
        "type": "object",
        "properties": {"code": {"type": "string", "description": "a whole program that prints its result"}},
        "required": ["code"],
        "additionalProperties": False,
    },
    _python,
    asks=True,
    stranger=True,
)
