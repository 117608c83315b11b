"""Copies of checkpoints on other file systems: what is sent, what is fetched, and what happens when it breaks off."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import tenacity

from modelworks.model import checkpoint
from modelworks.spec.errors import InputError, OperationError
from modelworks.spec.home import runs_folder
from modelworks.spec.run import RunSpec
from modelworks.train.copies import Copies
from modelworks.train.record import RunRecord
from modelworks.train.view import NoView
from modelworks.train_command import train_and_release

MakeSpec = Callable[..., RunSpec]


@pytest.fixture(params=["memory", "file", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A place for copies on each kind of file system; S3 is a server on this machine."""
    if request.param == "file":
        yield f"file://{tmp_path / 'elsewhere'}"
    elif request.param == "memory":
        fsspec.filesystem("memory").store.clear()
        yield "memory://copies/runs"
        fsspec.filesystem("memory").store.clear()
    else:
        pytest.importorskip("s3fs", reason="S3 needs s3fs")
        server = pytest.importorskip("moto.server", reason="the S3 server needs moto[server]")
        running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        running.start()
        host, port = running.get_host_and_port()
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            monkeypatch.setenv(name, value)
        fsspec.filesystem("s3", skip_instance_cache=True).mkdir("bucket")
        yield "s3://bucket/runs"
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        running.stop()


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tries again at once instead of after a while."""
    monkeypatch.setattr(tenacity.nap.time, "sleep", lambda seconds: None)


def _train(spec: RunSpec, resume: bool = False) -> Any:
    return train_and_release(spec, resume, NoView(), lambda text: None)[0]


def _bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.slow
def test_a_run_goes_on_from_its_copies_where_it_has_never_been(url: str, make_spec: MakeSpec) -> None:
    whole = make_spec("whole", micro_batch=1)
    _train(whole)
    half = make_spec("half", {"checkpoint": {"to": url, "keep": 2}}, micro_batch=1, tokens=20 * 4 * 32)
    _train(half)
    system, base = fsspec.core.url_to_fs(url)
    system.invalidate_cache()
    kept = sorted(path.rpartition("/")[2] for path in system.ls(f"{base}/half/checkpoints", detail=False))
    assert kept[-1] == "step-00000020"
    assert len(kept) <= 2
    sent = _bytes(checkpoint.folder_of(runs_folder() / "half", 20))

    shutil.rmtree(runs_folder() / "half")
    rest = half.model_copy(update={"train": half.train.model_copy(update={"tokens": whole.train.tokens})})
    copies = Copies(rest, runs_folder() / "half")
    assert copies.fetch() == 20
    assert _bytes(checkpoint.folder_of(runs_folder() / "half", 20)) == sent
    shutil.rmtree(runs_folder() / "half")

    result = _train(rest, resume=True)
    assert result.step == 40
    assert [row["step"] for row in RunRecord("half").metrics()] == list(range(1, 41))
    assert Copies(rest, runs_folder() / "half").steps()[0] == 40


@pytest.fixture
def saved(make_spec: MakeSpec) -> tuple[RunSpec, Path]:
    """A run with two checkpoints, without having trained: files of some bytes under a manifest."""
    fsspec.filesystem("memory").store.clear()
    spec = make_spec("saved", {"checkpoint": {"to": "memory://copies", "keep": 2}})
    folder = runs_folder() / "saved"
    for step in (10, 20):
        _make_checkpoint(folder, step)
    (folder / "run.toml").write_text("name = 'saved'\n")
    return spec, folder


def _make_checkpoint(folder: Path, step: int) -> None:
    import hashlib

    target = checkpoint.folder_of(folder, step)
    target.mkdir(parents=True)
    files = {}
    for name in ("shard-00001-model-00001-of-00001.safetensors", "state.json"):
        content = f"{name} of {step}".encode() * 1000
        (target / name).write_bytes(content)
        files[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (target / "manifest.json").write_text(json.dumps({"format": 1, "step": step, "files": files}))


def test_a_copy_that_broke_off_doesnt_exist(saved: tuple[RunSpec, Path]) -> None:
    spec, folder = saved
    with Copies(spec, folder) as copies:
        copies.finish()
    system = fsspec.filesystem("memory")
    assert Copies(spec, folder).steps() == [20]
    system.rm_file("/copies/saved/checkpoints/step-00000020/manifest.json")
    assert Copies(spec, folder).steps() == []


def test_a_damaged_copy_is_passed_over_for_an_older_one(saved: tuple[RunSpec, Path]) -> None:
    spec, folder = saved
    newest = checkpoint.folder_of(folder, 20)
    kept = folder.parent / "kept"
    newest.rename(kept)
    with Copies(spec, folder) as copies:
        copies.finish()
    kept.rename(newest)
    with Copies(spec, folder) as copies:
        copies.finish()
    assert Copies(spec, folder).steps() == [20, 10]
    name = "/copies/saved/checkpoints/step-00000020/state.json"
    fsspec.filesystem("memory").pipe_file(name, b"x" * 10)
    shutil.rmtree(folder)
    assert Copies(spec, folder).fetch() == 10
    assert checkpoint.newest_good(folder).name == "step-00000010"


def test_what_is_here_is_not_fetched_again(saved: tuple[RunSpec, Path]) -> None:
    spec, folder = saved
    with Copies(spec, folder) as copies:
        copies.finish()
    assert Copies(spec, folder).fetch() is None


def test_no_more_copies_are_kept_than_asked_for(saved: tuple[RunSpec, Path]) -> None:
    spec, folder = saved
    for step in (30, 40, 50):
        _make_checkpoint(folder, step)
        with Copies(spec, folder) as copies:
            copies.finish()
    assert Copies(spec, folder).steps() == [50, 40]
    assert not fsspec.filesystem("memory").exists("/copies/saved/checkpoints/step-00000030")


def test_a_file_system_that_fails_now_and_then_is_tried_again(
    saved: tuple[RunSpec, Path], patient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, folder = saved
    system = fsspec.filesystem("memory")
    send, calls = system.put_file, []

    def unsteady(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        if len(calls) % 3:
            raise ConnectionError("reset by peer")
        return send(*arguments, **options)

    monkeypatch.setattr(type(system), "put_file", lambda self, *a, **o: unsteady(*a, **o))
    with Copies(spec, folder) as copies:
        copies.finish()
    assert Copies(spec, folder).steps() == [20]
    assert len(calls) >= 9


def test_what_waiting_cannot_mend_is_said_at_once(saved: tuple[RunSpec, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    spec, folder = saved
    calls = []

    def refused(self: Any, *arguments: Any, **options: Any) -> None:
        calls.append(arguments)
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "put_file", refused)
    with (
        pytest.raises(OperationError, match=r"cannot be copied to .*: Permission denied"),
        Copies(spec, folder) as copies,
    ):
        copies.finish()
    assert len(calls) <= 2
    assert not (folder / ".outbox").exists()


def test_a_checkpoint_that_is_rotated_away_while_it_is_sent_arrives_whole(
    saved: tuple[RunSpec, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, folder = saved
    system = fsspec.filesystem("memory")
    send, begun, go_on = type(system).put_file, threading.Event(), threading.Event()

    def slow(self: Any, *arguments: Any, **options: Any) -> Any:
        begun.set()
        assert go_on.wait(30)
        return send(self, *arguments, **options)

    monkeypatch.setattr(type(system), "put_file", slow)
    with Copies(spec, folder) as copies:
        assert begun.wait(30)
        shutil.rmtree(checkpoint.folder_of(folder, 20))
        go_on.set()
        copies.finish()
    shutil.rmtree(folder)
    assert Copies(spec, folder).fetch() == 20
    checkpoint.verify(checkpoint.folder_of(folder, 20))


def test_a_manifest_cannot_lead_out_of_its_folder(saved: tuple[RunSpec, Path], tmp_path: Path) -> None:
    spec, folder = saved
    with Copies(spec, folder) as copies:
        copies.finish()
    evil = {"format": 1, "step": 20, "files": {"../../../outside": {"bytes": 1, "sha256": "0"}}}
    system = fsspec.filesystem("memory")
    system.pipe_file("/copies/saved/checkpoints/step-00000020/manifest.json", json.dumps(evil).encode())
    shutil.rmtree(folder)
    assert Copies(spec, folder).fetch() is None
    assert not list(tmp_path.rglob("outside"))


def test_a_name_that_is_taken_there_is_not_begun_anew(saved: tuple[RunSpec, Path]) -> None:
    spec, folder = saved
    with Copies(spec, folder) as copies:
        copies.finish()
    with pytest.raises(InputError, match="step 20 is in memory://copies/saved; go on with it by --resume"):
        _train(spec)


@pytest.mark.parametrize(
    ("to", "sentence"),
    [
        ("bucket/runs", "checkpoint.to = 'bucket/runs' is not accepted: a URL is"),
        ("nothing://bucket/runs", "checkpoint.to = 'nothing://bucket/runs' is not accepted"),
    ],
)
def test_a_url_that_cannot_be_used_is_named(make_spec: MakeSpec, tmp_path: Path, to: str, sentence: str) -> None:
    with pytest.raises(InputError) as raised:
        Copies(make_spec("run", {"checkpoint": {"to": to}}), tmp_path)
    assert sentence in str(raised.value)
