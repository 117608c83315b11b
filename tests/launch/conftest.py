"""A tiny run for engines, on a text of the tests' own making, and how it ends when nothing disturbs it."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from modelworks.spec.files import dumps, run_from
from modelworks.spec.run import RunSpec

MakeRun = Callable[..., RunSpec]


@pytest.fixture(scope="session")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of made-up words, the same in every session."""
    folder = tmp_path_factory.mktemp("words")
    draw = random.Random(7)
    pieces = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 8))) for _ in range(300)]
    for index in range(40):
        text = " ".join(draw.choices(pieces, weights=range(300, 0, -1), k=200))
        (folder / f"{index:02d}.txt").write_text(text + ".\n", encoding="utf-8")
    return folder


@pytest.fixture
def make_run(measured_home: Path, words: Path) -> MakeRun:
    """A run of two processes and so many steps; `launch` is its section."""

    def make(name: str, steps: int, launch: dict[str, Any] | None = None, **sections: dict[str, Any]) -> RunSpec:
        values: dict[str, Any] = {
            "name": name,
            "model": {
                "layers": 2,
                "hidden": 32,
                "heads": 2,
                "kv_heads": 1,
                "vocab": 384,
                "context": 32,
                "tied_embeddings": True,
                "moe": {"experts": 4, "top_k": 2, "expert_hidden": 32},
            },
            "data": {"source": "files", "files": [str(words)], "validation_fraction": 0.2},
            "train": {
                "tokens": steps * 4 * 32,
                "seq_len": 32,
                "global_batch": 4,
                "micro_batch": 2,
                "precision": "fp32",
                "validate_every": 0,
                "validation_tokens": 512,
            },
            "cluster": {"preset": "local", "gpus": 2, "gpus_per_node": 2, "scale_up_domain": 2},
            "checkpoint": {"every_steps": 5},
            "launch": {"nodes": 2, "free_disk": 1 << 20, "free_memory": 1 << 20, **(launch or {})},
        }
        for section, fields in sections.items():
            values[section] = {**values.get(section, {}), **fields}
        return run_from(values)

    return make


@pytest.fixture
def modelworks(home: Path) -> Callable[..., dict[str, Any]]:
    """Runs a command of Modelworks in this test's home; what it prints as JSON, or as ``text``."""

    def run(*words: str | Path, timeout: float = 300) -> dict[str, Any]:
        done = subprocess.run(
            [sys.executable, "-m", "modelworks", *map(str, words)],
            capture_output=True,
            text=True,
            timeout=timeout,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stdout + done.stderr
        try:
            return dict(json.loads(done.stdout))
        except ValueError:
            return {"text": done.stdout}

    return run


@pytest.fixture
def write_run(tmp_path: Path) -> Callable[[RunSpec], Path]:
    """Writes a spec to a file for the command line."""

    def write(spec: RunSpec) -> Path:
        path = tmp_path / f"{spec.name}.toml"
        path.write_text(dumps(spec), encoding="utf-8")
        return path

    return write
