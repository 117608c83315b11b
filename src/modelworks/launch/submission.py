"""What a run's folder knows of the engine that it was given to: ``engine.json``, and one log per node.

``engine.json`` names the engine and its job. Each node appends to a file of its own in ``nodes/`` when it begins, loses
a process, and ends, so that no two machines write to one file. A node that has begun and not ended when its attempt is
over has failed silently; who fails too often is left out of the next attempt. An attempt's name is that of what was
submitted and a number behind a dot.
"""

from __future__ import annotations

import json
import platform
import time
from dataclasses import asdict, dataclass, field, fields
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from modelworks import __version__
from modelworks.spec.home import ENGINE_FILE, write_atomically

_Event = Literal["began", "lost a process", "told to end", "unhealthy", "ended", "vanished"]


@dataclass(frozen=True)
class Submission:
    """To whom a run was given."""

    engine: str
    job: str
    submitted: float = field(default_factory=time.time)
    stop: bool = False
    """Whether the run was asked to stop, and so isn't to go on by itself."""
    excluded: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    """Of the software that submitted it."""
    details: dict[str, Any] = field(default_factory=dict)
    """What only the engine understands, such as a namespace."""

    def write(self, folder: Path) -> None:
        """Keep it in the run's folder."""
        write_atomically(folder / ENGINE_FILE, json.dumps(asdict(self), indent=1) + "\n")


def read_submission(folder: Path) -> Submission | None:
    """The run's last submission; None if it was never given to an engine."""
    try:
        values = json.loads((folder / ENGINE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    known = {entry.name for entry in fields(Submission)}
    values = {key: value for key, value in values.items() if key in known}
    return Submission(**values)


def versions() -> dict[str, str]:
    """The software that must be the same on all nodes."""
    found = {"modelworks": __version__, "python": platform.python_version()}
    for package in ("torch", "numpy", "safetensors"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "absent"
    return found


def futile(folder: Path, attempt: str) -> int:
    """How many attempts just before this one, of the same submission, began where the run stands now."""
    begun: dict[str, tuple[float, int]] = {}
    for event in (event for events in node_events(folder).values() for event in events):
        if event["attempt"].rpartition(".")[0] == attempt.rpartition(".")[0]:
            began = (event["time"], event["step"])
            begun[event["attempt"]] = min(began, begun.get(event["attempt"], began))
    begun.pop(attempt, None)
    count, here = 0, newest_step(folder)
    for _, step in sorted(begun.values(), reverse=True):
        if step != here:
            break
        count += 1
    return count


def newest_step(folder: Path) -> int:
    """The step of a run's newest checkpoint, -1 without one."""
    names = [path.name.removeprefix("step-") for path in (folder / "checkpoints").glob("step-*")]
    return max((int(name) for name in names if name.isdigit()), default=-1)


class NodeLog:
    """What happens to one node of a run."""

    def __init__(self, folder: Path, node: str, attempt: str) -> None:
        self._folder, self._attempt = folder, attempt
        self._path = folder / "nodes" / f"{node}.jsonl"

    def write(self, event: _Event, code: int | None = None, message: str | None = None) -> None:
        """Append an event; `code` is an exit code where there is one."""
        entry = {
            "time": time.time(),
            "attempt": self._attempt,
            "event": event,
            "step": newest_step(self._folder),
            "code": code,
            "message": message,
        }
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


def node_events(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """What happened to each node of a run, oldest first."""
    found = {}
    for path in sorted((folder / "nodes").glob("*.jsonl")):
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        found[path.stem] = [entry for line in lines if (entry := _event(line)) is not None]
    return found


def note_vanished(folder: Path, attempt: str) -> None:
    """Log for each node that began an attempt and never ended it that it has vanished; call it when that is over."""
    for node, events in node_events(folder).items():
        mine = [event["event"] for event in events if event["attempt"] == attempt]
        if "began" in mine and not {"told to end", "ended", "vanished"} & set(mine):
            NodeLog(folder, node, attempt).write("vanished")


def final_codes(folder: Path, attempt: str) -> set[int]:
    """Exit codes of an attempt's nodes."""
    events = [event for of_node in node_events(folder).values() for event in of_node if event["attempt"] == attempt]
    return {event["code"] for event in events if event["event"] == "ended" and event["code"] is not None}


def failing_nodes(folder: Path, limit: int) -> list[str]:
    """Nodes that failed in `limit` attempts or more."""
    failing = []
    for node, events in node_events(folder).items():
        bad = {e["attempt"] for e in events if e["event"] in ("lost a process", "unhealthy", "vanished")}
        if len(bad) >= limit:
            failing.append(node)
    return failing


def _event(line: str) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except ValueError:  # the last words of a machine that was switched off
        return None
    return entry if isinstance(entry, dict) and {"time", "attempt", "event", "step", "code"} <= entry.keys() else None
