"""What a step minimises, apart from how: the loop asks an objective for batches, losses and what there is to report.

An objective's losses of its micro batches are such that their mean, over processes too, is what the step minimises.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modelworks.data.answers import DialogueDataset
from modelworks.data.packed import PackedDataset
from modelworks.model.decoder import Decoder, Losses
from modelworks.model.vision import SeeingDecoder
from modelworks.spec.run import RunSpec
from modelworks.train import preference
from modelworks.train.batching import Batch, inputs_and_targets, micro_batches, take, targets
from modelworks.train.evaluate import Validation
from modelworks.train.parallelize import Parallel
from modelworks.train.precision import Precision


@dataclass(frozen=True)
class Learning:
    """What an objective works with."""

    spec: RunSpec
    folder: Path
    data: PackedDataset
    decoder: Decoder
    parallel: Parallel
    precision: Precision
    micro_batch: int

    @property
    def frozen(self) -> bool:
        """Whether most of the network's weights get no gradients."""
        return self.spec.adapter is not None or self.spec.train.trains == "connector"

    def validation(self) -> Validation:
        """The held-out sequences."""
        train = self.spec.train
        signs = train.objective == "signs"
        return Validation(self.data, train.validation_tokens, train.seq_len, self.micro_batch, self.parallel, signs)


class Objective(ABC):
    """What a step minimises."""

    updates = 1
    """Optimizer updates in a step."""
    flop_share = 1.0
    """Floating-point operations of a step over those of a forward and a backward pass in which all weights learn."""

    def __init__(self, learning: Learning) -> None:
        self._learning, self._decoder = learning, learning.decoder

    def batch(self, place: int) -> Any:
        """This process's share of the global batch that begins at a place of the data."""
        of, train = self._learning, self._learning.spec.train
        begin, count = of.parallel.share(train.global_batch)
        return take(of.data, "train", place + begin, count, train.seq_len, train.seed, train.learns_signs)

    def parts(self, batch: Any) -> list[Any]:
        """A batch as micro batches, before each update that is made with it."""
        return micro_batches(batch, self._learning.micro_batch)

    @abstractmethod
    def losses(self, part: Any) -> Losses:
        """The losses of one of the micro batches that `parts` has given last."""

    def report(self) -> dict[str, float]:
        """What else there is to say of the step, by the names that metrics have."""
        return {}

    @abstractmethod
    def validate(self) -> tuple[float | None, dict[str, float]]:
        """Bits per byte of held-out text, where that is measured, and what else there is to say of it."""

    def _counted(self, count: int, parts: int) -> float:
        """What counts in a global batch, for each of a process's micro batches."""
        counted = self._learning.parallel.mean(torch.tensor(count, dtype=torch.float64))
        return float(counted) / parts


class NextToken(Objective):
    """The cross-entropy of each next token; of dialogues, of the answers' tokens."""

    def __init__(self, learning: Learning) -> None:
        super().__init__(learning)
        # The frozen weights' own gradients, a third of the products, aren't computed.
        self.flop_share = 2 / 3 if learning.frozen else 1.0
        self._validation = learning.validation()
        self._targets_per_part: float | None = None
        self._sign_losses: list[Tensor] = []

    def parts(self, batch: Batch) -> list[Batch]:
        """See `Objective.parts`."""
        parts = super().parts(batch)
        if isinstance(self._learning.data, DialogueDataset):
            self._targets_per_part = max(1.0, self._counted(targets(batch), len(parts)))
        self._sign_losses = []
        return parts

    def losses(self, part: Batch) -> Losses:
        """The losses, whose mean is that over all tokens, or over the global batch's answers."""
        losses, signs = self._mean_losses(part)
        if self._targets_per_part is None:
            return losses
        found = losses.cross_entropy * (targets(part) / self._targets_per_part)
        if signs is not None:
            self._sign_losses.append(signs.detach())
            found = found + self._learning.spec.train.sign_weight * signs
        return losses._replace(cross_entropy=found)

    def report(self) -> dict[str, float]:
        """The loss of the signs, where they are learnt."""
        if not self._sign_losses:
            return {}
        return {"sign_loss": float(self._learning.parallel.mean(torch.stack(self._sign_losses).mean()))}

    def validate(self) -> tuple[float | None, dict[str, float]]:
        """See `Objective.validate`."""
        return self._validation.bits_per_byte(lambda batch: float(self._mean_losses(batch)[0].cross_entropy)), {}

    def _mean_losses(self, batch: Batch) -> tuple[Losses, Tensor | None]:
        """The losses, and that of the signs in what is seen, if they came with it."""
        signs = None
        with self._learning.precision.autocast():
            if isinstance(batch, Tensor):
                losses = self._decoder(*inputs_and_targets(batch))
            else:
                tokens, following = inputs_and_targets(batch.sequences)
                embedded, decoder = None, self._decoder
                if any(map(len, batch.tiles)):
                    assert isinstance(decoder, SeeingDecoder)
                    seen = decoder.eyes(torch.cat(batch.tiles))
                    embedded = decoder.embedded(tokens, seen)
                    if batch.signs:
                        signs = decoder.sign_loss(seen, torch.cat(batch.signs))
                losses = decoder(tokens, following, embedded=embedded)
        assert isinstance(losses, Losses)
        return losses, signs


class Preference(Objective):
    """DPO's loss on pairs of answers; see `preference`. It stands where the cross-entropy does."""

    # What isn't computed of gradients, the reference's forward pass takes.

    def __init__(self, learning: Learning) -> None:
        super().__init__(learning)
        self._validation = learning.validation()
        self._pairs_per_part = 1.0
        self._figures: list[Tensor] = []

    def parts(self, batch: Tensor) -> list[Tensor]:
        """See `Objective.parts`."""
        parts = super().parts(batch)
        self._pairs_per_part = max(1e-12, self._counted(preference.pairs(batch), len(parts)))
        self._figures = []
        return parts

    def losses(self, part: Tensor) -> Losses:
        """The losses, whose mean is that over the global batch's pairs."""
        compared = self._compared(part)
        self._figures.append(compared.figures)
        return compared.of_routers._replace(cross_entropy=compared.losses.sum() / self._pairs_per_part)

    def report(self) -> dict[str, float]:
        """Rewards, margin and accuracy of the global batch's pairs."""
        found = preference.report(self._learning.parallel.mean(torch.stack(self._figures).sum(0)))
        del found["loss"]  # that of the step is known already
        return found

    def validate(self) -> tuple[float | None, dict[str, float]]:
        """Bits per byte of the chosen answers; rewards, margin and accuracy."""

        def figures(batch: Batch) -> Tensor:
            assert isinstance(batch, Tensor)
            return self._compared(batch).figures

        sums = self._validation.mean(figures)
        if sums is None:
            return None, {}
        found = preference.report(sums)
        bits = self._validation.in_bits_per_byte(found.pop("cross_entropy"))
        return bits, {f"validation_{name}": value for name, value in found.items()}

    def _compared(self, sequences: Tensor) -> preference.Compared:
        with self._learning.precision.autocast():
            return preference.compare(self._decoder, sequences, self._learning.spec.dpo)
