"""How an engine is asked for machines: how many, for how long, and what to do about the ones that fail.

What every engine needs stands in the section itself; what only one of them understands stands in the subsection of
its name. Nothing here changes what is computed, so a resumed run may change all of it.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from modelworks.spec.fields import Bytes, Duration, PositiveInt, Section

Port = Annotated[int, Field(gt=1023, le=64_000)]


class SlurmSpec(Section):
    """What `sbatch` is told; what is unset is left to the site."""

    account: str | None = None
    partition: str | None = None
    qos: str | None = None
    reservation: str | None = None
    constraint: str | None = None
    exclusive: bool = True
    """Take whole nodes."""
    switches: PositiveInt | None = None
    """Over how many leaf switches the nodes may be spread."""
    switches_wait: Duration = 600.0
    """How long to wait for so few before any nodes are taken."""
    array: PositiveInt | None = None
    """Submit so many jobs that run one after the other instead of one that requeues itself, where a site forbids
    requeueing."""
    options: list[str] = []
    """More options of `sbatch`, such as `"--mail-type=END"`."""

    @model_validator(mode="after")
    def _options_are_options(self) -> SlurmSpec:
        for option in self.options:
            if not option.startswith("--") or "\n" in option:
                raise ValueError(f"launch.slurm.options: {option!r} is not accepted: one option such as --nice=10 is")
        return self


class KubernetesSpec(Section):
    """What the cluster's objects are made of."""

    kind: Literal["jobset", "trainjob"] = "jobset"
    """A JobSet, or a TrainJob of Kubeflow Trainer 2."""
    image: str | None = None
    """The container's image, with Modelworks installed."""
    namespace: str = "default"
    claim: str | None = None
    """An existing volume claim that all nodes can write, for the runs; without it one is made."""
    storage: Bytes = 100 * 2**30
    """Size of the claim that is made."""
    storage_class: str | None = None
    gpu_resource: str = "nvidia.com/gpu"
    queue: str | None = None
    """A local queue of Kueue that admits the run as a whole."""
    runtime: str = "torch-distributed"
    """The ClusterTrainingRuntime of a TrainJob."""
    topology_key: str | None = None
    """A label of the cluster's nodes, such as a rack's: nodes of one value of it are preferred."""
    node_selector: dict[str, str] = {}
    tolerate: list[str] = []
    """Keys of taints that the run tolerates."""
    service_account: str | None = None
    secret: str | None = None
    """A secret whose keys become variables, such as those of an object store."""


class RaySpec(Section):
    """Which Ray cluster."""

    address: str = "auto"
    """`auto` (the cluster that this machine belongs to), `local` (started here for the run), or HOST:PORT."""


class LaunchSpec(Section):
    """The machines that an engine is asked for, and how it goes on after a failure."""

    nodes: PositiveInt | None = None
    """Over how many nodes the cluster's devices are spread; `cluster.gpus / cluster.gpus_per_node` if unset."""
    time: Duration | None = None
    """Limit of one job; the run is saved and goes on in the next."""
    grace: Annotated[Duration, Field(ge=10)] = 180.0
    """How long before the limit, and after being told to go, the run has to save."""
    cpus_per_node: PositiveInt | None = None
    memory_per_node: Bytes | None = None
    free_disk: Bytes = 1 << 30
    """A node with less room in the folder of runs is not started on."""
    free_memory: Bytes = 1 << 28
    """A node with less free memory is not started on."""
    attempts: PositiveInt = 5
    """Attempts in a row without progress after which the run is given up."""
    exclude_after: PositiveInt = 2
    """Failures after which a node is no longer used."""
    port: Port = 29_400
    """Where nodes meet: this port of the first node, or one of the thousand above it."""
    environment: dict[str, str] = {}
    """Variables that are set on every node."""
    setup: list[str] = []
    """Shell commands before the run starts, such as `"module load cuda"`."""
    slurm: SlurmSpec = SlurmSpec()
    kubernetes: KubernetesSpec = KubernetesSpec()
    ray: RaySpec = RaySpec()
