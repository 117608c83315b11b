"""A run's checkpoints: written whole or not at all, checked before they are believed.

Three ideas. A checkpoint is a folder ``checkpoints/step-00000040`` that PyTorch's distributed checkpoint (DCP) writes
as safetensors files, so that reading it never runs code (DCP's usual ``.metadata`` is a pickle). Beside them stand
``state.json`` (position, metrics offset: what is no tensor) and, written last, ``manifest.json`` with the size and
SHA-256 of every file. The folder is written under a hidden name, flushed to disk and renamed: a crash at any moment
leaves the older checkpoints and at most a hidden folder that the next save removes.

Several processes save and load together: each writes and reads the parts of the tensors that it holds, the first one
commits, and what fails on one process fails on all. A checkpoint knows nothing of how many wrote it. Processes that
save while they compute do so in a group of their own, so that the two don't wait for each other. DCP is imported where
it is used: whoever only looks at checkpoints needn't wait a second for it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors import SafetensorError

from modelworks.spec.errors import OperationError
from modelworks.spec.home import write_atomically

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from modelworks.model.decoder import Decoder

logger = logging.getLogger(__name__)
Result = TypeVar("Result")
_FILE_BYTES = 1 << 29
"""DCP builds each file in memory before writing it; this bounds what that takes."""
# DCP's remark that one process is one process; for good, since a save that set it back would do so under other threads.
warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)


def folders(run_folder: Path) -> list[Path]:
    """The committed checkpoints of a run, newest first."""
    return sorted((run_folder / "checkpoints").glob("step-*"), reverse=True)


def folder_of(run_folder: Path, step: int) -> Path:
    """Where the checkpoint of a step stands once it is committed."""
    return run_folder / "checkpoints" / f"step-{step:08d}"


def step_of(folder: Path) -> int:
    """The step of a checkpoint's folder."""
    return int(folder.name.removeprefix("step-"))


def save(
    run_folder: Path,
    step: int,
    tensors: Mapping[str, torch.Tensor],
    state: Mapping[str, Any],
    group: ProcessGroup | None = None,
) -> Path:
    """Write a checkpoint and commit it; all processes of a run call this together.

    Parameters
    ----------
    run_folder
        The run's folder.
    step
        Optimizer steps done.
    tensors
        Everything that is a tensor, by key: ``model.*``, ``optimizer.*``, ``random.*``.
    state
        Everything else, as JSON has it.
    group
        The processes that save together, where it isn't the default group.

    Returns
    -------
    Path
        The committed folder.

    Raises
    ------
    OperationError
        If it can't be written, such as on a full disk; older checkpoints stand, nothing partial is left.
    """
    target = folder_of(run_folder, step)
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        _on_all(lambda: _begin(temporary) if _first_process() else None, group)
        _write_tensors(temporary, tensors, group)
        described = _on_all(lambda: _describe(temporary, f"shard-{_process() + 1:05d}-*"), group)
        files = {name: entry for part in described for name, entry in part.items()}
        _on_all(lambda: _commit(temporary, target, step, state, files) if _first_process() else None, group)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise OperationError(f"the checkpoint of step {step} cannot be written: {reason(error)}") from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return target


def newest_good_until(run_folder: Path, step: float) -> Path | None:
    """The newest whole checkpoint of at most so many steps; nothing if there is none."""
    for folder in folders(run_folder):
        if step_of(folder) <= step:
            try:
                verify(folder)
            except OperationError as error:
                logger.warning("%s; an older checkpoint is used", error)
            else:
                return folder
    return None


def remove_after(run_folder: Path, step: int) -> None:
    """Remove the checkpoints of more steps, which are of a course that the run has left."""
    for folder in folders(run_folder):
        if step_of(folder) > step:
            _remove(folder)


def set_aside_after(run_folder: Path, step: int) -> None:
    """Take the checkpoints of more steps, which a resume has passed over, out of what is listed and rotated.

    Else one that is damaged would be the newest until the run is beyond it, and push good ones out. It is kept, hidden,
    until others are set aside: the disk may only have failed to read it.
    """
    passed_over = [folder for folder in folders(run_folder) if step_of(folder) > step]
    if passed_over:
        for earlier in passed_over[0].parent.glob(".step-*.aside"):
            shutil.rmtree(earlier)
    for folder in passed_over:
        folder.rename(folder.with_name(f".{folder.name}.aside"))


def rotate(run_folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints."""
    for old in folders(run_folder)[keep:]:
        _remove(old)


def verify(folder: Path) -> dict[str, Any]:
    """Read every byte of a checkpoint and compare with its manifest.

    Returns
    -------
    dict
        The manifest: ``step`` and ``files`` (name -> ``bytes``, ``sha256``).

    Raises
    ------
    OperationError
        Naming the file that is missing or damaged.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        files, step = dict(manifest["files"]), int(manifest["step"])
        described = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OperationError(f"checkpoint {folder}: manifest.json cannot be read ({reason(error)})") from None
    if folder.name != f"step-{step:08d}":
        raise OperationError(f"checkpoint {folder}: manifest.json is that of step {step}")
    present = {path.name for path in folder.iterdir()} - {"manifest.json"}
    if present != set(described):
        odd = sorted(present ^ set(described))[0]
        raise OperationError(f"checkpoint {folder}: {odd} is {'not in the manifest' if odd in present else 'missing'}")
    for name, (size, digest) in described.items():
        path = folder / name
        if path.stat().st_size != size:
            raise OperationError(f"checkpoint {folder}: {name} has {path.stat().st_size} bytes and should have {size}")
        if _sha256(path) != digest:
            raise OperationError(f"checkpoint {folder}: {name} is damaged (its SHA-256 differs from the manifest's)")
    return dict(manifest)


def newest_good(run_folder: Path) -> Path:
    """The newest checkpoint that is whole; damaged ones before it are passed over with a warning.

    Raises
    ------
    OperationError
        If the run has no checkpoint, or none that is whole.
    """
    candidates = folders(run_folder)
    if not candidates:
        raise OperationError(f"run {run_folder.name} has no checkpoint yet")
    newest = newest_good_until(run_folder, math.inf)
    if newest is not None:
        return newest
    raise OperationError(
        f"none of the {len(candidates)} checkpoints of run {run_folder.name} is whole; remove {candidates[0].parent} "
        "and train anew"
    )


def read_state(folder: Path) -> dict[str, Any]:
    """A checkpoint's state that is no tensor."""
    return dict(json.loads((folder / "state.json").read_text(encoding="utf-8")))


def load(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Fill tensors in place with a checkpoint's values; keys that aren't asked for are not read.

    Raises
    ------
    OperationError
        If a key is missing there or has another shape.
    """
    from torch.distributed.checkpoint import state_dict_loader
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    try:
        with _dcp():
            state_dict_loader.load(
                dict(tensors), storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=_single_process()
            )
    except (OSError, SafetensorError, RuntimeError, ValueError, AssertionError) as error:
        raise OperationError(f"checkpoint {folder} doesn't fit this run: {reason(error)}") from error


def load_weights(folder: Path, decoder: Decoder) -> None:
    """Fill a decoder with a checkpoint's weights.

    Raises
    ------
    OperationError
        If the checkpoint is of another network.
    """
    load(folder, {f"model.{name}": tensor for name, tensor in decoder.state_dict().items()})


def reason(error: BaseException) -> str:
    """What went wrong, in a few words: the system's own words where the system said no."""
    if isinstance(error, OSError) and error.errno is not None:
        return "the disk is full" if error.errno in {errno.ENOSPC, errno.EDQUOT} else os.strerror(error.errno)
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__


def _write_tensors(folder: Path, tensors: Mapping[str, torch.Tensor], group: ProcessGroup | None) -> None:
    from torch.distributed.checkpoint import state_dict_saver
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

    # The stages of a pipeline have different tensors; the first process says for all what goes into which file.
    parts = _on_all(lambda: {key: tensor.nbytes for key, tensor in tensors.items()}, group)
    sizes = {key: size for part in parts for key, size in part.items()}
    file_of, file, filled = {}, 1, 0
    for key, size in sizes.items():
        if filled and filled + size > _FILE_BYTES:
            file, filled = file + 1, 0
        filled += size
        file_of[key] = file
    writer = HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=file_of, save_distributed=True)
    with _dcp():
        state_dict_saver.save(dict(tensors), storage_writer=writer, process_group=group, no_dist=_single_process())


def _remove(folder: Path) -> None:
    # Renamed first, so that a crash in the middle doesn't leave half a checkpoint under a good name.
    doomed = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _begin(temporary: Path) -> None:
    temporary.parent.mkdir(parents=True, exist_ok=True)
    _clear_leftovers(temporary.parent)
    temporary.mkdir()


def _commit(
    temporary: Path, target: Path, step: int, state: Mapping[str, Any], files: Mapping[str, Mapping[str, Any]]
) -> None:
    """Write what is no tensor, and give the folder its name."""
    write_atomically(temporary / "state.json", json.dumps({**state, "step": step}, indent=1) + "\n")
    manifest = {"format": 1, "step": step, "files": {**files, **_describe(temporary, "state.json")}}
    write_atomically(temporary / "manifest.json", json.dumps(manifest, indent=1) + "\n")
    _flush_folder(temporary)
    if target.exists():  # A damaged one that a resume passed over and has now reached again.
        target.rename(target.with_name(f".{target.name}.old.tmp"))
    temporary.rename(target)
    _flush_folder(target.parent)
    _clear_leftovers(target.parent)


def _describe(folder: Path, pattern: str) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of each file whose name fits a pattern."""
    paths = sorted(folder.glob(pattern))
    return {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in paths}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _clear_leftovers(parent: Path) -> None:
    for leftover in parent.glob(".step-*.tmp"):
        shutil.rmtree(leftover)


def _flush_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _on_all(work: Callable[[], Result], group: ProcessGroup | None) -> list[Result]:
    """Do each process's part of something and return all parts; what the system refuses to one, it refuses to all."""
    if _single_process():
        return [work()]
    result, failure = None, None
    try:
        result = work()
    except OSError as error:
        failure = (error.errno or errno.EIO, str(error))
    parts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, (result, failure), group=group)
    for _, refused in parts:
        if refused is not None:
            raise OSError(*refused)
    return [part for part, _ in parts]


def _process() -> int:
    return 0 if _single_process() else torch.distributed.get_rank()


def _first_process() -> bool:
    return _process() == 0


def _single_process() -> bool:
    return not (torch.distributed.is_available() and torch.distributed.is_initialized())


@contextlib.contextmanager
def _dcp() -> Iterator[None]:
    """Around DCP's verbs: its failures as what caused them."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except CheckpointException as error:  # A BaseException that wraps even a KeyboardInterrupt.
        raise next(iter(error.failures.values()))[0] from None
