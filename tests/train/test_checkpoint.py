"""Checkpoints: whole or absent, and believed only when every byte is as it was written."""

import json
import logging
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from modelworks.model import checkpoint
from modelworks.model.decoder import Decoder
from modelworks.spec.errors import OperationError
from modelworks.spec.model import ModelSpec


def _tensors(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "model.a": torch.randn(33, 7, generator=generator),
        "optimizer.a/step": torch.tensor(float(seed)),
        "optimizer.a/half": torch.randn(5, generator=generator).bfloat16(),
        "random.torch": generator.get_state(),
    }


def _flip_one_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_what_was_saved_is_loaded_to_the_bit(tmp_path: Path) -> None:
    folder = checkpoint.save(tmp_path, 7, _tensors(7), {"tokens": 70, "loss": None})
    assert folder == tmp_path / "checkpoints" / "step-00000007"
    loaded = {key: torch.zeros_like(tensor) for key, tensor in _tensors(7).items()}
    checkpoint.load(folder, loaded)
    assert all(torch.equal(loaded[key], tensor) for key, tensor in _tensors(7).items())
    assert checkpoint.read_state(folder) == {"tokens": 70, "loss": None, "step": 7}
    assert checkpoint.verify(folder)["step"] == 7


def test_nothing_in_a_checkpoint_is_a_pickle(tmp_path: Path) -> None:
    folder = checkpoint.save(tmp_path, 1, _tensors(1), {})
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors"}
    for path in folder.iterdir():
        with pytest.raises((pickle.UnpicklingError, ValueError, EOFError, KeyError)):
            pickle.loads(path.read_bytes())


def test_a_tensor_larger_than_a_file_goes_into_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "_FILE_BYTES", 100)
    folder = checkpoint.save(tmp_path, 1, _tensors(1), {})
    assert len(list(folder.glob("*.safetensors"))) > 1
    loaded = {key: torch.zeros_like(tensor) for key, tensor in _tensors(1).items()}
    checkpoint.load(folder, loaded)
    assert all(torch.equal(loaded[key], tensor) for key, tensor in _tensors(1).items())


@pytest.mark.parametrize("name", ["state.json", "manifest.json", "shard-00001-model-00001-of-00001.safetensors"])
def test_one_flipped_byte_is_refused_for_the_checkpoint_before(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    good = checkpoint.save(tmp_path, 10, _tensors(1), {})
    bad = checkpoint.save(tmp_path, 20, _tensors(2), {})
    _flip_one_byte(bad / name)
    with pytest.raises(OperationError, match="step-00000020"):
        checkpoint.verify(bad)
    with caplog.at_level(logging.WARNING):
        assert checkpoint.newest_good(tmp_path) == good
    assert "step-00000020" in caplog.text


@pytest.mark.parametrize("damage", ["missing file", "short file", "extra file", "renamed folder"])
def test_other_damage_is_refused_too(tmp_path: Path, damage: str) -> None:
    folder = checkpoint.save(tmp_path, 10, _tensors(1), {})
    weights = next(folder.glob("*.safetensors"))
    if damage == "missing file":
        weights.unlink()
    elif damage == "short file":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif damage == "extra file":
        shutil.copy(weights, folder / "shard-00002-model-00001-of-00001.safetensors")
    else:
        folder = folder.rename(folder.with_name("step-00000011"))
    with pytest.raises(OperationError, match="checkpoint"):
        checkpoint.verify(folder)


def test_without_a_good_checkpoint_the_error_says_so(tmp_path: Path) -> None:
    with pytest.raises(OperationError, match="no checkpoint yet"):
        checkpoint.newest_good(tmp_path)
    _flip_one_byte(checkpoint.save(tmp_path, 10, _tensors(1), {}) / "state.json")
    with pytest.raises(OperationError, match="none of the 1 checkpoints"):
        checkpoint.newest_good(tmp_path)


def test_a_crash_before_the_commit_leaves_the_older_checkpoint_and_is_cleared_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = checkpoint.save(tmp_path, 10, _tensors(1), {})
    shutil.copytree(good, good.with_name(".step-00000020.tmp"))
    assert checkpoint.newest_good(tmp_path) == good
    checkpoint.save(tmp_path, 30, _tensors(3), {})
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000010", "step-00000030"]


def test_a_damaged_checkpoint_is_replaced_when_its_step_is_reached_again(tmp_path: Path) -> None:
    _flip_one_byte(checkpoint.save(tmp_path, 10, _tensors(1), {}) / "state.json")
    again = checkpoint.save(tmp_path, 10, _tensors(1), {})
    assert checkpoint.verify(again)["step"] == 10
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000010"]


def test_rotation_keeps_the_newest(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        checkpoint.save(tmp_path, step, _tensors(step), {})
        checkpoint.rotate(tmp_path, keep=2)
    assert [path.name for path in checkpoint.folders(tmp_path)] == ["step-00000004", "step-00000003"]


def test_weights_are_loaded_into_a_network_and_refused_by_another(tmp_path: Path) -> None:
    spec = ModelSpec(layers=1, hidden=16, ffn_hidden=32, heads=2, vocab=64, context=32)
    trained, fresh = Decoder(spec), Decoder(spec)
    trained.initialize(1)
    weights = {f"model.{name}": tensor for name, tensor in trained.state_dict().items()}
    folder = checkpoint.save(tmp_path, 1, weights, {})
    checkpoint.load_weights(folder, fresh)
    assert all(torch.equal(a, b) for a, b in zip(trained.parameters(), fresh.parameters(), strict=True))
    for other in ({"hidden": 32}, {"layers": 2}):
        with pytest.raises(OperationError, match="doesn't fit"):
            checkpoint.load_weights(folder, Decoder(spec.model_copy(update=other)))


def test_the_manifest_names_every_file_with_its_digest(tmp_path: Path) -> None:
    import hashlib

    folder = checkpoint.save(tmp_path, 1, _tensors(1), {})
    files = json.loads((folder / "manifest.json").read_text())["files"]
    assert set(files) == {path.name for path in folder.iterdir()} - {"manifest.json"}
    for name, entry in files.items():
        content = (folder / name).read_bytes()
        assert entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
