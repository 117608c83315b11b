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

from modelworks.data.distinct import DistinctTexts
from modelworks.data.packed import SHARD_TOKENS, PackedDataset, SplitWriter
from modelworks.data.records import BadRecord, Document
from modelworks.data.sources import Source, open_source
from modelworks.spec.errors import InputError, OperationError
from modelworks.spec.run import DataSpec

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Progress = Callable[[int, int, int | None], None]
"""Told documents packed, bytes worked through, and their total where it is known."""

_FORMAT = 1
_TOKENIZER_BYTES = 2**26
"""Text that a tokenizer is trained on; more changes little and takes long."""
_BATCH_BYTES = 2**22
_SHOWN_BAD_RECORDS = 20


def prepare(spec: DataSpec, vocab: int, folder: Path, progress: Progress | None = None) -> PackedDataset:
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

    Raises
    ------
    InputError
        If an input is missing or empty, a tokenizer doesn't fit, or too many records are unreadable.
    OperationError
        If reading or writing fails; nothing half-written is left.
    """
    source = open_source(spec)
    name = _cache_name(source, vocab)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f"{name}.lock"):
            return _found(folder / name) or _prepared(source, vocab, folder / name, progress or _silent)
    except OSError as error:
        raise OperationError(f"the data cannot be prepared in {folder}: {error.strerror or error}") from error


def _cache_name(source: Source, vocab: int) -> str:
    spec = source.spec
    tokenizer = Path(spec.tokenizer).expanduser()
    facts = {
        "format": _FORMAT,
        "data": spec.model_dump(mode="json"),
        "vocab": vocab,
        "files": source.fingerprint(),
        "tokenizer": hashlib.sha256(tokenizer.read_bytes()).hexdigest() if tokenizer.is_file() else None,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]


def _found(folder: Path) -> PackedDataset | None:
    """What was prepared before, unless a file of it is missing or cut short: then it is prepared again."""
    if not folder.exists():
        return None
    try:
        return PackedDataset(folder)
    except OperationError:
        shutil.rmtree(folder)
        return None


def _prepared(source: Source, vocab: int, folder: Path, progress: Progress) -> PackedDataset:
    for abandoned in folder.parent.glob(f".{folder.name}.*"):
        shutil.rmtree(abandoned, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        _Packing(source, vocab, temporary, progress).run()
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return PackedDataset(folder)


class _Packing:
    """One preparation: the counts that it keeps and the folder that it writes to."""

    def __init__(self, source: Source, vocab: int, folder: Path, progress: Progress) -> None:
        self._source, self._spec, self._vocab = source, source.spec, vocab
        self._folder, self._progress = folder, progress
        self._bad: list[BadRecord] = []
        self._bad_count = self._duplicates = self._empty = 0
        self._bytes_done = 0
        text_bytes = source.measured_bytes
        passes = min(text_bytes or 0, _TOKENIZER_BYTES) if self._spec.tokenizer == "bpe" else 0
        self._total = text_bytes + passes if text_bytes else None

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
        self._check_bad(sum(writer.documents for writer in writers.values()))
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
            if _in_share(digest[8:], share) and not self._is_validation(digest):
                used += len(document.utf8)
                yield document.text
            if used >= _TOKENIZER_BYTES:
                break
        # What was counted here is counted again, wholly, when the documents are packed.
        self._bad, self._bad_count, self._duplicates, self._empty = [], 0, 0, 0
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
                self._note_bad(record, documents)
                continue
            self._bytes_done += len(record.utf8)
            if not record.text.strip():
                self._empty += 1
                continue
            digest = hashlib.blake2b(record.utf8, digest_size=16).digest()
            if not distinct.add(digest):
                self._duplicates += 1
                continue
            yield record, digest
            documents, text_bytes = documents + 1, text_bytes + len(record.utf8)
            if documents == self._spec.max_documents or text_bytes >= (self._spec.max_bytes or text_bytes + 1):
                return

    def _is_validation(self, digest: bytes) -> bool:
        return _in_share(digest, self._spec.validation_fraction)

    def _note_bad(self, record: BadRecord, documents: int) -> None:
        self._bad_count += record.count
        if len(self._bad) < _SHOWN_BAD_RECORDS:
            self._bad.append(record)
        # A source that is bad from its start is given up before all of it is read.
        if self._bad_count >= 10_000 and documents < self._bad_count:
            self._check_bad(documents)

    def _check_bad(self, documents: int) -> None:
        seen = documents + self._duplicates + self._empty + self._bad_count
        if self._bad_count > self._spec.max_bad_fraction * seen:
            first = "; ".join(map(str, self._bad[:5]))
            raise InputError(
                f"{self._bad_count} of {seen} records cannot be read, more than data.max_bad_fraction = "
                f"{self._spec.max_bad_fraction} accepts: {first}"
            )

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
            "bad_records": {"count": self._bad_count, "first": [str(record) for record in self._bad]},
            "tokenizer": self._spec.tokenizer,
            "pieces": pieces,
            "dtype": dtype.name,
            "shard_tokens": SHARD_TOKENS,
        }


def _in_share(digest: bytes, share: float) -> bool:
    """Whether a text's hash falls into the given share of all."""
    return int.from_bytes(digest[:8], "big") < share * 2**64


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
