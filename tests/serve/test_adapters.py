"""LoRA adapters chosen by name, request by request, over SmolLM2."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import gguf as library
import numpy as np
import pytest
from typer.testing import CliRunner

from modelworks.cli import app
from modelworks.serve.errors import RequestError
from modelworks.serve.llamacpp import EngineSettings, LlamaCppEngine
from modelworks.serve.store import Store
from modelworks.spec.errors import InputError
from modelworks.spec.gguf_header import read_gguf_header

MODEL = "smollm2-135m"
RANK = 8
ASKED: dict[str, Any] = {
    "messages": [{"role": "user", "content": "What is the capital of France?"}],
    "max_tokens": 12,
    "temperature": 0,
    "seed": 1,
}


def write_adapter(path: Path, model: Path, seed: int, *, wide: int = 0, tensor: str = "ffn_down.weight") -> Path:
    """An adapter of random changes to every layer's last matrix."""
    header, draw = read_gguf_header(model, arrays=False), np.random.default_rng(seed)
    writer = library.GGUFWriter(path, header.architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(RANK))
    for name, one in header.tensors.items():
        if name.endswith("ffn_down.weight"):
            rows, columns = one.shape
            changed = name.replace("ffn_down.weight", tensor)
            down, up = draw.standard_normal((RANK, columns + wide)), draw.standard_normal((rows, RANK))
            writer.add_tensor(f"{changed}.lora_a", (0.12 * down).astype(np.float32))
            writer.add_tensor(f"{changed}.lora_b", (0.12 * up).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def adapted(gguf: Path, tmp_path: Path) -> Store:
    """SmolLM2 and two adapters of it."""
    store = Store(tmp_path / "models")
    store.add(MODEL, gguf, source="a test")
    for seed, name in enumerate(("one", "two")):
        store.add_adapter(name, write_adapter(tmp_path / f"{name}.gguf", gguf, seed), MODEL, source="a test")
    return store


async def said(engine: LlamaCppEngine, model: str, **changes: Any) -> str:
    """An answer's text."""
    text = ""
    async for batch in engine.stream("chat", model, ASKED | changes):
        for chunk in map(json.loads, batch):
            text += "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])
    return text


def test_each_request_has_the_adapter_that_it_names_and_no_other(adapted: Store) -> None:
    async def work() -> None:
        engine = LlamaCppEngine(adapted, EngineSettings(slots=2, threads=1, context=256))
        try:
            alone = {name: await said(engine, name) for name in (MODEL, "one", "two")}
            assert len(set(alone.values())) == 3
            order = [MODEL, "one", "one", MODEL, "two", MODEL, "one", "two"]
            together = await asyncio.gather(*(said(engine, name) for name in order))
            assert together == [alone[name] for name in order]
            assert len(engine._loaded) == 1, "the weights are in memory once"
            assert [card.name for card in await engine.models()] == ["one", MODEL, "two"]
            assert (await engine.card("one")).context == (await engine.card(MODEL)).context
            with pytest.raises(RequestError, match="adapters don't embed"):
                await engine.embed("one", ["x"])
        finally:
            await engine.close()

    asyncio.run(work())


def test_the_model_answers_as_it_did_without_adapters(adapted: Store, gguf: Path, tmp_path: Path) -> None:
    plain = Store(tmp_path / "plain")
    plain.add(MODEL, gguf, source="a test")

    async def answer(store: Store) -> str:
        engine = LlamaCppEngine(store, EngineSettings(slots=1, threads=1, context=256))
        try:
            return await said(engine, MODEL)
        finally:
            await engine.close()

    assert asyncio.run(answer(adapted)) == asyncio.run(answer(plain))


def test_an_adapter_of_a_model_that_was_replaced_or_removed_is_named(
    adapted: Store, gguf: Path, tmp_path: Path
) -> None:
    changed = tmp_path / "changed.gguf"
    changed.write_bytes(gguf.read_bytes() + b"\x00" * 32)
    adapted.add(MODEL, changed, source="another")
    engine = LlamaCppEngine(adapted)
    with pytest.raises(InputError, match="was replaced: remove one"):
        asyncio.run(engine.card("one"))
    assert [card.name for card in asyncio.run(engine.models())] == [MODEL]
    adapted.remove(MODEL)
    with pytest.raises(InputError, match="is gone: remove one"):
        asyncio.run(engine.card("one"))


@pytest.mark.parametrize(
    ("options", "says"),
    [({"wide": 1}, "does not fit"), ({"tensor": "no_such.weight"}, "no matrix that")],
    ids=["shape", "name"],
)
def test_an_adapter_that_does_not_fit_is_refused(
    gguf: Path, tmp_path: Path, options: dict[str, Any], says: str
) -> None:
    store = Store(tmp_path / "models")
    store.add(MODEL, gguf, source="a test")
    with pytest.raises(InputError, match=says):
        store.add_adapter("one", write_adapter(tmp_path / "a.gguf", gguf, 1, **options), MODEL, source="a test")
    assert [model.name for model in store.list()] == [MODEL]


def test_a_model_is_no_adapter_and_an_adapter_no_model(adapted: Store, gguf: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a LoRA adapter"):
        adapted.add_adapter("three", gguf, MODEL, source="a test")
    with pytest.raises(InputError, match="is an adapter"):
        adapted.add("three", tmp_path / "one.gguf", source="a test")
    for base in ("one", "three"):
        with pytest.raises(InputError):
            adapted.add_adapter("three", tmp_path / "one.gguf", base, source="a test")


def test_the_command_stores_an_adapter_and_refuses_what_is_none(
    gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODELWORKS_HOME", str(tmp_path / "home"))
    Store().add(MODEL, gguf, source="a test")
    file = write_adapter(tmp_path / "pirate.gguf", gguf, 3)
    made = CliRunner().invoke(app, ["models", "adapt", "pirate", str(file), "--to", MODEL, "--json"])
    assert made.exit_code == 0, made.output
    assert json.loads(made.output)["adapts"] == MODEL
    assert Store().get("pirate").adapts == MODEL
