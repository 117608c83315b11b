"""What `modelworks eval` does: a model, a suite, a report.

It sits beside the command line, which adds it, and loads the heavy parts only when it is called.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import Progress, TaskID

from modelworks.spec.errors import InputError

if TYPE_CHECKING:
    from modelworks.evaluate.sampled import Sampling


def evaluate_model(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A run, its folder, a Hugging Face folder, a GGUF file, a server's address, or a kept report.",
        ),
    ],
    task: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,NAME",
            help="character, pictures, chartqa, docvqa, mmmu, realworldqa, needle, ruler, position-perplexity; or "
            "those of lm-evaluation-harness, such as hellaswag.",
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option("--against", metavar="OTHER", help="Compare with another model, or a kept report, by samples."),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Samples of each task; all of them if left out.")] = None,
    shots: Annotated[int | None, typer.Option(help="Solved examples in each prompt; the task's own number.")] = None,
    include: Annotated[
        Path | None, typer.Option("--include", metavar="FOLDER", help="Further tasks, in YAML, that run no code.")
    ] = None,
    trust_task_code: Annotated[
        bool, typer.Option("--trust-task-code", help="Let tasks run code of theirs, or code that a model wrote.")
    ] = False,
    served_as: Annotated[
        str | None, typer.Option("--served-as", metavar="NAME", help="The model's name at the server.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Ask a server by its chat; for tasks that generate.")] = False,
    tokenizer: Annotated[
        str | None,
        typer.Option("--tokenizer", metavar="FOLDER", help="Of a served model, for tasks of log-likelihoods."),
    ] = None,
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
    data: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="Of the tasks with pictures: parquet files, or a folder of pictures."),
    ] = None,
    kinds: Annotated[str, typer.Option(metavar="KIND,KIND", help="Of pictures, such as bars,text.")] = "",
    hint: Annotated[
        str | None, typer.Option(help="Said behind each question about a picture; '' says nothing.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs instead of a table.")] = False,
) -> None:
    """Measure how well a model does: on benchmarks' tasks, over long contexts, with pictures, by its loss per position.

    Example: modelworks eval my-run --task hellaswag,arc_easy --limit 200 --against other-run

    Example: modelworks eval my-run --task needle --lengths 4096,16384 --plot needle.svg

    Example: modelworks eval http://127.0.0.1:8000/v1 --task docvqa --data DocVQA
    """
    from modelworks.evaluate.suite import TASKS

    if task not in TASKS:
        from modelworks.evaluate.sampled import Sampling

        if lengths is not None:
            raise InputError(f"--lengths {lengths} is not accepted with --task {task}: {', '.join(TASKS)} take lengths")
        names = tuple(dict.fromkeys(name.strip() for name in (task or "").split(",") if name.strip()))
        sampling = Sampling(
            names, limit, shots, seed, include, trust_task_code, chat, served_as, tokenizer, data, kinds, hint
        )
        _by_samples(model, against, sampling, overrides or [], plot, out, as_json=as_json)
        return
    if against is not None:
        raise InputError(f"--against {against} is not accepted with --task {task}: tasks with samples are compared")
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


def _by_samples(
    model: str,
    against: str | None,
    sampling: Sampling,
    overrides: list[str],
    plot: Path | None,
    out: Path | None,
    *,
    as_json: bool,
) -> None:
    """Evaluate by samples, or take reports that are kept; compare where two are asked for."""
    from modelworks.evaluate.comparison import compare
    from modelworks.evaluate.picture import refuse_other_pictures, write_comparison
    from modelworks.evaluate.reports import read_report
    from modelworks.evaluate.sampled import check_sampling, evaluate_samples
    from modelworks.evaluate.table import comparison_table, kinds_table, scores_table

    refuse_other_pictures(plot)
    if plot is not None and against is None:
        raise InputError(f"--plot {plot} is not accepted without --against: comparisons are drawn")
    asked = [name for name in (model, against) if name is not None]
    reports = {name: read_report(Path(name)) for name in asked if name.endswith(".json")}
    to_evaluate = [name for name in asked if name not in reports]
    console = Console(stderr=True)
    with Progress(console=console, transient=True) as bar:
        if to_evaluate:
            found = bar.add_task("", total=None)
            check_sampling(
                to_evaluate,
                sampling,
                lambda done, total, what: bar.update(found, description=what, completed=done, total=total),
            )
            bar.remove_task(found)
        for name in to_evaluate:
            task_bar = bar.add_task("", total=None)

            def tell(done: int, total: int | None, what: str, bar_id: TaskID = task_bar, name: str = name) -> None:
                bar.update(bar_id, description=f"{name}: {what}", completed=done, total=total)

            kept = out if name == model else None
            reports[name], path = evaluate_samples(name, sampling, overrides if name == model else [], kept, tell)
            console.print(f"kept in {path}", soft_wrap=True)
    if against is None:
        if as_json:
            print(json.dumps(reports[model], indent=1))
        else:
            Console().print(scores_table(reports[model]))
            if (by_kind := kinds_table(reports[model])) is not None:
                Console().print(by_kind)
        return
    compared = compare(reports[model], reports[against], sampling.seed)
    if plot is not None:
        write_comparison(compared, plot)
    if as_json:
        print(json.dumps(compared, indent=1))
    else:
        Console().print(comparison_table(compared))
