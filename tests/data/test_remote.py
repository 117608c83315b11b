"""Text on other file systems: fetched once, again when it has changed, and known by where it comes from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from modelworks.data.preparation import prepare
from modelworks.data.sources import open_source
from modelworks.spec.errors import InputError
from modelworks.spec.files import run_from
from modelworks.spec.run import DataSpec


@pytest.fixture
def memory() -> Iterator[Any]:
    system = fsspec.filesystem("memory")
    system.store.clear()
    for number in range(3):
        system.pipe_file(f"/text/{number}.txt", f"document {number} of a few words\n".encode() * 50)
    system.pipe_file("/text/picture.png", b"\x89PNG")
    yield system
    system.store.clear()


@pytest.mark.parametrize("url", ["memory://text", "memory://text/*.txt"])
def test_a_folder_and_a_pattern_are_fetched_once(home: Path, memory: Any, url: str) -> None:
    spec = DataSpec(source="files", files=[url])
    first = open_source(spec)
    assert [path.name for path in first.files] == ["0.txt", "1.txt", "2.txt"]
    assert first.files[1].read_bytes() == memory.cat_file("/text/1.txt")
    written = [path.stat().st_mtime_ns for path in first.files]
    again = open_source(spec)
    assert [path.stat().st_mtime_ns for path in again.files] == written
    assert again.fingerprint() == first.fingerprint()


def test_a_file_that_has_changed_is_fetched_again(home: Path, memory: Any) -> None:
    spec = DataSpec(source="files", files=["memory://text"])
    before = open_source(spec)
    memory.pipe_file("/text/1.txt", b"something else\n" * 50)
    after = open_source(spec)
    assert after.files[0] == before.files[0]
    assert after.files[1].read_text().startswith("something else")
    assert after.fingerprint() != before.fingerprint()


def test_the_same_text_is_the_same_data_whatever_home_it_was_fetched_to(
    memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = []
    for name in ("one", "other"):
        monkeypatch.setenv("MODELWORKS_HOME", str(tmp_path / name))
        spec = DataSpec(source="files", files=["memory://text"], validation_fraction=0.0)
        names.append(prepare(spec, 300, tmp_path / name / "data").folder.name)
    assert names[0] == names[1]


def test_a_url_in_a_spec_stays_one(tmp_path: Path) -> None:
    values = {"model": {"preset": "grok-tiny"}, "data": {"source": "files", "files": ["s3://bucket/a.txt", "b.txt"]}}
    run = run_from(values, folder=tmp_path)
    assert run.data.files == ["s3://bucket/a.txt", str(tmp_path / "b.txt")]


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("memory://nowhere", "'memory://nowhere' doesn't exist"),
        ("memory://text/*.png", "holds nothing that is read"),
        ("nothing://text", "data.files = 'nothing://text' is not accepted"),
    ],
)
def test_a_url_that_gives_nothing_is_named(home: Path, memory: Any, url: str, sentence: str) -> None:
    with pytest.raises(InputError) as raised:
        open_source(DataSpec(source="files", files=[url]))
    assert sentence in str(raised.value)
