"""Every layout of several processes trains like one process: the same losses and the same gradients.

The layouts are all that the spec's degrees allow. One process on the same micro batches is the oracle.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).parent))
from processes import together

from modelworks.model import checkpoint
from modelworks.model.decoder import Decoder
from modelworks.spec.files import run_from
from modelworks.spec.run import RunSpec
from modelworks.train.loop import Trainer
from modelworks.train.ranks import Ranks
from modelworks.train.session import MemberSession, open_run
from modelworks.train.view import NoView

MakeSpec = Callable[..., RunSpec]
STEPS = 20
TOLERANCE = 1e-5
MIXTURE: dict[str, Any] = {}
DENSE = {
    "moe": None,
    "ffn_hidden": 96,
    "tied_embeddings": False,
    "attention_softcap": None,
    "activation": "silu",
    "norm_placement": "pre",
    "attention_bias": True,
    "mlp_bias": True,
    "qk_norm": True,
}


def layouts(processes: int) -> Iterator[dict[str, int]]:
    """Every combination of degrees, ZeRO stage and shards that is legal on so many processes."""
    degrees = [degree for degree in range(1, processes + 1) if processes % degree == 0]
    for data, shard, zero_stage in itertools.product(degrees, degrees, range(4)):
        fields = {"data": data, "shard": shard, "zero_stage": zero_stage}
        if data == processes and data % shard == 0 and (zero_stage > 0 or shard == 1):
            yield fields


def _name(fields: dict[str, int]) -> str:
    return "-".join(f"{name}{value}" for name, value in fields.items())


def train_some(ranks: Ranks, folder: Path, spec: RunSpec, steps: int) -> dict[str, Any]:
    """The losses of a new run's first steps, and of its first step the gradients, whole."""
    trainer = Trainer(MemberSession(folder, spec, False, ranks.first), NoView(), ranks)
    gradients: dict[str, torch.Tensor] = {}
    forget = trainer.optimizers.zero_grad

    def keep_first() -> None:
        if not gradients:
            for name, parameter in trainer.decoder.named_parameters():
                gradient = parameter.grad
                whole = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
                gradients[name] = whole.clone().numpy()
        forget()

    trainer.optimizers.zero_grad = keep_first
    rows = [trainer.one_step() for _ in range(steps)]
    validation = trainer._validate()
    trainer.close()
    return {"rows": rows, "gradients": gradients, "validation": validation}


def run(spec: RunSpec, tmp_path: Path, steps: int = STEPS) -> list[dict[str, Any]]:
    """Train a spec on as many processes as its cluster has devices."""
    with open_run(spec, folder=tmp_path / spec.name) as session:
        return together(spec.cluster.gpus, train_some, session.folder, spec, steps)


def with_layout(spec: RunSpec, name: str, processes: int, parallel: dict[str, Any]) -> RunSpec:
    """The same run under another name and layout."""
    values = spec.model_dump(mode="json", exclude_none=True)
    size = dict.fromkeys(("gpus", "gpus_per_node", "scale_up_domain"), processes)
    values |= {"name": name, "cluster": values["cluster"] | size, "parallel": values["parallel"] | parallel}
    return run_from(values)


def largest_difference(left: torch.Tensor, right: torch.Tensor) -> float:
    """The largest difference of two tensors over the second's size."""
    left, right = torch.as_tensor(left), torch.as_tensor(right)
    return float((left - right).abs().max() / right.abs().max().clamp(min=1e-12))


def assert_alike(found: dict[str, Any], expected: dict[str, Any], gradient_tolerance: float = 1e-4) -> None:
    """Hold a run's losses, norms, loads and gradients against the oracle's."""
    for row, oracle in zip(found["rows"], expected["rows"], strict=True):
        for quantity in ("loss", "cross_entropy", "load_balance_loss", "router_z_loss"):
            assert row[quantity] == pytest.approx(oracle[quantity], rel=TOLERANCE, abs=1e-12), (row["step"], quantity)
    assert found["rows"][0]["grad_norm"] == pytest.approx(expected["rows"][0]["grad_norm"], rel=TOLERANCE)
    assert found["rows"][0]["expert_load"] == pytest.approx(expected["rows"][0]["expert_load"], rel=1e-6)
    assert found["gradients"].keys() == expected["gradients"].keys()
    for name, gradient in expected["gradients"].items():
        assert largest_difference(found["gradients"][name], gradient) < gradient_tolerance, name
    assert found["validation"] == pytest.approx(expected["validation"], rel=TOLERANCE)


@pytest.fixture(scope="module")
def oracles() -> dict[str, dict[str, Any]]:
    """What one process made of each spec, by name; filled as the tests need them."""
    return {}


@pytest.fixture
def oracle(oracles: dict[str, dict[str, Any]], tmp_path: Path) -> Callable[[RunSpec], dict[str, Any]]:
    def of(spec: RunSpec) -> dict[str, Any]:
        if spec.name not in oracles:
            oracles[spec.name] = run(spec, tmp_path)[0]
        return oracles[spec.name]

    return of


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("network", [MIXTURE, DENSE], ids=["mixture", "dense"])
@pytest.mark.parametrize(
    ("processes", "fields"),
    [
        pytest.param(
            processes, fields, id=f"{processes}-{_name(fields)}", marks=pytest.mark.slow if processes > 2 else ()
        )
        for processes in (2, 4)
        for fields in layouts(processes)
    ],
)
def test_a_layout_trains_like_one_process(
    make_spec: MakeSpec,
    oracle: Callable[[RunSpec], dict[str, Any]],
    tmp_path: Path,
    processes: int,
    fields: dict[str, int],
    network: dict[str, Any],
    optimizer: str,
) -> None:
    name = f"{'dense' if network else 'mixture'}-{optimizer}"
    spec = make_spec(name, {"model": network}, global_batch=8, micro_batch=1, optimizer=optimizer)
    expected = oracle(spec)
    members = run(with_layout(spec, f"{name}-split", processes, fields), tmp_path)
    for found in members:
        assert_alike(found, expected)
    assert expected["rows"][-1]["loss"] < expected["rows"][0]["loss"]


def train_on(ranks: Ranks, folder: Path, spec: RunSpec, resume: bool, steps: int) -> list[float]:
    """The losses of a run's next steps, after which a checkpoint is saved."""
    trainer = Trainer(MemberSession(folder, spec, resume, ranks.first), NoView(), ranks)
    losses = [trainer.one_step()["loss"] for _ in range(steps)]
    trainer._save()
    trainer.close()
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_goes_on_with_the_same_losses_on_another_number_of_processes(
    make_spec: MakeSpec, tmp_path: Path, optimizer: str
) -> None:
    spec = make_spec(global_batch=8, micro_batch=1, optimizer=optimizer)
    expected = [row["loss"] for row in run(spec, tmp_path, steps=20)[0]["rows"]]
    folder, losses = tmp_path / "moved", []
    hops = [
        (4, {"zero_stage": 3}),
        (2, {"zero_stage": 1}),
        (1, {}),
        (4, {"zero_stage": 2, "shard": 2}),
        (4, {"zero_stage": 0}),
    ]
    for place, (processes, parallel) in enumerate(hops):
        moved = with_layout(spec, "moved", processes, parallel)
        with open_run(moved, resume=place > 0, folder=folder) as session:
            losses += together(processes, train_on, session.folder, moved, place > 0, 4)[0]
    assert losses == pytest.approx(expected, rel=TOLERANCE)


@pytest.mark.slow
def test_a_checkpoint_of_four_processes_is_whole_for_one(make_spec: MakeSpec, tmp_path: Path) -> None:
    spec = make_spec(global_batch=8, micro_batch=1)
    folders = {}
    for processes in (1, 4):
        split = with_layout(spec, f"run-{processes}", processes, {"zero_stage": 3})
        with open_run(split, folder=tmp_path / split.name) as session:
            together(processes, train_on, session.folder, split, False, 1)
        folders[processes] = checkpoint.newest_good(tmp_path / split.name)
    assert checkpoint.verify(folders[4])["step"] == 1
    assert {path.suffix for path in folders[4].iterdir()} == {".json", ".safetensors"}
    loaded = {}
    for processes, folder in folders.items():
        decoder = Decoder(spec.model)
        checkpoint.load_weights(folder, decoder)
        loaded[processes] = decoder.state_dict()
    for name, tensor in loaded[1].items():
        assert largest_difference(loaded[4][name], tensor) < 1e-5, name
