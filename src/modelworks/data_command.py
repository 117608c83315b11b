"""What `modelworks data` does: data of our own, written into a folder.

It sits beside the command line, which adds it, and loads the heavy parts only when it is called.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

data_app = typer.Typer(help="Write data to train and to evaluate on.", no_args_is_help=True)


@data_app.command("pictures")
def _pictures(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write; it must not exist.")],
    count: Annotated[int, typer.Option(help="Pictures.")] = 1000,
    seed: Annotated[int, typer.Option(help="Another gives other pictures.")] = 0,
    split: Annotated[
        str, typer.Option(help="train or held-out: each has typefaces and palettes of its own.")
    ] = "train",
    kinds: Annotated[
        str,
        typer.Option(metavar="KIND,KIND", help="Of bars, text, lines, pie, table, flow, receipt, dialog; or all."),
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs instead of a sentence.")] = False,
) -> None:
    """Draw charts, tables, diagrams, receipts, dialogs and lines of text with questions and answers.

    A stopped call goes on where it stopped when it is given again.

    Example: modelworks data pictures charts --count 20000 --kinds bars,text
    """
    from modelworks.data.pictures import kinds_of, split_of, write_pictures

    chosen, part = kinds_of(kinds), split_of(split)
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("drawing", total=count)
        written = write_pictures(
            out, count, seed, part, chosen, lambda done, total: bar.update(task, completed=done, total=total)
        )
    if as_json:
        print(json.dumps({"folder": str(out)} | written, indent=1))
    else:
        Console().print(f"{out}: {count} pictures with {written['questions']} questions", soft_wrap=True)
