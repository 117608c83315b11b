"""A GPU cluster beside the machines of the TOP500: two estimates, and the measures that matter instead.

**HPL** (fp64): the listed machines of the same chip reach so much per GPU; the cluster is taken to do the same. Where
the list has several, the largest gives the estimate and all give the range. **HPL-MxP**: the share of the dense fp16
peak that NVIDIA's machine with a published result reached, times the cluster's fp16 peak; the shares of all machines
with published results give the range. Nobody has run either on a machine of this size: these are estimates.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from modelworks.simulate.machine import Machine
from modelworks.spec.facts import top500
from modelworks.spec.machine import Top500Spec

SAME_CHIP = {
    "h100-sxm": "NVIDIA H100",
    "h200-sxm": "NVIDIA H100",
    "a100-80gb": "NVIDIA A100",
}
"""What the list calls a device; the H200 computes as the H100 does."""


@dataclass(frozen=True)
class Estimate:
    """A figure with its range and where it comes from."""

    flops: float
    low_flops: float
    high_flops: float
    method: str


@dataclass(frozen=True)
class Row:
    """One machine, published or estimated; None where there is no figure."""

    name: str
    site: str
    estimated: bool
    hpl_flops: float | None
    hpl_mxp_flops: float | None
    bf16_flops: float | None
    fp8_flops: float | None
    memory_bytes: float | None
    power_w: float | None
    tokens_per_day: float | None = None


@dataclass(frozen=True)
class Beside:
    """The cluster beside the list."""

    hpl: Estimate | None
    hpl_mxp: Estimate | None
    bisection_bytes: float | None
    rows: list[Row]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def hpl(machine: Machine, listed: list[Top500Spec]) -> Estimate | None:
    """HPL by the list's machines of the same chip; None if it has none."""
    chip = SAME_CHIP.get(machine.device.name)
    same = [each for each in listed if each.accelerator == chip and each.accelerators]
    if not same:
        return None
    each_flops = {each.title: each.rmax_flops / (each.accelerators or 1) for each in same}
    largest = max(same, key=lambda each: each.accelerators or 0)
    gpus = machine.cluster.gpus
    return Estimate(
        flops=each_flops[largest.title] * gpus,
        low_flops=min(each_flops.values()) * gpus,
        high_flops=max(each_flops.values()) * gpus,
        method=f"{each_flops[largest.title] / 1e12:.1f} TFLOP/s each, as on {largest.title} ({largest.accelerators:,})",
    )


def hpl_mxp(machine: Machine, listed: list[Top500Spec]) -> Estimate | None:
    """HPL-MxP by the share of the fp16 peak that others reached."""
    peak = machine.device.peak_flops.get("fp16")
    shares = {
        each.title: each.hpl_mxp_flops / (each.accelerators * each.fp16_flops)
        for each in listed
        if each.hpl_mxp_flops and each.accelerators and each.fp16_flops
    }
    nvidia = [each for each in listed if each.title in shares and each.accelerator.startswith("NVIDIA")]
    if peak is None or not nvidia:
        return None
    reference, total = nvidia[0].title, peak * machine.cluster.gpus
    return Estimate(
        flops=shares[reference] * total,
        low_flops=min(shares.values()) * total,
        high_flops=max(shares.values()) * total,
        method=f"{shares[reference]:.0%} of the dense fp16 peak, as on {reference}",
    )


def beside(machine: Machine, tokens_per_day: float | None) -> Beside:
    """The cluster and the list's machines, the fastest in bf16 first.

    Parameters
    ----------
    tokens_per_day
        Of the run on the cluster, failures counted.
    """
    listed = top500()
    ours_hpl, ours_mxp = hpl(machine, listed), hpl_mxp(machine, listed)
    cluster, device = machine.cluster, machine.device
    rows = [
        Row(
            name=f"{cluster.gpus:,} x {device.name}",
            site=cluster.name,
            estimated=True,
            hpl_flops=ours_hpl.flops if ours_hpl else None,
            hpl_mxp_flops=ours_mxp.flops if ours_mxp else None,
            bf16_flops=_times(device.peak_flops.get("bf16"), cluster.gpus),
            fp8_flops=_times(device.peak_flops.get("fp8"), cluster.gpus),
            memory_bytes=float(device.memory_bytes) * cluster.gpus,
            power_w=machine.power.it_w,
            tokens_per_day=tokens_per_day,
        )
    ]
    for each in listed:
        peak = _times(each.fp16_flops, each.accelerators)
        rows.append(
            Row(
                name=each.title,
                site=each.site,
                estimated=False,
                hpl_flops=each.rmax_flops,
                hpl_mxp_flops=each.hpl_mxp_flops,
                bf16_flops=peak,
                fp8_flops=None,
                memory_bytes=_times(each.memory_bytes, each.accelerators),
                power_w=each.power_w,
            )
        )
    rows.sort(key=lambda row: -(row.bf16_flops or 0.0))
    bisection = machine.network.bisection_bytes if machine.network else None
    return Beside(ours_hpl, ours_mxp, bisection, rows)


def _times(each: float | None, number: int | None) -> float | None:
    return each * number if each is not None and number is not None else None
