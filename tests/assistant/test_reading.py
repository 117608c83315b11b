"""Documents as they are read in a process with limits: what is found where, and what is refused in one sentence."""

from __future__ import annotations

import asyncio
import base64
import io
import os
import zipfile
import zlib
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest
from PIL import Image

from modelworks.assistant.documents import limits, ocr
from modelworks.assistant.documents.blocks import Block
from modelworks.assistant.documents.kinds import kind_of
from modelworks.assistant.documents.passages import LONGEST, OVERLAP, split
from modelworks.assistant.documents.reading import Contents, read
from modelworks.spec.errors import InputError

pytest.importorskip("docx")
import sys

sys.path.insert(0, str(Path(__file__).parent))
from papers import docx, encoded, pdf, picture, png_of, pptx, repacked, xlsx

LOCKED = zlib.decompress(
    base64.b64decode(
        "eNq9lE1oFVcUxw3EzUVXBTfdXAgJFD/mfn/I4/kVQ0uNpi9qLMXCnZk7LxNeZ8LMRKILCS1dFIqoKxERSrvQVRd207pR0JVFFxW1"
        "BAragiK07oKhiN6Zl5c8HAVXvvd4zP3Pub9zzn/OneGJ0bGteBsFw4/+vvMHwBDB1J8BjQbwDh6ftdDbYwrTSdvAmzBtm0PiAlrA"
        "OzBXdOLErVW1bjaBTcJyI6kBqn3A+zQOc/gFpGU8FNX/UeDtSeeSApI+AH0joEyf2TK0m3/chrHZnc47InJfrjlUjJTEls3TuSxw"
        "pZWEsdTtqS4wZL1S3c8lTgrHyyF/rQFWy18ygDc55xfVshQx8Hab3FZ072PbOWaLODDA25sEaRgnbehNxcmuJI97Ql8C3pdgn03a"
        "xTRUlQF5kVnzFfh33faZgUtHrn+5dPjk8jP52ctbzzbgU1OnzowMfP3y6our320defjD+bGZ53cnzcX1UwOfT3/fWqTjv26KlwcH"
        "x0eS81ue3P5/O7u9+G17+sGtDxf+21lmXoGv1CDes8nyNZNl3QMu+jxYuHLh3uknDxaGnn702+KPZ29e+8m/MfvnuX+GNu54GOjr"
        "Jx5/c6cVDH2w/Pvl4Jfm+M/3r9zfP7j0V3tzvVNV67Q3uq7cOMsLqLvN7jPuGqPuoj6Wuo+z386vhR6Mi46FDYuFUIEiJGyu2tg9"
        "G96odeTe5LukhXNwDVxxeuSJzB7rFbQCpswSYnDwNqx4C7b/JB92rXgtSFfNxkQ5HGREMy0k0aQ0o1PYDHqThUlCk4XujMMGspy4"
        "u9xQy6ySLKBBZALfRhxjI6kJmA2IHyrBwyCkIRNECsw0lsaPQmmZK/oQbChhrfZD7dtQa0wM9YMwolQphaQfUkWUHzHLXQrJlWFY"
        "MITcWkRRZBBGqtnX13xmI4BcAwCtfqDgnHIYwVUNu0NW3UnWNIVqGmb1OCJpTaOyvpcjUtMErcdJKmqaQqquaVnTtGJrWpGZuGOz"
        "6oFOxids6YHXSlM3it2B+GTUjUODEaYpkpwYxLS01NdcRu45aRJIRYVovkvI0epVlh2fdXDcO7t5YbKi8h8ThMDw8N4DY+AVUmfB"
        "yw=="
    )
)
"""A PDF that pypdf encrypted (RC4, 128 bits)."""


def read_now(folder: Path, name: str, content: bytes, **options: Any) -> Contents:
    """A document, read."""
    file = folder / "file"
    file.write_bytes(content)
    return asyncio.run(read(file, name, **options))


def refusal(folder: Path, name: str, content: bytes, **options: Any) -> str:
    """What is said of a document that can't be read."""
    with pytest.raises(InputError) as error:
        read_now(folder, name, content, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_pdf_is_read_by_pages_under_the_headings_of_its_outline_with_progress(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    content = pdf(["One (of three)\nmore", "Two: café", "", "Four"], ["Intro", "Middle"])
    found = read_now(tmp_path, "a.pdf", content, progress=lambda *at: seen.append(at))
    assert found.kind == "pdf"
    assert found.blocks == [
        Block("One (of three)\nmore", "page 1", "Intro"),
        Block("Two: café", "page 2", "Middle"),
        Block("Four", "page 4", "Middle"),
    ]
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_a_word_document_is_read_under_its_headings(tmp_path: Path) -> None:
    content = docx(("Title", "Pumps"), ("Heading 1", "Warranty"), ("Normal", "37 months."), ("Heading 1", "Price"))
    found = read_now(tmp_path, "a.docx", content)
    assert [(block.text, block.heading) for block in found.blocks] == [
        ("Pumps", "Pumps"),
        ("Warranty", "Pumps › Warranty"),
        ("37 months.", "Pumps › Warranty"),
        ("Price", "Pumps › Price"),
    ]


def test_slides_are_read_with_their_notes_and_sheets_with_their_first_row(tmp_path: Path) -> None:
    found = read_now(tmp_path, "a.pptx", pptx(("Results", "Up 12 %", "Say thanks"), ("Next", "More", "")))
    assert found.blocks == [
        Block("Results\nUp 12 %\nSay thanks", "slide 1", "Results"),
        Block("Next\nMore", "slide 2", "Next"),
    ]
    rows = [["item", "price"], *([f"part {number}", number + 0.5] for number in range(30))]
    first, second = read_now(tmp_path, "a.xlsx", xlsx(Costs=rows)).blocks
    assert (first.place, first.text.splitlines()[:2]) == ("sheet Costs, rows 1 to 25", ["item | price", "part 0 | 0.5"])
    assert (second.place, second.heading) == ("sheet Costs, rows 26 to 31", "item | price")


@pytest.mark.parametrize(
    ("name", "content", "blocks"),
    [
        ("a.md", "# A\nx\n```\n# none\n```\n## B\ny", [("# A\nx\n```\n# none\n```", "A"), ("## B\ny", "A › B")]),
        (
            "a.html",
            "<html><script>x</script><h1>T <b>o</b>p</h1><p>Hello <i>w</i>orld<table><tr><td>a<td>b</table><!-- c -->",
            [("T op\nHello world\na | b", "T op")],
        ),
        ("a.txt", "\ufeffGrüße", [("Grüße", "")]),
    ],
)
def test_text_is_read_under_its_headings(
    tmp_path: Path, name: str, content: str, blocks: list[tuple[str, str]]
) -> None:
    found = read_now(tmp_path, name, content.encode())
    assert [(block.text, block.heading) for block in found.blocks] == blocks


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("a.pdf", docx(("Normal", "x")), "docx"),
        ("a.txt", pdf(["x"]), "pdf"),
        ("a.docx", picture("x"), "image"),
        ("a", b"<!DOCTYPE html><p>x", "html"),
        ("a.py", b"x = 1", "code"),
        ("a.txt", "Grüße".encode("utf-16"), "text"),
        ("a.txt", "Grüße".encode("cp1252"), "text"),
    ],
)
def test_a_file_is_what_its_content_says(tmp_path: Path, name: str, content: bytes, kind: str) -> None:
    file = tmp_path / "file"
    file.write_bytes(content)
    assert kind_of(file, name) == kind


def archive_of(**members: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return out.getvalue()


LAUGHS = (
    b'<?xml version="1.0"?><!DOCTYPE w [<!ENTITY a "'
    + b"ha" * 100
    + b'">'
    + b"".join(b'<!ENTITY %c "%b">' % (98 + level, b"&%c;" % (97 + level) * 100) for level in range(8))
    + b']><w:document xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"><w:body><w:p><w:r>'
    + b"<w:t>&i;</w:t></w:r></w:p></w:body></w:document>"
)
REFUSED = {
    "empty": ("a.txt", b" \n", "is empty"),
    "no text": ("a.docx", docx(), "there is no text in a.docx"),
    "cut PDF": ("a.pdf", pdf(["x"] * 9)[:500], "cut off or damaged"),
    "PDF in name alone": ("a.pdf", b"%PDF-1.7\n" + bytes(range(256)) * 40, "cut off or damaged"),
    "locked PDF": ("a.pdf", LOCKED, "protected by a password"),
    "too many pages": ("a.pdf", pdf(["x"] * 2001), "2,001 pages: up to 2,000 are accepted"),
    "cut Office file": ("a.docx", docx(("Normal", "x"))[:2000], "cut off or damaged"),
    "broken XML": ("a.docx", repacked(docx(), "word/document.xml", b"<w:document"), "is damaged"),
    "archive": ("a.zip", archive_of(a=b"x"), "archives are not accepted"),
    "many members": ("a.docx", archive_of(**{str(number): b"" for number in range(10_001)}), "10,001 files"),
    "swelling": ("a.xlsx", repacked(xlsx(A=[["x"]]), "xl/more.xml", bytes(270 << 20)), "swells"),
    "ratio": ("a.xlsx", repacked(xlsx(A=[["x"]]), "xl/more.xml", bytes(40 << 20)), "swells"),
    "laughs": ("a.docx", repacked(docx(), "word/document.xml", LAUGHS), "a.docx"),
    "old Office": ("a.doc", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600), "before 2007"),
    "program": ("a.txt", b"\x7fELF" + bytes(600), "can't be read"),
    "one point": ("a.png", png_of(1, 1), "1 by 1 pixels"),
    "long image": ("a.png", png_of(20_001, 9), "20,001 by 9 pixels"),
    "bomb": ("a.png", png_of(19_000, 19_000), "up to"),
    "cut image": ("a.png", encoded(Image.effect_noise((200, 200), 60))[:9000], "cut off or damaged"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_no_good_document_is_refused_in_one_sentence(tmp_path: Path, what: str) -> None:
    name, content, said = REFUSED[what]
    assert said in refusal(tmp_path, name, content)


def test_reading_that_takes_too_long_is_ended_with_its_process(tmp_path: Path) -> None:
    assert "took more than" in refusal(tmp_path, "a.pdf", pdf(["x"] * 1500), wall_s=0.05)
    assert not _readers(tmp_path)


async def test_reading_that_nobody_waits_for_ends_with_its_process(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(pdf(["word " * 200] * 1500))
    begun = asyncio.Event()
    task = asyncio.create_task(read(file, "a.pdf", lambda *_: begun.set()))
    await begun.wait()
    assert _readers(tmp_path)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not _readers(tmp_path)


def _readers(folder: Path) -> list[psutil.Process]:
    children = psutil.Process().children()
    return [one for one in children if any(str(folder) in word for word in one.cmdline())]


def test_a_reader_has_little_memory_and_writes_no_file(tmp_path: Path) -> None:
    code = (
        "import sys; from modelworks.assistant.documents.limits import confine; confine()\n"
        "try: bytearray(3 << 30)\n"
        "except MemoryError: print('no memory')\n"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "try:\n"
        "    with open(sys.argv[1], 'w') as file: file.write('x')\n"
        "except OSError: print('no file')\n"
    )
    import subprocess

    command = [sys.executable, "-c", code, str(tmp_path / "written")]
    ended = subprocess.run(command, capture_output=True, text=True, env={**os.environ}, check=True)
    assert ended.stdout.split("\n") == ["no memory", "no file", ""]
    assert limits.MEMORY < 3 << 30


def upright_of(content: bytes, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Image.Image:
    """The image as a model is given it; without the minutes that OCR takes on a busy machine."""
    from modelworks.assistant.documents.blocks import Picture
    from modelworks.assistant.documents.images import image

    monkeypatch.setattr(ocr, "reader", lambda: None)
    file = folder / "file"
    file.write_bytes(content)
    (found,) = [part for part in image(file, "a") if isinstance(part, Picture)]
    return Image.open(io.BytesIO(found.content))


def test_images_of_every_make_reach_a_model_upright_in_rgb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    red = Image.new("CMYK", (40, 20), (0, 255, 255, 0))
    shown = upright_of(encoded(red, "JPEG"), tmp_path, monkeypatch)
    assert (shown.mode, shown.size) == ("RGB", (40, 20))
    level, green, _ = shown.getpixel((20, 10))
    assert level > 200 > 60 > green
    exif = Image.Exif()
    exif[0x0112] = 6  # taken with the camera on its side
    turned = upright_of(encoded(Image.new("RGB", (40, 20)), "JPEG", exif=exif), tmp_path, monkeypatch)
    assert turned.size == (20, 40)
    frames = [Image.new("L", (30, 30), shade) for shade in (255, 0)]
    first = upright_of(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]), tmp_path, monkeypatch)
    assert min(first.getpixel((15, 15))) > 250
    clear = upright_of(encoded(Image.new("RGBA", (30, 30), (0, 0, 0, 0))), tmp_path, monkeypatch)
    assert min(clear.getpixel((15, 15))) > 250  # what can be seen through is on paper
    large = upright_of(encoded(Image.new("1", (6000, 3000))), tmp_path, monkeypatch)
    assert large.size == (1536, 768)


@pytest.mark.slow
def test_text_in_an_image_and_on_a_scanned_page_is_read_by_ocr(tmp_path: Path) -> None:
    if ocr.find_spec("rapidocr") is None:
        pytest.skip("the extra ocr is not installed")
    found = read_now(tmp_path, "a.png", picture("Invoice 4711 total 99 EUR"))
    assert found.kind == "image"
    assert found.picture is not None
    assert "".join(found.blocks[0].text.split()) == "Invoice4711total99EUR"
    assert found.remarks == ["read by OCR for models that take text only"]
    scan = encoded(Image.open(io.BytesIO(picture("Invoice 4711 total 99 EUR"))), "PDF")
    found = read_now(tmp_path, "a.pdf", scan)
    assert "4711" in found.blocks[0].text
    assert "read by OCR" in found.remarks[0]


def test_what_stands_beside_each_other_in_an_image_is_one_line() -> None:
    words = [(200, 10, 30, "99 EUR"), (10, 12, 31, "Total"), (10, 50, 70, "Thanks")]
    assert ocr.laid_out([(float(a), float(b), float(c), d) for a, b, c, d in words]) == "Total   99 EUR\nThanks"


@pytest.mark.parametrize(
    "text",
    [
        "A sentence of nine words that says nothing much. " * 100,
        "\n\n".join(f"Paragraph {number}. " + "Words " * 60 for number in range(20)),
        "x" * 5000,
        "長い文章。" * 700,
    ],
)
def test_passages_without_their_overlaps_are_the_text_and_none_is_too_long(text: str) -> None:
    pieces = split([Block(text, "page 1", "H")])
    assert "".join(piece.text[piece.overlap :] for piece in pieces) == text
    assert len(pieces) > 1
    assert max(len(piece.text) for piece in pieces) <= LONGEST
    assert max(piece.overlap for piece in pieces) <= OVERLAP
    for before, after in pairwise(pieces):
        assert before.text.endswith(after.text[: after.overlap])


def test_passages_end_at_sentences_and_never_span_two_places() -> None:
    pieces = split([Block("One sentence here. " * 100, "page 1"), Block("b", "page 2"), Block("c", "page 2")])
    assert all(piece.text.rstrip().endswith(".") for piece in pieces[:-1])
    assert [(piece.text, piece.place) for piece in pieces if piece.place != "page 1"] == [("b\nc", "page 2")]
