"""One conversation as a file: Markdown or PDF of the branch that is shown, JSON of the whole tree.

The JSON is what `assistant.imports` reads again. The PDF's fonts (DejaVu) come with the program and hold Latin, Greek,
Cyrillic, Hebrew and Arabic letters, but no Chinese, Japanese or Korean ones.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from html import escape
from importlib.resources import as_file, files
from io import BytesIO
from typing import Any, Literal

from modelworks.assistant.calls import written
from modelworks.assistant.store import ConversationStore
from modelworks.assistant.talk import Conversation, Message
from modelworks.spec.modes import BUILT_IN, REGULAR

Form = Literal["markdown", "json", "pdf"]
FORMAT, VERSION = "modelworks-conversation", 1
KINDS: dict[Form, tuple[str, str]] = {
    "markdown": ("md", "text/markdown; charset=utf-8"),
    "json": ("json", "application/json"),
    "pdf": ("pdf", "application/pdf"),
}
"""Of each form, how its files' names end and what kind of content it is."""
_CODE_COLUMNS = 92
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff\ufffe\uffff]")


def export(store: ConversationStore, conversation_id: str, form: Form) -> tuple[str, bytes]:
    """A conversation as a file: its name and its content.

    Raises
    ------
    InputError
        If there is no such conversation.
    """
    conversation, messages = store.tree(conversation_id)
    name = f"{_file_name(conversation.title)}.{KINDS[form][0]}"
    if form == "json":
        return name, _json(conversation, messages)
    shown = store.thread(conversation_id)
    return name, _markdown(conversation, shown).encode() if form == "markdown" else _pdf(conversation, shown)


def _json(conversation: Conversation, messages: list[Message]) -> bytes:
    head = vars(conversation) | {"mode": conversation.mode if conversation.mode in BUILT_IN else REGULAR}
    del head["folder_id"], head["pinned"]
    tree = [
        {name: value for name, value in vars(one).items() if name not in _DERIVED}
        | ({"calls": [vars(call) for call in one.calls]} if one.calls else {})
        for one in messages
    ]
    content = {"format": FORMAT, "version": VERSION, "conversation": head, "messages": tree}
    return json.dumps(content, ensure_ascii=False, indent=1).encode("utf-8", "replace")


_DERIVED = {"conversation_id", "versions", "calls"}


def _said(message: Message) -> str:
    """What a message says, below the calls of tools that it was made with."""
    return "\n\n".join([*map(written, message.calls), message.content.strip()])


def _markdown(conversation: Conversation, shown: list[Message]) -> str:
    parts = [f"# {_line(conversation.title)}", f"*{_when(conversation)}*"]
    parts += [f"## {_who(message)}\n\n{_said(message)}" for message in shown]
    return "\n\n".join(parts) + "\n"


def _pdf(conversation: Conversation, shown: list[Message]) -> bytes:
    from reportlab.lib.pagesizes import A4
    from reportlab.platypus import Paragraph, SimpleDocTemplate

    styles = _styles()
    parts: list[Any] = [
        Paragraph(_safe(conversation.title), styles["title"]),
        Paragraph(_safe(_when(conversation)), styles["quiet"]),
    ]
    for message in shown:
        parts.append(Paragraph(_safe(_who(message)), styles["who"]))
        parts += _blocks(_said(message), styles)
    target = BytesIO()
    margin = 56
    document = SimpleDocTemplate(
        target,
        pagesize=A4,
        leftMargin=margin,
        rightMargin=margin,
        topMargin=margin,
        bottomMargin=margin,
        title=_UNPRINTABLE.sub("", conversation.title),
        creator="Modelworks",
    )
    document.build(parts)
    return target.getvalue()


def _styles() -> dict[str, Any]:
    from reportlab.lib.colors import HexColor
    from reportlab.lib.styles import ParagraphStyle
    from reportlab.pdfbase import pdfmetrics
    from reportlab.pdfbase.ttfonts import TTFont

    if "DejaVuSans" not in pdfmetrics.getRegisteredFontNames():
        with as_file(files("modelworks.assistant") / "fonts") as folder:
            for font in ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSansMono"):
                pdfmetrics.registerFont(TTFont(font, str(folder / f"{font}.ttf")))
        pdfmetrics.registerFontFamily(
            "DejaVuSans", "DejaVuSans", "DejaVuSans-Bold", italic="DejaVuSans", boldItalic="DejaVuSans-Bold"
        )
    text = ParagraphStyle("text", fontName="DejaVuSans", fontSize=10, leading=14.5, spaceAfter=6)
    bold: dict[str, Any] = {"parent": text, "fontName": "DejaVuSans-Bold"}
    return {
        "text": text,
        "title": ParagraphStyle("title", **bold, fontSize=17, leading=22),
        "quiet": ParagraphStyle("quiet", parent=text, fontSize=8.5, textColor=HexColor("#6b6d73")),
        "who": ParagraphStyle("who", **bold, fontSize=9, textColor=HexColor("#0f766e"), spaceBefore=12, spaceAfter=3),
        "heading": ParagraphStyle("heading", **bold, fontSize=11.5, spaceBefore=6),
        "item": ParagraphStyle("item", parent=text, leftIndent=14, bulletIndent=4, spaceAfter=2),
        "code": ParagraphStyle("code", fontName="DejaVuSansMono", fontSize=8, leading=10.5, spaceAfter=8, leftIndent=8),
    }


def _blocks(content: str, styles: dict[str, Any]) -> Iterator[Any]:
    """A message's Markdown as paragraphs, headings, items and code."""
    from markdown_it import MarkdownIt
    from reportlab.platypus import Paragraph, Preformatted

    style, marks = "text", list[str]()
    for token in MarkdownIt("commonmark", {"html": False}).parse(_UNPRINTABLE.sub("", content)):
        if token.type in {"fence", "code_block"}:
            yield Preformatted(token.content.rstrip().expandtabs(4), styles["code"], maxLineLength=_CODE_COLUMNS)
        elif token.type == "heading_open":
            style = "heading"
        elif token.type == "heading_close":
            style = "text"
        elif token.type == "list_item_open":
            marks.append(f"{token.info}." if token.info else "•")
        elif token.type == "list_item_close":
            marks.pop()
        elif token.type == "inline":
            words = _inline(token)
            if marks:
                yield Paragraph(words, styles["item"], bulletText=marks[-1])
                marks[-1] = ""
            else:
                yield Paragraph(words, styles[style])


def _inline(token: Any) -> str:
    """A line's words in reportlab's own markup; whatever else they hold is text."""
    plain = {"strong_open": "<b>", "strong_close": "</b>", "softbreak": "<br/>", "hardbreak": "<br/>"}
    parts = []
    for child in token.children or ():
        if child.type == "code_inline":
            parts.append(f'<font name="DejaVuSansMono" size="9">{escape(child.content)}</font>')
        else:
            parts.append(plain.get(child.type, escape(child.content)))
    return "".join(parts)


def _who(message: Message) -> str:
    return "You" if message.role == "user" else _line(message.model or message.role)


def _when(conversation: Conversation) -> str:
    return datetime.fromtimestamp(conversation.created, UTC).strftime("%Y-%m-%d %H:%M UTC")


def _line(words: str) -> str:
    return " ".join(words.split())


def _safe(words: str) -> str:
    return escape(_UNPRINTABLE.sub("", words))


def _file_name(title: str) -> str:
    """A title as a file's name: letters, digits, spaces and dashes, of any script."""
    return _line(re.sub(r"[^\w -]+", " ", title))[:60].strip() or "conversation"
