"""Checkpoints written behind the training: the loop waits for a copy in memory, a thread does the rest.

Three ideas. What a checkpoint holds is copied into buffers that are kept from save to save, so that a copy costs no
more than the memory's bandwidth and the next steps can change the weights at once. The thread hashes, writes, commits
and rotates in a group of processes of its own, so that its agreements with the other processes' threads never wait
behind a gradient. One checkpoint is in the air at most: the next one waits for it, as does whatever ends the run, and a
failure (a full disk) reaches the loop at its next step or wait, whichever comes first.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from modelworks.model import checkpoint
from modelworks.spec.errors import OperationError
from modelworks.train.ranks import Ranks

logger = logging.getLogger(__name__)
_CLOSING_S = 10.0
"""How long the end of a run that failed waits for a checkpoint in the air."""
Tensors = Mapping[str, Tensor]


class Saving:
    """Saves a run's checkpoints, together with the run's other processes.

    Parameters
    ----------
    folder
        The run's folder.
    keep
        How many checkpoints are kept.
    ranks
        The processes of the run. All construct, save and finish in the same order.
    asynchronous
        Whether `save` returns before the checkpoint is on the disk.
    """

    def __init__(self, folder: Path, keep: int, ranks: Ranks, asynchronous: bool) -> None:
        self._folder, self._keep, self._ranks, self._asynchronous = folder, keep, ranks, asynchronous
        self._group = dist.new_group(backend="gloo") if ranks.world > 1 else None
        self._staging: _Staging | None = None
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def save(
        self,
        step: int,
        parts: Tensors,
        whole: Callable[[], Tensors],
        state: Mapping[str, Any],
        flush: Callable[[], None],
    ) -> Path:
        """Begin to save; where saving isn't asynchronous, do it.

        Parameters
        ----------
        step
            Optimizer steps done.
        parts
            What this process holds of every tensor, by key. It may change as soon as this returns.
        whole
            Gives the same as the whole tensors that they are parts of; called where that isn't known from before.
        state
            What is no tensor.
        flush
            Called before the checkpoint is committed: puts on the disk what the state refers to.

        Returns
        -------
        Path
            The folder that the checkpoint will have.

        Raises
        ------
        OperationError
            If this one or the one before can't be written.
        """
        self.finish()
        frozen = dict(state)
        if not self._asynchronous:
            staged = dict(whole())
        else:
            if self._staging is None or self._staging.keys != parts.keys():
                self._staging = _Staging(whole())
            staged = self._staging.copy(parts)

        def write() -> None:
            try:
                flush()
                checkpoint.save(self._folder, step, staged, frozen, self._group)
                if self._ranks.first:
                    checkpoint.rotate(self._folder, self._keep)
            except BaseException as error:  # noqa: BLE001 - it belongs to the loop
                self._failure = error

        self._thread = threading.Thread(target=write, name="saving", daemon=True)
        self._thread.start()
        if not self._asynchronous:
            self.finish()
        return checkpoint.folder_of(self._folder, step)

    def look(self) -> None:
        """Raise what made the checkpoint in the air fail, if it has; doesn't wait."""
        if self._thread is not None and not self._thread.is_alive():
            self.finish()

    def finish(self) -> None:
        """Wait for the checkpoint in the air.

        Raises
        ------
        OperationError
            If it can't be written.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def settle(self) -> None:
        """Of a run whose peers are gone: raise what made the checkpoint in the air fail, if that is why they went.

        Raises
        ------
        OperationError
            If it can't be written.
        """
        self._join()
        if isinstance(self._failure, OperationError):
            self.finish()

    def close(self) -> None:
        """Let go of a run that may have failed: its last checkpoint is given some time, its failure only logged."""
        self._join()
        if self._failure is not None:
            logger.warning("%s", self._failure)

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join(_CLOSING_S)


class _Staging:
    """Buffers for what this process holds of a checkpoint's tensors."""

    def __init__(self, whole: Tensors) -> None:
        self._parts: dict[str, Tensor] = {}
        self._whole: dict[str, Tensor] = {}
        for key, tensor in whole.items():
            part = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            self._parts[key] = buffer = torch.empty_like(
                part.detach(), device="cpu", memory_format=torch.contiguous_format
            )
            if isinstance(tensor, DTensor):
                self._whole[key] = DTensor.from_local(
                    buffer,
                    tensor.device_mesh,
                    tensor.placements,
                    run_check=False,
                    shape=tensor.shape,
                    stride=tensor.stride(),
                )
            else:
                self._whole[key] = buffer

    @property
    def keys(self) -> Any:
        """The tensors' keys."""
        return self._parts.keys()

    @torch.no_grad()
    def copy(self, parts: Tensors) -> dict[str, Tensor]:
        """Take the tensors over; returns them as the wholes that they are parts of."""
        torch._foreach_copy_(list(self._parts.values()), [parts[key] for key in self._parts])
        return dict(self._whole)
