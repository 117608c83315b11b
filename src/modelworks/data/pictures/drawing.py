"""What a picture and a question are, and the sheet on which one is drawn."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from random import Random

from PIL import Image, ImageDraw

from modelworks.data.pictures.looks import Palette, Typeface, font

Point = tuple[float, float]


@dataclass(frozen=True)
class Question:
    """Something that can be read off a picture.

    Attributes
    ----------
    about
        What is asked for, such as ``value`` or ``highest``; scores are also given by it.
    text
        The question.
    answer
        The one answer: a word, a number, or a few words as they stand in the picture.
    """

    about: str
    text: str
    answer: str


@dataclass(frozen=True)
class Written:
    """A line that was written, as `Sheet.write` was told."""

    at: Point
    text: str
    size: int
    anchor: str
    face: Typeface

    @property
    def y(self) -> float:
        """The middle of its height, in pixels."""
        return self.at[1]

    @property
    def signs(self) -> list[tuple[str, float]]:
        """Each sign but spaces, with its middle in pixels from the left."""
        letters = font(self.face, self.size)
        edges = [letters.getlength(self.text[:end]) for end in range(len(self.text) + 1)]
        left = self.at[0] - edges[-1] * {"l": 0.0, "m": 0.5, "r": 1.0}[self.anchor[0]]
        middles = (left + (begin + end) / 2 for begin, end in pairwise(edges))
        return [(sign, middle) for sign, middle in zip(self.text, middles, strict=True) if sign != " "]


@dataclass(frozen=True)
class Picture:
    """A picture, its questions, what is written in it and where, and how it looks.

    Attributes
    ----------
    drawn
        The width and height that it was drawn with, which is what `written` and `meant` count in.
    meant
        What its marks say, as if it were written on them: a bar's value at its upper end.
    """

    kind: str
    image: Image.Image
    drawn: tuple[int, int]
    questions: tuple[Question, ...]
    written: tuple[Written, ...]
    meant: tuple[Written, ...]
    typeface: str
    palette: str


class Sheet:
    """Paper to draw on, with one typeface, one palette and the random numbers of the picture.

    Parameters
    ----------
    width, height
        In pixels.
    random, face, palette
        How it is to look.
    """

    def __init__(self, width: int, height: int, random: Random, face: Typeface, palette: Palette) -> None:
        self.width, self.height = width, height
        self.random, self.face, self.palette = random, face, palette
        self.image = Image.new("RGB", (width, height), palette.paper)
        self.draw = ImageDraw.Draw(self.image)
        self.written: list[Written] = []
        self.meant: list[Written] = []

    def write(self, at: Point, text: str, size: int, anchor: str = "lm", color: str | None = None) -> None:
        """Write a line; `anchor` as Pillow has it, with the middle of its height at `at`."""
        self.draw.text(at, text, font=font(self.face, size), fill=color or self.palette.ink, anchor=anchor)
        self.written.append(Written(at, text, size, anchor, self.face))

    def note(self, at: Point, text: str) -> None:
        """Note what a mark with its middle at `at` says, without writing it."""
        self.meant.append(Written(at, text, 12, "mm", self.face))

    def width_of(self, text: str, size: int) -> float:
        """How wide a line is, in pixels."""
        return font(self.face, size).getlength(text)

    def fitting(self, texts: list[str], width: float, largest: int, smallest: int = 8) -> int:
        """The largest size at which each of some lines is no wider than `width`."""
        for size in range(largest, smallest, -1):
            if max(self.width_of(text, size) for text in texts) <= width:
                return size
        return smallest

    def colors(self, count: int) -> list[str]:
        """Colours of `count` things that are to be told apart."""
        return self.random.sample(self.palette.series, count)
