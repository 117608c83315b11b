"""Which part of a run each of its processes has: the degrees of a spec, resolved for a number of processes.

The processes form a grid of ``pipeline x data x context x tensor``, the last changing fastest, so that those which
exchange most stand next to each other. Within the data-parallel ranks, weights are split over ``shard`` of them and
repeated over the others (HSDP, where that is more than one copy). The layers are dealt in chunks to the pipeline's
stages as the planner deals them, `virtual_stages` chunks to each.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, Literal

from modelworks.spec.errors import InputError
from modelworks.spec.run import RunSpec

Schedule = Literal["1f1b", "interleaved", "zero-bubble"]


@dataclass(frozen=True)
class Layout:
    """Degrees of parallelism whose product is the number of processes."""

    data: int = 1
    shard: int = 1
    """Data-parallel ranks that split weights (or what of them the ZeRO stage splits) among them."""
    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    expert: int = 1
    expert_tensor: int = 1
    zero_stage: int = 1
    virtual_stages: int = 1
    """Chunks of layers that each stage of the pipeline has."""
    schedule: Schedule = "1f1b"

    @property
    def processes(self) -> int:
        """Processes in all."""
        return self.pipeline * self.data * self.context * self.tensor

    @property
    def replicas(self) -> int:
        """Copies of the sharded weights."""
        return self.data // self.shard

    def describe(self) -> str:
        """The degrees above one, in words."""
        degrees = {
            "pipeline": self.pipeline,
            "virtual stages": self.virtual_stages,
            "replicas": self.replicas,
            "shards": self.shard,
            "context": self.context,
            "tensor": self.tensor,
            "expert": self.expert,
        }
        return ", ".join(f"{name} {degree}" for name, degree in degrees.items() if degree > 1) or "one process"

    def fills_pipeline(self, micro_batches: int) -> bool:
        """Whether so many micro batches keep every stage at work: one for each, or whole rounds of that."""
        rest = 0 if self.schedule == "1f1b" else micro_batches % self.pipeline
        return micro_batches >= self.pipeline and rest == 0


def layout(spec: RunSpec, processes: int) -> Layout:
    """Resolve a spec's degrees for a number of processes; `auto` takes what the other degrees leave.

    Raises
    ------
    InputError
        If the degrees don't multiply to the processes, or don't divide what they split.
    """
    parallel = spec.parallel
    given = {name: getattr(parallel, name) for name in ("tensor", "pipeline", "context", "data")}
    product = 1
    for name, degree in given.items():
        product *= 1 if degree == "auto" or name == "data" else degree
    degrees = " x ".join(f"{name} {degree}" for name, degree in given.items() if degree != "auto")
    if processes % product:
        raise InputError(f"parallel: {degrees} = {product} doesn't divide into {processes} processes")
    data = processes // product if parallel.data == "auto" else parallel.data
    if data * product != processes:
        raise InputError(f"parallel: {degrees} = {data * product} is not accepted on {processes} processes")
    if spec.train.global_batch % data:
        raise InputError(
            f"train.global_batch = {spec.train.global_batch} is not accepted on {data} data-parallel processes: "
            f"a multiple of {data} is"
        )
    spec = _held_whole(spec)
    shard = _shard(spec, data)
    if (micro := spec.train.micro_batch) != "auto" and (spec.train.global_batch // data) % micro:
        raise InputError(
            f"train.micro_batch = {micro} is not accepted on {data} data-parallel processes: a divisor of "
            f"{spec.train.global_batch // data}, each one's share of train.global_batch, is"
        )
    _refuse_what_does_not_divide(spec, data)
    one: dict[str, Any] = {
        name: 1 if (degree := getattr(parallel, name)) == "auto" else degree for name in _WITHOUT_REST
    }
    zero_stage = 1 if spec.parallel.zero_stage == "auto" else spec.parallel.zero_stage
    resolved = Layout(data=data, shard=shard, zero_stage=zero_stage, **one, **_pipelined(spec))
    _refuse_idle_stages(spec, resolved)
    return resolved


def _held_whole(spec: RunSpec) -> RunSpec:
    """A run at ZeRO 0 if it has an adapter, beside whose frozen weights there is nothing to split, or eyes."""
    if spec.adapter is not None:
        why = "[adapter], whose frozen weights every process holds whole"
    elif spec.model.vision is not None:
        why = "[model.vision], whose network every process holds whole"
    else:
        return spec
    if spec.parallel.zero_stage not in ("auto", 0):
        raise InputError(f"parallel.zero_stage = {spec.parallel.zero_stage} is not accepted with {why}: 0 is")
    return spec.model_copy(update={"parallel": spec.parallel.model_copy(update={"zero_stage": 0})})


def deal_layers(layers: int, pipeline: int, virtual_stages: int = 1) -> list[range]:
    """Which layers each chunk of a pipeline has; chunk c belongs to stage ``c % pipeline``.

    Chunks are equal but for what is short of a multiple. Half of that is taken from the first stage, which embeds, and
    the rest from the last one, which has the head; inner stages give what these can't. So does the planner deal them.
    """
    chunks = pipeline * virtual_stages
    size = -(-layers // chunks)
    short = chunks * size - layers
    first, last = range(0, chunks, pipeline), range(chunks - 1, -1, -pipeline)
    inner = [chunk for chunk in range(chunks) if chunk not in first and chunk not in last]
    sizes = [size] * chunks
    # No chunk gives its last layer.
    of_first = (list(first) * (size - 1))[: short // 2]
    of_last = (list(last) * (size - 1))[: short - len(of_first)]
    of_inner = (inner * (size - 1))[: short - len(of_first) - len(of_last)]
    for chunk in of_first + of_last + of_inner:
        sizes[chunk] -= 1
    ends = list(itertools.accumulate(sizes))
    return [range(end - size, end) for size, end in zip(sizes, ends, strict=True)]


_WITHOUT_REST = ("tensor", "pipeline", "context", "expert", "expert_tensor")
"""The degrees whose `auto` is 1."""


def _shard(spec: RunSpec, data: int) -> int:
    """Data-parallel ranks that split weights among them: none where nothing is split."""
    shard = spec.parallel.shard
    if spec.parallel.zero_stage == 0:
        if shard not in (1, "auto"):
            raise InputError(
                f"parallel.shard = {shard} is not accepted with zero_stage = 0, which splits nothing: 1 is"
            )
        return 1
    if shard == "auto":
        return data
    if data % shard:
        raise InputError(f"parallel.shard = {shard} is not accepted: a divisor of the data-parallel degree {data} is")
    return shard


def _pipelined(spec: RunSpec) -> dict[str, Any]:
    """The schedule and its chunks: as stated, else 1F1B, interleaved where a stage has several chunks."""
    parallel, pipeline = spec.parallel, 1 if spec.parallel.pipeline == "auto" else spec.parallel.pipeline
    if pipeline == 1:
        return {}
    schedule, virtual = parallel.schedule, parallel.virtual_stages
    if virtual == "auto":
        virtual = 2 if schedule == "interleaved" else 1
    if pipeline * virtual > spec.model.layers:
        raise InputError(
            f"parallel.schedule = {schedule!r} is not accepted with parallel.pipeline = {pipeline}: it takes "
            f"{virtual} chunks of layers for each stage, and model.layers = {spec.model.layers}"
        )
    if schedule == "auto":
        schedule = "interleaved" if virtual > 1 else "1f1b"
    return {"virtual_stages": virtual, "schedule": schedule}


def _refuse_idle_stages(spec: RunSpec, one: Layout) -> None:
    """Refuse a global batch whose micro batches can't keep a pipeline's stages at work."""
    if one.pipeline == 1:
        return
    share, micro = spec.train.global_batch // one.data, spec.train.micro_batch
    if not one.fills_pipeline(share if micro == "auto" else share // micro):
        made = f"{share} micro batches at most" if micro == "auto" else f"{share // micro} micro batches"
        accepted = f"{one.pipeline} or more" if one.schedule == "1f1b" else f"a multiple of {one.pipeline}"
        raise InputError(
            f"train.global_batch = {spec.train.global_batch} is not accepted with parallel.pipeline = {one.pipeline} "
            f"(schedule {one.schedule}): it makes {made} on each of {one.data} data-parallel ranks; {accepted} is"
        )


def _refuse_what_does_not_divide(spec: RunSpec, data: int) -> None:
    """Refuse degrees of tensor, context and expert parallelism that leave a process without an equal part."""
    parallel, model = spec.parallel, spec.model
    degree = {name: 1 if (value := getattr(parallel, name)) == "auto" else value for name in _WITHOUT_REST}
    tensor, context, expert, expert_tensor = (degree[name] for name in ("tensor", "context", "expert", "expert_tensor"))
    if tensor > 1 and not parallel.sequence_parallel:
        raise InputError("parallel.sequence_parallel = false is not accepted with parallel.tensor above 1: true is")
    sizes = [
        (spec.train.seq_len, "train.seq_len", tensor * context, "parallel.tensor x parallel.context"),
        (model.vocab, "model.vocab", tensor, "parallel.tensor"),
    ]
    if tensor > 1:
        # Fewer key-value heads than ranks would have to stand on several of them.
        sizes.append((model.kv_heads, "model.kv_heads", tensor, "parallel.tensor"))
    if model.dense_layers:
        sizes.append((model.ffn_hidden, "model.ffn_hidden", tensor, "parallel.tensor"))
    for size, what, parts, names in sizes:
        if size % parts:
            raise InputError(f"{names} = {parts} is not accepted: it doesn't divide {what} = {size}")
    if expert_tensor not in (1, tensor):
        accepted = " or ".join(map(str, dict.fromkeys((1, tensor))))
        raise InputError(
            f"parallel.expert_tensor = {expert_tensor} is not accepted with parallel.tensor = {tensor}: {accepted} is"
        )
    members = data * context * (tensor if expert_tensor == 1 else 1)
    if members % expert:
        raise InputError(
            f"parallel.expert = {expert} is not accepted: a divisor of the {members} processes that hold tokens is"
        )
    shard = _shard(spec, data) * members // data
    if spec.parallel.zero_stage != 0 and shard % expert and expert % shard:
        raise InputError(
            f"parallel.expert = {expert} is not accepted with parallel.shard = {shard * data // members}: it and the "
            f"{shard} processes that share weights must divide one another"
        )
