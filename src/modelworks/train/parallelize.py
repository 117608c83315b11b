"""Applies a layout to a network from outside; the network's own file knows nothing of it.

Two ideas. First every process keeps its layers (`pipeline`) and of these its part of what tensor, expert and context
ranks share (`split_network`); then PyTorch's FSDP2 splits the parts over data and context ranks, a block at a time, at
every ZeRO stage but 0: 3 gathers a block's weights when they are needed, 2 keeps them gathered from the forward to the
backward pass, and 1 moreover adds up whole gradients over the micro batches and reduces them once. 0 splits nothing
and averages gradients in buckets (`buckets`). In a pipeline every stage adds up whole gradients, since micro batches
are on their way forward and backward at once, and a zero-bubble schedule, which passes backward twice, keeps weights
gathered. What a checkpoint, an optimizer or a norm needs to know of a parameter is its place: the whole tensor that it
is a part of, as a DTensor, which any other layout can read.

In bf16 FSDP gathers a block's matrices in bf16, which is what they are multiplied in, and reduces their gradients in
fp32 to fp32 shards. What is computed in fp32, normalisations and routers, is small and stands whole on every process;
embedding, head and final normalisation are gathered in fp32, since the residual stream begins in it. A zero-bubble
schedule gathers in fp32, since its second backward pass would add up gradients in the precision of what was gathered.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from modelworks.model.decoder import Decoder, Losses
from modelworks.model.experts import MixtureOfExperts
from modelworks.model.initial import InitialWeights
from modelworks.model.layers import RMSNorm
from modelworks.spec.run import ParallelSpec
from modelworks.train.buckets import Buckets, Summed
from modelworks.train.fp8 import multiply_in_fp8
from modelworks.train.grid import mesh_of
from modelworks.train.layout import Layout
from modelworks.train.materialize import fill_parts
from modelworks.train.pipeline import Pipeline
from modelworks.train.precision import FP32, Precision
from modelworks.train.ranks import Ranks
from modelworks.train.recompute import recompute_activations
from modelworks.train.split_network import Groups, SplitForward, split, split_dimension


@dataclass(frozen=True)
class Place:
    """Which part of a whole tensor a process holds."""

    mesh: DeviceMesh
    placements: tuple[Placement, ...]
    shape: torch.Size
    """Of the whole."""
    local_shape: torch.Size

    @property
    def parts(self) -> int:
        """Into how many parts the whole is split."""
        sizes = zip(self.placements, self.mesh.shape, strict=True)
        return math.prod(size for placement, size in sizes if isinstance(placement, Shard))

    def whole(self, part: Tensor) -> DTensor:
        """The whole of which this process holds `part`; both share their memory."""
        stride = torch.empty(self.shape, device="meta").stride()
        return DTensor.from_local(
            part.contiguous(), self.mesh, self.placements, run_check=False, shape=self.shape, stride=stride
        )


@dataclass(frozen=True)
class Held:
    """What a process holds of a parameter between its forward and its backward pass."""

    elements: int
    """That it computes with: what FSDP splits is counted whole."""
    weights: int
    """Bytes: what stands gathered, and this process's own shard."""
    gradients: int
    """Bytes."""
    own: int
    """Bytes of `weights` that it keeps between steps: its shard, or all of what isn't split."""


class Parallel:
    """A run's processes, arranged by a layout.

    Attributes
    ----------
    layout, ranks
        The degrees, and the processes.
    data_rank
        Which share of each global batch this process takes.
    """

    def __init__(self, layout: Layout, ranks: Ranks) -> None:
        self.layout, self.ranks = layout, ranks
        self.data_rank = ranks.rank // (layout.context * layout.tensor) % layout.data
        self._pipeline: Pipeline | None = None
        self._root: FSDPModule | None = None
        self._places: dict[str, Place] = {}
        self._buckets: Buckets | None = None
        self._summed: list[Summed] = []
        self._scaled: list[tuple[nn.Parameter, float]] = []
        self._whole: set[str] = set()
        """What stays whole beside what FSDP splits, by name."""
        self._gathered_in: dict[str, torch.dtype] = {}
        """What FSDP splits, by name."""
        self._experts_scale: float | None = None
        self._tied: nn.Parameter | None = None
        self._stands_in: dict[tuple[str, ...], DeviceMesh] = {}
        if layout.processes > 1:
            self._arrange()

    def _arrange(self) -> None:
        """The processes as grids: one for what all of a stage share, one for its experts."""
        one, data_context = self.layout, self.layout.data * self.layout.context
        sharded = 1 if one.zero_stage == 0 else one.shard * one.context
        grid = torch.arange(one.processes).view(one.pipeline, data_context // sharded, sharded, one.tensor)
        # What splits a tensor first comes first, so that FSDP's parts are parts of the others' parts.
        self._mesh = mesh_of(grid.permute(0, 3, 1, 2), ("pipeline", "tensor", "replicate", "shard"))
        by_context = grid.view(-1, one.context, one.tensor).permute(0, 2, 1).flatten(0, 1)
        context = mesh_of(by_context, ("other", "context"))
        self._stage = mesh_of(grid.flatten(1), ("pipeline", "stage"))["stage"].get_group()
        in_tensor = one.tensor > 1 and one.expert_tensor == one.tensor
        members = data_context if in_tensor else data_context * one.tensor
        rest = members // one.expert
        rest_sharded = 1 if one.zero_stage == 0 else max(1, sharded * members // data_context // one.expert)
        by_expert = grid.view(one.pipeline, rest // rest_sharded, rest_sharded, one.expert, -1)
        names = ("pipeline", "tensor", "expert", "replicate", "shard")
        self._expert_mesh = mesh_of(by_expert.permute(0, 4, 3, 1, 2), names)
        self._groups = Groups(
            tensor=self._mesh["tensor"].get_group(),
            context=context["context"].get_group(),
            expert=self._expert_mesh["expert"].get_group(),
            experts_in_tensor=in_tensor,
        )

    def apply(
        self,
        decoder: Decoder,
        spec: ParallelSpec | None = None,
        precision: Precision = FP32,
        seed: int | None = None,
        initial: InitialWeights | None = None,
    ) -> None:
        """Split a network over the processes, in place. Every process must hold the same weights.

        Parameters
        ----------
        decoder
            The network.
        spec
            Says what the backward pass computes again; nothing if unset.
        precision
            Of its products, in which FSDP gathers; a pipeline enters its context by itself.
        seed
            For a network on the meta device: each process gets memory for its parts alone, and they the values that
            `Decoder.initialize(seed)` gives them. If unset, the parts stay without memory.
        initial
            The weights to begin with instead, where the network has any of them.
        """
        shapes = {name: parameter.shape for name, parameter in decoder.named_parameters()}
        one = self.layout
        if one.pipeline > 1:
            self._pipeline = Pipeline(
                decoder, one, self._groups, self._mesh["pipeline"].get_group(), precision.autocast
            )
        if one.tensor * one.context * one.expert * one.pipeline > 1:
            split(decoder, self._groups)
            decoder.forward = self._pipeline or SplitForward(decoder, self._groups)  # type: ignore[method-assign, assignment]
        if precision.name == "fp8":
            multiply_in_fp8(decoder)
        recompute_activations(decoder, spec or ParallelSpec())
        if one.processes > 1 and one.zero_stage > 0:
            self._shard(decoder, precision)
        if seed is not None:
            for root in self._roots(decoder):
                root.to_empty(device="cpu")
        if one.processes > 1:
            self._locate(decoder, shapes)
        if seed is not None:
            fill_parts(decoder, self._places, seed, initial)

    def _locate(self, decoder: Decoder, shapes: Mapping[str, torch.Size]) -> None:
        """Note where this process's parts of the parameters stand, and whose gradients are added up how."""
        one = self.layout
        share = 1.0 / (one.data * one.context)
        for name, parameter in decoder.named_parameters():
            self._places[name] = self._place(name, parameter, shapes[name])
            if self._experts_scale is not None and _is_of_experts(name):
                self._scaled.append((parameter, self._experts_scale))
        if one.zero_stage == 0:
            summed = [
                Summed(each, self._holders(name), share)
                for name, each in decoder.named_parameters()
                if each.requires_grad
            ]
            self._buckets = Buckets([each for each in summed if each.group.size() > 1])
            self._scaled = [(each.parameter, share) for each in summed if each.group.size() == 1 and share < 1.0]
        else:
            for name, parameter in decoder.named_parameters():
                of_experts = _is_of_experts(name) and not self._groups.experts_in_tensor
                if name in self._whole:
                    self._summed.append(Summed(parameter, self._stage, share))
                elif one.tensor > 1 and "tensor" not in split_dimension(name, self._groups) and not of_experts:
                    self._summed.append(Summed(parameter, self._groups.tensor, 1.0))
        if self._pipeline is not None and self._pipeline.twin is not None:
            self._tied = cast(nn.Parameter, decoder.embed.weight)

    def _holders(self, name: str) -> dist.ProcessGroup:
        """The processes whose gradients of a parameter, or of this process's part of it, are summands, at ZeRO 0."""
        if _is_of_experts(name):
            return self._expert_mesh["replicate"].get_group()
        split_over_tensor = "tensor" in split_dimension(name, self._groups)
        return self._mesh["replicate"].get_group() if split_over_tensor else self._stage

    def _shard(self, decoder: Decoder, precision: Precision) -> None:
        """Split over data and context ranks."""
        one = self.layout
        until_backward = one.zero_stage < 3 or one.schedule == "zero-bubble"
        count = one.data * one.context
        apart = one.expert > 1 or (one.tensor > 1 and not self._groups.experts_in_tensor)
        if count == 1 and not (apart and decoder.spec.moe is not None):
            return
        mesh = self._data_mesh(self._mesh)
        traits: dict[str, Any] = {"reshard_after_forward": not until_backward}
        low = precision.dtype != torch.float32 and one.schedule != "zero-bubble"
        if low:
            traits["mp_policy"] = MixedPrecisionPolicy(precision.dtype, torch.float32, cast_forward_inputs=False)
        deal, deal_experts = (_dealing(grid["shard"].size()) for grid in (self._mesh, self._expert_mesh))
        among = self._data_mesh(self._expert_mesh)
        # Nothing is done in place to what a block or its experts return.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        for number, block in decoder.blocks.named_children():
            whole: dict[str, nn.Parameter] = {}
            if low:
                norms = {name: part for name, part in block.named_modules() if isinstance(part, RMSNorm)}
                whole = {f"{name}.weight": norm.weight for name, norm in norms.items()}
            if hasattr(block, "moe") and (low or apart):
                whole["moe.router.weight"] = cast(nn.Parameter, cast(MixtureOfExperts, block.moe).router.weight)
            traits["ignored_params"] = set(whole.values())
            if hasattr(block, "moe") and apart:
                # Experts are on fewer data ranks than the rest. Their router, which is small, stays whole beside them.
                fully_shard(cast(MixtureOfExperts, block.moe), mesh=among, shard_placement_fn=deal_experts, **traits)
                # FSDP takes the mean over the ranks that hold the same experts; the loss is the mean over all.
                self._experts_scale = among.size() / count
            fully_shard(block, mesh=mesh, shard_placement_fn=deal, **traits)
            self._whole |= {f"blocks.{number}.{name}" for name in whole}
        for root in self._roots(decoder):
            fully_shard(root, mesh=mesh, reshard_after_forward=False)
            # gloo has no averaging reduction; FSDP then divides the sum itself.
            for module in root.modules():
                if isinstance(module, FSDPModule):
                    module.set_force_sum_reduction_for_comms(True)
        for name, parameter in decoder.named_parameters():
            if isinstance(parameter, DTensor):
                in_block = name.startswith("blocks.")
                self._gathered_in[name] = precision.dtype if low and in_block else torch.float32
        self._root = cast(FSDPModule, decoder) if self._pipeline is None else None

    def _roots(self, decoder: Decoder) -> Sequence[nn.Module]:
        """What runs a forward pass by itself: the network, or each of this process's stages of a pipeline."""
        return [decoder] if self._pipeline is None else self._pipeline.stages

    def _data_mesh(self, mesh: DeviceMesh) -> DeviceMesh:
        """The dimensions of a grid over which FSDP splits and repeats."""
        return mesh["replicate", "shard"] if mesh["replicate"].size() > 1 else mesh["shard"]

    def _place(self, name: str, parameter: nn.Parameter, shape: torch.Size) -> Place:
        """Where a parameter stands: split by the network first, and each part by FSDP."""
        dims = split_dimension(name, self._groups)
        apart = _is_of_experts(name)
        order = ("tensor", "expert", "replicate", "shard") if apart else ("tensor", "replicate", "shard")
        if order not in self._stands_in:
            self._stands_in[order] = (self._expert_mesh if apart else self._mesh)[order]
        by_fsdp: dict[str, Placement] = {"shard": parameter.placements[-1]} if isinstance(parameter, DTensor) else {}
        placements = [Shard(dims[axis]) if axis in dims else by_fsdp.get(axis, Replicate()) for axis in order]
        return Place(self._stands_in[order], tuple(placements), shape, local(parameter).shape)

    def whole(self, name: str, tensor: Tensor) -> Tensor:
        """A parameter, or what an optimizer keeps of it, as the whole tensor of which this process holds a part."""
        place = self._places.get(name)
        part = local(tensor)
        return tensor if place is None or part.shape != place.local_shape else place.whole(part)

    def held(self, name: str, parameter: Tensor) -> Held:
        """What this process holds of a parameter in a step."""
        place, width = self._places.get(name), self._gathered_in.get(name)
        own = local(parameter).nbytes
        if place is None:
            return Held(parameter.numel(), own, own, own)
        axes = zip(place.mesh.mesh_dim_names or (), place.placements, place.mesh.shape, strict=True)
        parts = math.prod(size for axis, split, size in axes if axis != "shard" and isinstance(split, Shard))
        whole = place.shape.numel() // parts
        if width is None:
            return Held(whole, own, own, own)
        one = self.layout
        layer_by_layer = one.zero_stage == 3 and one.schedule != "zero-bubble" and name.startswith("blocks.")
        added_up = one.zero_stage < 2 or one.pipeline > 1
        standing = 0 if layer_by_layer else whole * width.itemsize
        return Held(whole, standing + own, whole * parameter.element_size() if added_up else own, own)

    def purposes(self) -> dict[str, str]:
        """What the network's own exchanges are for, by the names of their groups."""
        if self.layout.processes == 1:
            return {}
        groups = {"expert": self._groups.expert, "context": self._groups.context, "tensor": self._groups.tensor}
        return {group.group_name: purpose for purpose, group in groups.items() if group.size() > 1}

    def group_sizes(self) -> dict[str, int]:
        """How many processes are in each of this one's groups."""
        if self.layout.processes == 1:
            return {}
        return {
            name: group.size()
            for name, group in (
                ("pipeline", self._mesh["pipeline"]),
                ("tensor", self._groups.tensor),
                ("context", self._groups.context),
                ("expert", self._groups.expert),
                ("replicate", self._mesh["replicate"]),
                ("shard", self._mesh["shard"]),
                ("experts' replicate", self._expert_mesh["replicate"]),
                ("experts' shard", self._expert_mesh["shard"]),
            )
        }

    def part(self, name: str) -> tuple[Hashable, ...]:
        """Which part of a parameter this process holds: processes for which it is equal hold copies."""
        place = self._places.get(name)
        if place is None:
            return ()
        coordinate = place.mesh.get_coordinate()
        assert coordinate is not None
        assert place.mesh.mesh_dim_names is not None
        axes = zip(place.mesh.mesh_dim_names, coordinate, place.placements, strict=True)
        split_at = tuple((axis, at) for axis, at, placement in axes if isinstance(placement, Shard))
        stage = self.ranks.rank * self.layout.pipeline // self.layout.processes
        return stage, place.mesh.mesh_dim_names, split_at

    def share(self, count: int) -> tuple[int, int]:
        """Which of `count` sequences this process takes: the first one's place, and how many."""
        each = count // self.layout.data
        return self.data_rank * each, each

    def backward(
        self,
        batches: Sequence[Any],
        losses_of: Callable[[Any], Losses],
        objective: Callable[[Losses], Tensor],
    ) -> list[Losses]:
        """Forward and backward pass of micro batches (B, T + 1), whose gradients are added up.

        Parameters
        ----------
        batches
            This process's share.
        losses_of
            A forward pass of the network that `apply` has split.
        objective
            From the losses, linearly, to what is minimised.

        Returns
        -------
        list of Losses
            Of each micro batch: what this process knows of the losses, of which `mean` makes those of all.
        """
        if self._pipeline is not None:
            if self._buckets is not None:
                self._buckets.expect(first=True, last=False)
            return self._pipeline.backward(batches, objective)
        found = []
        for place, batch in enumerate(batches, start=1):
            self._exchange_gradients(first=place == 1, last=place == len(batches))
            losses = losses_of(batch)
            (objective(losses) / len(batches)).backward()  # type: ignore[no-untyped-call]
            found.append(Losses(*(part.detach() for part in losses)))
        return found

    def _exchange_gradients(self, first: bool, last: bool) -> None:
        """Before a micro batch: what of the gradients' exchange waits for the last one."""
        if self._buckets is not None:
            self._buckets.expect(first, last)
        if self._root is not None and self.layout.zero_stage < 3:
            if self.layout.zero_stage < 2:
                self._root.set_requires_gradient_sync(last)
            self._root.set_is_last_backward(last)
            self._root.set_reshard_after_backward(last)

    def mean(self, values: Tensor) -> Tensor:
        """The mean over all processes of what each knows, in its place; the stages of a pipeline know summands."""
        return self.ranks.sum(values).div_(self.layout.processes // self.layout.pipeline)

    def finish_gradients(self) -> None:
        """Add up, after the last backward pass, the gradients of what several processes hold whole."""
        if self._buckets is not None:
            self._buckets.finish()
        by_group: dict[dist.ProcessGroup, list[tuple[Tensor, float]]] = {}
        for parameter, factor in self._scaled:
            assert parameter.grad is not None
            local(parameter.grad).mul_(factor)
        for summed in self._summed:
            assert summed.parameter.grad is not None
            by_group.setdefault(summed.group, []).append((local(summed.parameter.grad), summed.factor))
        for group, gradients in by_group.items():
            together = torch.cat([gradient.flatten() * factor for gradient, factor in gradients])
            dist.all_reduce(together, group=group)
            parts = torch.split(together, [gradient.numel() for gradient, _ in gradients])
            for (gradient, _), total in zip(gradients, parts, strict=True):
                gradient.copy_(total.view_as(gradient))
        if self._pipeline is not None and self._tied is not None:
            assert self._tied.grad is not None
            self._pipeline.add_up(local(self._tied.grad))

    def clip(self, network: nn.Module, largest: float) -> float:
        """Scale all gradients so that their norm over the whole network is at most `largest`, and return that norm.

        Each process adds what it holds, divided by how many processes hold the same, so that one sum over all
        processes serves every layout.
        """
        groups: dict[int, list[Tensor]] = {}
        for name, parameter in network.named_parameters():
            if parameter.grad is not None:
                parts = self._places[name].parts if name in self._places else 1
                stages = 2 if parameter is self._tied else 1
                copies = stages * self.layout.processes // self.layout.pipeline // parts
                groups.setdefault(copies, []).append(local(parameter.grad))
        squares = [
            torch.nn.utils.get_total_norm(gradients).double().square() / copies for copies, gradients in groups.items()
        ]
        norm = math.sqrt(float(self.ranks.sum(torch.stack(squares).sum())))
        scale = largest / (norm + 1e-6)
        if scale < 1.0:
            for gradients in groups.values():
                torch._foreach_mul_(gradients, scale)
        return norm


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _dealing(shards: int) -> Callable[[nn.Parameter], Shard | None]:
    """Along which dimension FSDP splits a parameter: the first, but for experts that are too few to be dealt out."""

    def dimension(parameter: nn.Parameter) -> Shard | None:
        if parameter.dim() < 3 or parameter.shape[0] % shards == 0:
            return None
        return next((Shard(dim) for dim in (1, 2) if parameter.shape[dim] % shards == 0), None)

    return dimension


def _is_of_experts(name: str) -> bool:
    """Whether a parameter is one of the experts' stacks of matrices."""
    return name.split(".")[-2:-1] == ["moe"]
