"""The weights that a run begins with (`train.init_from`), brought from where they are into the run's own folder.

What they are brought from is a Hugging Face folder, such as `import` writes, or a run with its newest good checkpoint.
The run then depends on nothing outside of its folder, on however many processes it is trained, and what trains it needs
to know no format but our own.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from modelworks.model import checkpoint
from modelworks.model.initial import FOLDER, INDEX, TOKENIZER, refuse_other
from modelworks.model.vision import network_of
from modelworks.release.huggingface import SHARD_BYTES, Progress
from modelworks.release.runs import load_run_content
from modelworks.release.staging import staged_folder
from modelworks.release.weights_folder import WeightsFolder
from modelworks.spec.errors import InputError, OperationError
from modelworks.spec.files import load_run
from modelworks.spec.home import runs_folder
from modelworks.spec.run import RunSpec

_TEMPLATES = ("tokenizer_config.json", "chat_template.jinja")
"""What says how the model reads dialogues."""


def refuse_beginning(spec: RunSpec) -> None:
    """Refuse weights that a run can't begin with, before anything is prepared; nothing for a run from noise."""
    if spec.train.init_from is not None:
        _Source(spec)


def bring_weights(spec: RunSpec, run_folder: Path, progress: Progress | None = None) -> None:
    """Write a run's folder ``initial`` from `train.init_from`; one that is there already, from the same, is kept.

    Raises
    ------
    InputError
        If there are no such weights, or they are another network's or go with another tokenizer.
    OperationError
        If they can't be written, such as on a full disk.
    """
    if spec.train.init_from is None:
        return
    source, target = _Source(spec), run_folder / FOLDER
    if _key_in(target) == source.key:
        return
    with staged_folder(target, replace=True) as temporary:
        weights: dict[str, str] = {}
        held: dict[str, Tensor] = {}
        shapes = source.shapes()
        for done, (name, shape) in enumerate(shapes.items()):
            if progress is not None:
                progress("bringing the weights to begin with", done, len(shapes))
            if held and sum(tensor.nbytes for tensor in held.values()) + 4 * math.prod(shape) > SHARD_BYTES:
                _write(temporary, weights, held)
            held[name] = source.read(name, shape)
        _write(temporary, weights, held)
        for beside in (TOKENIZER, *_TEMPLATES):
            if (source.path / beside).is_file():
                shutil.copyfile(source.path / beside, temporary / beside)
        index = {"key": source.key, "source": str(source.path), "weights": weights}
        (temporary / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


class _Source:
    """Where weights come from: what they are, and the weights one by one."""

    def __init__(self, spec: RunSpec) -> None:
        given = spec.train.init_from
        assert given is not None
        self.path = Path(given).expanduser() if "/" in given else runs_folder() / given
        if not self.path.is_dir():
            raise InputError(
                f"train.init_from = {given!r} is not accepted: there is no folder {self.path}; a Hugging Face folder "
                "(for a GGUF file, that of `modelworks import gguf`) or a run's name is"
            )
        self._run = (self.path / "run.toml").is_file()
        self._folder = None if self._run else WeightsFolder(self.path)
        self._merged: dict[str, Tensor] | None = None
        if self._run:
            newest = checkpoint.newest_good(self.path)
            run = load_run(self.path / "run.toml")
            self.spec, identity = run.model, [[newest.name, newest.stat().st_mtime_ns]]
            self._checkpoint, self._adapts = newest, run.adapter is not None
        else:
            assert self._folder is not None
            self.spec, identity = self._folder.spec, [list(entry) for entry in self._folder.identity()]
        self.key: list[Any] = [str(self.path), identity]
        refuse_other(spec.model, self.spec, str(self.path))
        self._refuse_other_tokenizer(spec)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The weights' names and shapes."""
        with torch.device("meta"):
            decoder = network_of(self.spec)
        return {name: tuple(parameter.shape) for name, parameter in decoder.named_parameters()}

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """One of the weights, in fp32."""
        if self._folder is None and self._adapts:
            self._merged = self._merged or dict(load_run_content(self.path).decoder.named_parameters())
            return self._merged[name].detach()
        if self._folder is None:
            found = {f"model.{name}": torch.empty(shape)}
            checkpoint.load(self._checkpoint, found)
            return found[f"model.{name}"]
        if len(shape) < 3:
            return self._folder.tensor(name, None, shape)
        return torch.stack([self._folder.tensor(name, expert, shape[1:]) for expert in range(shape[0])])

    def _refuse_other_tokenizer(self, spec: RunSpec) -> None:
        theirs = self.path / TOKENIZER
        if spec.data.tokenizer == "bpe":
            if not theirs.is_file():
                raise InputError(
                    f"data.tokenizer = 'bpe' is not accepted with train.init_from, since {theirs} is missing: the "
                    "tokenizer.json that the weights were trained with is"
                )
            _pieces(theirs)
            return
        if theirs.is_file() and _pieces(theirs) != _pieces(Path(spec.data.tokenizer).expanduser()):
            raise InputError(
                f"data.tokenizer = {spec.data.tokenizer!r} is not accepted with train.init_from: it has other pieces "
                f"than the weights' own, {theirs}"
            )


def _pieces(path: Path) -> dict[str, int]:
    try:
        return dict(Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True))
    except Exception as error:  # noqa: BLE001 (the library raises nothing more precise)
        raise InputError(f"{path}: cannot be read as a tokenizer.json: {error}") from None


def _key_in(folder: Path) -> Any:
    try:
        return json.loads((folder / INDEX).read_text(encoding="utf-8"))["key"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(folder: Path, weights: dict[str, str], held: dict[str, Tensor]) -> None:
    file = f"weights-{len(set(weights.values())) + 1:05d}.safetensors"
    try:
        save_file(held, folder / file)
    except SafetensorError as error:
        raise OperationError(f"{folder / file} cannot be written: {error}") from error
    weights |= dict.fromkeys(held, file)
    held.clear()
