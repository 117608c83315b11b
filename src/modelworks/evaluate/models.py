"""A model to be evaluated: its network, and the tokens of a text."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from modelworks.evaluate.haystack import Encode
from modelworks.model.decoder import Decoder
from modelworks.model.loss import head_logits
from modelworks.release.evaluations import digest_of
from modelworks.release.gguf_import import import_gguf
from modelworks.release.huggingface import load_pretrained
from modelworks.release.runs import load_run_content
from modelworks.spec.errors import InputError
from modelworks.spec.fields import validate
from modelworks.spec.files import apply_overrides
from modelworks.spec.home import models_folder, runs_folder
from modelworks.spec.model import ModelSpec

ROWS = 512
"""Positions whose logits stand in memory together."""
MAY_CHANGE = ("context", "rope_base", "rope_scaling")
"""The fields under which a network can be evaluated otherwise than it was trained."""


@dataclass(frozen=True)
class Model:
    """A network with its tokenizer.

    Attributes
    ----------
    name
        As it was given.
    decoder
        The network in fp32.
    encode
        The token ids of a text, without special tokens.
    version
        What tells it from another state of itself, such as a later checkpoint.
    tokenizer
        Its ``tokenizer.json``.
    weights
        The files that hold it.
    unpacked
        Keeps what was made of a GGUF file for as long as it is needed.
    """

    name: str
    decoder: Decoder
    encode: Encode
    version: str
    tokenizer: Path
    weights: tuple[Path, ...]
    unpacked: TemporaryDirectory[str] | None = None

    @property
    def context(self) -> int:
        """The longest sequence that it takes, in tokens."""
        return self.decoder.spec.context

    @property
    def digest(self) -> str:
        """SHA-256 of its files' own SHA-256, in the order of their names."""
        return digest_of(self.weights)

    @torch.inference_mode()
    def states(self, ids: list[int]) -> Tensor:
        """The normalised states (T, H) of a sequence."""
        hidden, _ = self.decoder.hidden_states(torch.tensor([ids]))
        return hidden[0]

    @torch.inference_mode()
    def logits(self, states: Tensor) -> Tensor:
        """Logits (N, V) of some states (N, H)."""
        spec = self.decoder.spec
        return head_logits(states, self.decoder.output_weight, spec.output_multiplier, spec.output_softcap)

    @torch.inference_mode()
    def nats(self, ids: list[int]) -> Tensor:
        """The cross-entropy (T - 1) of each token but the first, in nats."""
        states, targets = self.states(ids[:-1]), torch.tensor(ids[1:])
        parts = [
            torch.nn.functional.cross_entropy(
                self.logits(states[start : start + ROWS]), targets[start : start + ROWS], reduction="none"
            )
            for start in range(0, len(targets), ROWS)
        ]
        return torch.cat(parts)


def load_model(name: str, overrides: Iterable[str] = ()) -> Model:
    """Load a run's newest checkpoint, a Hugging Face folder such as a release, or a GGUF file, dequantised.

    Parameters
    ----------
    name
        A run's name, its folder, a Hugging Face folder, a GGUF file, or a stored model's name.
    overrides
        ``"model.context=16384"``: fields of the network (`MAY_CHANGE`) that are tried otherwise than it was trained.

    Raises
    ------
    InputError
        If there is no such model, or a field may not be changed.
    OperationError
        If a run has no checkpoint that is whole.
    """
    folder = found_model(name)
    unpacked, gguf = None, folder if folder.is_file() else None
    if gguf is not None:
        unpacked = TemporaryDirectory(prefix="modelworks-eval-")
        import_gguf(gguf, Path(unpacked.name) / "model")
        folder = Path(unpacked.name) / "model"
    if (folder / "run.toml").is_file():
        content = load_run_content(folder)
        decoder, tokenizer, version = content.decoder, content.tokenizer, content.checkpoint.name
        weights = [path for path in sorted(content.checkpoint.rglob("*")) if path.is_file()]
    else:
        tokenizer = folder / "tokenizer.json"
        if not tokenizer.is_file():
            raise InputError(f"{folder}: has no tokenizer.json, and a text takes one")
        decoder = load_pretrained(folder)
        weights = sorted(folder.glob("*.safetensors")) if gguf is None else [gguf]
        files = [path for path in folder.iterdir() if path.is_file()] if gguf is None else weights
        version = str(max(int(path.stat().st_mtime) for path in files))
    decoder.spec = changed(decoder.spec, overrides)
    return Model(name, decoder.eval(), _encoder(tokenizer), version, tokenizer, tuple(weights), unpacked)


def found_model(name: str) -> Path:
    """The folder or the GGUF file of a model: given as such, a run's or a stored model's by its name.

    Raises
    ------
    InputError
        If there is no such model.
    """
    given = Path(name).expanduser()
    stored = models_folder() / name / f"{name}.gguf"
    if given.is_dir() or (given.is_file() and given.suffix == ".gguf"):
        return given
    if given.name == name and (runs_folder() / name).is_dir():
        return runs_folder() / name
    if given.name == name and stored.is_file():
        return stored
    raise InputError(
        f"there is no model {name!r}: a run's name, its folder, a Hugging Face folder, a GGUF file or a stored model's "
        "name is accepted"
    )


def changed(spec: ModelSpec, overrides: Iterable[str]) -> ModelSpec:
    """A network's spec with ``model.FIELD=VALUE`` set in it."""
    overrides = list(overrides)
    for override in overrides:
        field = override.partition("=")[0].strip().removeprefix("model.")
        if field.partition(".")[0] not in MAY_CHANGE:
            accepted = ", ".join(f"model.{name}" for name in MAY_CHANGE)
            raise InputError(f"--set {override} is not accepted: of a trained network, {accepted} can be changed")
    values = apply_overrides({"model": spec.model_dump(exclude_none=True)}, overrides)
    return validate(ModelSpec, values["model"], where="--set")


def _encoder(file: Path) -> Encode:
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # noqa: BLE001 - the library raises plain exceptions for whatever is wrong
        raise InputError(f"{file}: is no tokenizer.json that can be read: {error}") from None
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False).ids)

    return encode
