"""Conversations with pictures between the words, as token ids and tiles.

A message's content is a text, or a list of parts ``{"type": "text", "text": ...}`` and ``{"type": "image", "image":
...}``. Two ideas: what the template and the pictures add are tokens by name, and what people wrote is text, even where
it spells such a token out; and text that stands together is encoded together, so that the ids are those of the whole
conversation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer
from torch import Tensor

from modelworks.data.images import Mark, Piece, Tiles, read_tiles
from modelworks.spec.errors import InputError
from modelworks.spec.model import VisionSpec

Template = Literal["chatml", "smolvlm"]
"""`chatml` is that of the models that we train; `smolvlm` that of SmolVLM."""
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Interleaved:
    """A conversation as a network that sees takes it."""

    tokens: list[int]
    """With the image's token in every place that an image takes."""
    tiles: Tensor | None
    """(N, 3, image_size, image_size) of all pictures in their order; None without pictures."""


def interleave(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    vision: VisionSpec,
    template: Template = "chatml",
    *,
    answer: bool = True,
) -> Interleaved:
    """Encode a conversation.

    Parameters
    ----------
    messages
        With `role` and `content`; the image of a part is a path, or the bytes of a file.
    tokenizer
        Has a token for each of `images.marks`, and those of the template.
    vision
        The tower.
    template
        How roles and ends of messages are written.
    answer
        Whether the beginning of the assistant's answer follows.

    Raises
    ------
    InputError
        If a message or a picture can't be read, or the tokenizer lacks a token.
    """
    if not messages:
        raise InputError("messages is empty: at least one message is needed")
    pictures: list[Tiles] = []

    def look(source: Path | bytes, name: str) -> list[Piece]:
        pictures.append(read_tiles(source, vision, name))
        return pictures[-1].pieces(vision)

    write = {"chatml": _chatml, "smolvlm": _smolvlm}[template]
    pieces = write([_parts(message, number, look) for number, message in enumerate(messages)], answer)
    tiles = torch.cat([picture.pixels for picture in pictures]) if pictures else None
    return Interleaved(_encoded(pieces, tokenizer), tiles)


@dataclass(frozen=True)
class Lesson(Interleaved):
    """A conversation to be learnt from."""

    learnt: list[int]
    """Of each token 1 where it is the model's to say: an answer and the mark of its end."""
    pictures: list[int]
    """The number of tiles of each picture."""


class _Answer(str):
    """What the model is to say. It is encoded by itself, since it is asked before it answers."""

    __slots__ = ()


def lesson(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    vision: VisionSpec,
    picture: Callable[[str], Path | Tiles] = Path,
) -> Lesson:
    """Encode a conversation to be learnt from, in ChatML, each part by itself as the model is prompted.

    Parameters
    ----------
    messages
        As for `interleave`; the last one is the assistant's, and the assistant shows no pictures.
    tokenizer, vision
        As for `interleave`.
    picture
        From what stands for a picture in a message to where it is, or to its tiles.

    Raises
    ------
    InputError
        If a message is empty, the last one is no answer, or as `interleave` does.
    """
    pictures: list[Tiles] = []

    def look(source: Path | bytes, name: str) -> list[Piece]:
        found = picture(str(source))
        pictures.append(read_tiles(found, vision, str(found)) if isinstance(found, Path) else found)
        return pictures[-1].pieces(vision)

    said: list[_Message] = []
    for number, message in enumerate(messages):
        one, where = _parts(message, number, look), f"messages[{number}]"
        shows = any(isinstance(piece, Mark) for piece in one.pieces)
        if not shows and not "".join(one.pieces).strip():
            raise InputError(f"{where}, the {one.role}'s, is empty: a text is accepted")
        if one.role == "assistant":
            if shows:
                raise InputError(f"{where} is not accepted: a picture in an answer can't be learnt; texts are")
            one = _Message(one.role, [_Answer("".join(one.pieces))], False)
        said.append(one)
    if not said or said[-1].role != "assistant":
        raise InputError("messages: the last one is not accepted: an assistant's with an answer is")
    tokens: list[int] = []
    learnt: list[int] = []
    answered = False
    for group in _grouped(_chatml(said, False)):
        ids = _encoded(group, tokenizer)
        answers = isinstance(group[0], _Answer)
        tokens += ids
        learnt += [int(answers or (answered and place == 0)) for place in range(len(ids))]
        answered = answers
    tiles = torch.cat([one.pixels for one in pictures]) if pictures else None
    return Lesson(tokens, tiles, learnt, [len(one.pixels) for one in pictures])


def _grouped(pieces: list[Piece]) -> list[list[Piece]]:
    """What stands together: marks, answers, and other text."""
    return [list(group) for _, group in groupby(pieces, type)]


@dataclass(frozen=True)
class _Message:
    role: str
    pieces: list[Piece]
    begins_with_image: bool


def _parts(message: Mapping[str, Any], number: int, look: Callable[[Path | bytes, str], list[Piece]]) -> _Message:
    """A message with its pictures opened."""
    where = f"messages[{number}]"
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise InputError(f"{where}.role = {role!r} is not accepted: one of {', '.join(ROLES)} is")
    if isinstance(content, str):
        return _Message(role, [content], False)
    if not isinstance(content, list) or not content:
        raise InputError(f"{where}.content is not accepted: a text or a list of parts is")
    pieces: list[Piece] = []
    for place, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        given = part.get(kind) if kind in ("text", "image") else None
        if kind == "text" and isinstance(given, str):
            pieces.append(given)
        elif kind == "image" and isinstance(given, (str, Path, bytes)):
            path = Path(given) if isinstance(given, str) else given
            pieces += look(path, str(path) if isinstance(path, Path) else f"{where}.content[{place}].image")
        else:
            raise InputError(
                f"{where}.content[{place}] is not accepted: a part of type 'text' with a text or of type 'image' with "
                "a path is"
            )
    return _Message(role, pieces, isinstance(pieces[0], Mark))


def _chatml(messages: list[_Message], answer: bool) -> list[Piece]:
    start, end = Mark("<|im_start|>"), Mark("<|im_end|>")
    pieces: list[Piece] = []
    for message in messages:
        pieces += [start, f"{message.role}\n", *message.pieces, end, "\n"]
    return [*pieces, start, "assistant\n"] if answer else pieces


def _smolvlm(messages: list[_Message], answer: bool) -> list[Piece]:
    pieces: list[Piece] = [Mark("<|im_start|>")]
    for message in messages:
        space = "" if message.begins_with_image else " "
        pieces += [f"{message.role.capitalize()}:{space}", *message.pieces, Mark("<end_of_utterance>"), "\n"]
    return [*pieces, "Assistant:"] if answer else pieces


def _encoded(pieces: list[Piece], tokenizer: Tokenizer) -> list[int]:
    ids: list[int] = []
    tokenizer.encode_special_tokens = True
    for group in _grouped(pieces):
        if isinstance(group[0], Mark):
            of_mark = {mark: _id(mark, tokenizer) for mark in dict.fromkeys(group)}
            ids += [of_mark[mark] for mark in group]
        else:
            ids += tokenizer.encode("".join(group), add_special_tokens=False).ids
    return ids


def _id(mark: str, tokenizer: Tokenizer) -> int:
    found = tokenizer.token_to_id(mark)
    if found is None:
        raise InputError(f"the tokenizer has no token {mark}, which a conversation with images needs")
    return int(found)
