"""What a run logs: one line of ``metrics.jsonl`` per logged step, and the same curves for TensorBoard.

A checkpoint remembers how long the file was. A resume cuts it back to that length, so that the file reads as if the
run had never been interrupted. Weights & Biases gets the curves too where ``WANDB_PROJECT`` is set.
"""

from __future__ import annotations

import json
import math
import os
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from modelworks.spec.errors import OperationError

_CURVES = {
    "loss": "train/loss",
    "cross_entropy": "train/cross_entropy",
    "load_balance_loss": "train/load_balance_loss",
    "router_z_loss": "train/router_z_loss",
    "learning_rate": "train/learning_rate",
    "grad_norm": "train/grad_norm",
    "chosen_reward": "train/chosen_reward",
    "rejected_reward": "train/rejected_reward",
    "reward_margin": "train/reward_margin",
    "preference_accuracy": "train/preference_accuracy",
    "sign_loss": "train/sign_loss",
    "reward": "train/reward",
    "reward_answer": "train/reward_answer",
    "reward_format": "train/reward_format",
    "reward_tests": "train/reward_tests",
    "groups_without_signal": "train/groups_without_signal",
    "reply_tokens": "train/reply_tokens",
    "cut_replies": "train/cut_replies",
    "clip_share": "train/clip_share",
    "kl": "train/kl",
    "drawn_difference": "train/drawn_difference",
    "validation_reward": "validation/reward",
    "validation_reward_answer": "validation/reward_answer",
    "validation_bpb": "validation/bits_per_byte",
    "validation_loss": "validation/loss",
    "validation_sign_loss": "validation/sign_loss",
    "validation_sign_accuracy": "validation/sign_accuracy",
    "validation_chosen_reward": "validation/chosen_reward",
    "validation_rejected_reward": "validation/rejected_reward",
    "validation_reward_margin": "validation/reward_margin",
    "validation_preference_accuracy": "validation/preference_accuracy",
    "tokens_per_s": "speed/tokens_per_s",
    "step_time_s": "speed/step_time_s",
    "mfu": "speed/mfu",
}


class MetricsLog:
    """Appends to a run's metrics.

    Parameters
    ----------
    folder
        The run's folder.
    position
        Bytes of ``metrics.jsonl`` to keep: what a checkpoint remembers, 0 for a new run.
    step
        The step that logging goes on from.
    """

    def __init__(self, folder: Path, position: int = 0, step: int = 0) -> None:
        self._file = (folder / "metrics.jsonl").open("ab")
        self._file.truncate(position)
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1, flush_secs=10)
        self._wandb = _wandb_run(folder)

    def write(self, row: dict[str, Any]) -> None:
        """Log one step; the line is whole in the file when this returns.

        Raises
        ------
        OperationError
            If it can't be written, such as on a full disk.
        """
        try:
            self._file.write((json.dumps(_as_json(row), allow_nan=False) + "\n").encode())
            self._file.flush()
            for key, curve in _CURVES.items():
                if row.get(key) is not None:
                    self._board.add_scalar(curve, row[key], row["step"])
            for reason, seconds in row.get("reasons", {}).items():
                self._board.add_scalar(f"step/{reason}_s", seconds, row["step"])
            for layer, load in enumerate(row["expert_load"]):
                self._board.add_scalar(f"experts/load_of_layer_{layer}", load, row["step"])
        except OSError as error:
            raise OperationError(f"{self._file.name} cannot be written: {error.strerror}") from error
        if self._wandb is not None:
            self._wandb.log({curve: row[key] for key, curve in _CURVES.items() if key in row}, step=row["step"])

    def position(self) -> int:
        """The file's length in bytes."""
        return os.fstat(self._file.fileno()).st_size

    def flush_to_disk(self) -> None:
        """Wait until all that is written is on the disk."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise OperationError(f"{self._file.name} cannot be written: {error.strerror}") from error

    def close(self) -> None:
        """Close the files."""
        self._board.close()
        self._file.close()
        if self._wandb is not None:
            self._wandb.finish()


class NoMetrics:
    """Logs nothing: for the processes of a run that aren't its first."""

    def write(self, row: dict[str, Any]) -> None:
        """Nothing."""

    def position(self) -> int:
        """No byte."""
        return 0

    def flush_to_disk(self) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def _as_json(value: Any) -> Any:
    """The same with null for what is no number, which JSON doesn't have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _as_json(part) for key, part in value.items()}
    return [_as_json(part) for part in value] if isinstance(value, list) else value


def _wandb_run(folder: Path) -> Any:
    """A run at Weights & Biases, if the user has asked for one and has it installed."""
    if not os.environ.get("WANDB_PROJECT") or find_spec("wandb") is None:
        return None
    wandb = import_module("wandb")
    return wandb.init(project=os.environ["WANDB_PROJECT"], name=folder.name, id=folder.name, resume="allow")
