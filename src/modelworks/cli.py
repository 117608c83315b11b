"""The commands. Thin: each parses its words, calls the room that does the work, and prints what comes back.

Heavy parts (torch, llama.cpp, the web) are imported inside the command that needs them, so that `--help` and the
planning commands start at once and work without the extras. `main` turns the two kinds of error into one sentence
and an exit code: 1 for work that failed, 2 for input that can't be used.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.markup import escape

from modelworks import __version__
from modelworks.account_command import backup, keys_app, prune, restore, tiers_app, usage, users_app
from modelworks.data_command import data_app
from modelworks.eval_command import evaluate_model
from modelworks.spec.errors import InputError, OperationError

if TYPE_CHECKING:
    from modelworks.spec.run import RunSpec

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
app.add_typer(data_app, name="data")
app.add_typer(users_app, name="users")
app.add_typer(keys_app, name="keys")
app.add_typer(tiers_app, name="tiers")
app.add_typer(spec_app, name="spec")
console = Console()
RunName = Annotated[str, typer.Argument(metavar="RUN", help="A run's name, as `runs list` shows it.")]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON for programs instead of a table for people.")]


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        console.print(f"modelworks {__version__}")
        raise typer.Exit


# --- spec, catalog, plan, bench ---------------------------------------------------------------------------------------


@spec_app.command("show")
def _spec_show(
    name: Annotated[str, typer.Argument(metavar="NAME|RUN.toml", help="A catalog entry, a run spec, a config.json.")],
    as_json: JsonFlag = False,
) -> None:
    """Show a model, device, cluster or run with all its fields filled in, and where each number comes from.

    Example: [bold]modelworks spec show grok-1[/bold]
    """
    from modelworks.spec.show import page, sourced

    shown = sourced(name)
    if as_json:
        print(json.dumps(shown.as_dict(), indent=1))
    else:
        console.print(page(shown))


@app.command("plan")
def _plan(
    file: Annotated[Path | None, typer.Argument(metavar="RUN.toml", help="A run spec; or give --model.")] = None,
    model: Annotated[str | None, typer.Option(help="A catalog entry, or a Hugging Face config.json.")] = None,
    cluster: Annotated[str | None, typer.Option(help="A catalog entry, or a cluster file.")] = None,
    gpus: Annotated[int | None, typer.Option(help="Devices; all of the cluster without it.")] = None,
    tokens: Annotated[str | None, typer.Option(help="To train on, such as 2T; 20 for each active parameter.")] = None,
    seq_len: Annotated[int | None, typer.Option(help="Tokens of a sequence.")] = None,
    global_batch: Annotated[int | None, typer.Option(help="Sequences of an optimizer step.")] = None,
    software: Annotated[str | None, typer.Option(help="The framework: megatron-core, torchtitan, maxtext ...")] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Set any field, such as parallel.tensor=4."),
    ] = None,
    search: Annotated[
        bool, typer.Option("--search", help="Everything feasible: precisions, fewer devices ...")
    ] = False,
    top: Annotated[int, typer.Option(min=0, max=100, help="How many other layouts to show.")] = 5,
    budget: Annotated[str | None, typer.Option(help="The best cluster and model for a sum: 6e9, 250M.")] = None,
    power: Annotated[str | None, typer.Option(help="The same for a power supply: 150MW.")] = None,
    by: Annotated[str | None, typer.Option(help="The same by a date: 2027-10.")] = None,
    compare: Annotated[tuple[Path, Path] | None, typer.Option(metavar="A.toml B.toml", help="Side by side.")] = None,
    emit: Annotated[
        str | None, typer.Option(help="Print the layout for megatron, torchtitan, nemo, maxtext or modelworks.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write one page with charts, to keep or to send.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Find the best layout of a run on a cluster, and what it takes: time, memory, MFU, energy, money; and why.

    Example: [bold]modelworks plan --model grok-1 --cluster colossus-100k --gpus 1024 --tokens 2T[/bold]
    """
    from modelworks import plan_command

    if html is not None and (budget or power or by or emit):
        raise InputError(f"--html {html} is not accepted here: it goes with a plan or with --compare")
    if budget or power or by:
        plan_command.print_budget(budget, power, by, cluster, as_json, console)
        return
    if compare:
        plan_command.print_comparison(compare, overrides or [], search, html, as_json, console)
        return
    run = plan_command.run_of(
        file, overrides or [], model=model, cluster=cluster, gpus=gpus, tokens=tokens, seq_len=seq_len,
        global_batch=global_batch, software=software,
    )  # fmt: skip
    plan_command.print_plan(run, search, top, emit, html, as_json, console)


@app.command("simulate")
def _simulate(
    file: Annotated[Path | None, typer.Argument(metavar="[RUN.toml]", help="The run spec.")] = None,
    cluster: Annotated[str | None, typer.Option(help="A cluster instead of a run: a catalog name or a file.")] = None,
    gpus: Annotated[int | None, typer.Option(help="GPUs of the cluster.")] = None,
    days: Annotated[float | None, typer.Option(help="How long; until the tokens are done without it.")] = None,
    model: Annotated[str | None, typer.Option(help="The model, with --cluster; else one that suits its size.")] = None,
    samples: Annotated[int | None, typer.Option(help="Replicas: the spec's 1000, or 200 in a sweep.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same result.")] = None,
    step_time: Annotated[str | None, typer.Option(help="Of one step, such as 5.2s, instead of the plan's.")] = None,
    tokens_per_step: Annotated[str | None, typer.Option(help="Tokens of one step, such as 16M.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override: simulate.spares.hot=64.")
    ] = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=RANGE", help="Turn a knob, or two: checkpoint.every=1min..60min; a,b,c; 0..64:5."),
    ] = None,
    tornado: Annotated[bool, typer.Option("--tornado", help="Halve and double each knob: what matters most.")] = False,
    top500: Annotated[bool, typer.Option("--top500", help="The machine beside those of the TOP500.")] = False,
    compare: Annotated[
        list[Path] | None, typer.Option(metavar="RUN.toml", help="Compare with the machine of another run.")
    ] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page with charts.")] = None,
    trace: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write one replica's failures, JSON lines.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Say what a run will really achieve on a cluster that fails, is repaired, is built up and draws power.

    Example: [bold]modelworks simulate --cluster colossus-100k --gpus 100000 --days 100[/bold]
    """
    from modelworks.simulate_command import Options, simulate

    simulate(
        Options(
            file=file,
            cluster=cluster,
            gpus=gpus,
            days=days,
            model=model,
            samples=samples,
            seed=seed,
            step_time=step_time,
            tokens_per_step=tokens_per_step,
            overrides=overrides or [],
            sweep=sweep or [],
            tornado=tornado,
            top500=top500,
            compare=compare or [],
            html=html,
            trace=trace,
            as_json=as_json,
        ),
        console,
    )


# --- train, runs ------------------------------------------------------------------------------------------------------


@app.command("accuracy")
def _accuracy(
    runs: Annotated[
        Path, typer.Argument(metavar="RUNS.csv", help="Measured runs; docs/how-to/plan.md has the columns.")
    ],
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Draw predicted against measured: .svg or .html.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Hold the planner's predictions against measured runs: errors per source, the worst runs and why.

    Example: [bold]modelworks accuracy runs.csv --plot accuracy.html[/bold]
    """
    from modelworks.plan.accuracy import as_json as contract
    from modelworks.plan.accuracy import predict_runs, table
    from modelworks.plan.measured_runs import read_runs
    from modelworks.plan.scatter import write_scatter

    rows = read_runs(runs)
    results = _with_progress(lambda progress: predict_runs(rows, progress=lambda n, of: progress("predicting", n, of)))
    if plot is not None:
        write_scatter(results, plot)
    if as_json:
        print(json.dumps(contract(results), indent=1))
    else:
        console.print(table(results))


@app.command("bench")
def _bench(
    quick: Annotated[bool, typer.Option("--quick", help="Peaks only: 5 seconds instead of up to a minute.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Measure this machine into a hardware file that planning reads: matrices, memory, collectives, disk, overheads.

    Example: [bold]modelworks bench --json[/bold]
    """
    from rich.progress import Progress

    from modelworks.train.machine import measure, write_hardware_file
    from modelworks.train.view import bench_tables

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("measuring", total=1.0)
        device = measure(
            progress=lambda what, done: progress.update(task, description=what, completed=done), tables=not quick
        )
    path = write_hardware_file(device)
    if as_json:
        print(json.dumps({"file": str(path)} | device.model_dump(mode="json", exclude_none=True), indent=1))
        return
    for precision, rate in device.peak_flops.items():
        console.print(f"matrix multiplication in {precision}: {rate / 1e9:,.1f} GFLOP/s")
    console.print(f"memory: {device.memory_bandwidth_bytes / 1e9:,.1f} GB/s, {device.memory_bytes / 2**30:.1f} GiB")
    for table in bench_tables(device):
        console.print(table)
    console.print(f"written to {path}", soft_wrap=True)


@app.command("train")
def _train(
    file: Annotated[Path, typer.Argument(metavar="RUN.toml", help="The run spec.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a field: train.seq_len=256.")
    ] = None,
    on: Annotated[str, typer.Option("--on", help="Where to train: local, slurm, kubernetes or ray.")] = "local",
    nproc: Annotated[
        int | None, typer.Option("--nproc", help="Processes in all, instead of the spec's cluster.gpus.")
    ] = None,
    nodes: Annotated[
        int | None, typer.Option("--nodes", help="Nodes, instead of cluster.gpus / cluster.gpus_per_node.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="With --dry-run: write it there instead.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run from its last good checkpoint.")] = False,
    trace: Annotated[
        int | None, typer.Option("--trace", metavar="N", help="Write a Chrome trace of N steps, from the second on.")
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Train nothing: build single processes of the run without memory; with --on ENGINE, print what would "
            "be submitted.",
        ),
    ] = False,
    ranks: Annotated[
        list[int] | None, typer.Option("--rank", help="With --dry-run: which; first, middle and last without it.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Train a run, and release it where its spec says so; here, or on the engine that --on names.

    Ctrl-C and SIGTERM save a checkpoint and stop (exit codes 130 and 0); a second Ctrl-C ends at once.

    Example: [bold]modelworks train examples/grok-tiny.toml --set train.tokens=500_000[/bold]
    """
    from modelworks.spec.files import load_run
    from modelworks.spec.stages import chain
    from modelworks.train.record import RunRecord
    from modelworks.train_command import engine_overrides, with_layout

    traced = [] if trace is None else [f"train.trace_steps={trace}"]
    spec = load_run(file, [*(overrides or []), *engine_overrides(on, nproc, nodes), *traced])
    if ranks and (on != "local" or not dry_run):
        raise InputError(f"--rank {ranks[0]} is not accepted here: it goes with --dry-run on this machine")
    if out is not None and (on == "local" or not dry_run):
        raise InputError(f"--out {out} is not accepted here: it goes with --dry-run and --on slurm, kubernetes or ray")
    if spec.stages and (on != "local" or dry_run):
        names = ", ".join(stage.name for stage in spec.stages)
        raise InputError(f"stages: one is accepted here, by --set stage=NAME ({names}), or none, by --set stages=[]")
    if on != "local":
        _submit(with_layout(spec, resume, spec.cluster.device), on, resume, dry_run, out, as_json)
        return
    if dry_run:
        _print_dry_run(spec, ranks, as_json)
        return
    runs = chain(spec)
    for part in runs:
        begun = RunRecord.exists(part.name)
        if len(runs) > 1 and begun and RunRecord(part.name).status().state == "finished":
            continue
        _train_here(part, resume and (begun or len(runs) == 1), as_json)


def _train_here(spec: RunSpec, resume: bool, as_json: bool) -> None:
    """Train one run on this machine, and say how it ended."""
    from modelworks.engine_command import take_back
    from modelworks.train.interrupt import Interrupted, exit_code
    from modelworks.train.view import NoView, view_for
    from modelworks.train_command import train_and_release

    take_back(spec.name)
    view = NoView() if as_json else view_for(spec.name, console)
    say = (lambda text: None) if as_json else console.print
    try:
        result, released = train_and_release(spec, resume, view, say)
    except Interrupted as stop:
        Console(stderr=True).print(f"{spec.name} {stop}; go on with the same command and --resume", soft_wrap=True)
        raise typer.Exit(exit_code(stop.received)) from None
    summary = {"name": spec.name, "folder": str(result.checkpoint.parents[1])} | result.as_dict()
    if as_json:
        print(json.dumps(summary | {"released": released}, indent=1))
    else:
        _print_summary(summary, released)
    if result.received is not None:
        raise typer.Exit(exit_code(result.received))


def _print_dry_run(spec: RunSpec, ranks: list[int] | None, as_json: bool) -> None:
    from modelworks.train.view import dry_run_table
    from modelworks.train_command import dry_run

    with console.status("building single processes of the run") if not as_json else contextlib.nullcontext():
        report = dry_run(spec, ranks)
    if as_json:
        print(json.dumps(report, indent=1))
    else:
        console.print(dry_run_table(report))


def _submit(spec: RunSpec, on: str, resume: bool, dry_run: bool, out: Path | None, as_json: bool) -> None:
    """Give a run to an engine, or show what would be given."""
    from modelworks.engine_command import render, submit

    if dry_run:
        text = render(spec, on)
        if out is None:
            print(text, end="")
        else:
            from modelworks.spec.home import write_atomically

            write_atomically(out, text)
            console.print(f"written to {out}", soft_wrap=True)
        return
    submission = submit(spec, on, resume)
    if as_json:
        print(json.dumps({"name": spec.name, "engine": on, "job": submission.job, "nodes": spec.nodes}, indent=1))
    else:
        console.print(f"{spec.name} is {on}'s job {submission.job}", soft_wrap=True)
        console.print(f"watch it: modelworks runs watch {spec.name}")


def _print_summary(summary: dict[str, Any], released: dict[str, Any] | None) -> None:
    console.print(f"{summary['name']} {summary['state']} after {summary['step']:,} steps in {summary['folder']}")
    if summary["state"] == "stopped":
        console.print("go on with the same command and --resume")
    if released is not None:
        for kind, path in released["files"].items():
            console.print(f"released {kind}: {path}", soft_wrap=True)
        if released["served_as"]:
            console.print(f"talk to it: modelworks chat {released['served_as']}")


@runs_app.command("list")
def _runs_list(as_json: JsonFlag = False) -> None:
    """List the runs on this machine, the newest first.

    Example: [bold]modelworks runs list --json[/bold]
    """
    from modelworks.engine_command import all_records
    from modelworks.train.view import runs_table

    found = [(record, record.status()) for record in all_records()]
    if as_json:
        print(json.dumps([{"name": record.name} | status.as_dict() for record, status in found], indent=1))
    elif found:
        console.print(runs_table([(record.name, status) for record, status in found]))
    else:
        console.print("no runs yet; begin one with: modelworks train RUN.toml")


@runs_app.command("show")
def _runs_show(run: RunName, as_json: JsonFlag = False) -> None:
    """Show where a run stands.

    Example: [bold]modelworks runs show first-run[/bold]
    """
    from modelworks.engine_command import record_of
    from modelworks.train.view import panel

    record = record_of(run)
    status, rows = record.status(), record.metrics()
    if as_json:
        shown = {"name": record.name, "folder": str(record.folder)} | status.as_dict()
        extra = {
            "checkpoints": [path.name for path in record.checkpoints()],
            "last": rows[-1] if rows else None,
            "spec": record.spec().model_dump(mode="json", exclude_none=True),
        }
        print(json.dumps(shown | extra, indent=1))
    else:
        console.print(
            panel(record.name, status, [row["loss"] for row in rows if row["loss"] is not None], console.width)
        )


@runs_app.command("watch")
def _runs_watch(run: RunName) -> None:
    """Watch a run until it ends; Ctrl-C stops the watching, not the run.

    Example: [bold]modelworks runs watch first-run[/bold]
    """
    from modelworks.engine_command import record_of
    from modelworks.train.view import watch

    watch(record_of(run), console)


@runs_app.command("log")
def _runs_log(run: RunName, lines: Annotated[int, typer.Option(help="The last so many.")] = 40) -> None:
    """Print the last lines that a run in the background, or on an engine, has printed.

    Example: [bold]modelworks runs log first-run --lines 100[/bold]
    """
    from modelworks.engine_command import record_of

    print(record_of(run).log(lines))


@runs_app.command("resume")
def _runs_resume(run: RunName) -> None:
    """Go on with a run in the background, where it was trained before: on this machine or on its engine.

    Example: [bold]modelworks runs resume first-run[/bold]
    """
    from modelworks.engine_command import resume_run

    console.print(f"{run} goes on as {resume_run(run)}", soft_wrap=True)


@runs_app.command("stop")
def _runs_stop(
    run: RunName,
    wait: Annotated[float, typer.Option(help="Seconds to wait until it has saved.")] = 60.0,
    as_json: JsonFlag = False,
) -> None:
    """Ask a run to save a checkpoint and stop.

    Example: [bold]modelworks runs stop first-run[/bold]
    """
    from modelworks.engine_command import record_of

    record = record_of(run)
    ended = record.stop(wait)
    if as_json:
        print(json.dumps({"name": record.name, "ended": ended} | record.status().as_dict(), indent=1))
    else:
        status = record.status()
        console.print(f"{record.name} {status.state}" + ("" if ended else "; it was asked to stop and is still saving"))


@runs_app.command("compare")
def _runs_compare(run: RunName, as_json: JsonFlag = False) -> None:
    """Hold a run's plan against what was measured.

    Example: [bold]modelworks runs compare first-run --json[/bold]
    """
    from modelworks.train.record import RunRecord
    from modelworks.train.view import comparison_table
    from modelworks.train_command import compare

    compared = compare(RunRecord(run))
    if as_json:
        print(json.dumps(compared, indent=1))
    else:
        console.print(comparison_table(compared))


app.command("eval")(evaluate_model)

# --- release, import, verify ------------------------------------------------------------------------------------------

Result = TypeVar("Result")
OutFolder = Annotated[Path, typer.Option("--out", help="The folder to write; it must not exist.")]
WeightType = Annotated[str, typer.Option("--dtype", help="Of the weights: float32, bfloat16 or float16.")]


def _with_progress(work: Callable[[Callable[[str, int, int], None]], Result]) -> Result:
    """Do work that tells of its progress, under a progress bar on the terminal."""
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)
        return work(lambda what, done, total: bar.update(task, description=what, completed=done, total=total or None))


@app.command()
def release(
    run: RunName,
    to: Annotated[
        str, typer.Option(help="safetensors, gguf; of an adapter also peft, gguf-adapter; with commas between.")
    ] = "safetensors,gguf",
    quantize: Annotated[str | None, typer.Option(help="f32, f16, bf16, q8_0, q4_k; with commas between.")] = None,
    layout: Annotated[str, typer.Option(help="Names of Grok-1's tensors: sglang, or vllm (up to 0.24).")] = "sglang",
    dtype: WeightType = "float32",
    as_json: JsonFlag = False,
) -> None:
    """Turn a run into packages for others' tools, verified, with a model card.

    Example: modelworks release grok-tiny --to safetensors,gguf --quantize q8_0,q4_k
    """
    from modelworks.release.package import release_run
    from modelworks.train.record import RunRecord
    from modelworks.train_command import offer, offer_adapter

    if layout not in ("sglang", "vllm"):
        raise InputError(f"--layout {layout} is not accepted: sglang or vllm is")
    record = RunRecord(run)
    kinds = quantize.split(",") if quantize else None
    result = _with_progress(
        lambda progress: release_run(record.folder, to.split(","), kinds, progress, dtype=dtype, vllm=layout == "vllm")
    )
    if result.gguf is not None:
        offer(record.spec(), result.gguf, result.eyes)
    elif result.adapter is not None and (name := offer_adapter(record.spec(), result.adapter)) is not None:
        Console(stderr=True).print(f"talk to it: modelworks chat {name}", highlight=False)
    if as_json:
        verification = {name: found.as_dict() for name, found in result.verification.items()}
        print(json.dumps({"folder": str(result.folder), "files": sorted(result.files), "verification": verification}))
        return
    for name, path in result.files.items():
        console.print(f"{path.stat().st_size:>14,} bytes  {name}", soft_wrap=True, highlight=False)
    for name, found in result.verification.items():
        console.print(
            f"{name}: probabilities differ by at most {found.largest_difference:.2g}, "
            f"same first choice on {found.same_first_choice:.0%} of {found.prompts} prompts",
            soft_wrap=True,
        )


@import_app.command("grok-1")
def import_grok1_command(
    folder: Annotated[Path, typer.Argument(help="The release: the folder that holds ckpt-0.")],
    out: OutFolder,
    config: Annotated[Path | None, typer.Option(help="A manifest.json; Grok-1's own constants without it.")] = None,
    to: Annotated[str, typer.Option(help="safetensors, gguf or both, with a comma between.")] = "safetensors",
    dtype: WeightType = "float32",
    layout: Annotated[str, typer.Option(help="Names of the safetensors: sglang, or vllm (up to 0.24).")] = "sglang",
    quantize: Annotated[str, typer.Option(help="Of the GGUF file: f32, f16, bf16, q8_0 or q4_k.")] = "q8_0",
    tokenizer: Annotated[Path | None, typer.Option(help="The release's tokenizer.model; GGUF needs it.")] = None,
) -> None:
    """Turn Grok-1's released checkpoint into a Hugging Face folder or a GGUF file; after an interruption, go on.

    Example: modelworks import grok-1 checkpoints --out grok-1 --to gguf --tokenizer tokenizer.model
    """
    from modelworks.release.grok1 import import_grok1

    if layout not in ("sglang", "vllm"):
        raise InputError(f"--layout {layout} is not accepted: sglang or vllm is")
    spec = _with_progress(
        lambda progress: import_grok1(
            folder,
            out,
            config,
            dtype,
            progress,
            to=to.split(","),
            vllm=layout == "vllm",
            precision=quantize,
            tokenizer=tokenizer,
        )
    )
    console.print(f"{spec.parameters.total:,} parameters in {out}", soft_wrap=True)


@import_app.command("hf")
def import_hf_command(
    folder: Annotated[Path, typer.Argument(help="A Hugging Face folder with config.json and safetensors files.")],
    out: OutFolder,
    to: Annotated[str, typer.Option(help="safetensors, gguf or both, with a comma between.")] = "safetensors",
    dtype: WeightType = "float32",
    quantize: Annotated[str, typer.Option(help="Of the GGUF file: f32, f16, bf16, q8_0 or q4_k.")] = "q8_0",
    tokenizer: Annotated[Path | None, typer.Option(help="For GGUF, where the folder has no tokenizer.json.")] = None,
) -> None:
    """Check a Hugging Face folder against its config and write it as a model of ours; Grok-2's pre-sharded one too.

    Example: modelworks import hf SmolLM2-135M-Instruct --out smollm2
    """
    from modelworks.release.gguf_import import import_huggingface
    from modelworks.release.gguf_network import left_out_by_llama_cpp

    spec = _with_progress(
        lambda progress: import_huggingface(
            folder, out, dtype, progress, to=to.split(","), precision=quantize, tokenizer=tokenizer
        )
    )
    console.print(f"{spec.parameters.total:,} parameters in {out}", soft_wrap=True)
    if "gguf" in to and (left_out := left_out_by_llama_cpp(spec)):
        console.print(f"llama.cpp computes this network without {', '.join(left_out)}", soft_wrap=True)


@import_app.command("gguf")
def import_gguf_command(
    file: Annotated[Path, typer.Argument(help="A GGUF file of the architecture llama, grok or qwen3.")],
    out: OutFolder,
    dtype: WeightType = "float32",
) -> None:
    """Turn a GGUF file, dequantised, and its tokenizer into a Hugging Face folder.

    Example: modelworks import gguf SmolLM2-135M-Instruct.Q4_1.gguf --out smollm2
    """
    from modelworks.release.gguf_import import import_gguf

    spec = _with_progress(lambda progress: import_gguf(file, out, dtype, progress))
    console.print(f"{spec.parameters.total:,} parameters in {out}", soft_wrap=True)


@app.command()
def verify(
    model: Annotated[Path, typer.Argument(help="A Hugging Face folder, or a run's folder.")],
    logits: Annotated[Path | None, typer.Option(help="An .npz with tokens (B, T) and logits (B, T, V).")] = None,
    tolerance: Annotated[float, typer.Option(help="Of the largest difference, in standard deviations.")] = 2e-3,
    as_json: JsonFlag = False,
) -> None:
    """Hold a model's fp32 logits against reference ones, or an import's files against the checksums noted when they
    were written; exit code 1 if they differ.

    Example: modelworks verify grok-1-tiny --logits logits_float32.npz --json
    """
    if logits is None:
        from modelworks.release.manifest import check_manifest

        checked = _with_progress(lambda progress: check_manifest(model, progress))
        if as_json:
            print(json.dumps(checked.as_dict()))
        else:
            console.print(f"{checked.files} files, {checked.bytes:,} bytes: as they were written", soft_wrap=True)
        return
    from modelworks.release.verify import verify as verify_model

    result = verify_model(model, logits, tolerance)
    if as_json:
        print(json.dumps(result.as_dict()))
    else:
        console.print(
            f"{result.tokens} tokens: largest difference {result.max_abs:.3g}, "
            f"{result.max_rel_std:.3g} standard deviations of the reference (at most {result.tolerance:g})",
            soft_wrap=True,
        )
    if not result.passed:
        raise OperationError(f"{model}: logits differ by {result.max_rel_std:.3g}, more than {result.tolerance:g}")


# --- models, serve, chat ----------------------------------------------------------------------------------------------

DEFAULT_MODEL = "smollm2-135m"
ModelName = Annotated[str, typer.Argument(metavar="MODEL", help="A model's name, as `models list` shows it.")]


@models_app.command("list")
def _models_list(as_json: JsonFlag = False) -> None:
    """List what can be served (served), fetched (source), and built from the catalog (catalog).

    Example: [bold]modelworks models list[/bold]
    """
    from modelworks.serve.listing import listing, table

    rows = listing()
    if as_json:
        print(json.dumps(rows, indent=1))
    else:
        console.print(table(rows))


@models_app.command("pull")
def _models_pull(
    name: Annotated[str, typer.Argument(metavar="NAME")] = DEFAULT_MODEL, as_json: JsonFlag = False
) -> None:
    """Fetch a model, check it against its known checksum, and store it to be served.

    Example: [bold]modelworks models pull smollm2-135m[/bold]
    """
    model = _pulled(name, quiet=as_json)
    if as_json:
        print(json.dumps(vars(model), indent=1))
    else:
        console.print(f"{model.name} is here: {model.bytes:,} bytes from {model.source}", highlight=False)


def _pulled(name: str, quiet: bool = False) -> Any:
    """The model of that name, fetched with a progress bar if it isn't stored."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    from modelworks.serve.store import Store

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=quiet) as bar:
        task = bar.add_task(f"Fetching {name}", total=None)
        return Store().pull(name, lambda done, total: bar.update(task, completed=done, total=total))


@models_app.command("add")
def _models_add(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The name that requests ask for it by.")],
    file: Annotated[Path, typer.Argument(metavar="FILE.gguf", help="A model as llama.cpp takes it.")],
    eyes: Annotated[Path | None, typer.Option(metavar="MMPROJ.gguf", help="Its vision tower and connector.")] = None,
    license_name: Annotated[str, typer.Option("--license", help="What its weights may be used for.")] = "unknown",
    as_json: JsonFlag = False,
) -> None:
    """Store a GGUF file to be served, with the eyes of a model that sees images.

    Example: [bold]modelworks models add smolvlm out/smolvlm-q8_0.gguf --eyes out/mmproj-smolvlm-q8_0.gguf[/bold]
    """
    from modelworks.serve.store import Store

    model = Store().add(name, file, source=f"the file {file.name}", license=license_name, eyes=eyes)
    if as_json:
        print(json.dumps(vars(model), indent=1))
    else:
        sees = " that sees images" if model.eyes_bytes else ""
        console.print(
            f"{model.name} is here: a model{sees} of {model.bytes + model.eyes_bytes:,} bytes", highlight=False
        )


@models_app.command("adapt")
def _models_adapt(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The name that requests ask for it by.")],
    file: Annotated[Path, typer.Argument(metavar="FILE.gguf", help="A LoRA adapter as llama.cpp takes it.")],
    to: Annotated[str, typer.Option("--to", metavar="MODEL", help="The stored model that it changes.")],
    as_json: JsonFlag = False,
) -> None:
    """Store a LoRA adapter of a stored model; requests choose it by its name, and the weights are in memory once.

    Example: [bold]modelworks models adapt pirate pirate-lora.gguf --to smollm2-135m[/bold]
    """
    from modelworks.serve.store import Store

    model = Store().add_adapter(name, file, to, source=f"a LoRA adapter of {to}")
    if as_json:
        print(json.dumps(vars(model), indent=1))
    else:
        console.print(f"{model.name} is here: {to} with {model.bytes:,} bytes of changes", highlight=False)


@models_app.command("rm")
def _models_rm(name: Annotated[str, typer.Argument(metavar="NAME")], as_json: JsonFlag = False) -> None:
    """Remove a served model and its file.

    Example: [bold]modelworks models rm smollm2-135m[/bold]
    """
    from modelworks.serve.store import Store

    Store().remove(name)
    print(json.dumps({"removed": name})) if as_json else console.print(f"{name} is removed", highlight=False)


def _served(name: str) -> Any:
    """A store that holds the model; the default one is fetched if it isn't there."""
    from modelworks.serve.store import Store

    store = Store()
    if name == DEFAULT_MODEL:
        _pulled(name)
    store.get(name)
    return store


Slots = Annotated[int, typer.Option(min=1, max=256, help="Chats that a model answers at once; more wait.")]
Threads = Annotated[int | None, typer.Option(min=1, max=1024, help="Threads that compute; default: cores minus one.")]
HostNames = Annotated[
    list[str] | None, typer.Option(metavar="NAME", help="A name, such as a proxy's, by which browsers may call this.")
]
ContextTokens = Annotated[int, typer.Option(min=16, help="Tokens per chat, prompt and answer together.")]


@app.command("serve")
def _serve(
    model: ModelName = DEFAULT_MODEL,
    host: Annotated[str, typer.Option(help="The address to listen on; 0.0.0.0 is every network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port; 0 takes a free one.")] = 8000,
    slots: Slots = 4,
    threads: Threads = None,
    context: ContextTokens = 4096,
    allow_host: HostNames = None,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The engines behind it, as a TOML file; SIGHUP reads it again.")
    ] = None,
    log: Annotated[
        str | None, typer.Option(metavar="FILE", help="Write a JSON line per request here; - is standard error.")
    ] = None,
    workers: Annotated[
        int, typer.Option(min=1, max=256, help="Processes that answer; several need --config and engines elsewhere.")
    ] = 1,
    grpc_port: Annotated[
        int | None,
        typer.Option(
            min=0, max=65535, help="Answer xAI's package xai-sdk here as well, over gRPC; 0 takes a free one."
        ),
    ] = None,
) -> None:
    """Serve models over an OpenAI-compatible API: the stored ones, or with --config those of any engines.

    MODEL is loaded at once, others when asked for; with --config the file says what is served, and MODEL is not used.
    Once there are users (modelworks users add), a key is needed for everything.

    Example: [bold]modelworks serve smollm2-135m --port 8000[/bold]

    Example: [bold]modelworks serve --config serve.toml[/bold]
    """
    from modelworks.assistant.gateway import access_if_wanted, account_routes, administration_routes
    from modelworks.assistant.kept import DatabaseStorage
    from modelworks.serve.listen import gateway, serve
    from modelworks.serve.llamacpp import EngineSettings
    from modelworks.serve.log import log_to
    from modelworks.serve.store import Store
    from modelworks.serve.tracing import check_tracing

    check_tracing()
    if workers > 1:
        if config is None:
            raise InputError(
                f"--workers {workers} is not accepted without --config FILE: llama.cpp answers in one process"
            )
        _serve_by_workers(config, workers, host, port, allow_host or [], log, grpc_port)
        return
    if log is not None:
        log_to(log)
    access = access_if_wanted(config)
    routers = [account_routes(access), administration_routes(access)] if access else []
    storage = DatabaseStorage(access.accounts.database if access else None)
    shared: dict[str, Any] = {"access": access, "storage": storage, "routers": routers, "grpc_port": grpc_port}
    if config is not None:
        gateway(config, Store(), host=host, port=port, hosts=allow_host or [], **shared)
        return
    store = _served(model)
    settings = EngineSettings(slots=slots, threads=threads, context=context)
    serve(store, model, settings, host=host, port=port, hosts=allow_host or [], **shared)


def _serve_by_workers(
    config: Path, workers: int, host: str, port: int, hosts: list[str], log: str | None, grpc_port: int | None
) -> None:
    from modelworks.assistant.gateway import access_if_wanted
    from modelworks.serve.log import log_to
    from modelworks.serve.workers import run_workers

    if log is not None:
        log_to(log)  # a file that can't be written is said before anything begins
    access = access_if_wanted(config)  # brings the database to the newest schema, once
    if access is not None:
        access.accounts.database.close()
    run_workers(
        config,
        workers,
        "modelworks.assistant.worker:create",
        host=host,
        port=port,
        hosts=hosts,
        log=log,
        keys=access is not None,
        grpc_port=grpc_port,
    )


@app.command("chat")
def _chat(
    model: ModelName = DEFAULT_MODEL,
    message: Annotated[list[str] | None, typer.Option("--message", "-m", help="Answer this and leave.")] = None,
    system: Annotated[str, typer.Option(help="What the model is told first.")] = "You are a helpful assistant.",
    threads: Threads = None,
    context: ContextTokens = 4096,
) -> None:
    """Chat with a stored model in the terminal; piped text is answered and that is all.

    Example: [bold]modelworks chat -m "Name three colours."[/bold]
    """
    import asyncio

    from modelworks.serve.llamacpp import EngineSettings, LlamaCppEngine
    from modelworks.serve.terminal import converse

    messages = list(message or [])
    if not messages and not sys.stdin.isatty():
        messages = [text for text in [sys.stdin.read().strip()] if text]
        if not messages:
            raise InputError("there is nothing to answer: standard input is empty; give --message TEXT or pipe a text")
    store = _served(model)

    async def talk() -> None:
        engine = LlamaCppEngine(store, EngineSettings(slots=1, threads=threads, context=context))
        await converse(engine, model, system, messages, console)

    asyncio.run(talk())


app.command("usage")(usage)
app.command("prune")(prune)
app.command("backup")(backup)
app.command("restore")(restore)


# --- up ---------------------------------------------------------------------------------------------------------------


@app.command("up")
def _up(
    port: Annotated[int, typer.Option(help="Where to listen; 0 takes a free port.")] = 8080,
    host: Annotated[str, typer.Option(help="The address to listen on; 0.0.0.0 lets others in.")] = "127.0.0.1",
    no_run: Annotated[bool, typer.Option("--no-run", help="Don't train the first run in the background.")] = False,
    no_titles: Annotated[
        bool, typer.Option("--no-titles", help="Don't ask models for the conversations' titles; first lines are.")
    ] = False,
    allow_host: HostNames = None,
    config: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The engines that answer, as a TOML file; SIGHUP reads it again."),
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Walk the whole line once, headless, and report.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Start the web app, with a model to talk to and a first run to watch.

    Once there are users (modelworks users add), its pages ask for a name and a password.

    With --check it walks the same line without a browser, in a temporary folder unless MODELWORKS_HOME is set, and
    exits with 1 if a stage fails.

    Example: [bold]modelworks up --port 8081[/bold]
    """
    if check:
        from modelworks.web.check import check as walk
        from modelworks.web.check import print_table

        stages = walk(None if as_json else Console(stderr=True))
        if as_json:
            print(
                json.dumps({"passed": all(stage.passed for stage in stages), "stages": [s.as_dict() for s in stages]})
            )
        else:
            print_table(stages, console)
        failed = next((stage for stage in stages if not stage.passed), None)
        if failed is not None:
            raise OperationError(f"the stage {failed.name} failed: {failed.detail}")
        return
    from modelworks.web.up import up

    up(host, port, not no_run, console, allow_host or [], config, not no_titles)


def main() -> None:
    """Run the command line; the entry point of the program."""
    try:
        app()
    except InputError as error:
        Console(stderr=True).print(f"[red]error:[/red] {escape(str(error))}", soft_wrap=True, highlight=False)
        sys.exit(2)
    except OperationError as error:
        Console(stderr=True).print(f"[red]failed:[/red] {escape(str(error))}", soft_wrap=True, highlight=False)
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
