"""How many sequences go through the network at once.

A global batch is made of equal micro batches whose gradients are added. More at once is faster until the processor is
busy, and then only takes memory: on a CPU a few thousand tokens are enough.
"""

from __future__ import annotations

from typing import NamedTuple

import psutil
import torch
from torch import Tensor

from modelworks.data.lessons import DrawnPictures, SeeingDataset
from modelworks.data.packed import PackedDataset, Split
from modelworks.model.attention import KEY_BLOCK, QUERY_BLOCK
from modelworks.model.loss import IGNORED
from modelworks.spec.errors import InputError
from modelworks.spec.model import ModelSpec
from modelworks.spec.run import RunSpec
from modelworks.train.layout import Layout

CPU_TOKENS = 8192
"""Tokens per forward pass beyond which a CPU gets no faster."""
_MEMORY_SHARE = 0.5
"""How much of the free memory activations may take; the rest is for what else the machine does."""
_MOMENT_BYTES = {"fp32": 4, "bf16": 2}
"""Of each of AdamW's two moments."""


def activation_bytes(model: ModelSpec, seq_len: int) -> int:
    """About how much a sequence's forward pass keeps for its backward pass, in fp32.

    Per token and layer: the residual stream and its normalised copies, queries, keys, values and the attention's
    output, and each feed-forward matrix's input and output. Attention keeps no matrix of logits; in the backward pass
    three blocks of it stand in memory at a time.
    """
    width = model.heads * model.head_dim
    ffn = model.moe.top_k * model.moe.expert_hidden if model.moe else model.ffn_hidden
    per_token = 8 * model.hidden + 4 * width + 4 * model.kv_heads * model.head_dim + 4 * ffn
    blocks = 3 * model.heads * min(QUERY_BLOCK, seq_len) * min(KEY_BLOCK, seq_len)
    return 4 * (seq_len * model.layers * per_token + blocks)


class Seen(NamedTuple):
    """Sequences of conversations about pictures."""

    sequences: Tensor
    """(B, 2, T + 1): tokens, and which of them are learnt."""
    tiles: list[Tensor]
    """Of each sequence (N, 3, image_size, image_size), in the order of its pictures."""
    signs: list[Tensor]
    """Of each sequence (N, tokens of a tile), what is written in each square, if that is learnt; see
    `DrawnPictures.signs`."""


Batch = Tensor | Seen
"""Sequences, with what is to be seen in them."""


def take(
    data: PackedDataset, split: Split, position: int, count: int, seq_len: int, seed: int, signs: bool = False
) -> Batch:
    """The next sequences of a run; see `PackedDataset.sequences`. With `signs`, what is written in them, too."""
    if not isinstance(data, SeeingDataset):
        return torch.from_numpy(data.sequences(split, position, count, seq_len, seed))
    tiles, sequences, written = [], [], []
    for item in data.items(split, position, count, seq_len, seed):
        sequences.append(torch.from_numpy(data.sequence(split, int(item), seq_len)))
        tiles.append(data.tiles(split, int(item), seq_len))
        if signs:
            assert isinstance(data, DrawnPictures)
            written.append(data.signs(split, int(item), seq_len))
    return Seen(torch.stack(sequences), tiles, written)


def micro_batches(batch: Batch, size: int) -> list[Batch]:
    """A batch in parts of `size` sequences."""
    if isinstance(batch, Tensor):
        return list(torch.split(batch, size))
    return [
        Seen(part, *(of_each[place * size : (place + 1) * size] for of_each in batch[1:]))
        for place, part in enumerate(torch.split(batch.sequences, size))
    ]


def inputs_and_targets(sequences: Tensor) -> tuple[Tensor, Tensor]:
    """What the network reads (B, T), and the token that follows each, or `IGNORED`.

    Parameters
    ----------
    sequences
        Of text (B, T + 1), every token of which is learnt; or of dialogues (B, 2, T + 1) with what is learnt marked by
        a number above 0.
    """
    if sequences.dim() == 2:
        return sequences[:, :-1], sequences[:, 1:]
    tokens, learnt = sequences.unbind(1)
    return tokens[:, :-1], torch.where(learnt[:, 1:] > 0, tokens[:, 1:], IGNORED)


def targets(batch: Batch) -> int:
    """How many tokens are learnt from sequences."""
    sequences = batch if isinstance(batch, Tensor) else batch.sequences
    return sequences[:, 1:].numel() if sequences.dim() == 2 else int((sequences[:, 1, 1:] > 0).sum())


def micro_batch(spec: RunSpec, layout: Layout | None = None) -> int:
    """Sequences per forward pass: what the spec states, else the largest divisor of a process's share that fits.

    A pipeline's stages are kept at work: they get a micro batch each, or rounds of that. The processes of a layout
    share this machine's memory; state is counted once for each copy of the weights.

    Raises
    ------
    InputError
        If the network's weights, gradients and optimizer alone are more than this machine's memory.
    """
    memory, layout = psutil.virtual_memory(), layout or Layout()
    held = spec.model.parameters.total * layout.replicas
    staged = (4 + 2 * _MOMENT_BYTES[spec.train.optimizer_state]) * held  # what an asynchronous checkpoint copies
    state = 4 * held + staged  # the gradients
    if state > memory.total:
        raise InputError(
            f"model {spec.model.name!r} takes {state / 2**30:.0f} GiB to train (weights, gradients and optimizer) and "
            f"this machine has {memory.total / 2**30:.0f} GiB; a smaller model is accepted"
        )
    if spec.train.micro_batch != "auto":
        return spec.train.micro_batch
    if spec.checkpoint.asynchronous:
        state += staged
    room = max(0, memory.available - state) * _MEMORY_SHARE / layout.processes
    fitting = min(CPU_TOKENS // spec.train.seq_len, int(room // activation_bytes(spec.model, spec.train.seq_len)))
    whole = spec.train.global_batch // layout.data
    return max(
        size
        for size in range(1, whole + 1)
        if whole % size == 0 and size <= max(1, fitting) and layout.fills_pipeline(whole // size)
    )
