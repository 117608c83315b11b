"""Muon against the singular value decomposition and against PyTorch's own for two dimensions."""

import pytest
import torch

from modelworks.train.muon import Muon, orthogonalize


@pytest.mark.parametrize("shape", [(64, 64), (32, 96), (96, 32)])
def test_singular_values_end_near_one_and_singular_vectors_stay(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    rotated = u.mT @ orthogonalize(matrix) @ vh.mT
    values = rotated.diagonal()
    assert values.min() > 0.5
    assert values.max() < 1.5
    assert (rotated - values.diag()).abs().max() < 1e-3


def test_a_stack_of_matrices_is_each_matrix_by_itself() -> None:
    stack = torch.randn(5, 24, 40, generator=torch.Generator().manual_seed(2))
    each = torch.stack([orthogonalize(matrix) for matrix in stack])
    torch.testing.assert_close(orthogonalize(stack), each, atol=1e-5, rtol=1e-5)


def test_a_matrix_of_zeros_stays_zero() -> None:
    assert torch.equal(orthogonalize(torch.zeros(3, 4, 5)), torch.zeros(3, 4, 5))


def test_steps_agree_with_pytorchs_muon_up_to_its_bf16() -> None:
    start = torch.randn(32, 48, generator=torch.Generator().manual_seed(3))
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    optimizers = [
        Muon([ours], lr=0.02, momentum=0.95, weight_decay=0.1),
        torch.optim.Muon([theirs], lr=0.02, momentum=0.95, weight_decay=0.1),
    ]
    generator = torch.Generator().manual_seed(4)
    for _ in range(5):
        gradient = torch.randn(32, 48, generator=generator)
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    moved = (theirs - start).norm()
    assert moved > 0.1
    assert (ours - theirs).norm() / moved < 0.02


def test_experts_move_as_if_each_had_an_optimizer_of_its_own() -> None:
    start = torch.randn(4, 24, 16, generator=torch.Generator().manual_seed(5))
    gradient = torch.randn(4, 24, 16, generator=torch.Generator().manual_seed(6))
    stacked = torch.nn.Parameter(start.clone())
    single = [torch.nn.Parameter(matrix.clone()) for matrix in start]
    stacked.grad = gradient.clone()
    for parameter, part in zip(single, gradient, strict=True):
        parameter.grad = part.clone()
    Muon([stacked]).step()
    Muon(single).step()
    torch.testing.assert_close(stacked.data, torch.stack([parameter.data for parameter in single]), atol=1e-6, rtol=0)


def test_a_vector_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(7,\)"):
        Muon([torch.nn.Parameter(torch.zeros(7))])
