"""Quantities as people read them; an en dash where there is none."""

from __future__ import annotations

NONE = "–"


def number(value: float | None, digits: int) -> str:
    """A number with so many digits behind the point."""
    return NONE if value is None else f"{value:,.{digits}f}"


def count(value: float | None) -> str:
    """A large number in thousands, millions or billions."""
    if value is None:
        return NONE
    for size, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "K")):
        if value >= size:
            return f"{value / (1e3 if suffix == 'K' else size):.3g}{suffix}"
    return f"{value:,.0f}"


def per_cent(share: float | None) -> str:
    """A share of one in per cent."""
    return NONE if share is None else f"{share * 100:.1f} %"


def size(in_bytes: float) -> str:
    """A file's size, in SI units as files are listed."""
    for unit, bytes_ in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if in_bytes >= bytes_:
            return f"{in_bytes / bytes_:.3g} {unit}"
    return f"{in_bytes:.0f} B"


def duration(seconds: float | None) -> str:
    """A time in its two largest units."""
    if seconds is None:
        return NONE
    whole = round(seconds)
    for larger, smaller, per in (("d", "h", 86400), ("h", "min", 3600), ("min", "s", 60)):
        if whole >= per:
            rest = whole % per // {"d": 3600, "h": 60, "min": 1}[larger]
            return f"{whole // per} {larger}" + (f" {rest} {smaller}" if rest else "")
    return f"{whole} s"
