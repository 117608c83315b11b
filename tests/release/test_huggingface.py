"""Networks go to Hugging Face folders and back, and `transformers` finds the same logits in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from modelworks.model.decoder import Decoder
from modelworks.release import huggingface
from modelworks.release.huggingface import load_pretrained, save_pretrained
from modelworks.spec import InputError, ModelSpec
from modelworks.spec.huggingface import config_from_model

SMALL = {"layers": 2, "hidden": 48, "heads": 4, "kv_heads": 2, "head_dim": 16, "vocab": 96, "context": 64}
EXPERTS = {"experts": 4, "top_k": 2, "expert_hidden": 40}
GROK = SMALL | {
    "activation": "gelu",
    "norm_placement": "sandwich",
    "attention_softcap": 30.0,
    "embedding_multiplier": 7.0,
    "output_multiplier": 0.5,
    "tied_embeddings": True,
    "moe": EXPERTS,
}
LLAMA = SMALL | {"ffn_hidden": 80, "rope_base": 5000.0, "norm_eps": 1e-6}
SHAPES: dict[str, dict[str, Any]] = {
    "grok-1": GROK,
    "llama": LLAMA,
    "llama tied": LLAMA | {"tied_embeddings": True},
    "llama with biases": LLAMA | {"attention_bias": True, "mlp_bias": True},
    "llama 3.1": LLAMA
    | {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
    "llama stretched": LLAMA | {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "llama by YaRN": LLAMA
    | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 8.0}},
    "mistral": LLAMA | {"sliding_window": 16},
    "smollm3": LLAMA | {"nope_interval": 2, "tied_embeddings": True},
    "qwen2": LLAMA | {"qkv_bias": True},
    "qwen2 with a window": LLAMA | {"qkv_bias": True, "sliding_window": 16},
    "qwen3": LLAMA | {"qk_norm": True},
    "qwen3 with a window": LLAMA | {"qk_norm": True, "sliding_window": 16},
    "mixtral": SMALL | {"moe": EXPERTS | {"renormalize": True}},
    "mixtral with a window": SMALL | {"moe": EXPERTS | {"renormalize": True}, "sliding_window": 16},
}


def network(shape: str) -> Decoder:
    decoder = Decoder(ModelSpec.model_validate(SHAPES[shape]))
    decoder.initialize(7)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if parameter.dim() == 1:  # Norms of one and biases of zero would hide a mistake.
                parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
    return decoder.eval()


def logits_of(model: Any) -> torch.Tensor:
    tokens = torch.randint(0, 96, (2, 40), generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        found = model(tokens)
    return found if isinstance(found, torch.Tensor) else found.logits.float()


@pytest.mark.parametrize("shape", SHAPES)
def test_a_network_comes_back_from_its_folder_to_the_bit(tmp_path: Path, shape: str) -> None:
    decoder = network(shape)
    save_pretrained(decoder, tmp_path / "out")
    back = load_pretrained(tmp_path / "out")
    for (name, given), (other, found) in zip(decoder.named_parameters(), back.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(given, found), name
    assert torch.equal(logits_of(decoder), logits_of(back))


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape != "grok-1"])
def test_transformers_loads_the_folder_and_has_the_same_logits(tmp_path: Path, shape: str) -> None:
    transformers = pytest.importorskip("transformers")
    decoder = network(shape)
    save_pretrained(decoder, tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").float().eval()
    assert (logits_of(theirs) - logits_of(decoder)).abs().max() < 1e-4


@pytest.mark.parametrize(
    "shape", ["llama", "llama tied", "mistral", "smollm3", "qwen2", "qwen3", "mixtral", "llama 3.1"]
)
def test_what_transformers_writes_is_read_with_the_same_logits(tmp_path: Path, shape: str) -> None:
    transformers = pytest.importorskip("transformers")
    save_pretrained(network(shape), tmp_path / "ours")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").float().eval()
    theirs.save_pretrained(tmp_path / "theirs")
    assert (logits_of(theirs) - logits_of(load_pretrained(tmp_path / "theirs"))).abs().max() < 1e-4


def test_grok_has_sglangs_names_or_those_of_old_vllm(tmp_path: Path) -> None:
    decoder = network("grok-1")
    save_pretrained(decoder, tmp_path / "sglang")
    save_pretrained(decoder, tmp_path / "vllm", vllm=True)
    sglang = load_file(tmp_path / "sglang" / "model.safetensors")
    vllm = load_file(tmp_path / "vllm" / "model.safetensors")
    assert torch.equal(sglang["lm_head.weight"], decoder.embed.weight)
    for theirs, old, ours in (
        ("block_sparse_moe.experts.3.w1", "moe_block.experts.3.linear", decoder.blocks[1].moe.gate[3]),
        ("block_sparse_moe.experts.0.w3", "moe_block.experts.0.linear_v", decoder.blocks[1].moe.up[0]),
        ("block_sparse_moe.experts.2.w2", "moe_block.experts.2.linear_1", decoder.blocks[1].moe.down[2]),
        ("block_sparse_moe.gate", "moe_block.gate", decoder.blocks[1].moe.router.weight),
        ("self_attn.o_proj", "attn.o_proj", decoder.blocks[1].attn.wo.weight),
        ("post_moe_norm", "post_moe_norm", decoder.blocks[1].ffn_post_norm.weight),
    ):
        assert torch.equal(sglang[f"model.layers.1.{theirs}.weight"], ours)
        assert torch.equal(vllm[f"model.layers.1.{old}.weight"], ours)
    config = json.loads((tmp_path / "vllm" / "config.json").read_text())
    assert config["architectures"] == ["Grok1ModelForCausalLM"]
    assert config["router_logit_softcapping"] == 0.0
    assert torch.equal(logits_of(load_pretrained(tmp_path / "vllm")), logits_of(decoder))


def test_many_files_with_an_index_are_one_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface, "SHARD_BYTES", 30_000)
    decoder = network("mixtral")
    save_pretrained(decoder, tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3
    assert sorted(set(index["weight_map"].values())) == files
    assert torch.equal(logits_of(load_pretrained(tmp_path / "out")), logits_of(decoder))


@pytest.mark.parametrize(
    ("shape", "change", "field"),
    [
        ("llama", {"attention_softcap": 30.0}, "attention_softcap"),
        ("llama", {"embedding_multiplier": 2.0}, "embedding_multiplier"),
        ("mixtral", {"moe": EXPERTS}, "moe"),
        ("mixtral", {"qkv_bias": True}, "qkv_bias"),
        ("qwen2", {"mlp_bias": True}, "mlp_bias"),
        ("qwen2", {"nope_interval": 2}, "nope_interval"),
        ("smollm3", {"sliding_window": 16}, "sliding_window"),
        ("mixtral", {"attention_multiplier": 0.3}, "attention_multiplier"),
        ("grok-1", {"moe": EXPERTS | {"renormalize": True}}, "moe"),
    ],
)
def test_a_field_that_a_config_has_no_place_for_is_refused_by_name(
    shape: str, change: dict[str, Any], field: str
) -> None:
    with pytest.raises(InputError, match=f"model.{field}"):
        config_from_model(ModelSpec.model_validate(SHAPES[shape] | change))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_pretrained(network("llama"), tmp_path / "out")
    return tmp_path / "out"


def change_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def change_tensors(folder: Path, change: Any) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda f: (f / "config.json").unlink(), "config.json"),
        (lambda f: (f / "config.json").write_bytes(b"\xff{"), "config.json"),
        (lambda f: (f / "model.safetensors").unlink(), "no safetensors"),
        (lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-9]), "truncated"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 64), "damaged"),
        (lambda f: (f / "model.safetensors").write_bytes(b""), "damaged"),
        (lambda f: change_config(f, model_type="falcon"), "falcon"),
        (lambda f: change_config(f, hidden_act="relu"), "relu"),
        (lambda f: change_config(f, vocab_size=10**15), "vocab_size|shape"),
        (lambda f: change_config(f, num_hidden_layers=3), "tensors are missing"),
        (lambda f: change_config(f, num_hidden_layers=1), "no place for"),
        (lambda f: change_config(f, num_hidden_layers=10**12), "speaks of"),
        (lambda f: change_tensors(f, lambda t: t.pop("model.norm.weight")), "1 of 21 tensors are missing"),
        (lambda f: change_tensors(f, lambda t: t.update({"model.norm.weight": torch.ones(3)})), "has the shape"),
        (
            lambda f: change_tensors(f, lambda t: t.update({"model.norm.weight": torch.ones(48, dtype=torch.int8)})),
            "floating-point weights are accepted",
        ),
    ],
)
def test_a_damaged_folder_is_refused_in_one_sentence(folder: Path, damage: Any, sentence: str) -> None:
    damage(folder)
    with pytest.raises(InputError, match=sentence):
        load_pretrained(folder)


def test_a_failure_in_mid_writing_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_pretrained(network("llama"), tmp_path / "out", progress=interrupt)
    assert list(tmp_path.iterdir()) == []
