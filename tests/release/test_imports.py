"""What an import leaves: files that can be checked alone, the release's own layers, and nothing on a full disk."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from modelworks.cli import app
from modelworks.model.decoder import Decoder
from modelworks.release import huggingface
from modelworks.release.gguf_export import Described, write_gguf
from modelworks.release.gguf_import import import_gguf, import_huggingface
from modelworks.release.grok1 import Release, import_grok1, read_manifest
from modelworks.release.huggingface import load_pretrained, save_pretrained
from modelworks.release.layouts import TensorPlace
from modelworks.release.parity import Stored, check_parity, of_folder
from modelworks.release.vocabulary import vocabulary_of
from modelworks.spec import InputError, ModelSpec, OperationError

LLAMA = {"layers": 2, "hidden": 64, "ffn_hidden": 128, "heads": 4, "kv_heads": 2, "vocab": 6, "context": 32}
PIECES = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.tokens": ["<|endoftext|>", "a", "b", "c", "ab", "abc"],
    "tokenizer.ggml.merges": ["a b", "ab c"],
}


@pytest.fixture(scope="session")
def tiny(shared_data: Path) -> Path:
    return shared_data / "grok-1" / "tiny"


@pytest.fixture
def imported(tiny: Path, tmp_path: Path) -> Path:
    import_grok1(tiny, tmp_path / "out", tiny / "manifest.json")
    return tmp_path / "out"


def test_an_import_of_grok_1_notes_checksums_and_the_layers_that_were_compared(imported: Path) -> None:
    manifest = json.loads((imported / "manifest.json").read_text())
    assert set(manifest["files"]) == {path.name for path in imported.iterdir()} - {"manifest.json"}
    assert len(manifest["source"]["files"]) == 26
    parity = manifest["source"]["parity"]["safetensors"]
    assert parity["layers"] == [0, 1]
    # Four norms, four maps of attention, a router and three matrices of eight experts in each of two layers.
    assert parity["matrices"] == 2 * (4 + 4 + 1 + 3 * 8)
    assert parity["largest_difference"] < 1e-6


def test_verify_reads_every_byte_and_needs_no_source(imported: Path) -> None:
    runner = CliRunner()
    good = runner.invoke(app, ["verify", str(imported), "--json"])
    assert good.exit_code == 0, good.output
    found = json.loads(good.stdout)
    assert found["passed"] is True
    assert found["bytes"] == sum(path.stat().st_size for path in imported.iterdir() if path.name != "manifest.json")
    weights = imported / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    bad = runner.invoke(app, ["verify", str(imported)])
    assert isinstance(bad.exception, OperationError)
    assert "model.safetensors: is damaged" in str(bad.exception)
    weights.write_bytes(content[:-1])
    with pytest.raises(OperationError, match=r"has \d+ bytes, and manifest.json says \d+"):
        raise runner.invoke(app, ["verify", str(imported)]).exception or AssertionError
    weights.unlink()
    with pytest.raises(OperationError, match=r"is missing, and manifest\.json lists it"):
        raise runner.invoke(app, ["verify", str(imported)]).exception or AssertionError


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "has no manifest.json"),
        ("[]", "a table of fields is accepted"),
        ('{"files": {"../secret": {"bytes": 1, "sha256": "' + "0" * 64 + '"}}}', "is damaged"),
        ('{"files": {"config.json": {"bytes": 1, "sha256": "00"}}}', "is damaged"),
    ],
)
def test_a_manifest_that_is_none_is_refused(tmp_path: Path, content: str | None, sentence: str) -> None:
    if content is not None:
        (tmp_path / "manifest.json").write_text(content)
    result = CliRunner().invoke(app, ["verify", str(tmp_path)])
    assert isinstance(result.exception, InputError)
    assert sentence in str(result.exception)


def exchanged(stored: Stored) -> Stored:
    """The gate where the value beside it should be."""
    return lambda place: stored(TensorPlace("", place.ours.replace("moe.up", "moe.gate"), place.expert, place.shape))


def scaled(stored: Stored) -> Stored:
    return lambda place: stored(place) * np.float32(1.0001)


def shifted(stored: Stored) -> Stored:
    """Experts one further on."""

    def shift(place: TensorPlace) -> np.ndarray:
        expert = None if place.expert is None else (place.expert + 1) % 8
        return stored(TensorPlace("", place.ours, expert, place.shape))

    return shift


def turned(stored: Stored) -> Stored:
    """Rows in another order, as a permutation for rotary positions would leave them."""
    return lambda place: stored(place) if "wq" not in place.ours else np.roll(stored(place), 1, 0)


@pytest.mark.parametrize("mistake", [exchanged, scaled, shifted, turned])
def test_a_mistake_in_a_sampled_layer_is_found(tiny: Path, imported: Path, mistake: Callable[[Stored], Stored]) -> None:
    release = Release(tiny / "ckpt-0", *read_manifest(tiny / "manifest.json"))
    spec, written = load_pretrained(imported).spec, of_folder(imported)
    check_parity(release.content, spec, written, 1e-5, "as written")
    with pytest.raises(OperationError, match="differs from the release by"):
        check_parity(release.content, spec, mistake(written), 1e-5, "with a mistake")


def llama(folder: Path) -> Path:
    save_pretrained(Decoder(ModelSpec.model_validate(LLAMA)), folder)
    return folder


def gguf_file(folder: Path) -> Path:
    folder.mkdir()
    network = Decoder(ModelSpec.model_validate(LLAMA))
    write_gguf(folder / "x.gguf", network, vocabulary_of(PIECES, "small"), "f32", Described("small"))
    return folder / "x.gguf"


@contextlib.contextmanager
def disk(folder: Path, kibibytes: int) -> Iterator[Callable[[int], None]]:
    """A small disk under a folder; what it gives can make it larger."""

    def mount(*options: str) -> None:
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", *options, "tmpfs", str(folder)], capture_output=True, text=True
        )
        if mounted.returncode:
            pytest.skip(f"a small disk needs the right to mount one: {mounted.stderr.strip()}")

    folder.mkdir()
    mount("-o", f"size={kibibytes}k")
    try:
        yield lambda more: mount("-o", f"remount,size={more}k")
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


IMPORTS: dict[str, Callable[[Path, Path, Path], Any]] = {
    "hf": lambda source, _, out: import_huggingface(source / "llama", out),
    "hf to gguf": lambda source, _, out: import_huggingface(source / "llama", out, to=["gguf"], precision="f32"),
    "gguf": lambda source, _, out: import_gguf(source / "gguf" / "x.gguf", out),
    "grok-1": lambda _, tiny, out: import_grok1(tiny, out, tiny / "manifest.json"),
}


@pytest.mark.parametrize("kind", IMPORTS)
def test_an_import_that_fills_the_disk_says_so_and_goes_on_when_there_is_room(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(huggingface, "SHARD_BYTES", 60_000 if kind != "grok-1" else 1_000_000)
    llama(tmp_path / "llama")
    original = gguf_file(tmp_path / "gguf")
    import_gguf(original, tmp_path / "for its tokenizer")
    shutil.copyfile(tmp_path / "for its tokenizer" / "tokenizer.json", tmp_path / "llama" / "tokenizer.json")
    run = IMPORTS[kind]
    run(tmp_path, tiny, tmp_path / "whole" / "out")
    size = sum(path.stat().st_size for path in (tmp_path / "whole" / "out").iterdir())
    place = tmp_path / "disk"
    with disk(place, size // 1024 * 2 // 3) as enlarge:
        with pytest.raises(OperationError, match=r"cannot be written: .*(No space left|disk is full)"):
            run(tmp_path, tiny, place / "out")
        assert not (place / "out").exists()
        kept = {path.name: path.stat().st_mtime_ns for path in place.glob(".out.*.part/*.safetensors")}
        enlarge(size // 1024 * 4)
        run(tmp_path, tiny, place / "out")
        for path in (tmp_path / "whole" / "out").iterdir():
            assert (place / "out" / path.name).read_bytes() == path.read_bytes(), path.name
        for name, written in kept.items():
            assert (place / "out" / name).stat().st_mtime_ns == written, "what was whole is not written again"
        assert [path.name for path in place.iterdir()] == ["out"]


def test_a_tokenizer_that_does_not_fit_the_embedding_is_refused(tmp_path: Path) -> None:
    import_gguf(gguf_file(tmp_path / "gguf"), tmp_path / "out")
    folder = llama(tmp_path / "llama")
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:4].clone()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 4}))
    (folder / "tokenizer.json").write_bytes((tmp_path / "out" / "tokenizer.json").read_bytes())
    for to in ("safetensors", "gguf"):
        with pytest.raises(InputError, match="the tokenizer has 6 pieces and the network's vocabulary 4"):
            import_huggingface(folder, tmp_path / "back", to=[to])
    (folder / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="a GGUF file holds the tokenizer"):
        import_huggingface(folder, tmp_path / "back", to=["gguf"])
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"dtype": "float8"}, "dtype = 'float8' is not accepted"),
        ({"to": ["onnx"]}, "to = 'onnx' is not accepted"),
        ({"to": []}, "to is empty"),
        ({"precision": "q3"}, "quantize = 'q3' is not accepted"),
    ],
)
def test_an_import_with_a_wrong_choice_is_refused_before_anything_is_read(
    tmp_path: Path, arguments: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence):
        import_huggingface(llama(tmp_path / "llama"), tmp_path / "out", **arguments)


def test_weights_of_eight_bits_and_numbers_that_are_none_are_refused(tmp_path: Path) -> None:
    folder = llama(tmp_path / "llama")
    whole = load_file(folder / "model.safetensors")
    save_file(whole | {"model.norm.weight": torch.ones(64, dtype=torch.int8)}, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"model\.norm\.weight is I8, and floating-point weights are accepted"):
        import_huggingface(folder, tmp_path / "out")
    save_file(whole | {"model.norm.weight": torch.full((64,), torch.inf)}, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"model\.norm\.weight holds values that aren't finite numbers"):
        import_huggingface(folder, tmp_path / "out")
    save_file(whole | {"model.norm.weight": torch.full((64,), 1e6)}, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"model\.norm\.weight holds values that aren't finite numbers"):
        import_huggingface(folder, tmp_path / "out", "float16")  # 1e6 is beyond its largest number.
    assert not list(tmp_path.glob("*out*"))
