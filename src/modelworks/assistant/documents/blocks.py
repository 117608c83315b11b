"""What reading a document gives: blocks of text with their places."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Block:
    """Text that stands together."""

    text: str
    place: str = ""
    """Where it is, in a reader's words: ``page 3``, ``slide 2``, ``sheet Costs``, ``lines 1 to 40``."""
    heading: str = ""
    """What it stands under."""


@dataclass(frozen=True)
class Progress:
    """How many of a document's parts have been read."""

    done: int
    total: int


@dataclass(frozen=True)
class Picture:
    """An image as a model can take it."""

    content: bytes
    """A JPEG."""


@dataclass(frozen=True)
class Remark:
    """What a reader of the document should know of how it was read."""

    text: str


Read = Iterator[Block | Progress | Picture | Remark]
