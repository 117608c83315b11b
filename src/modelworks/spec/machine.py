"""What a cluster is made of and what that costs, and the machines of the TOP500: the catalog's files of those kinds.

`PartsSpec` says how many parts a node, a rack and a switch have and what they draw; `PricesSpec` what they cost;
`Top500Spec` is one entry of a published list; `PublishedRunSpec` what others reported of a run's interruptions.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from modelworks.spec.fields import ByteRate, Bytes, Fraction, PositiveFloat, PositiveInt, Section

NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
NonNegativeInt = Annotated[int, Field(ge=0)]


class NodePartsSpec(Section):
    """Parts of one node of eight GPUs; a node of another size has them in proportion."""

    cpus: PositiveFloat
    dimms: PositiveFloat
    ssds: PositiveFloat
    psus: PositiveFloat
    nvlink_switches: NonNegativeFloat
    memory_stacks_per_gpu: PositiveFloat


class HallPartsSpec(Section):
    """How nodes stand in racks, and racks on feeds."""

    nodes_per_rack: PositiveInt
    racks_per_feed: PositiveInt
    """Racks that one power feed takes with it."""
    racks_per_row: PositiveInt
    rows_per_hall: PositiveInt


class SwitchPartsSpec(Section):
    """A switch, counted in ports of the NIC's rate."""

    ports: PositiveInt
    power_w: PositiveFloat
    """Without its transceivers."""


class LinkPartsSpec(Section):
    """Transceivers and cables. Level 0 is from node to leaf, 1 from leaf to spine, 2 from spine to core."""

    metres: Annotated[list[PositiveFloat], Field(min_length=1)]
    """Mean length by level; the last holds for what is above."""
    copper_up_to_m: NonNegativeFloat
    multimode_up_to_m: PositiveFloat
    nic_transceiver_w: PositiveFloat
    switch_transceiver_w: PositiveFloat
    """One module, which carries `links_per_switch_transceiver` links."""
    links_per_switch_transceiver: PositiveInt


class DrawPartsSpec(Section):
    """What draws power, as shares of what is stated for it."""

    gpu_computing: Fraction
    """Of the thermal design power, in matrix products."""
    gpu_communicating: Fraction
    gpu_idle: Fraction
    host_idle: Fraction
    """Of a node's overhead, while its GPUs do nothing."""
    storage_and_services: Fraction
    """Storage, login and management nodes, of the servers' power."""
    communication_share: Fraction
    """Share of a step in which all GPUs wait for the network together."""


class StoragePartsSpec(Section):
    """Shared storage by GPU, for a cluster that doesn't state its own."""

    bandwidth_per_gpu_bytes: ByteRate
    capacity_per_gpu_bytes: Bytes


class PartsSpec(Section):
    """A catalog file of parts."""

    name: str
    node: NodePartsSpec
    hall: HallPartsSpec
    switch: SwitchPartsSpec
    link: LinkPartsSpec
    draw: DrawPartsSpec
    storage: StoragePartsSpec


class PricesSpec(Section):
    """A catalog file of prices, in US dollars."""

    name: str
    gpu_with_server_per_watt: PositiveFloat
    """For a device without a price of its own: per watt of its thermal design power, its share of a server included."""
    switch: PositiveFloat
    nic_transceiver: PositiveFloat
    multimode_transceiver: PositiveFloat
    singlemode_transceiver: PositiveFloat
    copper_cable: PositiveFloat
    fibre_per_m: PositiveFloat
    fibre_cable: PositiveFloat
    """Connectors and laying of one cable, its length not counted."""
    storage_per_gpu: NonNegativeFloat
    building_per_w: NonNegativeFloat
    """A watt of critical IT power: shell, power and cooling."""
    upkeep_fraction: Fraction
    """Of the price of the IT, each year: support, spare parts, staff."""
    lifetime_years: PositiveFloat
    """Over which the IT is written off."""
    building_years: PositiveFloat


class Top500Spec(Section):
    """A machine of the TOP500, as its list states it."""

    name: str
    title: str
    site: str
    list: str
    """The edition: 2024-06 or 2024-11."""
    rank: PositiveInt | None = None
    rmax_flops: PositiveFloat
    """HPL, fp64."""
    rpeak_flops: PositiveFloat
    power_w: PositiveFloat | None = None
    accelerator: str
    accelerators: PositiveInt | None = None
    fp16_flops: PositiveFloat | None = None
    """Dense fp16 or bf16 peak of one accelerator."""
    memory_bytes: Bytes | None = None
    """High-bandwidth memory of one accelerator."""
    hpl_mxp_flops: PositiveFloat | None = None
    """HPL-MxP: the same system solved with low precision and refinement."""


class PublishedRunSpec(Section):
    """What was published of a run's, or a fleet's, interruptions."""

    name: str
    title: str
    device: str
    gpus: PositiveInt
    gpus_per_node: PositiveInt = 8
    days: PositiveFloat | None = None
    interruptions: PositiveFloat | None = None
    at_least: bool = False
    """Whether more than that may have happened."""
    causes: list[str] = []
    """The causes that were counted, where not all were."""
    ettr: Fraction | None = None
    mttf_hours: PositiveFloat | None = None
    failures_per_node_day: PositiveFloat | None = None
    checkpoint_every_s: PositiveFloat | None = None
    peer_memory: bool = False
    """Whether its state was kept in memory rather than in storage alone."""
