"""Documents as blocks of text, each kind by the library that reads it best.

All of this runs inside `reader`'s process. What the libraries raise on a damaged file is theirs, and of many types:
`reader` says one sentence for all.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from modelworks.assistant.documents.blocks import Block, Progress, Read, Remark
from modelworks.assistant.documents.kinds import decoded
from modelworks.spec.errors import InputError

MOST_PAGES = 2000
MOST_SCANNED = 40
"""Pages that are read by OCR: each takes seconds."""
_LINES = 60
"""Of code, in a block."""
_ROWS = 25
"""Of a sheet, in a block."""
_OCR_SCALE = 2.0
"""Pixels per point (1/72 inch): 144 dots per inch."""
_HEADINGS = {f"h{level}": level for level in range(1, 7)}
_LEFT_OUT = {"script", "style", "head", "template", "noscript", "svg", "iframe", "object"}
_CELLS = {"td", "th"}
_INLINE = {"a", "abbr", "b", "bdi", "bdo", "cite", "code", "data", "del", "dfn", "em", "font", "i", "img", "ins", "kbd"}
_INLINE |= {"label", "mark", "q", "s", "samp", "small", "span", "strong", "sub", "sup", "time", "u", "var", "wbr"}


def pdf(path: Path, name: str) -> Read:
    """A PDF page by page, under the headings of its outline; pages without text are looked at by OCR."""
    import pypdfium2  # type: ignore[import-untyped]

    try:
        document = pypdfium2.PdfDocument(path)
    except pypdfium2.PdfiumError as error:
        if "password" in str(error).lower():
            raise InputError(f"{name} is protected by a password: a copy without one can be read") from None
        raise InputError(f"{name} is cut off or damaged") from None
    total = len(document)
    if total > MOST_PAGES:
        raise InputError(f"{name} has {total:,} pages: up to {MOST_PAGES:,} are accepted")
    headings = _outline(document)
    heading, scanned, unread = "", 0, 0
    for number in range(total):
        page = document[number]
        heading = headings.get(number, heading)
        text = page.get_textpage().get_text_bounded().replace("\r\n", "\n").replace("￾", "").strip()
        if not text and next(iter(page.get_objects(max_depth=2)), None) is not None:
            scanned += 1
            if scanned <= MOST_SCANNED and (look := _ocr()) is not None:
                text = look(page.render(scale=_OCR_SCALE).to_numpy())
            unread += not text
        if text:
            yield Block(text, f"page {number + 1}", heading)
        page.close()
        yield Progress(number + 1, total)
    if scanned > unread:
        yield Remark(f"{scanned - unread} of its {total} pages hold no text and were read by OCR")
    if unread:
        why = "" if _ocr() else ": reading them needs pip install 'modelworks[ocr]'"
        yield Remark(f"{unread} of its {total} pages hold no text that could be read{why}")


def _outline(document: Any) -> dict[int, str]:
    """The outline's title of each page on which a part begins; the first of several."""
    found: dict[int, str] = {}
    for entry in islice(document.get_toc(max_depth=3), 10_000):
        target = entry.get_dest()
        index = target.get_index() if target is not None else None
        if index is not None:
            found.setdefault(index, entry.get_title().strip())
    return found


def _ocr() -> Callable[[Any], str] | None:
    from modelworks.assistant.documents.ocr import reader

    return reader()


def docx(path: Path, _name: str) -> Read:
    """A Word document under its headings."""
    import docx as word
    from docx.table import Table

    document = word.Document(str(path))
    heads = _Headings()
    for item in document.iter_inner_content():
        if isinstance(item, Table):
            text = _table([cell.text for cell in row.cells] for row in item.rows)
        else:
            text, style = item.text.strip(), (item.style.name or "") if item.style is not None else ""
            level = 1 if style == "Title" else int(style[8]) + 1 if re.match(r"Heading \d", style) else 0
            if level and text:
                heads.enter(level, text)
        if text:
            yield Block(text, "", heads.path)


def pptx(path: Path, _name: str) -> Read:
    """Slides with their tables and notes, each under its title."""
    import pptx as powerpoint

    slides = powerpoint.Presentation(str(path)).slides
    for number, slide in enumerate(slides, start=1):
        title = slide.shapes.title
        parts = list(_shapes(slide.shapes))
        if slide.has_notes_slide and slide.notes_slide.notes_text_frame is not None:
            parts.append(slide.notes_slide.notes_text_frame.text)
        text = "\n".join(part.strip() for part in parts if part.strip())
        if text:
            yield Block(text, f"slide {number}", title.text_frame.text.strip() if title is not None else "")
        yield Progress(number, len(slides))


def _shapes(shapes: Any) -> Iterator[str]:
    for shape in shapes:
        if hasattr(shape, "shapes"):  # a group
            yield from _shapes(shape.shapes)
        elif shape.has_text_frame:
            yield shape.text_frame.text
        elif getattr(shape, "has_table", False):
            yield _table([cell.text for cell in row.cells] for row in shape.table.rows)


def xlsx(path: Path, _name: str) -> Read:
    """Sheets by their rows, each part under the sheet's first row."""
    from python_calamine import CalamineWorkbook

    book = CalamineWorkbook.from_path(str(path))
    for done, sheet in enumerate(book.sheet_names, start=1):
        rows = [
            (number, line)
            for number, row in enumerate(book.get_sheet_by_name(sheet).iter_rows(), start=1)
            if (line := " | ".join(_cell(value) for value in row).rstrip(" |"))
        ]
        heading = rows[0][1][:200] if rows else ""
        for begin in range(0, len(rows), _ROWS):
            part = rows[begin : begin + _ROWS]
            place = f"sheet {sheet}, rows {part[0][0]} to {part[-1][0]}"
            yield Block("\n".join(line for _, line in part), place, heading if begin else "")
        yield Progress(done, len(book.sheet_names))


def _cell(value: Any) -> str:
    whole = isinstance(value, float) and value.is_integer() and abs(value) < 1e15
    return " ".join(str(int(value) if whole else value).split())


def html(path: Path, _name: str) -> Read:
    """The text of a page under its headings, without scripts and styles."""
    yield from page(path.read_bytes())


def page(content: bytes) -> Iterator[Block]:
    """The text of a page that is in memory."""
    from lxml import etree, html  # type: ignore[import-untyped]

    try:
        root = html.document_fromstring(decoded(content), parser=html.HTMLParser(huge_tree=False, no_network=True))
    except (etree.ParserError, ValueError):
        # A declaration of an encoding in a text that is decoded already is refused.
        root = html.document_fromstring(content)
    heads = _Headings()
    lines: list[str] = []
    words: list[str] = []

    def line() -> None:
        text = " ".join("".join(words).split())
        words.clear()
        if text:
            lines.append(text)

    def block() -> Iterator[Block]:
        line()
        if lines:
            yield Block("\n".join(lines), "", heads.path)
            lines.clear()

    skipping: Any = None
    for event, node in etree.iterwalk(root, events=("start", "end", "comment", "pi")):
        if event == "start" and skipping is None:
            if node.tag in _LEFT_OUT:
                skipping = node
                continue
            if node.tag in _HEADINGS:
                yield from block()
            elif node.tag not in _INLINE | _CELLS:
                line()
            words.append(node.text or "")
        elif event == "end" and (skipping is None or skipping is node):
            if skipping is None and node.tag in _HEADINGS:
                heads.enter(_HEADINGS[node.tag], " ".join("".join(words).split()))
            if skipping is None and node.tag in _CELLS and node.getnext() is not None:
                words.append(" | ")
            elif skipping is None and node.tag not in _INLINE:
                line()
            skipping = None
            words.append(node.tail or "")
        elif event in {"comment", "pi"} and skipping is None:
            words.append(node.tail or "")
    yield from block()


def markdown(path: Path, _name: str) -> Read:
    """Markdown under its headings; those inside fenced code are none."""
    heads, fence = _Headings(), ""
    lines: list[str] = []
    for line in decoded(path.read_bytes()).splitlines():
        mark = re.match(r"\s{0,3}(`{3,}|~{3,})", line)
        if mark and (not fence or (line.strip().startswith(fence) and not line.strip().strip(fence[0]))):
            fence = "" if fence else mark[1]
        head = None if fence or mark else re.match(r"(#{1,6})\s+(.*?)\s*#*\s*$", line)
        if head:
            if text := "\n".join(lines).strip():
                yield Block(text, "", heads.path)
            lines.clear()
            heads.enter(len(head[1]), head[2])
        lines.append(line)
    if text := "\n".join(lines).strip():
        yield Block(text, "", heads.path)


def text(path: Path, _name: str) -> Read:
    """Plain text as it is."""
    yield Block(decoded(path.read_bytes()).strip())


def code(path: Path, _name: str) -> Read:
    """Code by its lines."""
    lines = decoded(path.read_bytes()).splitlines()
    for begin in range(0, len(lines), _LINES):
        part = lines[begin : begin + _LINES]
        if any(line.strip() for line in part):
            yield Block("\n".join(part), f"lines {begin + 1} to {begin + len(part)}")


def _table(rows: Any) -> str:
    lines = (" | ".join(" ".join(str(cell).split()) for cell in row) for row in rows)
    return "\n".join(line for line in lines if line.strip(" |"))


class _Headings:
    """The headings that a place stands under."""

    def __init__(self) -> None:
        self._open: list[tuple[int, str]] = []

    def enter(self, level: int, title: str) -> None:
        """A heading begins: it ends those of its level and below."""
        self._open = [each for each in self._open if each[0] < level]
        if title:
            self._open.append((level, title[:200]))

    @property
    def path(self) -> str:
        """From the outermost to the innermost."""
        return " › ".join(title for _, title in self._open)


PARSERS: dict[str, Callable[[Path, str], Read]] = {
    "pdf": pdf,
    "docx": docx,
    "pptx": pptx,
    "xlsx": xlsx,
    "html": html,
    "markdown": markdown,
    "text": text,
    "code": code,
}
