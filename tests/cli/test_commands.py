"""Every command explains itself, with an example that can be copied."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from modelworks import __version__
from modelworks.cli import app

REPOSITORY = Path(__file__).parents[2]


def commands() -> Iterator[tuple[str, ...]]:
    """The words of all commands that do something."""
    for name, command in get_command(app).commands.items():  # type: ignore[attr-defined]
        inner = getattr(command, "commands", None)
        if inner is None:
            yield (name,)
        else:
            yield from ((name, word) for word in inner)


@pytest.mark.parametrize("words", sorted(commands()), ids=" ".join)
def test_a_commands_help_has_an_example_of_it(words: tuple[str, ...]) -> None:
    shown = CliRunner().invoke(app, [*words, "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"})
    assert shown.exit_code == 0
    assert re.search(rf"Example: modelworks {' '.join(words)}\b", shown.stdout), shown.stdout


@pytest.mark.parametrize("file", ["README.md", "src/modelworks/cli.py", "docs/tutorial.md", "docs/how-to/plan.md"])
def test_the_examples_that_are_named_are_there(file: str) -> None:
    named = re.findall(r"examples/[\w./-]+\.toml", (REPOSITORY / file).read_text(encoding="utf-8"))
    assert named
    assert [path for path in named if not (REPOSITORY / path).is_file()] == []


def test_the_version_is_printed() -> None:
    assert CliRunner().invoke(app, ["--version"]).stdout.strip() == f"modelworks {__version__}"
