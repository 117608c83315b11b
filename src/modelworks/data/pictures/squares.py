"""What is to be read off a picture, sign by sign, in the squares that it is seen in: its writing, and values of bars.

A network that sees learns slowly from questions alone, whose answers say nothing of where to look. A drawn picture
knows where each of its signs stands, so each image token can be taught the sign in its square.
"""

from __future__ import annotations

from modelworks.data.pictures.drawing import Picture, Written

_REACH = 0.35
"""Of a letter's size: about half the height of a capital."""
_UNSURE = 0.2
"""Of a square: how near to its edge a sign's middle is said to stand on either side."""


def signs_in_squares(picture: Picture, side: int) -> list[str | None]:
    """The sign in each square of a picture that is cut into `side` x `side`, row by row: what is written there, or what
    a mark there says (`Picture.meant`).

    It is empty where there is none, and None where that can't be said: beside a sign that is nearly as far in that
    square as in its own.

    A sign stands in the square that its middle is in, or in the next one to the right if the sign before it in its line
    is there, or nowhere if that is taken too. It also stands above or below, where the square's middle is as near to
    the line's as letters are high: which of two rows a line between them is nearer to can hardly be seen. Of two lines
    that meet, the later is kept.
    """
    squares: list[str | None] = [""] * (side * side)
    width, height = picture.drawn
    for line in (*picture.written, *picture.meant):
        signs = _signs(line, side, side / width)
        for row in _rows(line, side, height / side):
            for column, sign in signs.items():
                if sign or not squares[row * side + column]:
                    squares[row * side + column] = sign
    return squares


def _signs(line: Written, side: int, squares_per_pixel: float) -> dict[int, str | None]:
    """By their columns, and None where they nearly stand."""
    found: dict[int, str] = {}
    near: dict[int, None] = {}
    for sign, x in line.signs:
        own, within = divmod(max(0.0, x * squares_per_pixel), 1)
        column = int(own) + (own in found)
        if column < side and column not in found:
            found[column] = sign
        for beside in (column - 1,) * (within < _UNSURE) + (column + 1,) * (within > 1 - _UNSURE):
            if 0 <= beside < side:
                near[beside] = None
    return near | found


def _rows(line: Written, side: int, pixels: float) -> list[int]:
    own = min(side - 1, max(0, int(line.y / pixels)))
    near = [row for row in (own - 1, own, own + 1) if abs((row + 0.5) * pixels - line.y) <= _REACH * line.size]
    return [row for row in near if 0 <= row < side] or [own]
