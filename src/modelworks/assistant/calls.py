"""A call of a tool as a plain value, as words for a reader, and as turns for a model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal, cast

from modelworks.assistant.tables import ToolCallRow

CallState = Literal["waiting", "allowed", "running", "done", "failed", "refused", "stopped"]
SETTLED: tuple[CallState, ...] = ("done", "failed", "refused", "stopped")
REFUSED = "The user has refused this call. Go on without it."
STOPPED = "The call was stopped before it had ended."
LEFT_OUT = "The result is left out: the conversation would be too long with it."


@dataclass
class Call:
    """One call: `position` is where in the answer's text it was asked for, in characters."""

    number: int
    position: int
    call_id: str
    name: str
    arguments: str
    state: CallState = "allowed"
    result: str = ""
    seconds: float | None = None


def call_of(row: ToolCallRow) -> Call:
    """A call, from its row."""
    state = cast("CallState", row.state)
    return Call(row.number, row.position, row.call_id, row.name, row.arguments, state, row.result, row.seconds)


def round_of(call: Call) -> str:
    """What the calls that were asked for together have in common, and no others of the answer."""
    return call.call_id.rpartition("_")[0]


def turns_of(text: str, calls: Sequence[Call], left_out: int = 0) -> list[dict[str, Any]]:
    """An answer with calls as OpenAI's API has it: words and calls, their results, and the words after them.

    The results of the first `left_out` calls are not told.
    """
    turns: list[dict[str, Any]] = []
    begin = 0
    for _, together in groupby(calls, round_of):
        asked = list(together)
        position = asked[0].position
        functions = [
            {"id": one.call_id, "type": "function", "function": {"name": one.name, "arguments": one.arguments}}
            for one in asked
        ]
        turns.append({"role": "assistant", "content": text[begin:position].strip(), "tool_calls": functions})
        turns += [
            {
                "role": "tool",
                "tool_call_id": one.call_id,
                "content": LEFT_OUT if one in calls[:left_out] else _told(one),
            }
            for one in asked
        ]
        begin = position
    if text[begin:].strip():
        turns.append({"role": "assistant", "content": text[begin:].lstrip() if calls else text[begin:]})
    return turns


def _told(call: Call) -> str:
    if call.state == "refused":
        return REFUSED
    return call.result if call.state in {"done", "failed"} else STOPPED


def named(call: Call) -> str:
    """That there was a call, in Markdown, for shared pages: what came of it can be of documents that aren't shared."""
    return f"**{call.name}** ({call.state})"


def written(call: Call) -> str:
    """A call in Markdown, for exports."""
    longest = max(map(len, re.findall("`+", call.arguments + call.result)), default=0)
    fence = "`" * max(3, longest + 1)
    parts = [named(call), f"{fence}json\n{call.arguments}\n{fence}"]
    if call.result:
        parts.append(f"{fence}text\n{call.result}\n{fence}")
    return "\n\n".join(parts)
