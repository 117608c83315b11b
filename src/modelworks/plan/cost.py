"""What a run costs: device hours, energy, money to rent or to buy.

Energy is what the devices, the rest of their nodes and the site around them draw. Bought, a run pays the share of the
cluster's life that it takes, and electricity; rented, it pays by the device hour. Prices are the catalog's
(`prices/`) where hardware and cluster state none of their own.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from modelworks.spec import catalog
from modelworks.spec.fields import PositiveFloat, Section, validate
from modelworks.spec.hardware import ClusterSpec, DeviceSpec


class PriceSpec(Section):
    """What a device costs, from the catalog's `prices/`."""

    price_usd: PositiveFloat
    """One device's share of a server as bought, its processors, memory, disks and network ports included."""
    network_usd: PositiveFloat
    """One device's share of switches, cables and storage."""
    rent_usd_per_hour: PositiveFloat
    """One device hour on demand or under a contract of a year, whichever the source states."""


class CostRules(Section):
    """How prices become the cost of a run."""

    life_years: PositiveFloat
    """Over which hardware is written off."""
    site_usd_per_w: PositiveFloat
    """Building, power and cooling, per watt of what computers draw."""
    site_life_years: PositiveFloat
    draw: PositiveFloat
    """Share of the rated power that devices draw while they train."""
    build_days: PositiveFloat
    """From an order to a cluster that trains."""
    train_days: PositiveFloat
    """A training run, where no date bounds it."""
    goodput: PositiveFloat
    """Share of the time that trains, after failures and restarts."""
    usd_spread: PositiveFloat
    """By how much money may turn out to buy more or fewer devices, as a fraction."""


@dataclass(frozen=True)
class Cost:
    """What a run of so many hours on so many devices costs."""

    device_hours: float
    energy_kwh: float
    power_w: float
    """Of the whole site while the run is on."""
    electricity_usd: float
    rent_usd: float | None
    """Device hours at the rental price, electricity included in it."""
    buy_usd: float | None
    """Price of the devices with their share of nodes and network."""
    owned_usd: float | None
    """The run's share of the hardware's and the site's life, and its electricity."""

    def as_dict(self) -> dict[str, Any]:
        """The same as plain values, for JSON."""
        return asdict(self)


def cost_rules() -> CostRules:
    """The catalog's rules."""
    return validate(CostRules, catalog.entry("prices", "rules").values, where="prices rules")


def price_of(device: DeviceSpec) -> PriceSpec | None:
    """A device's prices in the catalog; None where there are none."""
    if device.name not in catalog.names("prices"):
        return None
    return validate(PriceSpec, catalog.entry("prices", device.name).values, where=f"prices {device.name}")


def power_w(cluster: ClusterSpec, device: DeviceSpec, devices: int, rules: CostRules) -> float:
    """What the whole site draws while `devices` train."""
    nodes = -(-devices // cluster.gpus_per_node)
    return (devices * device.power_w * rules.draw + nodes * cluster.node_overhead_w) * cluster.pue


def run_cost(cluster: ClusterSpec, device: DeviceSpec, devices: int, seconds: float) -> Cost:
    """What `devices` of a cluster cost for so many seconds of training.

    A price in the device's own file wins over the catalog's. Without any, money is None.
    """
    rules, price = cost_rules(), price_of(device)
    hours = seconds / 3600.0
    power = power_w(cluster, device, devices, rules)
    energy_kwh = power * hours / 1000.0
    electricity = energy_kwh * cluster.electricity_usd_per_kwh
    rent = device.rent_usd_per_hour or (price.rent_usd_per_hour if price else None)
    each = capital_usd(cluster, device, price)
    owned = None
    if each is not None:
        site = power * rules.site_usd_per_w
        year = 365.25 * 24.0
        owned = electricity + hours / year * (devices * each / rules.life_years + site / rules.site_life_years)
    return Cost(
        device_hours=devices * hours,
        energy_kwh=energy_kwh,
        power_w=power,
        electricity_usd=electricity,
        rent_usd=None if rent is None else devices * hours * rent,
        buy_usd=None if each is None else devices * each,
        owned_usd=owned,
    )


def capital_usd(cluster: ClusterSpec, device: DeviceSpec, price: PriceSpec | None) -> float | None:
    """Price of one device with its share of node and network; None where no price is known."""
    node = cluster.node_overhead_usd / cluster.gpus_per_node
    if device.price_usd is not None:
        return device.price_usd + node + (price.network_usd if price else 0.0)
    return None if price is None else price.price_usd + node + price.network_usd
