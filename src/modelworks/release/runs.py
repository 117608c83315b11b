"""What a release reads of a run: its spec, its tokenizer, its newest good checkpoint and what it logged."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from modelworks.model import adapters, checkpoint
from modelworks.model.decoder import Decoder
from modelworks.model.initial import FOLDER, InitialWeights
from modelworks.model.vision import network_of
from modelworks.spec.errors import InputError
from modelworks.spec.files import load_run
from modelworks.spec.run import RunSpec


@dataclass(frozen=True)
class RunContent:
    """A run as its release needs it."""

    folder: Path
    spec: RunSpec
    decoder: Decoder
    checkpoint: Path
    adapter: dict[str, torch.Tensor] = field(default_factory=dict)
    """By our names; `decoder` has it merged already."""
    status: dict[str, Any] = field(default_factory=dict)
    plan: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    data_manifest: dict[str, Any] = field(default_factory=dict)

    @property
    def chat_template(self) -> str | None:
        """How the dialogues were written out that it was trained on."""
        file = self.folder / "chat_template.jinja"
        return file.read_text(encoding="utf-8") if file.is_file() else None

    @property
    def tokenizer(self) -> Path:
        """The tokenizer's file."""
        return self.folder / "tokenizer.json"


def load_run_content(folder: Path) -> RunContent:
    """Read a run's folder with the weights of its newest good checkpoint, in fp32.

    Raises
    ------
    InputError
        If it isn't a run's folder, or lacks its tokenizer.
    OperationError
        If there is no good checkpoint.
    """
    if not (folder / "run.toml").is_file():
        raise InputError(f"{folder}: is not a run: it has no run.toml")
    if not (folder / "tokenizer.json").is_file():
        raise InputError(f"{folder}: the run has no tokenizer.json; it has not begun to train")
    spec = load_run(folder / "run.toml")
    newest = checkpoint.newest_good(folder)
    with torch.device("meta"):
        decoder = network_of(spec.model)
        if spec.adapter is not None:
            adapters.adapt(decoder, spec.adapter)
    decoder = decoder.to_empty(device="cpu").requires_grad_(False)
    adapter: dict[str, torch.Tensor] = {}
    if spec.adapter is None:
        checkpoint.load_weights(newest, decoder)
    else:
        adapter = _load_adapter(folder, newest, decoder)
        adapters.merge(decoder)
    return RunContent(
        folder,
        spec,
        decoder,
        newest,
        adapter=adapter,
        status=_table(folder / "status.json"),
        plan=_table(folder / "plan.json"),
        metrics=_rows(folder / "metrics.jsonl"),
        data_manifest=_table(folder / "data.json"),
    )


def _load_adapter(folder: Path, newest: Path, decoder: Decoder) -> dict[str, torch.Tensor]:
    """Fill an adapted network with the weights that the run began with and what it trained; returns the latter."""
    initial = InitialWeights(folder / FOLDER)
    trained: dict[str, torch.Tensor] = {}
    for name, parameter in decoder.named_parameters():
        if adapters.is_of_adapter(name):
            trained[name] = parameter.detach()
        else:
            initial.fill(parameter.detach(), name)
    checkpoint.load(newest, {f"model.{name}": tensor for name, tensor in trained.items()})
    return trained


def _table(path: Path) -> dict[str, Any]:
    """What a run may or may not have left; a file that can't be read counts as absent."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return []
    rows = []
    for line in lines:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue  # The last line of a run that was killed while it wrote.
    return [row for row in rows if isinstance(row, dict)]
