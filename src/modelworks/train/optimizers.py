"""Which optimizer moves which parameter, and their state as plain tensors by name.

With ``adamw`` one fused AdamW moves all. With ``muon`` the matrices of the blocks (a vision tower's too) go to Muon and
the rest (embedding, head, router, normalisations, biases) to AdamW. Weight decay falls on matrices only. The schedule's
factor multiplies every group's peak, so that nothing about the schedule needs to be stored. With ``optimizer_state =
"bf16"`` moments take half the bytes (`rounding`); weights stay in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from modelworks.spec.run import TrainSpec
from modelworks.train.adamw import LowAdamW
from modelworks.train.muon import Muon
from modelworks.train.rounding import Part


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
    whole
        From a parameter's name and what this process holds of a tensor like it to the whole tensor, where parameters
        are split over processes.
    """

    def __init__(
        self,
        network: nn.Module,
        spec: TrainSpec,
        muon_dtype: torch.dtype = torch.float32,
        whole: Callable[[str, Tensor], Tensor] = lambda name, part: part,
    ) -> None:
        self._whole = whole
        trained = [(name, parameter) for name, parameter in network.named_parameters() if parameter.requires_grad]
        self._names: dict[Tensor, str] = {parameter: name for name, parameter in trained}
        matrices = [p for name, p in trained if spec.optimizer == "muon" and _is_muons(name, p)]
        moved = set(matrices)
        rest = [parameter for _, parameter in trained if parameter not in moved]
        groups: list[dict[str, Any]] = []
        for peak, of_peak in self._by_peak(rest, spec):
            groups += [
                {"params": [p for p in of_peak if p.ndim >= 2], "weight_decay": spec.weight_decay, "lr": peak},
                {"params": [p for p in of_peak if p.ndim < 2], "weight_decay": 0.0, "lr": peak},
            ]
        rounded = spec.optimizer_state == "bf16"
        adamw: dict[str, Any] = {
            "lr": spec.learning_rate,
            "betas": (spec.beta1, spec.beta2),
            "eps": spec.epsilon,
        }
        self._all: list[torch.optim.Optimizer] = [
            LowAdamW(groups, **adamw, part_of=self._part_of, seed=spec.seed)
            if rounded
            else torch.optim.AdamW(
                [part for group in groups for part in _by_mesh(group)],
                **adamw,
                fused=not any(parameter.is_meta for parameter in rest),
            )
        ]
        if matrices:
            peak, decay = spec.matrix_learning_rate, spec.weight_decay
            muon = Muon(matrices, lr=peak, weight_decay=decay, dtype=muon_dtype)
            muon.whole = lambda parameter, part: whole(self._names[parameter], part)
            if rounded:
                muon.rounded, muon.seed = self._part_of, spec.seed
            self._all.append(muon)
        self._groups = [(group, group["lr"]) for optimizer in self._all for group in optimizer.param_groups]

    def step(self, factor: float, number: int = 0) -> None:
        """Move every parameter by its gradient, at `factor` of the peak learning rates, in step `number` of the run."""
        for group, peak in self._groups:
            group["lr"] = peak * factor
        for optimizer in self._all:
            if isinstance(optimizer, (LowAdamW, Muon)):
                optimizer.now = number
            optimizer.step()

    def _by_peak(self, parameters: Sequence[Tensor], spec: TrainSpec) -> list[tuple[float, list[Tensor]]]:
        """Parameters by their peak learning rate: the vision tower's, where it has one of its own, and the others'."""
        tower = {p for p in parameters if spec.tower_learning_rate and self._names[p].startswith("eyes.tower.")}
        found = [(spec.learning_rate, [p for p in parameters if p not in tower])]
        if spec.tower_learning_rate and tower:
            found.append((spec.tower_learning_rate, [p for p in parameters if p in tower]))
        return found

    def _part_of(self, parameter: Tensor) -> Part:
        """Which part of which tensor this process holds of a parameter."""
        name = self._names[parameter]
        whole = self._whole(name, parameter)
        if not isinstance(whole, DTensor):
            return Part(name, whole.shape, (0,) * whole.ndim)
        _, start = compute_local_shape_and_global_offset(whole.shape, whole.device_mesh, whole.placements)
        return Part(name, whole.shape, start)

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for optimizer in self._all:
            optimizer.zero_grad(set_to_none=True)

    def state(self, whole: Callable[[str, Tensor], Tensor] | None = None) -> dict[str, Tensor]:
        """The state as tensors, by ``parameter's name / what it is``; the tensors are the optimizers' own, and whole
        ones, or what `whole` makes of them."""
        whole = whole or self._whole
        return {
            f"{self._names[parameter]}/{kind}": whole(self._names[parameter], value)
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


def _by_mesh(group: dict[str, Any]) -> list[dict[str, Any]]:
    """A group as several whose parameters are split over the same processes, since one fused step takes such alone."""
    parts: dict[object, list[Tensor]] = {}
    for parameter in group["params"]:
        parts.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter)
    return [{**group, "params": parameters} for parameters in parts.values()]


def _is_muons(name: str, parameter: Tensor) -> bool:
    return name.startswith(("blocks.", "eyes.tower.blocks.")) and parameter.ndim >= 2 and "router" not in name
