"""What the matrices of a run are multiplied in. Weights and optimizer state stay in fp32."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Literal

import torch

from modelworks.model.precision import fastest_precision
from modelworks.spec.errors import InputError


@dataclass(frozen=True)
class Precision:
    """A precision by its name in specs and its PyTorch type."""

    name: Literal["fp32", "bf16"]
    dtype: torch.dtype

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """The context in which the network's matrices are multiplied in this precision."""
        if self.name == "fp32":
            return contextlib.nullcontext()
        return torch.autocast("cpu", dtype=self.dtype)


FP32 = Precision("fp32", torch.float32)
BF16 = Precision("bf16", torch.bfloat16)


def resolve(stated: Literal["auto", "fp32", "bf16", "fp8"]) -> Precision:
    """The precision that a spec states, or the faster one of this machine.

    Raises
    ------
    InputError
        If it isn't to be had here.
    """
    if stated == "fp8":
        raise InputError("train.precision = 'fp8' is not accepted on this machine: auto, fp32 or bf16 is")
    dtype = {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16}[stated] or fastest_precision()
    return Precision("bf16" if dtype == torch.bfloat16 else "fp32", dtype)
