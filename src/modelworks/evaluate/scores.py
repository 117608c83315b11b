"""How right an answer is: exact match, relaxed accuracy, ANLS, the letter of a choice; and how sure a share is.

The definitions are those of the benchmarks: relaxed accuracy is ChartQA's (Masry et al. 2022, section 5.1), ANLS is
DocVQA's (Mathew et al. 2021, section 4), and a choice is read out of an answer much as MMMU does (Yue et al. 2023,
section 3), but an answer in which no choice is found is wrong, where MMMU's own script draws one by lot.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

TOLERANCE = 0.05
"""Of relaxed accuracy, relative to the right number."""
FAR = 0.5
"""From this normalised distance on, ANLS counts nothing."""
_Z95 = 1.959963984540054


def exact(given: str, answers: Sequence[str]) -> float:
    """1 if the answer is one of the right ones; case, spaces around and within, and a full stop at the end aside."""
    return float(_plain(given) in {_plain(answer) for answer in answers})


def relaxed(given: str, answers: Sequence[str]) -> float:
    """1 if a number is within 5 % of a right one, or a text is one of the right ones (`exact`).

    A number with a percent sign is a hundredth of it, as in ChartQA's script. A right answer of 0 takes the same text.
    """
    number = _number(given)
    for answer in answers:
        right = _number(answer)
        if number is not None and right:
            if abs(number - right) <= TOLERANCE * abs(right) * (1 + 1e-9):
                return 1.0
        elif exact(given, [answer]):
            return 1.0
    return 0.0


def anls(given: str, answers: Sequence[str]) -> float:
    """1 minus the normalised edit distance to the nearest right answer, or 0 where half of it or more is wrong."""
    best = 0.0
    text = " ".join(given.casefold().split())
    for answer in answers:
        right = " ".join(answer.casefold().split())
        distance = edit_distance(text, right) / max(len(text), len(right), 1)
        if distance < FAR:
            best = max(best, 1 - distance)
    return best


def edit_distance(one: str, other: str) -> int:
    """The fewest insertions, deletions and substitutions of a sign that make one of the other (Levenshtein 1966)."""
    row = list(range(len(other) + 1))
    for above, sign in enumerate(one, start=1):
        corner, row[0] = row[0], above
        for place, wanted in enumerate(other, start=1):
            corner, row[place] = row[place], min(row[place] + 1, row[place - 1] + 1, corner + (sign != wanted))
    return row[-1]


def choice(given: str, options: Sequence[str]) -> str | None:
    """The letter that an answer chooses, or None.

    Parameters
    ----------
    given
        What the model said.
    options
        The texts of the options A, B and so on.
    """
    letters = "".join(chr(ord("A") + place) for place in range(len(options)))
    if not letters:
        return None
    said = given.strip()
    alone = re.fullmatch(rf"\W*([{letters}])\W*", said, re.IGNORECASE)
    if alone:
        return alone[1].upper()
    for pattern in (
        rf"(?i:answer|option|choice)(?i:\s+is)?\s*:?\s*\W*\b([{letters}])\b",
        rf"\(([{letters}])\)",
        rf"(?:^|\s)\**([{letters}])[.):]",
        rf"(?:^|\s)([{letters}])$",
    ):
        found = re.findall(pattern, said)
        if found:
            return str(found[-1])
    text = _plain(said)
    places = [(text.rfind(_plain(option)), letter) for letter, option in zip(letters, options, strict=True)]
    place, letter = max(places)
    return letter if place >= 0 else None


def open_answer(given: str, answers: Sequence[str]) -> float:
    """1 if an answer in words names a right one: its number to two decimals, or its text."""
    numbers = {round(float(part.replace(",", "")), 2) for part in re.findall(r"-?\d[\d,]*(?:\.\d+)?", given)}
    for answer in answers:
        right = _number(answer)
        named = re.search(rf"(?<!\w){re.escape(_plain(answer))}(?!\w)", _plain(given)) is not None
        if named if right is None else round(right, 2) in numbers:
            return 1.0
    return 0.0


def wilson(score: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a share of `count` trials (Wilson 1927).

    For scores between 0 and 1 rather than 0 or 1, such as ANLS, it is wider than needed: none vary more than those.
    """
    if count == 0:
        return 0.0, 1.0
    spread = _Z95**2 / count
    middle = (score + spread / 2) / (1 + spread)
    half = _Z95 / (1 + spread) * math.sqrt(score * (1 - score) / count + spread / (4 * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).removesuffix(".")


def _number(text: str) -> float | None:
    """A number, also with thousands set apart by commas; None for other text and for what is not finite."""
    text = text.strip()
    percent = text.endswith("%")
    try:
        number = float(text.removesuffix("%").replace(",", ""))
    except ValueError:
        return None
    if not math.isfinite(number):
        return None
    return number / 100 if percent else number
