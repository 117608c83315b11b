"""`torch.compile` where it is wanted, and a run that goes on without it where it fails.

Each block is compiled by itself: they are alike, so the first one's compilation serves them all.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from modelworks.model.decoder import Decoder

logger = logging.getLogger(__name__)


def wanted(stated: bool | Literal["auto"], device: torch.device) -> bool:
    """Whether to compile: as stated, and by itself on a GPU only.

    On a CPU the blocks' time is in matrix multiplications that a compiler leaves as they are, and a compilation takes
    as long as hundreds of small steps.
    """
    if stated == "auto":
        return device.type == "cuda"
    if stated and device.type == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
        logger.warning("train.compile = true: there is no C++ compiler here (g++); going on without")
        return False
    return stated


def try_compile(decoder: Decoder, loss: Callable[[], Tensor]) -> bool:
    """Compile the blocks in place and prove it with one forward and backward pass.

    Parameters
    ----------
    decoder
        The network; it works as before where compilation fails.
    loss
        Computes a loss through the network; its gradients are thrown away.

    Returns
    -------
    bool
        Whether the blocks are compiled now.
    """
    try:
        for block in decoder.blocks:
            block.compile(dynamic=False)
        loss().backward()  # type: ignore[no-untyped-call]
    except Exception as error:  # noqa: BLE001 - a compiler may fail in any way, and none of them is the run's end
        logger.warning(
            "torch.compile failed (%s); going on without", str(error).splitlines()[0] if str(error) else error
        )
        for block in decoder.blocks:
            block._compiled_call_impl = None
        return False
    finally:
        decoder.zero_grad(set_to_none=True)
    return True
