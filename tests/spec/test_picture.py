"""Pictures that somebody else made are opened within limits, upright and in three colours, or refused in a sentence."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from modelworks.spec import InputError
from modelworks.spec.picture import open_picture


def written(picture: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    content = io.BytesIO()
    picture.save(content, kind, **options)
    return content.getvalue()


def claiming(width: int, height: int) -> bytes:
    """A small PNG whose header claims a size."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def test_a_picture_that_was_taken_sideways_is_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    flat = Image.new("RGB", (40, 20), "red")
    flat.paste("blue", (20, 0, 40, 20))
    seen = np.asarray(open_picture(written(flat, "JPEG", exif=exif, quality=95), "it"))
    assert seen.shape == (40, 20, 3)
    assert seen[5, 10, 0] > 200
    assert seen[35, 10, 2] > 200


def test_every_kind_of_colour_becomes_three_and_what_is_transparent_white() -> None:
    for mode in ("CMYK", "L", "1", "P", "YCbCr"):
        picture = Image.new("RGB", (4, 4), "white").convert(mode)
        seen = open_picture(written(picture, "JPEG" if mode in ("CMYK", "YCbCr") else "PNG"), mode)
        assert seen.mode == "RGB"
        assert np.asarray(seen).min() > 240, mode
    assert open_picture(written(Image.new("I;16", (4, 4))), "16 bits").mode == "RGB"
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert np.asarray(open_picture(written(clear), "it")).min() == 255


def test_of_an_animation_the_first_frame_is_seen() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("green", "red")]
    content = written(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert np.asarray(open_picture(content, "it"))[0, 0].tolist() == [0, 128, 0]


def test_one_pixel_and_twenty_thousand_in_a_row_are_pictures() -> None:
    assert open_picture(written(Image.new("RGB", (1, 1))), "it").size == (1, 1)
    assert open_picture(written(Image.new("L", (20_000, 1))), "it").size == (20_000, 1)


WHOLE = written(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (WHOLE[: len(WHOLE) // 2], "it is cut off or damaged"),
        (b"GIF89a", "it is (cut off or damaged|no picture that can be read)"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "it is no picture that can be read: PNG, JPEG, .* are accepted"),
        (b"", "it is no picture that can be read"),
        (claiming(20_001, 1), "it is 20,001 by 1 pixels: 1 to 20,000 a side and up to 64,000,000 in all are accepted"),
        (claiming(19_000, 19_000), "it has too many pixels: up to 64,000,000 are accepted"),
        (claiming(60_000, 60_000), "it has too many pixels"),
    ],
    ids=["cut off", "header alone", "svg", "empty", "too wide", "bomb", "larger bomb"],
)
def test_what_cannot_be_seen_is_refused_in_one_sentence(content: bytes, sentence: str) -> None:
    with pytest.raises(InputError, match=f"^{sentence}"):
        open_picture(content, "it")


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cat.png: there is no such file"):
        open_picture(tmp_path / "cat.png", "cat.png")
    with pytest.raises(InputError, match="there is no such file"):
        open_picture(tmp_path, "a folder")
