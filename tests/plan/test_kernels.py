"""Kernel times keep what physics demands of them and come near the timings that they were distilled from."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelworks.plan.kernels import Kernels, Surface, kernels_for
from modelworks.spec import InputError, device_spec
from modelworks.spec.catalog import entry, names

MEASURED = ["a100-80gb", "b200", "gb200-nvl72", "h100-sxm", "h200-sxm"]
KINDS = ["all_gather", "reduce_scatter", "all_reduce", "all_to_all"]

# Rows of aiconfigurator-core 0.12.0 (NVIDIA, Apache-2.0), systems/data/, in milliseconds as stated there. Products in
# bf16, (m, n, k): the median of gemm/{trtllm,vllm,sglang}. Causal attention in bf16, (batch, length, heads, kv heads,
# head dimension): the fastest of attention/{trtllm,vllm,sglang}. Collectives, (bytes of the full tensor, ranks):
# comm/nccl/2.29.2 (A100: 2.27.3).
ROWS: list[tuple[str, str, tuple[int, ...], float]] = [
    ("a100-80gb", "gemm", (1024, 4096, 4096), 0.20449),
    ("a100-80gb", "gemm", (2048, 10240, 8192), 1.2396),
    ("a100-80gb", "gemm", (4096, 12288, 3072), 1.2474),
    ("a100-80gb", "gemm", (8192, 8192, 8192), 4.1885),
    ("a100-80gb", "gemm", (8192, 1024, 6144), 0.45838),
    ("a100-80gb", "gemm", (16384, 5120, 5120), 3.4747),
    ("a100-80gb", "attention", (1, 4096, 32, 8, 128), 0.84197),
    ("a100-80gb", "attention", (2, 8192, 16, 16, 128), 3.0233),
    ("a100-80gb", "attention", (4, 2048, 32, 32, 128), 0.98402),
    ("a100-80gb", "attention", (1, 16384, 8, 1, 128), 2.8781),
    ("a100-80gb", "all_gather", (33554432, 8), 0.2176),
    ("a100-80gb", "reduce_scatter", (134217728, 8), 0.624),
    ("a100-80gb", "all_reduce", (8388608, 8), 0.128),
    ("a100-80gb", "all_to_all", (33554432, 8), 0.1913),
    ("h100-sxm", "gemm", (1024, 4096, 4096), 0.045341),
    ("h100-sxm", "gemm", (2048, 10240, 8192), 0.43057),
    ("h100-sxm", "gemm", (4096, 12288, 3072), 0.39982),
    ("h100-sxm", "gemm", (8192, 8192, 8192), 1.5417),
    ("h100-sxm", "gemm", (8192, 1024, 6144), 0.12931),
    ("h100-sxm", "gemm", (16384, 5120, 5120), 1.2474),
    ("h100-sxm", "attention", (1, 4096, 32, 8, 128), 0.25337),
    ("h100-sxm", "attention", (2, 8192, 16, 16, 128), 0.96608),
    ("h100-sxm", "attention", (4, 2048, 32, 32, 128), 0.37113),
    ("h100-sxm", "attention", (1, 16384, 8, 1, 128), 0.85356),
    ("h100-sxm", "all_gather", (33554432, 8), 0.12546),
    ("h100-sxm", "reduce_scatter", (134217728, 8), 0.38218),
    ("h100-sxm", "all_reduce", (8388608, 8), 0.07891),
    ("h100-sxm", "all_to_all", (33554432, 8), 0.1249),
    ("h200-sxm", "gemm", (1024, 4096, 4096), 0.045771),
    ("h200-sxm", "gemm", (2048, 10240, 8192), 0.47367),
    ("h200-sxm", "gemm", (4096, 12288, 3072), 0.40051),
    ("h200-sxm", "gemm", (8192, 8192, 8192), 1.6404),
    ("h200-sxm", "gemm", (8192, 1024, 6144), 0.12762),
    ("h200-sxm", "gemm", (16384, 5120, 5120), 1.1593),
    ("h200-sxm", "attention", (1, 4096, 32, 8, 128), 0.26553),
    ("h200-sxm", "attention", (2, 8192, 16, 16, 128), 1.0058),
    ("h200-sxm", "attention", (4, 2048, 32, 32, 128), 0.37186),
    ("h200-sxm", "attention", (1, 16384, 8, 1, 128), 0.84197),
    ("h200-sxm", "all_gather", (33554432, 8), 0.12338),
    ("h200-sxm", "reduce_scatter", (134217728, 8), 0.37559),
    ("h200-sxm", "all_reduce", (8388608, 8), 0.0783),
    ("h200-sxm", "all_to_all", (33554432, 8), 0.12412),
    ("b200", "gemm", (1024, 4096, 4096), 0.024727),
    ("b200", "gemm", (2048, 10240, 8192), 0.25038),
    ("b200", "gemm", (4096, 12288, 3072), 0.19525),
    ("b200", "gemm", (8192, 8192, 8192), 0.6997),
    ("b200", "gemm", (8192, 1024, 6144), 0.072179),
    ("b200", "gemm", (16384, 5120, 5120), 0.52989),
    ("b200", "attention", (1, 4096, 32, 8, 128), 0.15372),
    ("b200", "attention", (2, 8192, 16, 16, 128), 0.47862),
    ("b200", "attention", (4, 2048, 32, 32, 128), 0.14143),
    ("b200", "attention", (1, 16384, 8, 1, 128), 0.50286),
    ("b200", "all_gather", (33554432, 8), 0.11375),
    ("b200", "reduce_scatter", (134217728, 8), 0.20804),
    ("b200", "all_reduce", (8388608, 8), 0.07158),
    ("b200", "all_to_all", (33554432, 8), 0.0888),
    ("gb200-nvl72", "gemm", (1024, 4096, 4096), 0.022572),
    ("gb200-nvl72", "gemm", (2048, 10240, 8192), 0.21931),
    ("gb200-nvl72", "gemm", (4096, 12288, 3072), 0.17676),
    ("gb200-nvl72", "gemm", (8192, 8192, 8192), 0.78123),
    ("gb200-nvl72", "gemm", (8192, 1024, 6144), 0.063832),
    ("gb200-nvl72", "gemm", (16384, 5120, 5120), 0.50265),
    ("gb200-nvl72", "attention", (1, 4096, 32, 8, 128), 0.15131),
    ("gb200-nvl72", "attention", (2, 8192, 16, 16, 128), 0.51832),
    ("gb200-nvl72", "attention", (4, 2048, 32, 32, 128), 0.18771),
    ("gb200-nvl72", "attention", (1, 16384, 8, 1, 128), 0.48414),
    ("gb200-nvl72", "all_gather", (33554432, 4), 0.07186),
    ("gb200-nvl72", "reduce_scatter", (134217728, 4), 0.19992),
    ("gb200-nvl72", "all_reduce", (8388608, 4), 0.08793),
    ("gb200-nvl72", "all_to_all", (33554432, 4), 0.07423),
]


def predicted(device: str, kind: str, shape: tuple[int, ...]) -> float:
    kernels = kernels_for(device_spec(device))
    if kind == "gemm":
        m, n, k = shape
        return float(kernels.gemm(m, n, k, "bf16"))
    if kind == "attention":
        batch, length, heads, kv_heads, head_dim = shape
        return float(kernels.attention(batch, length, length, heads, kv_heads, head_dim, True, "bf16"))
    size, ranks = shape
    return float(kernels.collective(kind, size, ranks))  # type: ignore[arg-type]


@pytest.fixture(params=[*MEASURED, "local"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return kernels_for(device_spec(request.param))


@pytest.mark.parametrize("device", MEASURED)
@pytest.mark.parametrize(("kind", "median", "worst"), [("gemm", 0.06, 0.20), ("attention", 0.10, 0.30)])
def test_products_and_attention_come_as_near_to_measured_rows_as_the_catalog_states(
    device: str, kind: str, median: float, worst: float
) -> None:
    errors = [
        abs(predicted(device, kind, shape) / (milliseconds * 1e-3) - 1.0)
        for of, row_kind, shape, milliseconds in ROWS
        if (of, row_kind) == (device, kind)
    ]
    assert len(errors) >= 4
    assert np.median(errors) < median
    assert max(errors) < worst


@pytest.mark.parametrize("device", MEASURED)
def test_collectives_come_within_a_tenth_of_measured_rows(device: str) -> None:
    rows = [row for row in ROWS if row[0] == device and row[1] in KINDS]
    assert len(rows) == 4
    for _, kind, shape, milliseconds in rows:
        assert predicted(device, kind, shape) == pytest.approx(milliseconds * 1e-3, rel=0.1), kind


def test_only_devices_with_a_table_of_their_own_count_as_measured() -> None:
    assert sorted(name for name in names("hardware") if kernels_for(device_spec(name)).measured) == MEASURED
    unknown = device_spec("h100-sxm").model_copy(update={"name": "another"})
    assert not kernels_for(unknown).measured


def test_typical_efficiencies_come_near_measured_ones_for_large_shapes() -> None:
    for name in MEASURED:
        own = kernels_for(device_spec(name))
        typical = kernels_for(own.device.model_copy(update={"name": "another"}))
        assert float(typical.gemm(8192, 8192, 8192, "bf16") / own.gemm(8192, 8192, 8192, "bf16")) == pytest.approx(
            1.0, abs=0.25
        )
        assert float(typical.memory_bound(1e9) / own.memory_bound(1e9)) == pytest.approx(1.0, abs=0.15)
        for kind in KINDS:
            time = typical.collective(kind, 1e9, 4) / own.collective(kind, 1e9, 4)  # type: ignore[arg-type]
            assert float(time) == pytest.approx(1.0, abs=0.3), kind


sizes = st.integers(0, 20).map(lambda power: float(2**power)) | st.floats(1.0, 1e6)


@given(m=sizes, n=sizes, k=sizes)
def test_a_product_is_never_faster_than_the_peak_or_the_memory_allows(m: float, n: float, k: float) -> None:
    for name in [*MEASURED, "local"]:
        kernels = kernels_for(device_spec(name))
        time = float(kernels.gemm(m, n, k, "bf16"))
        assert time >= 2.0 * m * n * k / kernels.device.peak_flops["bf16"]
        assert time >= 2.0 * (m * k + k * n + m * n) / kernels.device.memory_bandwidth_bytes
        assert np.isfinite(time)


@given(batch=st.integers(1, 64), length=st.integers(1, 1_000_000), heads=st.integers(1, 128))
def test_attention_is_never_faster_than_the_peak_allows_and_a_mask_never_slows_long_sequences(
    batch: int, length: int, heads: int
) -> None:
    for name in [*MEASURED, "local"]:
        kernels = kernels_for(device_spec(name))
        causal, full = kernels.attention(batch, length, length, heads, heads, 128, [True, False], "bf16")
        flop = 2.0 * batch * heads * 128 * length * (length + 1.0)
        assert causal >= flop / kernels.device.peak_flops["bf16"]
        if length >= 1024:  # below, the surface knows masked attention alone and overstates the other's speed
            assert causal <= full


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_larger_product_takes_no_less_time_but_for_the_hardwares_tiles(kernels: Kernels, axis: int) -> None:
    rng = np.random.default_rng(axis)
    shape = [2.0 ** rng.uniform(7, 17, 4000) for _ in range(3)]
    larger = [size * (1.5 if index == axis else 1.0) for index, size in enumerate(shape)]
    ratio = kernels.gemm(*larger, "bf16") / kernels.gemm(*shape, "bf16")  # type: ignore[call-arg]
    assert np.quantile(ratio, 0.01) > 0.9
    assert ratio.min() > 0.7


def test_more_bytes_and_longer_sequences_take_no_less_time(kernels: Kernels) -> None:
    size = 2.0 ** np.arange(10, 36, 0.25)
    time = kernels.memory_bound(size)  # the second-level cache makes a step near its own size
    assert np.all(time[1:] > 0.9 * time[:-1])
    assert np.all(np.diff(time[size >= 1e8]) > 0.0)
    length = 2.0 ** np.arange(9, 20, 0.25)
    for causal in (True, False):
        time = kernels.attention(1, length, length, 32, 8, 128, causal, "bf16")
        assert np.all(np.diff(time) > 0.0)
    for kind in KINDS:
        time = kernels.collective(kind, size, 8)  # type: ignore[arg-type]
        assert np.all(time[1:] > 0.8 * time[:-1]), kind
        assert np.all(np.diff(time[size >= 1e6]) > 0.0), kind


def test_beyond_the_measured_shapes_time_grows_as_the_arithmetic_does(kernels: Kernels) -> None:
    edge, beyond = kernels.gemm([65536.0, 1e6], [65536.0, 1e6], [65536.0, 1e6], "bf16")
    assert beyond / edge == pytest.approx((1e6 / 65536) ** 3, rel=1e-3)
    two, eight = kernels.attention(1, [2**18, 2**19], [2**18, 2**19], 64, 8, 128, True, "bf16")
    assert eight / two == pytest.approx(4.0, rel=1e-3)
    for kind in KINDS:
        small, large = kernels.collective(kind, [1e10, 1e11], 8)  # type: ignore[arg-type]
        assert large / small == pytest.approx(10.0, rel=0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_a_collective_never_beats_its_links_and_more_ranks_take_no_less_time(kernels: Kernels, kind: Any) -> None:
    ranks = np.array([2, 4, 8, 16, 32, 72])
    for size in (1e8, 1e9, 1e10):
        time = kernels.collective(kind, size, ranks)
        assert kernels.link_bandwidth_bytes is not None
        # Switches that reduce (NVLink SHARP) send each byte of an all-reduce once, so once is the bound for all kinds.
        assert np.all(time >= (ranks - 1) / ranks * size / kernels.link_bandwidth_bytes)
        assert np.all(time[1:] >= 0.75 * time[:-1])
    assert kernels.collective(kind, 1e9, 1) == 0.0


def test_grouping_products_costs_no_less_than_one_product_of_all_rows(kernels: Kernels) -> None:
    groups, m = np.meshgrid([1, 2, 8, 64, 256], [16, 128, 1024, 8192])
    grouped = kernels.grouped_gemm(groups, m, 4096, 4096, "bf16")
    assert np.all(grouped >= kernels.gemm(groups * m, 4096, 4096, "bf16") * 0.999)


def test_every_precision_uses_its_own_peak() -> None:
    kernels = kernels_for(device_spec("h100-sxm"))
    bf16, fp16, fp8, block = (
        float(kernels.gemm(8192, 8192, 8192, precision)) for precision in ("bf16", "fp16", "fp8", "fp8_block")
    )
    assert bf16 == fp16
    assert 1.4 < bf16 / fp8 < 2.4
    assert 1.3 < bf16 / block < 2.2
    assert float(kernels.gemm(8192, 8192, 8192, "fp32")) > 10 * bf16
    with pytest.raises(InputError, match=r"fp8.*a100-80gb.*bf16"):
        kernels_for(device_spec("a100-80gb")).gemm(128, 128, 128, "fp8")


def test_a_shape_of_zero_or_an_unknown_collective_is_refused_in_one_sentence() -> None:
    kernels = kernels_for(device_spec("h100-sxm"))
    with pytest.raises(InputError, match="n = 0 is not accepted"):
        kernels.gemm(128, [0, 128], 128, "bf16")
    with pytest.raises(InputError, match="'broadcast'"):
        kernels.collective("broadcast", 1e6, 8)  # type: ignore[arg-type]


def test_arguments_broadcast_and_agree_with_single_lookups() -> None:
    kernels = kernels_for(device_spec("b200"))
    rng = np.random.default_rng(0)
    m, n, k = rng.integers(1, 100_000, (3, 70_000))  # more than one pass of a lookup
    times = kernels.gemm(m, n, k, "bf16")
    for index in (0, 32_767, 32_768, 69_999):
        assert times[index] == pytest.approx(float(kernels.gemm(m[index], n[index], k[index], "bf16")), rel=1e-12)
    assert kernels.gemm(m[:5, None], n[None, :7], 4096, "bf16").shape == (5, 7)


def test_a_surface_returns_its_nodes_and_halves_between_them_in_logarithms() -> None:
    surface = Surface.read({"first": [3, 0], "step": [1, 2], "shape": [2, 3], "efficiency": "100 200 400\n500 600 700"})
    assert surface.at(8.0, [1.0, 4.0, 16.0]) == pytest.approx([0.1, 0.2, 0.4])
    assert float(surface.at(16.0, 2.0)) == pytest.approx(np.sqrt(0.5 * 0.6))
    assert float(surface.at(1e9, 1e9)) == pytest.approx(0.7)
    with pytest.raises(InputError, match="shape"):
        Surface.read({"first": [0], "step": [1], "shape": [3], "efficiency": "100 200"})


def test_every_table_is_small_and_says_where_it_comes_from() -> None:
    for name in names("kernels"):
        found = entry("kernels", name)
        if name in MEASURED:
            assert "Apache-2.0" in found.provenance.source
            assert "error" in str(found.provenance.of("gemm.bf16").note)


def test_kernel_times_need_no_heavy_import() -> None:
    code = "import sys, modelworks.plan.kernels; print(sorted({'torch', 'scipy', 'pandas'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
