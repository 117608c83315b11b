"""Tiny runs on several processes, for tests that hold them against one process on the same micro batches.

Each process imports this file, so it loads nothing that takes long and computes nothing.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).parent))
from processes import together

from modelworks.spec.files import run_from
from modelworks.spec.run import RunSpec
from modelworks.train.loop import Trainer
from modelworks.train.ranks import Ranks
from modelworks.train.session import MemberSession, open_run
from modelworks.train.view import NoView

STEPS = int(os.environ.get("MODELWORKS_TEST_STEPS", "4"))
"""Three updates: the first step's gradients, the optimizer's first move, and what it makes of its state after that."""
TOLERANCE = 1e-5
SHALLOW, DEEP = 2, 5
"""Layers of the networks: two, for a pipeline such that they don't divide by its stages, and for many stages five."""
NETWORKS: dict[str, dict[str, Any]] = {
    "mixture": {
        "activation": "gelu",
        "norm_placement": "sandwich",
        "attention_softcap": 30.0,
        "embedding_multiplier": 8.0,
        "tied_embeddings": True,
        "moe": {"experts": 4, "top_k": 2, "expert_hidden": 64},
    },
    # Fewer experts than processes that share their weights, or as many as can't be dealt out evenly.
    "few": {"moe": {"experts": 2, "top_k": 1, "expert_hidden": 64}},
    "odd": {"moe": {"experts": 3, "top_k": 2, "expert_hidden": 64}},
    "residual": {
        "activation": "gelu",
        "norm_placement": "sandwich",
        "ffn_hidden": 96,
        "attention_softcap": 30.0,
        "attention_temperature_length": 8,
        "output_softcap": 20.0,
        "moe": {"experts": 4, "top_k": 2, "expert_hidden": 64, "residual": True, "router_softcap": 1.0},
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


def make(
    network: str,
    optimizer: str,
    text: Path | None = None,
    processes: int = 1,
    layers: int | None = None,
    micro_batch: int | None = None,
    compiled: bool = False,
    **parallel: Any,
) -> RunSpec:
    """A tiny run of a network on so many processes.

    A process without a pipeline has two micro batches in a step where it has all data, for the sake of time.
    """
    stages = parallel.get("pipeline", 1)
    chunks = stages * parallel.get("virtual_stages", 1)
    layers = layers or (SHALLOW if stages == 1 else SHALLOW + 1 if chunks == 2 else DEEP)
    micro_batch = micro_batch or (4 if parallel.get("data", 1) == stages == 1 else 2)
    model = {"layers": layers, "hidden": 64, "heads": 4, "kv_heads": 4, "vocab": 512, "context": 64}
    return run_from(
        {
            "name": f"{network}-{optimizer}-"
            + "-".join(map(str, (layers, micro_batch, processes, *parallel.values()))),
            "model": model | NETWORKS[network],
            "data": {"source": "files", "files": [str(text or "text")], "validation_fraction": 0.2},
            "train": {
                "tokens": 40 * 8 * 32,
                "seq_len": 32,
                "global_batch": 8,
                "micro_batch": micro_batch,
                "precision": "fp32",
                "optimizer": optimizer,
                "compile": compiled,
                "validation_tokens": 512,
            },
            "parallel": parallel,
            "cluster": {"preset": "local"} | dict.fromkeys(("gpus", "gpus_per_node", "scale_up_domain"), processes),
        }
    )


def train_some(ranks: Ranks, folder: Path, spec: RunSpec, steps: int) -> dict[str, Any]:
    """The losses of a new run's first steps, and of its first step the gradients, whole."""
    trainer = Trainer(MemberSession(folder, spec, False, ranks.first), NoView(), ranks)
    counters.clear()
    trainer._compile()
    graphs = counters["stats"]["unique_graphs"]
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
    return {"rows": rows, "gradients": gradients, "validation": validation, "graphs": graphs}


def run(spec: RunSpec, folder: Path, steps: int = STEPS) -> list[dict[str, Any]]:
    """Train a new run of a spec on as many processes as its cluster has devices."""
    with open_run(spec, folder=folder / "runs" / spec.name) as session:
        return together(spec.cluster.gpus, train_some, session.folder, spec, steps)


def largest_difference(left: Any, right: Any) -> float:
    """The largest difference of two tensors over the second's size."""
    left, right = torch.as_tensor(left), torch.as_tensor(right)
    return float((left - right).abs().max() / right.abs().max().clamp(min=1e-12))


def assert_alike(found: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    """Hold losses, norms, loads and gradients that several processes report against the oracle's."""
    seen = set()
    for of_process in found:
        for name, gradient in of_process["gradients"].items():
            seen.add(name)
            assert largest_difference(gradient, expected["gradients"][name]) < 1e-4, name
        for row, oracle in zip(of_process["rows"], expected["rows"], strict=True):
            for quantity in ("loss", "cross_entropy", "load_balance_loss", "router_z_loss"):
                expectation = pytest.approx(oracle[quantity], rel=TOLERANCE, abs=1e-12)
                assert row[quantity] == expectation, (row["step"], quantity)
        row, oracle = of_process["rows"][0], expected["rows"][0]
        assert row["grad_norm"] == pytest.approx(oracle["grad_norm"], rel=TOLERANCE)
        assert row["expert_load"] == pytest.approx(oracle["expert_load"], rel=1e-6)
        assert of_process["validation"] == pytest.approx(expected["validation"], rel=TOLERANCE)
    assert seen == set(expected["gradients"])  # each stage of a pipeline has some


_oracles: dict[str, dict[str, Any]] = {}


def oracle(network: str, optimizer: str, text: Path, folder: Path, like: RunSpec, steps: int = STEPS) -> dict[str, Any]:
    """What one process makes of a run of as many layers, on the same micro batches."""
    micro_batch = like.train.micro_batch
    assert micro_batch != "auto"
    spec = make(network, optimizer, text, layers=like.model.layers, micro_batch=micro_batch)
    spec = spec.model_copy(update={"name": f"{spec.name}-{steps}"})
    if spec.name not in _oracles:
        _oracles[spec.name] = run(spec, folder, steps)[0]
    return _oracles[spec.name]


def train_on(ranks: Ranks, folder: Path, spec: RunSpec, resume: bool, steps: int) -> list[float]:
    """The losses of a run's next steps, after which a checkpoint is saved."""
    trainer = Trainer(MemberSession(folder, spec, resume, ranks.first), NoView(), ranks)
    losses = [trainer.one_step()["loss"] for _ in range(steps)]
    trainer._save()
    trainer.saving.finish()
    trainer.close()
    return losses


def first_step(ranks: Ranks, folder: Path, spec: RunSpec) -> dict[str, Any]:
    """The loss of a new run's first step, and its gradients, whole."""
    trainer = Trainer(MemberSession(folder, spec, False, ranks.first), NoView(), ranks)
    gradients: dict[str, Any] = {}

    def keep() -> None:
        for name, parameter in trainer.decoder.named_parameters():
            assert parameter.grad is not None
            whole = trainer.parallel.whole(name, parameter.grad)
            gradients[name] = (whole.full_tensor() if isinstance(whole, DTensor) else whole).clone().numpy()

    trainer.optimizers.zero_grad = keep  # type: ignore[method-assign]
    row = trainer.one_step()
    trainer.close()
    return {"loss": row["loss"], "gradients": gradients}
