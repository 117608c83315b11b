"""How a run ended, for whoever asked for it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from modelworks.model import checkpoint


@dataclass(frozen=True)
class TrainResult:
    """How a run ended: `finished`, or `stopped` by the signal `received`."""

    state: str
    received: int | None
    step: int
    tokens: int
    loss: float | None
    validation_bpb: float | None
    elapsed_s: float
    checkpoint: Path

    @classmethod
    def of_checkpoint(cls, folder: Path, state: str, received: int | None) -> TrainResult:
        """How a run ended whose last checkpoint stands in `folder`."""
        saved = checkpoint.read_state(folder)
        facts = {key: saved[key] for key in ("step", "tokens", "loss", "validation_bpb", "elapsed_s")}
        return cls(state=state, received=received if state == "stopped" else None, checkpoint=folder, **facts)

    def as_dict(self) -> dict[str, Any]:
        """The same as plain values, for JSON."""
        return asdict(self) | {"checkpoint": str(self.checkpoint)}
