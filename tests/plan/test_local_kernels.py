"""This machine's kernel times are what was measured, and what lies between and beyond it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelworks.plan.kernels import kernels_for
from modelworks.plan.local import LocalKernels, measured_on, with_overheads
from modelworks.plan.planner import plan, software_spec
from modelworks.spec.files import run_from
from modelworks.spec.hardware import AttentionTime, CollectiveTime, DeviceSpec, GemmTime
from modelworks.spec.home import hardware_file

RATE = 1e11
"""FLOP/s of the large products below; small ones reach less."""


def _gemm_time(m: int, n: int, k: int, threads: int) -> float:
    return 2 * m * n * k / (RATE * threads) + 20e-6


def _device(**changed: Any) -> DeviceSpec:
    """A machine of two cores that was measured, with times that one can work out by hand."""
    sizes = [(m, n, k) for m in (128, 512, 2048) for n in (128, 512, 2048) for k in (128, 512, 2048)]
    values: dict[str, Any] = {
        "name": "local",
        "kind": "cpu",
        "peak_flops": {"fp32": 2 * RATE, "bf16": 2 * RATE},
        "memory_bytes": 16_000_000_000,
        "memory_bandwidth_bytes": 2e10,
        "power_w": 65.0,
        "cores": 2,
        "gemm_measured": [
            GemmTime(precision="fp32", threads=threads, m=m, n=n, k=k, time_s=_gemm_time(m, n, k, threads))
            for threads in (1, 2)
            for m, n, k in sizes
        ],
        "attention_measured": [
            AttentionTime(
                precision="fp32", threads=threads, batch=2, seq_len=seq, heads=4, kv_heads=2, head_dim=64,
                softcap=softcap, time_s=(1 + softcap) * seq**2 * 1e-8 / threads,
            )
            for threads in (1, 2)
            for seq in (128, 512, 1024)
            for softcap in (False, True)
        ],
        "collectives_measured": [
            CollectiveTime(kind=kind, ranks=ranks, bytes=size, time_s=ranks * (1e-4 + size * 1e-9))
            for kind in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
            for ranks in (2, 4)
            for size in (4096, 1 << 20, 1 << 24)
        ],
        "elementwise_bandwidth_bytes": 1e10,
        "operator_overhead_s": 5e-6,
        "layer_overhead_s": 6e-4,
        "step_overhead_s": 1e-3,
    }  # fmt: skip
    return DeviceSpec(**(values | changed))


def _kernels(processes: int = 1, **changed: Any) -> LocalKernels:
    found = measured_on(_device(**changed), processes)
    assert isinstance(found, LocalKernels)
    return found


def test_a_product_that_was_measured_takes_what_it_took() -> None:
    device = _device()
    for processes, threads in ((1, 2), (2, 1)):
        kernels = _kernels(processes)
        for row in (row for row in device.gemm_measured if row.threads == threads):
            assert kernels.gemm(row.m, row.n, row.k, "fp32") == pytest.approx(row.time_s, rel=1e-6)


def test_attention_that_was_measured_takes_both_passes_what_it_took() -> None:
    kernels = _kernels()
    for row in (row for row in _device().attention_measured if row.threads == 2):
        passes = kernels.attention_passes(
            row.batch, row.seq_len, row.heads, row.kv_heads, row.head_dim, "fp32", 2.5, row.softcap
        )
        assert passes[0] + passes[1] == pytest.approx(row.time_s, rel=1e-6)
        assert passes[1] == pytest.approx(2.5 * passes[0])


def test_exchanges_that_were_measured_take_what_they_took_and_none_takes_nothing() -> None:
    kernels = _kernels(4)
    for row in _device().collectives_measured:
        assert kernels.collective(row.kind, row.bytes, row.ranks) == pytest.approx(row.time_s, rel=1e-6)
    assert kernels.collective("all_reduce", 1e6, 1) == 0.0
    assert kernels.collective("all_reduce", 0.0, 4) == 0.0


@given(
    st.tuples(*[st.floats(64, 8192)] * 3),
    st.integers(0, 2),
    st.floats(1.5, 8.0),
)
def test_a_larger_product_takes_longer(shape: tuple[float, float, float], grown: int, factor: float) -> None:
    kernels = _kernels()
    larger = tuple(size * (factor if place == grown else 1.0) for place, size in enumerate(shape))
    m, n, k = larger
    assert kernels.gemm(m, n, k, "fp32") > kernels.gemm(shape[0], shape[1], shape[2], "fp32")


@given(st.floats(1.0, 1e9), st.floats(1.01, 100.0), st.sampled_from([2, 3, 4, 8]))
def test_more_bytes_and_more_ranks_take_no_less(size: float, factor: float, ranks: int) -> None:
    kernels = _kernels(4)
    once = kernels.collective("all_gather", size, ranks)
    assert kernels.collective("all_gather", size * factor, ranks) >= once * (1 - 1e-12)
    assert kernels.collective("all_gather", size, ranks + 1) >= once


def test_more_processes_than_cores_take_turns() -> None:
    two, four = _kernels(2), _kernels(4)
    assert (two.threads, two.slowdown) == (1, 1.0)
    assert (four.threads, four.slowdown) == (1, 2.0)
    assert four.gemm(512, 512, 512, "fp32") == pytest.approx(2 * two.gemm(512, 512, 512, "fp32"))
    assert four.memory_bound(1e8) == pytest.approx(2 * two.memory_bound(1e8))
    assert four.collective("all_reduce", 1e6, 2) == two.collective("all_reduce", 1e6, 2)


def test_operators_move_bytes_at_the_measured_rate_of_each_thread() -> None:
    assert _kernels(2).memory_bound(1e10) == pytest.approx(1.0)
    assert _kernels(1).memory_bound(1e10) == pytest.approx(0.5)


def test_threads_that_were_not_measured_lie_between_those_that_were() -> None:
    kernels = replace(_kernels(1, cores=8), threads=4)
    assert kernels.gemm(2048, 2048, 2048, "fp32") == pytest.approx(_kernels().gemm(2048, 2048, 2048, "fp32"))
    three = _gemm_time(512, 512, 512, 1)
    between = replace(
        _kernels(2, gemm_measured=[
            GemmTime(precision="fp32", threads=threads, m=512, n=512, k=512, time_s=three / threads)
            for threads in (1, 4)
        ]), threads=2,
    )  # fmt: skip
    assert between.gemm(512, 512, 512, "fp32") == pytest.approx(three / 2)


@pytest.mark.parametrize(
    ("missing", "timed"),
    [
        ("gemm_measured", lambda kernels: kernels.gemm(512, 512, 512, "fp32")),
        ("attention_measured", lambda kernels: kernels.attention_passes(2, 512, 4, 2, 64, "fp32", 2.5)[0]),
        ("collectives_measured", lambda kernels: kernels.collective("all_reduce", 1e6, 2)),
        ("elementwise_bandwidth_bytes", lambda kernels: kernels.memory_bound(1e7)),
    ],
)
def test_what_was_not_measured_falls_back_to_typical_efficiencies(missing: str, timed: Any) -> None:
    empty: Any = None if missing == "elementwise_bandwidth_bytes" else []
    device = _device(**{missing: empty})
    assert timed(measured_on(device)) == pytest.approx(timed(kernels_for(device)))
    assert timed(measured_on(device)) != pytest.approx(timed(measured_on(_device())))


def test_a_machine_that_was_not_measured_has_typical_kernels() -> None:
    stand_in = measured_on(_device(cores=None))
    assert type(stand_in) is type(kernels_for(_device()))
    assert not stand_in.measured


def test_measured_overheads_stand_instead_of_the_catalogs() -> None:
    software = software_spec("modelworks")
    alone, crowded = (with_overheads(software, _device(), processes) for processes in (1, 4))
    assert alone.launch_s * 3 * software.kernels_per_layer == pytest.approx(6e-4)
    assert alone.step_host_s == pytest.approx(1e-3)
    assert crowded.launch_s == pytest.approx(2 * alone.launch_s)
    assert with_overheads(software, _device(cores=None)) == software


def _run(processes: int, **train: Any) -> Any:
    model = {
        "layers": 3, "hidden": 256, "ffn_hidden": 512, "heads": 4, "kv_heads": 2, "head_dim": 64, "vocab": 1024,
        "context": 512,
    }  # fmt: skip
    return run_from({
        "name": "local-run",
        "model": model,
        "train": {"tokens": 100_000, "seq_len": 512, "global_batch": 8, "micro_batch": 2, "precision": "fp32"} | train,
        "parallel": {"data": processes, "tensor": 1, "pipeline": 1, "context": 1, "zero_stage": 1},
        "cluster": {"gpus": processes, "gpus_per_node": processes, "scale_up_domain": processes},
    })  # fmt: skip


def test_a_step_on_several_processes_is_their_computation_one_exchange_each_way_and_overheads() -> None:
    device = _device()
    one, two, four = (plan(_run(count), device=device).best.reasons for count in (1, 2, 4))
    # Of two processes each has half of the micro batches and of the threads; of four, half of that and half a core.
    for reason in ("matmul", "attention", "memory"):
        assert four[reason] == pytest.approx(two[reason])
    assert two["memory"] == pytest.approx(one["memory"])
    assert one["data"] == 0.0
    kernels = measured_on(device, 2)
    weights = 4.0 * _run(2).model.parameters.total
    messages = 3 + 1
    sent = weights / messages
    exchanged = kernels.collective("all_gather", sent, 2) + kernels.collective("reduce_scatter", sent, 2)
    copied = 2 * kernels.memory_bound(weights * software_spec("modelworks").exchange_copies)
    launched = 2 * messages * software_spec("modelworks").exchange_kernels * 6e-4 / (3 * 66)
    expected = messages * exchanged + copied + launched
    assert two["data"] == pytest.approx(float(expected))
    # Launching adds to computing, since the processor is its own host: 4 micro batches of 3 layers.
    assert one["launch"] == pytest.approx(4 * 3 * 6e-4)
    assert one["host"] == pytest.approx(1e-3)


def test_capped_logits_take_the_time_of_the_attention_that_caps_them() -> None:
    run = _run(1)
    capped = run.model_copy(update={"model": run.model.model_copy(update={"attention_softcap": 30.0})})
    device = _device()
    plain, softened = (plan(each, device=device).best.reasons["attention"] for each in (run, capped))
    assert softened == pytest.approx(2 * plain)


def test_a_plan_says_whether_this_machine_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELWORKS_HOME", str(tmp_path))
    assert any("modelworks bench" in note for note in plan(_run(1)).notes)
    import tomli_w

    values = _device(name="A processor").model_dump(mode="json", exclude_none=True)
    source = {"source": "modelworks bench on a machine, 2 threads, 2026-11-24 12:00 UTC", "certainty": "estimated"}
    hardware_file().write_text(tomli_w.dumps(values | {"provenance": source}), encoding="utf-8")
    notes = plan(_run(1)).notes
    assert any("measured by modelworks bench" in note and "2026-11-24" in note for note in notes)
    assert not np.any(["typical" in note for note in notes])
