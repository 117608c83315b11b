"""A plan answers with numbers that add up, keeps what its run states, and refuses what cannot be in a sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from modelworks.plan.layout import layouts
from modelworks.plan.planner import Plan, candidate, plan, precisions, setting_for, software_spec, why_slower
from modelworks.plan.step import evaluate
from modelworks.spec import DeviceSpec, InputError, RunSpec, device_spec, loads_run
from modelworks.spec.files import dumps
from modelworks.train.refusals import refuse_unsupported

LLAMA = """
name = "llama"
model = "llama-3.1-8b"
[train]
seq_len = 4096
global_batch = 128
tokens = "100B"
[cluster]
preset = "h100-superpod"
gpus = 64
"""


def run_of(text: str = LLAMA, *overrides: str) -> RunSpec:
    return loads_run(text, overrides)


@pytest.fixture(scope="module")
def llama() -> Plan:
    return plan(run_of())


def test_the_waterfall_falls_from_the_peak_to_the_mfu(llama: Plan) -> None:
    assert sum(loss.share for loss in llama.waterfall) + llama.mfu == pytest.approx(1.0, abs=1e-9)
    assert {loss.reason for loss in llama.waterfall} == set(llama.best.reasons)
    assert all(loss.share >= -1e-9 for loss in llama.waterfall)


def test_the_whole_run_follows_from_its_step(llama: Plan) -> None:
    assert llama.steps == -(-100 * 10**9 // (4096 * 128))
    assert llama.run_time_s == pytest.approx(llama.steps * llama.step_time_s)
    assert llama.tokens_per_s * llama.step_time_s == pytest.approx(4096 * 128)
    assert llama.cost.device_hours == pytest.approx(llama.devices * llama.run_time_s / 3600)
    peak = llama.device.peak_flops["bf16"]
    assert llama.mfu == pytest.approx(llama.flop_per_step / llama.step_time_s / peak / llama.devices)


def test_the_resolved_run_plans_to_the_same_step(llama: Plan) -> None:
    assert "auto" not in llama.run.parallel.model_dump().values()
    again = plan(loads_run(dumps(llama.run)))
    assert again.step_time_s == pytest.approx(llama.step_time_s, rel=1e-12)
    assert again.run == llama.run
    assert again.best.layout == llama.best.layout


def test_alternatives_are_slower_distinct_and_say_why(llama: Plan) -> None:
    assert len(llama.alternatives) == 5
    degrees = [
        tuple(other.candidate.layout[n] for n in ("tensor", "pipeline", "context")) for other in llama.alternatives
    ]
    assert len(set(degrees)) == len(degrees)
    assert all(other.slower >= 0 for other in llama.alternatives)
    assert all("%" in other.why or "equal" in other.why for other in llama.alternatives)


def test_the_reasons_that_a_layout_loses_by_are_those_that_grew() -> None:
    base = setting_for(run_of().model, 4096, run_of().cluster, device_spec("h100-sxm"), software_spec("megatron-core"))
    two = evaluate(base, 128, layouts(tensor=[1, 8], data=[64, 8]))
    assert "tensor-parallel exchanges +" in why_slower(candidate(two, 0), candidate(two, 1))


def test_a_tenth_more_of_anything_saves_between_nothing_and_a_tenth(llama: Plan) -> None:
    found = {what.resource: what for what in llama.sensitivity}
    assert set(found) == {"memory", "memory bandwidth", "FLOPs", "NVLink", "network"}
    for what in found.values():
        assert -1e-9 <= what.same_layout <= 1 - 1 / 1.1 + 1e-9
        assert what.searched >= what.same_layout - 1e-12
    assert found["FLOPs"].searched > found["network"].searched


def test_every_assumption_has_a_source_and_a_certainty(llama: Plan) -> None:
    assert {"device h100-sxm", "software megatron-core", "prices h100-sxm", "planner planner"} <= {
        fact.subject for fact in llama.assumptions
    }
    assert all(fact.source and fact.certainty in ("published", "estimated", "assumed") for fact in llama.assumptions)


def test_a_plan_is_json_with_the_keys_that_programs_read(llama: Plan) -> None:
    plain = json.loads(json.dumps(llama.as_dict()))
    assert plain["name"] == "llama"
    assert plain["device"] == "h100-sxm"
    for key in (
        "step_time_s", "tokens_per_s", "mfu", "flop_per_step", "memory_bytes", "precision", "micro_batch", "steps",
        "run_time_s",
    ):  # fmt: skip
        assert plain[key], key
    assert plain["memory_by_stage"]["first"]["weights"] > 0


def test_stated_choices_are_kept(llama: Plan) -> None:
    stated = plan(run_of(LLAMA, "parallel.tensor=4", "parallel.recompute=full", "train.micro_batch=2"))
    assert stated.best.layout["tensor"] == 4
    assert stated.best.layout["recompute"] == "full"
    assert stated.micro_batch == 2
    assert stated.step_time_s >= llama.step_time_s


def test_a_plain_plan_keeps_to_what_the_framework_does_and_a_wide_one_is_at_least_as_fast(llama: Plan) -> None:
    for name, stages in (("megatron-core", {0, 1}), ("torchtitan", {0, 2, 3}), ("maxtext", {0, 3})):
        assert plan(run_of(LLAMA, f"software={name}"), top=0).best.layout["zero_stage"] in stages
    wide = plan(run_of(LLAMA, "cluster.gpus=16"), wide=True)
    assert wide.step_time_s <= plan(run_of(LLAMA, "cluster.gpus=16")).step_time_s
    assert wide.considered > llama.considered
    devices = [point.devices for point in wide.frontier]
    assert devices == sorted(devices)
    assert len(devices) > 1
    times = [point.days for point in wide.frontier]
    costs = [point.usd for point in wide.frontier]
    for index, (days, usd) in enumerate(zip(times, costs, strict=True)):
        for other in range(len(times)):
            beaten = times[other] <= days and costs[other] <= usd and devices[other] <= devices[index]
            assert other == index or not beaten


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ("model=llama-3.1-70b", "parallel.tensor=1", "parallel.pipeline=1", "parallel.zero_stage=1"),
            "parallel.tensor = 1 leaves no layout that fits 64 x h100-sxm; with 'auto' it is ",
        ),
        (("parallel.zero_stage=0", "parallel.tensor=1", "parallel.pipeline=1"), "leaves no layout that fits"),
        (("cluster.gpus=1000000",), "cluster.gpus = 1000000 is not accepted: up to 524288 are"),
        (
            ("model=llama-3.1-405b", "cluster.gpus=8"),
            "llama-3.1-405b (405.9 billion parameters) doesn't fit 8 x h100-sxm",
        ),
        (("train.precision=fp8", "cluster.device=a100-80gb"), "train.precision = 'fp8' is not accepted on a100-80gb"),
        (("software=megatron",), "no preset 'megatron' in software; did you mean"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_a_sentence(overrides: tuple[str, ...], sentence: str) -> None:
    with pytest.raises(InputError) as refused:
        plan(run_of(LLAMA, *overrides))
    assert sentence in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_model_that_is_too_large_says_by_how_much_and_what_would_hold_it() -> None:
    with pytest.raises(
        InputError, match=r"needs [\d,.]+ GiB a device, [\d,.]+ GiB more than there are; (\d+) of them"
    ) as no:
        plan(run_of(LLAMA, "model=llama-3.1-70b", "cluster.gpus=8"))
    devices = int(str(no.value).split("; ")[1].split()[0])
    assert plan(run_of(LLAMA, "model=llama-3.1-70b", f"cluster.gpus={devices}"), top=0).memory_bytes <= 80 * 2**30


def test_devices_that_the_batch_cannot_use_stay_idle_and_it_is_said() -> None:
    made = plan(run_of(LLAMA, "cluster.gpus=136"))
    assert made.devices == 128
    assert made.run.cluster.gpus == 128
    assert any("8 of 136 devices stay idle" in note for note in made.notes)


@pytest.mark.parametrize(
    ("rates", "asked", "chosen"),
    [
        ({"fp32": 1e12, "bf16": 4e12}, "auto", ["bf16"]),
        ({"fp32": 1e12, "bf16": 1e10}, "auto", ["fp32"]),
        ({"fp32": 1e12}, "auto", ["fp32"]),
        ({"fp32": 1e12, "bf16": 4e12}, "fp32", ["fp32"]),
    ],
)
def test_auto_precision_is_the_faster_one(rates: dict[str, float], asked: str, chosen: list[str]) -> None:
    fields = {"name": "test", "memory_bytes": 2**40, "memory_bandwidth_bytes": 1e11, "power_w": 100.0}
    device = DeviceSpec.model_validate(fields | {"peak_flops": rates})
    assert precisions(run_of(LLAMA, f"train.precision={asked}"), device) == chosen


def test_this_machine_is_planned_as_one_process_that_train_accepts(home: Path) -> None:
    made = plan(loads_run('model = "grok-tiny"\n[train]\noptimizer = "muon"\n'))
    assert (made.device.name, made.devices, made.software.name) == ("local", 1, "modelworks")
    assert made.run.parallel.tensor == made.run.parallel.data == 1
    assert 32 % made.micro_batch == 0
    assert any("not been measured" in note for note in made.notes)
    refuse_unsupported(made.run, 1)
    adamw = plan(loads_run('model = "grok-tiny"\n'))
    assert made.best.reasons["optimizer"] > adamw.best.reasons["optimizer"]


def test_grok_1_fits_where_recipes_have_run_it() -> None:
    grok = 'model = "grok-1"\ntrain = {seq_len = 8192, global_batch = 1024}\n[cluster]\npreset = "h100-superpod"\n'
    made = plan(loads_run(grok + "gpus = 1024\n"), top=2)
    assert 0.25 < made.mfu < 0.6
    assert made.memory_bytes <= 80 * 2**30
