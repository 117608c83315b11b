"""The answers set out for people, in the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Group
from rich.table import Table

from modelworks.simulate.answers import Answer
from modelworks.simulate.comparison import Comparison
from modelworks.simulate.outcome import REASONS
from modelworks.simulate.sweep import Bar, Point
from modelworks.simulate.top500 import Beside


def page(found: Answer) -> Group:
    """The whole answer."""
    parts: list[Any] = [_summary(found), _causes(found), _reasons(found), _machine(found)]
    return Group(*parts)


def duration(seconds: float | None) -> str:
    """A time in the unit that suits it."""
    if seconds is None:
        return "-"
    for unit, size in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.3g} s"


def usd(value: float) -> str:
    """Money in millions or billions."""
    for size, unit in ((1e9, "G$"), (1e6, "M$"), (1e3, "k$")):
        if value >= size:
            return f"{value / size:,.3g} {unit}"
    return f"{value:,.2f} $"


def _summary(found: Answer) -> Table:
    s, out = found.scenario, found.outcome
    run, values = s.run, found.as_dict()
    title = f"{run.name}: {run.cluster.gpus:,} x {run.cluster.device}, {found.samples:,} samples, seed {found.seed}"
    table = Table(title=title, show_header=False)
    inter, ettr, plan = values["interruptions"], values["ettr"], values["checkpoint"]
    at = ", ".join(f"{name} {duration(h * 3600 if h else None)}" for name, h in values["mttf_hours_at"].items())
    rows = [
        ("simulated", f"{values['days']:.1f} days"),
        ("interruptions", f"{inter['mean']:,.1f} unexpected (5 to 95 %: {inter['p5']:,.0f} to {inter['p95']:,.0f}), "
                          f"{values['planned_interruptions']:,.0f} planned, {values['drains']:,.0f} drained before"),
        ("ETTR", f"{ettr['mean']:.1%} (5 to 95 %: {ettr['p5']:.1%} to {ettr['p95']:.1%})"),
        ("mean time to failure", at),
        ("lost", f"{values['lost_gpu_hours']:,.0f} GPU-hours, {usd(values['lost_usd'])}"),
        ("checkpoint", f"every {duration(plan['every_s'])}, in storage every {duration(plan['durable_every_s'])}, "
                       f"{plan['bytes'] / 1e12:.3g} TB, stops the job for "
                       f"{duration(plan['stall_s'])}, written in {duration(plan['write_s'])}"),
        ("best interval", f"{duration(plan['best_interval_s'])} by simulation, "
                          f"{duration(plan['young_daly_s'])} by Young and Daly"),
        ("spare nodes", f"{s.hot} hot, {s.pool} in the pool; {found.spares['p99']} cover 99 % of the losses, "
                        f"{found.spares['p999']} 99.9 %"),
        ("step", f"{duration(values['step_time_s'])}, MFU {values['mfu']:.1%}, slowest rank "
                 f"{s.work.slowest_rank - 1:.2%} behind"),
        ("tokens", f"{values['tokens_per_day'] / 1e9:,.1f} billion a day, {values['useful_tokens'] / 1e12:,.2f} "
                   "trillion in the time"),
    ]  # fmt: skip
    days = found.days_to_finish
    if days is not None:
        shown = ", ".join(f"{name[1:]} %: {value:.1f} days" for name, value in days.items())
        rows.append(("tokens done", f"{shown} ({out.finished.mean():.0%} of the samples)"))
    if run.simulate.target_gpu_hours:
        share = values["gpu_hours"] / run.simulate.target_gpu_hours
        rows.append(("GPU-hours", f"{values['gpu_hours'] / 1e6:,.1f} million, {share:.2f} of the published "
                                  f"{run.simulate.target_gpu_hours / 1e6:,.0f} million"))  # fmt: skip
    if run.simulate.budget_usd:
        bought = found.budget()
        rows.append(("budget", f"{usd(bought['usd'])} buy {bought['gpus']:,} GPUs with their building, "
                               f"{bought['gpus_without_building']:,} without"))  # fmt: skip
    for row in rows:
        table.add_row(*row)
    return table


def _causes(found: Answer) -> Table:
    table = Table("cause", "interruptions", "lost GPU-hours", "a loss costs", title="What stops the run")
    out = found.outcome
    counts, lost = out.interruptions.mean(axis=0), out.causes_s.mean(axis=0)
    drains = out.drains.mean(axis=0)
    for index in sorted(range(len(counts)), key=lambda index: -lost[index]):
        events = counts[index] + drains[index]
        if events > 0:
            table.add_row(
                found.cause_names[index],
                f"{counts[index]:,.1f}",
                f"{found.gpu_hours(lost[index]):,.0f}",
                duration(lost[index] / events),
            )
    return table


def _reasons(found: Answer) -> Table:
    table = Table("where the time goes", "share", "GPU-hours", title="From elapsed to useful time")
    means, elapsed = found.outcome.reasons_s.mean(axis=0), float(found.outcome.elapsed_s.mean())
    table.add_row("useful", f"{found.outcome.useful_s.mean() / elapsed:.2%}", "")
    for index in sorted(range(len(REASONS)), key=lambda index: -means[index]):
        if means[index] > 0:
            table.add_row(REASONS[index], f"{means[index] / elapsed:.2%}", f"{found.gpu_hours(means[index]):,.0f}")
    return table


def _machine(found: Answer) -> Table:
    built = found.machine
    power, cost, counts = built.power, built.cost, built.counts
    table = Table(title="The machine, spare nodes included", show_header=False)
    switches = " + ".join(f"{number:,}" for number in built.network.switches) if built.network else "none"
    for row in (
        ("nodes, racks", f"{counts['node']:,} nodes, {counts['rack']:,} racks"),
        ("switches by level", switches),
        ("cables", ", ".join(f"{number:,} {kind}" for kind, number in built.cables.items() if number) or "none"),
        ("transceivers", ", ".join(f"{n:,} {kind}" for kind, n in built.transceivers.items() if n) or "none"),
        ("power", f"{power.it_w / 1e6:,.1f} MW of IT, {power.total_w / 1e6:,.1f} MW at the meter"),
        ("swing in each step", f"{power.swing_w / 1e6:,.1f} MW; {power.idle_w / 1e6:,.1f} MW while the job is down"),
        ("energy", f"{power.year_wh() / 1e12:,.3g} TWh and {usd(cost.energy_usd_per_year)} a year"),
        ("capital", f"{usd(cost.capital_usd)}: servers {usd(cost.servers_usd)}, network {usd(cost.network_usd)}, "
                    f"building {usd(cost.building_usd)}"),
        ("running", f"{usd(cost.usd_per_year)} a year, {cost.usd_per_gpu_hour:.2f} $ for a GPU-hour"),
    ):  # fmt: skip
        table.add_row(*row)
    return table


def sweep_page(points: Sequence[Point]) -> Table:
    """A sweep, one line for a combination; the best is marked."""
    fields = list(points[0].values)
    table = Table(*fields, "ETTR", "5 to 95 %", "interruptions", "days to finish (50 %)", title="Sweep")
    best = max(points, key=lambda point: point.answer.outcome.ettr.mean())
    for point in points:
        values = point.answer.as_dict()
        ettr, days = values["ettr"], values["days_to_finish"] or {}
        table.add_row(
            *(f"{value:g}" if isinstance(value, int | float) else str(value) for value in point.values.values()),
            f"{ettr['mean']:.2%}",
            f"{ettr['p5']:.1%} to {ettr['p95']:.1%}",
            f"{values['interruptions']['mean']:,.1f}",
            f"{days['p50']:.1f}" if "p50" in days else "-",
            style="bold" if point is best else None,
        )
    return table


def tornado_page(middle: float, bars: Sequence[Bar]) -> Table:
    """What each knob does to the ETTR."""
    table = Table("knob", "halved", "doubled", "", title=f"What matters most (ETTR {middle:.2%})")
    widest = max(bar.width(middle) for bar in bars) or 1.0
    for bar in bars:
        drawn = "█" * max(1, round(24 * bar.width(middle) / widest))
        table.add_row(bar.name, f"{bar.half - middle:+.2%}", f"{bar.double - middle:+.2%}", drawn)
    return table


def beside_page(beside: Beside) -> Group:
    """The cluster beside the machines of the TOP500."""
    table = Table("", "HPL", "HPL-MxP", "bf16 peak", "fp8 peak", "memory", "power", title="Beside the TOP500")
    for row in beside.rows:
        mark = "~" if row.estimated else ""
        table.add_row(
            row.name,
            mark + _exa(row.hpl_flops) if row.hpl_flops else "-",
            mark + _exa(row.hpl_mxp_flops) if row.hpl_mxp_flops else "-",
            _exa(row.bf16_flops),
            _exa(row.fp8_flops),
            f"{row.memory_bytes / 1e15:.2f} PB" if row.memory_bytes else "-",
            f"{row.power_w / 1e6:.1f} MW" if row.power_w else "-",
            style="bold" if row.estimated else None,
        )
    notes = []
    if beside.hpl:
        notes.append(
            f"~HPL: {beside.hpl.method}; {_exa(beside.hpl.low_flops)} to {_exa(beside.hpl.high_flops)} by the others"
        )
    if beside.hpl_mxp:
        low, high = beside.hpl_mxp.low_flops, beside.hpl_mxp.high_flops
        notes.append(f"~HPL-MxP: {beside.hpl_mxp.method}; {_exa(low)} to {_exa(high)} by the others' shares")
    if beside.bisection_bytes:
        notes.append(f"bisection of its network: {beside.bisection_bytes / 1e15:.2f} PB/s in one direction")
    ours = next(row for row in beside.rows if row.estimated)
    if ours.tokens_per_day:
        notes.append(f"tokens of this run in a day: {ours.tokens_per_day / 1e9:,.1f} billion")
    return Group(table, *notes)


def comparison_page(comparison: Comparison) -> Group:
    """Machines compared over the calendar."""
    table = Table(
        "machine", "ETTR", "tokens/day", "done", "cost of the run", "$/M tokens", "J/token",
        title=f"{comparison.tokens / 1e12:,.3g} trillion tokens on each",
    )  # fmt: skip
    for each, ettr in zip(comparison.candidates, comparison.ettrs, strict=True):
        cost = comparison.usd(each)
        table.add_row(
            each.name,
            f"{ettr:.1%}",
            f"{each.tokens_per_s * 86400 / 1e9:,.0f} G",
            each.finish(comparison.tokens).date().isoformat(),
            usd(cost),
            f"{cost / comparison.tokens * 1e6:.3g}",
            f"{each.joules_per_token():.3g}",
        )
    lines = [f"{who} overtakes {whom} on {on.isoformat()}" for who, whom, on in comparison.overtakings]
    lines.append(f"first: {comparison.first.name}; cheapest: {comparison.cheapest.name}")
    return Group(table, *lines)


def _exa(flops: float | None) -> str:
    return f"{flops / 1e18:.3g} EF" if flops else "-"
