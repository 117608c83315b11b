"""Waiting for `modelworks up` in a process of its own."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import httpx


def address_of(process: subprocess.Popen[str], home: Path) -> str:
    """Where it answers, as soon as it does."""
    deadline = time.monotonic() + 60
    while True:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        try:
            url: str = json.loads((home / "up.json").read_text())["url"]
            if httpx.get(f"{url}/health", timeout=5).is_success:
                return url
        except (OSError, ValueError, httpx.HTTPError):
            time.sleep(0.1)
