"""Distils the measured kernel timings of `aiconfigurator-core` into the catalog's efficiency surfaces.

    pip download --no-deps aiconfigurator-core==0.12.0
    python tools/distill_kernels.py aiconfigurator_core-0.12.0-*.whl [--device h100-sxm ...]

It writes `src/modelworks/spec/catalog/kernels/DEVICE.toml` and prints the surfaces' errors against the raw rows: of the
rows fitted, and of a tenth that a first fit doesn't see. `plan/kernels.py` defines what an efficiency is; this file
only fits it, so what is written is what is read. A fit is multilinear in the logarithms, by weighted least absolute
deviations (iterated least squares) with a little smoothness, which also fills cells without rows. Needs pandas and
pyarrow.
"""

from __future__ import annotations

import argparse
import io
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from modelworks.plan.kernels import Kernels, Link, Surface, kernels_for
from modelworks.spec import device_spec

Array = NDArray[np.float64]
CATALOG = Path(__file__).parents[1] / "src" / "modelworks" / "spec" / "catalog" / "kernels"
PACKAGE = "aiconfigurator-core 0.12.0"
SOURCE = (
    f"{PACKAGE} (NVIDIA, Apache-2.0), https://pypi.org/project/aiconfigurator-core/, "
    "systems/data/{folder}, distilled by tools/distill_kernels.py"
)
SYSTEMS = {
    "h100-sxm": "h100_sxm",  # first: A100 has no fp8 casts and no balanced experts, and borrows these curves
    "a100-80gb": "a100_sxm",
    "h200-sxm": "h200_sxm",
    "b200": "b200_sxm",
    "gb200-nvl72": "gb200",
}
LAUNCH_S = 1e-6
"""The kernels' latency in the references; a round number below the shortest measured kernels (1.2 to 2.5 us), so that
their efficiencies stay below one."""
WELL_RUN = 0.8
"""Share of the roofline that a narrow product reaches, where its cast is to be told apart from it."""
HELD_OUT = 0.1
PRODUCT = Surface((0.0, 5.0, 5.0), (1.0, 1.0, 1.0), (16, 12, 12), np.zeros(2304))
GROUPING = Surface((0.0, 5.0), (1.0, 2.0), (13, 5), np.zeros(65))
ATTENTION = Surface((6.0, 5.0, 5.0), (1.0, 1.0, 1.0), (3, 18, 10), np.zeros(540))
LATENT = Surface((5.0, 5.0), (1.0, 1.0), (18, 12), np.zeros(216))
STREAM = Surface((16.0,), (1.0,), (17,), np.zeros(17))
LINK = Surface((9.0, 1.0), (1.0, 1.0), (21, 3), np.zeros(63))
KINDS = {
    "all_gather": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "all_reduce": "all_reduce",
    "all_to_all": "alltoall",
}


@dataclass
class Fit:
    """One surface as fitted, and how far it is from its rows."""

    surface: Surface
    note: str


class Package:
    """The package's tables, in a wheel or unpacked."""

    def __init__(self, path: Path) -> None:
        self._wheel = zipfile.ZipFile(path) if path.is_file() else None
        self._root = path
        if self._wheel is not None:
            self._names = self._wheel.namelist()
        else:
            self._names = [str(found.relative_to(path)) for found in path.rglob("*.parquet")]

    def tables(self, folder: str, kind: str, file: str) -> dict[str, pd.DataFrame]:
        """All tables of one kind by framework (NCCL's by version); of a framework's versions the one with most rows."""
        prefix = f"systems/data/{folder}/{kind}/"
        found: dict[str, pd.DataFrame] = {}
        for name in sorted(self._names):
            if prefix in name and name.endswith(f"/{file}"):
                framework, table = name.split(prefix)[1].split("/")[0], self._read(name)
                if len(table) >= len(found.get(framework, ())):
                    found[framework] = table
        return found

    def _read(self, name: str) -> pd.DataFrame:
        content = self._wheel.read(name) if self._wheel is not None else (self._root / name).read_bytes()
        table = pd.read_parquet(io.BytesIO(content))
        table["seconds"] = table["latency"] * 1e-3
        return table[table["seconds"] > 0.0]


def fitted(
    grid: Surface, arguments: list[Array], efficiency: Array, weight: Array | None = None, smooth: float = 0.1
) -> Surface:
    """The grid with the values that come nearest to the measured efficiencies, in the mean absolute logarithm."""
    target = np.log(np.minimum(efficiency, 1.0))
    nodes = grid.log_efficiency.size
    corners = grid.corners(*arguments)
    rough = _roughness(grid.shape) * smooth + 1e-6 * np.eye(nodes)
    given = np.ones(target.size) if weight is None else weight
    value, used = np.zeros(nodes), given
    for _ in range(5):
        normal, right = rough.ravel().copy(), np.zeros(nodes)
        for node, share in corners:
            right += np.bincount(node, used * share * target, nodes)
            for other, other_share in corners:
                normal += np.bincount(node * nodes + other, used * share * other_share, nodes * nodes)
        value = np.linalg.solve(normal.reshape(nodes, nodes), right)
        residual = target - sum(share * value[node] for node, share in corners)
        used = given * 0.03 / np.maximum(np.abs(residual), 0.03)
    thousandths = np.clip(np.rint(1000.0 * np.exp(value)), 1, 1000)
    return replace(grid, log_efficiency=np.log(thousandths / 1000.0))


def _roughness(shape: tuple[int, ...]) -> Array:
    """Squared second differences along each axis, and a third of the squared first ones, as a matrix over the nodes.

    The second smooth; the first let a surface level off where there are no rows, instead of running on.
    """
    size = int(np.prod(shape))
    index = np.arange(size).reshape(shape)
    matrix = np.zeros((size, size))
    for axis in range(len(shape)):
        moved = np.moveaxis(index, axis, 0)
        for factors, strength in (((1.0, -2.0, 1.0), 1.0), ((1.0, -1.0), 1.0 / 3.0)):
            span = len(factors) - 1
            parts = [moved[start : moved.shape[0] - span + start].ravel() for start in range(span + 1)]
            for left, left_factor in zip(parts, factors, strict=True):
                for right, right_factor in zip(parts, factors, strict=True):
                    np.add.at(matrix, (left, right), strength * left_factor * right_factor)
    return matrix


def distilled(
    label: str,
    grid: Surface,
    arguments: list[Array],
    reference: Array,
    seconds: Array,
    *,
    focus: NDArray[np.bool_] | None = None,
    smooth: float = 0.1,
) -> Fit:
    """Fit all rows; state the error of all, and of a tenth held out of another fit. `focus`: the shapes of training."""
    chosen = np.ones(seconds.size, dtype=bool) if focus is None else focus
    weight = np.where(chosen, 4.0, 1.0)
    held = np.random.default_rng(0).random(seconds.size) < HELD_OUT
    efficiency = reference / seconds

    def errors(surface: Surface, rows: NDArray[np.bool_]) -> str:
        error = np.abs(reference / surface.at(*arguments) / seconds - 1.0)[rows]
        return f"{np.median(error):.1%} / {np.quantile(error, 0.9):.1%}" if error.size else "-"

    trial = fitted(grid, [given[~held] for given in arguments], efficiency[~held], weight[~held], smooth)
    final = fitted(grid, arguments, efficiency, weight, smooth)
    note = (
        f"{seconds.size:,} rows; median / p90 error {errors(final, chosen)}, held out {errors(trial, held & chosen)}"
        + (
            ""
            if focus is None
            else f" for training's shapes ({chosen.sum():,} rows), all {errors(final, ~chosen | chosen)}"
        )
    )
    print(f"  {label:32s} {note}", flush=True)
    return Fit(final, note)


def products(package: Package, folder: str, kernels: Kernels) -> dict[str, Fit]:
    """Dense products.

    bf16: all frameworks call cuBLAS, so the median of theirs. fp8 and fp8_block: every framework has its own kernel,
    and its times include scaling and casting the activations. The narrowest product, n = 128, is nearly all cast, so
    its time beyond a well-run product's is taken off all others of the same m and k; then the fastest framework counts.
    """
    tables = package.tables(folder, "gemm", "gemm_perf.parquet")
    shape = ["m", "n", "k"]
    bf16 = pd.concat([table[table.gemm_dtype == "bfloat16"] for table in tables.values()])
    found = {"bf16": bf16.groupby(shape).seconds.median().reset_index()}
    if "fp8" in kernels.device.peak_flops:
        for precision in ("fp8", "fp8_block"):
            alone = [_without_cast(table[table.gemm_dtype == precision], kernels) for table in tables.values()]
            found[precision] = pd.concat(alone).groupby(shape).seconds.min().reset_index()
    fits = {}
    for precision, rows in found.items():
        m, n, k = (rows[axis].to_numpy(float) for axis in shape)
        reference = kernels._product_roofline(1.0, m, n, k, precision) + LAUNCH_S
        focus = (m >= 512) & (n >= 256) & (k >= 256)
        fits[precision] = distilled(
            f"gemm {precision}", PRODUCT, [m, n, k], reference, rows.seconds.to_numpy(float), focus=focus
        )
    return fits


def _without_cast(rows: pd.DataFrame, kernels: Kernels) -> pd.DataFrame:
    """The rows less the time of the cast, where that leaves most of it."""
    narrow = rows[rows.n == 128].groupby(["m", "k"]).seconds.median()
    m, k = (narrow.index.get_level_values(axis).to_numpy(float) for axis in ("m", "k"))
    well_run = kernels._product_roofline(1.0, m, np.full(m.size, 128.0), k, "fp8") / WELL_RUN + 2.0 * LAUNCH_S
    cast = (narrow - well_run).clip(lower=0.0)
    cast = rows.set_index(["m", "k"]).index.map(cast).to_numpy(float)
    alone = rows.assign(seconds=rows.seconds - cast)
    return alone[(rows.n > 128) & (cast < 0.5 * rows.seconds.to_numpy(float))]


def attention(package: Package, folder: str, kernels: Kernels) -> dict[str, Fit]:
    """Fused attention: of each shape the fastest framework's kernel, since a training run would choose it too."""
    flat = replace(kernels, fused_attention=_flat(3), latent_attention=_flat(2))
    tables = []
    for table in package.tables(folder, "attention", "context_attention_perf.parquet").values():
        rows = table[(table.attn_dtype == "bfloat16") & (table.kv_cache_dtype == "bfloat16") & (table.head_dim <= 256)]
        rows = rows[rows["window_size"] == 0] if "window_size" in rows else rows
        tables.append(rows.assign(causal=True))
    for table in package.tables(folder, "encoder_attention", "encoder_attention_perf.parquet").values():
        table = table[table.head_dim == 64]  # the others, 72 and 80, are padded
        tables.append(table.assign(causal=False, num_key_value_heads=table.num_heads))
    shape = ["batch_size", "isl", "num_heads", "num_key_value_heads", "head_dim", "causal"]
    rows = pd.concat(tables).groupby(shape).seconds.min().reset_index()
    batch, length, heads, kv_heads, head_dim = (rows[name].to_numpy(float) for name in shape[:5])
    causal = rows.causal.to_numpy(bool)
    reference = flat.attention(batch, length, length, heads, kv_heads, head_dim, causal, "bf16")
    seen = np.where(causal, length + 1.0, 2.0 * length)
    seconds = rows.seconds.to_numpy(float)
    focus = (length >= 1024) & (batch * heads >= 8)
    arguments = [head_dim, batch * heads * length, seen]
    fits = {"fused": distilled("attention", ATTENTION, arguments, reference, seconds, focus=focus)}
    for value, name in ((True, "causal"), (False, "not causal")):
        chosen = focus & (causal == value)
        if chosen.any():
            error = np.abs(reference / fits["fused"].surface.at(*arguments) / seconds - 1.0)[chosen]
            print(f"    of these {name}: {chosen.sum()} rows, {np.median(error):.1%} / {np.quantile(error, 0.9):.1%}")
    latent = [
        table[(table.mla_dtype == "bfloat16") & (table.kv_cache_dtype == "bfloat16")]
        for table in package.tables(folder, "mla", "context_mla_perf.parquet").values()
    ]
    rows = pd.concat(latent).groupby(["batch_size", "isl", "num_heads"]).seconds.min().reset_index()
    batch, length, heads = (rows[name].to_numpy(float) for name in ("batch_size", "isl", "num_heads"))
    reference = flat.attention(batch, length, length, heads, heads, 192.0, True, "bf16", value_head_dim=128.0)
    focus = (length >= 1024) & (batch * heads >= 8)
    fits["latent"] = distilled(
        "attention, latent",
        LATENT,
        [batch * heads * length, length + 1.0],
        reference,
        rows.seconds.to_numpy(float),
        focus=focus,
    )
    return fits


def _flat(axes: int) -> Surface:
    return Surface((0.0,) * axes, (1.0,) * axes, (1,) * axes, np.zeros(1))


def grouping(package: Package, folder: str, kernels: Kernels) -> Fit | None:
    """What grouping costs, from TensorRT-LLM's gated experts with balanced routing and all experts on one device.

    The measured time holds both products, the routing's permutation of the rows and the activation function between
    them; the latter two are taken off as memory traffic. Some shapes ran on an untuned kernel, at a fifth of their
    neighbours' speed: rows that take twice what a first fit says are left out. Shares above one (the experts' weights
    were never power-limited as the dense products were) count as one.
    """
    table = package.tables(folder, "moe", "moe_perf.parquet")["trtllm"]
    rows = table[
        (table.moe_dtype == "bfloat16")
        & (table.distribution == "balanced")
        & (table.moe_ep_size == 1)
        & ~table.kernel_source.str.contains("nongated")
    ]
    if rows.empty:
        return None
    tokens, hidden, topk, groups = (
        rows[name].to_numpy(float) for name in ("num_tokens", "hidden_size", "topk", "num_experts")
    )
    inner = rows.inter_size.to_numpy(float) / rows.moe_tp_size.to_numpy(float)
    visits = tokens * topk
    m = visits / groups
    moved = 2.0 * (tokens * hidden + visits * hidden + 3.0 * visits * inner + visits * hidden + tokens * hidden)
    flat = replace(kernels, grouping=_flat(2))
    reference = flat.grouped_gemm(groups, m, 2.0 * inner, hidden, "bf16") + flat.grouped_gemm(
        groups, m, hidden, inner, "bf16"
    )
    rest = kernels.memory_bound(moved)
    seconds = rows.seconds.to_numpy(float) - rest
    width = np.sqrt(2.0) * inner  # between the two products' narrower sides, 2 x inner and inner
    kept = (m >= 1.0) & (inner >= 32.0) & (seconds > 0.3 * rows.seconds.to_numpy(float))
    first = fitted(GROUPING, [m[kept], width[kept]], (reference / np.maximum(seconds, 1e-9))[kept])
    slow = seconds > 2.0 * reference / first.at(m, width)
    print(f"    {(kept & slow).sum()} of {kept.sum()} rows of grouped_gemm are left out as untuned")
    kept &= ~slow
    return distilled(
        "grouped_gemm",
        GROUPING,
        [m[kept], width[kept]],
        reference[kept],
        seconds[kept],
        focus=((m >= 128.0) & (inner >= 512.0))[kept],
    )


def streams(package: Package, folder: str, kernels: Kernels) -> Fit | None:
    """Memory-bound kernels: the cast of a bf16 matrix to fp8 at a known scale reads two bytes and writes one each."""
    tables = package.tables(folder, "quantize", "scale_matrix_perf.parquet")
    if not tables:
        return None
    rows = pd.concat([tables[name] for name in ("trtllm", "vllm")]).groupby(["m", "k"]).seconds.min().reset_index()
    rows = rows[(rows.m >= 128) & (rows.k >= 256)]
    moved = 3.0 * rows.m.to_numpy(float) * rows.k.to_numpy(float)
    reference = moved / kernels.device.memory_bandwidth_bytes + LAUNCH_S
    return distilled(
        "memory_bound", STREAM, [moved], reference, rows.seconds.to_numpy(float), focus=moved >= 1e8, smooth=0.1
    )


def links(package: Package, folder: str, kernels: Kernels, stand_in: str | None) -> dict[str, tuple[Link, str]]:
    """NCCL's collectives, at the newest version; `message_size` counts elements of the full tensor."""
    table = _collectives(package, folder)
    note = ""
    if stand_in is not None:
        other = _collectives(package, stand_in)
        table = pd.concat([table, other[other.num_gpus > table.num_gpus.max()]])
        note = f"; 8 ranks from {stand_in}, whose links are the same"
    found = {}
    for kind, name in KINDS.items():
        rows = table[table.op_name == name]
        size, ranks = 2.0 * rows.message_size.to_numpy(float), rows.num_gpus.to_numpy(float)
        seconds = rows.seconds.to_numpy(float)
        small = [float(np.median(seconds[(ranks == count) & (size <= 8192)])) for count in (2, 4, 8)]
        growth = max(float(np.polyfit([1.0, 2.0, 3.0], small, 1)[0]), 0.0)
        link = Link(round(small[0], 9), round(growth, 9), _flat(2))
        trial = replace(kernels, links={kind: link})
        reference = trial.collective(kind, size, ranks)  # type: ignore[arg-type]
        fit = distilled(f"collective {kind}", LINK, [size, ranks], reference, seconds, smooth=0.01)
        found[kind] = (replace(link, efficiency=fit.surface), fit.note + note)
    return found


def _collectives(package: Package, folder: str) -> pd.DataFrame:
    tables = package.tables(folder, "comm/nccl", "nccl_perf.parquet")
    if not tables:
        raise SystemExit(f"{folder} has no NCCL table")
    newest = tables[max(tables)]
    return newest[newest.nccl_dtype == "half"]


def main() -> None:
    """Read the package, fit, print errors, write the catalog."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path, help="the wheel, or the folder it was unpacked to")
    parser.add_argument("--device", nargs="+", choices=sorted(SYSTEMS), default=list(SYSTEMS))
    arguments = parser.parse_args()
    if not arguments.package.exists():
        raise SystemExit(f"{arguments.package} does not exist: give the wheel or the folder it was unpacked to")
    package = Package(arguments.package)
    for name in arguments.device:
        distil(package, name)


def distil(package: Package, name: str) -> None:
    """Write one device's file."""
    folder = SYSTEMS[name]
    print(f"{name} ({folder})")
    device = device_spec(name)
    # Peaks and bandwidths come from the catalog; the surfaces are this tool's own, in the order in which they build up.
    kernels = replace(kernels_for(device.model_copy(update={"name": "unmeasured"})), device=device, launch_s=LAUNCH_S)
    stream = streams(package, folder, kernels)
    stream_from = folder
    if stream is None:  # A100 has no fp8: the shape of H100's curve at its own bandwidth
        stream_from = SYSTEMS["h100-sxm"]
        stream = streams(package, stream_from, _of("h100-sxm"))
    assert stream is not None
    kernels = replace(kernels, streams=stream.surface)
    dense = products(package, folder, kernels)
    kernels = replace(kernels, products={precision: fit.surface for precision, fit in dense.items()})
    fused = attention(package, folder, kernels)
    grouped, grouped_from = grouping(package, folder, kernels), folder
    if grouped is None:
        grouped_from = SYSTEMS["h100-sxm"]
        other = _of("h100-sxm")
        grouped = grouping(package, grouped_from, other)
    assert grouped is not None
    linked = links(package, folder, kernels, "b200_sxm" if name == "gb200-nvl72" else None)

    text = [
        f"# Kernel times of {name} as efficiencies: what a kernel took of what plan/kernels.py takes as its reference.",
        "# Written by tools/distill_kernels.py; grids are in base-2 logarithms, efficiencies in thousandths.",
        f"launch_s = {LAUNCH_S:.1e}",
        "",
    ]
    notes: dict[str, tuple[str, str, str]] = {}
    for precision, fit in dense.items():
        text += _table(f"gemm.{precision}", ["m", "n", "k"], fit.surface)
        rule = "median of" if precision == "bf16" else "fastest, less the cast, of"
        notes[f"gemm.{precision}"] = (
            f"{folder}/gemm",
            "published" if precision == "bf16" else "estimated",
            f"{rule} TensorRT-LLM, vLLM and SGLang; {fit.note}",
        )
    text += _table("grouped_gemm", ["rows per group", "the narrower of n and k"], grouped.surface)
    notes["grouped_gemm"] = (
        f"{grouped_from}/moe/trtllm",
        "published" if grouped_from == folder else "estimated",
        grouped.note,
    )
    for part, fit in fused.items():
        axes = ["queries of all heads", "twice the mean length seen"]
        text += _table(f"attention.{part}", axes if part == "latent" else ["head dimension", *axes], fit.surface)
        tables = "mla" if part == "latent" else "attention and encoder_attention"
        notes[f"attention.{part}"] = (f"{folder}/{tables}", "published", f"fastest framework per shape; {fit.note}")
    text += _table("memory_bound", ["bytes"], stream.surface)
    notes["memory_bound"] = (
        f"{stream_from}/quantize (scale_matrix)",
        "published" if stream_from == folder else "estimated",
        stream.note,
    )
    for kind, (link, note) in linked.items():
        extra = [f"latency_s = {link.latency_s:.3e}", f"latency_per_doubling_s = {link.latency_per_doubling_s:.3e}"]
        text += _table(f"collective.{kind}", ["bytes", "ranks"], link.efficiency, extra)
        notes[f"collective.{kind}"] = (f"{folder}/comm/nccl", "estimated" if "from" in note else "published", note)
    text += ["[provenance]", f'source = "{SOURCE.format(folder=folder)}"', 'certainty = "published"', ""]
    text += [
        "[provenance.fields.launch_s]",
        'source = "Modelworks: a round number below the shortest measured kernels of every device"',
        'certainty = "estimated"',
        "",
    ]
    for field, (where, certainty, note) in notes.items():
        quoted = ".".join(field.split("."))
        text += [
            f'[provenance.fields."{quoted}"]',
            f'source = "{SOURCE.format(folder=where)}"',
            f'certainty = "{certainty}"',
            f'note = "{note}"',
            "",
        ]
    CATALOG.mkdir(exist_ok=True)
    path = CATALOG / f"{name}.toml"
    path.write_text("\n".join(text).rstrip("\n") + "\n", encoding="utf-8")
    print(f"  {path.name}: {path.stat().st_size / 1000:.0f} kB")


def _of(name: str) -> Kernels:
    return kernels_for(device_spec(name))


def _table(name: str, axes: list[str], surface: Surface, extra: list[str] | None = None) -> list[str]:
    """One surface as TOML; a line per run along the last axis."""
    values = np.rint(1000.0 * np.exp(surface.log_efficiency)).astype(int).reshape(-1, surface.shape[-1])
    whole: Callable[[Any], list[int]] = lambda values: [int(value) for value in values]  # noqa: E731
    return [
        f"[{name}] # over {', '.join(axes)}",
        *(extra or []),
        f"first = {whole(surface.first)}",
        f"step = {whole(surface.step)}",
        f"shape = {whole(surface.shape)}",
        'efficiency = """',
        *(" ".join(str(value) for value in row) for row in values),
        '"""',
        "",
    ]


if __name__ == "__main__":
    main()
