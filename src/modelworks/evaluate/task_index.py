"""Where lm-evaluation-harness describes its tasks: a name's file, found without reading thousands of files as YAML.

The library reads all its descriptions when it is asked for one, which takes a minute or more. Here the few fields that
name a task, a group or a tag are picked out of their text, and what was found is kept in Modelworks' home for as long
as the library's version is the same.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml  # type: ignore[import-untyped]

from modelworks.spec.home import home, write_atomically

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

Progress = Callable[[int, int, str], None]
_FIELD = re.compile(
    r"""^["']?(task|group|tag|class|include)["']?[ ]*:.*(?:\n(?:[ \t-].*|[ \t]*$|#.*))*""", re.MULTILINE
)
"""One of the fields that matter, with the lines that belong to it."""
_WORD = re.compile(r"(?!(?:true|false|yes|no|on|off|null)$)[A-Za-z_][\w./-]*", re.IGNORECASE)
"""A text that needs no quotes in YAML."""
_TOLD = 200
"""Files after which progress is told."""
_FORM = 1
"""Of what is kept; another one is made anew."""


@dataclass
class Found:
    """What a name stands for.

    Attributes
    ----------
    kind
        ``TASK``, ``PY_TASK``, ``GROUP`` or ``TAG``, as the library calls them.
    path
        The description's file; None for a tag.
    tasks
        Of a tag.
    """

    kind: str
    path: str | None
    tasks: set[str] = field(default_factory=set)


def library_tasks(progress: Progress | None = None) -> dict[str, Found]:
    """The tasks, groups and tags that come with the library, by name.

    They are kept in the home, by the library's version; what can't be written there is found again the next time.
    """
    spec = find_spec("lm_eval")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    folder = Path(spec.submodule_search_locations[0]) / "tasks"
    kept = home() / "cache" / f"lm_eval-{version('lm_eval')}-tasks.json"
    head = {"form": _FORM, "folder": str(folder), "changed": folder.stat().st_mtime_ns}
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        known = json.loads(kept.read_text(encoding="utf-8"))
        if all(known[key] == value for key, value in head.items()):
            return {
                name: Found(kind, None if path is None else str(folder / path), set(tasks))
                for name, (kind, path, tasks) in known["names"].items()
            }
    found = _scanned(folder, progress)
    names = {
        name: (one.kind, one.path and Path(one.path).relative_to(folder).as_posix(), sorted(one.tasks))
        for name, one in found.items()
    }
    with contextlib.suppress(OSError):
        write_atomically(kept, json.dumps(head | {"names": names}))
    return found


def task_manager(found: dict[str, Found], include: Path | None) -> TaskManager:
    """The library's manager of those tasks, and of a user's own folder with further ones, which come first.

    It reads the descriptions of the tasks that it loads, and of those of the folder.
    """
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._index import Entry, Kind

    manager = TaskManager(include_path=None if include is None else str(include), include_defaults=False)
    for name, one in found.items():
        path = None if one.path is None else Path(one.path)
        manager.task_index.setdefault(name, Entry(name, Kind[one.kind], path, tags=set(one.tasks)))
    return manager


def _scanned(folder: Path, progress: Progress | None) -> dict[str, Found]:
    paths = sorted(folder.rglob("*.yaml"), key=lambda path: path.as_posix())
    fields: dict[Path, dict[str, Any]] = {}
    found: dict[str, Found] = {}
    for number, path in enumerate(paths):
        if progress is not None and number % _TOLD == 0:
            progress(number, len(paths), "looking tasks up")
        with contextlib.suppress(OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError, TypeError):
            _note(_with_included(path, fields), path, found)
    return found


def _note(named: dict[str, Any], path: Path, found: dict[str, Found]) -> None:
    """Enter a description under its name, unless an earlier one has it, and a task under its tags."""
    kind = "PY_TASK" if "class" in named else "GROUP" if "group" in named else "TASK"
    name = named.get("group" if kind == "GROUP" else "task")
    if not isinstance(name, str) or name in found:
        return
    found[name] = Found(kind, str(path))
    if kind != "GROUP":
        tags = named.get("tag") or []
        for tag in [tags] if isinstance(tags, str) else tags:
            found.setdefault(tag, Found("TAG", None)).tasks.add(name)


def _with_included(path: Path, fields: dict[Path, dict[str, Any]]) -> dict[str, Any]:
    """A description's fields over those of what it includes."""
    if path not in fields:
        fields[path] = dict(_fields(path.read_text(encoding="utf-8")))
    own = dict(fields[path])
    parents = own.pop("include", None) or []
    merged: dict[str, Any] = {}
    for parent in [parents] if isinstance(parents, str) else parents:
        merged |= _with_included(path.parent / parent, fields)
    return merged | own


def _fields(text: str) -> Iterator[tuple[str, Any]]:
    for match in _FIELD.finditer(text):
        rest = match[0].partition(":")[2]
        if match[1] == "task" and rest.startswith("\n"):
            yield "task", None  # a group's list
        elif match[1] == "class" or _WORD.fullmatch(rest.strip()):
            yield match[1], rest.strip()
        else:
            yield match[1], yaml.safe_load(match[0])[match[1]]
