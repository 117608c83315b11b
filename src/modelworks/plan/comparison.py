"""Plans side by side as plain values; `report.comparison` and `page.comparison_html` set them out for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from modelworks.plan.planner import Plan


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
