"""The mixture of experts against one token at a time, and its losses against the papers' formulas."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from modelworks.model.experts import MixtureOfExperts, grouped_linear, router_report, sort_by_expert
from modelworks.spec.model import ModelSpec, MoESpec


def mixture(activation: str, renormalize: bool) -> MixtureOfExperts:
    spec = ModelSpec(
        layers=1,
        hidden=24,
        heads=2,
        vocab=16,
        context=64,
        activation=activation,
        ffn_hidden=40,
        moe=MoESpec(experts=5, top_k=2, expert_hidden=40, renormalize=renormalize),
    )
    module = MixtureOfExperts(spec)
    torch.manual_seed(3)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module


def one_token_at_a_time(module: MixtureOfExperts, x: Tensor) -> Tensor:
    """The definition: route each token by itself and run its experts by themselves."""
    act = F.silu if module.activation == "silu" else lambda value: F.gelu(value, approximate="tanh")
    rows = []
    for token in x.flatten(0, 1):
        gates, chosen = F.softmax(module.router.weight @ token, -1).topk(module.top_k)
        if module.renormalize:
            gates = gates / gates.sum()
        row = torch.zeros_like(token)
        for gate, expert in zip(gates, chosen.tolist(), strict=True):
            hidden = act(module.gate[expert] @ token) * (module.up[expert] @ token)
            row = row + gate * (module.down[expert] @ hidden)
        rows.append(row)
    return torch.stack(rows).view_as(x)


@pytest.mark.parametrize("activation", ["silu", "gelu"])
@pytest.mark.parametrize("renormalize", [True, False])
def test_experts_equal_one_token_at_a_time_in_values_and_gradients(activation: str, renormalize: bool) -> None:
    module = mixture(activation, renormalize)
    x = torch.randn(2, 13, 24, requires_grad=True)
    sources = [x, *module.parameters()]
    output, _ = module(x)
    expected = one_token_at_a_time(module, x)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    upstream = torch.randn_like(output)
    for got, wanted in zip(
        torch.autograd.grad(output, sources, upstream), torch.autograd.grad(expected, sources, upstream), strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_no_token_is_dropped_when_all_choose_the_same_experts() -> None:
    module = mixture("silu", renormalize=True)
    x = torch.randn(1, 1, 24).expand(1, 50, 24)
    output, report = module(x)
    torch.testing.assert_close(output, one_token_at_a_time(module, x), rtol=1e-4, atol=1e-5)
    assert sorted(report.load.tolist()) == [0.0, 0.0, 0.0, 0.5, 0.5]
    gate = torch.autograd.grad(output.sum(), module.gate)[0]
    assert (gate[report.load == 0] == 0).all()


def test_pairs_are_sorted_by_expert_and_find_their_way_back() -> None:
    choice = torch.tensor([[2, 0], [1, 2], [0, 2]])
    pairs = sort_by_expert(choice, experts=4)
    assert choice.flatten()[pairs.order].tolist() == [0, 0, 1, 2, 2, 2]
    assert pairs.counts.tolist() == [2, 1, 3, 0]
    torch.testing.assert_close(choice.flatten()[pairs.order][pairs.inverse], choice.flatten())


def test_a_balanced_router_has_load_balance_loss_one_and_a_collapsed_one_the_number_of_experts() -> None:
    experts, tokens = 4, 8
    even = torch.zeros(tokens, experts)
    balanced = router_report(even, even.softmax(-1), torch.arange(tokens)[:, None] % experts)
    assert balanced.load_balance.item() == pytest.approx(1.0)
    assert balanced.router_z.item() == pytest.approx(math.log(experts) ** 2)
    sure = torch.full((tokens, experts), -50.0)
    sure[:, 2] = 50.0
    collapsed = router_report(sure, sure.softmax(-1), torch.full((tokens, 1), 2))
    assert collapsed.load_balance.item() == pytest.approx(experts)
    assert collapsed.load.tolist() == [0.0, 0.0, 1.0, 0.0]


def test_router_losses_equal_the_papers_sums() -> None:
    torch.manual_seed(0)
    logits = torch.randn(30, 6)
    probabilities = logits.softmax(-1)
    choice = probabilities.topk(2).indices
    report = router_report(logits, probabilities, choice)
    shares = [(choice == expert).sum().item() / choice.numel() for expert in range(6)]
    means = [probabilities[:, expert].mean().item() for expert in range(6)]
    assert report.load_balance.item() == pytest.approx(6 * sum(f * p for f, p in zip(shares, means, strict=True)))
    assert report.router_z.item() == pytest.approx(
        sum(math.log(sum(math.exp(value) for value in row)) ** 2 for row in logits.tolist()) / 30, rel=1e-5
    )


def test_experts_run_in_bfloat16_under_autocast_and_route_in_float32() -> None:
    module = mixture("gelu", renormalize=False)
    x = torch.randn(2, 9, 24)
    reference, report = module(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, lowered = module(x)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(lowered.router_z, report.router_z)
    torch.testing.assert_close(output.float(), reference, rtol=5e-2, atol=5e-2)
    output.float().square().sum().backward()
    assert module.gate.grad is not None
    assert module.gate.grad.dtype == torch.float32


@pytest.mark.parametrize("width", [40, 36], ids=["grouped matmul", "a width that it refuses"])
def test_grouped_products_in_bfloat16_stay_near_float32_and_leave_an_empty_group_zero(width: int) -> None:
    torch.manual_seed(5)
    counts = torch.tensor([3, 0, 9, 1])
    rows, weights = torch.randn(13, 24, requires_grad=True), torch.randn(4, width, 24, requires_grad=True)
    expert = torch.arange(4).repeat_interleave(counts)
    expected = torch.einsum("ri,roi->ro", rows, weights[expert])
    product = grouped_linear(rows.bfloat16(), weights.bfloat16(), counts)
    assert product.dtype == torch.bfloat16
    torch.testing.assert_close(product.float(), expected, rtol=3e-2, atol=0.1)
    upstream = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, (rows, weights), upstream)
    got = torch.autograd.grad(product, (rows, weights), upstream.bfloat16())
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=3e-2, atol=0.2)
    assert (got[1][1] == 0).all()
