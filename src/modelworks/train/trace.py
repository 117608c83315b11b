"""Chrome traces of a run's steps, one file for each process and step, for chrome://tracing or ui.perfetto.dev."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch

from modelworks.spec.errors import OperationError


class Traces:
    """Records the second and the next steps after a start, so many; the first one also warms up.

    Parameters
    ----------
    folder
        The run's.
    count
        How many steps.
    rank
        This process's number.
    """

    def __init__(self, folder: Path, count: int, rank: int) -> None:
        self._folder, self._count, self._rank, self._seen = folder / "traces", count, rank, 0

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around a step.

        Raises
        ------
        OperationError
            If its trace can't be written.
        """
        self._seen += 1
        if not 2 <= self._seen <= 1 + self._count:
            yield
            return
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        with torch.profiler.profile(activities=activities) as profile:
            yield
        path = self._folder / f"step-{number:08d}-rank-{self._rank}.json.gz"
        try:
            self._folder.mkdir(exist_ok=True)
            unfinished = path.with_name(f".{path.name}")
            profile.export_chrome_trace(str(unfinished))
            unfinished.rename(path)
        except OSError as error:
            raise OperationError(f"{path} cannot be written: {error.strerror}") from error
