"""Replies that a network in training gives to prompts, and who draws them.

The loop asks a `Sampler`. The serving engine is one, which is handed in from outside, since it belongs to another room;
`OwnSampler` draws with the network itself, one token of a group after another, for networks that the engine doesn't
load.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

import torch

from modelworks.model.attention import KeyValueCache
from modelworks.model.decoder import Decoder
from modelworks.model.generation import choose
from modelworks.train.precision import Precision


@dataclass(frozen=True)
class Sampling:
    """How replies are drawn; a temperature of 0 takes the likeliest token each time."""

    max_new_tokens: int
    temperature: float
    end: int
    """The token that ends a reply."""


@dataclass(frozen=True)
class Reply:
    """One reply."""

    tokens: list[int]
    """With the one that ends it, unless it was cut."""
    log_probabilities: list[float] | None = None
    """Of each token, in nats, at a temperature of 1, as the one who drew them has it; None where that isn't known."""
    certain: bool = True
    """Whether these tokens were drawn, and not others of the same text; what is uncertain isn't learnt from."""


class Sampler(Protocol):
    """What draws replies."""

    def __call__(
        self, decoder: Decoder, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[int]
    ) -> list[Reply]:
        """A reply of the network, as it is now, to each prompt, drawn with a seed of its own."""


class OwnSampler:
    """Draws with the network itself; the same on the same machine, to the bit. Equal prompts in a row are one batch."""

    def __init__(self, precision: Precision) -> None:
        self._precision = precision

    @torch.no_grad()
    def __call__(
        self, decoder: Decoder, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[int]
    ) -> list[Reply]:
        """See `Sampler`."""
        found: list[Reply] = []
        for prompt, group in groupby(prompts):
            count = len(list(group))
            found += self._replies(decoder, list(prompt), count, sampling, seeds[len(found)])
        return found

    def _replies(self, decoder: Decoder, prompt: list[int], count: int, sampling: Sampling, seed: int) -> list[Reply]:
        chance = torch.Generator().manual_seed(seed)
        cache = KeyValueCache(decoder.spec, count, len(prompt) + sampling.max_new_tokens)
        fresh = torch.tensor([prompt] * count)
        tokens: list[list[int]] = [[] for _ in range(count)]
        spoken: list[list[float]] = [[] for _ in range(count)]
        ended = [False] * count
        for _ in range(sampling.max_new_tokens):
            with self._precision.autocast():
                logits = decoder.logits(fresh, cache)[:, -1]
            fresh = choose(logits, sampling.temperature, 1.0, chance)
            likelihoods = logits.float().log_softmax(-1).gather(1, fresh)
            for place, (token, likelihood) in enumerate(
                zip(fresh[:, 0].tolist(), likelihoods[:, 0].tolist(), strict=True)
            ):
                if not ended[place]:
                    tokens[place].append(token)
                    spoken[place].append(likelihood)
                    ended[place] = token == sampling.end
            if all(ended):
                break
        return [Reply(*pair) for pair in zip(tokens, spoken, strict=True)]
