"""What is packed can be unpacked, every sequence is seen once an epoch, and a position is all that a resume needs."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from modelworks.data import PackedDataset
from modelworks.data.packed import SPLITS, SplitWriter
from modelworks.spec import InputError, OperationError

Pack = Callable[..., PackedDataset]


def _texts_in(data: PackedDataset, split: str) -> list[str]:
    tokenizer = Tokenizer.from_file(str(data.tokenizer_file))
    bounds = data.documents(split).astype(int).tolist()
    spans = [data.span(split, start, end - start).tolist() for start, end in pairwise(bounds)]
    assert all(span[-1] == 0 and 0 not in span[:-1] for span in spans)
    return [tokenizer.decode(span[:-1], skip_special_tokens=False) for span in spans]


def test_packed_tokens_decode_to_the_texts_that_went_in(packed: Pack, jsonl: Path, texts: list[str]) -> None:
    data = packed(jsonl, validation_fraction=0.2)
    found = {split: _texts_in(data, split) for split in SPLITS}
    assert sorted(found["train"] + found["validation"]) == sorted(texts)
    assert 15 <= len(found["validation"]) <= 70
    for split in SPLITS:
        assert data.bytes(split) == sum(len(text.encode()) for text in found[split])


def test_a_text_is_in_the_same_split_whatever_it_is_packed_with(packed: Pack, tmp_path: Path, texts: list[str]) -> None:
    for name, part in (("all", texts), ("some", texts[50:90])):
        (tmp_path / name).mkdir()
        for number, text in enumerate(part):
            (tmp_path / name / f"{number}.txt").write_bytes(text.encode())
    everything = packed(tmp_path / "all", validation_fraction=0.3)
    some = packed(tmp_path / "some", validation_fraction=0.3)
    held_out = set(_texts_in(everything, "validation"))
    assert set(_texts_in(some, "validation")) == held_out & set(texts[50:90])


def test_an_epoch_holds_every_sequence_once_and_the_next_in_another_order(packed: Pack, jsonl: Path) -> None:
    data = packed(jsonl)
    size = data.sequence_count("train", 32)
    line = data.span("train", 0, data.tokens("train"))
    expected = sorted(tuple(line[start : start + 33]) for start in range(0, size * 32, 32))
    first, second = (data.sequences("train", epoch * size, size, 32, seed=7) for epoch in range(2))
    assert sorted(map(tuple, first)) == expected
    assert sorted(map(tuple, second)) == expected
    assert (first != second).any()


def test_a_resume_at_any_position_goes_on_as_if_nothing_had_been(packed: Pack, jsonl: Path) -> None:
    data = packed(jsonl)
    size = data.sequence_count("train", 32)
    whole = data.sequences("train", 0, 2 * size + 5, 32, seed=1)
    again = PackedDataset(data.folder)
    for position, count in ((0, 3), (size - 2, 5), (size, 1), (2 * size, 5)):
        assert np.array_equal(again.sequences("train", position, count, 32, seed=1), whole[position : position + count])


def test_sequences_cross_shards(tmp_path: Path) -> None:
    writer = SplitWriter(tmp_path, "train", np.dtype(np.uint16), shard_tokens=7)
    for start in range(0, 100, 10):
        writer.add(list(range(start, start + 10)), 10)
    writer.close()
    SplitWriter(tmp_path, "validation", np.dtype(np.uint16), shard_tokens=7).close()
    splits = {"train": {"tokens": 100, "bytes": 100}, "validation": {"tokens": 0, "bytes": 0}}
    (tmp_path / "manifest.json").write_text(json.dumps({"dtype": "uint16", "shard_tokens": 7, "splits": splits}))
    data = PackedDataset(tmp_path)
    assert len(list(tmp_path.glob("train-*.bin"))) == 15
    assert sorted(map(tuple, data.sequences("train", 0, 9, 11, 0))) == [
        tuple(range(start, start + 12)) for start in range(0, 99, 11)
    ]


def test_too_little_text_for_a_sequence_is_said(packed: Pack, jsonl: Path) -> None:
    with pytest.raises(InputError, match=r"train\.seq_len = 1000000 .* split has \d+ tokens"):
        packed(jsonl).sequences("train", 0, 1, 1_000_000, 0)


def test_a_shard_that_was_cut_short_is_refused_and_prepared_again(packed: Pack, jsonl: Path) -> None:
    data = packed(jsonl)
    expected = data.sequences("train", 0, 4, 16, 0)
    shard = data.folder / "train-00000.bin"
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(OperationError, match=r"train-00000\.bin has"):
        PackedDataset(data.folder)
    assert np.array_equal(packed(jsonl).sequences("train", 0, 4, 16, 0), expected)
