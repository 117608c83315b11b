"""Grok-2's release is read as it lies on the disk, and its network is the one that llama.cpp finds in our GGUF file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from typer.testing import CliRunner

from modelworks.cli import app
from modelworks.model.decoder import Decoder
from modelworks.release import layouts
from modelworks.release.gguf_export import Described, write_gguf
from modelworks.release.gguf_import import import_gguf, import_huggingface
from modelworks.release.gguf_network import left_out_by_llama_cpp, spec_of
from modelworks.release.huggingface import load_pretrained, save_pretrained
from modelworks.release.llama_cpp import next_token_probabilities
from modelworks.release.vocabulary import read_vocabulary
from modelworks.spec import InputError, ModelSpec
from modelworks.spec.files import model_spec
from modelworks.spec.gguf_header import read_gguf_header
from modelworks.spec.huggingface import config_from_model, model_from_config

VOCAB, RANKS = 320, 4
MOE: dict[str, Any] = {"experts": 4, "top_k": 2, "expert_hidden": 64, "residual": True}
LIKE_LLAMA_CPP: dict[str, Any] = {
    "layers": 2,
    "hidden": 64,
    "ffn_hidden": 96,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 16,
    "vocab": VOCAB,
    "context": 512,
    "activation": "gelu",
    "norm_placement": "sandwich",
    "rope_base": 10_000.0,
    "attention_softcap": 30.0,
    "output_softcap": 5.0,
    "embedding_multiplier": 8.0,
    "output_multiplier": 0.5,
    "moe": MOE | {"renormalize": True},
}
"""All of Grok-2 but what llama.cpp leaves out of it."""
GROK_2: dict[str, Any] = LIKE_LLAMA_CPP | {
    "attention_temperature_length": 20,
    "moe": MOE | {"router_softcap": 1.0},
}
YARN = {
    "rope_type": "yarn",
    "factor": 8.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 8.0,
    "beta_slow": 1.0,
    "attention_factor": 1.0,
    "extrapolation_factor": 1.0,
}
PUBLISHED = {
    "architectures": ["Grok1ForCausalLM"],
    "embedding_multiplier_scale": 90.50966799187809,
    "output_multiplier_scale": 0.5,
    "vocab_size": 131072,
    "hidden_size": 8192,
    "intermediate_size": 32768,
    "moe_intermediate_size": 16384,
    "max_position_embeddings": 131072,
    "num_experts_per_tok": 2,
    "num_local_experts": 8,
    "residual_moe": True,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "num_hidden_layers": 64,
    "head_dim": 128,
    "rms_norm_eps": 1e-05,
    "final_logit_softcapping": 50,
    "attn_logit_softcapping": 30.0,
    "router_logit_softcapping": 30.0,
    "rope_theta": 208533496,
    "attn_temperature_len": 1024,
    "sliding_window_size": -1,
    "global_attn_every_n": 1,
    "model_type": "git",
    "torch_dtype": "bfloat16",
    "rope_type": "original",
    "original_max_position_embeddings": 8192,
    "scaling_factor": 16.0,
    "extrapolation_factor": 1.0,
    "attn_factor": 1.0,
    "beta_fast": 8,
    "beta_slow": 1,
}
"""What xai-org/grok-2's config.json says."""
PLACES = (
    ("model.embed_tokens.weight", None),
    ("lm_head.weight", None),
    ("model.norm.weight", None),
    ("mlp.gate_proj", None),
    ("mlp.down_proj", None),
    ("mlp.up_proj", None),
    (".w1.", 0),
    (".w2.", 1),
    (".w3.", 0),
    ("self_attn.k_proj", None),
    ("self_attn.o_proj", None),
    ("self_attn.q_proj", None),
    ("self_attn.v_proj", None),
    ("pre_attn_norm", None),
    ("post_attn_norm", None),
    ("pre_moe_norm", None),
    ("post_moe_norm", None),
    ("block_sparse_moe.gate", None),
)
"""The release's files in their order: which tensors each holds, and along which dimension ranks share them."""


def network(fields: dict[str, Any]) -> Decoder:
    decoder = Decoder(ModelSpec.model_validate(fields))
    decoder.initialize(5)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            generator = torch.Generator().manual_seed(len(name))
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
            elif "router" in name or "wq" in name or "head" in name:
                parameter.mul_(3.0)
    return decoder.eval()


def probabilities(decoder: Decoder, prompts: list[list[int]]) -> np.ndarray:
    with torch.inference_mode():
        return np.stack([decoder(torch.tensor([ids]))[0, -1].double().softmax(-1).numpy() for ids in prompts])


def prompts(*lengths: int) -> list[list[int]]:
    generator = np.random.default_rng(3)
    return [generator.integers(3, VOCAB, length).tolist() for length in lengths]


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(["the quick brown fox returns self.value in range of the dog"] * 3, trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    made.save(str(path))
    return path


@pytest.fixture
def release(tmp_path: Path, tokenizer: Path) -> Path:
    """A small Grok-2 laid out as the release is."""
    folder = tmp_path / "grok-2"
    save_pretrained(network(GROK_2), folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    placed = set()
    for number, (part, dim) in enumerate(PLACES):
        held = {name: tensor for name, tensor in tensors.items() if part in name and name not in placed}
        placed |= set(held)
        for rank in ["common"] if dim is None else range(RANKS):
            name = "common" if rank == "common" else f"{rank:03d}"
            cut = held if dim is None else {key: value.chunk(RANKS, dim)[rank].clone() for key, value in held.items()}
            save_file(cut, folder / f"pytorch_model-{number:05d}-TP-{name}.safetensors")
    assert placed == set(tensors)
    config = json.loads((folder / "config.json").read_text())
    del config["tie_word_embeddings"], config["attention_bias"], config["mlp_bias"]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    return folder


def test_the_published_config_is_the_catalogs_network(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED))
    read, listed = model_from_config(tmp_path), model_spec("grok-2")
    for field in set(ModelSpec.model_fields) - {"name", "preset", "attention_multiplier"}:
        assert getattr(read, field) == getattr(listed, field), field
    assert read.attention_scale == listed.attention_scale == 128**-0.5
    written = config_from_model(listed, dtype="bfloat16")
    for key in set(PUBLISHED) - {"rope_type", "original_max_position_embeddings", "scaling_factor", "attn_factor"}:
        if key not in ("extrapolation_factor", "beta_fast", "beta_slow", "sliding_window_size", "global_attn_every_n"):
            assert written[key] == PUBLISHED[key], key


def test_transformers_reads_the_config_for_sglang(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    save_pretrained(network(GROK_2 | {"rope_scaling": YARN}), tmp_path / "out")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert config.architectures == ["Grok1ForCausalLM"]
    # What sglang/srt/models/grok.py reads, beside what every network has.
    for name, value in {
        "residual_moe": True,
        "moe_intermediate_size": 64,
        "intermediate_size": 96,
        "router_logit_softcapping": 1.0,
        "final_logit_softcapping": 5.0,
        "attn_temperature_len": 20,
        "rope_type": "yarn",
        "scaling_factor": 8.0,
        "original_max_position_embeddings": 32,
        "load_presharded_moe": False,
        "head_dim": 16,
    }.items():
        assert getattr(config, name) == value, name


def test_the_pre_sharded_release_becomes_one_folder_with_the_same_logits(release: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    imported = CliRunner().invoke(app, ["import", "hf", str(release), "--out", str(out)])
    assert imported.exit_code == 0, imported.output
    decoder, back = network(GROK_2), load_pretrained(out)
    for (name, given), (other, found) in zip(decoder.named_parameters(), back.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(given, found), name
    asked = prompts(40)
    np.testing.assert_array_equal(probabilities(back, asked), probabilities(decoder, asked))
    assert (out / "tokenizer.json").is_file()
    verified = CliRunner().invoke(app, ["verify", str(out), "--json"])
    assert verified.exit_code == 0, verified.output
    assert len(json.loads(verified.stdout)["source"]["files"]) == 1 + len(PLACES) + 3 * (RANKS - 1)


@pytest.mark.parametrize("scaling", [None, YARN], ids=["unstretched", "YaRN"])
def test_llama_cpp_predicts_what_the_network_does_up_to_its_whole_context(
    tmp_path: Path, tokenizer: Path, scaling: dict[str, Any] | None
) -> None:
    """The longest prompt is eight times the context before the extension."""
    decoder = network(LIKE_LLAMA_CPP | {"rope_scaling": scaling, "context": 256})
    vocabulary = read_vocabulary(tokenizer, VOCAB)
    write_gguf(tmp_path / "out.gguf", decoder, vocabulary, "f32", Described("grok-2"))
    asked = prompts(1, 7, 33, 90, 250)
    theirs = next_token_probabilities(tmp_path / "out.gguf", asked, VOCAB)
    np.testing.assert_allclose(theirs, probabilities(decoder, asked), atol=1e-3)
    if scaling is not None:
        plain = Decoder(decoder.spec.model_copy(update={"rope_scaling": None})).eval()
        plain.load_state_dict(decoder.state_dict())
        assert np.abs(probabilities(plain, asked) - theirs).max() > 3e-3


def test_llama_cpp_computes_a_released_grok_2_without_three_of_its_terms(release: Path, tmp_path: Path) -> None:
    """Router cap and temperature it leaves out, and it rescales gates; all else is the same."""
    out = tmp_path / "out"
    arguments = ["import", "hf", str(release), "--out", str(out), "--to", "gguf", "--quantize", "f32"]
    imported = CliRunner().invoke(app, arguments)
    assert imported.exit_code == 0, imported.output
    left_out = left_out_by_llama_cpp(ModelSpec.model_validate(GROK_2))
    assert [term.split(" ")[0] for term in left_out] == [
        "moe.router_softcap",
        "moe.renormalize",
        "attention_temperature_length",
    ]
    assert all(term in " ".join(imported.output.split()) for term in left_out)
    assert left_out_by_llama_cpp(ModelSpec.model_validate(LIKE_LLAMA_CPP)) == []
    decoder, without = network(GROK_2), Decoder(ModelSpec.model_validate(LIKE_LLAMA_CPP)).eval()
    without.load_state_dict(decoder.state_dict())
    asked = prompts(3, 60)
    theirs = next_token_probabilities(out / "out-f32.gguf", asked, VOCAB)
    np.testing.assert_allclose(theirs, probabilities(without, asked), atol=1e-3)
    assert np.abs(theirs - probabilities(decoder, asked)).max() > 3e-3


@pytest.mark.parametrize("fields", [GROK_2, LIKE_LLAMA_CPP, GROK_2 | {"rope_scaling": YARN}])
def test_a_gguf_file_says_all_of_the_network(tmp_path: Path, tokenizer: Path, fields: dict[str, Any]) -> None:
    decoder = network(fields)
    write_gguf(tmp_path / "out.gguf", decoder, read_vocabulary(tokenizer, VOCAB), "f32", Described("grok-2"))
    spec = spec_of(read_gguf_header(tmp_path / "out.gguf"))
    for field in set(ModelSpec.model_fields) - {"name", "attention_multiplier"}:
        assert getattr(spec, field) == getattr(decoder.spec, field), field


@pytest.mark.parametrize("last_norm", ["layer_output_norm", "post_ffw_norm"])
def test_a_gguf_file_is_read_under_our_names_and_llama_cpps(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch, last_norm: str
) -> None:
    table = tuple((ours, theirs.replace("layer_output_norm", last_norm)) for ours, theirs in layouts.GGUF_TABLE)
    with monkeypatch.context() as patch:
        patch.setattr(layouts, "GGUF_TABLE", table)
        vocabulary = read_vocabulary(tokenizer, VOCAB)
        write_gguf(tmp_path / "out.gguf", network(GROK_2), vocabulary, "f32", Described("grok-2"))
    assert f"blk.1.{last_norm}.weight" in read_gguf_header(tmp_path / "out.gguf").tensors
    import_gguf(tmp_path / "out.gguf", tmp_path / "back")
    back = load_pretrained(tmp_path / "back")
    np.testing.assert_array_equal(probabilities(back, prompts(50)), probabilities(network(GROK_2), prompts(50)))


def _drop(release: Path, name: str) -> None:
    (release / name).unlink()


def _change(release: Path, name: str, change: Any) -> None:
    tensors = load_file(release / name)
    change(tensors)
    save_file(tensors, release / name)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda f: _drop(f, "pytorch_model-00006-TP-002.safetensors"), "shards for 3 of 4 ranks.*TP-002"),
        (lambda f: _drop(f, "pytorch_model-00009-TP-common.safetensors"), "2 of 51 tensors are missing.*k_proj"),
        (
            lambda f: (f / "pytorch_model-00007-TP-001.safetensors").write_bytes(
                (f / "pytorch_model-00007-TP-001.safetensors").read_bytes()[:-7]
            ),
            "pytorch_model-00007-TP-001.safetensors: is truncated",
        ),
        (
            lambda f: _change(
                f,
                "pytorch_model-00008-TP-003.safetensors",
                lambda t: t.update({name: tensor.to(torch.int8) for name, tensor in t.items()}),
            ),
            "is I8, and floating-point weights are accepted",
        ),
        (
            lambda f: _change(
                f,
                "pytorch_model-00008-TP-003.safetensors",
                lambda t: t.update({name: tensor[:-1].clone() for name, tensor in t.items()}),
            ),
            r"4 shards of \(16, 64\), and .*config.json says \(64, 64\)",
        ),
        (
            lambda f: _change(
                f, "pytorch_model-00002-TP-common.safetensors", lambda t: t["model.norm.weight"].fill_(torch.nan)
            ),
            "model.norm.weight holds values that aren't finite",
        ),
        (
            lambda f: (f / "x-TP-common.safetensors").write_bytes(
                (f / "pytorch_model-00002-TP-common.safetensors").read_bytes()
            ),
            "x-TP-common.safetensors: holds model.norm.weight, and pytorch_model-00002-TP-common.safetensors does too",
        ),
    ],
)
def test_a_damaged_release_is_refused_in_one_sentence_and_leaves_nothing(
    release: Path, tmp_path: Path, damage: Any, sentence: str
) -> None:
    damage(release)
    with pytest.raises(InputError, match=sentence):
        import_huggingface(release, tmp_path / "place" / "out")
    assert not list(tmp_path.glob("place/*")) + list(tmp_path.glob("place/.*"))
