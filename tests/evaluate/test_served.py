"""Evaluations of a model behind our own server: what generates works, log-likelihoods are refused."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import uvicorn
from typer.testing import CliRunner

from modelworks.cli import app
from modelworks.data.tokenizer import train_tokenizer
from modelworks.evaluate.haystack import held_out
from modelworks.model.decoder import Decoder
from modelworks.release.gguf_export import Described, write_gguf
from modelworks.release.quantization import precision
from modelworks.release.vocabulary import read_vocabulary
from modelworks.serve.api import create_app
from modelworks.serve.llamacpp import EngineSettings, LlamaCppEngine
from modelworks.serve.store import Store
from modelworks.spec.errors import InputError, OperationError
from modelworks.spec.model import ModelSpec

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.slow

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{folder}/rows.jsonl"}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["a", "b"]
doc_to_target: 0
{more}
metadata: {{version: 1.0}}
"""
GENERATION = 'generation_kwargs: {until: ["\\n\\n\\n"], max_gen_toks: 4, do_sample: false}'


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Our gateway over the embedded llama.cpp, with a random network."""
    folder = tmp_path_factory.mktemp("served")
    torch.manual_seed(1)
    decoder = Decoder(ModelSpec(layers=2, hidden=64, ffn_hidden=128, heads=4, kv_heads=2, vocab=512, context=256))
    train_tokenizer(["\n".join(lines[:50]) for lines in held_out(True)[:20]], 512).save(str(folder / "tokenizer.json"))
    vocabulary = read_vocabulary(folder / "tokenizer.json", 512)
    write_gguf(folder / "tiny.gguf", decoder, vocabulary, precision("f32"), Described("tiny"))
    store = Store(folder / "models")
    store.add("tiny", folder / "tiny.gguf", source="test")
    engine = LlamaCppEngine(store, EngineSettings(slots=1, threads=1, context=256))
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(create_app(engine, store, preload="tiny"), log_level="warning"))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])))
    thread.start()
    while not server.started and thread.is_alive():
        thread.join(0.05)
    yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    server.should_exit = True
    thread.join(30)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MODELWORKS_HOME", str(folder))
        patch.setenv("HF_DATASETS_CACHE", str(folder / "datasets"))
        yield folder


@pytest.fixture(scope="module")
def tasks(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"question": f"def {name}(self):"} for name in ("read", "write", "seek")]
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    for name, kind, more in (
        ("answer", "generate_until", f"{GENERATION}\nmetric_list: [{{metric: exact_match}}]"),
        ("choice", "multiple_choice", "metric_list: [{metric: acc}]"),
    ):
        (folder / f"{name}.yaml").write_text(TASK.format(name=f"tiny_{name}", folder=folder, kind=kind, more=more))
    return folder


def evaluated(address: str, tasks: Path, *arguments: str) -> dict[str, Any]:
    told = CliRunner().invoke(app, ["eval", address, "--include", str(tasks), *arguments, "--json"])
    if told.exception is not None:
        raise told.exception
    return dict(json.loads(told.stdout))


def test_a_task_that_generates_is_asked_by_completions_and_by_chat(address: str, tasks: Path, home: Path) -> None:
    for more in ((), ("--chat",)):
        report = evaluated(address, tasks, "--task", "tiny_answer", *more)
        assert report["settings"]["served_as"] == "tiny"
        assert report["settings"]["chat"] is bool(more)
        assert len(report["samples"]["tiny_answer"]["exact_match,none"]) == 3
    assert list((home / "evals").glob("tiny_answer-*.json"))
    with pytest.raises(OperationError, match="404"):
        evaluated(address, tasks, "--task", "tiny_answer", "--served-as", "other")


def test_log_likelihoods_are_refused_where_a_server_gives_none_of_the_prompt(
    address: str, tasks: Path, home: Path
) -> None:
    before = sorted(home.rglob("evals/*"))
    with pytest.raises(InputError, match="tiny_choice: log-probabilities of given texts are needed"):
        evaluated(address, tasks, "--task", "tiny_answer,tiny_choice")
    with pytest.raises(InputError, match="--chat is not accepted for tiny_choice"):
        evaluated(address, tasks, "--task", "tiny_choice", "--chat")
    assert sorted(home.rglob("evals/*")) == before
