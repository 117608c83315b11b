"""What a step's time goes to on one process: computing, exchanging with others, waiting for them.

Three ideas. While a logged step runs, the collectives of `torch.distributed` are put between two looks at the clock,
whoever calls them: our own exchanges, FSDP's, a pipeline's sends. Who calls says what for, in the planner's words
(`tensor`, `context`, `expert`, `data` for replicas, `bubble` for what stages wait for each other). And processes that
exchange leave together: of one exchange the last to come waits for nobody, so the shortest time among them is the
exchange itself and what the others take longer is waiting (`jitter`). On a processor the host computes, so all of that
is exposed: nothing hides behind it. The reasons add up to the step.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from modelworks.train.ranks import Ranks

MEASURED = ("compute", "tensor", "context", "expert", "data", "bubble", "optimizer", "host", "jitter")
"""What a step's time is measured to go to. `compute` is forward and backward passes, `host` the loading of data and
what is done once a step."""
_COLLECTIVES = (
    "all_reduce", "all_gather_single", "all_gather_into_tensor", "all_gather", "reduce_scatter_single",
    "reduce_scatter_tensor", "all_to_all_single", "broadcast", "barrier",
)  # fmt: skip
_SENDS = ("send", "recv", "batch_isend_irecv")


class Waits:
    """Measures steps.

    Parameters
    ----------
    ranks
        The processes.
    groups
        What the network's own exchanges are for, by the names of their groups.
    """

    def __init__(self, ranks: Ranks, groups: Mapping[str, str]) -> None:
        self._ranks, self._groups = ranks, dict(groups)
        self._thread = threading.get_ident()
        self._begin()

    def _begin(self) -> None:
        self._times = dict.fromkeys(MEASURED, 0.0)
        self._shared: dict[tuple[str, str], list[float]] = {}
        self._group_of: dict[str, dist.ProcessGroup] = {}
        self._exchanged, self._inside = 0.0, False
        self._mark = time.perf_counter()

    @contextlib.contextmanager
    def measured(self, wanted: bool) -> Iterator[None]:
        """Around a step: look at the clock at each of its exchanges, if `wanted`."""
        self._begin()
        if not wanted or self._ranks.world == 1:
            yield
            return
        kept = {name: getattr(dist, name) for name in (*_COLLECTIVES, *_SENDS) if hasattr(dist, name)}
        try:
            for name, function in kept.items():
                setattr(dist, name, self._timed(name, function))
            yield
        finally:
            for name, function in kept.items():
                setattr(dist, name, function)

    def lap(self, reason: str) -> None:
        """What went by since the last lap, but for exchanges, was for `reason`."""
        now = time.perf_counter()
        self._times[reason] += now - self._mark - self._exchanged
        self._mark, self._exchanged = now, 0.0

    def reasons(self, step_time_s: float) -> dict[str, float]:
        """Seconds of the step by reason, the mean over all processes; they add up to `step_time_s`.

        Every process must call it, after the step.
        """
        times = dict(self._times)
        for (reason, group), each in self._shared.items():
            mine = torch.tensor(each, dtype=torch.float64)
            shortest = mine.clone()
            dist.all_reduce(shortest, dist.ReduceOp.MIN, group=self._group_of[group])
            times[reason] += float(shortest.sum())
            times["jitter"] += float((mine - shortest).sum())
        times["host"] += step_time_s - sum(times.values())
        total: Tensor = self._ranks.sum(torch.tensor([times[reason] for reason in MEASURED], dtype=torch.float64))
        mean = total / self._ranks.world
        return dict(zip(MEASURED, mean.tolist(), strict=True))

    def _timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def timed(*arguments: Any, **named: Any) -> Any:
            if self._inside or threading.get_ident() != self._thread:
                return function(*arguments, **named)
            reason, group = self._purpose(name, sys._getframe(1).f_globals.get("__name__", ""), named.get("group"))
            with self._clocked(reason, group):
                result = function(*arguments, **named)
            if isinstance(result, list):
                return [_Pending(work, lambda: self._clocked(reason, group)) for work in result]
            if isinstance(result, dist.Work):
                return _Pending(result, lambda: self._clocked(reason, group))
            return result

        return timed

    @contextlib.contextmanager
    def _clocked(self, reason: str, group: dist.ProcessGroup | None) -> Iterator[None]:
        begun, self._inside = time.perf_counter(), True
        try:
            yield
        finally:
            taken, self._inside = time.perf_counter() - begun, False
            self._exchanged += taken
            if group is None:
                self._times[reason] += taken
            else:
                self._group_of[group.group_name] = group
                self._shared.setdefault((reason, group.group_name), []).append(taken)

    def _purpose(self, name: str, caller: str, group: dist.ProcessGroup | None) -> tuple[str, dist.ProcessGroup | None]:
        """What an exchange is for, and the group whose processes begin and end it together."""
        if name in _SENDS or caller.startswith("torch.distributed.pipelining"):
            return "bubble", None
        if group is None:
            # What all processes agree on: nothing is computed from it, and all wait for the last.
            return "jitter", None
        if group.size() == 1:
            return "host", None
        if name == "all_to_all_single":
            return "expert", group
        if caller.startswith("modelworks.train."):
            return self._groups.get(group.group_name, "data"), group
        return "data", group


class _Pending:
    """Work under way, whose waiting is looked at as well."""

    def __init__(self, work: Any, clocked: Callable[[], contextlib.AbstractContextManager[None]]) -> None:
        self._work, self._clocked = work, clocked

    def wait(self, *arguments: Any) -> Any:
        """Wait for it."""
        with self._clocked():
            return self._work.wait(*arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)
