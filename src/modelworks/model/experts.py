"""The mixture of experts: a router in fp32, tokens sorted by expert, and one pair of losses that keeps it balanced.

Three ideas: every token goes to its `top_k` experts and none is dropped; the (token, expert) pairs are sorted by
expert so that each expert multiplies one contiguous group of rows; the backward pass is written out, so that the
activation is computed again instead of kept, weights' gradients are written once, and the way back to the tokens is
a gather by the inverse permutation and not a scatter.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modelworks.model.layers import Linear, to_compute_dtype
from modelworks.spec.model import ModelSpec


class RouterReport(NamedTuple):
    """What one layer's router says of itself: the two losses (scalars) and the share of pairs of each expert (E)."""

    load_balance: Tensor
    router_z: Tensor
    load: Tensor


class MixtureOfExperts(nn.Module):
    """The experts of one layer, with gated feed-forward networks of width F."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        assert spec.moe is not None
        experts, width = spec.moe.experts, spec.moe.expert_hidden
        self.top_k, self.renormalize, self.activation = spec.moe.top_k, spec.moe.renormalize, spec.activation
        self.router = Linear(spec.hidden, experts, bias=False)
        self.gate = nn.Parameter(torch.empty(experts, width, spec.hidden))
        self.up = nn.Parameter(torch.empty(experts, width, spec.hidden))
        self.down = nn.Parameter(torch.empty(experts, spec.hidden, width))

    def forward(self, x: Tensor) -> tuple[Tensor, RouterReport]:
        """Send each token of (B, T, H) through its experts; returns the same shape, and the router's report."""
        tokens = x.flatten(0, 1)  # (N, H)
        gates, choice, report = self.route(tokens)
        pairs = sort_by_expert(choice, len(self.gate))
        tokens, gate, up, down = map(to_compute_dtype, (tokens, self.gate, self.up, self.down))
        return grouped_experts(gates, pairs, tokens, gate, up, down, self.activation).view_as(x), report

    def route(self, tokens: Tensor) -> tuple[Tensor, Tensor, RouterReport]:
        """The gates (N, K) and experts (N, K) of each token of (N, H), and the router's report.

        Softmax over all experts in fp32 before the choice; the chosen gates are rescaled to sum to one only where
        the spec says so.
        """
        with torch.autocast(tokens.device.type, enabled=False):
            logits = F.linear(tokens.float(), self.router.weight.float())  # (N, E)
        probabilities = logits.softmax(-1)
        gates, choice = probabilities.topk(self.top_k, dim=-1)  # (N, K)
        if self.renormalize:
            gates = gates / gates.sum(-1, keepdim=True)
        return gates, choice, router_report(logits, probabilities, choice)


def router_report(logits: Tensor, probabilities: Tensor, choice: Tensor) -> RouterReport:
    """The router's losses from its logits and probabilities (N, E) and its choice (N, K).

    Load balance: `E * sum_e f_e P_e` with the share of pairs `f` and the mean probability `P` (Switch Transformer,
    arXiv:2101.03961, eq. 4, without its weight): 1 when balanced. Router z: the mean square of the logits'
    log-sum-exp (ST-MoE, arXiv:2202.08906, eq. 5).
    """
    experts = logits.shape[-1]
    load = choice.flatten().bincount(minlength=experts).float() / choice.numel()
    return RouterReport(
        load_balance=experts * (load * probabilities.mean(0)).sum(),
        router_z=logits.logsumexp(-1).square().mean(),
        load=load,
    )


class SortedPairs(NamedTuple):
    """The (token, choice) pairs in the order of their experts."""

    order: Tensor
    """(N * K) which pair stands at each sorted place; pair p is choice p % K of token p // K."""
    inverse: Tensor
    """(N * K) where each pair stands."""
    counts: Tensor
    """(E) pairs of each expert."""


def sort_by_expert(choice: Tensor, experts: int) -> SortedPairs:
    """Sort the pairs of a choice (N, K) by expert, tokens in order within an expert."""
    flat = choice.flatten()
    order = flat.argsort(stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    return SortedPairs(order, inverse, flat.bincount(minlength=experts))


def grouped_experts(
    gates: Tensor, pairs: SortedPairs, tokens: Tensor, gate: Tensor, up: Tensor, down: Tensor, activation: str
) -> Tensor:
    """Run the experts on sorted pairs.

    Parameters
    ----------
    gates
        (N, K), what each token's experts are weighted with.
    pairs
        `sort_by_expert` of the choice (N, K).
    tokens
        (N, H)
    gate, up, down
        The experts' matrices (E, F, H), (E, F, H) and (E, H, F), of the tokens' dtype.
    activation
        `silu` or `gelu` (the tanh approximation).

    Returns
    -------
    Tensor
        (N, H)
    """
    output: Tensor = _Experts.apply(tokens, gates, *pairs, gate, up, down, activation)  # type: ignore[no-untyped-call]
    return output


class _Experts(torch.autograd.Function):
    """The experts on sorted pairs: y[n] = sum_k gates[n, k] * down(act(gate(x[n])) * up(x[n])) of expert (n, k)."""

    @staticmethod
    def forward(
        context: Any,
        tokens: Tensor,
        gates: Tensor,
        order: Tensor,
        inverse: Tensor,
        counts: Tensor,
        gate: Tensor,
        up: Tensor,
        down: Tensor,
        activation: str,
    ) -> Tensor:
        top_k, groups = gates.shape[1], _groups(counts)
        rows = tokens.index_select(0, order // top_k)  # (N * K, H)
        gated, lifted = (rows.new_empty(len(rows), gate.shape[1]) for _ in range(2))  # (N * K, F)
        lowered, room = torch.empty_like(rows), rows.new_empty(_largest(groups), gate.shape[1])
        for expert, here in groups:
            torch.mm(rows[here], gate[expert].t(), out=gated[here])
            torch.mm(rows[here], up[expert].t(), out=lifted[here])
            mixed = _activate(gated[here], activation, _first(room, here)).mul_(lifted[here])
            torch.mm(mixed, down[expert].t(), out=lowered[here])
        context.save_for_backward(tokens, gates, order, inverse, gated, lifted, gate, up, down)
        context.groups, context.activation = groups, activation
        chosen = lowered.index_select(0, inverse).view(len(tokens), top_k, -1)  # (N, K, H)
        return torch.bmm(gates.unsqueeze(1).to(chosen.dtype), chosen).squeeze(1)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        tokens, gates, order, inverse, gated, lifted, gate, up, down = context.saved_tensors
        top_k = gates.shape[1]
        source = order // top_k
        rows, above = tokens.index_select(0, source), gradients[0].index_select(0, source)  # (N * K, H)
        weights = gates.flatten().index_select(0, order).unsqueeze(1).to(rows.dtype)  # (N * K, 1)
        to_weights = torch.empty_like(weights, dtype=gates.dtype)
        to_rows = torch.empty_like(rows)
        to_gate, to_up, to_down = (torch.empty_like(weight) for weight in (gate, up, down))
        rooms = [rows.new_empty(_largest(context.groups), gate.shape[1]) for _ in range(3)]
        for expert, here in context.groups:
            active, mixed, to_mixed = (_first(room, here) for room in rooms)  # (n, F)
            _activate(gated[here], context.activation, active)
            torch.mul(active, lifted[here], out=mixed)
            torch.mm(above[here], down[expert], out=to_mixed)  # before the pair's gate
            to_weights[here] = torch.linalg.vecdot(to_mixed, mixed).unsqueeze(1)
            torch.mm(above[here].mul_(weights[here]).t(), mixed, out=to_down[expert])
            to_mixed.mul_(weights[here])
            to_lifted = active.mul_(to_mixed)
            to_gated = _activate_backward(to_mixed.mul_(lifted[here]), gated[here], context.activation, mixed)
            torch.mm(to_gated.t(), rows[here], out=to_gate[expert])
            torch.mm(to_lifted.t(), rows[here], out=to_up[expert])
            torch.mm(to_gated, gate[expert], out=to_rows[here])
            to_rows[here].addmm_(to_lifted, up[expert])
        for expert in set(range(len(gate))) - {expert for expert, _ in context.groups}:
            for gradient in (to_gate, to_up, to_down):
                gradient[expert] = 0.0
        to_tokens = to_rows.index_select(0, inverse).view(len(tokens), top_k, -1).sum(1)
        to_gates = to_weights.flatten().index_select(0, inverse).view_as(gates)
        return to_tokens, to_gates, None, None, None, to_gate, to_up, to_down, None


def _groups(counts: Tensor) -> list[tuple[int, slice]]:
    """Each expert that has pairs, and where they stand."""
    groups, start = [], 0
    for expert, count in enumerate(counts.tolist()):
        if count:
            groups.append((expert, slice(start, start + count)))
        start += count
    return groups


def _largest(groups: list[tuple[int, slice]]) -> int:
    return max((here.stop - here.start for _, here in groups), default=0)


def _first(room: Tensor, here: slice) -> Tensor:
    """As many of the first rows of a scratch tensor as a group has."""
    return room[: here.stop - here.start]


def _activate(x: Tensor, activation: str, out: Tensor) -> Tensor:
    """The activation of `x`, written to `out`."""
    if activation == "silu":
        torch.ops.aten.silu.out(x, out=out)
    else:
        torch.ops.aten.gelu.out(x, approximate="tanh", out=out)
    return out


def _activate_backward(gradient: Tensor, x: Tensor, activation: str, out: Tensor) -> Tensor:
    """The gradient with respect to the activation's argument `x`, written to `out`."""
    if activation == "silu":
        torch.ops.aten.silu_backward.grad_input(gradient, x, grad_input=out)
    else:
        torch.ops.aten.gelu_backward.grad_input(gradient, x, approximate="tanh", grad_input=out)
    return out
