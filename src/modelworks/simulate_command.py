"""What `modelworks simulate` does: a run spec, or a cluster without one, simulated and reported as asked for."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import Progress

from modelworks.simulate.answers import Answer, answer
from modelworks.simulate.comparison import Comparison, compare
from modelworks.simulate.montecarlo import first_stream
from modelworks.spec.errors import InputError, OperationError
from modelworks.spec.files import apply_overrides, load_run, run_from
from modelworks.spec.home import write_atomically
from modelworks.spec.run import RunSpec

Result = TypeVar("Result")
Tell = Callable[[float], None]
CLUSTER_MODELS = ((2048, "llama-3.1-405b"), (128, "llama-3.1-70b"), (8, "llama-3.1-8b"), (1, "smollm2-135m"))
"""Whose state is saved where only a cluster is given: (from so many GPUs on, this model)."""
_ENDLESS_TOKENS = 10**18
_DEFAULT_DAYS = 100.0
_TORNADO_SAMPLES = 50


@dataclass(frozen=True)
class Options:
    """The command's words."""

    file: Path | None = None
    cluster: str | None = None
    gpus: int | None = None
    days: float | None = None
    model: str | None = None
    samples: int | None = None
    seed: int | None = None
    step_time: str | None = None
    tokens_per_step: str | None = None
    overrides: list[str] = field(default_factory=list)
    sweep: list[str] = field(default_factory=list)
    tornado: bool = False
    top500: bool = False
    compare: list[Path] = field(default_factory=list)
    html: Path | None = None
    trace: Path | None = None
    as_json: bool = False


def run_of(options: Options, further: list[str] | None = None) -> RunSpec:
    """The run spec that the options describe, with further overrides.

    Raises
    ------
    InputError
        If they describe none, or two.
    """
    overrides = list(options.overrides)
    for name, value in (
        ("cluster.gpus", options.gpus),
        ("simulate.days", options.days),
        ("simulate.step_time", options.step_time),
        ("simulate.tokens_per_step", options.tokens_per_step),
    ):
        if value is not None:
            overrides.append(f"{name}={value}")
    overrides += further or []
    if options.file is not None:
        if options.cluster is not None or options.model is not None:
            raise InputError("give either RUN.toml or --cluster and --model; a file's cluster is set with --set")
        return load_run(options.file, overrides)
    if options.cluster is None:
        raise InputError("give RUN.toml, or --cluster NAME with --gpus N and --days D")
    return _of_cluster(options.cluster, options.model, overrides)


def _of_cluster(cluster: str, model: str | None, overrides: list[str]) -> RunSpec:
    """A run without end on a cluster: a model of a size that suits it, a usual batch."""
    values: dict[str, Any] = {
        "name": Path(cluster).stem,
        "model": model,
        "cluster": {"preset": cluster},
        "train": {"tokens": _ENDLESS_TOKENS, "seq_len": 2048, "global_batch": 8192},
        "simulate": {"days": _DEFAULT_DAYS},
    }
    if model is None:
        gpus = run_from(apply_overrides(values | {"model": "grok-1"}, overrides), where="--cluster").cluster.gpus
        values["model"] = next(name for least, name in CLUSTER_MODELS if gpus >= least)
    return run_from(apply_overrides(values, overrides), where="--cluster", folder=Path())


def simulate(options: Options, console: Console) -> None:
    """Simulate and report."""
    run = run_of(options)
    if options.sweep:
        _sweep(options, console)
        return
    found = _under_bar("simulating", lambda tell: answer(run, options.samples, options.seed, tell))
    others = [load_run(path) for path in options.compare]
    comparison = None
    if others or run.simulate.alternatives:
        comparison = _under_bar("comparing", lambda tell: compare(run, others, tell))
    tornado = None
    if options.tornado or options.html:
        from modelworks.simulate.sweep import tornado as turn_knobs

        tornado = _under_bar(
            "turning knobs", lambda tell: turn_knobs(found.scenario, _TORNADO_SAMPLES, found.seed, tell)
        )
    written = _write_files(options, found, comparison, tornado)
    if options.as_json:
        _print_json(options, found, comparison, tornado, written)
    else:
        _print_pages(options, console, found, comparison, tornado)
        for what, path in written.items():
            console.print(f"{what} written to {path}", soft_wrap=True)


def _write_files(options: Options, found: Answer, comparison: Comparison | None, tornado: Any) -> dict[str, str]:
    written: dict[str, str] = {}
    if options.trace is None and options.html is None:
        return written
    stream = first_stream(found.scenario, found.samples, found.seed)
    try:
        if options.trace is not None:
            from modelworks.simulate.trace import write

            write(options.trace, found.scenario, stream, found.seed)
            written["trace"] = str(options.trace)
        if options.html is not None:
            from modelworks.simulate.events import replay
            from modelworks.simulate.page import page

            content = page(found, replay(found.scenario, stream), _beside(found), tornado, comparison)
            write_atomically(options.html, content)
            written["page"] = str(options.html)
    except OSError as error:
        raise OperationError(f"{error.filename or options.html or options.trace}: {error.strerror}") from None
    return written


def _beside(found: Answer) -> Any:
    from modelworks.simulate.top500 import beside

    return beside(found.scenario.machine, found.as_dict()["tokens_per_day"])


def _print_json(
    options: Options, found: Answer, comparison: Comparison | None, tornado: Any, written: dict[str, str]
) -> None:
    shown = found.as_dict()
    if comparison is not None:
        shown["comparison"] = comparison.as_dict()
    if tornado is not None:
        middle, bars = tornado
        rows = [{"knob": bar.name, "half": bar.half, "double": bar.double} for bar in bars]
        shown["tornado"] = {"ettr": middle, "knobs": rows}
    if options.top500:
        shown["top500"] = _beside(found).as_dict()
    print(json.dumps(shown | ({"written": written} if written else {}), indent=1))


def _print_pages(
    options: Options, console: Console, found: Answer, comparison: Comparison | None, tornado: Any
) -> None:
    from modelworks.simulate import report

    console.print(report.page(found))
    if comparison is not None:
        console.print(report.comparison_page(comparison))
    if tornado is not None and options.tornado:
        console.print(report.tornado_page(*tornado))
    if options.top500:
        console.print(report.beside_page(_beside(found)))


def _sweep(options: Options, console: Console) -> None:
    from modelworks.simulate.report import sweep_page
    from modelworks.simulate.sweep import knob, sweep

    knobs = [knob(text) for text in options.sweep]
    samples = options.samples or 200
    seed = [f"simulate.seed={options.seed}"] if options.seed is not None else []
    points = _under_bar(
        "sweeping", lambda tell: sweep(lambda further: run_of(options, seed + further), knobs, samples, tell)
    )
    if options.as_json:
        rows = []
        for point in points:
            values = point.answer.as_dict()
            kept = ("interruptions", "ettr", "mttf_hours", "lost_gpu_hours", "lost_usd", "days_to_finish")
            rows.append({"values": point.values} | {key: values[key] for key in kept})
        print(json.dumps({"sweep": rows}, indent=1))
    else:
        console.print(sweep_page(points))


def _under_bar(what: str, work: Callable[[Tell], Result]) -> Result:
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=1.0)
        return work(lambda share: bar.update(task, completed=share))
