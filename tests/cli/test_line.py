"""The line from a spec to a model that can be talked to, through the commands alone."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from modelworks.serve.store import Store

pytestmark = pytest.mark.slow

SPEC = """
name = "line"
[model]
preset = "grok-tiny"
layers = 2
hidden = 64
heads = 2
kv_heads = 1
head_dim = 32
vocab = 320
context = 64
moe = { experts = 4, top_k = 2, expert_hidden = 64 }
[data]
source = "files"
files = ["texts.jsonl"]
validation_fraction = 0.2
max_bad_fraction = 0.5
[train]
tokens = 4096
seq_len = 32
global_batch = 8
[release]
to = ["safetensors", "gguf"]
quantize = ["f32"]
"""


def modelworks(*words: str) -> str:
    """What a command prints; it must succeed."""
    ended = subprocess.run([sys.executable, "-m", "modelworks", *words], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr + ended.stdout
    return ended.stdout


def test_a_spec_becomes_a_verified_model_with_a_card_that_says_what_it_read(home: Path, tmp_path: Path) -> None:
    lines = [
        json.dumps({"text": f"record {index}: the quick brown fox jumps over {index} dogs"}) for index in range(200)
    ]
    (tmp_path / "texts.jsonl").write_text("\n".join([*lines, "{this is no JSON"]))
    (tmp_path / "line.toml").write_text(SPEC)

    trained = json.loads(modelworks("train", str(tmp_path / "line.toml"), "--json"))
    assert trained["state"] == "finished"

    manifest = json.loads((home / "runs" / "line" / "data.json").read_text())
    assert (manifest["documents"], manifest["bad_records"]["count"]) == (200, 1)
    card = (home / "runs" / "line" / "release" / "README.md").read_text()
    assert f"| tokens | {manifest['tokens']:,} |" in card
    assert "| records that couldn't be read | 1 |" in card
    verification = json.loads((home / "runs" / "line" / "release" / "verification.json").read_text())
    assert verification
    served = json.loads(modelworks("models", "list", "--json"))
    assert any(model["name"] == "line" for model in (served["served"] if isinstance(served, dict) else served))

    before = Store(home / "models").get("line")
    modelworks("models", "rm", "line")
    modelworks("release", "line")
    again = Store(home / "models").get("line")
    assert (again.license, again.context, again.source) == (before.license, before.context, before.source)

    compared = json.loads(modelworks("runs", "compare", "line", "--json"))
    assert compared["step_time_s"]["planned"] > 0
    assert compared["step_time_s"]["measured"] > 0
