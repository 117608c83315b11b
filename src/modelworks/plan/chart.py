"""Scatter charts as SVG: of predictions against measurements, of what more devices buy.

Two ideas. Places along the width are percentages and text keeps its size, so that one drawing fills a phone's width
and a desk's, and stands as an image in a document as well. And the ink is a grey that can be read on light and on dark
ground, since an image doesn't know what it lies on.

Every name and tip is escaped here: it may come from a user's file.
"""

from __future__ import annotations

import html
import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

COLOURS = ("#0d9488", "#6366f1", "#d97706", "#db2777", "#65a30d", "#0284c7", "#9333ea", "#b45309", "#64748b")
INK, HAIRLINE = "#7f828a", "rgba(128,128,128,.22)"
_MARKERS = (
    '<circle r="4"/>',
    '<rect x="-3.6" y="-3.6" width="7.2" height="7.2"/>',
    '<path d="M0-4.9 4.6 3.4H-4.6z"/>',
    '<path d="M0-5.2 5.2 0 0 5.2-5.2 0z"/>',
    '<path d="M0 4.9 4.6-3.4H-4.6z"/>',
)
_LEFT, _WIDTH = 12.0, 85.0
"""Of the plot's area, in per cent of the drawing's width."""
_TOP, _BOTTOM = 26, 46
"""Above and below the plot's area, in pixels."""
_NOT_IN_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True)
class Axis:
    """What lies along one side: its title, its range, and how its values are said."""

    title: str
    low: float
    high: float
    say: Callable[[float], str] = "{:g}".format
    logarithmic: bool = True

    def place(self, value: float) -> float:
        """Where a value lies, 0 at the low end and 1 at the high one."""
        if self.logarithmic:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """Round values in the range: five or so."""
        if not self.logarithmic:
            step = round_up((self.high - self.low) / 5)
            first = math.ceil(self.low / step - 1e-9)
            return [count * step for count in range(first, math.floor(self.high / step + 1e-9) + 1)]
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        digits = (1,) if len(decades) > 4 else (1, 2, 5)
        every = max(1, len(decades) // 6) if len(decades) > 4 else 1
        found = [digit * 10.0**decade for decade in decades[::every] for digit in digits]
        return [value for value in found if self.low * (1 - 1e-9) <= value <= self.high * (1 + 1e-9)]


@dataclass(frozen=True)
class Point:
    """One mark, with what is said when it is pointed at."""

    x: float
    y: float
    tip: str
    key: str = ""
    """What it stands for, for scripts."""


@dataclass(frozen=True)
class Series:
    """Marks of one kind."""

    name: str
    points: Sequence[Point]
    steps: bool = False
    """Join the marks by steps, from left to right: what is reached up to there."""
    faint: bool = False
    """Draw them as the ground of others."""


@dataclass(frozen=True)
class Rule:
    """A straight line behind the marks, from one point to another, in the axes' values."""

    start: tuple[float, float]
    end: tuple[float, float]
    dashed: bool = True


def axis_over(
    title: str, values: Sequence[float], say: Callable[[float], str] = "{:g}".format, least_room: float = 1.06
) -> Axis:
    """A logarithmic axis over all the values, which are positive, and by `least_room` or more beyond them."""
    if not values:
        return Axis(title, 1.0, 10.0, say)
    low, high = min(values), max(values)
    room = max(least_room, (high / low) ** 0.05)
    return Axis(title, low / room, high * room, say)


def scatter(
    series: Sequence[Series],
    x: Axis,
    y: Axis,
    title: str,
    height: int = 440,
    image: bool = False,
    rules: Sequence[Rule] = (),
    identity: str = "chart",
) -> str:
    """Draw series over two axes.

    Parameters
    ----------
    title
        What the drawing is called, for those who can't see it.
    image
        For an image, which stands alone: the names of the series are in it. In a page, `document`'s script shows tips.
    identity
        Sets this drawing's parts apart from those of another one in the same document.

    Returns
    -------
    str
        An `svg` element, which is a whole SVG file as well.
    """
    area = height - _TOP - _BOTTOM

    def at(value_x: float, value_y: float) -> tuple[str, str]:
        return f"{_LEFT + _WIDTH * x.place(value_x):.2f}%", f"{_TOP + area * (1 - y.place(value_y)):.1f}"

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" class="scatter" role="img" aria-label="{escaped(title)}" '
        f'width="760" height="{height}" font-family="ui-sans-serif,system-ui,Segoe UI,Roboto,sans-serif" '
        f'font-size="12" fill="{INK}"><title>{escaped(title)}</title>',
        "<defs>",
        *(f'<g id="{identity}-{number}">{marker}</g>' for number, marker in enumerate(_MARKERS)),
        "</defs>",
    ]
    bottom = height - _BOTTOM
    for value in x.ticks():
        left, _ = at(value, y.low)
        minor = "" if str(value).startswith("1") else ' class="minor"'
        parts.append(f'<line x1="{left}" x2="{left}" y1="{_TOP}" y2="{bottom}" stroke="{HAIRLINE}"/>')
        parts.append(f'<text x="{left}" y="{bottom + 17}" text-anchor="middle"{minor}>{escaped(x.say(value))}</text>')
    for value in y.ticks():
        _, top = at(x.low, value)
        parts.append(f'<line x1="{_LEFT}%" x2="{_LEFT + _WIDTH}%" y1="{top}" y2="{top}" stroke="{HAIRLINE}"/>')
        parts.append(f'<text x="{_LEFT}%" dx="-6" y="{top}" dy="4" text-anchor="end">{escaped(y.say(value))}</text>')
    parts.append(f'<text x="{_LEFT + _WIDTH / 2}%" y="{height - 8}" text-anchor="middle">{escaped(x.title)}</text>')
    parts.append(f'<text x="{_LEFT}%" y="{_TOP - 12}">{escaped(y.title)}</text>')
    for rule in rules:
        (x1, y1), (x2, y2) = at(*rule.start), at(*rule.end)
        dashes = ' stroke-dasharray="4 4"' if rule.dashed else ""
        parts.append(f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{INK}" stroke-width="1"{dashes}/>')
    for number, one in enumerate(series):
        colour = INK if one.faint else COLOURS[number % len(COLOURS)]
        opacity = "0.4" if one.faint else "0.8"
        parts.append(f'<g fill="{colour}" fill-opacity="{opacity}" data-series="{escaped(one.name)}">')
        if one.steps:
            parts += _steps(one, at, colour)
        marker = f"#{identity}-{number % len(_MARKERS)}"
        for point in one.points:
            left, top = at(point.x, point.y)
            key = f' data-key="{escaped(point.key)}"' if point.key else ""
            tip = escaped(point.tip)
            said = f"><title>{tip}</title></use>" if image else f' data-tip="{tip}"{key}/>'
            parts.append(f'<use href="{marker}" x="{left}" y="{top}"{said}')
        parts.append("</g>")
    if image:
        parts += _legend(series, identity)
    return "".join([*parts, "</svg>"])


def _steps(series: Series, at: Callable[[float, float], tuple[str, str]], colour: str) -> list[str]:
    line = f'stroke="{colour}" stroke-width="1.5" stroke-opacity="0.75"'
    parts = []
    points = sorted(series.points, key=lambda point: point.x)
    for one, following in itertools.pairwise(points):
        (x1, y1), (x2, y2) = at(one.x, one.y), at(following.x, following.y)
        parts.append(f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y1}" {line}/>')
        parts.append(f'<line x1="{x2}" y1="{y1}" x2="{x2}" y2="{y2}" {line}/>')
    return parts


def _legend(series: Sequence[Series], identity: str) -> list[str]:
    parts = []
    for number, one in enumerate(series):
        top = _TOP + 20 + 18 * number
        colour = INK if one.faint else COLOURS[number % len(COLOURS)]
        marker = f'<use href="#{identity}-{number % len(_MARKERS)}" x="{_LEFT}%" y="{top - 4}" fill="{colour}"/>'
        parts.append(f'<g transform="translate(14 0)">{marker}</g>')
        parts.append(f'<text x="{_LEFT}%" dx="26" y="{top}">{escaped(one.name)}</text>')
    return parts


def marker_colour(number: int, faint: bool = False) -> str:
    """The colour of a chart's series by its position."""
    return INK if faint else COLOURS[number % len(COLOURS)]


def round_up(value: float) -> float:
    """The least of 1, 2, 5 times a power of ten that isn't below a positive value."""
    decade = 10.0 ** math.floor(math.log10(value))
    return float(next(digit * decade for digit in (1, 2, 5, 10) if digit * decade >= value * (1 - 1e-9)))


def escaped(text: str) -> str:
    """A text as HTML and XML take it, in an element and in a quoted attribute."""
    return html.escape(_NOT_IN_XML.sub("\ufffd", text), quote=True)
