"""What tests of the pages share: waiting for `modelworks up`, a long conversation, and axe-core in a page."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import time
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest


def address_of(process: subprocess.Popen[str], home: Path) -> str:
    """Where it answers, as soon as it does."""
    deadline = time.monotonic() + 180  # a busy machine is not a failure
    while True:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        try:
            url: str = json.loads((home / "up.json").read_text())["url"]
            if httpx.get(f"{url}/health", timeout=5).is_success:
                return url
        except (OSError, ValueError, httpx.HTTPError):
            time.sleep(0.1)


def long_conversation(file: Path, messages: int) -> str:
    """A conversation of so many messages in a database that is there, put there at once: one by one takes minutes."""
    now, name = time.time(), "long"
    rows = [(role, content, "stub" if role == "assistant" else None) for role, content in long_messages(messages)]
    with closing(sqlite3.connect(file)) as database, database:
        first = database.execute("SELECT COALESCE(MAX(id), 0) + 1 FROM messages").fetchone()[0]
        database.execute(
            "INSERT INTO conversations (id, title, model, leaf_id, created, updated) VALUES (?, ?, ?, ?, ?, ?)",
            (name, "A long one", "stub", first + len(rows) - 1, now, now),
        )
        database.executemany(
            "INSERT INTO messages (id, conversation_id, parent_id, role, content, model, state, created, updated)"
            " VALUES (?, ?, ?, ?, ?, ?, 'complete', ?, ?)",
            [
                (first + place, name, first + place - 1 if place else None, role, content, model, now, now)
                for place, (role, content, model) in enumerate(rows)
            ],
        )
    return name


def long_messages(count: int) -> list[tuple[str, str]]:
    """So many messages: who speaks, and what is said."""
    rows = []
    for index in range(count // 2):
        answer = f"Answer **{index}**:\n\n- one\n- two\n\n```python\nx = {index}\n```\n\n" + "word " * (index % 90)
        rows += [("user", f"Question {index}"), ("assistant", f"{answer}\n\nEnd of {index}.")]
    return rows


def hindrances(page: Any) -> list[tuple[str, list[str]]]:
    """What of a browser's page hinders somebody: axe-core's serious and critical violations, with where they are."""
    spec = find_spec("axe_playwright_python")
    if spec is None or spec.origin is None:
        pytest.skip("needs axe-playwright-python")
    page.wait_for_timeout(400)  # until colours have faded in
    page.evaluate(Path(spec.origin).with_name("axe.min.js").read_text())
    return [
        (violation["id"], [node["html"][:160] for node in violation["nodes"][:3]])
        for violation in page.evaluate("axe.run().then((results) => results.violations)")
        if violation["impact"] in {"serious", "critical"}
    ]
