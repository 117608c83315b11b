"""The network over several processes: each has some heads, some of the vocabulary, some positions, some experts.

Three ideas. The parts of the network are the model's own; only where processes must exchange something is a part's
forward pass put between two collectives. Between blocks each process holds its own positions of a sequence (sequence
and context parallelism), so that normalisations are computed once; within attention and feed-forward network it holds
its heads or columns at all positions of its context (tensor parallelism: Shoeybi et al. 2019, arXiv:1909.08053;
Korthikanti et al. 2022, arXiv:2205.05198). And what each process computes backward is one summand of the gradient
(over tensor ranks) or of its mean (over data and context ranks), whatever the layout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from modelworks.model.attention import Attention
from modelworks.model.decoder import Block, Decoder, Losses
from modelworks.model.experts import (
    MixtureOfExperts,
    RouterReport,
    SortedPairs,
    router_report,
    sort_by_expert,
)
from modelworks.model.layers import to_compute_dtype
from modelworks.model.loss import CHUNK, chunked_cross_entropy
from modelworks.model.rotary import Rotary, packed_tables
from modelworks.train.exchange import exchange, gather, scale_gradient, scatter_sum


@dataclass(frozen=True)
class Groups:
    """The processes with which this one shares a network."""

    tensor: ProcessGroup
    context: ProcessGroup
    expert: ProcessGroup
    experts_in_tensor: bool
    """Whether the experts' matrices are split over the tensor ranks too, instead of each having tokens of its own."""

    @property
    def positions(self) -> int:
        """Parts into which a sequence is cut between blocks."""
        return self.tensor.size() * self.context.size()


def split_dimension(name: str, groups: Groups) -> dict[str, int]:
    """Along which dimension a parameter is split over which group (`tensor`, `expert`); by its name."""
    split: dict[str, int] = {}
    *_, owner, kind = ("", *name.split("."))
    if owner == "moe":
        if groups.expert.size() > 1:
            split["expert"] = 0
        if groups.experts_in_tensor:
            split["tensor"] = 2 if kind == "down" else 1
    elif groups.tensor.size() > 1:
        if owner in ("embed", "head", "wq", "wk", "wv", "gate", "up"):
            split["tensor"] = 0
        elif owner in ("wo", "down") and kind == "weight":
            split["tensor"] = 1
    return split


def split(decoder: Decoder, groups: Groups) -> None:
    """Keep this process's part of every parameter, and exchange where the parts meet; in place."""
    for name, parameter in list(decoder.named_parameters()):
        part = parameter.detach()
        for group, dim in split_dimension(name, groups).items():
            ranks: ProcessGroup = getattr(groups, group)
            part = part.chunk(ranks.size(), dim)[ranks.rank()]
        if part.shape != parameter.shape:
            owner, _, kind = name.rpartition(".")
            setattr(decoder.get_submodule(owner), kind, nn.Parameter(part.clone()))
    for block in cast(Iterable[Block], decoder.blocks):
        _between_collectives(block.attn, block.attn.wo, groups.tensor)
        if groups.context.size() > 1:
            _attend_in_chunks(block.attn, groups.context)
        if hasattr(block, "moe"):
            block.moe.forward = _Mixture(block.moe, groups)  # type: ignore[method-assign]
        if hasattr(block, "mlp"):
            _between_collectives(block.mlp, block.mlp.down, groups.tensor)
    decoder.forward = SplitForward(decoder, groups)  # type: ignore[method-assign, assignment]


def _between_collectives(part: nn.Module, last: nn.Linear, group: ProcessGroup) -> None:
    """Give a part all positions of its context, and sum what each process's heads or columns contribute."""
    if group.size() == 1:
        return
    forward: Callable[..., Tensor] = part.forward

    def between(x: Tensor, *rest: Any) -> Tensor:
        output = scatter_sum(forward(gather(x, 1, group), *rest), 1, group)
        return output if last.bias is None else output + last.bias.to(output.dtype)

    part.forward = between
    # The bias belongs to the sum, not to each summand.
    last.forward = lambda x: F.linear(x, last.weight)  # type: ignore[method-assign, assignment]


class SplitForward:
    """The decoder's forward pass on this process's positions, with targets; whole, or the parts that a stage has."""

    def __init__(self, decoder: Decoder, groups: Groups) -> None:
        self._decoder, self._groups = decoder, groups

    def __call__(self, tokens: Tensor, targets: Tensor) -> Losses:
        """The losses of sequences (B, T), the same on all tensor ranks; a context rank's are those of its positions."""
        rotary = packed_tables(self._decoder.spec, tokens, self._decoder.documents)
        x, reports = self.layers(self._decoder.blocks, self.embed(tokens), rotary)
        return Losses(self.cross_entropy(x, targets), *_means(reports, x))

    def embed(self, tokens: Tensor) -> Tensor:
        """The residual stream (B, T / positions, H) before the first layer; each tensor rank knows some tokens."""
        tokens, group = of_rank(tokens, 1, self._groups.context), self._groups.tensor
        weight = self._decoder.embed.weight
        if group.size() == 1:
            return F.embedding(tokens, weight) * self._decoder.spec.embedding_multiplier
        local = tokens - group.rank() * len(weight)
        here = (local >= 0) & (local < len(weight))
        # Zeros for what another process knows, which adds to them.
        rows = F.embedding(local.where(here, 0), weight) * here.unsqueeze(-1)
        return scatter_sum(rows, 1, group) * self._decoder.spec.embedding_multiplier

    def layers(self, blocks: Iterable[nn.Module], x: Tensor, rotary: Rotary) -> tuple[Tensor, list[RouterReport]]:
        """The residual stream after some layers, and their routers' reports; `rotary` is of whole sequences."""
        group = self._groups.context
        cosine, sine = (of_rank(table, -2, group) for table in rotary[:2])
        first, temperature, shared = (
            None if each is None else of_rank(each, axis, group)
            for each, axis in ((rotary.first, 1), (rotary.temperature, 0), (rotary.shared, 1))
        )
        rotary = Rotary(cosine, sine, first, temperature, shared)
        cache: Any = _GatheredKeys(self._groups.context) if self._groups.context.size() > 1 else None
        reports = []
        for block in blocks:
            x, report = block(x, rotary, cache)
            if report is not None:
                reports.append(report)
        return x, reports

    def cross_entropy(self, x: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy of the targets (B, T) from the residual stream after the last layer."""
        spec, group = self._decoder.spec, self._groups.tensor
        hidden = gather(self._decoder.final_norm(x), 1, group)
        states, weight = to_compute_dtype(hidden.flatten(0, 1)), to_compute_dtype(self._decoder.output_weight)
        targets, scaling = (
            of_rank(targets, 1, self._groups.context).flatten(),
            (spec.output_multiplier, spec.output_softcap),
        )
        if group.size() == 1:
            return chunked_cross_entropy(states, weight, targets, *scaling)
        loss: Tensor = _SplitCrossEntropy.apply(states, weight, targets, *scaling, group)  # type: ignore[no-untyped-call]
        return loss


def of_rank(whole: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """A context rank's positions of a whole sequence's along `dim`: of 2 c equal chunks, chunk r and chunk 2 c - 1 - r.

    Under a causal mask late positions attend to more keys than early ones; so every rank has as much to do (Llama 3,
    arXiv:2407.21783, section 3.3.2).
    """
    if group.size() == 1:
        return whole
    chunks = whole.chunk(2 * group.size(), dim)
    return torch.cat((chunks[group.rank()], chunks[-1 - group.rank()]), dim)


def in_order(parts: Tensor, dim: int, ranks: int) -> Tensor:
    """What `of_rank` gave each of the ranks, one after another, as the whole sequence."""
    chunks = parts.chunk(2 * ranks, dim)
    return torch.cat((*chunks[::2], *chunks[::-2]), dim)


def _attend_in_chunks(attention: Attention, group: ProcessGroup) -> None:
    """Let each of a context rank's two chunks attend to the keys up to its own end."""
    attend = attention.attend

    def in_chunks(
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        first: Tensor | None = None,
        temperature: Tensor | None = None,
        shared: Tensor | None = None,
    ) -> Tensor:
        """From one's queries (B, heads, T / c, D) and all keys and values (B, KV, T, D)."""
        length = keys.shape[2] // (2 * group.size())
        ends = ((group.rank() + 1) * length, keys.shape[2] - group.rank() * length)
        limits = zip(
            *(
                (None, None) if each is None else each.chunk(2, axis)
                for each, axis in ((first, 1), (temperature, 0), (shared, 1))
            ),
            strict=True,
        )
        attended = [
            attend(chunk, keys[:, :, :end], values[:, :, :end], *limit)
            for chunk, end, limit in zip(queries.chunk(2, 2), ends, limits, strict=True)
        ]
        return torch.cat(attended, 2)

    attention.attend = in_chunks  # type: ignore[method-assign]


class _GatheredKeys:
    """Stands where attention expects a cache: the keys and values of all positions, gathered."""

    def __init__(self, group: ProcessGroup) -> None:
        self._group = group

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values (B, KV, T, D) in the order of their positions."""
        gathered = gather(torch.stack((keys, values)), 3, self._group)
        keys, values = in_order(gathered, 3, self._group.size()).unbind()
        return keys, values


class _Mixture:
    """The forward pass of a mixture of experts whose experts, or their matrices, are on several processes."""

    def __init__(self, moe: MixtureOfExperts, groups: Groups) -> None:
        self._moe, self._groups = moe, groups

    def __call__(self, x: Tensor) -> tuple[Tensor, RouterReport]:
        """(B, T, H) of one's positions in and out, and the router's report on the whole sequences."""
        moe, groups = self._moe, self._groups
        if groups.experts_in_tensor:
            x = gather(x, 1, groups.tensor)
        tokens = x.flatten(0, 1)  # (N, H)
        gates, choice, report = self._route(tokens)
        pairs = sort_by_expert(choice, moe.router.weight.shape[0])
        tokens, gate, up, down = map(to_compute_dtype, (tokens, moe.gate, moe.up, moe.down))
        if groups.expert.size() == 1:
            mixed = moe.mix(gates, pairs, tokens, gate, up, down, moe.activation)
        else:
            mixed = self._elsewhere(gates, pairs, tokens, gate, up, down)
        mixed = mixed.view_as(x)
        return (scatter_sum(mixed, 1, groups.tensor) if groups.experts_in_tensor else mixed), report

    def _route(self, tokens: Tensor) -> tuple[Tensor, Tensor, RouterReport]:
        """The model's own choice; its report is that on the tokens of all processes that share the sequences."""
        moe, groups = self._moe, self._groups
        gates, choice, report = moe.route(tokens)
        sharing = [groups.context] if groups.experts_in_tensor else [groups.tensor, groups.context]
        if any(group.size() > 1 for group in sharing):
            logits, every_choice = moe.router_logits(tokens), choice
            for group in sharing:
                logits, every_choice = gather(logits, 0, group), gather(every_choice, 0, group)
            report = router_report(logits, logits.softmax(-1), every_choice)
        # Every tensor rank computes the same two losses, and the gradients of all are added.
        share = 1.0 / groups.tensor.size()
        load_balance, router_z = scale_gradient(report.load_balance, share), scale_gradient(report.router_z, share)
        return gates, choice, RouterReport(load_balance, router_z, report.load)

    def _elsewhere(
        self, gates: Tensor, pairs: SortedPairs, tokens: Tensor, gate: Tensor, up: Tensor, down: Tensor
    ) -> Tensor:
        """Send each pair's token to where its expert is, and weight what comes back."""
        group, top_k = self._groups.expert, gates.shape[1]
        ranks, mine = group.size(), len(gate)
        counts = torch.empty_like(pairs.counts)  # [rank, expert of mine]: pairs that come from there
        dist.all_to_all_single(counts, pairs.counts, group=group)
        sent = pairs.counts.view(ranks, mine).sum(1).tolist()
        received = counts.view(ranks, mine).sum(1).tolist()
        rows = exchange(tokens.index_select(0, pairs.order // top_k), sent, received, group)
        experts = torch.arange(mine, device=rows.device).repeat(ranks).repeat_interleave(counts).unsqueeze(1)
        ones = torch.ones(len(rows), 1, device=rows.device, dtype=gates.dtype)
        lowered = self._moe.mix(ones, sort_by_expert(experts, mine), rows, gate, up, down, self._moe.activation)
        chosen = exchange(lowered, received, sent, group).index_select(0, pairs.inverse).view(len(tokens), top_k, -1)
        return torch.bmm(gates.unsqueeze(1).to(chosen.dtype), chosen).squeeze(1)


class _SplitCrossEntropy(torch.autograd.Function):
    """`model.loss.chunked_cross_entropy` where each process has the logits of its part of the vocabulary.

    The gradients of the hidden states are this part's summand.
    """

    @staticmethod
    def forward(
        context: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        multiplier: float,
        softcap: float | None,
        group: ProcessGroup,
    ) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        counts = (targets >= 0).unsqueeze(1)  # (N, 1)
        counted = counts.sum().clamp(min=1).float()
        local = targets.unsqueeze(1) - group.rank() * len(weight)
        here = (local >= 0) & (local < len(weight)) & counts
        to_hidden, to_weight = torch.empty_like(hidden), torch.zeros_like(weight, dtype=torch.float32)
        for start in range(0, len(hidden), CHUNK):
            part = slice(start, start + CHUNK)
            rows, ids, mine = hidden[part], local[part].where(here[part], 0), here[part]
            logits = (rows @ weight.t()).float().mul_(multiplier)  # (n, V / ranks)
            if softcap is not None:
                logits = logits.div_(softcap).tanh_().mul_(softcap)
            slope = None if softcap is None else 1.0 - (logits / softcap).square_()
            of_targets = logits.gather(1, ids) * mine
            largest = logits.amax(1, keepdim=True)
            dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
            exponentials = logits.sub_(largest).exp_()
            summed = torch.cat((exponentials.sum(1, keepdim=True), of_targets), dim=1)
            dist.all_reduce(summed, group=group)
            sums, of_targets = summed.chunk(2, dim=1)
            total += ((sums.log() + largest - of_targets) * counts[part]).sum()
            scale = counts[part] * (multiplier / counted)
            to_logits = exponentials.mul_(scale / sums).scatter_add_(1, ids, -scale * mine)
            to_logits = (to_logits if slope is None else to_logits.mul_(slope)).to(hidden.dtype)
            torch.mm(to_logits, weight, out=to_hidden[part])
            to_weight += to_logits.t() @ rows
        context.save_for_backward(to_hidden, to_weight.to(weight.dtype))
        return total / counted

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        to_hidden, to_weight = context.saved_tensors
        scale = gradients[0]
        return (
            to_hidden * scale.to(to_hidden.dtype),
            to_weight * scale.to(to_weight.dtype),
            None,
            None,
            None,
            None,
        )


def _means(reports: list[RouterReport], like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The losses of all routers, averaged, and their loads (moe_layers, experts)."""
    if not reports:
        zero = like.new_zeros((), dtype=torch.float32)
        return zero, zero, like.new_zeros((0, 0), dtype=torch.float32)
    load_balance, router_z, load = (torch.stack(part) for part in zip(*reports, strict=True))
    return load_balance.mean(), router_z.mean(), load
