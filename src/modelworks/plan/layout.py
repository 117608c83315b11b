"""How runs may be laid out over devices: many candidate layouts at once, as arrays.

A `Layouts` holds N candidates as a struct of arrays of shape (N,), so that one code path evaluates one candidate or ten
million. A choice among names (the recomputation, the schedule, the precision) is an array of positions in a tuple of
those names. What a layout divides the model and the batch into is checked here as well, again for all at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modelworks.spec.hardware import Precision
from modelworks.spec.model import ModelSpec

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

RECOMPUTE = ("none", "selective", "projections", "full")
"""What the backward pass computes again: nothing; the attention's core (Korthikanti et al. 2022, section 5); all but
the attention's projections; everything but each layer's input (Chen et al. 2016)."""
SCHEDULES = ("1f1b", "interleaved", "zero-bubble")
PRECISIONS: tuple[Precision, ...] = ("bf16", "fp8", "fp16", "fp32", "tf32", "fp4")


@dataclass(frozen=True)
class Layouts:
    """Candidate layouts; every field is an array of shape (N,)."""

    tensor: IntArray
    pipeline: IntArray
    context: IntArray
    expert: IntArray
    expert_tensor: IntArray
    data: IntArray
    """Replicas of the whole model, expert groups included: devices = tensor * pipeline * context * data."""
    virtual_stages: IntArray
    micro_batch: IntArray
    """Sequences per forward pass of one replica."""
    recompute: IntArray
    """Position in `RECOMPUTE`."""
    recompute_share: FloatArray
    """Share of the layers that `recompute` applies to, 0 to 1; the rest recompute nothing."""
    schedule: IntArray
    """Position in `SCHEDULES`."""
    zero_stage: IntArray
    """0: replicated; 1: optimizer state sharded; 2: gradients too; 3: parameters too (FSDP)."""
    shards: IntArray
    """Ranks that share one copy of what is sharded: `data * context`, or less (HSDP)."""
    sequence_parallel: BoolArray
    precision: IntArray
    """Position in `PRECISIONS`."""

    def __len__(self) -> int:
        return len(self.tensor)

    @property
    def devices(self) -> IntArray:
        """Devices that each candidate runs on."""
        return self.tensor * self.pipeline * self.context * self.data

    def take(self, which: NDArray[Any]) -> Layouts:
        """Those candidates that an index array, a mask or a slice picks."""
        return Layouts(**{field.name: getattr(self, field.name)[which] for field in fields(self)})

    def with_(self, **changed: NDArray[Any]) -> Layouts:
        """The same candidates with some fields replaced."""
        return replace(self, **changed)

    def row(self, index: int) -> dict[str, Any]:
        """One candidate in words, for reports and JSON."""
        plain = {field.name: getattr(self, field.name)[index].item() for field in fields(self)}
        return plain | {
            "recompute": RECOMPUTE[plain["recompute"]],
            "schedule": SCHEDULES[plain["schedule"]],
            "precision": PRECISIONS[plain["precision"]],
        }


def layouts(count: int | None = None, **given: Any) -> Layouts:
    """Candidates from scalars and arrays that broadcast against each other.

    Fields that are not given are 1; `schedule` follows from `virtual_stages`, `shards` is all data-parallel ranks, and
    names stand for their positions (``recompute="full"``).
    """
    names: dict[str, tuple[str, ...]] = {"recompute": RECOMPUTE, "schedule": SCHEDULES, "precision": PRECISIONS}
    values: dict[str, Any] = {
        "tensor": 1,
        "pipeline": 1,
        "context": 1,
        "expert": 1,
        "expert_tensor": 1,
        "data": 1,
        "virtual_stages": 1,
        "micro_batch": 1,
        "recompute": 0,
        "recompute_share": 1.0,
        "zero_stage": 1,
        "sequence_parallel": True,
        "precision": 0,
    } | {k: names[k].index(v) if k in names and isinstance(v, str) else v for k, v in given.items()}
    values.setdefault("schedule", np.where(np.asarray(values["virtual_stages"]) > 1, 1, 0))
    values.setdefault("shards", np.asarray(values["data"]) * np.asarray(values["context"]))
    arrays = np.broadcast_arrays(*(np.atleast_1d(np.asarray(value)) for value in values.values()))
    kinds: dict[str, Any] = {"recompute_share": np.float64, "sequence_parallel": np.bool_}
    out: dict[str, Any] = {
        name: np.ascontiguousarray(array, dtype=kinds.get(name, np.int64))
        for name, array in zip(values, arrays, strict=True)
    }
    made = Layouts(**out)
    return made if count is None else made.take(np.zeros(count, dtype=np.int64))


def joined(parts: Sequence[Layouts]) -> Layouts:
    """Several sets of candidates as one."""
    return Layouts(**{f.name: np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(Layouts)})


def runs(candidates: Layouts, names: Sequence[str], *beside: IntArray) -> tuple[IntArray, IntArray]:
    """The first candidate of each run of neighbours that are equal in some fields, and for each candidate its run."""
    begins = np.zeros(len(candidates), dtype=np.bool_)
    begins[:1] = True
    for column in [*(getattr(candidates, name) for name in names), *beside]:
        begins[1:] |= column[1:] != column[:-1]
    return np.flatnonzero(begins), np.cumsum(begins) - 1


def distinct(candidates: Layouts, names: Sequence[str]) -> tuple[IntArray, IntArray]:
    """The first candidate of each different combination of some fields, and for each candidate its combination."""
    starts, run = runs(candidates, names)
    key = np.zeros(len(starts), dtype=np.int64)
    for name in names:
        values, positions = np.unique(getattr(candidates, name)[starts], return_inverse=True)
        key = key * len(values) + positions
    _, first, combination = np.unique(key, return_index=True, return_inverse=True)
    return starts[first], combination[run]


def fits_model(model: ModelSpec, seq_len: int, global_batch: int | IntArray, candidates: Layouts) -> BoolArray:
    """Which candidates divide the model and the batch evenly, as the engines ask of a layout.

    Attention heads and the feed-forward width by `tensor`, a vision tower's too; key-value heads by it or it by them;
    experts by `expert`; the experts' width by `expert_tensor`; twice `context` into the sequence (the balanced causal
    split); the sequences of a step by `data * micro_batch`; no more chunks of the pipeline than layers; virtual stages
    only with a schedule that uses them; experts' groups inside one stage's devices.
    """
    c, moe = candidates, model.moe
    widths = [model.heads % c.tensor == 0, global_batch % (c.data * c.micro_batch) == 0]
    widths.append((model.kv_heads % c.tensor == 0) | (c.tensor % model.kv_heads == 0))
    if model.dense_layers or moe is None:
        widths.append(model.ffn_hidden % c.tensor == 0)
    if model.vision is not None:
        widths += [model.vision.heads % c.tensor == 0, model.vision.ffn_hidden % c.tensor == 0]
    widths.append((c.context == 1) | (seq_len % (2 * c.context) == 0))
    widths.append(~c.sequence_parallel | (seq_len % (c.tensor * c.context) == 0))
    widths.append(c.pipeline * c.virtual_stages <= model.layers)
    widths.append((c.virtual_stages == 1) | (c.pipeline > 1))
    widths.append((c.schedule != 1) | (c.virtual_stages > 1))
    # Interleaved stages take their micro batches in rounds of one for each stage (Narayanan et al. 2021, section 2.2).
    micro_batches = global_batch // np.maximum(1, c.data * c.micro_batch)
    widths.append((c.virtual_stages == 1) | (micro_batches % c.pipeline == 0))
    group = c.tensor * c.context * c.data
    if moe is None:
        widths += [c.expert == 1, c.expert_tensor == 1]
    else:
        widths += [moe.experts % c.expert == 0, moe.expert_hidden % c.expert_tensor == 0]
        widths += [group % (c.expert * c.expert_tensor) == 0, c.expert_tensor <= c.tensor]
    fits: BoolArray = np.logical_and.reduce(widths)
    return fits
