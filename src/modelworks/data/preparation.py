"""From a source to packed tokens: read, drop duplicates, train the tokenizer, encode, pack, commit.

The result is a function of the data section, the vocabulary and the inputs, and is kept under a hash of them. It is
written into a temporary folder and renamed when whole; a lock lets one process prepare while others wait for it. Two
passes are made over the source where a tokenizer is trained, and nothing is held but a batch of documents and 16 bytes
per document for telling duplicates.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from filelock import FileLock

from modelworks.data.answers import DialogueDataset
from modelworks.data.dialogues import DialoguePacking
from modelworks.data.distinct import DistinctTexts, digest_of, in_share
from modelworks.data.packed import SHARD_TOKENS, PackedDataset, SplitWriter
from modelworks.data.pairs import PairDataset, PairPacking
from modelworks.data.records import BadRecord, BadRecords, Document
from modelworks.data.sources import Source, open_source
from modelworks.data.tasks import TaskDataset, TaskPacking
from modelworks.data.templates import find_template
from modelworks.spec.errors import InputError, OperationError
from modelworks.spec.model import VisionSpec
from modelworks.spec.run import DataSpec

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Progress = Callable[[int, int, int | None], None]
"""Told documents packed, bytes worked through, and their total where it is known."""

_FORMAT = 1
_TOKENIZER_BYTES = 2**26
"""Text that a tokenizer is trained on; more changes little and takes long."""
_BATCH_BYTES = 2**22
_CONVERSATIONS: dict[str, tuple[type[DialoguePacking], type[PackedDataset]]] = {
    "dialogues": (DialoguePacking, DialogueDataset),
    "pairs": (PairPacking, PairDataset),
    "tasks": (TaskPacking, TaskDataset),
}
"""The sources that a chat template writes out: what packs each, and what reads it then."""


def prepare(
    spec: DataSpec, vocab: int, folder: Path, progress: Progress | None = None, vision: VisionSpec | None = None
) -> PackedDataset:
    """Pack a source's text into tokens, or find what was packed before.

    Parameters
    ----------
    spec
        The run's data section.
    vocab
        The model's vocabulary: pieces of the tokenizer to train, or the limit for one that is given.
    folder
        Where prepared data is kept; the result is a folder in it.
    progress
        Called now and then with documents packed, bytes worked through, and their total or None.
    vision
        The model's tower, for pictures.

    Raises
    ------
    InputError
        If an input is missing or empty, a tokenizer doesn't fit, or too many records are unreadable.
    OperationError
        If reading or writing fails; nothing half-written is left.
    """
    source = open_source(spec)
    if spec.source != "pictures":
        vision = None
    name = _cache_name(source, vocab, vision)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f"{name}.lock"):
            return _found(folder / name, spec.source, vision) or _prepared(
                source, vocab, folder / name, progress or _silent, vision
            )
    except OSError as error:
        raise OperationError(f"the data cannot be prepared in {folder}: {error.strerror or error}") from error


def _cache_name(source: Source, vocab: int, vision: VisionSpec | None) -> str:
    spec = source.spec
    tokenizer = Path(spec.tokenizer).expanduser()
    unused = {"chat_template"}  # which stands below by its text
    if not spec.kinds:
        unused.add("kinds")
    if spec.source != "tasks":
        unused.add("tasks")
    facts = {
        "format": _FORMAT,
        "data": spec.model_dump(mode="json", exclude=unused),
        "vocab": vocab,
        "files": source.fingerprint(),
        "tokenizer": hashlib.sha256(tokenizer.read_bytes()).hexdigest() if tokenizer.is_file() else None,
    }
    if spec.source in _CONVERSATIONS:
        facts["template"] = _template(spec)
    if vision is not None:
        facts["vision"] = vision.model_dump(mode="json")
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]


def _template(spec: DataSpec) -> tuple[str, dict[str, str]]:
    return find_template(spec.chat_template, None if spec.tokenizer == "bpe" else Path(spec.tokenizer).expanduser())


def _opened(folder: Path, source: str, vision: VisionSpec | None) -> PackedDataset:
    """Prepared text, dialogues or pairs, or conversations about pictures."""
    if vision is not None:
        from modelworks.data.lessons import open_lessons  # loads torch, which nobody else here needs

        return open_lessons(folder, vision)
    return _CONVERSATIONS[source][1](folder) if source in _CONVERSATIONS else PackedDataset(folder)


def _found(folder: Path, source: str, vision: VisionSpec | None) -> PackedDataset | None:
    """What was prepared before, unless a file of it is missing or cut short: then it is prepared again."""
    if not folder.exists():
        return None
    try:
        return _opened(folder, source, vision)
    except OperationError:
        shutil.rmtree(folder)
        return None


def _prepared(source: Source, vocab: int, folder: Path, progress: Progress, vision: VisionSpec | None) -> PackedDataset:
    for abandoned in folder.parent.glob(f".{folder.name}.*"):
        shutil.rmtree(abandoned, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        if vision is not None:
            from modelworks.data.lessons import prepare_lessons

            prepare_lessons(source, vocab, vision, temporary, progress)
        elif source.spec.source in _CONVERSATIONS:
            _pack_conversations(source, vocab, temporary, progress)
        else:
            _Packing(source, vocab, temporary, progress).run()
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return _opened(folder, source.spec.source, vision)


def _pack_conversations(source: Source, vocab: int, folder: Path, progress: Progress) -> None:
    from modelworks.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(source.spec.tokenizer, vocab)
    tokenizer.encode_special_tokens = False  # those that the template writes
    packing, _ = _CONVERSATIONS[source.spec.source]
    packing(source, tokenizer, _template(source.spec), vocab, folder).run(progress)


class _Packing:
    """One preparation: the counts that it keeps and the folder that it writes to."""

    def __init__(self, source: Source, vocab: int, folder: Path, progress: Progress) -> None:
        self._source, self._spec, self._vocab = source, source.spec, vocab
        self._folder, self._progress = folder, progress
        self._start_counting()
        self._bytes_done = 0
        text_bytes = source.measured_bytes
        passes = min(text_bytes or 0, _TOKENIZER_BYTES) if self._spec.tokenizer == "bpe" else 0
        self._total = text_bytes + passes if text_bytes else None

    def _start_counting(self) -> None:
        self._bad = BadRecords(self._spec.max_bad_fraction, "records cannot be read")
        self._duplicates = self._empty = 0

    def run(self) -> None:
        """Write the tokenizer, the shards and, last, the manifest."""
        tokenizer = self._tokenizer()
        tokenizer.save(str(self._folder / "tokenizer.json"))
        dtype = np.dtype(np.uint16 if self._vocab <= 2**16 else np.uint32)
        writers = {
            "train": SplitWriter(self._folder, "train", dtype, SHARD_TOKENS),
            "validation": SplitWriter(self._folder, "validation", dtype, SHARD_TOKENS),
        }
        try:
            self._pack(tokenizer, writers)
        finally:
            for writer in writers.values():
                writer.close()
        self._bad.check(sum(writer.documents for writer in writers.values()), self._duplicates + self._empty)
        if writers["train"].tokens == 0:
            raise InputError(f"data.source = {self._spec.source!r} is not accepted: it holds no text to train on")
        manifest = self._manifest(writers, dtype, tokenizer.get_vocab_size())
        (self._folder / "manifest.json").write_text(
            json.dumps(manifest, indent=2, ensure_ascii=False), encoding="utf-8"
        )

    def _tokenizer(self) -> Tokenizer:
        from modelworks.data.tokenizer import load_tokenizer, train_tokenizer

        if self._spec.tokenizer != "bpe":
            return load_tokenizer(self._spec.tokenizer, self._vocab)
        return train_tokenizer(self._tokenizer_texts(), self._vocab)

    def _tokenizer_texts(self) -> Iterator[str]:
        """Training documents, spread over the source by their hash where its size is known, else the first ones."""
        share = min(1.0, _TOKENIZER_BYTES / (self._source.measured_bytes or 1))
        used = 0
        for document, digest in self._documents():
            self._progress(0, min(self._bytes_done, _TOKENIZER_BYTES), self._total)
            if in_share(digest[8:], share) and not self._is_validation(digest):
                used += len(document.utf8)
                yield document.text
            if used >= _TOKENIZER_BYTES:
                break
        # What was counted here is counted again, wholly, when the documents are packed.
        self._start_counting()
        self._bytes_done = min(self._bytes_done, _TOKENIZER_BYTES)

    def _pack(self, tokenizer: Tokenizer, writers: dict[str, SplitWriter]) -> None:
        from modelworks.data.tokenizer import encode, separator_id

        end = separator_id(tokenizer)
        for batch in _batches(self._documents()):
            for (document, digest), ids in zip(batch, encode(tokenizer, [d.text for d, _ in batch]), strict=True):
                writer = writers["validation" if self._is_validation(digest) else "train"]
                writer.add([*ids, end], len(document.utf8))
            self._progress(sum(writer.documents for writer in writers.values()), self._bytes_done, self._total)

    def _documents(self) -> Iterator[tuple[Document, bytes]]:
        """Each different text once, with a hash of it, up to the limits of the data section."""
        distinct = DistinctTexts()
        documents = text_bytes = 0
        for record in self._source.records():
            if isinstance(record, BadRecord):
                self._bad.note(record, documents, self._duplicates + self._empty)
                continue
            self._bytes_done += len(record.utf8)
            if not record.text.strip():
                self._empty += 1
                continue
            digest = digest_of(record.utf8)
            if not distinct.add(digest):
                self._duplicates += 1
                continue
            yield record, digest
            documents, text_bytes = documents + 1, text_bytes + len(record.utf8)
            if documents == self._spec.max_documents or text_bytes >= (self._spec.max_bytes or text_bytes + 1):
                return

    def _is_validation(self, digest: bytes) -> bool:
        return in_share(digest, self._spec.validation_fraction)

    def _manifest(self, writers: dict[str, SplitWriter], dtype: np.dtype, pieces: int) -> dict[str, Any]:
        splits = {
            name: {"documents": writer.documents, "tokens": writer.tokens, "bytes": writer.bytes}
            for name, writer in writers.items()
        }
        return {
            "source": self._spec.source,
            "files": len(self._source.files),
            "documents": sum(split["documents"] for split in splits.values()),
            "bytes": sum(split["bytes"] for split in splits.values()),
            "tokens": sum(split["tokens"] for split in splits.values()),
            "splits": splits,
            "duplicates": self._duplicates,
            "empty": self._empty,
            "bad_records": self._bad.as_dict(),
            "tokenizer": self._spec.tokenizer,
            "pieces": pieces,
            "dtype": dtype.name,
            "shard_tokens": SHARD_TOKENS,
        }


def _batches(documents: Iterator[tuple[Document, bytes]]) -> Iterator[list[tuple[Document, bytes]]]:
    batch: list[tuple[Document, bytes]] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document[0].utf8)
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _silent(documents: int, done: int, total: int | None) -> None:
    """Progress that nobody watches."""
