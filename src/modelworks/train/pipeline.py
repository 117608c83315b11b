"""The pipeline: each process has some of the layers, and micro batches pass through the processes one after another.

Three ideas. A stage is made of the decoder's own parts, which keep their names, and PyTorch's pipelining says which
stage does what when (1F1B and interleaved: Narayanan et al. 2021, arXiv:2104.04473; zero-bubble: Qi et al. 2023,
arXiv:2401.10241, ZB-H1) and sends. Nothing but the residual stream travels: what a stage's own routers add to the loss
gets its gradient where the stream leaves the stage. And a stage reports its summand of each figure, so that the sum
over the stages is what one process would report.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
)

from modelworks.model.decoder import Decoder, Losses
from modelworks.model.experts import RouterReport
from modelworks.model.rotary import rotary_tables
from modelworks.train.layout import Layout, deal_layers
from modelworks.train.split_network import Groups, SplitForward

Context = Callable[[], contextlib.AbstractContextManager[object]]


class Stage(nn.Module):
    """Some consecutive layers of a decoder; the first stage embeds, and the last one has the head.

    Parameters
    ----------
    decoder
        The network; its modules are taken, not copied.
    groups
        The processes with which this one shares these layers.
    layers
        Their numbers.
    autocast
        The context of a forward pass.
    """

    def __init__(self, decoder: Decoder, groups: Groups, layers: range, autocast: Context) -> None:
        super().__init__()
        self.spec, self.layers, self._autocast = decoder.spec, layers, autocast
        self.first, self.last = layers.start == 0, layers.stop == decoder.spec.layers
        tied = decoder.head is None
        self.embed = decoder.embed if self.first or (self.last and tied) else None
        self.blocks = nn.ModuleList(decoder.blocks[layer] for layer in layers)
        self.final_norm = decoder.final_norm if self.last else None
        self.head = decoder.head if self.last else None
        self.objective: Callable[[Losses], Tensor] = lambda losses: losses.cross_entropy
        """From the stage's summands of the losses to its summand of what is minimised."""
        self.reported: list[Losses] = []
        """Of each forward pass, until they are taken."""
        self._passes, self._spec = SplitForward(decoder, groups), decoder.spec

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        """From the residual stream, or on the first stage the tokens, to the stream after the stage's layers.

        On the last stage it is the objective. Tokens and targets are (B, T), the stream (B, T / positions, H).
        """
        with self._autocast():
            x = self._passes.embed(x) if self.first else x
            rotary = rotary_tables(self._spec, 0, targets.shape[1], x.device)
            x, reports = self._passes.layers(self.blocks, x, rotary)
            losses = self._losses(reports, self._passes.cross_entropy(x, targets) if self.last else None, x.device)
        self.reported.append(Losses(*(part.detach() for part in losses)))
        if self.last:
            return self.objective(losses)
        return _add_loss(x, self.objective(losses)) if reports else x

    def _losses(self, reports: list[RouterReport], cross_entropy: Tensor | None, device: torch.device) -> Losses:
        """This stage's summands of the network's losses."""
        zero, moe, count = torch.zeros((), device=device), self.spec.moe, self.spec.moe_layers
        load = torch.zeros(count, moe.experts if moe else 0, device=device)
        load_balance = router_z = zero
        if reports and moe is not None:
            start = max(0, self.layers.start - moe.dense_layers)
            load[start : start + len(reports)] = torch.stack([report.load for report in reports])
            load_balance = torch.stack([report.load_balance for report in reports]).sum() / count
            router_z = torch.stack([report.router_z for report in reports]).sum() / count
        return Losses(zero if cross_entropy is None else cross_entropy, load_balance, router_z, load)


class Pipeline:
    """This process's stages of a network, and how micro batches pass through all of them.

    Parameters
    ----------
    decoder
        The whole network; afterwards it has this process's layers only, under their own numbers.
    layout
        The degrees.
    groups
        The processes with which this one shares its layers.
    group
        The processes of the other stages, in their order.
    autocast
        The context of a forward pass.

    Attributes
    ----------
    stages
        What this process has of the network.
    twin
        The process, by its place in `group`, that holds the same tied embedding; None where there is none.
    """

    def __init__(
        self, decoder: Decoder, layout: Layout, groups: Groups, group: ProcessGroup, autocast: Context
    ) -> None:
        self._layout, self._groups, self._group = layout, groups, group
        built_on = decoder.embed.weight.device
        self._hidden, self._device = decoder.spec.hidden, torch.device("cpu") if built_on.type == "meta" else built_on
        chunks = deal_layers(decoder.spec.layers, layout.pipeline, layout.virtual_stages)
        self._chunks = len(chunks)
        self.stages = [Stage(decoder, groups, layers, autocast) for layers in chunks[group.rank() :: layout.pipeline]]
        self.twin: int | None = None
        ends = (0, layout.pipeline - 1)
        if decoder.head is None and group.rank() in ends:
            self.twin = ends[0] if group.rank() else ends[1]
        self._schedule: Any = None
        _keep(decoder, self.stages)

    def __call__(self, tokens: Tensor, targets: Tensor) -> Losses:
        """One forward pass of sequences (B, T) through all stages, without gradients: this process's summands."""
        size, before, after = self._group.size(), self._group.rank() - 1, self._group.rank() + 1
        for stage in self.stages:
            x = tokens
            if not stage.first:
                x = torch.empty(self._stream(tokens), device=self._device)
                dist.recv(x, group=self._group, group_src=before % size)
            x = stage(x, targets)
            if not stage.last:
                dist.send(x, group=self._group, group_dst=after % size)
        return self._taken()[0]

    def backward(self, batches: Sequence[Tensor], objective: Callable[[Losses], Tensor]) -> list[Losses]:
        """Forward and backward pass of micro batches (B, T + 1), whose gradients are added up.

        Returns
        -------
        list of Losses
            Of each micro batch, this process's summands.
        """
        sequences = torch.cat(tuple(batches))
        tokens, targets = sequences[:, :-1], sequences[:, 1:]
        for stage in self.stages:
            stage.objective = lambda losses: objective(losses) / len(batches)
        if self._schedule is None:
            self._schedule = self._scheduled(len(batches), tokens[: len(batches[0])])
        # Every stage gets the targets, which come with no stream; only the last one uses them.
        self._schedule.step(tokens, targets=targets, target=targets, return_outputs=False)
        return self._taken()

    def add_up(self, gradient: Tensor) -> None:
        """Add, in place, the twin's gradient to that of the tied embedding."""
        if self.twin is None:
            return
        others = torch.empty_like(gradient)
        exchange = [
            dist.P2POp(dist.isend, gradient.clone(), group=self._group, group_peer=self.twin),
            dist.P2POp(dist.irecv, others, group=self._group, group_peer=self.twin),
        ]
        for request in dist.batch_isend_irecv(exchange):
            request.wait()
        gradient.add_(others)

    def _scheduled(self, micro_batches: int, tokens: Tensor) -> Any:
        """PyTorch's schedule for so many micro batches of tokens (B, T)."""
        tokens = torch.empty_like(tokens, device="meta")
        stream = torch.empty(self._stream(tokens), device="meta", requires_grad=True)
        objective = torch.empty((), device="meta", requires_grad=True)
        stages = [
            PipelineStage(
                stage,
                self._group.rank() + place * self._layout.pipeline,
                self._chunks,
                self._device,
                input_args=tokens if stage.first else stream,
                output_args=objective if stage.last else stream,
                group=self._group,
            )
            for place, stage in enumerate(self.stages)
        ]
        given: dict[str, Any] = {"loss_fn": lambda objective, targets: objective, "scale_grads": False}
        if self._layout.schedule == "1f1b":
            return Schedule1F1B(stages[0], micro_batches, **given)
        kind = ScheduleInterleaved1F1B if self._layout.schedule == "interleaved" else ScheduleInterleavedZeroBubble
        return kind(stages, micro_batches, **given)  # type: ignore[arg-type]

    def _stream(self, tokens: Tensor) -> tuple[int, int, int]:
        """The shape of the residual stream of tokens (B, T) between two stages."""
        return len(tokens), tokens.shape[1] // self._groups.positions, self._hidden

    def _taken(self) -> list[Losses]:
        """What all stages of this process have reported, added up, of each forward pass."""
        reported = list(zip(*(stage.reported for stage in self.stages), strict=True))
        for stage in self.stages:
            stage.reported = []
        return [Losses(*(torch.stack(part).sum(0) for part in zip(*parts, strict=True))) for parts in reported]


def _keep(decoder: Decoder, stages: Sequence[Stage]) -> None:
    """Leave a decoder what its stages have."""
    kept = nn.ModuleList()
    for stage in stages:
        for layer, block in zip(stage.layers, stage.blocks, strict=True):
            kept.add_module(str(layer), block)
    decoder.blocks = kept
    for name in ("embed", "final_norm", "head"):
        parts = [part for stage in stages if (part := getattr(stage, name)) is not None]
        setattr(decoder, name, parts[0] if parts else None)


def _add_loss(x: Tensor, loss: Tensor) -> Tensor:
    """`x` itself; backward, a loss beside it gets a gradient of one."""
    added: Tensor = _AddLoss.apply(x, loss)  # type: ignore[no-untyped-call]
    return added


class _AddLoss(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor, loss: Tensor) -> Tensor:
        return x.clone()  # a view of `x` couldn't be detached in place, as pipelining does

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        return gradients[0], torch.ones((), device=gradients[0].device)
