"""Layouts in their order, and a stated layout's memory, against the plan that they belong to."""

from __future__ import annotations

import pytest

from modelworks.plan.planner import plan
from modelworks.plan.ranking import ranked
from modelworks.plan.stated import stated_memory
from modelworks.spec.errors import InputError
from modelworks.spec.files import device_spec, run_from
from modelworks.spec.run import RunSpec


def run(gpus: int, batch: int = 64, cluster: str = "h100-superpod", **parallel: object) -> RunSpec:
    size = {"gpus_per_node": gpus, "scale_up_domain": gpus} if cluster == "local" else {}
    model = "grok-tiny" if cluster == "local" else "llama-3.1-8b"
    return run_from(
        {
            "model": {"preset": model},
            "train": {"seq_len": 512, "global_batch": batch, "tokens": 10_000_000},
            "parallel": parallel,
            "cluster": {"preset": cluster, "gpus": gpus} | size,
        }
    )


def test_the_first_layout_is_the_plans_best() -> None:
    asked = run(32)
    assert next(ranked(asked)) == plan(asked, top=0).run


def test_layouts_take_all_devices_keep_what_is_stated_and_get_slower() -> None:
    asked = run(16, tensor=2, zero_stage=1, schedule="1f1b")
    found = list(ranked(asked))
    assert len(found) > 3
    times = [plan(one, top=0).step_time_s for one in found[:6]]
    assert times == sorted(times)
    for one in found:
        parallel = one.parallel
        assert (parallel.tensor, parallel.zero_stage, one.cluster.gpus) == (2, 1, 16)
        assert parallel.tensor * parallel.pipeline * parallel.context * parallel.data == 16  # type: ignore[operator]


def test_processes_of_one_processor_share_its_memory() -> None:
    asked = run(4, cluster="local", data=4, zero_stage=0, recompute="none")
    asked = asked.model_copy(update={"train": asked.train.model_copy(update={"micro_batch": 1})})
    whole = device_spec("local")
    needed = plan(asked, top=0, device=whole).memory_bytes
    with pytest.raises(InputError):
        list(ranked(asked, whole.model_copy(update={"memory_bytes": int(3.9 * needed)})))
    assert list(ranked(asked, whole.model_copy(update={"memory_bytes": int(4.1 * needed)})))


@pytest.mark.parametrize("gpus", [8, 256])
def test_a_stated_layouts_memory_is_that_of_its_plan(gpus: int) -> None:
    planned = plan(run(gpus), top=0)
    found = stated_memory(planned.run, planned.software.name)
    assert found.keys() == planned.memory_by_stage.keys()
    for stage, memory in planned.memory_by_stage.items():
        assert found[stage] == pytest.approx(memory), stage
