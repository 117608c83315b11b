"""An adapter released alone does in PEFT and in llama.cpp what it does here, on the weights that it was trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from modelworks.data.tokenizer import train_tokenizer
from modelworks.model import adapters, checkpoint
from modelworks.model.decoder import Decoder
from modelworks.release.agreement import fixed_prompts
from modelworks.release.beginning import bring_weights
from modelworks.release.gguf_export import Described, write_gguf
from modelworks.release.huggingface import load_pretrained, save_pretrained
from modelworks.release.llama_cpp import next_token_probabilities
from modelworks.release.package import release_run
from modelworks.release.runs import load_run_content
from modelworks.release.vocabulary import read_vocabulary
from modelworks.serve.store import check_adapter
from modelworks.spec import InputError, ModelSpec, dumps, run_from
from modelworks.spec.gguf_header import read_gguf_header
from modelworks.spec.run import AdapterSpec

VOCAB = 300
MODEL: dict[str, Any] = {
    "layers": 2, "hidden": 64, "heads": 4, "kv_heads": 2, "head_dim": 16, "ffn_hidden": 96, "vocab": VOCAB,
    "context": 64,
}  # fmt: skip
SHAPES = {"llama": MODEL | {"tied_embeddings": True}, "qwen3": MODEL | {"qk_norm": True}}


def adapted_run(folder: Path, kind: str, shape: str = "llama") -> Path:
    """A run as `train` leaves it, with an adapter that changes a lot, and its base in ``base``."""
    spec = ModelSpec.model_validate(SHAPES[shape])
    save_pretrained(Decoder(spec), folder / "base")
    train_tokenizer(["the quick brown fox returns self.value"] * 3, VOCAB).save(str(folder / "base" / "tokenizer.json"))
    adapter = {"kind": kind, "rank": 4, "alpha": 6.0, "targets": ["q", "k", "v", "o", "gate", "down"]}
    run = run_from(
        {
            "name": "tuned",
            "model": SHAPES[shape],
            "adapter": adapter,
            "train": {"init_from": str(folder / "base"), "seq_len": 32, "tokens": 2048},
        }
    )
    place = folder / "tuned"
    place.mkdir()
    bring_weights(run, place)
    (place / "run.toml").write_text(dumps(run))
    (place / "tokenizer.json").write_bytes((folder / "base" / "tokenizer.json").read_bytes())
    (place / "chat_template.jinja").write_text("{{ messages[0].content }}")
    decoder = load_pretrained(folder / "base")
    adapters.adapt(decoder, AdapterSpec.model_validate(adapter))
    adapters.settle(decoder)
    draw = torch.Generator().manual_seed(3)
    tensors = {}
    for name, parameter in decoder.named_parameters():
        if adapters.is_of_adapter(name):
            noise = torch.randn(parameter.shape, generator=draw)
            tensors[f"model.{name}"] = parameter.detach() + (0.3 * noise if parameter.dim() == 2 else 0.1 * noise)
    checkpoint.save(place, 7, tensors, {"position": 0})
    return place


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_peft_and_transformers_compute_the_same(tmp_path: Path, kind: str) -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    run = adapted_run(tmp_path, kind)
    result = release_run(run, ["peft", "safetensors"])
    assert {"peft/adapter_model.safetensors", "peft/adapter_config.json", "model.safetensors"} <= set(result.files)
    theirs = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base"), str(run / "release" / "peft")
    ).eval()
    tokens = torch.randint(0, VOCAB, (2, 30), generator=torch.Generator().manual_seed(5))
    merged, base = load_run_content(run).decoder, load_pretrained(tmp_path / "base")
    with torch.no_grad():
        expected, before = theirs(tokens).logits, base(tokens)
        assert (merged(tokens) - expected).abs().max() < 1e-4
        assert (before - expected).abs().max() > 0.1  # the adapter matters
        assert (load_pretrained(run / "release")(tokens) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("shape", SHAPES)
def test_llama_cpp_computes_the_same_with_the_adapter_beside_the_base(tmp_path: Path, shape: str) -> None:
    run = adapted_run(tmp_path, "lora", shape)
    result = release_run(run, ["gguf-adapter"])
    assert result.adapter is not None
    tokenizer, base = run / "tokenizer.json", load_pretrained(tmp_path / "base").requires_grad_(False)
    write_gguf(tmp_path / "base.gguf", base, read_vocabulary(tokenizer, VOCAB), "f32", Described("base"))
    check_adapter(read_gguf_header(result.adapter), read_gguf_header(tmp_path / "base.gguf"))
    prompts = fixed_prompts(tokenizer, 64)[:6]
    found = next_token_probabilities(tmp_path / "base.gguf", prompts, VOCAB, adapter=result.adapter)
    merged = load_run_content(run).decoder
    for row, prompt in zip(found, prompts, strict=True):
        expected = merged(torch.tensor([list(prompt)]))[0, -1].double().softmax(-1)
        assert (torch.from_numpy(row) - expected).abs().max() < 1e-3
        assert int(row.argmax()) == int(expected.argmax())


def test_a_release_has_the_template_that_the_run_was_trained_with(tmp_path: Path) -> None:
    run = adapted_run(tmp_path, "lora")
    result = release_run(run, ["peft"])
    config = json.loads(result.files["tokenizer_config.json"].read_text())
    assert config["chat_template"] == "{{ messages[0].content }}"
    card = result.files["README.md"].read_text()
    assert "began with the weights of base and was trained with an adapter" in card


def test_a_dora_adapter_for_llama_cpp_is_refused_in_favour_of_merged_weights(tmp_path: Path) -> None:
    run = adapted_run(tmp_path, "dora")
    with pytest.raises(InputError, match=r"llama\.cpp doesn't compute: gguf is"):
        release_run(run, ["gguf-adapter"])
    assert not (run / "release").exists()


def test_a_run_that_begins_with_an_adapted_one_begins_with_its_merged_weights(tmp_path: Path) -> None:
    run = adapted_run(tmp_path, "lora")
    values = {"model": SHAPES["llama"], "train": {"init_from": str(run), "seq_len": 32, "tokens": 2048}}
    bring_weights(run_from(values), tmp_path / "next")
    from modelworks.model.initial import InitialWeights

    initial = InitialWeights(tmp_path / "next" / "initial")
    for name, parameter in load_run_content(run).decoder.named_parameters():
        part = torch.empty_like(parameter)
        initial.fill(part, name)
        assert torch.equal(part, parameter), name
