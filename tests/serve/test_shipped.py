"""The adapters that come with the package: stored once beside their model, brought up to date, and never forced."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import tomli_w

from modelworks.serve import download
from modelworks.serve.download import offer, pull, sources
from modelworks.serve.store import ServedModel, Store
from modelworks.spec.errors import OperationError

BASE, NAME, WIDTH, RANK = "tiny", "tiny-character", 32, 2
REPOSITORY = Path(__file__).parents[2]


def write_gguf(path: Path, tensors: dict[str, np.ndarray], *, adapter: bool) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    if adapter:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 4.0)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_model(path: Path, seed: int) -> Path:
    draw = np.random.default_rng(seed)
    return write_gguf(path, {"blk.0.ffn_down.weight": draw.random((WIDTH, WIDTH), np.float32)}, adapter=False)


def write_adapter(path: Path, seed: int) -> Path:
    draw, matrix = np.random.default_rng(seed), "blk.0.ffn_down.weight"
    down, up = draw.random((RANK, WIDTH), np.float32), draw.random((WIDTH, RANK), np.float32)
    return write_gguf(path, {f"{matrix}.lora_a": down, f"{matrix}.lora_b": up}, adapter=True)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Package:
    """A package's folder of adapters, with one for a tiny model."""

    def __init__(self, folder: Path, base: Path) -> None:
        self.folder, self.base = folder, base
        folder.mkdir()
        self.ship(1)

    @property
    def file(self) -> Path:
        return self.folder / f"{NAME}.gguf"

    def ship(self, seed: int) -> None:
        """Put another version of the adapter into the package."""
        write_adapter(self.file, seed)
        about = {"title": "tiny with character", "license": "MIT", "made": "by a test"}
        fits = {"adapts": BASE, "adapts_sha256": digest(self.base)}
        sizes = {"bytes": self.file.stat().st_size, "sha256": digest(self.file)}
        (self.folder / f"{NAME}.toml").write_text(tomli_w.dumps(about | fits | sizes))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "models")
    store.add(BASE, write_model(tmp_path / "tiny.gguf", 1), source="a test")
    return store


@pytest.fixture
def package(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Package:
    monkeypatch.setattr(download, "ADAPTERS", tmp_path / "adapters")
    return Package(tmp_path / "adapters", store.path(BASE))


def stored(store: Store) -> dict[str, ServedModel]:
    return {model.name: model for model in store.list()}


def test_it_is_offered_beside_its_model_and_apart_from_the_packages_file(store: Store, package: Package) -> None:
    offer(store)
    adapter = store.get(NAME)
    assert (adapter.title, adapter.license, adapter.adapts) == ("tiny with character", "MIT", BASE)
    assert adapter.sha256 == digest(package.file) == digest(store.path(NAME))
    assert not store.path(NAME).samefile(package.file)
    assert store.adapters(store.get(BASE)) == [adapter]


def test_one_that_was_removed_stays_so_until_it_is_pulled(store: Store, package: Package) -> None:
    offer(store)
    store.remove(NAME)
    offer(store)
    package.ship(2)
    offer(store)
    assert list(stored(store)) == [BASE]
    assert pull(store, NAME).sha256 == digest(package.file)
    store.remove(NAME)
    offer(store)
    assert list(stored(store)) == [BASE]


def test_a_newer_package_brings_its_own_up_to_date(store: Store, package: Package) -> None:
    offer(store)
    first = store.get(NAME)
    offer(store)
    assert store.get(NAME) == first
    package.ship(2)
    offer(store)
    assert store.get(NAME).sha256 == digest(package.file) != first.sha256


@pytest.mark.parametrize("after_ours", [False, True], ids=["before", "instead"])
def test_what_somebody_made_under_its_name_is_never_replaced(
    store: Store, package: Package, tmp_path: Path, after_ours: bool
) -> None:
    if after_ours:
        offer(store)
    own = store.add_adapter(NAME, write_adapter(tmp_path / "own.gguf", 3), BASE, source="run mine")
    package.ship(2)
    offer(store)
    assert store.get(NAME) == own


def test_other_weights_under_the_models_name_are_not_given_it(store: Store, package: Package, tmp_path: Path) -> None:
    original = tmp_path / "original.gguf"
    original.write_bytes(store.path(BASE).read_bytes())
    store.add(BASE, write_model(tmp_path / "other.gguf", 2), source="a test")
    offer(store)
    assert list(stored(store)) == [BASE]
    store.remove(BASE)
    offer(store)
    assert not stored(store)
    store.add(BASE, original, source="a test")
    offer(store)
    store.remove(BASE)
    store.add(BASE, original, source="a test")
    offer(store)
    assert store.adapters(store.get(BASE)) == [store.get(NAME)]


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (lambda file: file.write_bytes(file.read_bytes()[:-1] + b"\xff"), "its sha256 is"),
        (lambda file: os.truncate(file, 100), "it has 100 bytes"),
        (lambda file: file.unlink(), "can't be read"),
    ],
    ids=["changed", "cut", "gone"],
)
def test_a_damaged_package_is_a_sentence_and_the_model_stays(store: Store, package: Package, harm, says: str) -> None:  # type: ignore[no-untyped-def]
    harm(package.file)
    with pytest.raises(OperationError, match=says):
        offer(store)
    assert list(stored(store)) == [BASE]
    assert not [path.name for path in store.folder.iterdir() if path.name.startswith((".pull", ".new"))]
    package.ship(1)
    offer(store)
    assert list(stored(store)) == [BASE, NAME]


def test_a_damaged_package_leaves_the_one_that_is_stored(store: Store, package: Package) -> None:
    offer(store)
    before = store.get(NAME)
    package.ship(2)
    os.truncate(package.file, 100)
    with pytest.raises(OperationError):
        offer(store)
    assert store.get(NAME) == before


def test_what_the_package_says_of_its_adapters_is_true() -> None:
    ours = [source for source in sources().values() if source.adapts is not None]
    assert ours
    for source in ours:
        file = download.ADAPTERS / f"{source.name}.gguf"
        assert (file.stat().st_size, digest(file)) == (source.bytes, source.sha256)
        assert source.adapts_sha256 == sources()[str(source.adapts)].sha256
        assert source.made


@pytest.mark.slow
def test_a_wheel_holds_them(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "--wheel-dir", str(tmp_path)]
    built = subprocess.run([*command, str(REPOSITORY)], capture_output=True, text=True, timeout=300)
    if built.returncode and "hatchling" in built.stderr:
        pytest.skip(f"hatchling can't be fetched here: {built.stderr[-200:]}")
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        for name, source in sources().items():
            if source.adapts is not None:
                held = archive.read(f"modelworks/serve/adapters/{name}.gguf")
                assert hashlib.sha256(held).hexdigest() == source.sha256
                assert f"modelworks/serve/adapters/{name}.toml" in names
