"""Grok-1's release becomes a GGUF file with the release's own integers, and an interrupted import goes on."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import gguf
import httpx
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from modelworks.cli import app
from modelworks.release import huggingface
from modelworks.release.gguf_file import values
from modelworks.release.grok1 import as_q8_0, dequantized, import_grok1
from modelworks.release.huggingface import load_pretrained
from modelworks.release.llama_cpp import next_token_probabilities
from modelworks.release.pickles import QuantizedTensor, read_array
from modelworks.spec.errors import InputError
from modelworks.spec.gguf_header import read_gguf_header

PIECES = 512
TEXTS = (
    "def main() -> None:",
    "  two spaces, and the value is 3.14",
    "Żółw 🐢 swims\nin\tthe sea",
    "in 1984, 20 lines\n\nof text",
)


@pytest.fixture(scope="session")
def tiny(shared_data: Path) -> Path:
    return shared_data / "grok-1" / "tiny"


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model of the release's kind: padding first, pieces of the user's, bytes for what is left."""
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp("tokenizer")
    stdlib = Path(sysconfig.get_path("stdlib"))
    text = "\n".join((stdlib / name).read_text() for name in ("argparse.py", "textwrap.py", "typing.py"))
    (folder / "text").write_text(text)
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=PIECES,
        model_type="bpe",
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        byte_fallback=True,
        user_defined_symbols=list("0123456789\n\t"),
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    return folder / "tokenizer.model"


def test_llama_cpp_predicts_from_the_imported_file_what_the_network_does(
    tiny: Path, tokenizer: Path, tmp_path: Path
) -> None:
    out = tmp_path / "grok"
    arguments = ["import", "grok-1", str(tiny), "--config", str(tiny / "manifest.json"), "--out", str(out)]
    arguments += ["--to", "safetensors,gguf", "--quantize", "f32", "--tokenizer", str(tokenizer)]
    imported = CliRunner().invoke(app, arguments)
    assert imported.exit_code == 0, imported.output
    assert (out / "tokenizer.model").read_bytes() == tokenizer.read_bytes()
    prompts = [[1, 70, 71, 72], [100, 200, 300], [5]]
    predicted = next_token_probabilities(out / "grok-f32.gguf", prompts, PIECES)
    decoder = load_pretrained(out).eval()
    with torch.inference_mode():
        expected = [decoder(torch.tensor([ids]))[0, -1].double().softmax(-1).numpy() for ids in prompts]
    np.testing.assert_allclose(predicted, expected, atol=1e-3)


def test_text_has_the_ids_in_llama_cpp_that_sentencepiece_gives_it(tiny: Path, tokenizer: Path, tmp_path: Path) -> None:
    import sentencepiece
    import xllamacpp

    import_grok1(tiny, tmp_path / "out", tiny / "manifest.json", to=["gguf"], tokenizer=tokenizer)
    settings = xllamacpp.CommonParams()
    settings.model.path = str(tmp_path / "out" / "out-q8_0.gguf")
    settings.n_ctx = 32
    settings.warmup = False
    settings.cpuparams.n_threads = 1
    server = xllamacpp.Server(settings)
    model = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    for text in TEXTS:
        asked = httpx.post(f"{server.listening_address}/tokenize", json={"content": text}, timeout=60).json()
        assert asked["tokens"] == model.encode(text), text


def test_a_q8_0_file_holds_the_releases_own_integers(tiny: Path, tokenizer: Path, tmp_path: Path) -> None:
    import_grok1(tiny, tmp_path / "out", tiny / "manifest.json", to=["gguf"], tokenizer=tokenizer)
    header = read_gguf_header(tmp_path / "out" / "out-q8_0.gguf")
    released = read_array(tiny / "ckpt-0" / "tensor00002_000")  # decoder_layer_0/moe/linear: one row block an expert
    assert isinstance(released, QuantizedTensor)
    stored = header.tensors["blk.0.ffn_gate_exps.weight"]
    assert stored.kind == gguf.GGMLQuantizationType.Q8_0
    expected = dequantized(released, tiny).transpose(0, 2, 1)
    np.testing.assert_allclose(values(header, "blk.0.ffn_gate_exps.weight"), expected, rtol=2**-10, atol=1e-7)


def test_the_integers_of_a_block_stay_what_they_are_where_scales_fit_fp16() -> None:
    generator = np.random.default_rng(0)
    weight = generator.integers(-127, 128, (128, 5), np.int8)
    scales = np.exp2(generator.integers(-8, -3, (2, 5))).astype(np.float32)
    given = QuantizedTensor(weight, scales)
    read = gguf.quants.dequantize(as_q8_0(given), gguf.GGMLQuantizationType.Q8_0)
    np.testing.assert_array_equal(read, dequantized(given, Path("x")).T)


@pytest.mark.parametrize("stop_at", [3, 20, 60])
def test_an_interrupted_import_goes_on_where_it_was(
    tiny: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: int
) -> None:
    monkeypatch.setattr(huggingface, "SHARD_BYTES", 1 << 20)
    said: list[tuple[str, int]] = []

    def stop(what: str, done: int, _: int) -> None:
        said.append((what, done))
        if len(said) == stop_at:
            raise KeyboardInterrupt

    def run(out: Path, progress: huggingface.Progress | None = None) -> None:
        to = ["safetensors", "gguf"]
        import_grok1(tiny, out, tiny / "manifest.json", "bfloat16", progress, to=to, tokenizer=tokenizer)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "a" / "out", stop)
    assert not (tmp_path / "a" / "out").exists()
    again: list[tuple[str, int]] = []
    run(tmp_path / "a" / "out", lambda what, done, _: again.append((what, done)))
    run(tmp_path / "b" / "out")
    file_was_whole = stop_at > 10
    assert (("writing safetensors", 1) not in again) == file_was_whole
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["out"]
    files = sorted((tmp_path / "b" / "out").iterdir())
    assert [path.name for path in files] == sorted(path.name for path in (tmp_path / "a" / "out").iterdir())
    for path in files:
        assert path.read_bytes() == (tmp_path / "a" / "out" / path.name).read_bytes(), path.name


def test_a_gguf_file_without_a_tokenizer_is_refused(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"tokenizer\.model is needed"):
        import_grok1(tiny, tmp_path / "out", tiny / "manifest.json", to=["gguf"])
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(InputError, match="cannot be read as a SentencePiece model"):
        import_grok1(
            tiny, tmp_path / "out", tiny / "manifest.json", to=["gguf"], tokenizer=tmp_path / "tokenizer.model"
        )
    with pytest.raises(InputError, match="to = 'onnx' is not accepted"):
        import_grok1(tiny, tmp_path / "out", tiny / "manifest.json", to=["onnx"])
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.model"]
