"""What came of the replicas of a scenario: the same arrays from either engine.

Every second of every replica is booked once: as useful, or as lost to one reason (`REASONS`) and, where a failure was
the reason, to one cause. The books are balanced by construction, and a test holds them to it.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
REASONS = (
    "checkpoints",
    "lost work",
    "detection",
    "waiting",
    "restart",
    "fewer nodes",
    "stragglers",
    "health checks",
    "maintenance",
)
"""Where the time goes that isn't useful. `waiting` is for nodes, people and outages; `maintenance` all that is planned;
`fewer nodes` what a machine lacks that is shrunk or still being built, as long as it runs."""
CHECKPOINTS, LOST_WORK, DETECTION, WAITING, RESTART, FEWER, STRAGGLERS, CHECKS, MAINTENANCE = range(len(REASONS))


@dataclass(frozen=True)
class Outcome:
    """Arrays over replicas (R), causes (C) and reasons; times in seconds."""

    elapsed_s: Floats
    """(R,) Until the tokens were done or the horizon."""
    there_s: Floats
    """(R,) The same, but time counts only for as much of the machine as was built and had power."""
    useful_s: Floats
    """(R,) Work that counts, in seconds of the finished machine at full speed."""
    finished: npt.NDArray[np.bool_]
    """(R,)"""
    interruptions: npt.NDArray[np.int64]
    """(R, C) Unexpected ones."""
    drains: npt.NDArray[np.int64]
    """(R, C) Nodes that were taken out before they failed: stragglers, and what health checks found."""
    planned: npt.NDArray[np.int64]
    """(R,) Maintenance and changes of size."""
    reasons_s: Floats
    """(R, reasons) Lost time by reason."""
    causes_s: Floats
    """(R, C) Lost time by cause, of what a failure was the reason of."""
    nodes_out: npt.NDArray[np.int64]
    """How often so many nodes were out of service right after a loss: a histogram over all replicas."""

    @property
    def ettr(self) -> Floats:
        """(R,) Useful over elapsed time, of what was there of the machine."""
        return self.useful_s / self.there_s


def together(outcomes: list[Outcome]) -> Outcome:
    """Several batches of replicas as one."""
    if len(outcomes) == 1:
        return outcomes[0]
    joined: dict[str, Any] = {}
    for field in fields(Outcome):
        parts = [getattr(outcome, field.name) for outcome in outcomes]
        joined[field.name] = np.concatenate(parts)
    size = max(len(outcome.nodes_out) for outcome in outcomes)
    histogram = np.zeros(size, np.int64)
    for outcome in outcomes:
        histogram[: len(outcome.nodes_out)] += outcome.nodes_out
    return Outcome(**(joined | {"nodes_out": histogram}))
