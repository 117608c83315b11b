"""The engines by name."""

from __future__ import annotations

from modelworks.launch.engine import Engine
from modelworks.spec.errors import InputError

ACCEPTED = ("local", "slurm", "kubernetes", "ray")


def engine(name: str) -> Engine:
    """An engine other than this machine.

    Raises
    ------
    InputError
        If there is none of the name.
    """
    if name == "slurm":
        from modelworks.launch.slurm import Slurm

        return Slurm()
    if name == "kubernetes":
        from modelworks.launch.kubernetes import Kubernetes

        return Kubernetes()
    if name == "ray":
        from modelworks.launch.ray_cluster import Ray

        return Ray()
    raise InputError(f"--on {name} is not accepted: {', '.join(ACCEPTED)} are")
