"""A page that stands alone: one HTML file with its styles and its script, which asks no network for anything.

The script adds what a page can do beyond being read: tips where one points, tables that sort, layouts to choose among,
sources to hide. Without it the page still says everything.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from modelworks.plan.chart import escaped
from modelworks.spec.errors import OperationError

Cell = str | tuple[str, float]
"""Markup, or a text and the number that it is sorted by."""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


def document(title: str, body: str) -> str:
    """A whole HTML page around some markup; the title is a plain text."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f'<title>{escaped(title)}</title><style>{style()}</style></head><body class="plan-page">'
        f'<main class="plan">{body}</main><script>{script()}</script></body></html>\n'
    )


def style() -> str:
    """The styles of plans, for this page and for the web app's."""
    return (files("modelworks.plan") / "static" / "plan.css").read_text(encoding="utf-8")


def script() -> str:
    """The script of plans, for this page and for the web app's."""
    return (files("modelworks.plan") / "static" / "plan.js").read_text(encoding="utf-8")


def write_whole(path: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all.

    Raises
    ------
    OperationError
        If it can't be written.
    """
    partial = path.with_name(f".{path.name}.part")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise OperationError(f"{path} can't be written: {error.strerror or error}") from None
    finally:
        partial.unlink(missing_ok=True)


def table(head: Sequence[str], rows: Sequence[Sequence[Cell]], keys: Sequence[str] = ()) -> str:
    """A table that sorts by the column that is clicked; numbers stand to the right.

    `keys` name what each row stands for, so that a row can be chosen.
    """
    numeric = [bool(rows) and all(isinstance(row[column], tuple) for row in rows) for column in range(len(head))]
    titles = "".join(
        f'<th{_right(right)} scope="col"><button type="button">{escaped(name)}</button></th>'
        for name, right in zip(head, numeric, strict=True)
    )
    lines = []
    for number, row in enumerate(rows):
        cells = "".join(
            f'<td{_right(right)} data-value="{cell[1]!r}">{escaped(cell[0])}</td>'
            if isinstance(cell, tuple)
            else f"<td>{cell}</td>"
            for cell, right in zip(row, numeric, strict=True)
        )
        key = f' data-key="{escaped(keys[number])}" tabindex="0"' if keys else ""
        lines.append(f"<tr{key}>{cells}</tr>")
    return f'<div class="sortable"><table><thead><tr>{titles}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _right(right: bool) -> str:
    return ' class="number"' if right else ""
