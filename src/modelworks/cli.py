"""The commands. Thin: each parses its words, calls the room that does the work, and prints what comes back.

Heavy parts (torch, llama.cpp, the web) are imported inside the command that needs them, so that `--help` and the
planning commands start at once and work without the extras. `main` turns the two kinds of error into one sentence
and an exit code: 1 for work that failed, 2 for input that can't be used.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.console import Console

from modelworks import __version__
from modelworks.spec.errors import InputError, OperationError

app = typer.Typer(
    name="modelworks",
    help="A run spec in, a large language model and a chat assistant out.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
)
runs_app = typer.Typer(help="List, watch, stop and compare runs.", no_args_is_help=True)
models_app = typer.Typer(help="List, fetch and remove models.", no_args_is_help=True)
import_app = typer.Typer(help="Turn others' weights into a model of ours.", no_args_is_help=True)
spec_app = typer.Typer(help="Show specs and the catalog's facts.", no_args_is_help=True)
app.add_typer(runs_app, name="runs")
app.add_typer(models_app, name="models")
app.add_typer(import_app, name="import")
app.add_typer(spec_app, name="spec")
console = Console()
JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON for programs instead of a table for people.")]


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        console.print(f"modelworks {__version__}")
        raise typer.Exit


# --- spec, catalog, plan, bench ---------------------------------------------------------------------------------------

# --- train, runs ------------------------------------------------------------------------------------------------------

# --- release, import, verify ------------------------------------------------------------------------------------------

# --- models, serve, chat ----------------------------------------------------------------------------------------------

# --- up ---------------------------------------------------------------------------------------------------------------


def main() -> None:
    """Run the command line; the entry point of the program."""
    try:
        app()
    except InputError as error:
        Console(stderr=True).print(f"[red]error:[/red] {error}", soft_wrap=True, highlight=False)
        sys.exit(2)
    except OperationError as error:
        Console(stderr=True).print(f"[red]failed:[/red] {error}", soft_wrap=True, highlight=False)
        sys.exit(1)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("modelworks"):
            raise
        Console(stderr=True).print(
            f"[red]error:[/red] this command needs the package {error.name}: pip install 'modelworks\\[all]'",
            soft_wrap=True,
            highlight=False,
        )
        sys.exit(2)


if __name__ == "__main__":
    main()
