"""Fetched pages as passages: read in the process where documents are read, since they are a stranger's as well."""

from __future__ import annotations

import codecs
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from modelworks.assistant.documents import reading
from modelworks.assistant.documents.blocks import Block
from modelworks.assistant.documents.passages import Piece, split
from modelworks.assistant.live.fetching import Fetched
from modelworks.spec.errors import InputError

PAGE_BYTES = 4 << 20
"""Of a page, unpacked."""
LONGEST = 200_000
"""Characters of a page that are kept."""
READING_S = 60.0
_ENDINGS = {"text/html": ".html", "application/xhtml+xml": ".html", "text/markdown": ".md", "text/plain": ".txt"}


@dataclass(frozen=True)
class Page:
    """What was read in a page."""

    title: str
    pieces: list[Piece]


async def read_page(fetched: Fetched) -> Page:
    """Read a page.

    Raises
    ------
    InputError
        If it can't be read.
    """
    if fetched.kind.startswith(("image/", "audio/", "video/")):
        raise InputError(f"{fetched.kind} is no page")
    with on_disk(utf8(fetched)) as path:
        contents = await reading.read(path, f"page{_ENDINGS.get(fetched.kind, '')}", wall_s=READING_S)
    blocks, room = [], LONGEST
    for block in contents.blocks:
        if room <= 0:
            break
        blocks.append(Block(block.text[:room], block.place, block.heading))
        room -= len(block.text)
    heading = next((block.heading for block in blocks if block.heading), "")
    return Page(heading.partition(" › ")[0][:300], split(blocks))


def plain(text: str) -> str:
    """Without what a database doesn't take (NUL, halves of surrogate pairs)."""
    return text.replace("\0", "").encode("utf-8", "replace").decode()


@contextmanager
def on_disk(content: bytes) -> Iterator[Path]:
    """A file with a content, there for the block alone."""
    with tempfile.NamedTemporaryFile(prefix="modelworks-live-") as file:
        file.write(content)
        file.flush()
        yield Path(file.name)


def utf8(fetched: Fetched) -> bytes:
    """A page's content in UTF-8, if the server said in what else it is."""
    if fetched.charset is None or not fetched.kind.startswith(("text/", "application/xhtml")):
        return fetched.content
    try:
        if codecs.lookup(fetched.charset).name == "utf-8":
            return fetched.content
        return fetched.content.decode(fetched.charset, "replace").encode("utf-8", "replace")
    except (LookupError, ValueError):
        return fetched.content
