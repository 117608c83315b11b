"""Which optimizer moves which parameter, and their state as plain tensors by name.

With ``adamw`` one fused AdamW moves all. With ``muon`` the matrices of the blocks go to Muon and the rest (embedding,
head, router, normalisations, biases) to AdamW. Weight decay falls on matrices only. The schedule's factor multiplies
every group's peak, so that nothing about the schedule needs to be stored.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from modelworks.spec.run import TrainSpec
from modelworks.train.muon import Muon


class Optimizers:
    """The optimizers of a network, moved together.

    Parameters
    ----------
    network
        Its parameters are told apart by name and dimensions.
    spec
        Names the optimizer, the peaks and the decay.
    muon_dtype
        What Muon's iteration multiplies in.
    """

    def __init__(self, network: nn.Module, spec: TrainSpec, muon_dtype: torch.dtype = torch.float32) -> None:
        self._names: dict[Tensor, str] = {parameter: name for name, parameter in network.named_parameters()}
        matrices = [p for name, p in network.named_parameters() if spec.optimizer == "muon" and _is_muons(name, p)]
        moved = set(matrices)
        rest = [parameter for parameter in network.parameters() if parameter not in moved]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in rest if p.ndim >= 2], "weight_decay": spec.weight_decay},
            {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
        ]
        self._all: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(
                [group for group in groups if group["params"]],
                lr=spec.learning_rate,
                betas=(spec.beta1, spec.beta2),
                eps=spec.epsilon,
                fused=True,
            )
        ]
        if matrices:
            peak, decay = spec.matrix_learning_rate, spec.weight_decay
            self._all.append(Muon(matrices, lr=peak, weight_decay=decay, dtype=muon_dtype))
        self._groups = [(group, group["lr"]) for optimizer in self._all for group in optimizer.param_groups]

    def step(self, factor: float) -> None:
        """Move every parameter by its gradient, at `factor` of the peak learning rates."""
        for group, peak in self._groups:
            group["lr"] = peak * factor
        for optimizer in self._all:
            optimizer.step()

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for optimizer in self._all:
            optimizer.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """The state as tensors, by ``parameter's name / what it is``; the tensors are the optimizers' own."""
        return {
            f"{self._names[parameter]}/{kind}": value
            for optimizer in self._all
            for parameter, kinds in optimizer.state.items()
            for kind, value in kinds.items()
        }

    def prepare_state(self) -> dict[str, Tensor]:
        """The state that these optimizers have after a step, zeroed, for a checkpoint to be read into."""
        for parameter in self._names:
            parameter.grad = torch.zeros_like(parameter)
        # A step with zero learning rate creates every optimizer's state and moves nothing.
        self.step(0.0)
        self.zero_grad()
        return self.state()


def _is_muons(name: str, parameter: Tensor) -> bool:
    return name.startswith("blocks.") and parameter.ndim >= 2 and "router" not in name
