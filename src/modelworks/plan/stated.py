"""What a run takes in the layout that its spec states, whether or not that fits: for a check against what is built."""

from __future__ import annotations

from modelworks.plan.layout import layouts
from modelworks.plan.planner import memory_by_stage, setting_for, software_spec
from modelworks.spec.errors import InputError
from modelworks.spec.files import device_spec
from modelworks.spec.run import RunSpec

_DEGREES = ("tensor", "pipeline", "context", "expert", "expert_tensor", "virtual_stages", "zero_stage")


def stated_memory(run: RunSpec, software: str) -> dict[str, dict[str, float]]:
    """Bytes on a device of each kind of stage (`first`, `middle`, `last`), by component of `memory.MEMORY`.

    Parameters
    ----------
    run
        With its degrees stated; other choices that are `auto` are 1, or nothing.
    software
        The framework that trains it.

    Raises
    ------
    InputError
        If the data-parallel degree isn't stated.
    """
    parallel, train = run.parallel, run.train
    if parallel.data == "auto":
        raise InputError("parallel.data = 'auto' has no memory of its own: a planned run has made its choice")
    chosen = {name: 1 if (value := getattr(parallel, name)) == "auto" else value for name in _DEGREES}
    shard = parallel.data if parallel.shard == "auto" else parallel.shard
    layout = layouts(
        **chosen,
        data=parallel.data,
        shards=shard * chosen["context"],
        micro_batch=1 if train.micro_batch == "auto" else train.micro_batch,
        recompute="none" if parallel.recompute == "auto" else parallel.recompute,
        recompute_share=1.0 if parallel.recompute_share == "auto" else parallel.recompute_share,
        precision="fp32" if train.precision == "fp32" else "fp8" if train.precision == "fp8" else "bf16",
    )
    device = device_spec(run.cluster.device)
    setting = setting_for(run.model, train.seq_len, run.cluster, device, software_spec(software), train=train)
    return memory_by_stage(setting, train.global_batch, layout)
