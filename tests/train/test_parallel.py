"""Every layout of several processes trains like one process: the same losses and the same gradients.

The layouts are all that the spec's degrees allow. One process on the same micro batches is the oracle.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).parent))
from processes import together

from modelworks.model import checkpoint
from modelworks.model.decoder import Decoder
from modelworks.spec.errors import InputError
from modelworks.spec.files import run_from
from modelworks.spec.run import RunSpec
from modelworks.train.layout import layout
from modelworks.train.loop import Trainer
from modelworks.train.parallelize import Parallel
from modelworks.train.ranks import Ranks
from modelworks.train.session import MemberSession, open_run
from modelworks.train.view import NoView

STEPS = 20
TOLERANCE = 1e-5
NETWORKS: dict[str, dict[str, Any]] = {
    "mixture": {
        "activation": "gelu",
        "norm_placement": "sandwich",
        "attention_softcap": 30.0,
        "embedding_multiplier": 8.0,
        "tied_embeddings": True,
        "moe": {"experts": 4, "top_k": 2, "expert_hidden": 64},
    },
    "windowed": {"ffn_hidden": 96, "sliding_window": 10, "nope_interval": 2},
    "biased": {"ffn_hidden": 96, "qkv_bias": True, "sliding_window": 10},
    "dense": {
        "ffn_hidden": 96,
        "tied_embeddings": False,
        "attention_bias": True,
        "mlp_bias": True,
        "qk_norm": True,
        "output_softcap": 20.0,
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A home folder for all tests of this file, so that the text is packed once."""
    folder = tmp_path_factory.mktemp("parallel")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MODELWORKS_HOME", str(folder / "home"))
        yield folder


def make(network: str, optimizer: str, text: Path | None = None, processes: int = 1, **parallel: Any) -> RunSpec:
    """A tiny run of a network on so many processes."""
    model = {"layers": 2, "hidden": 64, "heads": 4, "kv_heads": 4, "vocab": 512, "context": 64}
    return run_from(
        {
            "name": f"{network}-{optimizer}-" + "-".join([str(processes), *map(str, parallel.values())]),
            "model": model | NETWORKS[network],
            "data": {"source": "files", "files": [str(text or "text")], "validation_fraction": 0.2},
            "train": {
                "tokens": 40 * 8 * 32,
                "seq_len": 32,
                "global_batch": 8,
                "micro_batch": 1,
                "precision": "fp32",
                "optimizer": optimizer,
                "validation_tokens": 512,
            },
            "parallel": parallel,
            "cluster": {"preset": "local"} | dict.fromkeys(("gpus", "gpus_per_node", "scale_up_domain"), processes),
        }
    )


def layouts(network: str, processes: int) -> Iterator[dict[str, int]]:
    """Every combination of degrees, ZeRO stage and shards that the spec allows on so many processes."""
    degrees = [degree for degree in range(1, processes + 1) if processes % degree == 0]
    axes = ("data", "shard", "context", "tensor", "expert", "expert_tensor")
    for zero_stage, *values in itertools.product(range(4), *[degrees] * len(axes)):
        fields = {"zero_stage": zero_stage, **dict(zip(axes, values, strict=True))}
        # Where nothing is split over data or context ranks, all ZeRO stages are one.
        same = zero_stage < 3 and fields["data"] * fields["context"] * fields["expert"] == 1
        product = fields["data"] * fields["context"] * fields["tensor"]
        if product == processes and not same and _legal(network, processes, fields):
            yield {name: value for name, value in fields.items() if value > 1 or name in ("zero_stage", "shard")}


def _legal(network: str, processes: int, fields: dict[str, int]) -> bool:
    try:
        layout(make(network, "adamw", None, processes, **fields), processes)
    except InputError:
        return False
    return True


def _cases(processes: int) -> list[Any]:
    """All layouts; those that are not needed to have every pair of choices together once are marked `exhaustive`."""
    cases = [
        (network, optimizer, fields)
        for network, optimizer in itertools.product(("mixture", "dense"), ("adamw", "muon"))
        # On four processes there are many layouts: each network goes with the optimizer that is the harder for it.
        if processes == 2 or (network, optimizer) in (("mixture", "muon"), ("dense", "adamw"))
        for fields in layouts(network, processes)
    ]
    needed = _covering([_pairs(*case) for case in cases])
    return [
        pytest.param(
            network,
            optimizer,
            processes,
            fields,
            id=f"{network}-{optimizer}-{processes}-" + "-".join(f"{name}{value}" for name, value in fields.items()),
            marks=[] if index in needed else [pytest.mark.exhaustive],
        )
        for index, (network, optimizer, fields) in enumerate(cases)
    ]


def _pairs(network: str, optimizer: str, fields: dict[str, int]) -> set[Any]:
    """Which pairs of choices a case has together."""
    chosen = [("network", network), ("optimizer", optimizer), *fields.items()]
    return set(itertools.combinations(chosen, 2))


def _covering(cases: list[set[Any]]) -> set[int]:
    """A few of the cases that have every pair of choices together, found greedily."""
    missing, taken = set().union(*cases), set()
    while missing:
        best = max(range(len(cases)), key=lambda index: len(cases[index] & missing))
        taken.add(best)
        missing -= cases[best]
    return taken


def train_some(ranks: Ranks, folder: Path, spec: RunSpec, steps: int) -> dict[str, Any]:
    """The losses of a new run's first steps, and of its first step the gradients, whole."""
    trainer = Trainer(MemberSession(folder, spec, False, ranks.first), NoView(), ranks)
    gradients: dict[str, Any] = {}
    forget = trainer.optimizers.zero_grad

    def keep_first() -> None:
        if not gradients:
            for name, parameter in trainer.decoder.named_parameters():
                assert parameter.grad is not None
                whole = trainer.parallel.whole(name, parameter.grad)
                gradients[name] = (whole.full_tensor() if isinstance(whole, DTensor) else whole).clone().numpy()
        forget()

    trainer.optimizers.zero_grad = keep_first  # type: ignore[method-assign]
    rows = [trainer.one_step() for _ in range(steps)]
    validation = trainer._validate()
    trainer.close()
    return {"rows": rows, "gradients": gradients, "validation": validation}


def run(spec: RunSpec, folder: Path, steps: int = STEPS) -> list[dict[str, Any]]:
    """Train a new run of a spec on as many processes as its cluster has devices."""
    with open_run(spec, folder=folder / "runs" / spec.name) as session:
        return together(spec.cluster.gpus, train_some, session.folder, spec, steps)


def largest_difference(left: Any, right: Any) -> float:
    """The largest difference of two tensors over the second's size."""
    left, right = torch.as_tensor(left), torch.as_tensor(right)
    return float((left - right).abs().max() / right.abs().max().clamp(min=1e-12))


def assert_alike(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Hold a run's losses, norms, loads and gradients against the oracle's."""
    assert found["gradients"].keys() == expected["gradients"].keys()
    for name, gradient in expected["gradients"].items():
        assert largest_difference(found["gradients"][name], gradient) < 1e-4, name
    for row, oracle in zip(found["rows"], expected["rows"], strict=True):
        for quantity in ("loss", "cross_entropy", "load_balance_loss", "router_z_loss"):
            assert row[quantity] == pytest.approx(oracle[quantity], rel=TOLERANCE, abs=1e-12), (row["step"], quantity)
    assert found["rows"][0]["grad_norm"] == pytest.approx(expected["rows"][0]["grad_norm"], rel=TOLERANCE)
    assert found["rows"][0]["expert_load"] == pytest.approx(expected["rows"][0]["expert_load"], rel=1e-6)
    assert found["validation"] == pytest.approx(expected["validation"], rel=TOLERANCE)


_oracles: dict[tuple[str, str], dict[str, Any]] = {}


def oracle(network: str, optimizer: str, text: Path, folder: Path) -> dict[str, Any]:
    """What one process makes of it."""
    if (network, optimizer) not in _oracles:
        _oracles[network, optimizer] = run(make(network, optimizer, text), folder)[0]
    return _oracles[network, optimizer]


def check_layout(
    network: str, optimizer: str, processes: int, fields: dict[str, int], text: Path, folder: Path
) -> None:
    expected = oracle(network, optimizer, text, folder)
    assert expected["rows"][-1]["loss"] < expected["rows"][0]["loss"]
    for found in run(make(network, optimizer, text, processes, **fields), folder):
        assert_alike(found, expected)


@pytest.mark.parametrize(("network", "optimizer", "processes", "fields"), _cases(2))
def test_a_layout_of_two_processes_trains_like_one(
    network: str, optimizer: str, processes: int, fields: dict[str, int], text_folder: Path, folder: Path
) -> None:
    check_layout(network, optimizer, processes, fields, text_folder, folder)


@pytest.mark.slow
@pytest.mark.parametrize(("network", "optimizer", "processes", "fields"), _cases(4))
def test_a_layout_of_four_processes_trains_like_one(
    network: str, optimizer: str, processes: int, fields: dict[str, int], text_folder: Path, folder: Path
) -> None:
    check_layout(network, optimizer, processes, fields, text_folder, folder)


@pytest.mark.parametrize(
    ("network", "fields"), [("windowed", {"context": 2}), ("windowed", {"tensor": 2}), ("biased", {"tensor": 2})]
)
def test_windows_and_layers_without_positions_are_split_like_the_rest(
    network: str, fields: dict[str, int], text_folder: Path, folder: Path
) -> None:
    check_layout(network, "adamw", 2, fields, text_folder, folder)


@pytest.mark.parametrize(
    ("processes", "fields"),
    [(1, {}), (2, {"zero_stage": 3}), (2, {"zero_stage": 1, "expert": 2}), (2, {"tensor": 2, "expert_tensor": 2})],
)
def test_recomputed_activations_change_nothing(
    processes: int, fields: dict[str, int], text_folder: Path, folder: Path
) -> None:
    spec = make("mixture", "adamw", text_folder, processes, recompute="full", **fields)
    for found in run(spec, folder):
        assert_alike(found, oracle("mixture", "adamw", text_folder, folder))


def bytes_kept(decoder: Decoder) -> int:
    """What the forward pass keeps for the backward pass."""
    sizes: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        sizes[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        decoder(torch.zeros(4, 32, dtype=torch.long), torch.zeros(4, 32, dtype=torch.long))
    return sum(sizes.values())


def test_recomputed_activations_are_not_kept(text_folder: Path, folder: Path) -> None:
    kept = {}
    for kind in ("none", "full"):
        spec = make("dense", "adamw", text_folder, 1, recompute=kind)
        decoder = Decoder(spec.model)
        Parallel(layout(spec, 1), Ranks()).apply(decoder, recompute=kind == "full")
        kept[kind] = bytes_kept(decoder)
    assert kept["full"] < kept["none"] / 2


def train_on(ranks: Ranks, folder: Path, spec: RunSpec, resume: bool, steps: int) -> list[float]:
    """The losses of a run's next steps, after which a checkpoint is saved."""
    trainer = Trainer(MemberSession(folder, spec, resume, ranks.first), NoView(), ranks)
    losses = [trainer.one_step()["loss"] for _ in range(steps)]
    trainer._save()
    trainer.close()
    return losses


HOPS: dict[str, list[tuple[int, dict[str, int]]]] = {
    "over data": [
        (4, {"zero_stage": 3}),
        (2, {"zero_stage": 1}),
        (1, {}),
        (4, {"zero_stage": 2, "shard": 2}),
        (4, {"zero_stage": 0}),
    ],
    "over everything": [
        (4, {"zero_stage": 3, "tensor": 2, "expert_tensor": 2}),
        (2, {"zero_stage": 1, "expert": 2}),
        (1, {}),
        (4, {"zero_stage": 3, "context": 2, "expert": 2}),
        (2, {"tensor": 2, "expert_tensor": 1}),
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("hops", list(HOPS))
def test_a_run_goes_on_with_the_same_losses_on_other_processes(
    optimizer: str, hops: str, text_folder: Path, folder: Path
) -> None:
    expected = [row["loss"] for row in oracle("mixture", optimizer, text_folder, folder)["rows"]]
    losses: list[float] = []
    for place, (processes, parallel) in enumerate(HOPS[hops]):
        moved = make("mixture", optimizer, text_folder, processes, **parallel).model_copy(update={"name": "moved"})
        home = folder / "runs" / f"moved-{hops}-{optimizer}".replace(" ", "-")
        with open_run(moved, resume=place > 0, folder=home) as session:
            losses += together(processes, train_on, session.folder, moved, place > 0, 4)[0]
    assert losses == pytest.approx(expected, rel=TOLERANCE)


@pytest.mark.slow
def test_a_checkpoint_of_four_processes_is_whole_for_one(text_folder: Path, folder: Path) -> None:
    spec = make("mixture", "adamw", text_folder, 4, zero_stage=3, tensor=2, expert=2, expert_tensor=2)
    with open_run(spec, folder=folder / "runs" / "whole") as session:
        together(4, train_on, session.folder, spec, False, 0)
    saved = checkpoint.newest_good(session.folder)
    assert {path.suffix for path in saved.iterdir()} == {".json", ".safetensors"}
    assert len(list(saved.glob("shard-*"))) == 4
    decoder, drawn = Decoder(spec.model), Decoder(spec.model)
    drawn.initialize(spec.train.seed)
    checkpoint.load_weights(saved, decoder)
    for name, tensor in drawn.state_dict().items():
        assert torch.equal(decoder.state_dict()[name], tensor), name
