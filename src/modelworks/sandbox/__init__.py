"""Runs Python code that nobody has vouched for: a model's, for its user or for the reward of a training step.

The code sees an interpreter, its standard library, and one folder of its own in memory; no network, no other process,
no file of this machine's users, no environment. `run` limits what it takes and ends everything that it has started.
Where the kernel doesn't allow such a sandbox, code is not run at all: there is no weaker one.
"""

from modelworks.sandbox.execution import Ended, Limits, Result, run, unavailable

__all__ = ["Ended", "Limits", "Result", "run", "unavailable"]
