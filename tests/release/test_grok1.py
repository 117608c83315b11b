"""Grok-1's release becomes a Hugging Face folder whose logits are those of the original code."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from modelworks.cli import app
from modelworks.release.grok1 import dequantized, import_grok1, release_manifest
from modelworks.release.pickles import QuantizedTensor
from modelworks.release.verify import verify
from modelworks.spec.errors import InputError


@pytest.fixture(scope="session")
def tiny(shared_data: Path) -> Path:
    return shared_data / "grok-1" / "tiny"


@pytest.fixture
def release(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the tiny release that a test may damage."""
    copy = tmp_path / "release"
    shutil.copytree(tiny, copy)
    for path in (copy, *copy.rglob("*")):
        path.chmod(0o755)
    return copy


def test_the_imported_network_has_the_original_codes_logits(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    runner = CliRunner()
    imported = runner.invoke(
        app, ["import", "grok-1", str(tiny), "--config", str(tiny / "manifest.json"), "--out", str(out)]
    )
    assert imported.exit_code == 0, imported.output
    verified = runner.invoke(app, ["verify", str(out), "--logits", str(tiny / "logits_float32.npz"), "--json"])
    assert verified.exit_code == 0, verified.output
    result = json.loads(verified.stdout)
    assert result["tokens"] == 48
    assert result["logits"] == [1, 48, 512]
    assert result["max_rel_std"] <= 2e-3
    assert result["passed"] is True


def test_logits_of_another_precision_fail_the_tolerance(tiny: Path, tmp_path: Path) -> None:
    import_grok1(tiny, tmp_path / "out", tiny / "manifest.json")
    result = verify(tmp_path / "out", tiny / "logits_bfloat16.npz")
    assert not result.passed
    assert result.max_rel_std < 1.0


def test_the_config_is_one_that_sglang_reads(tiny: Path, tmp_path: Path) -> None:
    import_grok1(tiny, tmp_path / "out", tiny / "manifest.json")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["Grok1ForCausalLM"]
    # The fields that sglang/srt/models/grok.py reads without a default.
    read = {"num_local_experts", "num_experts_per_tok", "hidden_size", "intermediate_size", "num_attention_heads"}
    read |= {"num_key_value_heads", "num_hidden_layers", "vocab_size", "rms_norm_eps", "pad_token_id", "head_dim"}
    read |= {"embedding_multiplier_scale", "output_multiplier_scale", "max_position_embeddings"}
    assert read <= set(config)


def test_the_official_release_is_770_tensors_in_the_order_of_their_paths_as_text() -> None:
    spec, listed = release_manifest()
    assert spec.layers == 64
    assert len(listed) == 770
    assert [tensor.path.split("/")[2] for tensor in listed[2::12]][:3] == [
        "decoder_layer_0",
        "decoder_layer_1",
        "decoder_layer_10",
    ]


def test_the_release_order_is_that_of_the_manifest(tiny: Path) -> None:
    listed = json.loads((tiny / "manifest.json").read_text())["manifest"]
    official = [tensor.path for tensor in release_manifest()[1]]
    assert [entry["path"] for entry in listed] == official[:26]


def test_scales_in_row_blocks_hold_for_equal_blocks_of_rows() -> None:
    weight = np.arange(12, dtype=np.int8).reshape(4, 3)
    scales = np.array([[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]], np.float32)
    expected = np.array([[w * scales[row // 2, column] for column, w in enumerate(weight[row])] for row in range(4)])
    np.testing.assert_array_equal(dequantized(QuantizedTensor(weight, scales), Path("x")), expected)


def damage_missing(release: Path) -> None:
    (release / "ckpt-0" / "tensor00007_000").unlink()


def damage_truncated(release: Path) -> None:
    path = release / "ckpt-0" / "tensor00002_000"
    path.write_bytes(path.read_bytes()[:-1000])


def damage_shape(release: Path) -> None:
    (release / "ckpt-0" / "tensor00009_000").write_bytes(pickle.dumps(np.ones(127, np.float32), 4))


def damage_infinity(release: Path) -> None:
    (release / "ckpt-0" / "tensor00009_000").write_bytes(pickle.dumps(np.full(128, np.inf, np.float32), 4))


def damage_layers(release: Path) -> None:
    path = release / "manifest.json"
    path.write_text(path.read_text().replace('"layers": 2', '"layers": 3'))


def damage_heads(release: Path) -> None:
    path = release / "manifest.json"
    path.write_text(path.read_text().replace('"kv": 8', '"kv": 7'))


def damage_manifest(release: Path) -> None:
    (release / "manifest.json").write_text("[]")


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (damage_missing, "tensor00007_000: is missing"),
        (damage_truncated, "truncated"),
        (damage_shape, r"has the shape \(127,\)"),
        (damage_infinity, "finite"),
        (damage_layers, "lists 26 tensors, and a network of 3 layers has 38"),
        (damage_heads, "kv_heads"),
        (damage_manifest, "manifest.json"),
    ],
)
def test_a_damaged_release_is_refused_in_one_sentence_and_leaves_nothing(
    release: Path, tmp_path: Path, damage: object, sentence: str
) -> None:
    damage(release)  # type: ignore[operator]
    with pytest.raises(InputError, match=sentence):
        import_grok1(release, tmp_path / "place" / "out", release / "manifest.json")
    assert not list(tmp_path.glob("place/*")) + list(tmp_path.glob("place/.*"))


def test_what_exists_is_not_overwritten(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="not overwritten"):
        import_grok1(tiny, tmp_path / "out", tiny / "manifest.json")
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("arrays", "sentence"),
    [
        ({"tokens": np.zeros((1, 4), np.int32)}, "one of them is missing"),
        ({"tokens": np.zeros((1, 4), np.int32), "logits": np.zeros((1, 4, 7), np.float32)}, "logits has the shape"),
        ({"tokens": np.full((1, 4), 999), "logits": np.zeros((1, 4, 512), np.float32)}, "0 to 511 fit"),
        ({"tokens": np.zeros((1, 99), int), "logits": np.zeros((1, 99, 512), np.float32)}, "context of 48"),
        ({"tokens": np.zeros((1, 4)), "logits": np.zeros((1, 4, 512))}, "integers"),
        ({"tokens": np.array([[object()]]), "logits": np.zeros((1, 1, 512))}, "cannot be read"),
    ],
)
def test_reference_logits_that_do_not_fit_are_refused(
    tiny: Path, tmp_path: Path, arrays: dict[str, np.ndarray], sentence: str
) -> None:
    import_grok1(tiny, tmp_path / "out", tiny / "manifest.json")
    np.savez(tmp_path / "reference.npz", **arrays)
    with pytest.raises(InputError, match=sentence):
        verify(tmp_path / "out", tmp_path / "reference.npz")
