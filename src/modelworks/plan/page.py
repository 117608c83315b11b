"""A plan's parts as markup: the waterfall, the memory, the layouts; for its own page and for the web app's.

Bars are cells of tables with a coloured part, so that they take any width, are read out by a screen reader, and need
no script. Every name is escaped where it is put into markup.
"""

from __future__ import annotations

from collections.abc import Sequence

from modelworks.plan.chart import COLOURS, escaped
from modelworks.plan.planner import Candidate
from modelworks.plan.waterfall import MEMORY_NAMES, Loss, folded
from modelworks.plan.words import gib, seconds

Figure = tuple[str, str]
"""A quantity in words, and what it is."""


def figures(values: Sequence[Figure]) -> str:
    """Quantities set out large, each above what it is."""
    cells = "".join(f"<div><dd>{escaped(value)}</dd><dt>{escaped(what)}</dt></div>" for value, what in values)
    return f'<dl class="plan-figures">{cells}</dl>'


def waterfall_markup(losses: Sequence[Loss], mfu: float) -> str:
    """From the peak down to what is achieved; `losses` as `waterfall` gives them, `mfu` as a share of one."""
    rows = [_row("peak of the devices", 0.0, 100.0, "100.0", "What the devices would do at their peak.", "whole")]
    top = 100.0
    for loss in folded(losses):
        low, high = sorted((top - loss.points, top))
        tip = f"{loss.meaning}\n{seconds(loss.seconds)} of a step, {loss.points:.2f} points of MFU"
        rows.append(_row(loss.name, low, high, f"{-loss.points:+.1f}".replace("-", "−"), tip, "loss"))
        top -= loss.points
    achieved = f"The model's own FLOPs: {100 * mfu:.2f} % of peak."
    rows.append(_row("achieved: MFU", 0.0, 100 * mfu, f"{100 * mfu:.1f}", achieved, "whole kept"))
    return _bars("What each reason costs, in points of MFU", rows)


def memory_markup(candidate: Candidate, capacity_bytes: float) -> str:
    """What a device of the fullest stage holds, against what it has."""
    size = max(candidate.memory_bytes, capacity_bytes)
    parts, rows, start = [], [], 0.0
    for number, (component, held) in enumerate(candidate.memory.items()):
        if not held:
            continue
        name, share = MEMORY_NAMES.get(component, component), 100 * held / size
        colour = COLOURS[number % len(COLOURS)]
        tip = escaped(f"{name}\n{gib(held)}, {held / capacity_bytes:.1%} of the device's memory")
        parts.append(f'<i style="width:{share:.3f}%;background:{colour}" data-tip="{tip}"></i>')
        rows.append(_row(name, start, start + share, gib(held), "", "part", colour))
        start += share
    limit = f'<b style="left:{100 * capacity_bytes / size:.2f}%"></b>' if candidate.memory_bytes > capacity_bytes else ""
    over = candidate.memory_bytes - capacity_bytes
    said = f"{gib(candidate.memory_bytes)} of {gib(capacity_bytes)}"
    said += f": {gib(over)} too much" if over > 0 else f", {gib(-over)} free"
    whole = f'<div class="plan-stack{" over" if over > 0 else ""}" role="img" aria-label="{said}">{"".join(parts)}{limit}</div>'
    return f'<p class="said">{said}</p>{whole}{_bars("Memory by component", rows)}'


def _row(name: str, start: float, end: float, value: str, tip: str, kind: str, colour: str = "") -> str:
    """A named bar from `start` to `end` per cent."""
    place = f"left:{start:.3f}%;width:{max(0.0, end - start):.3f}%" + (f";background:{colour}" if colour else "")
    said = f' data-tip="{escaped(tip)}"' if tip else ""
    return (
        f'<tr class="{kind}"{said}><th scope="row">{escaped(name)}</th>'
        f'<td class="track"><div><i style="{place}"></i></div></td><td class="number">{escaped(value)}</td></tr>'
    )


def _bars(title: str, rows: Sequence[str]) -> str:
    return f'<table class="plan-bars" aria-label="{escaped(title)}"><tbody>{"".join(rows)}</tbody></table>'
