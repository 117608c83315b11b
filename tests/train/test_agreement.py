"""Copies of weights compared: the odd one out is named, whatever is split and whatever is whole."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.train.processes import together
from torch import nn

from modelworks.spec.run import RunSpec
from modelworks.train.agreement import ReplicasDiffer, disagreement, fingerprint
from modelworks.train.loop import Trainer
from modelworks.train.parallelize import local
from modelworks.train.ranks import Ranks
from modelworks.train.session import MemberSession, open_run
from modelworks.train.view import NoView

MakeSpec = Callable[..., RunSpec]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.float8_e4m3fn])
def test_every_single_bit_changes_the_fingerprint(dtype: torch.dtype) -> None:
    tensor = torch.arange(12).to(dtype)
    original, changed = fingerprint([tensor]), []
    bits = tensor.view(torch.uint8)
    for place in range(bits.numel()):
        for bit in range(8):
            bits[place] ^= 1 << bit
            changed.append(fingerprint([tensor]))
            bits[place] ^= 1 << bit
    assert fingerprint([tensor]) == original
    assert original not in changed


def test_tensors_that_change_places_change_the_fingerprint() -> None:
    one, other = torch.ones(3), torch.zeros(3)
    assert fingerprint([one, other]) != fingerprint([other, one])


@pytest.mark.parametrize(
    ("fingerprints", "words"),
    [
        ([{"a": 1}, {"a": 1}], None),
        ([{"a": 1}, {"b": 2}], None),
        ([{"a": 1}, {"a": 1}, {"a": 2}], "process 2 holds other weights than the majority"),
        ([{"a": 1}, {"a": 2}, {"a": 1}, {"a": 3}, {"a": 1}], "processes 1 and 3 hold other weights"),
        ([{"a": 1}, {"a": 2}], "processes 0 and 1 should hold the same weights and don't"),
        ([{"a": 1}, {"b": 1}, {"a": 1}, {"b": 1}, {"a": 2}, {"b": 1}], "process 4 holds other weights"),
        ([{"a": 1, "b": 1}, {"a": 2, "b": 1}, {"a": 1}, {"b": 1}], "process 1 holds other weights"),
    ],
)
def test_the_majority_is_right_and_of_two_neither(fingerprints: list[dict[Any, int]], words: str | None) -> None:
    found = disagreement(fingerprints)
    assert (found is None) if words is None else (found is not None and found.startswith(words))


def _flip(network: nn.Module) -> None:
    """Turn over one bit of the largest weight matrix."""
    largest = max((local(parameter) for parameter in network.parameters()), key=torch.Tensor.numel)
    largest.detach().view(torch.int32).flatten()[3] ^= 1 << 4


def _find(ranks: Ranks, folder: Path, spec: RunSpec, victim: int | None) -> tuple[float, str | None]:
    trainer = Trainer(MemberSession(folder, spec, False, ranks.first), NoView(), ranks)
    assert trainer.agreement is not None
    try:
        for step in range(1, 5):
            trainer.one_step()
            trainer.agreement.check(step)
        if ranks.rank == victim:
            _flip(trainer.decoder)
        trainer.agreement.check(5)
    except ReplicasDiffer as found:
        return trainer.agreement.share, str(found)
    finally:
        trainer.close()
    return trainer.agreement.share, None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("parallel", "share", "words"),
    [
        ({"zero_stage": 0}, 1.0, "at step 5 process 2 holds other weights"),
        ({"zero_stage": 3, "shard": 2}, 1.0, "at step 5 processes 0 and 2 should hold the same weights"),
        ({"zero_stage": 1, "shard": 1}, 1.0, "at step 5 process 2 holds other weights"),
        ({"zero_stage": 2}, 0.0, None),
    ],
)
def test_what_several_processes_hold_is_compared_and_nothing_else(
    make_spec: MakeSpec, tmp_path: Path, parallel: dict[str, int], share: float, words: str | None
) -> None:
    cluster = {"preset": "local", "gpus": 4, "gpus_per_node": 4, "scale_up_domain": 4}
    sections: dict[str, Any] = {"parallel": parallel, "guard": {"agreement_every": 1}, "cluster": cluster}
    for victim in (None, 2):
        spec = make_spec(f"compared-{victim}", sections)
        with open_run(spec, folder=tmp_path / f"run-{victim}") as session:
            found = together(4, _find, session.folder, spec, victim)
        expected = words if victim is not None else None
        for compared, said in found:
            assert compared == pytest.approx(share)
            assert (said is None) if expected is None else (said is not None and said.startswith(expected))
