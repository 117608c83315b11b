"""What a run does about a loss that leaps, or is no number: stop, drop the update, or go back and pass over the data.

Three ideas. A spike is judged by the run itself: a loss further above the median of the last ones than so many standard
deviations, reckoned from their median absolute deviation, which a spike in the window hardly moves (Leys et al. 2013).
Which data comes next is a number of its own beside the step, so that data can be passed over: a rollback goes on
behind the batch that it fled from. All of it is in the checkpoint, and a judgement follows from that and the loss
alone, so that a resumed run decides as the uninterrupted one did, and every process as the others.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass
from typing import Any

from modelworks.spec.errors import OperationError
from modelworks.spec.run import GuardSpec

_DEVIATION = 1.4826
"""A normal distribution's standard deviation over its median absolute deviation."""
_LEAST = 16
"""Losses that must have been seen before one can be a spike."""
_LEAST_DEVIATION = 1e-3
"""The standard deviation that is reckoned with at least, as a share of the median: a flat curve isn't spiky."""


class Rollback(Exception):  # noqa: N818 - it is what follows, not what went wrong
    """The run is to go back to a checkpoint; the text says why."""


@dataclass(frozen=True)
class Passed:
    """Batches that the run passed over or whose update it dropped: those from `first` to `last`, counted from 0."""

    first: int
    last: int
    why: str


class Spikes:
    """The judge of a run's losses.

    Attributes
    ----------
    shift
        Batches passed over: a step's batch is its number plus this.
    passed
        Which these were, and those whose updates were dropped.
    """

    def __init__(self, spec: GuardSpec) -> None:
        self._spec = spec
        self._losses: deque[float] = deque(maxlen=spec.spike_window)
        self._at: list[int] = []
        """The batches of the spikes that were dealt with lately."""
        self.shift = 0
        self.passed: list[Passed] = []

    def batch(self, step: int) -> int:
        """The place in the data's order of the batch that follows `step` steps."""
        return step + self.shift

    def judge(self, step: int, loss: float, norm: float, advice: str) -> str | None:
        """Look at the loss and the gradient's norm of the step that follows `step` steps.

        Parameters
        ----------
        advice
            What else could be done where the run stops, for the error.

        Returns
        -------
        str or None
            Why the update is to be dropped; nothing if the step is in order.

        Raises
        ------
        OperationError
            If the run is to stop.
        Rollback
            If it is to go back.
        """
        odd = self._odd(loss, norm)
        if odd is None:
            self._losses.append(loss)
            return None
        words = f"{odd} at step {step + 1}"
        if self._spec.on_spike == "stop":
            raise OperationError(f"{words}; {advice}")
        batch = self.batch(step)
        self._at = [at for at in self._at if at > batch - self._spec.spike_window]
        if len(self._at) >= self._spec.spike_limit:
            raise OperationError(
                f"{words}, after {len(self._at)} others within {self._spec.spike_window} steps, which "
                f"guard.spike_limit = {self._spec.spike_limit} allows; {advice}"
            )
        self._at.append(batch)
        if self._spec.on_spike == "rollback":
            raise Rollback(words)
        self.passed.append(Passed(batch, batch, words))
        return f"{words}; the update was dropped"

    def rolled_back(self, before: Spikes, from_step: int, to_step: int, why: str) -> None:
        """Go on, in the state of a checkpoint, behind the batch from which the run fled.

        Parameters
        ----------
        before
            The judge as it was when the run fled.
        from_step, to_step
            Steps done then, and steps that the checkpoint holds.
        """
        last = before.batch(from_step)
        self.passed.append(Passed(self.batch(to_step), last, why))
        self.shift = last + 1 - to_step
        self._at = list(before._at)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON has it."""
        return {
            "losses": list(self._losses),
            "spikes": self._at,
            "shift": self.shift,
            "passed": [[part.first, part.last, part.why] for part in self.passed],
        }

    def load(self, state: dict[str, Any]) -> None:
        """Take up what a checkpoint kept."""
        self._losses.extend(state["losses"])
        self._at, self.shift = list(state["spikes"]), int(state["shift"])
        self.passed = [Passed(int(first), int(last), str(why)) for first, last, why in state["passed"]]

    def _odd(self, loss: float, norm: float) -> str | None:
        if not math.isfinite(loss) or not math.isfinite(norm):
            return f"the loss is {loss} and the gradient's norm {norm}"
        if not self._spec.spike_deviations or len(self._losses) < _LEAST:
            return None
        median = statistics.median(self._losses)
        spread = _DEVIATION * statistics.median(abs(value - median) for value in self._losses)
        deviations = (loss - median) / max(spread, _LEAST_DEVIATION * abs(median))
        if deviations <= self._spec.spike_deviations:
            return None
        return (
            f"the loss is {loss:.4g}, {deviations:.1f} deviations above the median {median:.4g} of the last "
            f"{len(self._losses)}"
        )
