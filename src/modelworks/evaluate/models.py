"""A model to be evaluated: its network, and the tokens of a text."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from modelworks.evaluate.haystack import Encode
from modelworks.model.decoder import Decoder
from modelworks.model.loss import head_logits
from modelworks.release.huggingface import load_pretrained
from modelworks.release.runs import load_run_content
from modelworks.spec.errors import InputError
from modelworks.spec.fields import validate
from modelworks.spec.files import apply_overrides
from modelworks.spec.home import runs_folder
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
    """

    name: str
    decoder: Decoder
    encode: Encode
    version: str

    @property
    def context(self) -> int:
        """The longest sequence that it takes, in tokens."""
        return self.decoder.spec.context

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
    """Load a run's newest checkpoint, or a Hugging Face folder such as a release.

    Parameters
    ----------
    name
        A run's name, its folder, or a Hugging Face folder.
    overrides
        ``"model.context=16384"``: fields of the network (`MAY_CHANGE`) that are tried otherwise than it was trained.

    Raises
    ------
    InputError
        If there is no such model, or a field may not be changed.
    OperationError
        If a run has no checkpoint that is whole.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir() and folder.name == name:
        folder = runs_folder() / name
    if not folder.is_dir():
        raise InputError(f"there is no model {name!r}: a run's name, its folder or a Hugging Face folder is accepted")
    if (folder / "run.toml").is_file():
        content = load_run_content(folder)
        decoder, tokenizer, version = content.decoder, content.tokenizer, content.checkpoint.name
    else:
        tokenizer = folder / "tokenizer.json"
        if not tokenizer.is_file():
            raise InputError(f"{folder}: has no tokenizer.json, and a text takes one")
        decoder = load_pretrained(folder)
        version = str(max(int(path.stat().st_mtime) for path in folder.iterdir()))
    decoder.spec = changed(decoder.spec, overrides)
    return Model(name, decoder.eval(), _encoder(tokenizer), version)


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
