"""A prediction set out for people."""

from __future__ import annotations

from rich.table import Table

from modelworks.plan.step import StepPrediction
from modelworks.spec.hardware import DeviceSpec
from modelworks.spec.run import RunSpec


def page(run: RunSpec, device: DeviceSpec, prediction: StepPrediction) -> Table:
    """The prediction as a table for the terminal, with a last line that says whether it fits the device's memory."""
    table = Table(title=f"{run.name}: {run.model.name} on one device, {device.name}", show_header=False)
    gib = 2**30
    fits = "fits" if prediction.memory_bytes <= device.memory_bytes else "doesn't fit"
    sequences = f"{run.train.global_batch} of {run.train.seq_len} tokens, {prediction.micro_batch} at a time"
    for name, value in (
        ("parameters", f"{run.model.parameters.total:,}, one token uses {run.model.parameters.active:,}"),
        ("sequences per step", sequences),
        ("precision", prediction.precision),
        ("model FLOPs per step", f"{prediction.flop_per_step:.4g}"),
        ("time per step", f"{prediction.step_time_s:.3g} s"),
        ("throughput", f"{prediction.tokens_per_s:,.0f} tokens/s"),
        ("MFU", f"{prediction.mfu:.1%} of {device.peak_flops[prediction.precision] / 1e12:,.4g} TFLOP/s"),
        ("whole run", f"{prediction.steps:,} steps, {_duration(prediction.run_time_s)}"),
        ("memory", f"{prediction.memory_bytes / gib:,.1f} GiB, {fits} in {device.memory_bytes / gib:,.1f} GiB"),
    ):
        table.add_row(name, value)
    return table


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.1f} s"
