"""Runs that others measured, read from a list and put into the planner's terms.

A list of runs is a CSV file whose columns say what ran (model, layout, devices) and what was measured (`step_time_s`,
sometimes `memory_gib`). What a row leaves blank is filled with its framework's documented default, and said so; a row
that the planner has no terms for is `Unrepresentable`, with the reason.
"""

from __future__ import annotations

import csv
import fnmatch
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from modelworks.plan.layout import PRECISIONS, Layouts, layouts
from modelworks.plan.planner import DEFAULT_SOFTWARE, software_spec
from modelworks.spec import catalog
from modelworks.spec.errors import InputError
from modelworks.spec.fields import validate
from modelworks.spec.files import cluster_spec, device_spec
from modelworks.spec.hardware import ClusterSpec, DeviceSpec, NetworkSpec
from modelworks.spec.model import ModelSpec
from modelworks.spec.software import SoftwareSpec

_NEEDED = (
    "run_id", "framework", "gpu", "n_gpus", "layers", "hidden", "heads", "vocab", "seq_len", "global_batch",
    "step_time_s",
)  # fmt: skip
_LARGEST = 10**12
_LEARNED_POSITIONS = ("megatron-lm-2021", "megatron-deepspeed", "deepspeed-zero3")


class Unrepresentable(Exception):  # noqa: N818 (a finding, not a fault)
    """Why a row cannot be represented."""


def prefix(run_id: str) -> str:
    """The source in a run's name: up to the first dash; for vTrain its first two parts."""
    parts = run_id.split("-")
    return "-".join(parts[:2]) if parts[0] == "vtrain" and len(parts) > 1 else parts[0]


def read_runs(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file of measured runs.

    Raises
    ------
    InputError
        If it cannot be read, lacks a column, has no rows, or a number in it is none.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            missing = [name for name in _NEEDED if name not in (reader.fieldnames or [])]
            if missing:
                raise InputError(f"{path}: column {missing[0]!r} is missing; needed are {', '.join(_NEEDED)}")
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or "it isn't CSV in UTF-8"
        raise InputError(f"the list of runs {path} cannot be read: {reason}") from None
    if not rows:
        raise InputError(f"{path}: there are no runs in it")
    for line, row in enumerate(rows, start=2):
        if None in row or None in row.values():
            raise InputError(f"{path}, line {line}: it has another number of columns than the first line")
        measured = number(row, "step_time_s", where=f"{path}, line {line}")
        if measured is None:
            raise InputError(f"{path}, line {line}: step_time_s is blank; a measured time in seconds is needed")
        for name in ("n_gpus", "layers", "hidden", "heads", "vocab", "seq_len", "global_batch", "micro_batch",
                     "tp", "pp", "cp", "ep", "etp", "dp", "vpp", "ffn_hidden", "kv_heads", "head_dim"):  # fmt: skip
            number(row, name, where=f"{path}, line {line}", whole=True)
    return rows


@dataclass(frozen=True)
class Represented:
    """A row in the planner's terms."""

    model: ModelSpec
    seq_len: int
    global_batch: int
    cluster: ClusterSpec
    device: DeviceSpec
    software: SoftwareSpec
    layout: Layouts

    @property
    def key(self) -> tuple[str, ...]:
        """Equal for runs that differ in layout and batch alone."""
        parts = (self.model, self.cluster, self.device, self.software)
        return (str(self.seq_len), *(part.model_dump_json() for part in parts))


def represent(row: Mapping[str, str], filled: list[str]) -> Represented:
    """Put a row into the planner's terms, noting in `filled` what it left blank.

    Raises
    ------
    Unrepresentable
        Saying what the planner has no term for.
    """
    name = _matching("software", row["framework"])
    if name is None:
        name = DEFAULT_SOFTWARE
        filled.append(f"traits of {name} for an unknown framework")
    software = software_spec(name)
    device_name = _matching("hardware", row["gpu"])
    if device_name is None:
        raise Unrepresentable(f"gpu = {row['gpu']!r} is not in the catalog")
    device = device_spec(device_name)
    count = _whole(row, "n_gpus")
    model = _model(row, software, filled)
    degrees = {name: _whole(row, name, 1) for name in ("tp", "pp", "cp", "ep")}
    if not row.get("tp") and software.zero_stage == 3:
        filled.append("tp = 1")
    precision = _precision(row, software, filled)
    dp = _whole(row, "dp", 0) or count // (degrees["tp"] * degrees["pp"] * degrees["cp"])
    product = degrees["tp"] * degrees["pp"] * degrees["cp"] * dp
    if product != count:
        if count % (degrees["tp"] * degrees["pp"] * degrees["cp"]):
            raise Unrepresentable(f"tp x pp x cp x dp = {product} is not n_gpus = {count}")
        dp = count // (degrees["tp"] * degrees["pp"] * degrees["cp"])
    global_batch = _whole(row, "global_batch")
    virtual = _whole(row, "vpp", 1) if degrees["pp"] > 1 else 1
    if degrees["pp"] > 1 and not row.get("vpp"):
        virtual = _default_virtual(model, degrees["pp"], software, row)
        filled.append(f"vpp = {virtual}")
    micro = _whole(row, "micro_batch", 0)
    if not micro:
        micro = _default_micro_batch(model, global_batch, dp, software)
        filled.append(f"micro_batch = {micro}")
    if global_batch % (dp * micro):
        raise Unrepresentable(f"global_batch = {global_batch} doesn't divide by dp x micro_batch = {dp * micro}")
    recompute, share = _recompute(row, software, filled)
    zero = _whole(row, "zero_stage", software.zero_stage)
    if not row.get("zero_stage"):
        filled.append(f"zero_stage = {software.zero_stage}")
    shards = _shards(row, dp, degrees["cp"])
    parallel = row.get("sequence_parallel", "").lower()
    if parallel:
        sequence = parallel == "true"
    else:
        sequence = software.sequence_parallel or "sequence parallel" in row.get("recompute", "")
        filled.append(f"sequence_parallel = {sequence}")
    etp = _whole(row, "etp", 0) or (degrees["tp"] if model.moe else 1)
    if model.moe and not row.get("etp"):
        filled.append(f"etp = {etp}")
    layout = layouts(
        tensor=degrees["tp"],
        pipeline=degrees["pp"],
        context=degrees["cp"],
        expert=degrees["ep"] if model.moe else 1,
        expert_tensor=etp if model.moe else 1,
        data=dp,
        virtual_stages=virtual,
        micro_batch=micro,
        recompute=recompute,
        recompute_share=share,
        zero_stage=zero,
        shards=shards,
        sequence_parallel=sequence and degrees["tp"] > 1,
        precision=precision,
    )
    if re.search(r"capacity_factor (\d+(\.\d+)?)", row.get("notes", "")):
        factor = float(re.search(r"capacity_factor (\d+(?:\.\d+)?)", row["notes"])[1])  # type: ignore[index]
        software = software.model_copy(update={"capacity_factor": factor})
    if "asynctp" in row["run_id"].lower() or "asynctp" in row.get("notes", "").lower():
        software = software.model_copy(update={"tensor_overlap_forward": 0.5, "tensor_overlap_backward": 0.5})
    cluster = _cluster(row, device, count, filled)
    return Represented(model, _whole(row, "seq_len"), global_batch, cluster, device, software, layout)


def _model(row: Mapping[str, str], software: SoftwareSpec, filled: list[str]) -> ModelSpec:
    experts, hidden, layers = _whole(row, "experts", 0), _whole(row, "hidden"), _whole(row, "layers")
    heads = _whole(row, "heads")
    gated = row.get("gated_mlp", "true").lower() == "true"
    learned = software.name in _LEARNED_POSITIONS
    values: dict[str, Any] = {
        "name": row.get("model") or "measured",
        "layers": layers,
        "hidden": hidden,
        "heads": heads,
        "kv_heads": _whole(row, "kv_heads", heads),
        "vocab": _whole(row, "vocab"),
        "context": _whole(row, "seq_len"),
        "gated_mlp": gated,
        "activation": "silu" if gated else "gelu",
        "position": "learned" if learned else "rope",
        "norm": "rms" if gated else "layer",
        "tied_embeddings": row.get("tied_embeddings", "").lower() == "true",
    }
    if row.get("head_dim"):
        values["head_dim"] = _whole(row, "head_dim")
    ffn = _whole(row, "ffn_hidden", 0)
    if experts > 1:
        top_k = _whole(row, "top_k", 2)
        dense = min(_whole(row, "dense_layers", 0), layers)
        width = _whole(row, "moe_ffn_hidden", 0) or ffn
        if not width:
            raise Unrepresentable("moe_ffn_hidden is blank")
        values["moe"] = {
            "experts": experts,
            "top_k": top_k,
            "expert_hidden": width,
            "shared_experts": _whole(row, "shared_experts", 0),
            "dense_layers": dense if dense < layers else 0,
        }
    if not ffn and experts <= 1:
        ffn = 4 * hidden
        filled.append(f"ffn_hidden = {ffn}")
    if ffn:
        values["ffn_hidden"] = ffn
    if "deepseek-v3" in row.get("model", "").lower():
        # Only the name says that its attention is latent.
        published = catalog.entry("models", "deepseek-v3").values
        values |= {"latent_attention": published["latent_attention"], "head_dim": published["head_dim"]}
        filled.append("latent attention of deepseek-v3")
    return validate(ModelSpec, values, where=str(row["run_id"]))


def _cluster(row: Mapping[str, str], device: DeviceSpec, count: int, filled: list[str]) -> ClusterSpec:
    """Nodes as the row says; a network as it says or as such devices usually have."""
    per_node = _whole(row, "gpus_per_node", 8)
    gbps = number(row, "inter_node_gbps")
    domain = 72 if device.name.startswith("gb200") else per_node
    usual = cluster_spec("h100-superpod").network
    assert usual is not None
    if gbps is None:
        each = 25e9 if device.name.startswith("a100") else usual.nic_bandwidth_bytes
        if count > per_node:
            filled.append(f"network of {each * 8 / 1e9:.0f} Gbit/s a device")
    else:
        each = gbps * 1e9 / 8 / per_node
    network = NetworkSpec(
        kind="infiniband",
        nic_bandwidth_bytes=each,
        nics_per_node=per_node,
        latency_s=usual.latency_s,
        levels=3 if count > 2048 else 2,
    )
    return ClusterSpec(
        name="measured", device=device.name, gpus=count, gpus_per_node=per_node, scale_up_domain=domain,
        network=network if count > per_node else None,
    )  # fmt: skip


def _precision(row: Mapping[str, str], software: SoftwareSpec, filled: list[str]) -> str:
    given = row.get("precision", "").lower()
    if not given:
        filled.append("precision = bf16")
        return "bf16"
    for name in ("nvfp4", "mxfp8"):
        if given.startswith(name):
            return "fp4" if name == "nvfp4" else "fp8"
    found = next((name for name in ("fp8", "bf16", "fp16", "fp32") if given.startswith(name)), None)
    if found is None or found not in PRECISIONS:
        raise Unrepresentable(f"precision = {row['precision']!r} has no counterpart")
    return found


def _recompute(row: Mapping[str, str], software: SoftwareSpec, filled: list[str]) -> tuple[str, float]:
    """The kind of recomputation and the share of the layers it applies to."""
    given = row.get("recompute", "").lower()
    layers = re.search(r"(\d+)(?: of \d+)? layers?", given)
    if not given:
        filled.append(f"recompute = {software.recompute}")
        return software.recompute, 1.0
    if given.startswith("none"):
        return "none", 1.0
    if layers:
        stage = _whole(row, "layers") / _whole(row, "pp", 1)
        return "full", min(1.0, int(layers[1]) / stage)
    if given.startswith(("full", "uniform", "block")):
        return "full", 1.0
    if given.startswith("selective") and software.name == "torchtitan":
        # Every second layer, or every second matrix product of each layer: half of the work either way.
        return "full", 0.5
    if given.startswith(("selective", "mla")):
        return "selective", 1.0
    if "minimal" in given:
        # MaxText's and Paxml's policy that keeps the results of all matrix products.
        return "selective", 1.0
    if "qkv" in given or "proj" in given:
        return "projections", 1.0
    filled.append(f"recompute = {software.recompute} for the unknown {given!r}")
    return software.recompute, 1.0


def _shards(row: Mapping[str, str], dp: int, cp: int) -> int:
    """Ranks that share one copy of sharded weights: as the notes say, else all."""
    notes = row.get("notes", "")
    found = re.search(r"FSDP=(\d+), DP replicas", notes)
    if found:
        return int(found[1])
    found = re.search(r"DCN_MESH_SHAPE=\[DP=\d+,FSDP=(\d+)", notes)
    if found:
        return int(found[1]) * 8
    return dp * cp


def _default_virtual(model: ModelSpec, pipeline: int, software: SoftwareSpec, row: Mapping[str, str]) -> int:
    """Interleaved schedules' chunks if only the schedule is known: two, as Narayanan et al. 2021 use; else one."""
    notes = (row.get("notes", "") + row["run_id"]).lower()
    interleaved = "interleaved" in notes or prefix(row["run_id"]) == "sc21"
    return 2 if interleaved and model.layers % (2 * pipeline) == 0 and "ptdp" not in notes else 1


def _default_micro_batch(model: ModelSpec, global_batch: int, dp: int, software: SoftwareSpec) -> int:
    """One sequence a forward pass is what large runs use; without pipelines small models take more."""
    each = global_batch // dp
    wanted = 4 if model.parameters.total < 5e10 else (2 if model.parameters.total < 1e11 else 1)
    return max(size for size in (1, 2, 4) if each % size == 0 and size <= wanted)


def number(row: Mapping[str, str], name: str, where: str = "", whole: bool = False) -> float | None:
    """A row's number; None where it is blank, and an `InputError` where it is none or beyond reason."""
    text = (row.get(name) or "").strip()
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    lowest = 0.0
    if not math.isfinite(value) or value < lowest or value > _LARGEST or (whole and value != int(value)):
        kind = "whole number" if whole else "number"
        raise InputError(f"{where or row.get('run_id')}: {name} = {text!r} is not accepted: a {kind} from 0 to 1e12 is")
    if value == 0 and name in (
        "step_time_s",
        "n_gpus",
        "layers",
        "hidden",
        "heads",
        "vocab",
        "seq_len",
        "global_batch",
    ):
        raise InputError(f"{where or row.get('run_id')}: {name} = 0 is not accepted: a positive number is")
    return value


def _whole(row: Mapping[str, str], name: str, default: int | None = None) -> int:
    value = number(row, name)
    if value is None:
        if default is None:
            raise Unrepresentable(f"{name} is blank")
        return default
    return int(value)


@cache
def _patterns(kind: catalog.Kind) -> list[tuple[str, str]]:
    return [(pattern, entry.name) for entry in catalog.entries(kind) for pattern in entry.values.get("matches", [])]


def _matching(kind: catalog.Kind, given: str) -> str | None:
    """The catalog's entry for what a list of runs calls a device or a framework; the most telling pattern counts."""
    for pattern, name in sorted(_patterns(kind), key=lambda pair: -len(pair[0])):
        if fnmatch.fnmatch(given.strip().lower(), pattern):
            return name
    return None
