"""A run in the terminal: a live panel for people, plain lines for logs.

The panel draws from a run's status and the losses logged so far, so that the process which trains and `runs watch`
show the same.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any, Protocol, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from modelworks.spec.hardware import DeviceSpec
from modelworks.train.record import MetricsReader, RunRecord, Status

_BLOCKS = " ▁▂▃▄▅▆▇█"
_LINE_EVERY_S = 10.0


class View(Protocol):
    """What shows a run while it goes on."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def show(self, status: Status, rows: Iterable[Mapping[str, Any]] = ()) -> None:
        """Show where the run stands, with the steps logged since the last call."""


class LiveView:
    """A panel that is drawn anew in place."""

    def __init__(self, name: str, console: Console) -> None:
        self._name, self._console = name, console
        self._losses: list[float] = []
        self._live = Live(console=console, refresh_per_second=4, transient=False)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def show(self, status: Status, rows: Iterable[Mapping[str, Any]] = ()) -> None:
        """Draw the panel with the new rows' losses, or rewards, added to the curve."""
        self._losses += [value for row in rows if (value := row.get("reward", row["loss"])) is not None]
        self._live.update(panel(self._name, status, self._losses, self._console.width))

    def restart(self) -> None:
        """Forget the curve: the run went back to a checkpoint."""
        self._losses = []


class NoView:
    """Shows nothing: for programs."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def show(self, status: Status, rows: Iterable[Mapping[str, Any]] = ()) -> None:
        """Show where the run stands; nothing here."""


class PlainView(NoView):
    """A line every few seconds, at each validation and when the state changes."""

    def __init__(self, name: str, console: Console) -> None:
        self._name, self._console = name, console
        self._shown, self._state = float("-inf"), ("", "")

    def restart(self) -> None:
        """Lines that are printed stay."""

    def show(self, status: Status, rows: Iterable[Mapping[str, Any]] = ()) -> None:
        """Print a line if there is news or some seconds have passed."""
        state = (status.state, status.message or "")
        validated = any(row.get("validation_bpb") is not None for row in rows)
        now = time.monotonic()
        if state == self._state and not validated and now - self._shown < _LINE_EVERY_S:
            return
        self._shown, self._state = now, state
        facts = "  ".join(f"{name} {value}" for name, value in _facts(status))
        self._console.print(f"{self._name}: {status.state}  {facts}", highlight=False, soft_wrap=True, markup=False)


def view_for(name: str, console: Console) -> LiveView | PlainView:
    """A panel on a terminal, plain lines elsewhere."""
    return LiveView(name, console) if console.is_terminal else PlainView(name, console)


def watch(record: RunRecord, console: Console) -> None:
    """Show a run until it ends. The run doesn't notice."""
    reader = MetricsReader(record.folder)
    with view_for(record.name, console) as view:
        while True:
            status = record.status()
            rows, restarted = reader.read()
            if restarted:
                view.restart()
            view.show(status, rows)
            if not status.active:
                return
            time.sleep(0.5)


def panel(name: str, status: Status, losses: list[float], width: int) -> Panel:
    """A run at a glance: the curve of its loss, its figures, how far it is; `width` is the terminal's."""
    parts: list[RenderableType] = [plot(losses, max(20, min(100, width - 20)), 6)] if losses else []
    figures = Table.grid(padding=(0, 3))
    for fact, value in _facts(status):
        figures.add_row(Text(fact, style="dim"), value)
    parts.append(figures)
    if status.steps:
        parts.append(ProgressBar(total=_end(status), completed=status.step, width=None))
    return Panel(Group(*parts), title=f"{name}: {status.state}", title_align="left")


def runs_table(runs: list[tuple[str, Status]]) -> Table:
    """Runs with where they stand, one per line."""
    table = Table("run", "state", "step", "loss", "bits per byte", "tokens/s", "ETA", "note", box=None)
    for name, status in runs:
        table.add_row(
            name,
            status.state,
            f"{status.step:,}/{status.steps:,}" if status.steps else "",
            _number(status.loss, ".4f"),
            _number(status.validation_bpb, ".4f"),
            _number(status.tokens_per_s, ",.0f"),
            duration(status.eta_s) if status.active and status.eta_s is not None else "",
            f"chat as {status.served_as}" if status.served_as else status.message,
        )
    return table


def comparison_table(compared: Mapping[str, Any]) -> Table:
    """A plan beside its measurement, one quantity per line; then what a step's time goes to."""
    table = Table("", "planned", "measured", "measured / planned", box=None)
    for quantity, values in compared.items():
        if quantity != "reasons":
            table.add_row(quantity, *_numbers(values))
    for reason, values in compared["reasons"].items():
        if any(values.values()):
            table.add_row(f"  {REASONS[reason]}, s", *_numbers(values))
    return table


REASONS = {
    "compute": "forward and backward passes",
    "tensor": "tensor-parallel exchanges",
    "context": "context-parallel exchanges",
    "expert": "expert-parallel exchanges",
    "data": "exchanges over replicas",
    "bubble": "waiting for other stages",
    "optimizer": "clipping and optimizer",
    "host": "data, logging",
    "jitter": "waiting for the slowest process",
}
"""What each measured reason is called."""


def _numbers(values: Mapping[str, float | None]) -> list[str | None]:
    return [_number(values[column], ".4g") for column in ("planned", "measured", "ratio")]


def dry_run_table(report: Mapping[str, Any]) -> Table:
    """What some of a run's processes would hold, beside the plan: one process per line."""
    gib = 2.0**30
    title = f"{report['name']} on {report['processes']:,} processes: {report['layout']}"
    title += "".join(f", without {field}" for field in report["without"])
    table = Table(
        "rank", "stage", "layers", "parameters", "weights", "gradients", "optimizer", "planned", "ratio",
        box=None, pad_edge=False, collapse_padding=True, title=f"{title}; in GiB", title_justify="left",
    )  # fmt: skip
    for row in report["ranks"]:
        table.add_row(
            f"{row['rank']:,}", f"{row['stage']}", str(row["layers"]), f"{row['parameters'] / 1e9:,.3f} B",
            *(f"{row[name] / gib:,.2f}" for name in ("weights", "gradients", "optimizer")),
            f"{sum(row['planned'].values()) / gib:,.2f}", f"{row['ratio']['state']:.4f}",
        )  # fmt: skip
    return table


def bench_tables(device: DeviceSpec) -> list[Table]:
    """What was measured of a machine by shape and by size; nothing where only its peaks were."""
    if not device.gemm_measured:
        return []
    rates = Table("matrix product", "threads", "precision", "GFLOP/s", box=None)
    for gemm in device.gemm_measured:
        if gemm.m == gemm.n == gemm.k:
            rate = 2 * gemm.m * gemm.n * gemm.k / gemm.time_s / 1e9
            rates.add_row(f"{gemm.m} x {gemm.n} x {gemm.k}", str(gemm.threads), gemm.precision, f"{rate:,.1f}")
    exchanges = Table("collective", "processes", "bytes", "time", "GB/s", box=None)
    for one in device.collectives_measured:
        rate = one.bytes / one.time_s / 1e9
        exchanges.add_row(one.kind, str(one.ranks), f"{one.bytes:,}", f"{one.time_s * 1e3:.3f} ms", f"{rate:.2f}")
    rest = Table("", "", box=None, show_header=False)
    for name, value, scale, unit in (
        ("elementwise bandwidth", device.elementwise_bandwidth_bytes, 1e9, "GB/s"),
        ("overhead per operator", device.operator_overhead_s, 1e-6, "us"),
        ("overhead per layer", device.layer_overhead_s, 1e-6, "us"),
        ("overhead per step", device.step_overhead_s, 1e-6, "us"),
        ("disk, writing", device.disk_write_bytes, 1e9, "GB/s"),
        ("disk, reading", device.disk_read_bytes, 1e9, "GB/s"),
    ):
        rest.add_row(name, "" if value is None else f"{value / scale:,.2f} {unit}")
    return [rates, exchanges, rest]


def plot(values: list[float], width: int, height: int) -> Text:
    """A curve of `values` in `width` columns and `height` lines of block characters, its range written beside it."""
    count = min(width, len(values))
    edges = [round(i * len(values) / count) for i in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, high = min(means), max(means)
    eighths = [1 + round((mean - low) / ((high - low) or 1) * (height * 8 - 1)) for mean in means]
    lines = []
    for line in reversed(range(height)):
        label = f"{high:9.3f} " if line == height - 1 else f"{low:9.3f} " if line == 0 else " " * 10
        lines.append(label + "".join(_BLOCKS[max(0, min(8, eighth - line * 8))] for eighth in eighths))
    return Text("\n".join(lines), style="cyan", no_wrap=True)


def duration(seconds: float) -> str:
    """A time as people say it: ``2h 05min``, ``3min 20s``, ``14s``."""
    total = round(seconds)
    if total >= 3600:
        return f"{total // 3600}h {total % 3600 // 60:02d}min"
    return f"{total // 60}min {total % 60:02d}s" if total >= 60 else f"{total}s"


def _end(status: Status) -> float:
    """The steps that the run will have made: a time budget ends it before its tokens do."""
    if status.state == "running" and status.eta_s is not None and status.tokens_per_s and status.step:
        per_step = status.tokens / status.step
        return min(float(status.steps or 0), status.step + status.eta_s * status.tokens_per_s / per_step)
    return float(status.steps or 0) if status.active else float(max(1, status.step))


def _facts(status: Status) -> list[tuple[str, str]]:
    shown = [
        ("step", f"{status.step:,} of {status.steps:,}" if status.steps else None),
        ("tokens", f"{status.tokens:,}" if status.tokens else None),
        ("loss", _number(status.loss, ".4f")),
        ("reward", _number(status.reward, ".4f")),
        ("validation", _number(status.validation_bpb, ".4f", " bits per byte")),
        ("speed", _number(status.tokens_per_s, ",.0f", " tokens/s")),
        ("MFU", _number(status.mfu, ".1%")),
        ("ETA", duration(status.eta_s) if status.eta_s is not None else None),
        ("note", status.message),
    ]
    return [(name, value) for name, value in shown if value]


def _number(value: float | None, form: str, unit: str = "") -> str | None:
    return None if value is None else format(value, form) + unit
