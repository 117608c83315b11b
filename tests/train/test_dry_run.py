"""A dry run against the same processes at work, and against the planner at the size of a supercomputer."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from processes import together
from tiny_runs import make

from modelworks.plan.emit import emit
from modelworks.plan_command import run_of, trainable
from modelworks.spec.errors import InputError
from modelworks.spec.files import loads_run
from modelworks.spec.run import RunSpec
from modelworks.train.dry_run import members
from modelworks.train.layout import layout
from modelworks.train.optimizers import Optimizers
from modelworks.train.parallelize import Parallel, local
from modelworks.train.ranks import Ranks
from modelworks.train_command import dry_run


def held(ranks: Ranks, spec: RunSpec) -> dict[str, Any]:
    """What a process of a run really holds of weights and of the optimizer's state."""
    import torch

    from modelworks.model.decoder import Decoder

    with torch.device("meta"):
        decoder = Decoder(spec.model)
    parallel = Parallel(layout(spec, ranks.world), ranks)
    parallel.apply(decoder, seed=1)
    state = Optimizers(decoder, spec.train, torch.float32, parallel.whole).prepare_state()
    return {
        "weights": sum(local(parameter).nbytes for parameter in decoder.parameters()),
        "optimizer": sum(local(tensor).nbytes for tensor in state.values()),
        "groups": parallel.group_sizes(),
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("network", "fields"),
    [
        ("dense", {"zero_stage": 3}),
        ("dense", {"zero_stage": 3, "tensor": 2}),
        ("mixture", {"zero_stage": 3, "context": 2, "expert": 2}),
        ("mixture", {"zero_stage": 3, "tensor": 2, "expert_tensor": 2, "expert": 2}),
    ],
)
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_dry_run_counts_what_the_processes_hold(network: str, fields: dict[str, int], optimizer: str) -> None:
    spec = make(network, optimizer, None, 4, micro_batch=1, **fields)
    real = together(4, held, spec)
    for rank, member in enumerate(members(spec, [0, 1, 2, 3])):
        assert (member.shards, member.optimizer) == (real[rank]["weights"], real[rank]["optimizer"])
        assert member.groups == real[rank]["groups"]


@pytest.mark.parametrize(
    ("gpus", "global_batch", "stated"),
    [
        (1024, None, []),
        (1024, None, ["parallel.zero_stage=2"]),
        (1024, None, ["parallel.zero_stage=3", "train.optimizer_state=bf16"]),
        pytest.param(2048, None, ["parallel.zero_stage=3", "parallel.pipeline=1"], marks=pytest.mark.slow),
        pytest.param(8192, None, [], marks=pytest.mark.slow),
        pytest.param(100_000, None, [], marks=pytest.mark.slow),
        (100_000, 25_000, []),
    ],
)
def test_a_planned_run_of_grok_1_holds_what_the_plan_says(
    gpus: int, global_batch: int | None, stated: list[str]
) -> None:
    asked = run_of(
        None, stated, model="grok-1", cluster="colossus-100k", gpus=gpus, tokens="2T", global_batch=global_batch
    )
    written = emit(trainable(asked), "modelworks")
    report = dry_run(loads_run(written, [], where="plan"))
    # A batch that is a power of two can't be shared by 100,000.
    assert report["processes"] == gpus or (global_batch is None and 0.9 * gpus <= report["processes"] < gpus)
    stages = [(row["rank"], row["kind"]) for row in report["ranks"]]
    alone = "parallel.pipeline=1" in stated
    assert (stages[0], stages[-1]) == ((0, "first"), (report["processes"] - 1, "first" if alone else "last"))
    assert alone or len(stages) == 2 or stages[1][1] == "middle"
    for row in report["ranks"]:
        assert row["ratio"]["state"] == pytest.approx(1.0, abs=0.01), row


def test_a_rank_that_is_not_there_is_refused() -> None:
    with pytest.raises(InputError, match="--rank 4 is not accepted: 0 to 3 are"):
        list(members(make("dense", "adamw", None, 4, micro_batch=1), [4]))
