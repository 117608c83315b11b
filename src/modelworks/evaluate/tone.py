"""Telling the tone of an answer: a logistic regression over its words, learnt from the dialogues themselves.

It is transparent: an answer is the set of its words, of its pairs of words, and of a few marks of style; each has a
weight for `fun`, which `telling` lists. It says how much an answer resembles ours in one mode rather than the other,
and no more: not whether it is funny. How often it is right is measured on the dialogues held out.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from modelworks.data.character import Dialogue, held_out, training, words
from modelworks.spec.modes import FUN

PENALTY = 0.001
"""Of half the squared weights, beside the mean loss; the best of a few in cross-validation on what is trained on."""
SEEN = 2
"""A mark must be in so many answers to be weighed."""
_MARKS = {
    "<question>": r"\?",
    "<exclamation>": r"!",
    "<colon>": r":",
    "<semicolon>": r";",
    "<list>": r"(?m)^\s*([-*]|\d+[.)])\s",
    "<figure>": r"\d",
    "<aside>": r"[(…]|\.\.\.",
    "<quotation>": r"[\"“„]",
    "<contraction>": r"\w['’](s|re|ve|ll|d|t|m)\b",
    "<you>": r"(?i)\byour?s?\b",
    "<I>": r"\bI\b",
    "<hedge>": r"(?i)\b(usually|often|mostly|perhaps|probably|about|depends|generally)\b",
    "<short sentence>": r"(?:^|[.!?]\s+)(?:\S+\s+){0,3}\S+[.!?]",
}
"""What is looked for beside words, by the name under which it is weighed."""


@dataclass(frozen=True)
class Tone:
    """The weights, by mark, and what they are added to.

    Attributes
    ----------
    weights
        Of each mark: above 0 it speaks for `fun`, below for `regular`.
    bias
        The log odds of `fun` without any mark.
    """

    weights: dict[str, float]
    bias: float

    def fun(self, answer: str) -> float:
        """The probability, 0 to 1, that an answer is one of the fun mode."""
        marks = _marks(answer)
        known = [self.weights[mark] for mark in marks if mark in self.weights]
        return float(torch.sigmoid(torch.tensor(self.bias + sum(known) / max(1, len(marks)) ** 0.5)))

    def of_mode(self, answer: str, mode: str) -> float:
        """The probability that an answer is one of a mode."""
        return self.fun(answer) if mode == FUN else 1.0 - self.fun(answer)

    def telling(self, count: int = 20) -> tuple[list[str], list[str]]:
        """The marks that speak most for `fun` and most for `regular`."""
        ranked = sorted(self.weights, key=self.weights.__getitem__)
        return ranked[::-1][:count], ranked[:count]


@cache
def learnt_tone() -> tuple[Tone, float, int]:
    """The tone learnt from the dialogues to train on; how often it is right on those held out; how many these are."""
    tone = learn(training())
    kept = held_out()
    return tone, accuracy(tone, kept), len(kept)


def accuracy(tone: Tone, dialogues: Iterable[Dialogue]) -> float:
    """The share of dialogues whose mode is told from their answers."""
    right = [tone.of_mode("\n".join(dialogue.answers), dialogue.mode) > 0.5 for dialogue in dialogues]
    return sum(right) / len(right)


def learn(dialogues: Sequence[Dialogue]) -> Tone:
    """Fit the weights to dialogues, to the one optimum that there is (L-BFGS in fp64)."""
    answers = [_marks("\n".join(dialogue.answers)) for dialogue in dialogues]
    counts = Counter(itertools.chain.from_iterable(answers))
    vocabulary = {mark: place for place, mark in enumerate(sorted(m for m, n in counts.items() if n >= SEEN))}
    inputs = torch.zeros(len(answers), len(vocabulary), dtype=torch.float64)
    for row, marks in enumerate(answers):
        for mark in marks:
            if mark in vocabulary:
                inputs[row, vocabulary[mark]] = max(1, len(marks)) ** -0.5
    wanted = torch.tensor([float(dialogue.mode == FUN) for dialogue in dialogues], dtype=torch.float64)
    weights, bias = _fit(inputs, wanted)
    return Tone(dict(zip(vocabulary, weights.tolist(), strict=True)), float(bias))


def _fit(inputs: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Weights (V) and bias of a logistic regression of `wanted` (N) on `inputs` (N, V)."""
    weights = torch.zeros(inputs.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights, bias], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        found = torch.nn.functional.binary_cross_entropy_with_logits(inputs @ weights + bias, wanted)
        found = found + PENALTY * weights.square().sum() / 2
        found.backward()  # type: ignore[no-untyped-call]
        return found

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    return weights.detach(), bias.detach()


def _marks(answer: str) -> frozenset[str]:
    said = words(answer)
    pairs = (f"{first} {second}" for first, second in itertools.pairwise(said))
    return frozenset([*said, *pairs, *(name for name, mark in _MARKS.items() if re.search(mark, answer))])
