"""A document's text as passages: short enough that several fit a question, long enough to say something.

They follow the document's own parts. A part that is too long is cut between paragraphs, lines, sentences or words, in
this order, and each piece begins with the end of the one before it, so that what stands at a cut is whole in one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from modelworks.assistant.documents.blocks import Block

LONGEST = 1000
"""Characters of a passage, about; 250 tokens of English."""
OVERLAP = 150
"""Characters that it repeats of the one before it, at most."""
_CUTS = (re.compile(r"\n\s*\n"), re.compile(r"\n"), re.compile(r"(?<=[.!?…。！？])\s*(?=\S)"), re.compile(r"\s+"))


@dataclass(frozen=True)
class Piece:
    """A passage that has no number yet."""

    text: str
    place: str
    heading: str
    overlap: int
    """Characters at its beginning that the one before it ends with."""


def split(blocks: Iterable[Block]) -> list[Piece]:
    """All of a document's passages, in its order. Joined without their overlaps, they are its text."""
    return [piece for block in _joined(blocks) for piece in _pieces(block)]


def _joined(blocks: Iterable[Block]) -> Iterator[Block]:
    """Blocks of one place and heading as one, up to a passage's length."""
    held: Block | None = None
    for block in blocks:
        same = held is not None and (held.place, held.heading) == (block.place, block.heading)
        if held is not None and same and len(held.text) + len(block.text) < LONGEST:
            held = Block(f"{held.text}\n{block.text}", held.place, held.heading)
        else:
            if held is not None:
                yield held
            held = block
    if held is not None:
        yield held


def _pieces(block: Block) -> Iterator[Piece]:
    text, begin, overlap = block.text, 0, 0
    while begin < len(text):
        end = _end(text, begin + overlap, begin + LONGEST)
        yield Piece(text[begin:end], block.place, block.heading, overlap)
        if end == len(text):
            return
        after = _repeated(text, max(begin + overlap, end - OVERLAP), end)
        begin, overlap = after, end - after


def _end(text: str, begin: int, most: int) -> int:
    """Where a piece ends: at the last of the best cuts of its second half."""
    if len(text) <= most:
        return len(text)
    for cut in _CUTS:
        found = [match.end() for match in cut.finditer(text, begin + (most - begin) // 2, most)]
        if found:
            return found[-1]
    return most


def _repeated(text: str, begin: int, end: int) -> int:
    """Where the next piece begins: with a sentence or line, else with a word, of what is repeated."""
    for cut in _CUTS[1:]:
        if found := cut.search(text, begin, end):
            return found.end()
    return end
