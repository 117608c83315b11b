"""AdamW whose two moments are kept in bf16, over fp32 weights (Loshchilov & Hutter, arXiv:1711.05101).

Where the moments are kept in fp32, PyTorch's own is used. The update is made of the moments as they are before they
are rounded, a block of rows at a time, so that nothing in fp32 is kept beside them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from modelworks.train.parallelize import local
from modelworks.train.rounding import Part, keep, noise_of

_BLOCK = 1 << 18
"""Elements that are updated together, about."""


class LowAdamW(torch.optim.Optimizer):
    """AdamW with bf16 moments.

    Parameters
    ----------
    parameters
        Groups, as PyTorch's optimizers take them.
    part_of
        Which part of which tensor this process holds of a parameter.
    seed
        The run's.

    Attributes
    ----------
    now
        The run's step, from which the bits follow that rounding draws; to be set before each `step`.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        part_of: Callable[[Tensor], Part],
        seed: int,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._part_of, self._seed, self.now = part_of, seed, 0

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

    def _update(self, parameter: Tensor, to_parameter: Tensor, group: dict[str, Any]) -> None:
        weight, gradient = local(parameter), local(to_parameter)
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=weight.device)
            state["exp_avg"] = torch.zeros_like(weight, dtype=torch.bfloat16)
            state["exp_avg_sq"] = torch.zeros_like(weight, dtype=torch.bfloat16)
        state["step"] += 1
        if weight.is_meta or weight.numel() == 0:
            return
        count, (beta1, beta2), lr = int(state["step"]), group["betas"], group["lr"]
        size, deviation = lr / (1.0 - beta1**count), math.sqrt(1.0 - beta2**count)
        part = self._part_of(parameter)
        noises = [
            noise_of(replace(part, name=f"{part.name}/{kind}"), weight, self._seed, self.now)
            for kind in ("exp_avg", "exp_avg_sq")
        ]
        rows = max(1, _BLOCK * len(weight) // weight.numel())
        for start in range(0, len(weight), rows):
            here = slice(start, start + rows)
            above = gradient[here]
            first = state["exp_avg"][here].float().lerp_(above, 1.0 - beta1)
            second = state["exp_avg_sq"][here].float().mul_(beta2).addcmul_(above, above, value=1.0 - beta2)
            denominator = second.sqrt().div_(deviation).add_(group["eps"])
            weight[here].mul_(1.0 - lr * group["weight_decay"]).addcdiv_(first, denominator, value=-size)
            for kind, moment, noise in zip(("exp_avg", "exp_avg_sq"), (first, second), noises, strict=True):
                keep(state[kind][here], moment, [noise[0][here], *noise[1:]])
