"""From files of dialogues to packed tokens: read, check, write out by the chat template, encode, commit.

A dialogue is a JSON record ``{"messages": [{"role": "user", "content": "..."}, ...]}`` with the roles system, user and
assistant; what else it holds is passed over. One that can't be learnt from is said with its file and line, as any other
bad record: an empty message, another role, no answer, or a special token of the tokenizer written out in it, which the
model would read as the real one.

Each part of a dialogue is encoded by itself, as the model is prompted: what is asked comes first and the answer is
written behind it. An answer ends with the last special token that the template puts behind it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, ClassVar

import numpy as np

from modelworks.data.distinct import DistinctTexts, digest_of, in_share
from modelworks.data.packed import SHARD_TOKENS, SPLITS, Split, SplitWriter
from modelworks.data.records import BadRecord, BadRecords, Make, read_json
from modelworks.data.templates import TemplateProcess, TemplateRefusal
from modelworks.spec.errors import InputError, OperationError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from modelworks.data.preparation import Progress
    from modelworks.data.sources import Source

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Dialogue:
    """Messages, and where they stand."""

    messages: list[dict[str, Any]]
    file: str
    line: int

    @property
    def utf8(self) -> bytes:
        """The messages as text, by which a dialogue is told from others."""
        return json.dumps(self.messages, ensure_ascii=False).encode("utf-8", "surrogatepass")


def dialogue_from(value: Any, file: str, line: int) -> Dialogue | BadRecord:
    """The dialogue in one record of JSON."""
    messages = value.get("messages") if isinstance(value, dict) else None
    if not isinstance(messages, list) or not messages:
        return BadRecord(file, line, "no dialogue: a record with a list 'messages' is needed")
    found: list[dict[str, str]] = []
    for place, message in enumerate(messages, start=1):
        role = message.get("role") if isinstance(message, dict) else None
        content = message.get("content") if isinstance(message, dict) else None
        if role not in ROLES:
            return BadRecord(file, line, f"message {place} has the role {role!r}: {', '.join(ROLES)} are accepted")
        if not isinstance(content, str) or not content.strip():
            what = "is empty" if isinstance(content, str) else "has no text as its content"
            return BadRecord(file, line, f"message {place}, the {role}'s, {what}")
        if not _is_unicode(content):
            return BadRecord(file, line, f"message {place} is not text: it holds a lone surrogate")
        found.append({"role": role, "content": content})
    if found[-1]["role"] != "assistant":
        return BadRecord(file, line, f"the last message is the {found[-1]['role']}'s: an assistant's is needed")
    return Dialogue(found, file, line)


class DialoguePacking:
    """One preparation of dialogues: the counts that it keeps and the folder that it writes to."""

    _what = "dialogues"
    _beside = "answers.bin"
    """What a split's file is called that says more of its tokens."""
    _make: ClassVar[Make[Any]] = staticmethod(dialogue_from)

    def __init__(
        self, source: Source, tokenizer: Tokenizer, template: tuple[str, dict[str, str]], vocab: int, folder: Path
    ) -> None:
        self._source, self._spec, self._vocab, self._folder = source, source.spec, vocab, folder
        self._tokenizer, (self._template, self._names) = tokenizer, template
        self._special = {
            token.content: number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special
        }
        self._special_ids = set(self._special.values())
        self._seen: set[int] = set()
        """The special tokens that dialogues hold once they are written out."""
        self._bad = BadRecords(self._spec.max_bad_fraction, f"{self._what} cannot be learnt from")
        self._duplicates = 0
        self._bytes_done = 0
        self._records_of = dict.fromkeys(SPLITS, 0)
        self._answer_tokens, self._answer_bytes = dict.fromkeys(SPLITS, 0), dict.fromkeys(SPLITS, 0)

    def run(self, progress: Progress) -> None:
        """Write the tokenizer, the template, the shards and, last, the manifest.

        Raises
        ------
        InputError
            If too many dialogues can't be learnt from, none is left, or the template doesn't end.
        """
        self._tokenizer.save(str(self._folder / "tokenizer.json"))
        (self._folder / "chat_template.jinja").write_text(self._template, encoding="utf-8")
        dtype = np.dtype(np.uint16 if self._vocab <= 2**16 else np.uint32)
        writers = {split: SplitWriter(self._folder, split, dtype, SHARD_TOKENS) for split in SPLITS}
        try:
            with (
                TemplateProcess(self._template, self._names) as template,
                (self._folder / f"train.{self._beside}").open("wb") as train,
                (self._folder / f"validation.{self._beside}").open("wb") as validation,
            ):
                files: dict[Split, BinaryIO] = {"train": train, "validation": validation}
                for record, held_out in self._records():
                    split: Split = "validation" if held_out else "train"
                    if self._added(template, record, split, writers[split], files[split]):
                        self._records_of[split] += 1
                        progress(sum(self._records_of.values()), self._bytes_done, self._source.measured_bytes)
        finally:
            for writer in writers.values():
                writer.close()
        self._bad.check(sum(self._records_of.values()), self._duplicates)
        if writers["train"].tokens == 0:
            raise InputError(
                f"data.source = {self._what!r} is not accepted: data.files hold no {self._what[:-1]} to train on"
            )
        manifest = self._manifest(writers, dtype)
        (self._folder / "manifest.json").write_text(
            json.dumps(manifest, indent=2, ensure_ascii=False), encoding="utf-8"
        )

    def _added(
        self, template: TemplateProcess, record: Any, split: Split, writer: SplitWriter, answers_file: BinaryIO
    ) -> bool:
        """Write a dialogue to its split, unless it is a bad record."""
        encoded = self._encoded(template, record)
        if encoded is None:
            return False
        ids, answers = encoded
        writer.add(ids, len(record.utf8))
        answers_file.write(bytes(answers))
        self._answer_tokens[split] += sum(answers)
        self._answer_bytes[split] += sum(
            len(one["content"].encode()) for one in record.messages if one["role"] == "assistant"
        )
        return True

    def _records(self) -> Iterator[tuple[Any, bool]]:
        """Each different record once, and whether it is held out, up to the limits of the data section."""
        distinct = DistinctTexts()
        count = used = 0
        for record in self._read():
            if isinstance(record, BadRecord):
                self._bad.note(record, count, self._duplicates)
                continue
            text = record.utf8
            self._bytes_done += len(text)
            digest = digest_of(text)
            if not distinct.add(digest):
                self._duplicates += 1
                continue
            yield record, in_share(digest, self._spec.validation_fraction)
            count, used = count + 1, used + len(text)
            if count == self._spec.max_documents or used >= (self._spec.max_bytes or used + 1):
                return

    def _read(self) -> Iterator[Any]:
        """The source's records, good and bad."""
        for file in self._source.files:
            try:
                yield from read_json(file, type(self)._make)
            except OSError as error:
                raise OperationError(f"{file} cannot be read: {error.strerror or error}") from None

    def _encoded(
        self, template: TemplateProcess, dialogue: Dialogue, last_only: bool = False
    ) -> tuple[list[int], list[int]] | None:
        """A dialogue's tokens, and of each whether it is an answer's, or the last one's; nothing for a bad record."""
        for place, message in enumerate(dialogue.messages, start=1):
            held = next((token for token in self._special if token and token in message["content"]), None)
            if held is not None:
                self._refuse(dialogue, f"message {place} holds the tokenizer's special token {held}")
                return None
        try:
            parts = template.parts(dialogue.messages)
        except TemplateRefusal as refusal:
            self._refuse(dialogue, str(refusal))
            return None
        ids: list[int] = []
        answers: list[int] = []
        encodings = self._tokenizer.encode_batch_fast([part.text for part in parts], add_special_tokens=False)
        for place, (part, encoding) in enumerate(zip(parts, encodings, strict=True), start=1):
            here = encoding.ids
            # What follows on the mark of an answer's end, such as a line end, is the template's.
            ends = [at for at, token in enumerate(here) if token in self._special_ids]
            counts = part.answer and (place == len(parts) or not last_only)
            learnt = (ends[-1] + 1 if ends else len(here)) if counts else 0
            ids += here
            answers += [1] * learnt + [0] * (len(here) - learnt)
        self._seen |= self._special_ids & set(ids)
        return ids, answers

    def _refuse(self, dialogue: Dialogue, reason: str) -> None:
        self._bad.note(BadRecord(dialogue.file, dialogue.line, reason), 0, self._duplicates)

    def _separator(self) -> int:
        free = sorted(self._special_ids - self._seen)
        if not free:
            raise InputError(
                "data.tokenizer has no special token that isn't in the dialogues: one is needed to keep them apart"
            )
        return free[0]

    def _manifest(self, writers: dict[Any, SplitWriter], dtype: np.dtype) -> dict[str, Any]:
        splits = {
            split: {
                "documents": self._records_of[split],
                "tokens": writer.tokens,
                "bytes": writer.bytes,
                "answer_tokens": self._answer_tokens[split],
                "answer_bytes": self._answer_bytes[split],
            }
            for split, writer in writers.items()
        }
        totals = {kind: sum(split[kind] for split in splits.values()) for kind in ("documents", "bytes", "tokens")}
        return {
            "source": self._spec.source,
            "files": len(self._source.files),
            **totals,
            "splits": splits,
            "duplicates": self._duplicates,
            "empty": 0,
            "bad_records": self._bad.as_dict(),
            "tokenizer": self._spec.tokenizer,
            "pieces": self._tokenizer.get_vocab_size(),
            "separator": self._separator(),
            "dtype": dtype.name,
            "shard_tokens": SHARD_TOKENS,
        }


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
