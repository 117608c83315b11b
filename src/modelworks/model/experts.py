"""The mixture of experts: a router in fp32, tokens sorted by expert, and one pair of losses that keeps it balanced.

Three ideas: every token goes to its `top_k` experts and none is dropped; the (token, expert) pairs are sorted by
expert, so that an expert multiplies one contiguous group of rows (`grouped_linear`); sorting is a permutation, so the
way back to the tokens, and both their gradients, are gathers by it or its inverse and never a scatter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modelworks.model.layers import Linear, activate, activate_backward, gated_activation, to_compute_dtype
from modelworks.spec.model import ModelSpec

GROUPED_WIDTH = 8
"""What PyTorch's grouped matmul wants a width in bf16 to be a multiple of: 16 bytes."""


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
        self.softcap = spec.moe.router_softcap
        self.router = Linear(spec.hidden, experts, bias=False)
        self.gate = nn.Parameter(torch.empty(experts, width, spec.hidden))
        self.up = nn.Parameter(torch.empty(experts, width, spec.hidden))
        self.down = nn.Parameter(torch.empty(experts, spec.hidden, width))
        self.mix: Callable[..., Tensor] = grouped_experts

    def forward(self, x: Tensor) -> tuple[Tensor, RouterReport]:
        """Send each token of (B, T, H) through its experts; returns the same shape, and the router's report."""
        tokens = x.flatten(0, 1)  # (N, H)
        gates, choice, report = self.route(tokens)
        pairs = sort_by_expert(choice, len(self.gate))
        tokens, gate, up, down = map(to_compute_dtype, (tokens, self.gate, self.up, self.down))
        return self.mix(gates, pairs, tokens, gate, up, down, self.activation).view_as(x), report

    def route(self, tokens: Tensor) -> tuple[Tensor, Tensor, RouterReport]:
        """The gates (N, K) and experts (N, K) of each token of (N, H), and the router's report.

        Softmax over all experts in fp32 before the choice; the chosen gates are rescaled to sum to one only where
        the spec says so.
        """
        logits = self.router_logits(tokens)  # (N, E)
        probabilities = logits.softmax(-1)
        gates, choice = probabilities.topk(self.top_k, dim=-1)  # (N, K)
        if self.renormalize:
            gates = gates / gates.sum(-1, keepdim=True)
        return gates, choice, router_report(logits, probabilities, choice)

    def router_logits(self, tokens: Tensor) -> Tensor:
        """What the router thinks of each expert (N, E), in fp32, capped where the spec says so."""
        with torch.autocast(tokens.device.type, enabled=False):
            logits = F.linear(tokens.float(), self.router.weight.float())
        return logits if self.softcap is None else self.softcap * (logits / self.softcap).tanh()


def router_report(logits: Tensor, probabilities: Tensor, choice: Tensor) -> RouterReport:
    """The router's losses from its logits and probabilities (N, E) and its choice (N, K).

    Load balance: `E * sum_e f_e P_e` with the share of pairs `f` and the mean probability `P` (Switch Transformer,
    arXiv:2101.03961, eq. 4, without its weight): 1 when balanced. Router z: the mean square of the logits'
    log-sum-exp (ST-MoE, arXiv:2202.08906, eq. 5).
    """
    experts = logits.shape[-1]
    load = _counts(choice, experts).float() / choice.numel()
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
    order = choice.flatten().argsort(stable=True)
    return SortedPairs(order, order.argsort(), _counts(choice, experts))


def _counts(choice: Tensor, experts: int) -> Tensor:
    """How many of a choice (N, K) each expert has (E)."""
    return (choice.flatten().unsqueeze(1) == torch.arange(experts, device=choice.device)).sum(0)


def grouped_experts(
    gates: Tensor,
    pairs: SortedPairs,
    tokens: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    activation: str,
    multiply: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """Run the experts on sorted pairs: `y[n] = sum_k gates[n, k] * down(act(gate(x[n])) * up(x[n]))` of expert (n, k).

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
    multiply
        What stands instead of `grouped_linear`; the activation is then kept, not computed again.

    Returns
    -------
    Tensor
        (N, H)
    """
    order, inverse, counts = pairs
    rows = permute(tokens.repeat_interleave(gates.shape[1], 0), order, inverse)  # (N * K, H)
    product = multiply or grouped_linear
    gated, lifted = product(rows, gate, counts), product(rows, up, counts)  # (N * K, F)
    if multiply is None:
        lowered = lower(gated, lifted, down, counts, activation)  # (N * K, H)
    else:
        lowered = multiply(gated_activation(gated, lifted, activation), down, counts)
    chosen = permute(lowered, inverse, order).view(*gates.shape, tokens.shape[1])  # (N, K, H)
    return (gates.unsqueeze(-1) * chosen).sum(1).to(tokens.dtype)


def permute(rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """The rows (R, H) in another order, whose gradient is gathered by the order's inverse."""
    permuted: Tensor = _Permute.apply(rows, order, inverse)  # type: ignore[no-untyped-call]
    return permuted


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        context.save_for_backward(inverse)
        return rows.index_select(0, order)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (inverse,) = context.saved_tensors
        return gradients[0].index_select(0, inverse), None, None


def lower(gated: Tensor, lifted: Tensor, down: Tensor, counts: Tensor, activation: str) -> Tensor:
    """`down(act(gated) * lifted)` of grouped rows (R, F); the activation is computed again rather than kept."""
    lowered: Tensor = _Lower.apply(gated, lifted, down, counts, activation)  # type: ignore[no-untyped-call]
    return lowered


class _Lower(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, gated: Tensor, lifted: Tensor, down: Tensor, counts: Tensor, activation: str) -> Tensor:
        context.save_for_backward(gated, lifted, down, counts)
        context.activation = activation
        lowered: Tensor = grouped_linear(gated_activation(gated, lifted, activation), down, counts)
        return lowered

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gated, lifted, down, counts = context.saved_tensors
        above = gradients[0].contiguous()
        active = activate(gated, context.activation)
        to_down = grouped_outer(above, active * lifted, counts)
        to_mixed = grouped_linear(above, down.transpose(1, 2), counts)
        to_gated = activate_backward(to_mixed * lifted, gated, context.activation)
        return to_gated, to_mixed * active, to_down, None, None


@torch.library.custom_op("modelworks::grouped_linear", mutates_args=())
def grouped_linear(rows: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
    """Multiply each group of rows by its own matrix, as `F.linear` does; opaque to a compiler.

    Parameters
    ----------
    rows
        (R, I): the rows of the first group, then those of the second, and so on.
    weights
        (E, O, I), of the rows' dtype.
    counts
        (E) rows of each group; together R.

    Returns
    -------
    Tensor
        (R, O)
    """
    if _multiplies_grouped(rows, weights):
        return F.grouped_mm(rows, weights.transpose(1, 2), offs=_offsets(counts))
    product = rows.new_empty(len(rows), weights.shape[1])
    for matrix, here in zip(weights, _groups(counts), strict=True):
        torch.mm(rows[here], matrix.t(), out=product[here])
    return product


@torch.library.custom_op("modelworks::grouped_outer", mutates_args=())
def grouped_outer(left: Tensor, right: Tensor, counts: Tensor) -> Tensor:
    """Of each group of rows the product `left^T right`: (R, O) and (R, I) give (E, O, I); zero for an empty group."""
    if _multiplies_grouped(left, right):
        return F.grouped_mm(left.t(), right, offs=_offsets(counts))
    product = left.new_empty(len(counts), left.shape[1], right.shape[1])
    for matrix, here in zip(product, _groups(counts), strict=True):
        torch.mm(left[here].t(), right[here], out=matrix)
    return product


@grouped_linear.register_fake
def _(rows: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
    return rows.new_empty(len(rows), weights.shape[1])


@grouped_outer.register_fake
def _(left: Tensor, right: Tensor, counts: Tensor) -> Tensor:
    return left.new_empty(len(counts), left.shape[1], right.shape[1])


def _keep_factors(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)  # PyTorch passes these three by name


def _grouped_linear_backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    rows, weights, counts = context.saved_tensors
    gradient = gradient.contiguous()
    to_rows = grouped_linear(gradient, weights.transpose(1, 2), counts) if context.needs_input_grad[0] else None
    return to_rows, grouped_outer(gradient, rows, counts), None


grouped_linear.register_autograd(_grouped_linear_backward, setup_context=_keep_factors)


def _multiplies_grouped(left: Tensor, right: Tensor) -> bool:
    """Whether PyTorch's grouped matmul takes these: it is made for bf16."""
    widths = (left.shape[-1], right.shape[-1], right.shape[-2] if right.dim() == 3 else GROUPED_WIDTH)
    return left.dtype == torch.bfloat16 and len(left) > 0 and all(width % GROUPED_WIDTH == 0 for width in widths)


def _offsets(counts: Tensor) -> Tensor:
    return counts.cumsum(0, dtype=torch.int32)


def _groups(counts: Tensor) -> list[slice]:
    """Where each group's rows stand."""
    ends = counts.cumsum(0).tolist()
    return [slice(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]
