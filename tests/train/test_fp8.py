"""Products in fp8: what they are off by, that networks learn with them, and where they are refused."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from processes import together
from tiny_runs import make, train_some

from modelworks.model.experts import grouped_linear
from modelworks.spec.errors import InputError
from modelworks.spec.run import RunSpec
from modelworks.train import fp8, loop
from modelworks.train.precision import FP8, resolve
from modelworks.train.ranks import Ranks
from modelworks.train.session import open_run

E4M3_ERROR, E5M2_ERROR = 2**-4 / 3**0.5, 2**-3 / 3**0.5
"""Largest root mean square of rounding to 3 and to 2 bits behind the first: uniform within half of the last one."""


def _off(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact.double()).norm() / exact.double().norm())


@pytest.mark.parametrize("rows", [64, 37])
def test_a_product_and_its_gradients_are_off_by_what_rounding_two_factors_makes(rows: int) -> None:
    torch.manual_seed(1)
    x, weight, above = torch.randn(3, rows, 96), torch.randn(80, 96) / 10, torch.randn(3, rows, 80) * 1e-3
    found = [tensor.clone().requires_grad_() for tensor in (x, weight)]
    product = fp8.linear(*found)
    product.backward(above.to(product.dtype))  # type: ignore[no-untyped-call]
    assert product.dtype == torch.bfloat16
    both = (2 * E4M3_ERROR**2) ** 0.5
    assert both / 3 < _off(product.detach(), x @ weight.t()) < both
    mixed = (E4M3_ERROR**2 + E5M2_ERROR**2) ** 0.5
    for tensor, exact in zip(found, (above @ weight, above.flatten(0, 1).t() @ x.flatten(0, 1)), strict=True):
        assert tensor.grad is not None
        assert mixed / 3 < _off(tensor.grad, exact) < mixed


def test_a_product_is_that_of_the_rounded_factors() -> None:
    torch.manual_seed(2)
    x, weight = torch.randn(48, 64), torch.randn(32, 64)
    rounded = []
    for factor in (x.bfloat16(), weight.bfloat16()):
        low, scale = fp8.quantized(factor, torch.float8_e4m3fn)
        assert float(low.float().abs().max()) == 448.0
        rounded.append(low.double() * scale.double())
        assert _off(rounded[-1], factor) < E4M3_ERROR
    torch.testing.assert_close(fp8.linear(x, weight).double(), rounded[0] @ rounded[1].t(), rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("exponent", [-60, 0, 60])
def test_the_size_of_the_numbers_does_not_matter(exponent: int) -> None:
    torch.manual_seed(3)
    x, weight = torch.randn(32, 64), torch.randn(16, 64)
    assert torch.equal(fp8.linear(x * 2.0**exponent, weight), fp8.linear(x, weight) * 2.0**exponent)


def test_nothing_and_zeros_are_multiplied_as_well() -> None:
    assert fp8.linear(torch.zeros(0, 32), torch.ones(16, 32)).shape == (0, 16)
    assert not fp8.linear(torch.zeros(5, 32), torch.ones(16, 32)).any()


def test_groups_are_multiplied_each_by_its_matrix() -> None:
    torch.manual_seed(4)
    rows, weights = torch.randn(50, 64), torch.randn(3, 32, 64)
    counts = torch.tensor([20, 0, 30])
    found = [tensor.clone().requires_grad_() for tensor in (rows, weights)]
    exact = [tensor.clone().requires_grad_() for tensor in (rows, weights)]
    above = torch.randn(50, 32)
    for tensors, multiply in ((found, fp8.grouped_linear), (exact, grouped_linear)):
        product = multiply(*tensors, counts)
        product.backward(above.to(product.dtype))  # type: ignore[union-attr]
    for one, other in zip(found, exact, strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert _off(one.grad, other.grad) < (E4M3_ERROR**2 + E5M2_ERROR**2) ** 0.5
    assert not found[1].grad[1].any()  # type: ignore[index]


def train_in_fp8(ranks: Ranks, folder: Path, spec: RunSpec, steps: int) -> dict[str, Any]:
    """A run as on a GPU that multiplies fp8, but on this processor, which does it slowly."""
    before, loop.resolve = loop.resolve, lambda stated: FP8
    try:
        return train_some(ranks, folder, spec, steps)
    finally:
        loop.resolve = before


def test_networks_learn_in_fp8_nearly_as_much_as_in_fp32(text_folder: Path, folder: Path) -> None:
    """On one process, and on two that share heads and the columns of experts."""
    layouts: list[tuple[int, dict[str, Any]]] = [(1, {}), (2, {"tensor": 2, "expert_tensor": 2})]
    losses = {}
    for place, (processes, fields) in enumerate([(1, {}), *layouts]):
        spec = make("mixture", "adamw", text_folder, processes, micro_batch=4, **fields)
        work = train_in_fp8 if place else train_some
        with open_run(spec, folder=folder / "runs" / f"fp8-{place}") as session:
            rows = together(processes, work, session.folder, spec, 8)[0]["rows"]
        losses[place] = [row["loss"] for row in rows]
    learnt = losses[0][0] - losses[0][-1]
    assert learnt > 0.15
    for place in (1, 2):
        assert losses[place] == pytest.approx(losses[0], abs=0.2 * learnt)
        assert losses[place] != pytest.approx(losses[0], rel=1e-5)  # it is fp8


def test_fp8_is_refused_on_a_processor_and_on_a_gpu_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"'fp8' is not accepted on this machine, which trains on its processor: auto"):
        resolve("fp8")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(InputError, match=r"whose compute capability is 8\.0: auto, fp32 or bf16 is"):
        resolve("fp8", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert resolve("fp8", torch.device("cuda")) == FP8
