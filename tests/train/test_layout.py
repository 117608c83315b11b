"""How the layers of a pipeline are dealt, and which micro batches keep its stages at work."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from modelworks.plan import pipeline as planned
from modelworks.plan.layout import layouts
from modelworks.spec.errors import InputError
from modelworks.spec.files import run_from
from modelworks.spec.run import RunSpec
from modelworks.train.batching import micro_batch
from modelworks.train.layout import deal_layers, layout


def make(processes: int, parallel: dict[str, Any], **train: Any) -> RunSpec:
    return run_from(
        {
            "name": "dealt",
            "model": {"layers": 9, "hidden": 64, "ffn_hidden": 96, "heads": 4, "vocab": 512, "context": 64},
            "train": {"tokens": 10_000, "seq_len": 32, "global_batch": 12, "precision": "fp32"} | train,
            "parallel": parallel,
            "cluster": {"preset": "local"} | dict.fromkeys(("gpus", "gpus_per_node", "scale_up_domain"), processes),
        }
    )


@pytest.mark.parametrize(("stages", "virtual"), list(itertools.product((2, 3, 4, 7), (1, 2, 3))))
def test_every_layer_is_dealt_once_and_chunks_differ_by_what_the_ends_give(stages: int, virtual: int) -> None:
    for layers in range(stages * virtual, 50):
        chunks = deal_layers(layers, stages, virtual)
        assert [layer for chunk in chunks for layer in chunk] == list(range(layers))
        assert len(chunks) == stages * virtual
        assert min(map(len, chunks)) > 0
        assert max(map(len, chunks)) == -(-layers // len(chunks))


@pytest.mark.parametrize("stages", [2, 3, 4, 8])
def test_the_ends_have_as_many_layers_as_the_planner_gives_them(stages: int) -> None:
    for layers in range(stages, 60):
        chunks = deal_layers(layers, stages)
        by_planner = planned.deal_layers(layers, layouts(pipeline=stages))
        assert (len(chunks[0]), len(chunks[-1])) == (by_planner.first[0], by_planner.last[0])
        assert max(map(len, chunks)) == max(by_planner.first[0], by_planner.middle[0], by_planner.last[0])


def test_the_schedule_is_1f1b_or_interleaved_where_a_stage_has_several_chunks() -> None:
    def chosen(**parallel: Any) -> tuple[str, int]:
        resolved = layout(make(4, {"pipeline": 4, **parallel}), 4)
        return resolved.schedule, resolved.virtual_stages

    assert chosen() == ("1f1b", 1)
    assert chosen(virtual_stages=2) == ("interleaved", 2)
    assert chosen(schedule="interleaved") == ("interleaved", 2)
    assert chosen(schedule="zero-bubble") == ("zero-bubble", 1)


@pytest.mark.parametrize(
    ("parallel", "train", "accepted"),
    [
        ({}, {"micro_batch": 4}, "4 or more"),
        ({"data": 2}, {"global_batch": 6}, "4 or more"),
        ({"virtual_stages": 2}, {"micro_batch": 2}, "a multiple of 4"),
        ({"schedule": "zero-bubble"}, {"global_batch": 9}, "a multiple of 4"),
    ],
)
def test_a_global_batch_that_leaves_stages_idle_is_refused(
    parallel: dict[str, Any], train: dict[str, Any], accepted: str
) -> None:
    processes = 4 * parallel.get("data", 1)
    with pytest.raises(InputError, match=rf"^train.global_batch = .* with parallel.pipeline = 4 .*; {accepted} is$"):
        layout(make(processes, {"pipeline": 4, **parallel}, **train), processes)


@pytest.mark.parametrize(("schedule", "counts"), [("1f1b", {4, 6, 12}), ("zero-bubble", {4, 12})])
def test_the_micro_batch_is_chosen_such_that_every_stage_has_work(schedule: str, counts: set[int]) -> None:
    spec = make(4, {"pipeline": 4, "schedule": schedule})
    one = layout(spec, 4)
    assert {count for count in range(1, 13) if 12 % count == 0 and one.fills_pipeline(count)} == counts
    assert 12 // micro_batch(spec, one) in counts
