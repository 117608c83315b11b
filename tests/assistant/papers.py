"""Documents and images as people have them, and as those make them who mean harm; all made here."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont


def pdf(pages: Sequence[str], titles: Sequence[str] = ()) -> bytes:
    """A PDF of so many pages of text, with an outline that names the first of them."""
    objects = ["<< /Type /Catalog /Pages 2 0 R /Outlines 4 0 R >>"]
    first = 5 + len(titles)
    kids = " ".join(f"{first + 2 * number} 0 R" for number in range(len(pages)))
    objects.append(f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>")
    objects.append("<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica /Encoding /WinAnsiEncoding >>")
    ends = f"/First 5 0 R /Last {4 + len(titles)} 0 R " if titles else ""
    objects.append(f"<< /Type /Outlines {ends}/Count {len(titles)} >>")
    for number, title in enumerate(titles):
        more = f"/Next {6 + number} 0 R " if number + 1 < len(titles) else ""
        more += f"/Prev {4 + number} 0 R " if number else ""
        objects.append(f"<< /Title ({title}) /Parent 4 0 R {more}/Dest [{first + 2 * number} 0 R /Fit] >>")
    for number, text in enumerate(pages):
        lines = "".join(f"({_escaped(line)}) Tj T*\n" for line in text.splitlines())
        stream = f"BT /F1 11 Tf 14 TL 50 780 Td\n{lines}ET"
        objects.append(
            "<< /Type /Page /Parent 2 0 R /MediaBox [0 0 595 842] /Resources << /Font << /F1 3 0 R >> >> "
            f"/Contents {first + 2 * number + 1} 0 R >>"
        )
        objects.append(f"<< /Length {len(stream)} >>\nstream\n{stream}\nendstream")
    out, places = io.BytesIO(b""), []
    out.write(b"%PDF-1.4\n")
    for number, content in enumerate(objects, start=1):
        places.append(out.tell())
        out.write(f"{number} 0 obj\n{content}\nendobj\n".encode("cp1252"))
    table = out.tell()
    out.write(f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n".encode())
    out.write("".join(f"{place:010} 00000 n \n" for place in places).encode())
    out.write(f"trailer << /Size {len(objects) + 1} /Root 1 0 R >>\nstartxref\n{table}\n%%EOF\n".encode())
    return out.getvalue()


def _escaped(line: str) -> str:
    return line.replace("\\", r"\\").replace("(", r"\(").replace(")", r"\)")


def docx(*blocks: tuple[str, str]) -> bytes:
    """A Word document of blocks (style, text)."""
    import docx as word

    document = word.Document()
    for style, text in blocks:
        document.add_paragraph(text, style=style)
    out = io.BytesIO()
    document.save(out)
    return out.getvalue()


def pptx(*slides: tuple[str, str, str]) -> bytes:
    """Slides (title, text, notes)."""
    import pptx as powerpoint

    deck = powerpoint.Presentation()
    for title, text, notes in slides:
        slide = deck.slides.add_slide(deck.slide_layouts[1])
        slide.shapes.title.text, slide.placeholders[1].text = title, text
        slide.notes_slide.notes_text_frame.text = notes
    out = io.BytesIO()
    deck.save(out)
    return out.getvalue()


def xlsx(**sheets: Sequence[Sequence[object]]) -> bytes:
    """A workbook of sheets by their rows."""
    import xlsxwriter

    out = io.BytesIO()
    with xlsxwriter.Workbook(out, {"in_memory": True}) as book:
        for name, rows in sheets.items():
            sheet = book.add_worksheet(name)
            for number, row in enumerate(rows):
                sheet.write_row(number, 0, row)
    return out.getvalue()


def repacked(office: bytes, member: str, content: bytes) -> bytes:
    """An Office file with another content in one of its members, or with one more."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(office)) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new:
        for each in old.infolist():
            if each.filename != member:
                new.writestr(each, old.read(each))
        new.writestr(member, content)
    return out.getvalue()


def picture(text: str = "", size: tuple[int, int] = (700, 120), **options: object) -> bytes:
    """An image with a line of text on it."""
    image = Image.new("RGB", size, "white")
    ImageDraw.Draw(image).text((30, 30), text, fill="black", font=ImageFont.load_default(size=40))
    return encoded(image, **options)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    """An image as a file."""
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def png_of(width: int, height: int) -> bytes:
    """A PNG of that many points of which nothing is kept in memory."""

    def part(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = zlib.compressobj(9)
    packed = b"".join(rows.compress(bytes(width // 8 + 1)) for _ in range(height)) + rows.flush()
    head = part(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + part(b"IDAT", packed) + part(b"IEND", b"")
