"""Writes the reference section while the documentation is built: one page per room, and one of all commands.

A hook of MkDocs (`hooks` in mkdocs.yml). The pages hold mkdocstrings' directives, which read the docstrings without
importing the modules, and what the command line says about itself; so neither can fall behind the code.
"""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

_PACKAGE = Path(__file__).parents[1] / "src" / "modelworks"
_UNDOCUMENTED = {"migrations"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages to those of docs/."""
    rooms = sorted(path.parent for path in _PACKAGE.glob("*/__init__.py"))
    for room in rooms:
        files.append(File.generated(config, f"reference/{room.name}.md", content=_room_page(room)))
    files.append(File.generated(config, "reference/commands.md", content=_commands_page()))
    files.append(File.generated(config, "reference/index.md", content=_index_page([room.name for room in rooms])))
    return files


def _modules(room: Path) -> list[str]:
    """The dotted names of a room's modules, the room itself first."""
    paths = sorted(path for path in room.rglob("*.py") if not _UNDOCUMENTED & set(path.relative_to(room).parts))
    parts = [path.relative_to(_PACKAGE.parent).with_suffix("").parts for path in paths]
    names = [".".join(part[:-1] if part[-1] == "__init__" else part) for part in parts]
    return sorted(name for name in names if not name.rsplit(".", 1)[-1].startswith("_"))


def _room_page(room: Path) -> str:
    directives = [f"::: {name}\n" for name in _modules(room)]
    return f"# {room.name}\n\n" + "\n".join(directives)


def _commands_page() -> str:
    from typer.cli import get_docs_for_click
    from typer.main import get_command
    from typer.models import Context

    from modelworks.cli import app

    command = get_command(app)
    page = get_docs_for_click(obj=command, ctx=Context(command), name="modelworks", title="Commands")
    return re.sub(r"\[bold\](.+?)\[/bold\]", r"`\1`", page).replace(str(Path.home()), "~")


def _index_page(rooms: list[str]) -> str:
    lines = [f"- [`modelworks.{room}`]({room}.md)" for room in rooms]
    return "\n".join(["# Reference", "", "- [Commands](commands.md)", *lines, ""])
