"""Reading one file: a stream of documents and of the records in it that can't be read.

A plain text is one document (a very long one is cut at line ends); a line of JSONL and a row of Parquet are one
each. What is wrong with a record is said with its file and line and never stops the stream.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import zstandard

from modelworks.spec.errors import InputError

PLAIN = {".txt", ".md", ".rst", ".py"}
COMPRESSIONS = {".gz", ".zst"}
ACCEPTED = "txt, md, rst, py, jsonl, json (each also with .gz or .zst) and parquet"
_LONGEST_PLAIN = 2**24
_SHOWN = 20
_NAMED = 5
"""Of the bad records: how many a manifest shows, and how many an error names."""
_GIVE_UP = 10_000
"""A source whose first so many records are bad, more than good ones, is judged before all of it is read."""


@dataclass(frozen=True)
class Document:
    """A text, and the UTF-8 bytes that it takes."""

    text: str
    utf8: bytes


@dataclass(frozen=True)
class BadRecord:
    """A record, or `count` of them, that can't be used, and why."""

    file: str
    line: int
    reason: str
    count: int = 1

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"


class BadRecords:
    """The records of one source that can't be used: how many, and the first of them.

    Parameters
    ----------
    most
        `data.max_bad_fraction`.
    what
        What they are and can't, as in "records cannot be read".
    """

    def __init__(self, most: float, what: str) -> None:
        self._most, self._what = most, what
        self._first: list[BadRecord] = []
        self._count = 0

    def note(self, record: BadRecord, used: int, left_out: int) -> None:
        """Count one; a source that is bad from its start is given up. `used` and `left_out` as of `check`."""
        self._count += record.count
        if len(self._first) < _SHOWN:
            self._first.append(record)
        if self._count >= _GIVE_UP and used < self._count:
            self.check(used, left_out)

    def check(self, used: int, left_out: int) -> None:
        """Refuse a source with too many.

        Parameters
        ----------
        used, left_out
            Its good records, and those that were left out for another reason: double, or empty.

        Raises
        ------
        InputError
            Naming the first.
        """
        seen = used + left_out + self._count
        if self._count > self._most * seen:
            raise InputError(
                f"{self._count} of {seen} {self._what}, more than data.max_bad_fraction = {self._most} accepts: "
                + "; ".join(map(str, self._first[:_NAMED]))
            )

    def as_dict(self) -> dict[str, Any]:
        """The same for a manifest."""
        return {"count": self._count, "first": [str(record) for record in self._first]}


Record = Document | BadRecord
Made = TypeVar("Made")
Make = Callable[[Any, str, int], Made]
"""Makes something of a value in JSON, its file and its line."""


class BrokenFileError(Exception):
    """A compressed stream that ends early or isn't one."""


def kind_of(path: Path) -> str | None:
    """A file's kind by its name: ``plain``, ``jsonl``, ``json``, ``parquet``, or nothing if it isn't accepted."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compressed = bool(suffixes) and suffixes[-1] in COMPRESSIONS
    suffix = suffixes[-2] if compressed and len(suffixes) > 1 else suffixes[-1] if suffixes else ""
    if suffix in PLAIN:
        return "plain"
    if suffix in {".jsonl", ".json"} or (suffix == ".parquet" and not compressed):
        return suffix[1:]
    return None


def is_measured(path: Path) -> bool:
    """Whether a file's size is about the size of its text."""
    return path.suffix.lower() not in {*COMPRESSIONS, ".parquet"}


def read_file(path: Path, text_field: str) -> Iterator[Record]:
    """The records of a file.

    Raises
    ------
    OSError
        If the file can't be opened.
    """
    kind = kind_of(path)
    if kind == "parquet":
        return _read_parquet(path, text_field)
    if kind in ("jsonl", "json"):
        return read_json(path, lambda value, file, line: record_from(value, text_field, file, line))
    return _read_plain(path)


def read_json(path: Path, make: Make[Made]) -> Iterator[Made | BadRecord]:
    """What `make` makes of each record of a JSON file or of one of JSON lines."""
    return _read_jsonl(path, make) if kind_of(path) == "jsonl" else _read_json(path, make)


def record_from(values: Any, text_field: str, file: str, line: int) -> Record:
    """The document in one record of a table or of JSON."""
    if not isinstance(values, dict):
        return BadRecord(
            file, line, f"a {type(values).__name__} where a record with the field {text_field!r} is needed"
        )
    if text_field not in values:
        return BadRecord(file, line, f"the field {text_field!r} is missing")
    text = values[text_field]
    if not isinstance(text, str):
        return BadRecord(file, line, f"the field {text_field!r} is {type(text).__name__} and not text")
    return document_from(text, file, line)


def document_from(text: str, file: str, line: int) -> Record:
    """A document, unless its text can't be written as UTF-8."""
    try:
        return Document(text, text.encode("utf-8"))
    except UnicodeEncodeError as error:
        return BadRecord(file, line, f"not text: a lone surrogate at character {error.start}")


def _read_plain(path: Path) -> Iterator[Record]:
    line = 1
    with _opened(path) as stream:
        try:
            while data := _plain_part(stream):
                text = data.removeprefix(b"\xef\xbb\xbf") if line == 1 else data
                try:
                    yield Document(text.decode("utf-8"), text)
                except UnicodeDecodeError as error:
                    bad_line = line + data.count(b"\n", 0, error.start)
                    yield BadRecord(str(path), bad_line, f"not UTF-8: byte 0x{text[error.start]:02x}")
                line += data.count(b"\n")
        except BrokenFileError as error:
            yield BadRecord(str(path), line, str(error))


def _plain_part(stream: BinaryIO) -> bytes:
    """A whole text, or as much of a very long one as ends with a line."""
    data = _guarded(stream.read, _LONGEST_PLAIN)
    return data if len(data) < _LONGEST_PLAIN else data + _guarded(stream.readline, _LONGEST_PLAIN)


def _read_jsonl(path: Path, make: Make[Made]) -> Iterator[Made | BadRecord]:
    line = 0
    with _opened(path) as stream:
        try:
            while data := _guarded(stream.readline, -1):
                line += 1
                data = data.removeprefix(b"\xef\xbb\xbf") if line == 1 else data
                if data.strip():
                    yield _json_record(data, make, str(path), line)
        except BrokenFileError as error:
            yield BadRecord(str(path), line + 1, str(error))


def _json_record(data: bytes, make: Make[Made], file: str, line: int) -> Made | BadRecord:
    try:
        return make(json.loads(data.decode("utf-8")), file, line)
    except UnicodeDecodeError as error:
        return BadRecord(file, line, f"not UTF-8: byte 0x{data[error.start]:02x} at column {error.start + 1}")
    except json.JSONDecodeError as error:
        return BadRecord(file, line, f"not JSON: {error.msg} at column {error.colno}")
    except RecursionError:
        return BadRecord(file, line, "not JSON that can be read: nested too deeply")


def _read_json(path: Path, make: Make[Made]) -> Iterator[Made | BadRecord]:
    """A file of one record, or of a list of them; a record's line is its place in the list."""
    with _opened(path) as stream:
        try:
            values = json.loads(_guarded(stream.read, -1).decode("utf-8-sig"))
        except (BrokenFileError, ValueError, RecursionError) as error:
            yield BadRecord(str(path), getattr(error, "lineno", 1), f"not JSON: {error}")
            return
    for place, value in enumerate(values if isinstance(values, list) else [values], start=1):
        yield make(value, str(path), place)


def _read_parquet(path: Path, text_field: str) -> Iterator[Record]:
    import pyarrow  # type: ignore[import-untyped]
    from pyarrow import parquet

    line = 0
    try:
        with parquet.ParquetFile(path) as table:
            if text_field not in table.schema_arrow.names:
                columns = ", ".join(table.schema_arrow.names)
                reason = f"the column {text_field!r} is missing; it has {columns}"
                yield BadRecord(str(path), 1, reason, count=max(1, table.metadata.num_rows))
                return
            for batch in table.iter_batches(batch_size=1024, columns=[text_field]):
                for value in batch.column(0).to_pylist():
                    line += 1
                    yield record_from({text_field: value}, text_field, str(path), line)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        yield BadRecord(str(path), line + 1, f"not Parquet that can be read: {error}")


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """A file's bytes, decompressed as they are read."""
    with path.open("rb") as raw:
        if path.suffix.lower() == ".gz":
            with gzip.GzipFile(fileobj=raw) as stream:
                yield io.BufferedReader(stream)
        elif path.suffix.lower() == ".zst":
            # A frame cut short is no error to zstandard's reader, so the end of the last frame is looked for.
            yield io.BufferedReader(_WholeFrames(raw))
        else:
            yield raw


class _WholeFrames(io.RawIOBase):
    """Decompresses Zstandard frames one after the other, and knows a frame that was cut short."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self._frame: Any = None
        self._compressed = self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            self._compressed = self._compressed or self._raw.read(2**17)
            if not self._compressed:
                if self._frame is not None:
                    raise EOFError("Zstandard frame ended before its end was reached")
                return 0
            self._frame = self._frame or zstandard.ZstdDecompressor().decompressobj()
            try:
                self._ready = self._frame.decompress(self._compressed)
            except zstandard.ZstdError as error:
                raise EOFError(str(error)) from None
            self._compressed = self._frame.unused_data if self._frame.eof else b""
            self._frame = None if self._frame.eof else self._frame
        size = min(len(buffer), len(self._ready))
        buffer[:size], self._ready = self._ready[:size], self._ready[size:]
        return size


def _guarded(read: Any, size: int) -> bytes:
    """Read, or say that the compressed stream is broken."""
    try:
        return bytes(read(size))
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise BrokenFileError(f"compressed data cut short or damaged: {error}") from None
