"""What a training framework does with a layout, and the few physical parameters that no datasheet states.

A `SoftwareSpec` is a framework's traits: which kernels it has fused, what it overlaps, what it keeps in which
precision. Traits are facts of its code and defaults, in the catalog like any other. A `CalibrationSpec` holds the
planner's global parameters, each with a meaning, fitted on many measured runs and never on one.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from modelworks.spec.fields import Fraction, PositiveFloat, Section
from modelworks.spec.hardware import Precision

NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Passes = Annotated[list[NonNegativeFloat], Field(min_length=2, max_length=2)]
"""Of a forward and of a backward pass."""


class OperatorTraffic(Section):
    """Bytes that operators which nothing fuses read and write together, for each element, forward and backward."""

    norm: Passes
    """Of a normalisation's input."""
    residual: Passes
    """Of half a layer's input: the residual sum; backward the sums of gradients of what was used more than once."""
    rotary: Passes
    """Of queries and keys."""
    gate: Passes
    """Of a dense feed-forward network's width: the activation and its product."""
    routed_row: Passes
    """Of the rows sent to experts: sorting them and bringing them back."""
    routed_gate: Passes
    """Of the experts' width."""
    logits: Passes
    weight: Passes = [0.0, 0.0]
    """Of matrices that are cast at each use, and their gradients."""


class SoftwareSpec(Section):
    """A training framework's traits."""

    name: str
    matches: list[str] = []
    """Patterns (as file names have them, in lower case) of what lists of measured runs call it."""
    attention: Literal["flash", "flash-2", "unfused"] = "flash"
    """`flash` is the fastest kernel that was measured on a device, `flash-2` FlashAttention-2 wherever it runs;
    `unfused` writes the scores out, softmax and dropout as kernels of their own."""
    elementwise: Literal["fused", "unfused"] = "fused"
    """Whether normalisation, activation and residual kernels join what can be joined."""
    stream_factor: PositiveFloat = 1.0
    """Memory traffic of its element-wise kernels over that of the kernels counted in `plan/block.py`."""
    operator_traffic: dict[Precision, OperatorTraffic] = {}
    """Instead of the kernels counted in `plan/block.py`, by the precision of the matrices; `fp32` stands for others."""
    cross_entropy: Literal["fused", "unfused"] = "fused"
    dropout: bool = False
    gradient_accumulation: Literal["fused", "unfused"] = "fused"
    """`fused`: weight gradients are added to the running sum inside their matrix product."""
    gradient_bytes: Literal[2, 4] = 4
    """Of the running sum, and of its reduction over replicas."""
    parameter_bytes: Literal[1, 2, 4] = 2
    """Of the weights that forward and backward use; 4 where they are cast at each use."""
    gathered_bytes: Literal[1, 2, 4] | None = None
    """Of the weights that ranks gather; unset, `parameter_bytes` and 2 at most."""
    master_weights: bool = True
    """Whether the optimizer keeps fp32 weights beside them."""
    sharding: Literal["partition", "fsdp"] = "partition"
    """`partition`: a shard is a part of the weights in use. `fsdp`, as PyTorch's FSDP2 has it: weights that stand
    gathered, of `gathered_bytes`, stand beside their shards, of `parameter_bytes`; embedding and head stand gathered at
    every stage; and a pipeline's stages add up whole gradients at every stage."""
    fp32_parts: bool = False
    """Whether, in a low precision with `fsdp`, embedding and head are gathered in fp32 and normalisations and routers
    stand whole on each rank."""
    kernels_per_layer: PositiveFloat = 15.0
    """Kernels that a dense layer's forward pass launches; its backward pass launches twice as many."""
    launch_s: NonNegativeFloat = 0.0
    """Time of the host between two launches; 0 with CUDA graphs or a compiled step."""
    socket_skew_s: NonNegativeFloat = 0.0
    """What a tensor-parallel exchange waits for the slower host process where its ranks stand on both sockets of a
    node and the host is what the device waits for."""
    step_host_s: NonNegativeFloat = 0.0
    """Time of the host once per step: data, optimizer launch, logging, loss scaling."""
    tensor_overlap_forward: Fraction = 0.0
    """Share of the tensor-parallel communication that hides behind matrix products."""
    tensor_overlap_backward: Fraction = 0.0
    data_overlap: bool = True
    """Whether gradients are reduced (and sharded parameters gathered) while the backward (forward) pass computes."""
    data_messages: Literal["whole", "layer"] = "whole"
    """Whether replicas exchange so much at once that latency doesn't count, or each layer by itself."""
    exchange_copies: NonNegativeFloat = 0.0
    """Memory traffic of the buffers that replicas fill before an exchange and empty behind it, over its bytes."""
    exchange_kernels: NonNegativeFloat = 0.0
    """Launches whose time the host takes for each exchange of replicas, where nothing runs beside it."""
    pipeline_overlap: bool = True
    """Whether activations travel between stages while the next micro batch computes."""
    expert_overlap: Fraction = 0.0
    expert_gradient_accumulation: Literal["fused", "unfused"] = "fused"
    expert_host_s: NonNegativeFloat = 0.0
    """What the device waits for the host in each pass through a layer of experts, whose counts come to the host; twice
    that in fp8, whose products launch casts and transposes beside them."""
    experts: Literal["grouped", "sequential"] = "grouped"
    kernels_per_expert: NonNegativeFloat = 4.0
    """Kernels that each expert adds to a forward pass where experts are `sequential`."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """What it shards if the run doesn't say."""
    recompute: Literal["none", "selective", "projections", "full"] = "none"
    """What it computes again if the run doesn't say."""
    sequence_parallel: bool = True
    """Whether it splits sequences beside tensor parallelism if the run doesn't say."""
    capacity_factor: PositiveFloat | None = None
    """Experts' slots over tokens sent to them on average; unset drops nothing and pads nothing."""
    zero_stages: list[Literal[0, 1, 2, 3]] = [0, 1, 2, 3]
    """What it can shard, in the tried order of a plan."""
    schedules: list[Literal["1f1b", "interleaved", "zero-bubble"]] = ["1f1b", "interleaved", "zero-bubble"]
    recomputes: list[Literal["none", "selective", "projections", "full"]] = ["none", "selective", "projections", "full"]
    partial_recomputes: list[Literal["selective", "projections", "full"]] = ["selective", "projections", "full"]
    """Those that it can do in a share of the layers."""


class CalibrationSpec(Section):
    """The planner's global parameters; `catalog/calibration/*.toml` states how each was found."""

    sustained: dict[str, dict[str, Annotated[float, Field(gt=0, le=1.5)]]]
    """By device and precision: the rate of matrix products in training over that in short measurements. Power and heat
    limit the clock, and the libraries of a training run are not those of the measurement."""
    sustained_default: dict[str, Annotated[float, Field(gt=0, le=1.5)]]
    """The same for devices without enough measured runs, by precision: what H100 keeps up."""
    low_precision_gain: Annotated[float, Field(ge=1, le=2)]
    """The most that products gain from halving their numbers' width: what H100's fitted rates give for large ones."""
    attention_backward: PositiveFloat
    """Time of attention's backward kernel over its forward kernel's (2.5 by its operations)."""
    memory_efficiency: Annotated[float, Field(gt=0, le=1)]
    """Reached share of memory bandwidth in kernels that stream activations."""
    infiniband_efficiency: Annotated[float, Field(gt=0, le=1)]
    ethernet_efficiency: Annotated[float, Field(gt=0, le=1)]
    all_to_all_efficiency: Annotated[float, Field(gt=0, le=1)]
    """Of the ring's rate, in all-to-alls across the network."""
    cast_bytes: PositiveFloat
    """Memory traffic of an element that is cast to fp8 and transposed for the weights' gradients: 4 by counting."""
    overlap_slowdown: NonNegativeFloat
    """How much longer computation takes per second of communication that runs beside it, since both want the same
    cores and the same memory."""
    pipeline_exposure: Fraction
    """Share of the overlapped transfers between stages that lengthens the step all the same."""
    jitter_per_doubling: NonNegativeFloat
    """Share of a step that is lost to the slowest rank, for each doubling of the ranks that wait for each other."""
