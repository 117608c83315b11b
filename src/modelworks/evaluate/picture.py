"""Evaluations drawn: scores of lengths and depths or tasks as a heat map, losses by position as lines.

The drawing is SVG; text keeps its size and a grey that can be read on light and on dark ground, as in `plan.chart`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from modelworks.plan.chart import COLOURS, INK, escaped
from modelworks.plan.document import document, write_whole
from modelworks.spec.errors import InputError

_CELL, _ROW, _LEFT, _TOP, _BELOW = 64, 26, 150, 56, 58
_WORST, _BEST = (190, 60, 60), (13, 148, 136)


def write_picture(reports: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw reports of one task beside each other, as the file's ending says, ``.svg`` or ``.html``.

    Raises
    ------
    InputError
        If the ending is another one.
    OperationError
        If the file can't be written.
    """
    refuse_other_pictures(path)
    drawn = drawing(reports)
    write_whole(path, drawn if path.suffix == ".svg" else document(str(reports[0]["task"]), drawn))


def write_comparison(compared: dict[str, Any], path: Path) -> None:
    """Draw a comparison's differences with their intervals, as the file's ending says.

    Raises
    ------
    InputError
        If the ending is another one than ``.svg`` or ``.html``.
    OperationError
        If the file can't be written.
    """
    refuse_other_pictures(path)
    markup, width, height = _differences(compared)
    title = f"{compared['model']} against {compared['against']}"
    drawn = _image(markup, width, height)
    write_whole(path, drawn if path.suffix == ".svg" else document(title, drawn))


def refuse_other_pictures(path: Path | None) -> None:
    """Refuse a file that no picture is written to, before the work is done."""
    if path is not None and path.suffix not in (".svg", ".html"):
        raise InputError(f"--plot {path} is not accepted: a file that ends in .svg or .html is")


def drawing(reports: Sequence[dict[str, Any]]) -> str:
    """The reports as one SVG image."""
    panels = [_losses(report) if report["task"] == "position-perplexity" else _heat_map(report) for report in reports]
    width, height = sum(panel[1] for panel in panels), max(panel[2] for panel in panels)
    placed, left = [], 0
    for markup, wide, _ in panels:
        placed.append(f'<g transform="translate({left} 0)">{markup}</g>')
        left += wide
    return _image("".join(placed), width, height)


def _image(markup: str, width: int, height: int) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="system-ui, sans-serif" font-size="12" fill="{INK}" role="img">{markup}</svg>\n'
    )


def _differences(compared: dict[str, Any]) -> tuple[str, int, int]:
    """A line for each metric's interval, in parts of the larger score, with a point at the difference."""
    left, wide, rows = 260, 420, compared["rows"]
    width, height = left + wide + 200, _TOP + _ROW * len(rows) + _BELOW
    scaled = []
    for row in rows:
        scale = max(abs(row["score"]), abs(row["against"])) or 1.0
        scaled.append([value / scale for value in (*row["interval"], row["difference"])])
    reach = max((abs(value) for values in scaled for value in values), default=0.0) or 1.0

    def across(value: float) -> float:
        return left + wide * (0.5 + 0.48 * value / reach)

    bottom = _TOP + _ROW * len(rows)
    parts = [
        _text(width / 2, 22, f"{compared['model']} against {compared['against']}", "middle"),
        f'<line x1="{across(0):g}" y1="{_TOP}" x2="{across(0):g}" y2="{bottom}" stroke="{INK}" '
        'stroke-dasharray="3 3"/>',
        _text(across(-reach), bottom + 18, f"{-reach:+.1%}", "start"),
        _text(across(reach), bottom + 18, f"{reach:+.1%}", "end"),
        _text(across(0), bottom + 40, "difference in parts of the larger score, 95 % interval", "middle"),
    ]
    for number, (row, (low, high, middle)) in enumerate(zip(rows, scaled, strict=True)):
        y = _TOP + _ROW * (number + 0.5)
        colour = {"better": _shade(_BEST), "worse": _shade(_WORST)}.get(row["verdict"], INK)
        name = f"{row['task']} {row['metric'].removesuffix(',none')}"
        parts += [
            _text(left - 10, y + 4, name, "end"),
            f'<line x1="{across(low):.1f}" y1="{y:g}" x2="{across(high):.1f}" y2="{y:g}" stroke="{colour}" '
            'stroke-width="3"/>',
            f'<circle cx="{across(middle):.1f}" cy="{y:g}" r="5" fill="{colour}"/>',
            _text(left + wide + 10, y + 4, row["verdict"].partition(" with ")[0], "start", colour),
        ]
    return "".join(parts), width, height


def _shade(colour: tuple[int, int, int]) -> str:
    return f"rgb({colour[0]},{colour[1]},{colour[2]})"


def _heat_map(report: dict[str, Any]) -> tuple[str, int, int]:
    """A cell for each length, from left to right, and each depth or task, from top to bottom."""
    cells = report["cells"]
    lengths = list(dict.fromkeys(cell["length"] for cell in cells))
    rows = list(dict.fromkeys(_row(cell) for cell in cells))
    width, height = _LEFT + _CELL * len(lengths) + 24, _TOP + _ROW * len(rows) + _BELOW
    parts = [_title(report, width)]
    for row, name in enumerate(rows):
        parts.append(_text(_LEFT - 10, _TOP + _ROW * (row + 0.5) + 4, name, "end"))
    for column, length in enumerate(lengths):
        at = _LEFT + _CELL * (column + 0.5)
        parts.append(_text(at, _TOP + _ROW * len(rows) + 18, f"{length:,}", "middle"))
    parts.append(_text(_LEFT + _CELL * len(lengths) / 2, height - 18, "tokens in the prompt", "middle"))
    if report["task"] == "needle":
        parts.append(_text(_LEFT - 10, _TOP - 10, "depth of the needle", "end"))
    for cell in cells:
        x, y = _LEFT + _CELL * lengths.index(cell["length"]), _TOP + _ROW * rows.index(_row(cell))
        tip = f"{_row(cell)}, {cell['length']:,} tokens: {cell['score']:.0%} found"
        parts.append(
            f"<g><title>{escaped(tip)}</title>"
            f'<rect x="{x + 1}" y="{y + 1}" width="{_CELL - 2}" height="{_ROW - 2}" rx="3" '
            f'fill="{_colour(cell["score"])}"/>'
            f'<text x="{x + _CELL / 2}" y="{y + _ROW / 2 + 4}" text-anchor="middle" fill="#ffffff">'
            f"{cell['score']:.0%}</text></g>"
        )
    return "".join(parts), width, height


def _losses(report: dict[str, Any]) -> tuple[str, int, int]:
    """A line of nats by position for each length."""
    wide, high = 420, 220
    rows = [(cell["length"], cell["positions"]) for cell in report["cells"]]
    nats = [part["nats"] for _, positions in rows for part in positions]
    longest, low, top = max(length for length, _ in rows), min(nats), max(nats)
    span = (top - low) or 1.0
    parts = [_title(report, _LEFT + wide)]
    for number, (length, positions) in enumerate(rows):
        points = " ".join(
            f"{_LEFT + wide * (part['from'] + part['to']) / 2 / longest:.1f},"
            f"{_TOP + high * (top - part['nats']) / span:.1f}"
            for part in positions
        )
        colour = COLOURS[number % len(COLOURS)]
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(_text(_LEFT + 90 * number, _TOP + high + 44, f"{length:,} tokens", "start", colour))
    parts.append(_text(_LEFT - 10, _TOP + 6, f"{top:.2f} nats", "end"))
    parts.append(_text(_LEFT - 10, _TOP + high, f"{low:.2f} nats", "end"))
    parts.append(_text(_LEFT + wide / 2, _TOP + high + 22, f"position, up to {longest:,}", "middle"))
    return "".join(parts), _LEFT + wide + 24, _TOP + high + _BELOW


def _title(report: dict[str, Any], width: int) -> str:
    return _text(width / 2, 22, f"{report['model']}: {report['task']}", "middle")


def _text(x: float, y: float, words: str, anchor: str, colour: str = INK) -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" fill="{colour}">{escaped(words)}</text>'


def _row(cell: dict[str, Any]) -> str:
    return str(cell["task"]) if cell["depth"] is None else f"{cell['depth']:.0%}"


def _colour(score: float) -> str:
    mixed = [round(worst + (best - worst) * score) for worst, best in zip(_WORST, _BEST, strict=True)]
    return f"rgb({mixed[0]},{mixed[1]},{mixed[2]})"
