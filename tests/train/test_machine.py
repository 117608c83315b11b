"""Measuring this machine: figures that a planner can work with, kept in a file that it reads back."""

from pathlib import Path

import pytest
import torch

from modelworks.spec.files import device_spec
from modelworks.spec.hardware import CollectiveTime
from modelworks.train import machine
from modelworks.train.collectives import SIZES, measure_collectives


def test_a_larger_matrix_product_takes_longer_and_none_beats_the_peak_by_much() -> None:
    torch.set_num_threads(1)
    peak = machine.matmul_flops("fp32", budget_s=0.5)
    times = {(time.m, time.n, time.k): time for time in machine.gemm_times("fp32", peak)}
    assert times[128, 128, 128].time_s < times[512, 512, 512].time_s < times[1024, 1024, 1024].time_s
    assert all(2 * m * n * k / time.time_s < 3 * peak for (m, n, k), time in times.items())


def test_products_that_a_slow_precision_would_take_for_ever_to_measure_are_left_out() -> None:
    assert machine.gemm_times("fp32", peak=1e3) == []


def test_attention_over_longer_sequences_takes_longer() -> None:
    torch.set_num_threads(1)
    times = {(time.seq_len, time.softcap): time.time_s for time in machine.attention_times("fp32")}
    for softcap in (False, True):
        assert times[128, softcap] < times[512, softcap] < times[1024, softcap]


def test_an_operator_takes_less_than_a_layer() -> None:
    operator = machine.operator_overhead()
    layer, step = machine.layer_overhead()
    assert 0 < operator < layer < 1000 * operator
    assert step > 0


def test_the_disk_is_measured_in_the_home_folder_and_leaves_nothing_there(home: Path) -> None:
    written, read = machine.disk_rates(size=1 << 23)
    assert written > 0
    assert read > 0
    assert list(home.iterdir()) == []


@pytest.fixture(scope="module")
def times() -> list[CollectiveTime]:
    """Collectives between two processes."""
    return measure_collectives((2,))


@pytest.mark.slow
def test_collectives_are_measured_by_kind_number_and_size(times: list[CollectiveTime]) -> None:
    assert {(time.kind, time.ranks, time.bytes) for time in times} == {
        (kind, 2, size) for kind in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all") for size in SIZES
    }
    for kind in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all"):
        by_size = {time.bytes: time.time_s for time in times if time.kind == kind}
        assert by_size[1 << 24] > by_size[1 << 12] > 0


@pytest.mark.slow
def test_a_hardware_file_reads_back_as_it_was_measured(
    home: Path, times: list[CollectiveTime], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Shapes that take longer are left out, and no more processes are started.
    monkeypatch.setattr(machine, "_LONGEST_S", 0.01)
    monkeypatch.setattr(machine, "measure_collectives", lambda: times)
    said: list[tuple[str, float]] = []
    device = machine.measure(0.3, lambda what, done: said.append((what, done)), tables=True)
    path = machine.write_hardware_file(device)
    assert device_spec(str(path)) == device
    assert {gemm.precision for gemm in device.gemm_measured} >= {"fp32"}
    assert [done for _, done in said] == sorted(done for _, done in said)
    assert said[-1] == ("done", 1.0)
