"""All layouts that a model, a batch and a number of devices allow, and the best of them.

Two ideas. The space is grown choice by choice, and what cannot divide or cannot fit is dropped as soon as it shows, so
no infeasible product is ever written down. And candidates are numbered: the first choices (degrees, micro batch,
precision) make a table, each row of which is combined with the same short list of the last ones (recomputation, what
is sharded and over how many ranks), so a block of any size is made from its numbers and forgotten after its
evaluation. The space may then have many millions of candidates in little memory.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any

import numpy as np

from modelworks.plan.block import Setting
from modelworks.plan.layout import PRECISIONS, RECOMPUTE, BoolArray, FloatArray, IntArray, Layouts
from modelworks.plan.memory import MEMORY
from modelworks.plan.step import REASONS, Blocks, Evaluation, evaluate, known_blocks

GROUP: tuple[str, ...] = ("tensor", "pipeline", "context", "expert", "expert_tensor")
"""Layouts that differ in one of these are distinct; the others are settings of one layout."""
_CHUNK = 65_536
"""Candidates that are evaluated together: enough to make calls cheap, few enough to need little memory."""
_RECOMPUTE_OPTIONS = ((0, 1.0), *((kind, share) for kind in (1, 2, 3) for share in (1.0, 0.75, 0.5, 0.25)))
"""Kind and share of the layers, simplest first."""
WITHIN = 1.1
"""Candidates up to so many times slower than the best (and over the memory) are kept, since a tenth more of a resource
makes no step shorter than by that factor: a search among them is a search among all."""


@dataclass(frozen=True)
class Space:
    """Which layouts are tried.

    `accepted` names the values that a choice is restricted to, by its name in `Layouts`; what isn't named is free.
    """

    most_devices: int
    least_devices: int
    devices_per_node: int
    domain: int
    """Devices that share a scale-up domain: a place to end a group of shards."""
    island: int
    memory_limit: float
    uneven: bool = True
    """Whether virtual stages may leave the first and the last stage short of more than a layer."""
    partial: tuple[int, ...] = (1, 2, 3)
    """Kinds of recomputation that may apply to a share of the layers."""
    accepted: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    def holds(self, devices: int) -> bool:
        """Whether so many devices are there and fill whole nodes."""
        whole = devices % self.devices_per_node == 0 or devices <= self.devices_per_node
        return self.least_devices <= devices <= self.most_devices and whole

    def without(self, name: str) -> Space:
        """The same with one choice free."""
        return Space(
            **{f.name: getattr(self, f.name) for f in fields(self) if f.name != "accepted"},
            accepted={key: values for key, values in self.accepted.items() if key != name},
        )


@dataclass(frozen=True)
class Candidates:
    """A numbered space: `len()` candidates, made block by block."""

    table: dict[str, IntArray]
    """The first choices, by name; arrays of one length."""
    last: dict[str, IntArray]
    """The last choices, by name; `shards` as a position in `_SHARDS`."""
    shares: FloatArray
    """The last choices' share of layers that are recomputed."""
    space: Space

    def __len__(self) -> int:
        return len(self.table["tensor"]) * len(self.last["recompute"])

    def rows(self, rows: IntArray, recompute: IntArray, share: FloatArray) -> Layouts:
        """Candidates of those rows with what is recomputed given, everything sharded over all replicas."""
        made = {name: values[rows] for name, values in self.table.items()}
        made["recompute"], made["zero_stage"] = recompute, np.full_like(rows, 3)
        made["shards"] = made["data"] * made["context"]
        parallel = made.pop("sequence_parallel").astype(np.bool_)
        return Layouts(**made, recompute_share=share, sequence_parallel=parallel)

    def at(self, numbers: IntArray) -> Layouts:
        """The candidates of those numbers."""
        row, last = np.divmod(numbers, len(self.last["recompute"]))
        made = {name: values[row] for name, values in self.table.items()}
        made |= {name: self.last[name][last] for name in ("recompute", "zero_stage", "shards")}
        made["shards"] = _shards(made, self.space)
        parallel = made.pop("sequence_parallel").astype(np.bool_)
        return Layouts(**made, recompute_share=self.shares[last], sequence_parallel=parallel)


@dataclass(frozen=True)
class Found:
    """What a search found."""

    candidates: Candidates
    distinct: Evaluation
    """The best candidate of each distinct layout and number of devices that fits, fastest first."""
    close: Layouts
    """The candidates within `WITHIN` of the best time and of the memory."""
    least_memory: Evaluation
    """The candidate that needs least memory, where none fits; otherwise empty, as where there is no candidate."""
    evaluated: int
    """Full evaluations; what a bound ruled out before them is not counted."""
    feasible: int
    """How many of them fit the memory."""
    seconds: float
    """CPU time."""


_SHARDS = ("all", "island", "domain")
"""Over how many ranks state is sharded: all replicas, those of an island, those of a scale-up domain."""
_WINDOW = 8192
"""Rows whose bounds are looked at together."""
_HOPELESS = 1.15
"""Distinct layouts that are so many times slower than the best on as many devices are not followed up."""
_NOTHING, _FULL = (RECOMPUTE.index("none"), 1.0), (RECOMPUTE.index("full"), 1.0)
_DATA, _JITTER = REASONS.index("data"), REASONS.index("jitter")
_BUFFERS = MEMORY.index("buffers")
_BUFFER_SHARE = 1.05
"""Buffers, and what is added in proportion to them."""


def candidates(setting: Setting, global_batch: int, space: Space) -> Candidates:
    """Number all layouts that divide the model, the batch and the devices."""
    model, moe, seq_len, most = setting.model, setting.model.moe, setting.seq_len, space.most_devices
    plain_ffn = model.dense_layers > 0 or moe is None
    batches = _divisors(global_batch)
    alone = max(space.accepted.get("sequence_parallel", (1,)))
    grow = _Grow(space)
    tensors = [t for t in _divisors(model.heads) if t <= most and (model.kv_heads % t == 0 or t % model.kv_heads == 0)]
    if model.vision is not None:
        tensors = [t for t in tensors if model.vision.heads % t == 0 and model.vision.ffn_hidden % t == 0]
    grow.choose("tensor", lambda: [t for t in tensors if not (plain_ffn and model.ffn_hidden % t)])
    grow.choose("pipeline", lambda t: range(1, min(model.layers, most // t) + 1), "tensor")
    grow.choose(
        "context",
        lambda t, p: [c for c in _divisors(seq_len) if t * p * c <= most and (c == 1 or seq_len % (2 * c) == 0)],
        "tensor", "pipeline",
    )  # fmt: skip
    grow.choose(
        "data",
        lambda t, p, c: [d for d in batches if space.holds(t * p * c * d)],
        "tensor", "pipeline", "context",
    )  # fmt: skip
    grow.choose("micro_batch", lambda d: _divisors(global_batch // d), "data")
    grow.choose(
        "sequence_parallel",
        lambda t, c: [1, 0] if t > 1 and seq_len % (t * c) == 0 else [0] if t > 1 else [alone],
        "tensor", "context",
    )  # fmt: skip
    grow.keep(_least_activations(setting, global_batch, grow.table) <= space.memory_limit)
    grow.choose(
        "expert_tensor", lambda t: [n for n in _divisors(t) if moe and moe.expert_hidden % n == 0] or [1], "tensor"
    )
    grow.choose(
        "expert",
        lambda t, c, d, n: [e for e in _divisors(moe.experts) if t * c * d % (e * n) == 0] if moe else [1],
        "tensor", "context", "data", "expert_tensor",
    )  # fmt: skip
    grow.choose(
        "virtual_stages",
        lambda p, d, b: _virtual_stages(model.layers, p, global_batch // (d * b), space.uneven),
        "pipeline", "data", "micro_batch",
    )  # fmt: skip
    grow.choose("schedule", lambda p, v: [1] if v > 1 else [0, 2] if p > 1 else [0], "pipeline", "virtual_stages")
    grow.choose("precision", lambda: [i for i, name in enumerate(PRECISIONS) if name in setting.device.peak_flops])
    return Candidates(grow.table, *_last_choices(space), space)


def search(setting: Setting, global_batch: int, space: Space) -> Found:
    """Find the best layouts of a space.

    Branch and bound, in two steps. A row of the table takes at least the time without recomputation and exchanges over
    replicas, and at least the memory with everything recomputed and sharded; with a recomputation chosen both bounds
    are closer. What cannot fit, and what can neither better its own distinct layout nor come near the best of all, is
    not combined with the choices that are left.
    """
    begun = time.process_time()
    every = candidates(setting, global_batch, space)
    trial = _Trial(setting, global_batch, every)
    time_bound = trial.time_bounds()
    memory_bound = np.full(len(time_bound), np.inf)
    order = np.argsort(time_bound, kind="stable")
    best = _Best(every)
    close: list[tuple[IntArray, FloatArray]] = []
    feasible = 0
    for start in range(0, len(order), _WINDOW):
        rows = order[start : start + _WINDOW]
        rows = rows[best.could_change(rows, time_bound[rows])]
        memory_bound[rows] = trial.bounds(rows, *_FULL)[1]
        rows = rows[memory_bound[rows] <= space.memory_limit * WITHIN]
        for numbers in _blocks(trial.worth(rows, best)):
            found = trial.evaluate(numbers)
            fitting = np.flatnonzero(found.fits)
            feasible += len(fitting)
            best.note(numbers[fitting], found.step_time_s[fitting])
            near = found.step_time_s <= best.fastest * WITHIN
            near &= found.memory_bytes <= space.memory_limit * WITHIN
            close.append((numbers[near], found.step_time_s[near]))
    near_numbers = [numbers[step <= best.fastest * WITHIN] for numbers, step in close]
    leanest = np.zeros(0, dtype=np.int64)
    if not feasible and len(every):
        leanest = trial.leanest(np.argsort(memory_bound, kind="stable")[:_WINDOW])
    return Found(
        candidates=every,
        distinct=evaluate(setting, global_batch, every.at(best.numbers()), space.memory_limit),
        close=every.at(np.concatenate([*near_numbers, np.zeros(0, dtype=np.int64)])),
        least_memory=evaluate(setting, global_batch, every.at(leanest), space.memory_limit),
        evaluated=trial.evaluated,
        feasible=feasible,
        seconds=time.process_time() - begun,
    )


def evaluations(setting: Setting, global_batch: int, every: Candidates) -> Iterator[tuple[IntArray, Evaluation]]:
    """All candidates' numbers and evaluations, block by block, none left out."""
    trial = _Trial(setting, global_batch, every)
    for numbers in _blocks(np.arange(len(every))):
        yield numbers, trial.evaluate(numbers)


class _Trial:
    """Evaluates candidates of a space by their numbers; layers are worked out once for all of them."""

    def __init__(self, setting: Setting, global_batch: int, every: Candidates) -> None:
        self.setting, self.global_batch, self.every = setting, global_batch, every
        self.inner = len(every.last["recompute"])
        self.limit = every.space.memory_limit
        rows = np.arange(len(every.table["tensor"]))
        self.known = known_blocks(setting, every.rows(rows, np.zeros_like(rows), np.ones(len(rows))))
        self.evaluated = 0

    def evaluate(self, numbers: IntArray) -> Evaluation:
        """The candidates of those numbers."""
        return self._evaluate(self.every.at(numbers), numbers // self.inner)

    def time_bounds(self) -> FloatArray:
        """The least time of any candidate of each row."""
        rows = np.arange(len(self.every.table["tensor"]))
        return np.concatenate([self.bounds(block, *_NOTHING)[0] for block in _blocks(rows)] or [np.zeros(0)])

    def bounds(
        self, rows: IntArray, recompute: IntArray | int, share: FloatArray | float
    ) -> tuple[FloatArray, FloatArray]:
        """The least time and memory of candidates of rows that recompute so: sharded over all, not exchanging."""
        again, part = np.broadcast_to(recompute, rows.shape), np.broadcast_to(share, rows.shape)
        made = self._evaluate(self.every.rows(rows, again, part), rows)
        jitter = made.reasons[_JITTER] / np.maximum(made.step_time_s - made.reasons[_JITTER], 1e-300)
        least_time = made.step_time_s - made.reasons[_DATA] * (1.0 + jitter)
        return least_time, made.memory_bytes - _BUFFER_SHARE * made.memory[_BUFFERS]

    def worth(self, rows: IntArray, best: _Best) -> IntArray:
        """Numbers of the candidates of rows whose recomputation could fit the memory and change the best."""
        pair = np.stack([self.every.last["recompute"], self.every.shares], axis=1)
        choices, which = np.unique(pair, axis=0, return_inverse=True)
        repeated = np.repeat(rows, len(choices))
        again = np.tile(np.arange(len(choices)), len(rows))
        recompute, share = choices[again, 0].astype(np.int64), choices[again, 1]
        least_time, least_memory = self.bounds(repeated, recompute, share)
        kept = best.could_change(repeated, least_time) & (least_memory <= self.limit * WITHIN)
        # For each row and choice that is worth it, all of the last choices that recompute so.
        those = np.argsort(which.reshape(-1), kind="stable").reshape(len(choices), -1)
        return (repeated[kept, None] * self.inner + those[again[kept]]).reshape(-1)

    def leanest(self, rows: IntArray) -> IntArray:
        """The number of the candidate of those rows that needs least memory."""
        least, number = np.inf, np.zeros(1, dtype=np.int64)
        for numbers in _blocks((rows[:, None] * self.inner + np.arange(self.inner)).reshape(-1)):
            memory = self.evaluate(numbers).memory_bytes
            if memory.min() < least:
                least, number = float(memory.min()), numbers[[int(np.argmin(memory))]]
        return number

    def _evaluate(self, layouts: Layouts, rows: IntArray) -> Evaluation:
        self.evaluated += len(rows)
        blocks = Blocks(self.known.times, self.known.which[rows])
        return evaluate(self.setting, self.global_batch, layouts, self.limit, blocks)


def _blocks(numbers: IntArray) -> Iterator[IntArray]:
    for start in range(0, len(numbers), _CHUNK):
        yield numbers[start : start + _CHUNK]


class _Best:
    """The fastest candidate of each distinct layout so far."""

    def __init__(self, every: Candidates) -> None:
        self.inner = max(1, len(every.last["recompute"]))
        self.group, self.size = _positions(every.table, (*GROUP, "data")), _devices(every.table)
        self.time = np.full(self.group.max(initial=-1) + 1, np.inf)
        self.number = np.zeros(len(self.time), dtype=np.int64)
        self.of_size = np.full(self.size.max(initial=-1) + 1, np.inf)
        self.fastest = np.inf

    def could_change(self, rows: IntArray, bound: FloatArray) -> BoolArray:
        """Which rows, by the bound of their times, could better their layout's best, or stand near the best of all."""
        better = (bound < self.time[self.group[rows]]) & (bound <= _HOPELESS * self.of_size[self.size[rows]])
        mask: BoolArray = better | (bound <= self.fastest * WITHIN)
        return mask

    def note(self, numbers: IntArray, times: FloatArray) -> None:
        """Take in candidates that fit."""
        if not len(numbers):
            return
        rows = numbers // self.inner
        group = self.group[rows]
        order = np.lexsort((numbers, times, group))
        first = order[np.concatenate([[True], group[order][1:] != group[order][:-1]])]
        first = first[times[first] < self.time[group[first]]]
        self.time[group[first]], self.number[group[first]] = times[first], numbers[first]
        np.minimum.at(self.of_size, self.size[rows[first]], times[first])
        self.fastest = min(self.fastest, float(times.min()))

    def numbers(self) -> IntArray:
        """The best candidates' numbers, fastest first."""
        order = np.argsort(self.time, kind="stable")
        return self.number[order[np.isfinite(self.time[order])]]


def pareto(*costs: FloatArray) -> BoolArray:
    """Which points no other point beats: none is as good in all costs and better in one.

    Parameters
    ----------
    costs
        One array of shape (N,) for each thing that should be small.
    """
    points = np.stack(costs, axis=1)
    order = np.lexsort(points.T[::-1])
    front: list[int] = []
    for index in order:
        kept = points[front]
        beaten = len(front) > 0 and bool(
            np.any(np.all(kept <= points[index], axis=1) & np.any(kept < points[index], axis=1))
        )
        if not beaten:
            front.append(int(index))
    mask = np.zeros(len(points), dtype=np.bool_)
    mask[front] = True
    return mask


class _Grow:
    """A table of candidates that grows by one choice at a time."""

    def __init__(self, space: Space) -> None:
        self.table: dict[str, IntArray] = {}
        self.rows = 1
        self.accepted = space.accepted

    def choose(self, name: str, options: Callable[..., Iterable[int]], *given: str) -> None:
        """Combine each row with the accepted ones of the options that its choices in `given` leave."""
        keys = [self.table[field] for field in given]
        which = np.zeros(self.rows, dtype=np.int64)
        for key in keys:
            values, positions = np.unique(key, return_inverse=True)
            which = np.unique(which * len(values) + positions, return_inverse=True)[1]
        first = np.unique(which, return_index=True)[1]
        accepted = self.accepted.get(name)
        lists = []
        for row in first.tolist():
            found = options(*(int(key[row]) for key in keys))
            lists.append([value for value in found if accepted is None or value in accepted])
        counts = np.array([len(values) for values in lists], dtype=np.int64)
        flat = np.array([value for values in lists for value in values], dtype=np.int64)
        starts = np.cumsum(counts) - counts
        times = counts[which]
        row = np.repeat(np.arange(self.rows), times)
        within = np.arange(len(row)) - np.repeat(np.cumsum(times) - times, times)
        self.table = {field: values[row] for field, values in self.table.items()}
        self.table[name] = flat[starts[which[row]] + within]
        self.rows = len(row)

    def keep(self, mask: BoolArray) -> None:
        """Drop the rows where the mask is false."""
        self.table = {field: values[mask] for field, values in self.table.items()}
        self.rows = int(np.count_nonzero(mask))


def _virtual_stages(layers: int, pipeline: int, micro_batches: int, uneven: bool) -> list[int]:
    """How many chunks a stage may have: rounds of micro batches full, and all layers dealt.

    Where equal chunks are short of all layers, the first and the last stage give what is short.
    """
    if pipeline == 1:
        return [1]
    found = []
    for v in range(1, layers // pipeline + 1):
        middle = -(-layers // (pipeline * v)) * v
        short = pipeline * middle - layers
        dealt = short - short // 2 <= middle - 1 and (uneven or v == 1 or short <= 2)
        if dealt and (v == 1 or micro_batches % pipeline == 0):
            found.append(v)
    return found


def _last_choices(space: Space) -> tuple[dict[str, IntArray], FloatArray]:
    accepted = space.accepted
    recompute = [
        (kind, share)
        for kind, share in _RECOMPUTE_OPTIONS
        if kind in accepted.get("recompute", (kind,))
        and share in accepted.get("recompute_share", (share,))
        and (share == 1.0 or kind in space.partial or "recompute_share" in accepted)
    ]
    if not recompute:
        # A share that is none of the usual ones.
        recompute = [(kind, share) for kind in accepted.get("recompute", (3,)) for share in accepted["recompute_share"]]
    stages = accepted.get("zero_stage", (1, 0, 2, 3))
    sharding = [(stage, kind) for stage in stages for kind in (range(len(_SHARDS)) if stage else (0,))]
    if "shards" in accepted:
        sharding = [(stage, 0) for stage in stages]
    pairs = [(*again, *shards) for shards in sharding for again in recompute]
    columns = np.array(pairs, dtype=np.float64).reshape(len(pairs), 4).T
    last = {"recompute": columns[0], "zero_stage": columns[2], "shards": columns[3]}
    return {name: values.astype(np.int64) for name, values in last.items()}, columns[1].copy()


def _shards(made: Mapping[str, IntArray], space: Space) -> IntArray:
    """How many ranks share one copy: all replicas, or the largest part of them that a place in the network holds."""
    replicas = made["data"] * made["context"]
    if "shards" in space.accepted:
        wanted = np.minimum(made["data"], int(space.accepted["shards"][0]))
        return np.where(made["zero_stage"] == 0, replicas, made["context"] * np.gcd(wanted, made["data"]))
    place = np.where(made["shards"] == 1, space.island, space.domain) // np.maximum(1, made["tensor"] * made["context"])
    part = np.gcd(np.maximum(place, 1), made["data"]) * made["context"]
    return np.where(made["shards"] == 0, replicas, part)


def _positions(table: Mapping[str, IntArray], names: Iterable[str]) -> IntArray:
    """For each row the position of its values among the different ones."""
    key = np.zeros(len(table["tensor"]), dtype=np.int64)
    for name in names:
        values, positions = np.unique(table[name], return_inverse=True)
        key = np.unique(key * max(1, len(values)) + positions, return_inverse=True)[1]
    return key


def _devices(table: Mapping[str, IntArray]) -> IntArray:
    """For each row the position of its number of devices among the different ones."""
    devices = table["tensor"] * table["pipeline"] * table["context"] * table["data"]
    return _positions({"tensor": devices}, ["tensor"])


@cache
def _divisors(number: int) -> tuple[int, ...]:
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return tuple(sorted({*small, *(number // d for d in small)}))


def _least_activations(setting: Setting, global_batch: int, table: Mapping[str, IntArray]) -> FloatArray:
    """Bytes that the first stage holds at least: each of its layers' inputs for the micro batches under way."""
    model = setting.model
    tokens = table["micro_batch"] * setting.seq_len / table["context"]
    sharded = np.where(table["sequence_parallel"] == 1, table["tensor"], 1)
    under_way = np.minimum(table["pipeline"], global_batch // (table["data"] * table["micro_batch"]))
    stage = np.maximum(1, model.layers // table["pipeline"] - 1)
    return np.asarray(tokens * model.hidden * 2.0 / sharded * under_way * stage)
