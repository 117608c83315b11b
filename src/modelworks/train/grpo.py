"""Reinforcement with checkable answers: the network replies, and replies that are worth more become likelier.

GRPO (Shao et al. 2024, DeepSeekMath, arXiv:2402.03300, section 4.1): several replies to a prompt are each other's
measure, so that no network has to judge them. A reply's advantage is its reward less its group's mean, over the
group's standard deviation; each of its tokens is learnt with it, by the clipped ratio of its probability to what it was
when it was drawn. A group whose replies are all worth the same says nothing, and moves nothing.

Who draws (`rollouts`) may round the weights, or multiply in another order: what a token's probability was is reckoned
by the network in training, with the weights that it was drawn with. The draws are then a little off the policy; by how
much is logged as `drawn_difference`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import torch
from tokenizers import Tokenizer
from torch import Tensor

from modelworks.data.packed import Split
from modelworks.data.tasks import Task, TaskDataset
from modelworks.model import adapters
from modelworks.model.decoder import Losses
from modelworks.spec.errors import OperationError
from modelworks.spec.home import write_atomically
from modelworks.spec.reinforcement import GrpoSpec
from modelworks.train.batching import inputs_and_targets
from modelworks.train.objectives import Learning, Objective
from modelworks.train.rewards import refuse_without_sandbox, values_of
from modelworks.train.rollouts import OwnSampler, Reply, Sampler, Sampling

FOLDER = "rollouts"
_KEPT_STEPS = 50
_KEPT_GROUPS = 4
"""Of how many of the last steps, and how many groups of each, replies are kept to be read."""
_NO_DIFFERENCE = 1e-6
"""Below it, a standard deviation of rewards is that of rounding."""


def advantages(rewards: Tensor, divide: bool) -> Tensor:
    """How much more than its group's mean each reply is worth.

    Parameters
    ----------
    rewards
        (prompts, group)
    divide
        By the group's standard deviation (DeepSeekMath, section 4.1.2), or not (Dr. GRPO, arXiv:2503.20783, eq. 3).

    Returns
    -------
    Tensor
        (prompts, group); 0 for all replies of a group that are worth the same.
    """
    centred = rewards - rewards.mean(1, keepdim=True)
    deviation = rewards.std(1, keepdim=True, correction=0)
    scaled = centred / deviation if divide else centred
    return torch.where(deviation > _NO_DIFFERENCE, scaled, torch.zeros_like(scaled))


def token_losses(
    now: Tensor, before: Tensor, advantage: Tensor, spec: GrpoSpec, reference: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of each token (DeepSeekMath, eq. 3), whether its ratio was clipped, and its divergence.

    Parameters
    ----------
    now, before, reference
        (N), log-probabilities under the network, under the one that drew them, and under the reference. The divergence
        from the latter is ``r - log r - 1`` with r the ratio of the reference's probability to the network's (eq. 4).
    advantage
        (N), of each token's reply.
    spec
        The bounds, and the divergence's weight.
    """
    ratio = (now - before).exp()
    bounded = ratio.clamp(1.0 - spec.clip_low, 1.0 + spec.clip_high)
    gains, clipped_gains = ratio * advantage, bounded * advantage
    losses, divergence = -torch.minimum(gains, clipped_gains), torch.zeros_like(now)
    if reference is not None:
        divergence = (reference - now).exp() - (reference - now) - 1.0
        losses = losses + spec.kl * divergence
    return losses, clipped_gains < gains, divergence


def weights_of(lengths: Tensor, spec: GrpoSpec) -> Tensor:
    """What the loss of each token of replies of so many tokens (B) is multiplied with to be a mean (B)."""
    if spec.mean_over == "replies":
        return 1.0 / (len(lengths) * lengths.clamp(min=1))
    if spec.mean_over == "tokens":
        return torch.full_like(lengths, 1.0 / float(lengths.sum().clamp(min=1)))
    return torch.full_like(lengths, 1.0 / (len(lengths) * spec.max_new_tokens))


@dataclass(frozen=True)
class Part:
    """A micro batch of replies. What is of tokens (N) is in the order of those that count."""

    sequences: Tensor
    """(B, 2, T + 1): the tokens of prompt and reply, and 1 for the reply's."""
    advantages: Tensor
    """(B)"""
    weights: Tensor
    """(B), of each of a reply's tokens in the mean; 0 where they aren't certain to be those that were drawn."""
    drawn: Tensor
    """(N), log-probabilities as the one who drew the tokens had them; NaN where they aren't known."""
    before: Tensor | None = None
    """(N), as the network had them then; None where it is the same still."""
    reference: Tensor | None = None

    def by_token(self, of_replies: Tensor) -> Tensor:
        """What is of replies (B), for each of their tokens (N)."""
        return of_replies.repeat_interleave(self.sequences[:, 1, 1:].sum(1))


class GroupRelative(Objective):
    """The network's replies to a step's tasks, and GRPO's loss on them, which stands where the cross-entropy does."""

    def __init__(self, learning: Learning, sampler: Sampler | None = None) -> None:
        super().__init__(learning)
        assert isinstance(learning.data, TaskDataset)
        self._data, self._spec, self._grpo = learning.data, learning.spec, learning.spec.grpo
        self._words = Tokenizer.from_file(str(self._data.tokenizer_file))
        self._sampler = sampler or OwnSampler(learning.precision)
        self._longest = self._spec.train.seq_len - self._grpo.max_new_tokens
        self.updates = self._grpo.updates
        # Forward passes to draw, and where they are wanted of the reference and before the first update.
        forward = 1 + (self._grpo.kl > 0) + (self.updates > 1)
        self.flop_share = self.updates * (2 / 3 if learning.frozen else 1.0) + forward / 3
        self._figures: list[Tensor] = []
        self._of_step: dict[str, float] = {}
        if self._data.has_tests:
            refuse_without_sandbox()

    def batch(self, place: int) -> list[Part]:
        """Replies to the tasks at a place, worth something, as micro batches."""
        train, grpo = self._spec.train, self._grpo
        groups = train.global_batch // grpo.group
        tasks = self._data.tasks("train", place // grpo.group, groups, self._longest, train.seed)
        asked = [task for task in tasks for _ in range(grpo.group)]
        replies = self._drawn(asked, grpo.temperature, place)
        found = values_of(asked, [self._text(reply) for reply in replies], self._spec.rewards)
        rewards = torch.tensor([values["reward"] for values in found]).view(groups, grpo.group)
        self._figures, self._of_step = [], self._said(replies, found)
        self._of_step["groups_without_signal"] = float((rewards.std(1, correction=0) <= _NO_DIFFERENCE).float().mean())
        self._of_step["uncertain_replies"] = fmean(not reply.certain for reply in replies)
        self._keep(place // train.global_batch + 1, asked, replies, found)
        return self._parts(asked, replies, advantages(rewards, grpo.divide_by_deviation).flatten())

    def parts(self, batch: list[Part]) -> list[Part]:
        """See `Objective.parts`."""
        return batch

    def losses(self, part: Part) -> Losses:
        """The losses, whose mean over the micro batches is that over the step's replies."""
        now, losses = self._likelihoods(part)
        before = now.detach() if part.before is None else part.before
        of_tokens, clipped, divergence = token_losses(
            now, before, part.by_token(part.advantages), self._grpo, part.reference
        )
        known = ~part.drawn.isnan()
        figures = (torch.ones_like(now), -now, clipped, divergence, known, (before - part.drawn).abs().nan_to_num())
        self._figures.append(torch.stack([figure.detach().double().sum() for figure in figures]))
        parts = self._spec.train.global_batch / len(part.sequences)
        return losses._replace(cross_entropy=(of_tokens * part.by_token(part.weights)).sum() * parts)

    def report(self) -> dict[str, float]:
        """Rewards and lengths of the step's replies, and means over their tokens in all updates."""
        count, nats, clipped, divergence, known, difference = torch.stack(self._figures).sum(0).tolist()
        found = self._of_step | {"cross_entropy": nats / count, "clip_share": clipped / count}
        if self._grpo.kl:
            found["kl"] = divergence / count
        if known and self._grpo.temperature == 1.0:
            found["drawn_difference"] = difference / known
        return found

    def validate(self) -> tuple[float | None, dict[str, float]]:
        """No bits per byte; rewards and lengths of the likeliest replies to held-out tasks."""
        train = self._spec.train
        held_out = len(self._data.fitting("validation", self._longest))
        count = min(held_out, max(1, train.validation_tokens // train.seq_len))
        if not count:
            return None, {}
        tasks = self._data.tasks("validation", 0, count, self._longest, 0)
        replies = self._drawn(tasks, 0.0, 0, "validation")
        found = values_of(tasks, [self._text(reply) for reply in replies], self._spec.rewards)
        return None, {f"validation_{name}": value for name, value in self._said(replies, found).items()}

    def _drawn(self, tasks: Sequence[Task], temperature: float, place: int, split: Split = "train") -> list[Reply]:
        """A reply to each task; its draws follow from the run's seed and its place."""
        sampling = Sampling(self._grpo.max_new_tokens, temperature, self._data.end)
        seeds = [_seed(f"{self._spec.train.seed}/{split}/{place + number}") for number in range(len(tasks))]
        self._decoder.eval()
        try:
            with torch.no_grad(), torch.compiler.set_stance("force_eager"):
                return self._sampler(self._decoder, [task.prompt for task in tasks], sampling, seeds)
        finally:
            self._decoder.train()

    def _parts(self, asked: Sequence[Task], replies: Sequence[Reply], advantage: Tensor) -> list[Part]:
        longest = max(len(task.prompt) + len(reply.tokens) for task, reply in zip(asked, replies, strict=True))
        sequences = torch.zeros(len(asked), 2, longest, dtype=torch.int64)
        sequences[:, 0] = self._data.separator
        for row, task, reply in zip(sequences, asked, replies, strict=True):
            begin, end = len(task.prompt), len(task.prompt) + len(reply.tokens)
            row[0, :end] = torch.tensor([*task.prompt, *reply.tokens])
            row[1, begin:end] = 1
        certain = torch.tensor([float(reply.certain) for reply in replies])
        weights = weights_of(sequences[:, 1].sum(1).float(), self._grpo) * certain
        parts = []
        for begin in range(0, len(asked), self._learning.micro_batch):
            here = slice(begin, begin + self._learning.micro_batch)
            drawn = [reply.log_probabilities or [math.nan] * len(reply.tokens) for reply in replies[here]]
            told = torch.tensor([value for values in drawn for value in values])
            part = Part(sequences[here], advantage[here], weights[here], told)
            parts.append(self._with_earlier(part))
        return parts

    @torch.no_grad()
    def _with_earlier(self, part: Part) -> Part:
        """A part with what its tokens' probabilities are before the updates, and under the reference."""
        with torch.compiler.set_stance("force_eager"):
            if self.updates > 1:
                part = replace(part, before=self._likelihoods(part)[0])
            if self._grpo.kl:
                with adapters.set_aside(self._decoder):
                    part = replace(part, reference=self._likelihoods(part)[0])
        return part

    def _likelihoods(self, part: Part) -> tuple[Tensor, Losses]:
        with self._learning.precision.autocast():
            return self._decoder.log_probabilities(*inputs_and_targets(part.sequences), self._grpo.temperature)

    def _text(self, reply: Reply) -> str:
        ended = reply.tokens[-1:] == [self._data.end]
        return str(self._words.decode(reply.tokens[:-1] if ended else reply.tokens, skip_special_tokens=False))

    def _said(self, replies: Sequence[Reply], found: Sequence[dict[str, float]]) -> dict[str, float]:
        """Means over replies: of what they are worth, of each value that they have, of their lengths."""
        names = dict.fromkeys(name for values in found for name in values if name != "reward")
        means = {f"reward_{name}": fmean(values[name] for values in found if name in values) for name in names}
        cut = fmean(reply.tokens[-1:] != [self._data.end] for reply in replies)
        length = fmean(len(reply.tokens) for reply in replies)
        return {
            "reward": fmean(values["reward"] for values in found),
            **means,
            "reply_tokens": length,
            "cut_replies": cut,
        }

    def _keep(
        self, number: int, asked: Sequence[Task], replies: Sequence[Reply], found: Sequence[dict[str, float]]
    ) -> None:
        """Write the first groups of a step's replies, a line of JSON each, where people read them; older ones go."""
        folder = self._learning.folder / FOLDER
        lines = [
            json.dumps({"asked": task.asked.messages, "reply": self._text(reply), "expected": task.answer} | values)
            for task, reply, values in list(zip(asked, replies, found, strict=True))[: _KEPT_GROUPS * self._grpo.group]
        ]
        try:
            folder.mkdir(exist_ok=True)
            write_atomically(folder / f"step-{number:08d}.jsonl", "\n".join(lines) + "\n")
            for old in sorted(folder.glob("step-*.jsonl"))[:-_KEPT_STEPS]:
                old.unlink()
        except OSError as error:
            raise OperationError(f"{folder} cannot be written: {error.strerror or error}") from error


def _seed(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "big") >> 1
