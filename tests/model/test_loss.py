"""Chunked cross-entropy against PyTorch's own on whole logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from modelworks.model.loss import CHUNK, chunked_cross_entropy


def whole(hidden: Tensor, weight: Tensor, targets: Tensor, multiplier: float, softcap: float | None) -> Tensor:
    logits = (hidden @ weight.t()) * multiplier
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, targets, ignore_index=-1)


@pytest.mark.parametrize("tokens", [1, CHUNK, 2 * CHUNK + 77])
@pytest.mark.parametrize(("multiplier", "softcap"), [(1.0, None), (0.577, None), (2.0, 3.0)])
def test_chunks_give_the_loss_and_gradients_of_whole_logits(
    tokens: int, multiplier: float, softcap: float | None
) -> None:
    torch.manual_seed(tokens)
    hidden = torch.randn(tokens, 32, requires_grad=True)
    weight = torch.randn(101, 32, requires_grad=True)
    targets = torch.randint(0, 101, (tokens,))
    targets[1::5] = -1
    loss = chunked_cross_entropy(hidden, weight, targets, multiplier, softcap)
    precise = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    expected = whole(*precise, targets, multiplier, softcap)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    for got, wanted in zip(
        torch.autograd.grad(3.0 * loss, (hidden, weight)),
        torch.autograd.grad(3.0 * expected, precise),
        strict=True,
    ):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-5)


def test_targets_that_do_not_count_give_no_loss_and_no_gradient() -> None:
    hidden, weight = torch.randn(9, 8, requires_grad=True), torch.randn(20, 8, requires_grad=True)
    loss = chunked_cross_entropy(hidden, weight, torch.full((9,), -1))
    assert loss.item() == 0.0
    assert all((gradient == 0).all() for gradient in torch.autograd.grad(loss, (hidden, weight)))


def test_the_loss_alone_is_computed_without_gradients() -> None:
    hidden, weight, targets = torch.randn(700, 8), torch.randn(20, 8), torch.randint(0, 20, (700,))
    loss = chunked_cross_entropy(hidden, weight, targets)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, whole(hidden, weight, targets, 1.0, None))


def test_bfloat16_inputs_give_a_float32_loss_and_bfloat16_gradients() -> None:
    hidden = torch.randn(40, 16).bfloat16().requires_grad_()
    weight = torch.randn(50, 16).bfloat16().requires_grad_()
    targets = torch.randint(0, 50, (40,))
    loss = chunked_cross_entropy(hidden, weight, targets)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, whole(hidden.float(), weight.float(), targets, 1.0, None), rtol=2e-2, atol=2e-2)
    assert all(gradient.dtype == torch.bfloat16 for gradient in torch.autograd.grad(loss, (hidden, weight)))
