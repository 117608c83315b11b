"""A run becomes a release: files that others' tools load, held against llama.cpp, with a card of the run's records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from modelworks.model import checkpoint
from modelworks.model.decoder import Decoder
from modelworks.release.agreement import fixed_prompts, measure_agreement
from modelworks.release.evaluations import digest_of
from modelworks.release.gguf_export import Described, write_gguf
from modelworks.release.gguf_import import import_gguf
from modelworks.release.gguf_network import metadata_of
from modelworks.release.huggingface import load_pretrained
from modelworks.release.llama_cpp import next_token_probabilities
from modelworks.release.package import release_run
from modelworks.release.quantization import quantize_q4_k
from modelworks.release.vocabulary import read_vocabulary
from modelworks.spec import InputError, ModelSpec, OperationError, dumps, run_from

VOCAB = 400
SMALL = {"layers": 2, "hidden": 64, "heads": 4, "kv_heads": 2, "head_dim": 16, "vocab": VOCAB, "context": 64}
EXPERTS = {"experts": 4, "top_k": 2, "expert_hidden": 256}
GROK = SMALL | {
    "activation": "gelu",
    "norm_placement": "sandwich",
    "attention_softcap": 30.0,
    "embedding_multiplier": 8.0,
    "output_multiplier": 0.5773502691896257,
    "tied_embeddings": True,
    "moe": EXPERTS,
}
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32}
LATER = {"original_max_position_embeddings": 2048}
SHAPES: dict[str, dict[str, Any]] = {
    "grok": GROK,
    "llama": SMALL | {"ffn_hidden": 160, "rope_base": 5000.0},
    "llama with biases": SMALL | {"ffn_hidden": 160, "attention_bias": True, "tied_embeddings": True},
    "llama 3.1": SMALL
    | {
        "ffn_hidden": 160,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "llama stretched": SMALL | {"ffn_hidden": 160, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "llama by another base": SMALL | {"ffn_hidden": 160, "rope_scaling": {"rope_type": "ntk", "factor": 4.0}},
    "llama by YaRN": SMALL | {"ffn_hidden": 160, "rope_scaling": YARN},
    "grok by YaRN": GROK | {"rope_scaling": YARN | {"attention_factor": 1.0} | LATER},
    "qwen3 by YaRN": SMALL | {"ffn_hidden": 160, "qk_norm": True, "rope_scaling": YARN | {"attention_factor": 1.4}},
    "qwen3": SMALL | {"ffn_hidden": 160, "qk_norm": True},
    "mixtral": SMALL | {"moe": EXPERTS | {"renormalize": True}},
}


def trained_tokenizer(path: Path, vocab: int = VOCAB) -> Path:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the quick brown fox returns self.value in range of the dog"] * 3, trainer)
    tokenizer.save(str(path))
    return path


def network(shape: str) -> Decoder:
    decoder = Decoder(ModelSpec.model_validate(SHAPES[shape]))
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.dim() == 1:
                parameter += 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    return decoder.requires_grad_(False).eval()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder as `train` leaves it."""
    folder = tmp_path / "small"
    folder.mkdir()
    decoder = network("grok")
    spec = run_from({"name": "small", "model": SHAPES["grok"], "train": {"seq_len": 32, "tokens": 2048}})
    (folder / "run.toml").write_text(dumps(spec))
    trained_tokenizer(folder / "tokenizer.json", 350)
    tensors = {f"model.{name}": tensor for name, tensor in decoder.state_dict().items()}
    checkpoint.save(folder, 7, tensors, {"position": 0})
    row = {"step": 7, "tokens": 7168, "cross_entropy": 5.4321, "tokens_per_s": 1234.0, "validation_bpb": 2.7182}
    (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    (folder / "status.json").write_text(json.dumps({"state": "finished", "step": 7, "tokens": 7168}))
    (folder / "plan.json").write_text(json.dumps({"tokens_per_s": 1500.0}))
    return folder


def test_a_run_becomes_files_that_agree_with_it(run: Path) -> None:
    result = release_run(run, ["safetensors", "gguf"], ["f32", "q8_0", "q4_k"])
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md"} <= set(
        result.files
    )
    assert result.gguf == run / "release" / "small-f32.gguf"
    assert result.verification["small-f32.gguf"].largest_difference < 1e-3
    assert result.verification["small-f32.gguf"].same_first_choice == 1.0
    tokens = torch.arange(30).unsqueeze(0)
    assert torch.equal(load_pretrained(run / "release")(tokens), network("grok")(tokens))
    assert not list(run.glob(".release*"))
    card = (run / "release" / "README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\n")
    for fact in ("7,168", "5.432", "2.718", "1500", "1234", "small-q4_k.gguf"):
        assert fact in card
    assert "$" not in card


@pytest.mark.parametrize("shape", SHAPES)
def test_llama_cpp_expects_what_the_network_expects_for_every_shape(tmp_path: Path, shape: str) -> None:
    decoder, tokenizer = network(shape), trained_tokenizer(tmp_path / "tokenizer.json")
    vocabulary = read_vocabulary(tokenizer, VOCAB)
    write_gguf(tmp_path / "model.gguf", decoder, vocabulary, "f32", Described("test"))
    found = measure_agreement(tmp_path / "model.gguf", decoder, fixed_prompts(tokenizer, 64)[:8], "f32")
    assert found.largest_difference < 1e-3
    import_gguf(tmp_path / "model.gguf", tmp_path / "back")
    back = load_pretrained(tmp_path / "back")
    for (name, given), (_, read) in zip(decoder.named_parameters(), back.named_parameters(), strict=True):
        assert torch.equal(given, read), name


def test_a_file_with_the_wrong_rows_fails_the_release(tmp_path: Path) -> None:
    decoder, tokenizer = network("llama"), trained_tokenizer(tmp_path / "tokenizer.json")
    write_gguf(tmp_path / "m.gguf", decoder, read_vocabulary(tokenizer, VOCAB), "f32", Described("test"))
    decoder.embed.weight.copy_(decoder.embed.weight.flip(0))
    with pytest.raises(OperationError, match=r"differ from PyTorch's"):
        measure_agreement(tmp_path / "m.gguf", decoder, fixed_prompts(tokenizer, 64), "f32")


def test_a_file_that_llama_cpp_cannot_load_is_a_failure_and_no_crash(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "nonsense")
    writer.add_token_list(["a"])
    writer.add_tensor("x", np.ones(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(OperationError, match=r"m\.gguf: llama\.cpp failed"):
        next_token_probabilities(tmp_path / "m.gguf", [[1]], 10)


def test_q4_k_loses_less_than_q4_0_and_reads_back_by_the_gguf_package() -> None:
    values = np.random.default_rng(5).normal(0.1, 1.0, (64, 512)).astype(np.float32)
    values[3] = 0.0
    packed = quantize_q4_k(values)
    assert packed.shape == (64, 288)

    def loss(found: np.ndarray) -> float:
        return float(((found - values) ** 2).mean())

    four = gguf.GGMLQuantizationType.Q4_0
    plain = gguf.quants.dequantize(gguf.quants.quantize(values, four), four)
    found = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q4_K)
    assert loss(found) < 0.75 * loss(plain)
    assert not found[3].any()


def evaluated(folder: Path, name: str, value: float, **about: str) -> Path:
    """A kept evaluation, of which a release needs this much."""
    report = {
        "date": "2026-01-02T03:04:05Z",
        "tasks": {name: {"samples": 100}},
        "scores": {name: {"acc,none": {"value": value, "standard_error": 0.0125}}},
    }
    (folder / "evals").mkdir(exist_ok=True)
    path = folder / "evals" / f"{name}.json"
    path.write_text(json.dumps(report | about))
    return path


def test_evaluations_go_with_the_release_and_stay_when_it_is_made_again(run: Path) -> None:
    checkpoint = release_run(run, ["safetensors"]).folder.parent / "checkpoints"
    newest = max(path.name for path in checkpoint.iterdir() if path.is_dir())
    weights = digest_of(sorted((run / "release").glob("*.safetensors")))
    asked = evaluated(run, "asked", 0.625, version=newest)
    evaluated(run, "earlier", 0.5, version="step-0")
    here = evaluated(run / "release", "here", 0.75, version="1", digest=weights)
    stale = evaluated(run / "release", "stale", 0.25, version="1", digest="other weights")
    (run / "evals" / "broken.json").write_text("{")
    (run / "release" / "evals" / ".begun.part").write_text("[]\n")
    before = {path.name: path.read_bytes() for path in (asked, here, stale)}
    result = release_run(run, ["safetensors"])
    kept = {path.name: path.read_bytes() for path in (result.folder / "evals").iterdir()}
    assert kept == before | {".begun.part": b"[]\n"}
    section = (result.folder / "README.md").read_text().partition("## Evaluations")[2].partition("##")[0]
    assert [line for line in section.splitlines() if line.startswith("|")][2:] == [
        "| asked | acc | 0.625 | 0.0125 | 100 | 2026-01-02 |",
        "| here | acc | 0.75 | 0.0125 | 100 | 2026-01-02 |",
    ]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"to": ["onnx"]}, "onnx"),
        ({"to": ["gguf"], "quantize": ["q2_k"]}, "f32, f16, bf16, q8_0, q4_k"),
        ({"to": []}, "to is empty"),
        ({"to": ["safetensors"], "dtype": "int3"}, "int3"),
    ],
)
def test_unknown_words_are_refused_and_the_old_release_stands(
    run: Path, arguments: dict[str, Any], sentence: str
) -> None:
    (run / "release").mkdir()
    (run / "release" / "old").touch()
    with pytest.raises(InputError, match=sentence):
        release_run(run, **arguments)
    assert (run / "release" / "old").exists()


def test_a_tokenizer_with_more_pieces_than_the_network_is_refused_with_both_counts(run: Path) -> None:
    tokenizer = Tokenizer.from_file(str(run / "tokenizer.json"))
    tokenizer.add_tokens([f"extra{number}" for number in range(VOCAB)])
    tokenizer.save(str(run / "tokenizer.json"))
    with pytest.raises(InputError, match=rf"tokenizer has \d+ pieces and the network's vocabulary {VOCAB}"):
        release_run(run, ["gguf"], ["f32"])


@pytest.mark.parametrize("missing", ["run.toml", "tokenizer.json"])
def test_a_folder_that_is_no_run_is_refused(run: Path, missing: str) -> None:
    (run / missing).unlink()
    with pytest.raises(InputError, match=missing):
        release_run(run)


def test_a_run_without_a_checkpoint_cannot_be_released(run: Path) -> None:
    (run / "checkpoints").rename(run / "elsewhere")
    with pytest.raises(OperationError, match="no checkpoint"):
        release_run(run)


@pytest.mark.parametrize(
    ("shape", "scaling", "sentence"),
    [
        ("llama", YARN | {"beta_fast": 8.0}, "rope_scaling.beta_fast = 8.0 has no place in llama.cpp's llama: 32.0 is"),
        ("grok", YARN | {"rope_type": "yarn_log"}, "'yarn_log', .* has no place in llama.cpp"),
        ("grok", YARN | {"truncate": False}, "yarn with whole dimensions are accepted"),
    ],
)
def test_a_stretching_that_llama_cpp_would_not_apply_is_refused(
    shape: str, scaling: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence):
        metadata_of(ModelSpec.model_validate(SHAPES[shape] | {"rope_scaling": scaling}))
