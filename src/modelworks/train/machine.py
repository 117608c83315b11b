"""What this machine can do: its matrix multiplication and memory rates, measured.

`measure` takes about five seconds and fills a `DeviceSpec`; `write_hardware_file` keeps it where the planner and the
training loop (for MFU) look for it. Matrices grow until one multiplication takes a good while, so that a precision
which the CPU has no instructions for (a hundred times slower) costs no more time to measure than a fast one.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import psutil
import tomli_w
import torch

from modelworks.spec.files import device_spec
from modelworks.spec.hardware import DeviceSpec
from modelworks.spec.home import hardware_file, write_atomically

Precision = Literal["fp32", "bf16"]
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_ASSUMED_POWER_W = 65.0
"""What a small machine's processor draws; nothing on it can be asked without privileges."""


def matmul_flops(precision: Precision, budget_s: float = 1.0) -> float:
    """The best rate, in FLOP/s, at which this machine multiplies square matrices in one precision."""
    best, deadline, size = 0.0, time.perf_counter() + budget_s, 256
    left, right, out = _matrices(size, precision)
    while True:
        begun = time.perf_counter()
        torch.mm(left, right, out=out)
        taken = time.perf_counter() - begun
        best = max(best, 2 * size**3 / taken)
        if time.perf_counter() >= deadline:
            return best
        if taken < budget_s / 64 and size < 4096:
            size *= 2
            left, right, out = _matrices(size, precision)


def memory_bandwidth(budget_s: float = 1.0) -> float:
    """Bytes per second that a copy of a large array reads and writes together (as STREAM's copy counts them)."""
    source = torch.zeros(1 << 26, dtype=torch.float32)
    target = torch.empty_like(source)
    best, deadline = 0.0, time.perf_counter() + budget_s
    while time.perf_counter() < deadline:
        begun = time.perf_counter()
        target.copy_(source)
        best = max(best, 2 * source.nbytes / (time.perf_counter() - begun))
    return best


def measure(budget_s: float = 5.0, progress: Callable[[str, float], None] | None = None) -> DeviceSpec:
    """Measure this machine's CPU, with as many threads as PyTorch uses.

    Parameters
    ----------
    budget_s
        About how long it may take in all.
    progress
        Called with what is measured next and the share that is done.
    """
    report = progress or (lambda what, done: None)
    share = budget_s / 3
    report("matrix multiplication in fp32", 0.0)
    fp32 = matmul_flops("fp32", share)
    report("matrix multiplication in bf16", 1 / 3)
    bf16 = matmul_flops("bf16", share)
    report("memory bandwidth", 2 / 3)
    bandwidth = memory_bandwidth(share)
    report("done", 1.0)
    return DeviceSpec(
        name=_processor(),
        kind="cpu",
        peak_flops={"fp32": fp32, "bf16": bf16},
        memory_bytes=psutil.virtual_memory().total,
        memory_bandwidth_bytes=bandwidth,
        power_w=_ASSUMED_POWER_W,
    )


def write_hardware_file(device: DeviceSpec, path: Path | None = None) -> Path:
    """Keep a measured device as a hardware file that the planner reads.

    Raises
    ------
    OSError
        If it can't be written.
    """
    path = path or hardware_file()
    threads = torch.get_num_threads()
    provenance = {
        "source": f"modelworks bench on {platform.node()}, {threads} threads, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "certainty": "estimated",
        "note": "measured rates; a busy machine measures less than it has",
        "fields": {"power_w": {"source": "an order of magnitude; not measured", "certainty": "assumed"}},
    }
    values = device.model_dump(mode="json", exclude_none=True) | {"provenance": provenance}
    write_atomically(path, tomli_w.dumps(values))
    return path


def peak_flops(precision: Precision, processes: int = 1) -> float:
    """This machine's matrix rate in FLOP/s: from the hardware file, else measured now in half a second, by each of
    `processes` at once."""
    if hardware_file().is_file():
        known = device_spec(str(hardware_file())).peak_flops
        if precision in known:
            return known[precision]
    return processes * matmul_flops(precision, budget_s=0.5)


def _matrices(size: int, precision: Precision) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    left, right = (torch.randn(size, size).to(_DTYPES[precision]) for _ in range(2))
    return left, right, torch.empty_like(left)


def _processor() -> str:
    """The processor's name as the system states it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()
