"""Preparation is repeatable, shared, whole or absent, and says what was wrong with its input."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from modelworks.data import PackedDataset, prepare
from modelworks.data.distinct import DistinctTexts
from modelworks.spec import DataSpec, InputError

Pack = Callable[..., PackedDataset]


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


_PREPARE = """
import sys
from pathlib import Path
from modelworks.data import prepare
from modelworks.spec import DataSpec
print(prepare(DataSpec(source="files", files=[sys.argv[1]]), 300, Path(sys.argv[2])).folder)
"""


def test_the_same_input_gives_the_same_bytes(jsonl: Path, tmp_path: Path) -> None:
    spec = DataSpec(source="files", files=[str(jsonl)], validation_fraction=0.2)
    one, two = (prepare(spec, 300, tmp_path / name) for name in ("one", "two"))
    assert _contents(one.folder) == _contents(two.folder)


def test_prepared_data_is_found_again_until_its_input_changes(packed: Pack, jsonl: Path) -> None:
    first = packed(jsonl)
    assert packed(jsonl).folder == first.folder
    with jsonl.open("a") as file:
        file.write('{"text": "one more"}\n')
    second = packed(jsonl)
    assert second.folder != first.folder
    assert second.manifest["documents"] == first.manifest["documents"] + 1


def test_processes_that_prepare_the_same_data_share_it(jsonl: Path, tmp_path: Path) -> None:
    folder = tmp_path / "prepared"
    command = [sys.executable, "-c", _PREPARE, str(jsonl), str(folder)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    found = {process.communicate(timeout=120)[0].strip() for process in processes}
    assert len(found) == 1
    assert [path for path in folder.iterdir() if path.is_dir()] == [Path(found.pop())]


@pytest.mark.parametrize("at", [1, 3])
def test_an_interruption_leaves_nothing_behind(jsonl: Path, tmp_path: Path, at: int) -> None:
    calls = 0

    def interrupted(documents: int, done: int, total: int | None) -> None:
        nonlocal calls
        calls += 1
        if calls == at or documents:
            raise KeyboardInterrupt

    spec = DataSpec(source="files", files=[str(jsonl)])
    with pytest.raises(KeyboardInterrupt):
        prepare(spec, 300, tmp_path / "prepared", interrupted)
    assert not [path for path in (tmp_path / "prepared").iterdir() if path.is_dir()]
    assert prepare(spec, 300, tmp_path / "prepared").manifest["documents"] == 200


def test_progress_ends_at_its_total(jsonl: Path, tmp_path: Path, texts: list[str]) -> None:
    files = []
    for number, text in enumerate(texts):
        files.append(tmp_path / f"{number}.txt")
        files[-1].write_bytes(text.encode())
    seen: list[tuple[int, int, int | None]] = []
    spec = DataSpec(source="files", files=list(map(str, files)))
    prepare(spec, 300, tmp_path / "prepared", lambda *told: seen.append(told))
    twice = 2 * sum(len(text.encode()) for text in texts)
    assert seen[-1] == (200, twice, twice)
    assert [told[1] for told in seen] == sorted(told[1] for told in seen)


def test_duplicates_and_empty_texts_are_dropped_and_counted(packed: Pack, tmp_path: Path) -> None:
    lines = [{"text": text} for text in ("a text", "another", "a text", " \n", "a text ")]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    manifest = packed(tmp_path / "a.jsonl", validation_fraction=0).manifest
    assert (manifest["documents"], manifest["duplicates"], manifest["empty"]) == (3, 1, 1)


def test_hashes_are_told_apart_beyond_what_is_kept_in_the_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modelworks.data.distinct._RECENT", 7)
    draw = np.random.default_rng(0)
    hashes = [bytes(row) for row in draw.integers(0, 2, (600, 16), dtype=np.uint8) * np.array([1] * 8 + [0] * 8, "u1")]
    distinct, oracle = DistinctTexts(), set()
    for digest in hashes:
        assert distinct.add(digest) == (digest not in oracle)
        oracle.add(digest)


def test_bad_records_are_reported_until_there_are_too_many(packed: Pack, jsonl: Path) -> None:
    with jsonl.open("a") as file:
        file.write("{broken\n")
    data = packed(jsonl, max_bad_fraction=0.01)
    assert data.manifest["bad_records"]["count"] == 1
    assert data.manifest["bad_records"]["first"][0].startswith(f"{jsonl}:201: not JSON")
    with pytest.raises(InputError, match=rf"1 of 201 records .*max_bad_fraction = 0.001.*{jsonl.name}:201: not JSON"):
        packed(jsonl, max_bad_fraction=0.001)


def test_limits_stop_the_reading(packed: Pack, jsonl: Path, texts: list[str]) -> None:
    assert packed(jsonl, max_documents=17).manifest["documents"] == 17
    limited = packed(jsonl, max_bytes=3000).manifest["bytes"]
    assert 3000 <= limited < 3000 + max(len(text.encode()) for text in texts)


@pytest.mark.parametrize("content", ["", "  \n"])
def test_no_text_is_said(packed: Pack, tmp_path: Path, content: str) -> None:
    (tmp_path / "empty.txt").write_text(content)
    with pytest.raises(InputError, match="holds no text to train on"):
        packed(tmp_path / "empty.txt")


def test_the_tokenizer_begins_with_the_special_tokens(packed: Pack, jsonl: Path) -> None:
    tokenizer = Tokenizer.from_file(str(packed(jsonl).tokenizer_file))
    assert [tokenizer.id_to_token(number) for number in range(3)] == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert tokenizer.get_vocab_size() == 300


def test_a_given_tokenizer_is_used_as_it_is(packed: Pack, jsonl: Path, tmp_path: Path) -> None:
    trained = packed(jsonl)
    given = tmp_path / "given.json"
    given.write_bytes(trained.tokenizer_file.read_bytes())
    again = packed(jsonl, tokenizer=str(given))
    assert np.array_equal(again.span("train", 0, 5000), trained.span("train", 0, 5000))


def test_tokenizers_that_dont_fit_are_refused(packed: Pack, jsonl: Path, tmp_path: Path) -> None:
    spec = DataSpec(source="files", files=[str(jsonl)])
    with pytest.raises(InputError, match=r"model\.vocab = 258 .* at least 259"):
        prepare(spec, 258, tmp_path / "prepared")
    tokenizer = str(packed(jsonl).tokenizer_file)
    with pytest.raises(InputError, match=r"has 300 pieces, more than model\.vocab = 299"):
        prepare(spec.model_copy(update={"tokenizer": tokenizer}), 299, tmp_path / "prepared")
    with pytest.raises(InputError, match=r"'nowhere\.json' is not accepted"):
        packed(jsonl, tokenizer="nowhere.json")
    with pytest.raises(InputError, match=r"is no tokenizer\.json"):
        packed(jsonl, tokenizer=str(jsonl))


def test_large_vocabularies_are_packed_in_four_bytes(jsonl: Path, tmp_path: Path) -> None:
    data = prepare(DataSpec(source="files", files=[str(jsonl)]), 70_000, tmp_path / "prepared")
    assert (data.folder / "train-00000.bin").stat().st_size == 4 * data.tokens("train")
    assert data.sequences("train", 0, 2, 16, 0).dtype == np.int64
