"""A tiny run on a small text of the test's own making."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from modelworks.spec.files import dumps, run_from
from modelworks.spec.run import RunSpec

MakeSpec = Callable[..., RunSpec]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty small documents of made-up words, the same in every session."""
    folder = tmp_path_factory.mktemp("text")
    draw = random.Random(5)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 8))) for _ in range(300)]
    for index in range(40):
        text = " ".join(draw.choices(words, weights=range(300, 0, -1), k=200))
        (folder / f"{index:02d}.txt").write_text(text + ".\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder, with a home in it, for all tests of a file, so that the text is packed once."""
    folder = tmp_path_factory.mktemp("parallel")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MODELWORKS_HOME", str(folder / "home"))
        yield folder


@pytest.fixture
def make_spec(measured_home: Path, text_folder: Path) -> MakeSpec:
    """A tiny mixture of experts of Grok's shape; keyword arguments go into [train], `sections` over all."""

    def make(name: str = "tiny", sections: dict[str, dict[str, object]] | None = None, **train: object) -> RunSpec:
        values = {
            "name": name,
            "model": {
                "layers": 2,
                "hidden": 64,
                "heads": 4,
                "kv_heads": 2,
                "vocab": 512,
                "context": 64,
                "activation": "gelu",
                "norm_placement": "sandwich",
                "attention_softcap": 30.0,
                "embedding_multiplier": 8.0,
                "tied_embeddings": True,
                "moe": {"experts": 4, "top_k": 2, "expert_hidden": 64},
            },
            "data": {"source": "files", "files": [str(text_folder)], "validation_fraction": 0.2},
            "train": {
                "tokens": 40 * 4 * 32,
                "seq_len": 32,
                "global_batch": 4,
                "precision": "fp32",
                "validate_every": 10,
                "validation_tokens": 512,
            },
            "checkpoint": {"every_steps": 10},
        }
        for section, fields in ({"train": train} | (sections or {})).items():
            values[section] = {**values.get(section, {}), **fields}  # type: ignore[dict-item]
        return run_from(values)

    return make


@pytest.fixture
def write_spec(tmp_path: Path) -> Callable[[RunSpec], Path]:
    """Writes a spec to a file for the command line."""

    def write(spec: RunSpec) -> Path:
        path = tmp_path / f"{spec.name}.toml"
        path.write_text(dumps(spec), encoding="utf-8")
        return path

    return write
