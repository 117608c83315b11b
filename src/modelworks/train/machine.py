"""What this machine can do, measured: matrices, attention, memory, collectives, disk, and PyTorch's own overhead.

`measure` takes about five seconds for the peaks alone and under a minute for tables by shape, and fills a
`DeviceSpec`; `write_hardware_file` keeps it where the planner and the training loop (for MFU) look for it. Every figure
is the best of a few tries, since another process can only take speed away. Matrices grow until one multiplication
takes a good while, and a shape that would take too long is left out, so that a precision which the CPU has no
instructions for (a hundred times slower) costs no more time to measure than a fast one.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, cast

import psutil
import tomli_w
import torch

from modelworks.model.attention import attention
from modelworks.model.decoder import Decoder, Losses
from modelworks.spec.errors import OperationError
from modelworks.spec.files import device_spec
from modelworks.spec.hardware import AttentionTime, CollectiveTime, DeviceSpec, GemmTime
from modelworks.spec.home import hardware_file, home, write_atomically
from modelworks.spec.model import ModelSpec
from modelworks.train.collectives import measure_collectives

Precision = Literal["fp32", "bf16"]
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_LONGEST_S = 1.5
"""What no single matrix product of the tables may take."""
_BUDGET_S = 0.04
"""How long one shape is measured again and again."""
_ROUNDS = 20
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


def measure(
    budget_s: float = 5.0, progress: Callable[[str, float], None] | None = None, tables: bool = False
) -> DeviceSpec:
    """Measure this machine's CPU, with as many threads as PyTorch uses.

    Parameters
    ----------
    budget_s
        About how long the peaks (matrices, memory) may take in all.
    progress
        Called with what is measured next and the share that is done.
    tables
        Also measure what depends on shape: matrix products, attention, collectives, overheads, the disk. Takes half a
        minute more on an idle machine.
    """
    report = progress or (lambda what, done: None)
    share, end = budget_s / 3, 0.1 if tables else 1.0
    report("matrix multiplication in fp32", 0.0)
    fp32 = matmul_flops("fp32", share)
    report("matrix multiplication in bf16", end / 3)
    bf16 = matmul_flops("bf16", share)
    report("memory bandwidth", end * 2 / 3)
    bandwidth = memory_bandwidth(share)
    peaks: dict[Precision, float] = {"fp32": fp32, "bf16": bf16}
    measured = _tables(peaks, lambda what, done: report(what, end + (1 - end) * done)) if tables else {}
    report("done", 1.0)
    return DeviceSpec(
        name=_processor(),
        kind="cpu",
        peak_flops=cast(dict[Any, float], peaks),
        memory_bytes=psutil.virtual_memory().total,
        memory_bandwidth_bytes=bandwidth,
        power_w=_ASSUMED_POWER_W,
        **measured,
    )


def _tables(peaks: dict[Precision, float], report: Callable[[str, float], None]) -> dict[str, Any]:
    """What depends on shape, as fields of a `DeviceSpec`."""
    all_threads = torch.get_num_threads()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    gemms: list[GemmTime] = []
    attention: list[AttentionTime] = []
    settings = list(itertools.product(sorted({1, all_threads}), peaks))
    for place, (threads, precision) in enumerate(settings):
        with _threads(threads):
            words = f"in {precision} with {threads} thread{'s' if threads > 1 else ''}"
            report(f"matrix products by shape {words}", 0.6 * place / len(settings))
            gemms += gemm_times(precision, peaks[precision] * threads / all_threads)
            report(f"attention by length {words}", 0.6 * (place + 0.6) / len(settings))
            attention += attention_times(precision)
    with _threads(1):
        report("overheads", 0.6)
        layer, step = layer_overhead()
        overhead, elementwise = operator_overhead(), elementwise_bandwidth()
    report("the disk", 0.7)
    written, read = disk_rates()
    report("collectives among 2 and 4 processes", 0.75)
    collectives: list[CollectiveTime] = measure_collectives()
    return {
        "cores": cores,
        "gemm_measured": gemms,
        "attention_measured": attention,
        "collectives_measured": collectives,
        "elementwise_bandwidth_bytes": elementwise,
        "operator_overhead_s": overhead,
        "layer_overhead_s": layer,
        "step_overhead_s": step,
        "disk_write_bytes": written,
        "disk_read_bytes": read,
    }


def gemm_times(precision: Precision, peak: float) -> list[GemmTime]:
    """Time squares and the shapes that training a small network multiplies; those too long at `peak` are left out."""
    squares = [(size, size, size) for size in (128, 256, 512, 1024, 2048, 4096)]
    widths = [(128, 128), (512, 128), (128, 512), (512, 512), (2048, 512), (512, 2048), (4096, 256)]
    forward = [(tokens, n, k) for tokens in (256, 1024, 4096) for n, k in widths]
    gradients = [(n, k, tokens) for tokens in (256, 1024, 4096) for n, k in widths]
    times = []
    for m, n, k in squares + forward + gradients:
        if 2 * m * n * k / peak < _LONGEST_S:
            left, right = (torch.randn(shape).to(_DTYPES[precision]) for shape in ((m, k), (k, n)))
            out = left.new_empty(m, n)
            taken = _shortest(lambda left=left, right=right, out=out: torch.mm(left, right, out=out))  # type: ignore[misc]
            times.append(GemmTime(precision=precision, threads=torch.get_num_threads(), m=m, n=n, k=k, time_s=taken))
    return times


def attention_times(precision: Precision) -> list[AttentionTime]:
    """Time the network's attention, forward and backward, by length, with and without a soft cap."""
    times = []
    batch, heads, kv_heads, head_dim = 2, 4, 2, 64
    for seq_len, softcap in itertools.product((128, 256, 512, 1024), (False, True)):
        queries, keys, values = (
            torch.randn(batch, count, seq_len, head_dim, dtype=_DTYPES[precision], requires_grad=True)
            for count in (heads, kv_heads, kv_heads)
        )
        above = torch.ones_like(queries)

        def both(
            queries: torch.Tensor = queries,
            keys: torch.Tensor = keys,
            values: torch.Tensor = values,
            above: torch.Tensor = above,
            softcap: bool = softcap,
        ) -> None:
            scale = 0.125
            output = attention(queries, keys, values, scale, 30.0 if softcap else None)
            torch.autograd.grad(output, (queries, keys, values), above)

        times.append(
            AttentionTime(
                precision=precision,
                threads=torch.get_num_threads(),
                batch=batch,
                seq_len=seq_len,
                heads=heads,
                kv_heads=kv_heads,
                head_dim=head_dim,
                softcap=softcap,
                time_s=_shortest(both),
            )
        )
    return times


def operator_overhead() -> float:
    """Seconds that one operator takes on tensors of one element, forward and backward together."""
    weight, count = torch.ones(1, requires_grad=True), 200

    def chain() -> None:
        value = weight
        for _ in range(count):
            value = value * 1.0
        value.backward()  # type: ignore[no-untyped-call]

    return _shortest(chain) / count


def elementwise_bandwidth() -> float:
    """Bytes per second that `a + b` of large tensors moves, its result newly allocated."""
    left, right = torch.zeros(1 << 22), torch.ones(1 << 22)
    return 3 * left.nbytes / _shortest(lambda: left + right)


def layer_overhead() -> tuple[float, float]:
    """Seconds that a step takes of a network too small to compute anything: per layer, and beside its layers."""
    few, many = 1, 5
    times = {layers: _shortest(_smallest_step(layers), budget_s=1.0) for layers in (few, many)}
    per_layer = max((times[many] - times[few]) / (many - few), 1e-9)
    return per_layer, max(times[few] - few * per_layer, 1e-9)


def disk_rates(size: int = 1 << 27) -> tuple[float, float]:
    """Bytes per second written to the home folder until they are on the disk, and read back from there.

    Raises
    ------
    OperationError
        If the folder can't be written.
    """
    content = os.urandom(1 << 22)
    try:
        home().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=home(), buffering=0) as file:
            begun = time.perf_counter()
            for _ in range(size // len(content)):
                file.write(content)
            os.fsync(file.fileno())
            written = size / (time.perf_counter() - begun)
            if hasattr(os, "posix_fadvise"):  # else what was written is read from memory
                os.posix_fadvise(file.fileno(), 0, size, os.POSIX_FADV_DONTNEED)
            file.seek(0)
            begun = time.perf_counter()
            while file.read(len(content)):
                pass
            return written, size / (time.perf_counter() - begun)
    except OSError as error:
        raise OperationError(f"the disk's rate cannot be measured in {home()}: {error.strerror}") from error


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
    """This machine's matrix rate in FLOP/s: from the hardware file, else measured once in half a second, by each of
    `processes` at once."""
    if hardware_file().is_file():
        known = device_spec(str(hardware_file())).peak_flops
        if precision in known:
            return known[precision]
    return processes * _matmul_flops_once(precision)


@functools.cache
def _matmul_flops_once(precision: Precision) -> float:
    return matmul_flops(precision, budget_s=0.5)


def _smallest_step(layers: int) -> Callable[[], None]:
    """A training step of a network so small that only overheads remain."""
    spec = ModelSpec(
        name="smallest", layers=layers, hidden=32, ffn_hidden=32, heads=2, kv_heads=2, head_dim=16, vocab=64, context=8
    )
    decoder, tokens = Decoder(spec), torch.zeros(1, 8, dtype=torch.long)
    optimizer = torch.optim.AdamW(decoder.parameters(), fused=True)

    def step() -> None:
        losses = decoder(tokens, tokens)
        assert isinstance(losses, Losses)
        losses.cross_entropy.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _shortest(work: Callable[[], object], budget_s: float = _BUDGET_S) -> float:
    """The shortest of several times of some work, in seconds."""
    shortest, rounds, begun = float("inf"), 0, time.perf_counter()
    deadline = begun + budget_s
    while rounds < 3 or (rounds < _ROUNDS and begun < deadline):
        work()
        taken = time.perf_counter() - begun
        shortest, rounds = min(shortest, taken), rounds + 1
        if rounds >= 2 and taken > _LONGEST_S / 5:
            break
        begun = time.perf_counter()
    return shortest


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    """Let PyTorch compute with so many threads meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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
