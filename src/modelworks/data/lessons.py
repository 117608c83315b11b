"""Conversations about pictures, packed: tokens, which of them are learnt, and the tiles of each sequence.

Two sources. What is written (JSON lines of messages with image parts, whose paths are relative to the file) is checked
and encoded once, every picture opened; tokens and answers are kept as of other dialogues, and beside them
``SPLIT.pictures.jsonl`` with the paths and numbers of tiles of each conversation. What is drawn is kept nowhere: a
sequence is a function of its number, so that no picture comes twice. Conversations that are longer than a sequence are
left out, since half a picture is none; of one that is drawn, the last questions are.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from modelworks.data.answers import DialogueDataset
from modelworks.data.dialogues import Dialogue, DialoguePacking
from modelworks.data.distinct import digest_of, in_share
from modelworks.data.images import IMAGE, marks, read_tiles, tiles_of
from modelworks.data.interleaved import Lesson, lesson
from modelworks.data.packed import SHARD_TOKENS, SPLITS, PackedDataset, Split, SplitWriter
from modelworks.data.records import BadRecord, Make, read_json
from modelworks.data.tokenizer import separator_id
from modelworks.spec.errors import InputError, OperationError
from modelworks.spec.model import VisionSpec

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from modelworks.data.pictures import Picture
    from modelworks.data.preparation import Progress
    from modelworks.data.sources import Source

_TOKENIZER_TEXTS = 100_000
"""Conversations that a tokenizer is trained on."""
_TOKENIZER_PICTURES = 800
"""Pictures that are drawn for a tokenizer."""
_ENDLESS = 2**40
"""Sequences of drawn pictures, and how far apart those of two seeds begin."""
_HELD_OUT = 4096
_MEASURED = 64
"""Held-out pictures by which the bytes of an answer's tokens are known."""


class SeeingDataset(DialogueDataset, ABC):
    """Packed conversations about pictures."""

    def __init__(self, folder: Path, vision: VisionSpec) -> None:
        super().__init__(folder)
        self.vision = vision

    @abstractmethod
    def tiles(self, split: Split, item: int, seq_len: int) -> Tensor:
        """The tiles (N, 3, image_size, image_size) of a sequence's pictures, in their order; N may be 0."""

    def _joined(self, tiles: list[Tensor]) -> Tensor:
        side = self.vision.image_size
        return torch.cat(tiles) if tiles else torch.empty(0, 3, side, side)


class WrittenPictures(SeeingDataset):
    """Prepared conversations about pictures in files, which are opened as they are needed."""

    def tiles(self, split: Split, item: int, seq_len: int) -> Tensor:
        """See `SeeingDataset.tiles`; an `OperationError` if a picture isn't what it was when it was prepared."""
        found: list[Tensor] = []
        for dialogue in self._packing(split, seq_len)[0][item]:
            for path, expected in self._pictures[split][dialogue]:
                try:
                    pixels = read_tiles(Path(path), self.vision, path).pixels
                except InputError as error:
                    raise OperationError(f"a picture has changed since it was prepared: {error}") from None
                if len(pixels) != expected:
                    raise OperationError(
                        f"a picture has changed since it was prepared: {path} makes {len(pixels)} tiles and made "
                        f"{expected}"
                    )
                found.append(pixels)
        return self._joined(found)

    def _left_out(self, split: Split, seq_len: int, long: list[int]) -> set[int]:
        return set(long)

    @cached_property
    def _pictures(self) -> dict[str, list[list[tuple[str, int]]]]:
        try:
            return {
                split: [
                    json.loads(line)
                    for line in (self.folder / f"{split}.pictures.jsonl").read_text(encoding="utf-8").splitlines()
                ]
                for split in SPLITS
            }
        except (OSError, ValueError) as error:
            raise OperationError(f"{self.folder} holds no prepared pictures: {error}") from None


class DrawnPictures(SeeingDataset):
    """Conversations about pictures that are drawn as they are needed: `vision.images` of them to a sequence.

    The validation split is the generator's held-out one.
    """

    def __init__(self, folder: Path, vision: VisionSpec) -> None:
        from tokenizers import Tokenizer

        PackedDataset.__init__(self, folder)
        self.vision = vision
        self._tokenizer = Tokenizer.from_file(str(self.tokenizer_file))
        self._kinds = tuple(self.manifest["kinds"])
        self._last: tuple[tuple[Split, int, int], list[DrawnLesson]] | None = None

    def sequence_count(self, split: Split, seq_len: int) -> int:
        """Sequences of a split: no end of those to train on."""
        return _ENDLESS if split == "train" else _HELD_OUT

    def cut(self, split: Split, seq_len: int) -> int:
        """None is kept that could be too long."""
        return 0

    def items(self, split: Split, position: int, count: int, seq_len: int, seed: int) -> np.ndarray:
        """Which sequences come next: those of a seed in their order."""
        first = position + (seed * _ENDLESS if split == "train" else 0)
        return np.array([first + place for place in range(count)], dtype=object)

    def sequence(self, split: Split, item: int, seq_len: int) -> np.ndarray:
        """One sequence of a split, by its number: (2, seq_len + 1)."""
        found = np.zeros((2, seq_len + 2), dtype=np.int64)
        found[0] = self.separator
        place = 0
        for one in self._lessons(split, item, seq_len):
            found[0, place : place + len(one.tokens)] = one.tokens
            found[1, place : place + len(one.tokens)] = one.learnt
            place += len(one.tokens) + 1
        return found[:, :-1]

    def tiles(self, split: Split, item: int, seq_len: int) -> Tensor:
        """See `SeeingDataset.tiles`."""
        return self._joined([one.tiles for one in self._lessons(split, item, seq_len) if one.tiles is not None])

    def signs(self, split: Split, item: int, seq_len: int) -> Tensor:
        """What is written where: the token of the sign (N, tokens of a tile) that stands in each image token's square,
        the image's own token where none does, and -1 where that can't be said or the tokenizer has no piece for it.

        The pictures are seen as a whole (`vision.tiles` is 1).
        """
        from modelworks.data.pictures import signs_in_squares

        side = math.isqrt(self.vision.tokens_per_tile)
        return torch.tensor(
            [
                [_piece(sign, self._tokenizer) for sign in signs_in_squares(one.shown, side)]
                for one in self._lessons(split, item, seq_len)
            ]
        )

    def _lessons(self, split: Split, item: int, seq_len: int) -> list[DrawnLesson]:
        """The conversations of a sequence; the last ones are kept, since tokens and tiles are asked for in turn."""
        key, last = (split, item, seq_len), self._last
        if last is not None and last[0] == key:
            return last[1]
        room, found = seq_len + 2, []
        for index in range(item * self.vision.images, (item + 1) * self.vision.images):
            whole = drawn_lesson(index, split, self._kinds, self._tokenizer, self.vision)
            one = _within(whole, room - 1)
            if one is not None:
                found.append(one)
                room -= len(one.tokens) + 1
        if not found:
            raise InputError(
                f"train.seq_len = {seq_len} is not accepted: no drawn picture with one question and its answer has so "
                "few tokens; a longer one is"
            )
        self._last = key, found
        return found


@dataclass(frozen=True)
class DrawnLesson(Lesson):
    """A conversation about a drawn picture."""

    shown: Picture


def drawn_lesson(
    index: int, split: Split, kinds: tuple[str, ...], tokenizer: Tokenizer, vision: VisionSpec
) -> DrawnLesson:
    """A drawn picture with all of its questions: the first one's conversation, and of the others what follows the
    picture there, a document each (`Documents.picture`). So none gives another away."""
    shown = _drawn(index, split, kinds)
    tiles = tiles_of(shown.image, vision)
    picture = vision.image_token
    assert picture is not None
    tokens: list[int] = []
    learnt: list[int] = []
    for question in shown.questions:
        asked = [{"type": "image", "image": "drawn"}, {"type": "text", "text": question.text}]
        messages: list[dict[str, Any]] = [
            {"role": "user", "content": asked},
            {"role": "assistant", "content": question.answer},
        ]
        one = lesson(messages, tokenizer, vision, lambda _: tiles)
        begin = 0
        if tokens:
            begin = len(one.tokens) - one.tokens[::-1].index(picture) + 1  # behind the mark that closes it
            tokens, learnt = [*tokens, separator_id(tokenizer)], [*learnt, 0]
        tokens, learnt = tokens + one.tokens[begin:], learnt + one.learnt[begin:]
    return DrawnLesson(tokens, tiles.pixels, learnt, [len(tiles.pixels)], shown)


def _piece(sign: str | None, tokenizer: Tokenizer) -> int:
    found = None if sign is None else tokenizer.token_to_id(sign or IMAGE)
    return -1 if found is None else int(found)


def _drawn(index: int, split: Split, kinds: tuple[str, ...]) -> Picture:
    from modelworks.data.pictures import picture

    return picture(index, 0, "train" if split == "train" else "held-out", kinds)


def _within(whole: DrawnLesson, room: int) -> DrawnLesson | None:
    """As much of a conversation as has room, up to the end of an answer; nothing if not even the first one has."""
    if len(whole.tokens) <= room:
        return whole
    ends = [place + 1 for place in range(room) if whole.learnt[place] and not whole.learnt[place + 1]]
    if not ends:
        return None
    return replace(whole, tokens=whole.tokens[: ends[-1]], learnt=whole.learnt[: ends[-1]])


def open_lessons(folder: Path, vision: VisionSpec) -> SeeingDataset:
    """What `prepare_lessons` has written."""
    return (
        WrittenPictures(folder, vision)
        if (folder / "train.pictures.jsonl").is_file()
        else DrawnPictures(folder, vision)
    )


def prepare_lessons(source: Source, vocab: int, vision: VisionSpec, folder: Path, progress: Progress) -> None:
    """Write the tokenizer, what is prepared, and last the manifest.

    Raises
    ------
    InputError
        If the tokenizer doesn't fit, too many conversations can't be learnt from, or none is left.
    """
    if source.files:
        _LessonPacking(source, vocab, vision, folder).run(progress)
        return
    from modelworks.data.pictures import kinds_of

    try:
        kinds = kinds_of(",".join(source.spec.kinds))
    except InputError as error:
        raise InputError(str(error).replace("--kinds", "data.kinds =")) from None

    def texts() -> Iterator[str]:
        for index in range(_TOKENIZER_PICTURES):
            if index % 100 == 0:
                progress(index, 0, None)
            for question in _drawn(index, "train", kinds).questions:
                yield from (question.text, question.answer)

    tokenizer = _tokenizer(source.spec.tokenizer, texts(), vocab, vision)
    tokenizer.save(str(folder / "tokenizer.json"))
    held_out = [_drawn(index, "validation", kinds) for index in range(_MEASURED)]
    answers = [question.answer for shown in held_out for question in shown.questions]
    tokens = sum(len(tokenizer.encode(answer, add_special_tokens=False).ids) + 1 for answer in answers)
    counts = {"documents": 0, "tokens": 0, "bytes": 0}
    measured = {"answer_tokens": tokens, "answer_bytes": sum(len(answer.encode()) for answer in answers)}
    manifest = {
        "source": "pictures",
        "files": 0,
        "kinds": kinds,
        **counts,
        "splits": dict.fromkeys(SPLITS, counts | measured),
        "tokenizer": source.spec.tokenizer,
        "pieces": tokenizer.get_vocab_size(),
        "separator": separator_id(tokenizer),
        "dtype": "uint16",
        "shard_tokens": SHARD_TOKENS,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2), encoding="utf-8")


def _tokenizer(given: str, texts: Iterator[str], vocab: int, vision: VisionSpec) -> Tokenizer:
    """The tokenizer that is given, or one trained on texts, with the marks of pictures.

    Raises
    ------
    InputError
        If it has no room for the marks, or the network takes another token for pictures.
    """
    from modelworks.data.tokenizer import load_tokenizer, train_tokenizer

    needed = marks(vision)
    if given == "bpe":

        def with_template() -> Iterator[str]:
            # Roles, which ChatML writes before each text, and two newlines, which llama.cpp looks up, are pieces.
            for text in texts:
                yield from (text, "user", "assistant", "\n\n")

        tokenizer = train_tokenizer(with_template(), vocab, needed)
    else:
        tokenizer = load_tokenizer(given, vocab)
        missing = [mark for mark in needed if tokenizer.token_to_id(mark) is None]
        tokenizer.add_special_tokens(missing)
        pieces = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())
        if pieces > vocab:
            raise InputError(
                f"model.vocab = {vocab} is not accepted: the tokenizer has {pieces} pieces with the marks of pictures; "
                "at least so many are"
            )
    for mark in ("<|im_start|>", "<|im_end|>"):
        if tokenizer.token_to_id(mark) is None:
            raise InputError(f"data.tokenizer = {given!r} is not accepted: it has no token {mark}, which ChatML needs")
    found = tokenizer.token_to_id(IMAGE)
    if vision.image_token != found:
        raise InputError(
            f"model.vision.image_token = {vision.image_token} is not accepted: the tokenizer's token {IMAGE} is {found}"
        )
    return tokenizer


def _conversation_from(value: Any, file: str, line: int) -> Dialogue | BadRecord:
    """The messages in one record of JSON, with the paths of pictures from the file's folder on."""
    messages = value.get("messages") if isinstance(value, dict) else None
    if not isinstance(messages, list) or not messages or not all(isinstance(one, dict) for one in messages):
        return BadRecord(file, line, "no conversation: a record with a list 'messages' is needed")
    folder = Path(file).parent
    return Dialogue([one | {"content": _resolved(one.get("content"), folder)} for one in messages], file, line)


def _resolved(content: Any, folder: Path) -> Any:
    if not isinstance(content, list):
        return content
    return [
        part | {"image": str(folder / part["image"])}
        if isinstance(part, dict) and isinstance(part.get("image"), str)
        else part
        for part in content
    ]


def _texts_of(content: Any) -> str:
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    return "".join(part["text"] for part in parts if isinstance(part, dict) and isinstance(part.get("text"), str))


def _pictures_of(dialogue: Dialogue) -> list[str]:
    """The paths of a conversation's pictures, in their order."""
    return [
        part["image"]
        for message in dialogue.messages
        if isinstance(message["content"], list)
        for part in message["content"]
        if part["type"] == "image"
    ]


def _texts(source: Source) -> Iterator[str]:
    """What a tokenizer is trained on: the first conversations, without those that are held out."""
    left = _TOKENIZER_TEXTS
    for file in source.files:
        for record in read_json(file, _conversation_from):
            if isinstance(record, BadRecord) or in_share(digest_of(record.utf8), source.spec.validation_fraction):
                continue
            yield from (_texts_of(message["content"]) for message in record.messages)
            left -= 1
            if left == 0:
                return


class _LessonPacking(DialoguePacking):
    """One preparation of conversations about pictures in files."""

    _what = "conversations"
    _make: ClassVar[Make[Any]] = staticmethod(_conversation_from)

    def __init__(self, source: Source, vocab: int, vision: VisionSpec, folder: Path) -> None:
        tokenizer = _tokenizer(source.spec.tokenizer, _texts(source), vocab, vision)
        super().__init__(source, tokenizer, ("", {}), vocab, folder)
        self._vision = vision

    def run(self, progress: Progress) -> None:
        """See `DialoguePacking.run`."""
        self._tokenizer.save(str(self._folder / "tokenizer.json"))
        dtype = np.dtype(np.uint16 if self._vocab <= 2**16 else np.uint32)
        writers = {split: SplitWriter(self._folder, split, dtype, SHARD_TOKENS) for split in SPLITS}
        answers = {split: (self._folder / f"{split}.answers.bin").open("wb") for split in SPLITS}
        pictures = {split: (self._folder / f"{split}.pictures.jsonl").open("w", encoding="utf-8") for split in SPLITS}
        split: Split
        try:
            for dialogue, held_out in self._records():
                try:
                    one = lesson(dialogue.messages, self._tokenizer, self._vision)
                except InputError as error:
                    self._refuse(dialogue, str(error))
                    continue
                split = "validation" if held_out else "train"
                writers[split].add(one.tokens, len(dialogue.utf8))
                answers[split].write(bytes(one.learnt))
                shown = list(zip(_pictures_of(dialogue), one.pictures, strict=True))
                pictures[split].write(json.dumps(shown) + "\n")
                self._answer_tokens[split] += sum(one.learnt)
                self._answer_bytes[split] += sum(
                    len(_texts_of(said["content"]).encode())
                    for said in dialogue.messages
                    if said["role"] == "assistant"
                )
                progress(sum(writer.documents for writer in writers.values()), self._bytes_done, None)
        finally:
            for split in SPLITS:
                writers[split].close()
                answers[split].close()
                pictures[split].close()
        self._bad.check(sum(writer.documents for writer in writers.values()), self._duplicates)
        if writers["train"].tokens == 0:
            raise InputError("data.source = 'pictures' is not accepted: data.files hold no conversation to train on")
        manifest = json.dumps(self._manifest(writers, dtype), indent=2, ensure_ascii=False)
        (self._folder / "manifest.json").write_text(manifest, encoding="utf-8")

    def _separator(self) -> int:
        return separator_id(self._tokenizer)  # what people write is never a special token here
