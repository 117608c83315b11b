"""A plan set out for people."""

from __future__ import annotations

from rich.console import Group
from rich.markup import escape
from rich.table import Table

from modelworks.plan.planner import Plan


def page(plan: Plan) -> Group:
    """The plan as tables for the terminal."""
    run, device, gib = plan.run, plan.device, 2**30
    table = Table(title=escape(f"{plan.name}: {run.model.name} on {plan.devices:,} x {device.name}"), show_header=False)
    layout = plan.best.layout
    degrees = ", ".join(f"{name} {layout[name]}" for name in ("tensor", "pipeline", "context", "expert", "data"))
    sequences = f"{run.train.global_batch:,} of {run.train.seq_len:,} tokens, {plan.micro_batch} at a time"
    peak = device.peak_flops[plan.precision]  # type: ignore[index]
    cost = plan.cost
    rows = [
        ("parameters", f"{run.model.parameters.total:,}, one token uses {run.model.parameters.active:,}"),
        ("layout", degrees),
        ("sequences per step", sequences),
        ("precision", plan.precision),
        ("time per step", f"{plan.step_time_s:.3g} s"),
        ("throughput", f"{plan.tokens_per_s:,.0f} tokens/s"),
        ("MFU", f"{plan.mfu:.1%} of {peak / 1e12:,.4g} TFLOP/s"),
        ("memory", f"{plan.memory_bytes / gib:,.1f} GiB of {device.memory_bytes / gib:,.1f} GiB"),
        ("whole run", f"{plan.steps:,} steps, {_duration(plan.run_time_s)}"),
        ("device hours, energy", f"{cost.device_hours:,.0f} h, {cost.energy_kwh:,.0f} kWh"),
    ]
    if cost.rent_usd is not None:
        rows.append(("rented", f"{cost.rent_usd:,.0f} USD"))
    for name, value in rows:
        table.add_row(name, value)
    losses = Table("what is lost", "points of MFU", title="from peak to achieved")
    for loss in plan.waterfall:
        if abs(loss.share) >= 0.0005:
            losses.add_row(loss.words, f"{100 * loss.share:.1f}")
    losses.add_row("achieved", f"{100 * plan.mfu:.1f}")
    others = Table("slower", "layout", "why", title="next best layouts")
    for other in plan.alternatives:
        degrees = " ".join(
            f"{name} {other.candidate.layout[name]}" for name in ("tensor", "pipeline", "context", "expert")
        )
        others.add_row(f"{other.slower:.1%}", degrees, other.why)
    parts: list[Table | str] = [table, losses]
    if plan.alternatives:
        parts.append(others)
    parts += [escape(f"note: {note}") for note in plan.notes]
    return Group(*parts)


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.1f} s"
