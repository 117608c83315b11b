"""Muon: momentum whose update is made orthogonal, for matrices and for stacks of them (experts).

Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/. Written here since `torch.optim.Muon` takes two
dimensions only and always iterates in bf16, which some CPUs multiply a hundred times slower than fp32. A parameter
(E, F, H) is E matrices: each is made orthogonal by itself, all in one batched multiplication.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from modelworks.train.parallelize import local
from modelworks.train.rounding import Part, keep, noise_of

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic whose slope at zero is steep: singular values end between about 0.7 and 1.2, not at 1."""


def orthogonalize(matrices: Tensor, steps: int = 5, dtype: torch.dtype = torch.float32) -> Tensor:
    """Replace the singular values of each matrix by about 1, with a Newton-Schulz iteration.

    Parameters
    ----------
    matrices : (..., rows, columns)
    steps
        Iterations; 5 suffice for singular values down to a thousandth of the largest.
    dtype
        What to multiply in.

    Returns
    -------
    Tensor (..., rows, columns), in the dtype of `matrices`
    """
    a, b, c = COEFFICIENTS
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = (matrices.mT if tall else matrices).to(dtype)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    orthogonal: Tensor = (x.mT if tall else x).to(matrices.dtype)
    return orthogonal


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, made orthogonal, with decoupled weight decay.

    The update of a (rows, columns) matrix is scaled by ``sqrt(max(1, rows / columns))``, so that it changes the
    outputs of wide and tall matrices alike.

    Parameters
    ----------
    parameters
        Tensors of two or more dimensions; the last two are the matrix.
    dtype
        What the iteration multiplies in; bf16 is enough where it is fast.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self._dtype = dtype
        self.whole: Callable[[Tensor, Tensor], Tensor] = lambda parameter, part: part
        """From a parameter and what this process holds of its update to the whole update, if that is elsewhere too."""
        self.rounded: Callable[[Tensor], Part] | None = None
        """Where momentum is kept in bf16: which part of which tensor this process holds of a parameter."""
        self.seed = self.now = 0
        """The run's, and its step, from which the bits follow that rounding draws."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.ndim < 2:
                    raise ValueError(f"Muon takes matrices; a parameter of shape {tuple(parameter.shape)} was given")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(gradient, dtype=torch.bfloat16 if self.rounded else gradient.dtype)
        momentum = state["momentum"]
        if self.rounded is not None:
            momentum = momentum.to(gradient.dtype)
        momentum.lerp_(gradient, 1 - group["momentum"])
        update = self.whole(parameter, gradient.lerp(momentum, group["momentum"]))
        if self.rounded is not None and not parameter.is_meta:
            part, values = self.rounded(parameter), local(momentum)
            noise = noise_of(replace(part, name=f"{part.name}/momentum"), values, self.seed, self.now)
            keep(local(state["momentum"]), values, noise)
        rows, columns = update.shape[-2:]
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        alpha = -group["lr"] * max(1.0, rows / columns) ** 0.5
        local(parameter).add_(local(self._orthogonal(update)), alpha=alpha)

    def _orthogonal(self, update: Tensor) -> Tensor:
        """`orthogonalize`, also of an update that is split over processes.

        Stacks whose matrices are whole on each process stay where they are; matrices that are split themselves are
        gathered, and each process keeps its part of the result.
        """
        if not isinstance(update, DTensor):
            return orthogonalize(update, dtype=self._dtype)
        split = {placement.dim for placement in update.placements if isinstance(placement, Shard)}
        if split and max(split) < update.ndim - 2:
            part = orthogonalize(update.to_local(), dtype=self._dtype)
            return DTensor.from_local(
                part, update.device_mesh, update.placements, shape=update.shape, stride=update.stride()
            )
        whole = orthogonalize(update.full_tensor(), dtype=self._dtype)
        return distribute_tensor(whole, update.device_mesh, update.placements, src_data_rank=None)
