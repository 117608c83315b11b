"""Users, keys and tiers at the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from modelworks.cli import app


def run(*words: str, typed: str = "") -> Any:
    """What a command prints with --json."""
    result = CliRunner().invoke(app, [*words, "--json"], input=typed, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_a_user_comes_gets_a_key_is_changed_and_goes(home: Path) -> None:
    made = run(
        "users", "add", "alice", "--tier", "premium", "--team", "research", "--password", typed="a long password\n"
    )
    assert (made["tier"], made["team"], made["has_password"], made["admin"]) == ("premium", "research", True, False)
    key = run("keys", "create", "alice", "--name", "laptop", "--scope", "generate", "--days", "2")
    assert key["key"].startswith(f"mw-{key['id']}-")
    assert (key["scopes"], round(key["expires"] - key["created"])) == (["generate"], 2 * 86400)
    listed = run("keys", "list", "alice")
    assert [one["id"] for one in listed] == [key["id"]]
    assert key["key"] not in json.dumps(listed)
    assert run("keys", "revoke", key["key"])["revoked"]
    assert run("users", "set", "alice", "--tier", "free", "--disable", "--team", "")["disabled"]
    assert [(user["name"], user["tier"], user["team"]) for user in run("users", "list")] == [("alice", "free", None)]
    assert run("usage", "alice") == []
    assert run("users", "rm", "alice") == {"removed": "alice"}
    assert run("users", "list") == []


def test_a_tier_is_made_shown_and_removed(home: Path) -> None:
    made = run("tiers", "set", "research", 'models=["grok-*"]', "tokens_per_day=50M", "window_s=1h", "images=true")
    assert (made["models"], made["tokens_per_day"], made["window_s"], made["images"]) == (
        ["grok-*"],
        50_000_000,
        3600,
        True,
    )
    assert [tier["name"] for tier in run("tiers", "list")] == ["free", "premium", "premium+", "research"]
    shown = CliRunner().invoke(app, ["tiers", "list"])
    assert "50,000,000" in shown.stdout
    assert run("tiers", "rm", "research") == {"removed": "research"}


@pytest.mark.parametrize("kind", ["users", "keys", "tiers"])
def test_what_there_is_is_shown_to_people(home: Path, kind: str) -> None:
    run("users", "add", "alice")
    run("keys", "create", "alice")
    assert CliRunner().invoke(app, [kind, "list"]).exit_code == 0
