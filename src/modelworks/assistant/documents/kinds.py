"""What a file is, by its content: its name is what a stranger says of it.

A file is read for what it is, whatever its name ends in. Of text alone the name decides, since nothing in a Python
file says that it is one.
"""

from __future__ import annotations

import zipfile
from pathlib import Path, PurePosixPath

from modelworks.spec.errors import InputError

ACCEPTED = "PDF, Word (.docx), PowerPoint (.pptx), Excel (.xlsx), HTML, Markdown, text, code and images are"
MOST_MEMBERS = 10_000
MOST_UNPACKED = 256 << 20
"""Bytes that the members of an Office file may have in all."""
MOST_RATIO = 200
"""How many times larger they may be than what they are packed in; text of Office is packed to a twentieth."""
_SMALL = 16 << 20
"""Unpacked, a file of up to so many bytes may be packed as well as it likes."""
_HEAD = 8192
_IMAGES = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF87a", b"GIF89a", b"BM", b"II*\x00", b"MM\x00*")
_OFFICE = {"word/document.xml": "docx", "ppt/presentation.xml": "pptx", "xl/workbook.xml": "xlsx"}
_OLD_OFFICE = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"
_MARKDOWN = {".md", ".markdown", ".mdown"}
_PROSE = {"", ".txt", ".text", ".log", ".rst"}
_CONTROL = bytes(set(range(32)) - set(b"\t\n\r\f\b\x1b"))


def kind_of(path: Path, name: str) -> str:
    """One of ``pdf docx pptx xlsx html markdown text code image``.

    Raises
    ------
    InputError
        If it is empty, packed too well to be a document, protected, or of another kind.
    """
    with path.open("rb") as file:
        head = file.read(_HEAD)
    if not head.strip():
        raise InputError(f"{name} is empty")
    if b"%PDF-" in head[:1024]:
        return "pdf"
    if head.startswith(b"PK\x03\x04"):
        return _office(path, name)
    if head.startswith(_OLD_OFFICE):
        if "EncryptedPackage".encode("utf-16-le") in path.read_bytes():
            raise InputError(f"{name} is protected by a password: a copy without one can be read")
        raise InputError(f"{name} is in the format of Office before 2007: save it as .docx, .xlsx or .pptx")
    if head.startswith(_IMAGES) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP"):
        return "image"
    return _text(head, name)


def _office(path: Path, name: str) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError):
        raise InputError(f"{name} is cut off or damaged") from None
    if len(members) > MOST_MEMBERS:
        raise InputError(f"{name} holds {len(members):,} files: up to {MOST_MEMBERS:,} are accepted")
    unpacked, packed = sum(each.file_size for each in members), path.stat().st_size
    if unpacked > MOST_UNPACKED or (unpacked > _SMALL and unpacked > MOST_RATIO * packed):
        raise InputError(
            f"{name} swells from {packed:,} to {unpacked:,} bytes when it is unpacked: "
            f"up to {MOST_UNPACKED:,} bytes and {MOST_RATIO} times as much are accepted"
        )
    kinds = [_OFFICE[each.filename] for each in members if each.filename in _OFFICE]
    if len(kinds) != 1:
        raise InputError(f"{name} is an archive, and archives are not accepted: {ACCEPTED}")
    return kinds[0]


def _text(head: bytes, name: str) -> str:
    wide = head.startswith((b"\xff\xfe", b"\xfe\xff"))
    if not wide and head.translate(None, _CONTROL) != head:
        raise InputError(f"{name} is of a kind that can't be read: {ACCEPTED}")
    ending = PurePosixPath(name).suffix.lower()
    begin = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if begin.startswith((b"<!doctype html", b"<html")) or ending in {".html", ".htm", ".xhtml"}:
        return "html"
    if ending in _MARKDOWN:
        return "markdown"
    return "text" if ending in _PROSE else "code"


def decoded(content: bytes) -> str:
    """Text whose encoding nobody said: UTF-8 or UTF-16 if it can be, otherwise that of old Windows."""
    for encoding in ("utf-16",) if content.startswith((b"\xff\xfe", b"\xfe\xff")) else ("utf-8-sig",):
        try:
            return content.decode(encoding)
        except UnicodeDecodeError:
            continue
    return content.decode("cp1252", errors="replace")
