"""What is written for a framework uses its own names, and says the layout again."""

from __future__ import annotations

import math
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from modelworks.plan.emit import FRAMEWORKS, emit
from modelworks.spec import InputError, RunSpec, loads_run

KNOWN = tomllib.loads((Path(__file__).parent / "framework_flags.toml").read_text())
DENSE = {
    "tensor": 8, "pipeline": 16, "context": 2, "data": 4, "expert": 1, "expert_tensor": 1, "virtual_stages": 1,
    "schedule": "1f1b", "shard": 4, "zero_stage": 1, "sequence_parallel": True, "recompute": "none",
    "recompute_share": 1.0,
}  # fmt: skip
EXPERTS = DENSE | {"tensor": 4, "pipeline": 8, "expert": 8, "virtual_stages": 8, "schedule": "interleaved", "data": 16}


def run_of(model: str = "llama-3.1-405b", precision: str = "bf16", **parallel: Any) -> RunSpec:
    chosen = (EXPERTS if model == "grok-1" else DENSE) | parallel
    lines = "\n".join(f"{name} = {str(value).lower() if isinstance(value, bool) else repr(value)}"
                      for name, value in chosen.items())  # fmt: skip
    return loads_run(
        f'model = "{model}"\n[train]\nseq_len = 8192\nglobal_batch = 512\nmicro_batch = 1\nprecision = "{precision}"\n'
        f'[cluster]\npreset = "colossus-100k"\ngpus = 1024\n[parallel]\n{lines}\n'
    )


def settings(framework: str, text: str) -> dict[str, str]:
    """A framework's settings by name, from what was written."""
    plain = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    if framework == "megatron":
        words = [line.rstrip("\\").strip() for line in plain.splitlines()]
        return {word.partition(" ")[0]: word.partition(" ")[2] for word in words}
    if framework == "torchtitan":
        return {f"{table}.{k}": str(v) for table, values in tomllib.loads(text).items() for k, v in values.items()}
    mark = "=" if framework == "nemo" else ": "
    return dict(line.split(mark, 1) for line in plain.splitlines())  # type: ignore[arg-type]


VARIANTS = [
    run_of(),
    run_of("grok-1"),
    run_of("grok-1", precision="fp8", zero_stage=3),
    run_of("grok-1", recompute="full", recompute_share=0.5),
    run_of(recompute="full"),
    run_of(recompute="selective"),
    run_of(recompute="projections", recompute_share=0.5),
    run_of(zero_stage=2, shard=2),
    run_of(zero_stage=0, shard=1, sequence_parallel=False),
    run_of(schedule="zero-bubble"),
    run_of("deepseek-v3", pipeline=4, tensor=2, data=64, expert=16, shard=64),
]


@pytest.mark.parametrize("framework", [name for name in FRAMEWORKS if name != "modelworks"])
@pytest.mark.parametrize("run", VARIANTS, ids=range(len(VARIANTS)))
def test_every_setting_is_one_that_the_framework_declares(framework: str, run: RunSpec) -> None:
    written = settings(framework, emit(run, framework))
    assert set(written) <= set(KNOWN[framework]["flags"])
    assert written
    for name, accepted in KNOWN[framework].get("values", {}).items():
        assert written.get(name, accepted[0]) in accepted


def test_every_declared_setting_of_the_list_is_written_for_some_run() -> None:
    for framework, known in KNOWN.items():
        used = {name for run in VARIANTS for name in settings(framework, emit(run, framework))}
        assert set(known["flags"]) - used <= _MODEL_FLAGS


_MODEL_FLAGS = {"--qk-layernorm", "dcn_tensor_parallelism"}


def test_megatrons_degrees_multiply_to_the_devices_and_layers_add_up() -> None:
    run = run_of()
    flags = settings("megatron", emit(run, "megatron"))
    assert flags["--tensor-model-parallel-size"] == "8"
    assert flags["--pipeline-model-parallel-size"] == "16"
    assert flags["--context-parallel-size"] == "2"
    # 126 layers over 16 stages, as Llama 3 was trained: one less at both ends.
    first, last = int(flags["--decoder-first-pipeline-num-layers"]), int(flags["--decoder-last-pipeline-num-layers"])
    assert (first, last) == (7, 7)
    assert first + last + 14 * 8 == run.model.layers
    assert "--num-virtual-stages-per-pipeline-rank" not in flags
    assert settings("megatron", emit(run_of("grok-1"), "megatron"))["--num-virtual-stages-per-pipeline-rank"] == "8"


def test_torchtitans_config_has_the_layout() -> None:
    config = tomllib.loads(emit(run_of(zero_stage=3, shard=2), "torchtitan"))
    parallel = config["parallelism"]
    ranks = math.prod(
        parallel[f"{name}_degree"]
        for name in (
            "data_parallel_replicate",
            "data_parallel_shard",
            "tensor_parallel",
            "context_parallel",
            "pipeline_parallel",
        )
    )
    assert ranks == 1024
    assert parallel["fsdp_reshard_after_forward"] == "always"
    assert config["training"]["local_batch_size"] * 4 == config["training"]["global_batch_size"]
    stages, less = parallel["pipeline_parallel_layers_per_stage"], 2
    assert stages * 16 - less == 126


def test_maxtexts_mesh_multiplies_to_the_devices_and_its_batch_to_the_global_one() -> None:
    for run in (run_of(zero_stage=3), run_of("grok-1", zero_stage=3)):
        values = settings("maxtext", emit(run, "maxtext"))
        mesh = math.prod(int(value) for name, value in values.items() if name.endswith("_parallelism"))
        assert mesh == 1024
        inside = math.prod(int(value) for name, value in values.items() if re.match(r"ici_.*_parallelism", name))
        assert inside == 8
        batch = float(values["per_device_batch_size"]) * 1024 * int(values["gradient_accumulation_steps"])
        assert batch == pytest.approx(512)


def test_sharded_optimizer_state_and_sharded_weights_are_different_settings_of_maxtext_and_nemo() -> None:
    one, three = (settings("maxtext", emit(run_of(zero_stage=stage), "maxtext")) for stage in (1, 3))
    assert (one["shard_optimizer_over_data"], three["shard_optimizer_over_data"]) == ("true", "false")
    assert int(one["ici_data_parallelism"]) * int(one["dcn_data_parallelism"]) == 4
    assert int(three["ici_fsdp_parallelism"]) * int(three["dcn_fsdp_parallelism"]) == 4
    one, three = (settings("nemo", emit(run_of(zero_stage=stage), "nemo")) for stage in (1, 3))
    assert one["ddp.use_distributed_optimizer"] == "true"
    assert "dist.use_megatron_fsdp" not in one
    assert three["ddp.data_parallel_sharding_strategy"] == "optim_grads_params"
    assert three["checkpoint.ckpt_format"] == "fsdp_dtensor"


def test_nemos_overrides_are_values_of_yaml() -> None:
    written = settings("nemo", emit(run_of(recompute="projections", recompute_share=1.0), "nemo"))
    assert written["model.recompute_modules"] == "[core_attn,layernorm,mlp]"
    assert written["model.virtual_pipeline_model_parallel_size"] == "null"
    assert written["model.sequence_parallel"] == "true"
    assert written["model.pipeline_model_parallel_size"] == "16"


def test_what_a_framework_cannot_do_is_said() -> None:
    assert "# not expressed: the zero-bubble schedule" in emit(run_of(schedule="zero-bubble"), "megatron")
    assert "InterleavedZeroBubble" in emit(run_of(schedule="zero-bubble"), "torchtitan")
    assert "# not expressed: zero_stage = 2" in emit(run_of(zero_stage=2), "maxtext")
    assert "# not expressed: recomputation of 50%" in emit(
        run_of(recompute="projections", recompute_share=0.5), "maxtext"
    )
    assert "#" not in emit(run_of(), "megatron")


def test_our_own_is_the_run_spec_itself() -> None:
    assert loads_run(emit(run_of("grok-1"), "modelworks")) == run_of("grok-1")


def test_an_unknown_framework_and_an_open_choice_are_refused() -> None:
    with pytest.raises(InputError, match="--emit megatrn is not accepted; did you mean 'megatron'"):
        emit(run_of(), "megatrn")
    with pytest.raises(InputError, match=r"parallel\.data = 'auto' cannot be written out"):
        emit(loads_run('model = "grok-tiny"\n'), "megatron")
