"""The error of a run that has lost what it works on, and so may succeed on other nodes."""

from __future__ import annotations

from modelworks.spec.errors import OperationError


class LostError(OperationError):
    """Processes or nodes were lost, and more attempts here brought nothing; on other nodes they may."""
