"""`torch.compile` where it is wanted, and a run that goes on without it where it fails.

Each block is compiled by itself: they are alike, so the first one's compilation serves them all.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
from collections.abc import Callable
from typing import Literal

import torch

from modelworks.model.decoder import Decoder
from modelworks.train.ranks import Ranks

logger = logging.getLogger(__name__)
THREAD_FLOPS = 1e11
"""About what a CPU's thread does per second in fp32 with AVX-512; a guess on a run's length needs no more."""
WORTHWHILE_S = 900.0
"""A run that is expected to be shorter isn't compiled by itself: it wins less than a tenth of this."""


def wanted(stated: bool | Literal["auto"], device: torch.device, flop: float, max_time_s: float | None) -> bool:
    """Whether to compile: as stated, and by itself where the run is long enough to win its compilation back.

    On a GPU it always is. On a CPU compiled blocks take some tenth off a step (norms, rotations and activations in one
    pass over memory each; the matmuls stay what they are) and their compilation half a minute to a minute. The rule
    looks at the spec and the number of threads alone, so that a resumed run decides as it did before.

    Parameters
    ----------
    stated
        ``train.compile``.
    device
        What the network is on.
    flop
        Of the whole training.
    max_time_s
        ``train.max_time``, where there is one.
    """
    if device.type == "cuda":
        return stated is not False
    if stated == "auto":
        expected_s = flop / (torch.get_num_threads() * THREAD_FLOPS)
        stated = min(expected_s, math.inf if max_time_s is None else max_time_s) >= WORTHWHILE_S
    if stated and shutil.which(os.environ.get("CXX", "g++")) is None:
        logger.warning("train.compile: there is no C++ compiler here (g++); going on without")
        return False
    return stated


def try_compile(decoder: Decoder, backward: Callable[[], object], ranks: Ranks | None = None) -> bool:
    """Compile the blocks in place and prove it with one forward and backward pass.

    Parameters
    ----------
    decoder
        The network; it works as before where compilation fails.
    backward
        Makes the passes through the network; the gradients are thrown away.
    ranks
        The processes that do so together: all go on without where it fails on one.

    Returns
    -------
    bool
        Whether the blocks are compiled now.
    """
    compiled = True
    try:
        for block in decoder.blocks:
            block.compile(dynamic=False)
        backward()
    except Exception as error:  # noqa: BLE001 - a compiler may fail in any way, and none of them is the run's end
        reason = str(error).split("\n\n")[0].replace("\n", " ")  # what follows the first paragraph is advice
        logger.warning("torch.compile failed (%s); going on without", reason or type(error).__name__)
        compiled = False
    finally:
        decoder.zero_grad(set_to_none=True)
    if (ranks or Ranks()).largest(int(not compiled)):
        for block in decoder.blocks:
            block._compiled_call_impl = None
        return False
    return True
