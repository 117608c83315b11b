"""Texts to prepare, and a way to prepare files of them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.data.records import VOCAB

from modelworks.data import PackedDataset, prepare
from modelworks.data.tokenizer import train_tokenizer
from modelworks.spec import DataSpec


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """A small one with the marks of ChatML."""
    path = tmp_path / "tokenizer.json"
    train_tokenizer(["who are you and what do you want"] * 3, VOCAB).save(str(path))
    return path


@pytest.fixture
def texts() -> list[str]:
    """Two hundred different texts with accents, other scripts, line ends and written-out special tokens."""
    draw = random.Random(5)
    words = [
        "Zürich",
        "naïve",
        "数据",
        "def f(x):\r\n",
        "\tреж",
        "<|endoftext|>",
        "<|im_start|>",
        "🙂",
        "plain",
        "words",
    ]
    return [f"{number} " + " ".join(draw.choices(words, k=30)) for number in range(200)]


@pytest.fixture
def jsonl(tmp_path: Path, texts: list[str]) -> Path:
    """The texts as JSONL."""
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


@pytest.fixture
def packed(tmp_path: Path) -> Callable[..., PackedDataset]:
    """Prepares files, with fields of the data section."""

    def pack(*files: Path, **fields: object) -> PackedDataset:
        spec = DataSpec.model_validate({"source": "files", "files": [str(file) for file in files]} | fields)
        return prepare(spec, VOCAB, tmp_path / "prepared")

    return pack
