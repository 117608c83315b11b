"""Runs that begin from other weights, trained in the test's own process, and runs of several processes step by step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from modelworks.release.beginning import bring_weights
from modelworks.spec.run import RunSpec
from modelworks.train.loop import Trainer
from modelworks.train.ranks import Ranks
from modelworks.train.session import MemberSession, open_run
from modelworks.train.view import NoView


def train(spec: RunSpec, folder: Path, resume: bool = False, steps: int | None = None) -> dict[str, torch.Tensor]:
    """What a run's checkpoint holds of weights after some steps, or all."""
    with open_run(spec, resume, folder) as session:
        bring_weights(spec, session.folder)
        trainer = Trainer(session, NoView())
        for _ in range(steps if steps is not None else spec.train.steps - trainer.step):
            trainer.one_step()
        trainer._save()
        trainer.saving.finish()
        trained = {name: tensor.clone() for name, tensor in trainer._trained().items()}
        trainer.close()
    return trained


def steps_of(ranks: Ranks, folder: Path, spec: RunSpec, steps: int, kept: Sequence[str]) -> list[dict[str, float]]:
    """Some figures of a run's first steps, for `together`, and last what its validation says."""
    trainer = Trainer(MemberSession(folder, spec, False, ranks.first), NoView(), ranks)
    rows = [{name: row[name] for name in kept} for row in (trainer.one_step() for _ in range(steps))]
    bits = trainer._validate()
    trainer.close()
    return [*rows, ({} if bits is None else {"validation": bits}) | trainer._validated]
