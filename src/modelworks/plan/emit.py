"""A planned layout as the flags or the config file of the framework that is to run it.

Each framework has one function from a run whose choices are all made (`Plan.run`) to text. What a framework has no
setting for is said in a comment at the end, so that nothing gets lost silently.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import tomli_w

from modelworks.plan.layout import layouts
from modelworks.plan.pipeline import deal_layers
from modelworks.spec.errors import InputError
from modelworks.spec.fields import nearest
from modelworks.spec.files import dumps
from modelworks.spec.run import ParallelSpec, RunSpec


@dataclass(frozen=True)
class _Choices:
    """A resolved run's layout as plain numbers."""

    data: int
    shard: int
    tensor: int
    pipeline: int
    context: int
    expert: int
    expert_tensor: int
    virtual: int
    schedule: str
    zero_stage: int
    sequence_parallel: bool
    recompute: str
    share: float
    micro_batch: int
    micro_batches: int
    precision: str
    first: int
    """Layers of the first stage."""
    middle: int
    last: int


def emit(run: RunSpec, framework: str) -> str:
    """The run in a framework's own words.

    Parameters
    ----------
    run
        With every choice made: `Plan.run`.
    framework
        One of `FRAMEWORKS`.

    Raises
    ------
    InputError
        If the framework isn't known, or a choice of the run is still `auto`.
    """
    if framework not in FRAMEWORKS:
        raise InputError(f"--emit {framework} is not accepted; {nearest(framework, FRAMEWORKS)}")
    return FRAMEWORKS[framework](run)


def megatron(run: RunSpec) -> str:
    """Command-line flags of Megatron-LM (core_v0.12 and later)."""
    c, model = _choices(run), run.model
    lines: list[str] = []
    left_out = _beside(run)
    flags: dict[str, Any] = {
        "--num-layers": model.layers,
        "--hidden-size": model.hidden,
        "--ffn-hidden-size": model.ffn_hidden,
        "--num-attention-heads": model.heads,
        "--kv-channels": model.head_dim,
        "--max-position-embeddings": model.context,
        "--seq-length": run.train.seq_len,
        "--micro-batch-size": c.micro_batch,
        "--global-batch-size": run.train.global_batch,
        "--train-iters": run.train.steps,
        "--tensor-model-parallel-size": c.tensor,
        "--pipeline-model-parallel-size": c.pipeline,
        "--context-parallel-size": c.context,
    }
    if model.kv_heads != model.heads and model.latent_attention is None:
        flags |= {"--group-query-attention": True, "--num-query-groups": model.kv_heads}
    flags |= {"--swiglu": model.gated_mlp and model.activation == "silu", "--disable-bias-linear": not model.mlp_bias}
    flags |= {"--normalization": "RMSNorm" if model.norm == "rms" else "LayerNorm"}
    flags |= {"--position-embedding-type": "rope" if model.position == "rope" else "learned_absolute"}
    flags |= {"--untie-embeddings-and-output-weights": not model.tied_embeddings, "--qk-layernorm": model.qk_norm}
    flags |= {"--multi-latent-attention": model.latent_attention is not None}
    if model.moe is not None:
        flags |= {
            "--num-experts": model.moe.experts,
            "--moe-router-topk": model.moe.top_k,
            "--moe-ffn-hidden-size": model.moe.expert_hidden,
            "--moe-grouped-gemm": True,
            "--expert-model-parallel-size": c.expert,
            "--expert-tensor-parallel-size": c.expert_tensor,
        }
    flags |= {"--sequence-parallel": c.sequence_parallel and c.tensor > 1}
    if c.virtual > 1:
        flags["--num-virtual-stages-per-pipeline-rank"] = c.virtual
    if c.pipeline > 1 and c.first != c.middle:
        flags["--decoder-first-pipeline-num-layers"] = c.first
    if c.pipeline > 1 and c.last != c.middle:
        flags["--decoder-last-pipeline-num-layers"] = c.last
    if c.schedule == "zero-bubble":
        left_out.append("the zero-bubble schedule: Megatron-LM runs 1F1B")
    flags |= _megatron_sharding(c) | _megatron_recompute(run, c, left_out)
    flags |= {"--bf16": c.precision in ("bf16", "fp8"), "--fp8-format": "hybrid" if c.precision == "fp8" else False}
    for name, value in flags.items():
        if value is not False:
            lines.append(name if value is True else f"{name} {value}")
    return " \\\n".join(lines) + "\n" + _comments(left_out)


def _megatron_sharding(c: _Choices) -> dict[str, Any]:
    if c.zero_stage == 0:
        return {"--overlap-grad-reduce": True}
    flags: dict[str, Any] = {
        "--use-distributed-optimizer": True,
        "--overlap-grad-reduce": True,
        "--overlap-param-gather": True,
    }
    if c.shard < c.data:
        flags["--num-distributed-optimizer-instances"] = c.data // c.shard
    if c.zero_stage >= 2:
        kinds = {2: "optim_grads", 3: "optim_grads_params"}
        flags |= {
            "--use-megatron-fsdp": True,
            "--data-parallel-sharding-strategy": kinds[c.zero_stage],
            "--no-gradient-accumulation-fusion": True,
            "--ckpt-format": "fsdp_dtensor",
        }
    return flags


def _megatron_recompute(run: RunSpec, c: _Choices, left_out: list[str]) -> dict[str, Any]:
    if c.recompute == "none" or c.share == 0.0:
        return {}
    if c.recompute == "full":
        flags: dict[str, Any] = {"--recompute-granularity": "full"}
        if c.share == 1.0:
            return flags | {"--recompute-method": "uniform", "--recompute-num-layers": 1}
        chunk = math.ceil(run.model.layers / (c.pipeline * c.virtual))
        return flags | {"--recompute-method": "block", "--recompute-num-layers": max(1, round(c.share * chunk))}
    if c.share < 1.0:
        left_out.append(f"recomputation of {c.share:.0%} of the layers: Megatron-LM does it selectively in all of them")
    flags = {"--recompute-granularity": "selective"}
    if c.recompute == "projections":
        flags["--recompute-modules"] = "core_attn layernorm " + ("moe" if run.model.moe else "mlp")
    return flags


def torchtitan(run: RunSpec) -> str:
    """A job config of torchtitan (v0.1 and v0.2)."""
    c = _choices(run)
    left_out = _beside(run)
    whole = {"fp8": "bfloat16", "bf16": "bfloat16"}.get(c.precision, "float32")
    parallelism: dict[str, Any] = {
        "data_parallel_replicate_degree": c.data if c.zero_stage == 0 else c.data // c.shard,
        "data_parallel_shard_degree": 1 if c.zero_stage == 0 else c.shard,
        "fsdp_reshard_after_forward": "always" if c.zero_stage == 3 else "never",
        "tensor_parallel_degree": c.tensor,
        "context_parallel_degree": c.context,
        "pipeline_parallel_degree": c.pipeline,
    }
    if c.pipeline > 1:
        schedules = {"1f1b": "1F1B", "interleaved": "Interleaved1F1B", "zero-bubble": "InterleavedZeroBubble"}
        parallelism |= {
            "pipeline_parallel_schedule": schedules[c.schedule],
            "pipeline_parallel_microbatch_size": c.micro_batch,
            "pipeline_parallel_layers_per_stage": math.ceil(run.model.layers / (c.pipeline * c.virtual)),
            "pipeline_parallel_first_stage_less_layers": c.middle - c.first,
            "pipeline_parallel_last_stage_less_layers": c.middle - c.last,
        }
    if run.model.moe is not None:
        parallelism["expert_parallel_degree"] = c.expert
        if c.expert_tensor not in (1, c.tensor):
            left_out.append(f"expert_tensor = {c.expert_tensor}")
    if not c.sequence_parallel and c.tensor > 1:
        left_out.append("tensor parallelism without sequence parallelism: torchtitan always has both")
    checkpoint: dict[str, Any] = {"mode": "none"}
    if c.recompute == "full" and c.share == 1.0:
        checkpoint = {"mode": "full"}
    elif c.recompute == "full":
        checkpoint = {"mode": "selective", "selective_ac_option": str(max(1, round(1 / max(c.share, 1e-3))))}
    elif c.recompute != "none":
        checkpoint = {"mode": "selective", "selective_ac_option": "op"}
    config: dict[str, Any] = {
        "training": {
            # One pipeline takes all micro batches of a replica in one call; without one they are accumulated.
            "local_batch_size": c.micro_batch * (c.micro_batches if c.pipeline > 1 else 1),
            "global_batch_size": run.train.global_batch,
            "seq_len": run.train.seq_len,
            "steps": run.train.steps,
            "mixed_precision_param": whole,
        },
        "parallelism": parallelism,
        "activation_checkpoint": checkpoint,
    }
    if c.precision == "fp8":
        config["float8"] = {"recipe_name": "tensorwise", "enable_fsdp_float8_all_gather": c.zero_stage == 3}
    return tomli_w.dumps(config) + _comments(left_out)


def nemo(run: RunSpec) -> str:
    """Overrides of a recipe of Megatron Bridge, NVIDIA NeMo's trainer of language models.

    For ``run_recipe.py --recipe NAME``; NeMo 2's `nemo.collections.llm` is no longer available.
    """
    c = _choices(run)
    left_out = _beside(run)
    values: dict[str, Any] = {
        "train.train_iters": run.train.steps,
        "train.micro_batch_size": c.micro_batch,
        "train.global_batch_size": run.train.global_batch,
        "model.seq_length": run.train.seq_len,
        "dataset.seq_length": run.train.seq_len,
        "model.tensor_model_parallel_size": c.tensor,
        "model.pipeline_model_parallel_size": c.pipeline,
        "model.virtual_pipeline_model_parallel_size": c.virtual if c.virtual > 1 else None,
        "model.context_parallel_size": c.context,
        "model.sequence_parallel": c.sequence_parallel and c.tensor > 1,
    }
    if run.model.moe is not None:
        values["model.expert_model_parallel_size"] = c.expert
        values["model.expert_tensor_parallel_size"] = c.expert_tensor
    if c.pipeline > 1 and c.first != c.middle:
        values["model.num_layers_in_first_pipeline_stage"] = c.first
    if c.pipeline > 1 and c.last != c.middle:
        values["model.num_layers_in_last_pipeline_stage"] = c.last
    values |= _bridge_sharding(c)
    recompute = _megatron_recompute(run, c, left_out)
    for flag, value in recompute.items():
        key = flag.removeprefix("--").replace("-", "_")
        values[f"model.{key}"] = f"[{value.replace(' ', ',')}]" if key == "recompute_modules" else value
    precisions = {"bf16": "bf16_mixed", "fp8": "bf16_with_fp8_current_scaling_mixed"}
    if c.precision in precisions:
        values["mixed_precision"] = precisions[c.precision]
    if c.schedule == "zero-bubble":
        left_out.append("the zero-bubble schedule: Megatron Bridge runs 1F1B")
    return "".join(f"{name}={_as_yaml(value)}\n" for name, value in values.items()) + _comments(left_out)


def _as_yaml(value: Any) -> str:
    """A value as overrides of a YAML config write it."""
    return {"None": "null", "True": "true", "False": "false"}.get(str(value), str(value))


def _bridge_sharding(c: _Choices) -> dict[str, Any]:
    values: dict[str, Any] = {
        "ddp.use_distributed_optimizer": c.zero_stage >= 1,
        "optimizer.use_distributed_optimizer": c.zero_stage >= 1,
    }
    if c.zero_stage >= 1 and c.shard < c.data:
        values["ddp.num_distributed_optimizer_instances"] = c.data // c.shard
    if c.zero_stage >= 2:
        values |= {
            "dist.use_megatron_fsdp": True,
            "ddp.use_megatron_fsdp": True,
            "ddp.data_parallel_sharding_strategy": {2: "optim_grads", 3: "optim_grads_params"}[c.zero_stage],
            "model.gradient_accumulation_fusion": False,
            "checkpoint.ckpt_format": "fsdp_dtensor",
        }
    return values


def maxtext(run: RunSpec) -> str:
    """Settings of a MaxText config, over `base.yml`."""
    c = _choices(run)
    left_out = _beside(run)
    group = c.tensor * c.context * c.data
    # MaxText's axes multiply: the ranks of an expert's group are taken from those of data and context.
    replicas = max(1, c.data // c.expert)
    if c.data % c.expert or c.expert_tensor not in (1, c.tensor):
        left_out.append(f"expert = {c.expert} over {group} ranks: MaxText's mesh takes experts from data parallelism")
    # The data axis repeats weights and may share out the optimizer's state; the fsdp axis shares out weights as well.
    over_data = c.zero_stage == 1 and c.shard >= c.data
    fsdp = 1 if over_data else replicas if c.shard >= c.data else max(1, c.shard // c.expert)
    tensor = "tensor_sequence" if c.sequence_parallel else "tensor"
    degrees = {tensor: c.tensor, "expert": c.expert, "context": c.context}
    degrees |= {"fsdp": fsdp if c.zero_stage else 1, "pipeline": c.pipeline}
    degrees["data"] = replicas // (fsdp if c.zero_stage else 1)
    left, lines = run.cluster.scale_up_domain, []
    for name, degree in degrees.items():
        inside = math.gcd(degree, left)
        left //= inside
        lines += [f"ici_{name}_parallelism: {inside}", f"dcn_{name}_parallelism: {degree // inside}"]
    if c.zero_stage in (1, 2) and not over_data:
        left_out.append(f"zero_stage = {c.zero_stage}: MaxText's fsdp axis shards parameters as well")
    batches = 1 if c.pipeline > 1 else c.micro_batches
    sequences = run.train.global_batch / (run.cluster.gpus * batches)
    lines += [
        f"shard_optimizer_over_data: {str(over_data).lower()}",
        "hardware: gpu",
        f"per_device_batch_size: {sequences:g}",
        f"gradient_accumulation_steps: {batches}",
        f"max_target_length: {run.train.seq_len}",
        f"steps: {run.train.steps}",
        f"dtype: {'bfloat16' if c.precision in ('bf16', 'fp8') else 'float32'}",
        f"quantization: {'fp8' if c.precision == 'fp8' else repr('')}",
    ]
    if c.pipeline > 1:
        stage = math.ceil(run.model.layers / (c.pipeline * c.virtual))
        lines += [f"num_layers_per_pipeline_stage: {stage}", f"num_pipeline_microbatches: {c.micro_batches}"]
        if c.micro_batches % c.pipeline:
            left_out.append(
                f"{c.micro_batches} micro batches: MaxText wants a multiple of its {c.pipeline} pipeline stages"
            )
        if run.model.layers % (c.pipeline * c.virtual):
            left_out.append(f"uneven stages: MaxText wants {run.model.layers} layers to divide by them")
    policies = {"none": "minimal_with_context", "selective": "minimal", "projections": "save_qkv_proj", "full": "full"}
    lines.append(f"remat_policy: {policies[c.recompute]}")
    if c.recompute != "none" and c.share < 1.0:
        left_out.append(f"recomputation of {c.share:.0%} of the layers: MaxText does it in all of them")
    return "\n".join(lines) + "\n" + _comments(left_out)


def modelworks(run: RunSpec) -> str:
    """The run spec itself, every choice made."""
    return dumps(run)


FRAMEWORKS: dict[str, Callable[[RunSpec], str]] = {
    "megatron": megatron,
    "torchtitan": torchtitan,
    "nemo": nemo,
    "maxtext": maxtext,
    "modelworks": modelworks,
}
"""What writes a run for each framework."""


def _choices(run: RunSpec) -> _Choices:
    parallel, train = run.parallel, run.train
    for name in ParallelSpec.model_fields:
        if getattr(parallel, name) == "auto":
            raise InputError(f"parallel.{name} = 'auto' cannot be written out: a planned run has made its choice")
    if train.micro_batch == "auto":
        raise InputError("train.micro_batch = 'auto' cannot be written out: a planned run has made its choice")
    number = {name: int(getattr(parallel, name)) for name in _DEGREES}
    stages = deal_layers(
        run.model.layers, layouts(pipeline=number["pipeline"], virtual_stages=number["virtual_stages"])
    )
    return _Choices(
        data=number["data"],
        shard=number["shard"],
        tensor=number["tensor"],
        pipeline=number["pipeline"],
        context=number["context"],
        expert=number["expert"],
        expert_tensor=number["expert_tensor"],
        virtual=number["virtual_stages"],
        schedule=parallel.schedule,
        zero_stage=number["zero_stage"],
        sequence_parallel=bool(parallel.sequence_parallel),
        recompute=parallel.recompute,
        share=float(parallel.recompute_share),
        micro_batch=train.micro_batch,
        micro_batches=train.global_batch // (number["data"] * train.micro_batch),
        precision=train.precision,
        first=int(stages.first[0]),
        middle=int(stages.middle[0]),
        last=int(stages.last[0]),
    )


_DEGREES = (
    "data", "shard", "tensor", "pipeline", "context", "expert", "expert_tensor", "virtual_stages", "zero_stage",
)  # fmt: skip


def _beside(run: RunSpec) -> list[str]:
    """What a run has that no framework's settings are written for here."""
    return [] if run.model.vision is None else ["the vision tower, which is a model of its own in every framework"]


def _comments(left_out: list[str]) -> str:
    return "".join(f"# not expressed: {what}\n" for what in left_out)
