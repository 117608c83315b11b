"""What the matrices of a run are multiplied in. Weights stay in fp32, and so does the optimizer's state unless
`train.optimizer_state` says otherwise."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Literal

import torch

from modelworks.model.precision import fastest_precision
from modelworks.spec.errors import InputError

FP8_CAPABILITY = (8, 9)
"""The compute capability from which on NVIDIA's tensor cores multiply fp8 (Ada, Hopper)."""


@dataclass(frozen=True)
class Precision:
    """A precision by its name in specs, and the PyTorch type of activations and of gathered matrices."""

    name: Literal["fp32", "bf16", "fp8"]
    dtype: torch.dtype

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """The context in which the network's matrices are multiplied in this precision."""
        if self.name == "fp32":
            return contextlib.nullcontext()
        return torch.autocast("cpu", dtype=self.dtype)


FP32 = Precision("fp32", torch.float32)
BF16 = Precision("bf16", torch.bfloat16)
FP8 = Precision("fp8", torch.bfloat16)
PRECISIONS = (FP32, BF16, FP8)


def resolve(stated: Literal["auto", "fp32", "bf16", "fp8"], device: torch.device | None = None) -> Precision:
    """The precision that a spec states, or the faster one of this machine.

    Parameters
    ----------
    device
        What the network is on; a processor if unset.

    Raises
    ------
    InputError
        If it isn't to be had here.
    """
    if stated == "fp8":
        if device is None or device.type != "cuda":
            raise InputError(
                "train.precision = 'fp8' is not accepted on this machine, which trains on its processor: auto, fp32 or "
                "bf16 is; fp8 takes a GPU of compute capability 8.9 or above"
            )
        capability = torch.cuda.get_device_capability(device)
        if capability < FP8_CAPABILITY:
            raise InputError(
                f"train.precision = 'fp8' is not accepted on this GPU, whose compute capability is {capability[0]}."
                f"{capability[1]}: auto, fp32 or bf16 is; fp8 takes 8.9 or above"
            )
        return FP8
    if stated == "auto":
        return BF16 if fastest_precision() == torch.bfloat16 else FP32
    return BF16 if stated == "bf16" else FP32
