"""Every kind of file gives the same texts, and what can't be read is named with its file and line."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from modelworks.data import PackedDataset, prepare
from modelworks.data.records import BadRecord, Document, read_file
from modelworks.data.sources import open_source
from modelworks.spec import DataSpec, InputError

Pack = Callable[..., PackedDataset]


def _read(path: Path) -> tuple[list[str], list[BadRecord]]:
    records = list(read_file(path, "text"))
    return [r.text for r in records if isinstance(r, Document)], [r for r in records if isinstance(r, BadRecord)]


def test_every_format_gives_the_same_texts(tmp_path: Path, jsonl: Path, texts: list[str]) -> None:
    raw = jsonl.read_bytes()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(raw))
    frames = zstandard.ZstdCompressor().compress(raw[:1000]) + zstandard.ZstdCompressor().compress(raw[1000:])
    (tmp_path / "a.jsonl.zst").write_bytes(frames)
    (tmp_path / "a.json").write_text(json.dumps([{"text": text} for text in texts]))
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
    for name in ("texts.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.json", "a.parquet"):
        assert _read(tmp_path / name) == (texts, []), name


def test_a_plain_text_is_one_document_as_it_stands(tmp_path: Path) -> None:
    for name, content in (("a.txt", b"\xef\xbb\xbfone\r\ntwo\n"), ("b.md.gz", gzip.compress(b"one\r\ntwo\n"))):
        (tmp_path / name).write_bytes(content)
        assert _read(tmp_path / name) == (["one\r\ntwo\n"], [])


def test_a_very_long_text_is_cut_at_a_line_end(tmp_path: Path) -> None:
    text = "0123456789abcdef é\n" * 1_000_000
    (tmp_path / "long.txt").write_text(text, encoding="utf-8")
    parts, bad = _read(tmp_path / "long.txt")
    assert len(parts) == 2
    assert not bad
    assert "".join(parts) == text
    assert parts[0].endswith("\n")


def test_bad_records_are_named_by_line_and_the_good_ones_kept(tmp_path: Path) -> None:
    lines = [
        b'{"text": "good"}', b'{"text": ', b'{"other": 1}', b'{"text": 3}', b'["list"]',
        b'{"text": "\xff"}', b'{"text": "\\ud800"}', b"", b"[" * 100_000, b'{"text": "also good"}',
    ]  # fmt: skip
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    good, bad = _read(tmp_path / "a.jsonl")
    assert good == ["good", "also good"]
    assert [record.line for record in bad] == [2, 3, 4, 5, 6, 7, 9]
    wanted = ["not JSON", "missing", "int and not text", "list where", "not UTF-8", "lone surrogate", "nested"]
    assert all(reason in record.reason for reason, record in zip(wanted, bad, strict=True))


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_a_compressed_file_cut_short_keeps_what_came_before(tmp_path: Path, suffix: str) -> None:
    raw = "".join(json.dumps({"text": f"text number {number}"}) + "\n" for number in range(50_000)).encode()
    whole = gzip.compress(raw) if suffix == "gz" else zstandard.ZstdCompressor().compress(raw)
    path = tmp_path / f"a.jsonl.{suffix}"
    path.write_bytes(whole[: len(whole) * 3 // 4])
    good, bad = _read(path)
    assert good == [f"text number {number}" for number in range(len(good))]
    assert len(good) > 1000
    assert [record.line for record in bad][-1] >= len(good)
    assert "cut short" in bad[-1].reason


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.zst", "a.parquet", "a.json"])
def test_a_file_that_isnt_what_its_name_says_is_one_bad_record(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"this is none of these formats")
    good, bad = _read(tmp_path / name)
    assert not good
    assert len(bad) == 1


def test_a_plain_text_that_isnt_utf8_is_named_by_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\ntwo\nthr\xe9e\n")
    assert _read(tmp_path / "a.txt") == ([], [BadRecord(str(tmp_path / "a.txt"), 3, "not UTF-8: byte 0xe9")])


def test_parquet_without_the_column_counts_all_its_rows(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table({"body": ["a", "b", "c"]}), tmp_path / "a.parquet")
    _, bad = _read(tmp_path / "a.parquet")
    assert bad[0].count == 3
    assert "it has body" in bad[0].reason


def test_datasets_are_streamed(tmp_path: Path, texts: list[str]) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    parquet.write_table(pyarrow.table({"text": [*texts, None]}), folder / "train-00000.parquet")
    spec = DataSpec(source=f"hf:{folder}")
    records = list(open_source(spec).records())
    assert [record.text for record in records if isinstance(record, Document)] == texts
    assert [(r.line, r.reason) for r in records if isinstance(r, BadRecord)] == [
        (201, "the field 'text' is NoneType and not text")
    ]
    with pytest.raises(InputError, match=r"data\.split = 'none'"):
        list(open_source(spec.model_copy(update={"split": "none"})).records())


def test_a_dataset_that_isnt_there_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such dataset"):
        prepare(DataSpec(source=f"hf:{tmp_path}/nothing"), 300, tmp_path / "prepared")


def test_folders_and_patterns_are_read_in_order_and_once(tmp_path: Path) -> None:
    for name in ("b.txt", "a.md", "deep/c.py", ".hidden/d.txt", "e.bin"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    given = [str(tmp_path), str(tmp_path / "**" / "*.py"), str(tmp_path / "b.txt")]
    files = open_source(DataSpec(source="files", files=given)).files
    assert [file.relative_to(tmp_path).as_posix() for file in files] == ["a.md", "b.txt", "deep/c.py"]


@pytest.mark.parametrize(
    ("name", "sentence"), [("no.txt", "doesn't exist"), ("*.md", "doesn't"), ("a.bin", "isn't read")]
)
def test_files_that_cant_be_used_are_refused_by_name(tmp_path: Path, name: str, sentence: str) -> None:
    (tmp_path / "a.bin").write_text("a")
    with pytest.raises(InputError, match=sentence) as raised:
        open_source(DataSpec(source="files", files=[str(tmp_path / name)]))
    assert name in str(raised.value)


def test_the_standard_library_has_sources_and_documentation_and_no_tests() -> None:
    source = open_source(DataSpec())
    names = {path.name for path in source.files}
    assert {"argparse.py", "topics.py", "dataclasses.py"} <= names
    assert not any("test" in part for path in source.files for part in path.parts[-2:-1])
    texts = [record.text for record in source.records() if isinstance(record, Document)]
    assert any('The "with" statement' in text for text in texts)
    assert sum(map(len, texts)) > 5_000_000
