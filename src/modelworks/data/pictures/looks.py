"""Typefaces and palettes, some for training and others held out.

The typefaces come as Python packages, so that no font of the system is needed and a picture is the same everywhere:
Roboto and Caladea (Apache 2.0), Source Sans Pro, Source Serif Pro, Lato, Manrope and Hanken Grotesk (SIL OFL 1.1). A
family is in one split alone; each split has faces with and without serifs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from random import Random
from typing import Literal, get_args

from PIL import ImageFont

from modelworks.spec.errors import InputError

Split = Literal["train", "held-out"]
SPLITS: tuple[Split, ...] = get_args(Split)
Color = str


@dataclass(frozen=True)
class Typeface:
    """One face of a family, as a file of a package."""

    package: str
    file: str

    @property
    def name(self) -> str:
        """Such as ``Roboto-Bold``."""
        return self.file.rpartition(".")[0]


@dataclass(frozen=True)
class Palette:
    """Colours that go together, as ``#rrggbb``."""

    name: str
    paper: Color
    ink: Color
    grid: Color
    """Fainter than ink: lines behind a chart, borders."""
    series: tuple[Color, ...]
    """Of bars, lines, sectors and buttons; each stands out from the paper."""


def _faces(package: str, *names: str) -> list[Typeface]:
    return [Typeface(package, name) for name in names]


TYPEFACES: dict[Split, tuple[Typeface, ...]] = {
    "train": (
        *_faces("font_roboto", "Roboto-Light.ttf", "Roboto-Regular.ttf", "Roboto-Bold.ttf", "Roboto-Italic.ttf"),
        *_faces("font_source_sans_pro", "SourceSansPro-Regular.ttf", "SourceSansPro-Bold.ttf", "SourceSansPro-It.ttf"),
        *_faces("font_lato", "Lato-Regular.ttf", "Lato-Bold.ttf", "Lato-Black.ttf", "Lato-Italic.ttf"),
        *_faces("font_manrope", "Manrope-Regular.ttf", "Manrope-Medium.ttf", "Manrope-ExtraBold.ttf"),
        *_faces("font_caladea", "Caladea-Regular.ttf", "Caladea-Bold.ttf", "Caladea-Italic.ttf"),
    ),
    "held-out": (
        *_faces("font_hanken_grotesk", "HankenGrotesk-Regular.otf", "HankenGrotesk-SemiBold.otf"),
        *_faces("font_source_serif_pro", "SourceSerifPro-Regular.ttf", "SourceSerifPro-Semibold.ttf"),
    ),
}
PALETTES: dict[Split, tuple[Palette, ...]] = {
    "train": (
        Palette("paper", "#ffffff", "#202020", "#c8c8c8", ("#3366aa", "#cc4433", "#338855", "#aa7711", "#774499")),
        Palette("cream", "#fbf6e9", "#3b2f1e", "#d8ccb0", ("#8c4a2f", "#2f6f6a", "#a8801f", "#5a4a8a", "#4f7030")),
        Palette("sky", "#eaf3fa", "#12304a", "#b7cbdb", ("#1b6ca8", "#c2502e", "#2a8a72", "#8a4f9e", "#7a7020")),
        Palette("mint", "#eef8f1", "#173a2a", "#bcd6c6", ("#1f7a4d", "#b0473f", "#2b62a0", "#94702a", "#6d4a92")),
        Palette("rose", "#fdf1f3", "#45202b", "#e0c3ca", ("#b03060", "#2f7a8a", "#8a6a20", "#5048a0", "#407a40")),
        Palette("stone", "#f0f0ee", "#262a2e", "#c2c4c4", ("#4a5a6a", "#a85020", "#2a7a60", "#80408a", "#8a7a10")),
        Palette("night", "#14181f", "#e8edf2", "#444c58", ("#5aa9f0", "#f08a5a", "#6ad0a0", "#d0b050", "#c090f0")),
        Palette("slate", "#25303b", "#f0f4f4", "#52606c", ("#70c0e8", "#f0a070", "#90d890", "#e8d070", "#e098c8")),
        Palette("plum", "#2a1c2e", "#f4eaf4", "#5c4a60", ("#e080b0", "#80c8d8", "#e8c060", "#a0d880", "#b0a0f8")),
        Palette("print", "#ffffff", "#000000", "#bbbbbb", ("#555555", "#888888", "#333333", "#6a6a6a", "#1c1c1c")),
    ),
    "held-out": (
        Palette("sand", "#f6f0e2", "#2c2a24", "#d2c8b4", ("#b8602a", "#2a6a98", "#5a7a2a", "#8a3f7a", "#2f7a74")),
        Palette("ice", "#f2f7ff", "#1c2440", "#c4cede", ("#3a50b0", "#b04a70", "#1f8080", "#9a6a18", "#6a4aa8")),
        Palette("coal", "#1b1b1b", "#f2f2ea", "#4c4c4c", ("#e8b04a", "#6ab8e0", "#e0786a", "#88cc78", "#c49ae8")),
    ),
}


def face_of(split: Split, random: Random) -> Typeface:
    """A family of a split, and one of its faces."""
    families: dict[str, list[Typeface]] = {}
    for face in TYPEFACES[split]:
        families.setdefault(face.package, []).append(face)
    return random.choice(random.choice(list(families.values())))


def split_of(given: str) -> Split:
    """A split by its name.

    Raises
    ------
    InputError
        If there is no such split.
    """
    for name in SPLITS:
        if given == name:
            return name
    raise InputError(f"--split {given} is not accepted: {' and '.join(SPLITS)} are")


@cache
def font(face: Typeface, size: int) -> ImageFont.FreeTypeFont:
    """A face at a size in pixels."""
    path = files(face.package) / "files" / face.file
    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)
