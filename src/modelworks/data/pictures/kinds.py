"""Any picture by its index."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from PIL.Image import Resampling

from modelworks.data.pictures import charts, pages
from modelworks.data.pictures.drawing import Picture, Question, Sheet
from modelworks.data.pictures.looks import PALETTES, Split, face_of
from modelworks.spec.errors import InputError

_DRAWN: dict[str, tuple[tuple[int, int], Callable[[Sheet], list[Question]]]] = {
    "bars": ((96, 96), charts.bars),
    "text": ((96, 96), pages.text),
    "page": ((96, 96), pages.page),
    "lines": ((128, 80), charts.lines),
    "pie": ((128, 80), charts.pie),
    "table": ((192, 112), pages.table),
    "flow": ((96, 160), pages.flow),
    "receipt": ((144, 160), pages.receipt),
    "dialog": ((192, 128), pages.dialog),
}
"""Width and height in pixels, multiples of 16, and who draws it."""
_STRETCHED, _SHARE, _FACTORS = ("bars", "text", "page", "lines"), 0.7, (0.85, 1.2)
"""Kinds that fill any paper, the share of them in the train split that is drawn on another size and then stretched, and
how many times as wide or high that is. So letters have many more shapes than there are typefaces."""
KINDS: tuple[str, ...] = tuple(_DRAWN)


def picture(index: int, seed: int = 0, split: Split = "train", kinds: tuple[str, ...] = KINDS) -> Picture:
    """A picture with its questions.

    Parameters
    ----------
    index
        Not negative. The kinds take turns: picture `index` is of kind ``kinds[index % len(kinds)]``.
    seed
        Another gives other pictures.
    split
        ``train`` or ``held-out``, which has typefaces, palettes and random numbers of its own.
    kinds
        Some of `KINDS`.
    """
    kind = kinds[index % len(kinds)]
    random = Random(f"{seed} {split} {kind} {index}")
    face, palette = face_of(split, random), random.choice(PALETTES[split])
    (width, height), draw = _DRAWN[kind]
    stretched = split == "train" and kind in _STRETCHED and random.random() < _SHARE
    across, down = (random.uniform(*_FACTORS) if stretched else 1.0 for _ in range(2))
    sheet = Sheet(round(width * across), round(height * down), random, face, palette)
    questions = draw(sheet)
    random.shuffle(questions)  # in a conversation, none always stands after those that give it away
    image = sheet.image.resize((width, height), Resampling.BILINEAR) if stretched else sheet.image
    drawn = (sheet.width, sheet.height)
    return Picture(
        kind, image, drawn, tuple(questions), tuple(sheet.written), tuple(sheet.meant), face.name, palette.name
    )


def kinds_of(given: str) -> tuple[str, ...]:
    """Kinds by their names, ``bars,text``; all of them if empty.

    Raises
    ------
    InputError
        If one is unknown or named twice.
    """
    names = tuple(part.strip() for part in given.split(",")) if given else KINDS
    for name in names:
        if name not in _DRAWN:
            raise InputError(f"--kinds {name} is not accepted: {', '.join(KINDS)} are")
    if len(set(names)) < len(names):
        raise InputError(f"--kinds {given} is not accepted: it names a kind twice")
    return names
