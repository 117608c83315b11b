"""Plans side by side: the same questions, one column for each run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from modelworks.plan.planner import Plan

_DEGREES = ("tensor", "pipeline", "context", "expert", "expert_tensor", "data", "virtual_stages", "micro_batch")


def compared(plans: Sequence[Plan]) -> dict[str, Any]:
    """Plain values for JSON: each plan's `as_dict()`, and what the others take over what the first takes.

    Ratios are of quantities that should be small (time, energy, money) and of throughput and MFU, as named.
    """
    first = _quantities(plans[0])
    ratios = [
        {
            name: value / base if value is not None and (base := first[name]) else None
            for name, value in _quantities(plan).items()
        }
        for plan in plans
    ]
    return {"plans": [plan.as_dict() for plan in plans], "ratios_to_first": ratios}


def table(plans: Sequence[Plan]) -> Table:
    """The same for the terminal."""
    shown = Table("", *(escape(plan.name) for plan in plans), title="side by side")
    columns = [_words(plan) for plan in plans]
    for name in columns[0]:
        shown.add_row(name, *(escape(column[name]) for column in columns))
    return shown


def _quantities(plan: Plan) -> dict[str, float | None]:
    return {
        "step_time_s": plan.step_time_s,
        "tokens_per_s": plan.tokens_per_s,
        "mfu": plan.mfu,
        "memory_bytes": plan.memory_bytes,
        "run_time_s": plan.run_time_s,
        "device_hours": plan.cost.device_hours,
        "energy_kwh": plan.cost.energy_kwh,
        "power_w": plan.cost.power_w,
        "rent_usd": plan.cost.rent_usd,
        "buy_usd": plan.cost.buy_usd,
        "owned_usd": plan.cost.owned_usd,
    }


def _words(plan: Plan) -> dict[str, str]:
    layout, cost, gib = plan.best.layout, plan.cost, 2**30
    largest = max(plan.waterfall, key=lambda loss: loss.share)
    return {
        "model": plan.run.model.name,
        "devices": f"{plan.devices:,} x {plan.device.name}",
        "layout": ", ".join(f"{name} {layout[name]}" for name in _DEGREES if layout[name] > 1) or "one device",
        "precision": plan.precision,
        "time per step": f"{plan.step_time_s:.4g} s",
        "throughput": f"{plan.tokens_per_s:,.0f} tokens/s",
        "MFU": f"{plan.mfu:.1%}",
        "largest loss": f"{largest.words}, {100 * largest.share:.1f} points",
        "memory": f"{plan.memory_bytes / gib:,.1f} of {plan.device.memory_bytes / gib:,.1f} GiB",
        "whole run": f"{plan.run_time_s / 86400.0:,.1f} days",
        "device hours": f"{cost.device_hours:,.0f}",
        "energy": f"{cost.energy_kwh / 1000.0:,.1f} MWh at {cost.power_w / 1e6:,.2f} MW",
        "rented": _usd(cost.rent_usd),
        "bought": _usd(cost.buy_usd),
        "its share of what was bought": _usd(cost.owned_usd),
    }


def _usd(value: float | None) -> str:
    return "no price known" if value is None else f"{value:,.0f} USD"
