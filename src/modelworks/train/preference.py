"""Preference training: the network learns to find chosen answers likelier, and rejected ones less, than it did before.

DPO (Rafailov et al. 2023, arXiv:2305.18290, eq. 7): an answer's reward is `beta` times the log-ratio of its probability
under the network to that under the reference, and the loss of a pair is that of a logistic regression on the margin
between its rewards. The reference is the same network with its adapter set aside, so it costs a forward pass and no
memory.

What the loop minimises and what is reported are sums over pairs, such that the mean over micro batches and processes is
that over the global batch's pairs, however many each has.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from modelworks.model import adapters
from modelworks.model.decoder import Decoder, Losses
from modelworks.spec.run import DpoSpec
from modelworks.train.batching import inputs_and_targets


@dataclass(frozen=True)
class Compared:
    """Pairs of answers under a network and the reference."""

    losses: Tensor
    """(N), of each pair."""
    figures: Tensor
    """Sums over the pairs, in fp64, that `report` reads."""
    of_routers: Losses


def compare(decoder: Decoder, sequences: Tensor, spec: DpoSpec) -> Compared:
    """What a network with an adapter makes of the pairs in sequences (B, 2, T + 1)."""
    found, losses = decoder.log_probabilities(*inputs_and_targets(sequences))
    # Compiled blocks are those with the adapter.
    with torch.no_grad(), adapters.set_aside(decoder), torch.compiler.set_stance("force_eager"):
        before, _ = decoder.log_probabilities(*inputs_and_targets(sequences))
    policy, counts = by_answer(found, sequences), by_answer(torch.ones_like(before), sequences)
    pair_losses, rewards = preference_losses(policy, by_answer(before, sequences), counts, spec)
    chosen, rejected = rewards.detach().double().unbind(1)
    # A tie is half right: before the first step all are.
    right = (chosen > rejected).double() + 0.5 * (chosen == rejected).double()
    parts = (torch.ones_like(chosen), pair_losses, chosen, rejected, right, -policy[:, 0], counts[:, 0])
    return Compared(pair_losses, torch.stack([part.detach().double().sum() for part in parts]), losses)


def preference_losses(policy: Tensor, reference: Tensor, counts: Tensor, spec: DpoSpec) -> tuple[Tensor, Tensor]:
    """The loss (N) and the rewards (N, 2) of pairs.

    Parameters
    ----------
    policy, reference
        (N, 2), log-probabilities of the chosen and the rejected answer.
    counts
        (N, 2), their tokens.
    spec
        Beta and the rest.
    """
    rewards = spec.beta * (policy - reference)
    margin = rewards[:, 0] - rewards[:, 1]
    wrong = spec.label_smoothing
    losses = -(1.0 - wrong) * F.logsigmoid(margin) - wrong * F.logsigmoid(-margin)
    return losses - spec.sft_weight * policy[:, 0] / counts[:, 0], rewards


def pairs(sequences: Tensor) -> int:
    """How many pairs sequences (B, 2, T + 1) hold."""
    return int((sequences[:, 1].amax(1) // 2).sum())


def by_answer(values: Tensor, sequences: Tensor) -> Tensor:
    """Sums (pairs, 2) over each answer of values (N) of the tokens that count, in order."""
    numbers = sequences[:, 1, 1:]  # (B, T)
    per_sequence = sequences[:, 1].amax(1) // 2 * 2
    first = per_sequence.cumsum(0) - per_sequence
    slots = (first.unsqueeze(1) + numbers - 1)[numbers > 0]
    return values.new_zeros(2 * pairs(sequences)).index_add(0, slots, values).view(-1, 2)


def report(figures: Tensor) -> dict[str, float]:
    """The means over the pairs that figures were summed over, by name."""
    count, loss, chosen, rejected, right, nats, tokens = figures.tolist()
    count, tokens = max(count, 1e-12), max(tokens, 1e-12)
    return {
        "loss": loss / count,
        "cross_entropy": nats / tokens,
        "chosen_reward": chosen / count,
        "rejected_reward": rejected / count,
        "reward_margin": (chosen - rejected) / count,
        "preference_accuracy": right / count,
    }
