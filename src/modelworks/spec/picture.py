"""Opening a picture that somebody else made, and fitting it to the tiles of a vision tower.

The header decides before anything is unpacked: a small file can claim to be an image that fills the memory. What comes
out is upright, has three colours, and is the first frame of an animation. Pillow is imported when it is needed.
"""

from __future__ import annotations

import io
import math
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from modelworks.spec.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF")
MOST_PIXELS = 64_000_000
LONGEST_SIDE = 20_000


def open_picture(source: Path | bytes, name: str, least: int = 1) -> Image:
    """The picture in a file or in its bytes: its first frame, upright, in RGB; what is transparent is white.

    Each side has `least` pixels or more.

    Raises
    ------
    InputError
        If there is no such file, it is cut off or damaged, of another format than `FORMATS`, too small or too large.
        The sentence begins with `name`.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    # Pillow only warns up to twice its limit.
    Image.MAX_IMAGE_PIXELS = MOST_PIXELS
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(source if isinstance(source, Path) else io.BytesIO(source), formats=FORMATS) as opened:
                _refuse_size(name, *opened.size, least)
                opened.load()
                upright = ImageOps.exif_transpose(opened)
    except InputError:
        raise
    except (FileNotFoundError, IsADirectoryError):
        raise InputError(f"{name}: there is no such file") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise InputError(f"{name} has too many pixels: up to {MOST_PIXELS:,} are accepted") from None
    except UnidentifiedImageError:
        raise InputError(f"{name} is no picture that can be read: {', '.join(FORMATS)} are accepted") from None
    except PermissionError:
        raise InputError(f"{name}: may not be read") from None
    except (OSError, SyntaxError, ValueError, EOFError):
        raise InputError(f"{name} is cut off or damaged") from None
    if upright.mode in {"RGBA", "LA", "PA"} or "transparency" in upright.info:
        seen = upright.convert("RGBA")
        flat = Image.new("RGB", upright.size, "white")
        flat.paste(seen, mask=seen.getchannel("A"))
        return flat
    return upright.convert("RGB")


def fitted(picture: Image, size: int, per_side: int) -> Image:
    """A picture resized to a whole number of tiles of `size` pixels each way, its longer side to `per_side` of them.

    As Idefics3's processor does it: the longer side is brought to its length, up or down, then both sides to the next
    multiples of a tile, each time by Lanczos' filter. Where a picture isn't cut, it is squeezed into one tile.
    """
    from PIL.Image import Resampling

    near = picture.resize(_near(picture.size, per_side * size), Resampling.LANCZOS)
    if per_side == 1:
        return near.resize((size, size), Resampling.LANCZOS)
    width, height = near.size
    ratio = width / height
    if width >= height:
        width = _whole(width, size)
        height = _whole(int(width / ratio), size)
    else:
        height = _whole(height, size)
        width = _whole(int(height * ratio), size)
    return near.resize((width, height), Resampling.LANCZOS)


def _near(size: tuple[int, int], longest: int) -> tuple[int, int]:
    """The size (width, height) of a picture whose longer side is brought to `longest`, the other to an even number."""
    width, height = size
    ratio = width / height
    if width >= height:
        other = int(longest / ratio)
        return longest, max(1, other + other % 2)
    other = int(longest * ratio)
    return max(1, other + other % 2), longest


def _whole(length: int, size: int) -> int:
    return max(1, math.ceil(length / size)) * size


def _refuse_size(name: str, width: int, height: int, least: int) -> None:
    if min(width, height) < least or max(width, height) > LONGEST_SIDE or width * height > MOST_PIXELS:
        raise InputError(
            f"{name} is {width:,} by {height:,} pixels: "
            f"{least} to {LONGEST_SIDE:,} a side and up to {MOST_PIXELS:,} in all are accepted"
        )
