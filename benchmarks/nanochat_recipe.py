"""A dense GPT of nanochat's recipe, written from its facts: the baseline of `time_to_quality.py`.

The network (nanochat/gpt.py as first released, October 2025): width 64 times depth, heads of 128, rotary positions,
RMSNorm without parameters before each part, after the embedding and on queries and keys, a squared-ReLU feed-forward
network four times as wide, no biases, an untied head, logits capped at 15; matrices that write to the residual stream
and the head begin at zero. The optimizers (scripts/base_train.py): Muon at 0.02 for the blocks' matrices, with a
momentum that goes from 0.85 to 0.95 over 300 steps; AdamW (0.8, 0.95) at 0.2 for the embedding and 0.004 for the head,
both times (width / 768) ** -0.5; gradients clipped at 1; no warmup, constant, then linearly to zero over the last
fifth.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEAD_DIM = 128
LOGIT_CAP = 15.0
WARMDOWN = 0.2
MATRIX_RATE, EMBEDDING_RATE, HEAD_RATE = 0.02, 0.2, 0.004
Clock = Callable[[], float]


@dataclass(frozen=True)
class Trained:
    """How far a training came in its budget."""

    steps: int
    tokens: int
    seconds: float


class Attention(nn.Module):
    """Causal attention with rotary positions and normalised queries and keys: (B, T, H) in and out."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key, self.value, self.output = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        shape = (*x.shape[:2], -1, HEAD_DIM)
        query, key, value = (matrix(x).view(shape).transpose(1, 2) for matrix in (self.query, self.key, self.value))
        query, key = (norm(turn(heads, cosine, sine)) for heads in (query, key))
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.output(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """One layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = Attention(width)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        x = x + self.attention(norm(x), cosine, sine)
        return x + self.down(F.relu(self.up(norm(x))).square())


class GPT(nn.Module):
    """The network; forward gives the mean cross-entropy (nats) of sequences (B, T + 1)."""

    def __init__(self, depth: int, vocab: int, seq_len: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        width = 64 * depth
        self.width = width
        self.embedding = nn.Embedding(vocab, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.head = nn.Linear(width, vocab, bias=False)
        frequencies = 10_000.0 ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
        angles = torch.outer(torch.arange(seq_len), frequencies)
        self.register_buffer("cosine", angles.cos())
        self.register_buffer("sine", angles.sin())
        self.initialize()

    @torch.no_grad()
    def initialize(self) -> None:
        """Zero where the residual stream and the logits are written, else normal by fan-in and fan-out."""
        self.embedding.weight.normal_()
        self.head.weight.zero_()
        for name, weight in self.blocks.named_parameters():
            if "output" in name or "down" in name:
                weight.zero_()
            else:
                rows, columns = weight.shape
                weight.normal_(0.0, columns**-0.5 * min(1.0, (rows / columns) ** 0.5))

    def forward(self, sequences: Tensor) -> Tensor:
        x = norm(self.embedding(sequences[:, :-1]))
        for block in self.blocks:
            x = block(x, self.cosine, self.sine)
        logits = self.head(norm(x)).float()
        logits = LOGIT_CAP * torch.tanh(logits / LOGIT_CAP)
        return F.cross_entropy(logits.flatten(0, 1), sequences[:, 1:].flatten())


def norm(x: Tensor) -> Tensor:
    """RMSNorm without parameters."""
    return F.rms_norm(x, x.shape[-1:])


def turn(heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotate the pairs (i, i + D / 2) of heads (B, heads, T, D) by their positions."""
    first, second = heads.chunk(2, dim=-1)
    return torch.cat((first * cosine + second * sine, second * cosine - first * sine), dim=-1).to(heads.dtype)


class Muon:
    """Momentum, orthogonalised by five Newton-Schulz steps (Jordan et al. 2024), for 2-D weights."""

    def __init__(self, weights: list[Tensor], dtype: torch.dtype) -> None:
        self.weights, self.dtype = weights, dtype
        self.momenta = [torch.zeros_like(weight) for weight in weights]
        self.steps = 0

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Move the weights."""
        beta = 0.85 + 0.1 * min(1.0, self.steps / 300)
        self.steps += 1
        for weight, momentum in zip(self.weights, self.momenta, strict=True):
            assert weight.grad is not None
            momentum.lerp_(weight.grad, 1 - beta)
            direction = orthogonalised(weight.grad.lerp(momentum, beta).to(self.dtype))
            weight.add_(direction, alpha=-rate * max(1.0, weight.shape[0] / weight.shape[1]) ** 0.5)


def orthogonalised(matrix: Tensor) -> Tensor:
    """About the nearest orthogonal matrix, by the quintic iteration with coefficients 3.4445, -4.7750, 2.0315."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.mT if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x


def factor(progress: float) -> float:
    """The learning rates as a factor of their peaks, for a progress from 0 to 1."""
    return min(1.0, max(0.0, 1.0 - progress) / WARMDOWN)


def train(
    network: GPT,
    loss: Callable[[Tensor], Tensor],
    batches: Iterator[Tensor],
    budget_s: float,
    dtype: torch.dtype,
    clock: Clock = time.perf_counter,
) -> Trained:
    """Train for a time budget, the schedule fitted to it.

    Parameters
    ----------
    network
        Holds the weights.
    loss
        The network, or its compiled form.
    batches
        Sequences (B, T + 1) without end; taking one is not counted, as reading ahead would hide it.
    budget_s
        Seconds of training by `clock`.
    dtype
        What matrices are multiplied in.
    """
    scale = (network.width / 768) ** -0.5
    muon = Muon(list(network.blocks.parameters()), dtype)
    groups = [(network.embedding.weight, EMBEDDING_RATE * scale), (network.head.weight, HEAD_RATE * scale)]
    adam = torch.optim.AdamW(
        [{"params": [weight], "lr": rate} for weight, rate in groups],
        betas=(0.8, 0.95),
        eps=1e-10,
        weight_decay=0.0,
        fused=True,
    )
    spent, steps, tokens = 0.0, 0, 0
    while spent < budget_s:
        batch = next(batches)
        begun = clock()
        with multiplied_in(dtype):
            loss(batch).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        now = factor(spent / budget_s)
        for group, (_, rate) in zip(adam.param_groups, groups, strict=True):
            group["lr"] = rate * now
        adam.step()
        muon.step(MATRIX_RATE * now)
        network.zero_grad(set_to_none=True)
        spent += clock() - begun
        steps, tokens = steps + 1, tokens + batch[:, 1:].numel()
    return Trained(steps, tokens, spent)


def multiplied_in(dtype: torch.dtype) -> AbstractContextManager[object]:
    """The context in which matrices are multiplied in `dtype`."""
    return nullcontext() if dtype == torch.float32 else torch.autocast("cpu", dtype=dtype)
