"""Reading, sign by sign: the eyes learn to name what is written in each image token's square.

Questions teach eyes slowly: their answers don't say where to look, and what pictures have in common is learnt long
before what tells them apart. A drawn picture knows where its signs stand, which is a target for each of its tokens; the
decoder isn't run.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from modelworks.model.decoder import Losses
from modelworks.model.loss import IGNORED
from modelworks.model.vision import SeeingDecoder
from modelworks.spec.flops import forward_flop_per_token, vision_flop_per_sequence
from modelworks.train.batching import Batch, Seen
from modelworks.train.objectives import Learning, Objective

_SIZE = 0.1
"""What the squared logarithm of the size of what is seen, beside that of words, counts in the loss."""


class Signs(Objective):
    """The cross-entropy of the sign in each square, or of none being there; what is seen stays as large as words."""

    def __init__(self, learning: Learning) -> None:
        super().__init__(learning)
        assert isinstance(self._decoder, SeeingDecoder)
        self._seeing = self._decoder
        model, seq_len = learning.spec.model, learning.spec.train.seq_len
        self.flop_share = vision_flop_per_sequence(model) / (seq_len * forward_flop_per_token(model, seq_len))
        self._validation = learning.validation()

    def losses(self, part: Any) -> Losses:
        """The mean over the squares of a micro batch's pictures."""
        assert isinstance(part, Seen)
        with self._learning.precision.autocast():
            seen = self._seeing.eyes(torch.cat(part.tiles))
            mean = self._seeing.sign_loss(seen, torch.cat(part.signs))
            mean = mean + _SIZE * self._seeing.size_beside_words(seen).square()
        zero = torch.zeros_like(mean)
        return Losses(mean, zero, zero, zero.new_zeros((0, 0)))

    def validate(self) -> tuple[None, dict[str, float]]:
        """The loss on held-out pictures, and the share of their signs that is read right."""

        def figures(batch: Batch) -> Tensor:
            assert isinstance(batch, Seen)
            with self._learning.precision.autocast():
                logits = self._seeing.sign_logits(self._seeing.eyes(torch.cat(batch.tiles)))
            signs = torch.cat(batch.signs)
            counts = signs != IGNORED
            written = counts & (signs != self._seeing.image_token)
            right = written & (logits.argmax(-1) == signs)
            nats = F.cross_entropy(logits[counts], signs[counts], reduction="sum")
            return torch.stack([one.double() for one in (nats, counts.sum(), right.sum(), written.sum())])

        sums = self._validation.mean(figures)
        if sums is None:
            return None, {}
        nats, squares, right, written = sums.tolist()
        return None, {
            "validation_sign_loss": nats / max(squares, 1.0),
            "validation_sign_accuracy": right / max(written, 1.0),
        }
