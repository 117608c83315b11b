"""Activation recomputation: a block's forward pass is made again when its backward pass needs what it didn't keep.

Chen et al. 2016, arXiv:1604.06174. With ``full`` only each block's input is kept, for one more forward pass of the
blocks. What Korthikanti et al. 2022 (arXiv:2205.05198) call selective, to compute attention's scores again, the network
does by itself: neither of its attention kernels keeps them.
"""

from __future__ import annotations

from functools import partial

from torch.utils.checkpoint import checkpoint

from modelworks.model.decoder import Decoder


def recompute_blocks(decoder: Decoder) -> None:
    """Let every block keep its input alone; in place, before anything is put around the blocks."""
    for block in decoder.blocks:
        # Nothing in a block is drawn at random, so no state of a generator is kept with it.
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
