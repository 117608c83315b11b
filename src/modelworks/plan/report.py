"""A plan set out in the terminal, the answer first, with bars where lengths say more than digits.

Tables give their middle column to a bar that takes what width is left, so that 80 columns are enough.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.bar import Bar
from rich.markup import escape
from rich.table import Table

from modelworks.plan.planner import Candidate
from modelworks.plan.waterfall import MEMORY_NAMES, Loss, folded
from modelworks.plan.words import gib

_LOSS, _KEPT, _WHOLE = "yellow", "green", "bright_black"
_PARTS = ("cyan", "blue", "yellow", "magenta", "green", "bright_blue", "bright_black")


def waterfall_table(losses: Sequence[Loss], mfu: float) -> Table:
    """From the peak down to what is achieved, in points of MFU; arguments as of `page.waterfall_markup`."""
    table = _bars("From the devices' peak to what is achieved, in points of MFU")
    table.add_row("peak of the devices", Bar(100, 0, 100, color=_WHOLE), "100.0")
    top = 100.0
    for loss in folded(losses):
        low, high = sorted((top - loss.points, top))
        table.add_row(loss.name, Bar(100, low, high, color=_LOSS), f"{-loss.points:+.1f}")
        top -= loss.points
    table.add_row("achieved: MFU", Bar(100, 0, 100 * mfu, color=_KEPT), f"{100 * mfu:.1f}", style="bold")
    return table


def memory_table(candidate: Candidate, capacity_bytes: float) -> Table:
    """What a device of the fullest stage holds, against what it has."""
    table = _bars("Memory of a device of the fullest stage")
    size, start = max(candidate.memory_bytes, capacity_bytes), 0.0
    for number, (component, held) in enumerate(candidate.memory.items()):
        if held:
            bar = Bar(size, start, start + held, color=_PARTS[number % len(_PARTS)])
            table.add_row(escape(MEMORY_NAMES.get(component, component)), bar, gib(held))
            start += held
    over = candidate.memory_bytes > capacity_bytes
    whole = Bar(size, 0, candidate.memory_bytes, color="red" if over else _KEPT)
    table.add_row("in all", whole, gib(candidate.memory_bytes), style="bold")
    table.add_row("the device has", Bar(size, 0, capacity_bytes, color=_WHOLE), gib(capacity_bytes))
    return table


def _bars(title: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", show_header=False, box=None, expand=True)
    table.add_column(width=27, no_wrap=True)
    table.add_column(ratio=1, min_width=10)
    table.add_column(justify="right", width=10, no_wrap=True)
    return table
