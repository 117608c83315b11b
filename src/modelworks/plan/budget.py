"""The largest cluster under a sum of money, a power supply or a date, and the best model that it can train.

Money buys devices with their share of nodes, network and site, and pays for the electricity of the run; power bounds
how many of them may run at once; a date leaves the days between the end of building and itself. What the devices then
compute follows from the plan of the known model nearest in size on them, and what that compute is best spent on from
scaling laws. Every figure is stated with what it may be off by.
"""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass
from datetime import date, timedelta
from typing import Any

from rich.console import Group
from rich.markup import escape
from rich.table import Table

from modelworks.plan.cost import CostRules, capital_usd, cost_rules, power_w, price_of
from modelworks.plan.planner import MOST_DEVICES, Plan, plan
from modelworks.plan.scaling import (
    FEED_FORWARD_SHARE,
    ExpertOptimum,
    Optimum,
    expert_optima,
    joint_law,
    optima,
    routed_law,
)
from modelworks.spec import catalog
from modelworks.spec.errors import InputError
from modelworks.spec.fields import nearest
from modelworks.spec.files import device_spec, model_spec, run_from
from modelworks.spec.hardware import ClusterSpec, DeviceSpec
from modelworks.spec.model import ModelSpec

_WATTS = {"W": 1.0, "kW": 1e3, "MW": 1e6, "GW": 1e9}
_USD = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
_DAY_S, _YEAR_DAYS = 86400.0, 365.25


@dataclass(frozen=True)
class Limits:
    """What a site may cost, draw and take; what is None doesn't bound it."""

    usd: float | None = None
    power_w: float | None = None
    by: date | None = None
    start: date | None = None
    """When money and power are there."""


@dataclass(frozen=True)
class Budget:
    """A cluster under limits, and what it trains."""

    device: str
    devices: int
    devices_low: int
    """With prices or power at the bad end of their spread."""
    devices_high: int
    bound_by: str
    """`money`, `power` or `size` (what a network joins)."""
    power_w: float
    capital_usd: float | None
    """Devices, nodes, network and site."""
    running_usd: float | None
    """Electricity of the run."""
    rented_devices: int | None
    """How many could be rented instead for the same money and days, were there so many."""
    start: date
    begin: date
    """When training begins: after building."""
    end: date
    train_days: float
    compute_flop: float
    """Model FLOPs of the run: peak times MFU times goodput."""
    mfu: float
    mfu_of: str
    """The model whose plan that MFU is of."""
    layout: dict[str, Any]
    """Its layout."""
    optima: tuple[Optimum, ...]
    """The best dense model for that compute, by each law."""
    experts: dict[str, float]
    """A model with experts of the same cost: parameters that a token meets, all of them, and the dense equivalent."""
    expert_optima: tuple[ExpertOptimum, ...]
    """The best models with experts for that compute, by the joint law."""
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """The same as plain values, for JSON."""
        plain = asdict(self)
        return plain | {name: getattr(self, name).isoformat() for name in ("start", "begin", "end")}


def budget(cluster: ClusterSpec, limits: Limits, today: date | None = None) -> Budget:
    """The largest cluster of a kind under limits, and the best model that it can train.

    Parameters
    ----------
    cluster
        Whose nodes, network and prices are taken; its number of devices isn't.
    limits
        At least one of money and power.

    Raises
    ------
    InputError
        If neither money nor power bounds the cluster, they don't buy a node, or the date is too near.
    """
    device = device_spec(cluster.device)
    rules = cost_rules()
    start, begin, end, days, notes = _days(limits, rules, today or date.today())  # noqa: DTZ011 (a day, not an instant)
    fits = {name: count for name, count in _counts(cluster, device, limits, rules, days).items() if count is not None}
    if not fits:
        raise InputError("--by alone bounds no cluster: give --budget or --power with it")
    bound_by = min(fits, key=lambda name: fits[name])
    wanted = min(fits[bound_by], float(MOST_DEVICES))
    if fits[bound_by] > MOST_DEVICES:
        bound_by = "size"
    devices = _whole_nodes(wanted, cluster)
    if devices == 0:
        raise InputError(
            f"{_given(limits)} is not accepted: a node of {cluster.gpus_per_node} x {device.name} needs "
            f"{_node_needs(cluster, device, rules, days)}"
        )
    spread = rules.usd_spread if bound_by == "money" else 0.1
    planned, compute = _compute(cluster, device, devices, days, rules)
    power = power_w(cluster, device, devices, rules)
    each = capital_usd(cluster, device, price_of(device))
    price = price_of(device)
    rent = device.rent_usd_per_hour or (price.rent_usd_per_hour if price else None)
    rented = None
    if limits.usd is not None and rent is not None:
        rented = math.floor(limits.usd / (rent * 24.0 * days))
    found = optima(compute)
    experts = _with_experts(found[0])
    notes += [
        f"devices: {_spread(spread)} for {'prices' if bound_by == 'money' else 'what devices really draw'}",
        f"compute: MFU {planned.mfu:.0%} is that of {planned.run.model.name} planned on {planned.devices:,} devices; "
        f"{rules.goodput:.0%} of the time trains",
        "the two laws were fitted below 1e23 FLOPs: what lies beyond is extrapolated, and they part",
        _joint_note(compute),
    ]
    if experts["dense_equivalent"] <= experts["active_parameters"]:
        notes.append("at this size the law for experts, fitted below 1.3 billion parameters, sees no gain in them")
    return Budget(
        device=device.name,
        devices=devices,
        devices_low=_whole_nodes(devices / (1 + spread), cluster),
        devices_high=_whole_nodes(devices * (1 + spread), cluster),
        bound_by=bound_by,
        power_w=power,
        capital_usd=None if each is None else devices * each + power * rules.site_usd_per_w,
        running_usd=power / 1000.0 * 24.0 * days * cluster.electricity_usd_per_kwh,
        rented_devices=rented,
        start=start,
        begin=begin,
        end=end,
        train_days=days,
        compute_flop=compute,
        mfu=planned.mfu,
        mfu_of=planned.run.model.name,
        layout=planned.best.layout,
        optima=found,
        experts=experts,
        expert_optima=expert_optima(compute),
        notes=tuple(notes),
    )


def parse_usd(text: str) -> float:
    """A sum of money: ``6e9``, ``6B``, ``$250M``."""
    return _quantity("--budget", text.strip().removeprefix("$"), _USD, "a sum in US dollars, such as 6e9 or 250M")


def parse_power(text: str) -> float:
    """A power in watts: ``150MW``, ``1.2GW``."""
    return _quantity("--power", text, _WATTS, "a power with its unit, such as 150MW or 1.2GW")


def parse_date(text: str) -> date:
    """A day: ``2027-10-01``, or ``2027-10`` for the first of a month."""
    try:
        return date.fromisoformat(text if len(text) > 7 else f"{text}-01")
    except ValueError:
        raise InputError(f"--by {text} is not accepted: a month or a day, such as 2027-10 or 2027-10-15, is") from None


def _quantity(option: str, text: str, units: dict[str, float], accepted: str) -> float:
    matched = re.fullmatch(r"\s*([0-9][0-9_]*(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    if matched is None or matched[2] not in units:
        raise InputError(f"{option} {text} is not accepted: {accepted} is")
    value = float(matched[1]) * units[matched[2]]
    if not 0 < value < math.inf:
        raise InputError(f"{option} {text} is not accepted: more than nothing is")
    return value


def _days(limits: Limits, rules: CostRules, today: date) -> tuple[date, date, date, float, list[str]]:
    """When it starts, when training begins and ends, and how many days that are."""
    build = timedelta(days=round(rules.build_days))
    notes = [f"building takes {rules.build_days:.0f} days, as Colossus did"]
    if limits.by is None:
        start = limits.start or today
        return start, start + build, start + build + timedelta(days=rules.train_days), rules.train_days, notes
    start = limits.start or today
    if limits.start is None and limits.by <= today:
        start = limits.by - timedelta(days=365)
        notes.append(f"{limits.by} is past: reckoned as if begun a year before it, on {start}")
    days = (limits.by - start - build).days
    if days < 1:
        raise InputError(
            f"--by {limits.by} is not accepted: building takes until {start + build}, and training comes after that"
        )
    return start, start + build, limits.by, float(days), notes


def _counts(
    cluster: ClusterSpec, device: DeviceSpec, limits: Limits, rules: CostRules, days: float
) -> dict[str, float | None]:
    """How many devices money and power each allow."""
    node_power = power_w(cluster, device, cluster.gpus_per_node, rules) / cluster.gpus_per_node
    counts: dict[str, float | None] = {"money": None, "power": None}
    if limits.power_w is not None:
        counts["power"] = limits.power_w / node_power
    if limits.usd is not None:
        each = capital_usd(cluster, device, price_of(device))
        if each is None:
            known = [name for name in catalog.names("prices") if name != "rules"]
            raise InputError(
                f"no price of {device.name} is known: state price_usd in its hardware file, or take a cluster of "
                + nearest(device.name, known)
            )
        running = node_power / 1000.0 * 24.0 * days * cluster.electricity_usd_per_kwh
        counts["money"] = limits.usd / (each + node_power * rules.site_usd_per_w + running)
    return counts


def _compute(
    cluster: ClusterSpec, device: DeviceSpec, devices: int, days: float, rules: CostRules
) -> tuple[Plan, float]:
    """The plan of the known dense model nearest to the best size on these devices, and the FLOPs of the run."""
    sites = cluster.model_copy(update={"gpus": devices})
    known = [model_spec(name) for name in catalog.names("models")]
    dense = [model for model in known if model.moe is None and model.vision is None]
    guess = optima(devices * device.peak_flops["bf16"] * 0.4 * rules.goodput * days * _DAY_S)[0].parameters
    closest = min(dense, key=lambda model: abs(math.log(model.parameters.total / guess)))
    for model in sorted(dense, key=lambda model: abs(math.log(model.parameters.total / closest.parameters.total))):
        try:
            planned = _planned(model, sites, devices)
        except InputError:
            continue
        rate = planned.devices * device.peak_flops[planned.precision] * planned.mfu  # type: ignore[index]
        return planned, rate * rules.goodput * days * _DAY_S
    raise InputError(f"none of the known models fits {devices} x {device.name}")


def _planned(model: ModelSpec, cluster: ClusterSpec, devices: int) -> Plan:
    seq_len = min(model.context, 8192)
    batch = 1 << max(0, max(4_194_304 // seq_len, devices // 8) - 1).bit_length()
    values = {
        "name": "budget",
        "model": model.model_dump(exclude_none=True),
        "cluster": cluster.model_dump(exclude_none=True),
        "train": {"tokens": 10**12, "seq_len": seq_len, "global_batch": batch},
    }
    return plan(run_from(values), top=0)


def _with_experts(best: Optimum) -> dict[str, float]:
    """A model of 8 experts, 2 of them for each token, that costs as much as the best dense one.

    A token meets as many parameters as before.
    """
    total = best.parameters * (1 - FEED_FORWARD_SHARE + FEED_FORWARD_SHARE * 4)
    equivalent = routed_law().dense_equivalent(best.parameters, 4.0)
    return {
        "active_parameters": best.parameters,
        "parameters": total,
        "dense_equivalent": equivalent,
        "tokens": best.tokens,
    }


def _joint_note(compute_flop: float) -> str:
    law = joint_law()
    error, fitted = law.allocation_error or 0.0, law.fitted_compute_flop or 0.0
    beyond = max(0.0, math.log10(compute_flop / fitted)) if fitted else 0.0
    return (
        f"the law of {law.name} was fitted around {fitted:.1g} FLOPs and up to {law.most_experts} experts, one for "
        f"each token: {beyond:.0f} orders of magnitude below this, so believe the gain of experts before their sizes; "
        f"its authors state no errors, and the range takes one of {error} in the power of compute that the best size "
        "grows with"
    )


def _whole_nodes(devices: float, cluster: ClusterSpec) -> int:
    return int(devices // cluster.gpus_per_node) * cluster.gpus_per_node


def _node_needs(cluster: ClusterSpec, device: DeviceSpec, rules: CostRules, days: float) -> str:
    power = power_w(cluster, device, cluster.gpus_per_node, rules)
    each = capital_usd(cluster, device, price_of(device))
    needs = f"{power / 1e3:,.1f} kW"
    if each is not None:
        running = power / 1000.0 * 24.0 * days * cluster.electricity_usd_per_kwh
        needs += f" and {cluster.gpus_per_node * each + power * rules.site_usd_per_w + running:,.0f} USD"
    return needs


def _given(limits: Limits) -> str:
    parts = [] if limits.usd is None else [f"--budget {limits.usd:g}"]
    return " and ".join(parts + ([] if limits.power_w is None else [f"--power {limits.power_w:g} W"]))


def _spread(share: float) -> str:
    return f"{share:.0%} to either side"


def table(found: Budget) -> Group:
    """A budget for the terminal."""
    cluster = Table(title="the largest cluster", show_header=False)
    rows = [
        ("devices", f"{found.devices:,} x {found.device} ({found.devices_low:,} to {found.devices_high:,})"),
        ("bound by", found.bound_by),
        ("power", f"{found.power_w / 1e6:,.1f} MW"),
        ("devices, network, site", "no price known" if found.capital_usd is None else f"{found.capital_usd:,.0f} USD"),
        ("electricity of the run", "" if found.running_usd is None else f"{found.running_usd:,.0f} USD"),
        ("trains", f"{found.begin} to {found.end}, {found.train_days:,.0f} days"),
        ("computes", f"{found.compute_flop:.3g} FLOPs at {found.mfu:.1%} MFU"),
    ]
    if found.rented_devices is not None:
        rows.append(("rented instead", f"{found.rented_devices:,} devices for those days, were there so many"))
    for name, value in rows:
        cluster.add_row(name, value)
    models = Table("law", "parameters", "tokens", "tokens per parameter", "80 % range", title="the best dense model")
    for best in found.optima:
        wide = "not stated"
        if best.parameters_low is not None and best.parameters_high is not None:
            wide = f"{best.parameters_low / 1e9:,.0f} to {best.parameters_high / 1e9:,.0f} B"
        models.add_row(
            best.law, f"{best.parameters / 1e9:,.0f} B", f"{best.tokens / 1e12:,.1f} T",
            f"{best.tokens / best.parameters:,.0f}", wide,
        )  # fmt: skip
    experts = found.experts
    with_experts = (
        f"with 8 experts, 2 for each token, at the same cost: {experts['parameters'] / 1e9:,.0f} B parameters, "
        f"{experts['active_parameters'] / 1e9:,.0f} B active, as good as "
        f"{experts['dense_equivalent'] / 1e9:,.0f} B dense"
    )
    routed = Table(
        "experts", "active", "all parameters", "tokens", "80 % range of active", "dense compute for the same",
        title=f"the best model with experts, by {found.expert_optima[0].best.law}",
    )  # fmt: skip
    for many in found.expert_optima:
        best, low, high = many.best, many.best.parameters_low, many.best.parameters_high
        routed.add_row(
            f"{many.experts}", f"{best.parameters / 1e9:,.0f} B", f"{many.total_parameters / 1e9:,.0f} B",
            f"{best.tokens / 1e12:,.1f} T",
            "not stated" if low is None or high is None else f"{low / 1e9:,.0f} to {high / 1e9:,.0f} B",
            f"x {many.dense_compute_flop / found.compute_flop:.1f}",
        )  # fmt: skip
    return Group(cluster, models, routed, with_experts, *(escape(f"note: {note}") for note in found.notes))
