"""Long prompts of any number of tokens: lines of real text, with other lines hidden among them.

The text is the Python standard library's, of which a share is set aside by the hash of each file (`held_out`): what is
trained to retrieve (`benchmarks/needle.py`) sees the other files alone. Everything follows from a seed.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

from modelworks.data.records import Document
from modelworks.data.sources import open_source
from modelworks.spec.errors import InputError
from modelworks.spec.run import DataSpec

Encode = Callable[[str], list[int]]
"""The token ids of a text, without special tokens."""
_HELD_OUT = 32
"""Of 256: an eighth of the files."""
_SHORTEST_LINE = 20


@dataclass(frozen=True)
class Sample:
    """One prompt with its right answers.

    Attributes
    ----------
    ids
        The prompt and the answers behind it, as tokens.
    answers
        The (start, end) of each answer in `ids`: the tokens that the model should find.
    length
        How many tokens were asked for; `ids` has no more.
    depth
        How far down in the text its (first) hidden line lies, 0 to 1; None where nothing is hidden at one place.
    """

    ids: list[int]
    answers: list[tuple[int, int]]
    length: int
    depth: float | None = None


@cache
def held_out(kept: bool) -> tuple[tuple[str, ...], ...]:
    """The lines of each of the files that are set aside (`kept`), or of those that are not; short lines left out."""
    files = []
    for record in open_source(DataSpec()).records():
        if isinstance(record, Document) and (hashlib.sha256(record.utf8).digest()[3] < _HELD_OUT) is kept:
            lines = tuple(line for line in record.text.splitlines() if len(line.strip()) >= _SHORTEST_LINE)
            if lines:
                files.append(lines)
    return tuple(files)


def lines_of(files: Sequence[Sequence[str]], chance: random.Random) -> Iterator[str]:
    """Lines without end: passages of up to forty lines, each from a file and a place that chance picks."""
    while True:
        lines = chance.choice(files)
        start = chance.randrange(len(lines))
        yield from lines[start : start + chance.randint(5, 40)]


class Haystack:
    """Builds prompts of a wanted length for one tokenizer."""

    def __init__(self, encode: Encode) -> None:
        self.encode = encode

    def sample(
        self,
        seed: str,
        length: int,
        hidden: Sequence[tuple[float, str]],
        asked: Sequence[tuple[str, str]],
        *,
        depth: float | None = None,
    ) -> Sample:
        """Hide lines in text and ask for what they say.

        Parameters
        ----------
        seed
            Of the text.
        length
            Tokens of the whole; what is hidden and asked is never left out, the text is as long as there is room for.
        hidden
            Lines, each with its depth: 0 at the beginning of the text and 1 at its end.
        asked
            What stands at the end, piece after piece: some words, and the answer that follows them.
        depth
            What is noted as the sample's.

        Raises
        ------
        InputError
            If there is no room for what is hidden and asked.
        """
        inserts = [(place, self.encode(f"{line}\n")) for place, line in sorted(hidden)]
        ending: list[int] = []
        answers = []
        for words, answer in asked:
            ending += self.encode(words)
            ids = self.encode(answer)
            answers.append((len(ending), len(ending) + len(ids)))
            ending += ids
        room = length - len(ending) - sum(len(ids) for _, ids in inserts)
        if room < 0:
            raise InputError(
                f"a length of {length} tokens is not accepted: what is hidden and asked takes {length - room}"
            )
        lines: list[list[int]] = []
        filled = 0
        for line in lines_of(held_out(True), random.Random(seed)):
            ids = self.encode(f"{line}\n")
            if filled + len(ids) > room:
                break
            lines.append(ids)
            filled += len(ids)
        text: list[int] = []
        passed, waiting = 0, list(inserts)
        for ids in lines:
            while waiting and passed >= waiting[0][0] * filled:
                text += waiting.pop(0)[1]
            text += ids
            passed += len(ids)
        for _, ids in waiting:
            text += ids
        at = len(text)
        return Sample(text + ending, [(at + start, at + end) for start, end in answers], length, depth)
