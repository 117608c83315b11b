"""Users, keys, tiers and usage as tables for people, narrow enough for a terminal."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Literal

from rich.table import Table

Kind = Literal["users", "keys", "tiers", "usage"]
_COLUMNS = {
    "users": ("name", "tier", "team", "admin", "disabled", "created"),
    "keys": ("id", "user", "name", "scopes", "expires", "revoked"),
    "usage": ("user", "model", "requests", "failed", "prompt_tokens", "completion_tokens"),
}
_TIMES = {"created", "expires", "revoked"}


def table(kind: Kind, rows: list[dict[str, Any]]) -> Table:
    """Rows of one kind as a table; times, in seconds since 1970, as days of UTC. Tiers stand side by side."""
    if kind == "tiers":
        shown = Table("", *(row["name"] for row in rows))
        for key in (key for key in rows[0] if key != "name"):
            shown.add_row(key, *(_cell(key, row[key]) or "-" for row in rows))
        return shown
    shown = Table()
    for key in _COLUMNS[kind]:
        shown.add_column(key.replace("_", " ").capitalize(), no_wrap=key == "id", overflow="fold")
    for row in rows:
        shown.add_row(*(_cell(key, row[key]) for key in _COLUMNS[kind]))
    return shown


def _cell(key: str, value: Any) -> str:
    if value is None:
        return ""
    if key in _TIMES:
        return datetime.fromtimestamp(value, UTC).strftime("%Y-%m-%d")
    if isinstance(value, bool):
        return "yes" if value else ""
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:g}" if isinstance(value, float) else str(value)
