"""Charts as SVG, by hand: no script, no font and no file from elsewhere, so that a page stays whole in one file.

Each function returns an ``<svg>`` element; colours come from the page's style (``currentColor`` and CSS variables), and
what a mark stands for is its ``<title>``, which browsers show as a tooltip.
"""

from __future__ import annotations

import html
import itertools
from collections.abc import Sequence

WIDTH = 960
COLOURS = ("#0f766e", "#b45309", "#6d28d9", "#be123c", "#1d4ed8", "#4d7c0f", "#0e7490", "#a21caf", "#57534e")


def bars(rows: Sequence[tuple[str, float, str]], unit: str = "") -> str:
    """Horizontal bars: (name, value, what is written behind it)."""
    height = 22
    largest = max((value for _, value, _ in rows), default=0.0) or 1.0
    parts = []
    for number, (name, value, note) in enumerate(rows):
        y, length = number * height, 520 * value / largest
        parts.append(
            f'<text x="170" y="{y + 15}" text-anchor="end">{html.escape(name)}</text>'
            f'<rect x="180" y="{y + 3}" width="{length:.1f}" height="{height - 7}" rx="2" fill="{COLOURS[0]}">'
            f"<title>{html.escape(name)}: {html.escape(note)}</title></rect>"
            f'<text x="{188 + length:.1f}" y="{y + 15}" class="quiet">{html.escape(note)}</text>'
        )
    return _svg(len(rows) * height + 4, parts, unit)


def waterfall(steps: Sequence[tuple[str, float]]) -> str:
    """What is left after each step, as shares of the first."""
    height, top = 24, steps[0][1] or 1.0
    parts, before = [], top
    for number, (name, left) in enumerate(steps):
        y = number * height
        kept, lost = 620 * left / top, 620 * (before - left) / top
        parts.append(
            f'<text x="210" y="{y + 16}" text-anchor="end">{html.escape(name)}</text>'
            f'<rect x="220" y="{y + 3}" width="{kept:.1f}" height="{height - 7}" fill="{COLOURS[0]}"/>'
            f'<rect x="{220 + kept:.1f}" y="{y + 3}" width="{lost:.1f}" height="{height - 7}" fill="{COLOURS[3]}">'
            f"<title>{html.escape(name)}: {(before - left) / top:.2%} of the peak</title></rect>"
            f'<text x="{228 + kept + lost:.1f}" y="{y + 16}" class="quiet">{left / top:.2%}</text>'
        )
        before = left
    return _svg(len(steps) * height + 4, parts)


def histogram(values: Sequence[float], bins: int = 40, unit: str = "") -> str:
    """How often which value came."""
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    counts = [0] * bins
    for value in values:
        counts[min(bins - 1, int((value - low) / span * bins))] += 1
    most = max(counts)
    parts = []
    for number, count in enumerate(counts):
        tall = 130 * count / most
        begin = low + span * number / bins
        parts.append(
            f'<rect x="{20 + number * 22}" y="{140 - tall:.1f}" width="20" height="{tall:.1f}" fill="{COLOURS[0]}">'
            f"<title>{begin:.4g} to {begin + span / bins:.4g}{unit}: {count}</title></rect>"
        )
    parts.append(f'<text x="20" y="158" class="quiet">{low:.4g}{unit}</text>')
    parts.append(f'<text x="{20 + bins * 22}" y="158" text-anchor="end" class="quiet">{high:.4g}{unit}</text>')
    return _svg(164, parts)


def lines(
    series: Sequence[tuple[str, Sequence[float], Sequence[float]]],
    x_ticks: Sequence[tuple[float, str]],
    unit: str = "",
) -> str:
    """Lines over a common axis: (name, x, y)."""
    xs = [x for _, along, _ in series for x in along]
    ys = [y for _, _, up in series for y in up]
    left, right, top = min(xs), max(xs) or 1.0, max(ys) or 1.0

    def at(x: float, y: float) -> str:
        return f"{60 + 880 * (x - left) / ((right - left) or 1.0):.1f},{240 - 220 * y / top:.1f}"

    parts = [f'<text x="54" y="24" text-anchor="end" class="quiet">{top:.3g}{unit}</text>']
    parts.append('<path d="M60 20V240H940" class="axis"/>')
    for x, label in x_ticks:
        place = at(x, 0).split(",")[0]
        parts.append(f'<text x="{place}" y="256" text-anchor="middle" class="quiet">{html.escape(label)}</text>')
    for number, (name, along, up) in enumerate(series):
        colour = COLOURS[number % len(COLOURS)]
        points = " ".join(at(x, y) for x, y in zip(along, up, strict=True))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<rect x="80" y="{30 + 18 * number}" width="12" height="4" fill="{colour}"/>')
        parts.append(f'<text x="98" y="{36 + 18 * number}">{html.escape(name)}</text>')
    return _svg(264, parts)


def timeline(spans: Sequence[tuple[float, float, str, str]], total: float, rows: int = 8) -> str:
    """A replica's time, read like lines of text: (begin, end, kind, note); kinds are `running`, `down`, `planned`."""
    colours = {"running": COLOURS[0], "down": COLOURS[3], "planned": COLOURS[1]}
    per_row = total / rows
    parts = [
        f'<text x="56" y="{row * 34 + 20}" text-anchor="end" class="quiet">day {row * per_row:.0f}</text>'
        for row in range(rows)
    ]
    for begin, end, kind, note in spans:
        while begin < end:
            row = min(rows - 1, int(begin / per_row))
            stop = min(end, (row + 1) * per_row) if row < rows - 1 else end
            x, wide = 64 + 880 * (begin - row * per_row) / per_row, 880 * (stop - begin) / per_row
            tip = f"<title>{html.escape(note)}</title>" if note else ""
            parts.append(
                f'<rect x="{x:.2f}" y="{row * 34 + 4}" width="{max(wide, 0.8):.2f}" height="24" fill="{colours[kind]}">'
                f"{tip}</rect>"
            )
            if stop <= begin:
                break
            begin = stop
    return _svg(rows * 34 + 4, parts)


def hall(racks: int, racks_per_row: int, rows_per_hall: int, gpus_per_rack: int, struck: Sequence[int] = ()) -> str:
    """The machine from above: halls of rows of racks; racks where something failed are red.

    A single rack is drawn as large as the picture allows, a hundred thousand GPUs as small as they must be.
    """
    per_hall = racks_per_row * rows_per_hall
    halls = max(1, -(-racks // per_hall))
    columns = min(racks, racks_per_row)
    across = min(halls, 4) if halls > 1 else 1
    hall_width = (WIDTH - 20 * (across + 1)) / across
    cell = min(hall_width / columns, 26.0)
    lines_in_hall = min(rows_per_hall, -(-racks // racks_per_row))
    row_height = cell * 1.5
    hall_height = lines_in_hall * row_height + 26
    red = set(struck)
    parts = []
    for number in range(halls):
        left = 20 + (number % across) * (hall_width + 20)
        top = 8 + (number // across) * (hall_height + 12)
        here = min(per_hall, racks - number * per_hall)
        parts.append(
            f'<rect x="{left - 8:.1f}" y="{top:.1f}" width="{columns * cell + 16:.1f}" height="{hall_height:.1f}" '
            f'rx="4" class="hall"><title>hall {number + 1}: {here:,} racks, {here * gpus_per_rack:,} GPUs</title>'
            "</rect>"
            f'<text x="{left:.1f}" y="{top + 14:.1f}" class="quiet">hall {number + 1}</text>'
        )
        for place in range(here):
            rack = number * per_hall + place
            x, y = left + place % racks_per_row * cell, top + 20 + place // racks_per_row * row_height
            colour = COLOURS[3] if rack in red else COLOURS[0]
            parts.append(
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{cell * 0.86:.1f}" height="{cell:.1f}" fill="{colour}" '
                f'data-rack="{rack}"><title>rack {rack}: {gpus_per_rack} GPUs</title></rect>'
            )
    total = 8 + -(-halls // across) * (hall_height + 12)
    return _svg(total, parts)


def network(levels: Sequence[tuple[str, int]], most: int = 48) -> str:
    """The switches, level above level, leaves lowest; a square stands for several where there are many."""
    parts, places = [], []
    for row, (name, number) in enumerate(reversed(levels)):
        squares = min(number, most)
        each = -(-number // squares)
        step = 760 / squares
        xs = [170 + step * (square + 0.5) for square in range(squares)]
        y = 14 + row * 44
        places.append((xs, y))
        parts.append(f'<text x="150" y="{y + 9}" text-anchor="end">{number:,} {html.escape(name)}</text>')
        tip = f"<title>{html.escape(name)}: {each:,} switches</title>" if each > 1 else ""
        parts += [
            f'<rect x="{x - 5:.1f}" y="{y}" width="10" height="10" rx="2" fill="{COLOURS[4]}">{tip}</rect>' for x in xs
        ]
    for (above, high), (below, low) in itertools.pairwise(places):
        parts += [
            f'<path d="M{x:.1f} {low}L{above[round(at * (len(above) - 1))]:.1f} {high + 10}" class="axis"/>'
            for x in below
            for at in (0.0, 0.5, 1.0)
        ]
    return _svg(len(levels) * 44 - 8, parts)


def _svg(height: float, parts: Sequence[str], label: str = "") -> str:
    tip = f"<title>{html.escape(label)}</title>" if label else ""
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" xmlns="http://www.w3.org/2000/svg" role="img">{tip}'
        + "".join(parts)
        + "</svg>"
    )
