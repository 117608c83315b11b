"""What may happen to a run over weeks: what fails, what happens then, how the machine is built and powered.

The section ``[simulate]`` of a run spec. All of it has defaults, those of a well-kept H100 cluster of 2024; a scenario
states what differs. Rates of failure are facts of the catalog (`failures`), not of the scenario.
"""

from __future__ import annotations

import datetime
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from modelworks.spec.fields import ByteRate, Bytes, Count, Duration, Fraction, PositiveFloat, PositiveInt, Section

Scope = Literal["none", "node", "rack", "leaf", "feed", "cluster"]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeInt = Annotated[int, Field(ge=0)]


def _iso_date(value: Any) -> Any:
    try:
        return datetime.date.fromisoformat(value) if isinstance(value, str) else value
    except ValueError:
        raise ValueError("a date such as 2024-07-22 is accepted") from None


Date = Annotated[datetime.date, BeforeValidator(_iso_date)]
"""A date, as TOML writes it or in quotes."""
MOST_GPUS = 2_000_000
"""More GPUs than any site is planned for; beyond, a number is taken for a slip."""


class CauseSpec(Section):
    """One thing that fails, as a catalog file of failures states it."""

    component: str
    """What is counted: a part of the bill of materials (gpu, nic, leaf_switch, ...), or `job`."""
    interruptions: Annotated[float, Field(ge=0)] | None = None
    """How often it stopped the job that was observed; the rate follows from that job's parts and time."""
    mtbf_hours: PositiveFloat | None = None
    """Mean time between failures of one component, where nothing was observed."""
    kind: Literal["crash", "silent", "straggler"] = "crash"
    """`crash` stops the job; `silent` corrupts it unseen; `straggler` slows it until it is found."""
    group: str | None = None
    """The row of the published table that it belongs to."""
    scope: Scope = "node"
    """What goes down with it; `none` and `cluster` take the job and no node."""
    repair_fraction: Fraction = 1.0
    """How often it needs a repair; otherwise a restart is enough and the node stays."""
    repair_hours: PositiveFloat = 24.0
    """Mean time of a technician's work and the spare part's way."""
    detect_s: Annotated[float, Field(ge=0)] = 60.0
    """Mean time until it is noticed."""
    outage_s: Annotated[float, Field(ge=0)] = 0.0
    """Mean time for which nobody can work, for `none` and `cluster`."""
    slowdown: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the speed that a straggler costs the whole job."""
    undetected: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of silent corruptions that nobody ever finds."""
    foreseeable: bool = False
    """Whether a health check can find it before it strikes."""
    shape: Annotated[float, Field(gt=0, le=10)] = 1.0
    """Weibull shape: below 1 it wears in (infant mortality), 1 is constant, above 1 it wears out."""

    @model_validator(mode="after")
    def _one_rate(self) -> CauseSpec:
        if (self.interruptions is None) == (self.mtbf_hours is None):
            raise ValueError("either interruptions or mtbf_hours is needed, and not both")
        return self


class ObservationSpec(Section):
    """The job on which a catalog file's interruptions were counted."""

    gpus: PositiveInt
    gpus_per_node: PositiveInt = 8
    days: PositiveFloat
    levels: PositiveInt = 3
    """Levels of switches of its network."""
    age_days: PositiveFloat = 180.0
    """Age of the machine then, for what isn't exponential."""


class FailuresSpec(Section):
    """A catalog file of failures: what fails, how often, and what that does."""

    name: str
    observation: ObservationSpec
    causes: dict[str, CauseSpec]


class CauseChange(Section):
    """How a scenario changes one cause of the catalog."""

    rate: Rate = 1.0
    """Times as often."""
    shape: Annotated[float, Field(gt=0, le=10)] | None = None
    repair_hours: PositiveFloat | None = None
    detect: Duration | None = None


class SparesSpec(Section):
    """Nodes beyond the job's own."""

    hot: NonNegativeInt | None = None
    """Nodes that are on and checked, and take over at once; one for fifty if none is given."""
    pool: NonNegativeInt = 0
    """Nodes of a buffer that can be called in; each takes `restart.replace`."""


class RepairSpec(Section):
    """What happens to a node that failed."""

    technicians: PositiveInt | None = None
    """Repairs that go on at the same time; one for 250 nodes and at least four if none is given."""
    speed: Rate = 1.0
    """Times as fast as the catalog's repair times."""
    burn_in: Duration = 4 * 3600.0
    """Test before a repaired node is used again."""
    lemon_fraction: Fraction = 0.05
    """Share of repaired nodes that fail again soon."""
    lemon_after: Duration = 24 * 3600.0
    """Mean time until they do."""


class RestartSpec(Section):
    """What passes between the end of a job and its first new step. Times at the mean; each restart varies."""

    drain: Duration = 30.0
    """Killing what is left of the job and finding the culprit."""
    swap: Duration = 30.0
    """Putting a hot spare in a node's place."""
    replace: Duration = 1200.0
    """Calling in a node of the pool."""
    scheduler: Duration = 60.0
    container: Duration = 60.0
    communicator: Duration = 10.0
    """Setting up the communicators of a small job."""
    communicator_per_rank: Duration = 0.003
    """What each further rank adds; MegaScale reports under 30 s for more than 10,000 GPUs (arXiv:2402.15627)."""
    warm_up: Duration = 60.0
    """Compilation and the first, slow steps."""
    spread: Annotated[float, Field(ge=0, le=2)] = 0.3
    """Standard deviation of a restart's time over its mean."""
    manual_fraction: Fraction = 0.007
    """Share of failures that wait for a person."""
    manual: Duration = 4 * 3600.0
    """How long that takes, on average."""


class StateSpec(Section):
    """How the run's state is saved; how often is `checkpoint.every`."""

    kind: Literal["sync", "async", "peer", "multi-level"] = "async"
    """`sync` stops the job while it writes; `async` copies to host memory and writes behind the job; `peer` keeps the
    copies in the memory of other nodes, and every `storage_every`th in storage; `multi-level` does both, memory at
    `peer_every`, storage at `checkpoint.every`."""
    peer_every: Duration = 60.0
    storage_every: PositiveInt = 60
    """Of the copies in peers' memory, one in so many goes to storage as well (`kind = "peer"`)."""
    peer_survives: list[Scope] = ["none", "node", "leaf"]
    """What a copy in a peer's memory outlives."""
    bytes_per_parameter: PositiveFloat = 14.0
    """bf16 weights, and in fp32 the weights and both moments of AdamW."""
    snapshot_bandwidth_bytes: ByteRate = 10e9
    """GPU to host memory, each GPU."""
    stall: Duration | None = None
    """How long a checkpoint stops the job, instead of what follows from its size."""
    write: Duration | None = None
    """How long it takes until a checkpoint can be relied on, likewise."""
    read: Duration | None = None
    """How long it takes to load one, likewise."""
    storage_bandwidth_bytes: ByteRate | None = None
    """Of the shared storage, where the cluster doesn't state it."""
    storage_bytes: Bytes | None = None
    """What the shared storage holds."""

    @model_validator(mode="after")
    def _peer_every(self) -> StateSpec:
        if self.peer_every <= 0:
            raise ValueError("simulate.state.peer_every = 0 is not accepted: a time above zero is")
        return self


class ElasticSpec(Section):
    """Data parallelism that goes on with fewer replicas."""

    enabled: bool = False
    group_gpus: PositiveInt | None = None
    """GPUs of one replica of the model: what stops with a node. From the run's parallel degrees if they are given."""
    resize: Duration = 45.0
    """How long it takes to drop or admit a replica."""
    least: Fraction = 0.8
    """Share of the nodes below which the job waits."""


class HealthCheckSpec(Section):
    """Checks that stop the job for a moment and find what is about to fail, or computes wrongly."""

    every: Duration = 0.0
    """0 does without."""
    duration: Duration = 60.0
    coverage: Fraction = 0.3
    """Share of the foreseeable failures that are found before they strike."""


class MaintenanceSpec(Section):
    """Planned interruptions: the job saves its state, stops and goes on."""

    every: Duration = 0.0
    """0 does without."""
    duration: Duration = 600.0


class BatchSpec(Section):
    """GPUs that arrive together."""

    day: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    gpus: PositiveInt


class PowerPhaseSpec(Section):
    """From a day on, so much power of the site."""

    day: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    megawatts: Annotated[float, Field(ge=0, allow_inf_nan=False)]


class AlternativeSpec(Section):
    """Another machine for the same run, to compare with."""

    name: str
    device: str
    gpus: PositiveInt
    gpus_per_node: PositiveInt | None = None
    scale_up_domain: PositiveInt | None = None
    node_overhead_w: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    start: Date | None = None
    """When its first GPUs arrive; the run's own start if none is given."""
    batches: list[BatchSpec] = []
    power: list[PowerPhaseSpec] = []
    mfu: Fraction | None = None
    precision: Literal["bf16", "fp8"] | None = None


class SimulateSpec(Section):
    """A scenario: the run, its machine, and what may happen to both."""

    days: PositiveFloat | None = None
    """How long is simulated; until the run's tokens are done if none is given."""
    samples: PositiveInt = 1000
    seed: NonNegativeInt = 0
    start: Date | None = None
    """The calendar date of day 0."""
    step_time: Duration | None = None
    """Of one optimizer step, instead of the planner's."""
    tokens_per_step: Count | None = None
    mfu: Annotated[float, Field(gt=0, le=1)] = 0.38
    """Model FLOPs utilisation that the step time is reckoned with where it isn't given."""
    rank_spread: Fraction = 0.003
    """Standard deviation of a rank's step time over its mean; the slowest rank sets the pace."""
    failures: str = "llama3-h100"
    """Catalog name of the failures, or the path of such a file."""
    rate: Rate = 1.0
    """Everything fails so many times as often."""
    causes: dict[str, CauseChange] = {}
    age: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    """Age of the machine in days at day 0, for what isn't exponential; that of the observation if none is given."""
    spares: SparesSpec = SparesSpec()
    repair: RepairSpec = RepairSpec()
    restart: RestartSpec = RestartSpec()
    state: StateSpec = StateSpec()
    elastic: ElasticSpec = ElasticSpec()
    health_checks: HealthCheckSpec = HealthCheckSpec()
    maintenance: MaintenanceSpec = MaintenanceSpec()
    batches: list[BatchSpec] = []
    power: list[PowerPhaseSpec] = []
    alternatives: list[AlternativeSpec] = []
    prices: str = "h100-2024"
    """Catalog name of the prices, or the path of such a file."""
    parts: str = "h100-cluster"
    """Catalog name of the parts, or the path of such a file."""
    budget_usd: PositiveFloat | None = None
    """Money, to say what it buys."""
    target_gpu_hours: PositiveFloat | None = None
    """What was published of the run, to hold against."""

    @model_validator(mode="after")
    def _first_things(self) -> SimulateSpec:
        if self.batches and min(batch.day for batch in self.batches) > 0:
            raise ValueError("simulate.batches: no GPUs arrive at day 0; count the days from the first batch")
        if self.power and min(phase.day for phase in self.power) > 0:
            raise ValueError("simulate.power: there is no power at day 0; give the phase that the first day has")
        return self
