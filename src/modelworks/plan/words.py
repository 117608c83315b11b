"""A plan's quantities and layouts as people read them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NONE = "–"
_DEGREES = (
    ("tensor", "TP"),
    ("pipeline", "PP"),
    ("context", "CP"),
    ("expert", "EP"),
    ("expert_tensor", "ETP"),
    ("data", "DP"),
)
_RECOMPUTE = {
    "none": "no recomputation",
    "selective": "attention recomputed",
    "projections": "all but attention's projections recomputed",
    "full": "full recomputation",
}
_ZERO = ("replicated state", "ZeRO-1", "ZeRO-2", "FSDP")


def seconds(value: float | None) -> str:
    """A short time, three digits."""
    if value is None:
        return NONE
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if value >= size:
            return f"{_three(value / size)} {unit}"
    return f"{value * 1e6:.2g} µs" if value else "0 s"


def round_seconds(value: float) -> str:
    """A round time, as on an axis."""
    return f"{value:,.4g} s" if value >= 1 else f"{value * 1e3:.4g} ms"


def duration(value: float | None) -> str:
    """A long time in the unit that people would say it in."""
    if value is None:
        return NONE
    for unit, size in (("years", 365.25 * 86400), ("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if value >= 2 * size:
            return f"{_three(value / size)} {unit}"
    return seconds(value)


def percent(share: float, sign: bool = False) -> str:
    """A share of one in per cent, one digit behind the point."""
    return f"{share * 100:+.1f} %" if sign else f"{share * 100:.1f} %"


def count(value: float | None) -> str:
    """A large number in thousands, millions, billions or trillions."""
    if value is None:
        return NONE
    for size, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if value >= size:
            return f"{_three(value / size)} {suffix}"
    return f"{value:,.0f}"


def money(value: float | None) -> str:
    """US dollars."""
    if value is None:
        return NONE
    for size, suffix in ((1e9, "billion"), (1e6, "million")):
        if value >= size:
            return f"${_three(value / size)} {suffix}"
    return f"${value:,.0f}" if value >= 100 else f"${value:,.2f}"


def gib(value: float) -> str:
    """Memory, as vendors state it."""
    return f"{value / 2**30:,.1f} GiB"


def energy(kwh: float | None) -> str:
    """Energy given in kWh."""
    if kwh is None:
        return NONE
    for size, unit in ((1e6, "GWh"), (1e3, "MWh")):
        if kwh >= size:
            return f"{_three(kwh / size)} {unit}"
    return f"{_three(kwh)} kWh"


def layout_name(layout: Mapping[str, Any]) -> str:
    """A layout's degrees in the field's short form: ``TP4 PP8 EP8 DP16, micro batch 1``."""
    parts = [f"{short}{layout[name]}" for name, short in _DEGREES if layout[name] > 1 or name == "data"]
    name = " ".join(parts)
    if layout["virtual_stages"] > 1:
        name += f" VP{layout['virtual_stages']}"
    return f"{name} MB{layout['micro_batch']}"


def layout_details(layout: Mapping[str, Any]) -> str:
    """What a layout is beyond its degrees: schedule, recomputation, sharding, precision."""
    again = _RECOMPUTE[layout["recompute"]]
    share = layout["recompute_share"]
    if layout["recompute"] != "none" and share < 1:
        again += f" in {percent(share)} of the layers"
    parts = [layout["precision"], again, sharding(layout)]
    if layout["pipeline"] > 1:
        parts.insert(1, f"{layout['schedule']} schedule")
    if layout["tensor"] > 1 and layout["sequence_parallel"]:
        parts.append("sequence parallel")
    return ", ".join(parts)


def sharding(layout: Mapping[str, Any]) -> str:
    """How state is sharded over replicas."""
    ranks = layout["data"] * layout["context"]
    if ranks == 1:
        return "one replica"
    stage = layout["zero_stage"]
    name = _ZERO[stage]
    if stage and 1 < layout["shards"] < ranks:
        name = f"{'HSDP' if stage == 3 else name} in groups of {layout['shards']}"
    return name


def _three(value: float) -> str:
    """Three digits, without an exponent."""
    if value >= 99.95:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def layout_sentence(layout: Mapping[str, Any]) -> str:
    """A layout for those who don't know the short form."""
    ranks = layout["tensor"] * layout["pipeline"] * layout["context"]
    ways = [f"{layout[name]}-way {name}" for name in ("tensor", "pipeline", "context") if layout[name] > 1]
    if ranks == 1:
        text = "Each device holds the whole model"
    else:
        text = f"Each copy of the model is spread over {ranks:,} devices ({', '.join(ways)} parallel)"
    if layout["expert"] > 1:
        text += f", its experts over {layout['expert'] * layout['expert_tensor']:,}"
    copies = "one copy works" if layout["data"] == 1 else f"{layout['data']:,} copies work side by side"
    batch = "1 sequence" if layout["micro_batch"] == 1 else f"{layout['micro_batch']} sequences"
    return f"{text}; {copies}, {batch} at a time."
