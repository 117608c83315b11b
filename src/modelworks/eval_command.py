"""What `modelworks eval` does: a model, a suite, a report.

It sits beside the command line, which adds it, and loads the heavy parts only when it is called.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress


def evaluate_model(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A run, its folder, or a Hugging Face folder.")],
    task: Annotated[str, typer.Option(help="needle, ruler or position-perplexity.")],
    lengths: Annotated[
        str | None,
        typer.Option(metavar="N,N", help="Tokens of the prompts; the context, 1/2, 1/4 and 1/8 of it if left out."),
    ] = None,
    depths: Annotated[int, typer.Option(help="Depths at which the needle is hidden.")] = 11,
    samples: Annotated[int, typer.Option(help="Prompts for each length and depth, or task.")] = 1,
    seed: Annotated[int, typer.Option(help="Of the prompts.")] = 0,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Try model.context, rope_base or rope_scaling.* otherwise."),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Draw a heat map, or lines: .svg or .html.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="Keep the report there; a stopped call goes on with it."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs instead of a table.")] = False,
) -> None:
    """Measure how well a model uses a long context: by tasks generated here, or by its loss at each position.

    Example: modelworks eval my-run --task needle --lengths 4096,16384 --plot needle.svg
    """
    from modelworks.evaluate.models import load_model
    from modelworks.evaluate.picture import refuse_other_pictures, write_picture
    from modelworks.evaluate.suite import evaluate, task_name
    from modelworks.evaluate.table import report_table
    from modelworks.spec.fields import whole_numbers

    suite, asked = task_name(task), whole_numbers("--lengths", lengths or "")
    refuse_other_pictures(plot)
    loaded = load_model(model, overrides or [])
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task_bar = bar.add_task("", total=None)

        def tell(done: int, total: int, cell: str) -> None:
            bar.update(task_bar, description=cell, completed=done, total=total)

        report = evaluate(loaded, suite, asked, depths, samples, seed, out, tell)
    if plot is not None:
        write_picture([report], plot)
    if as_json:
        print(json.dumps(report, indent=1))
    else:
        Console().print(report_table(report))
