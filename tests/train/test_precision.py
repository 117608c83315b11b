"""In bf16 a layout trains as one process does in bf16, over fp32 weights, and what processes gather is bf16."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parent))
from processes import together
from tiny_runs import make, run

from modelworks.spec.run import RunSpec
from modelworks.train.loop import Trainer
from modelworks.train.parallelize import local
from modelworks.train.ranks import Ranks
from modelworks.train.session import MemberSession, open_run
from modelworks.train.view import NoView

SAME_PRODUCTS = 2e-4
"""Losses, where every product is that of one process: sums of gradients differ in their last fp32 bits, and a weight
whose bf16 value turns on such a bit comes up within a few steps. The first step's gradients agree as in fp32."""
ROUNDED = 2e-3
"""Losses, where processes add up what each has rounded to bf16 (tensor, expert) or attend in chunks (context): one
rounding is up to 2^-9 of a number."""
LAYOUTS: list[tuple[str, int, dict[str, Any], float]] = [
    ("mixture", 2, {"zero_stage": 1}, SAME_PRODUCTS),
    ("mixture", 2, {"zero_stage": 3, "expert": 2}, ROUNDED),
    ("dense", 2, {"zero_stage": 2, "context": 2}, ROUNDED),
    ("mixture", 4, {"zero_stage": 3, "tensor": 2, "expert_tensor": 2, "data": 2}, ROUNDED),
    ("mixture", 4, {"zero_stage": 1, "pipeline": 2, "data": 2, "virtual_stages": 2, "expert": 2}, ROUNDED),
    ("dense", 4, {"zero_stage": 3, "pipeline": 2, "data": 2}, SAME_PRODUCTS),
    ("dense", 4, {"zero_stage": 2, "pipeline": 2, "data": 2, "schedule": "zero-bubble"}, SAME_PRODUCTS),
]


def low(spec: RunSpec, **train: Any) -> RunSpec:
    """The same run in bf16."""
    return spec.model_copy(
        update={
            "name": f"{spec.name}-bf16",
            "train": spec.train.model_copy(update={"precision": "bf16", **train}),
        }
    )


_alone: dict[str, dict[str, Any]] = {}


def alone(network: str, text: Path, folder: Path, like: RunSpec) -> dict[str, Any]:
    """What one process makes of as many layers in bf16."""
    micro_batch = like.train.micro_batch
    assert micro_batch != "auto"
    spec = low(make(network, "adamw", text, layers=like.model.layers, micro_batch=micro_batch))
    if spec.name not in _alone:
        _alone[spec.name] = run(spec, folder)[0]
    return _alone[spec.name]


@pytest.mark.parametrize(("network", "processes", "fields", "tolerance"), LAYOUTS)
def test_a_layout_in_bf16_trains_like_one_process_in_bf16(
    network: str,
    processes: int,
    fields: dict[str, Any],
    tolerance: float,
    text_folder: Path,
    folder: Path,
) -> None:
    spec = low(make(network, "adamw", text_folder, processes, **fields))
    expected = alone(network, text_folder, folder, spec)
    for of_process in run(spec, folder):
        off = whole = 0.0
        for name, gradient in of_process["gradients"].items():
            off += float(((gradient - expected["gradients"][name]) ** 2).sum())
            whole += float((expected["gradients"][name] ** 2).sum())
        # Rounded otherwise, a router whose scores are nearly equal sends a token to another expert.
        assert (off / whole) ** 0.5 < (1e-5 if tolerance == SAME_PRODUCTS else 0.1)
        for row, oracle in zip(of_process["rows"], expected["rows"], strict=True):
            assert row["loss"] == pytest.approx(oracle["loss"], rel=tolerance)


class Gathers(TorchDispatchMode):
    """Counts the bytes that all-gathers bring, by type, while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[torch.dtype] = Counter()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "allgather" in operation.__name__ or "all_gather_into_tensor" in operation.__name__:
            self.bytes[args[0].dtype] += args[0].nbytes
        return operation(*args, **(kwargs or {}))


def gather_some(ranks: Ranks, folder: Path, spec: RunSpec) -> dict[str, Any]:
    """What the forward and backward passes of a step gather, and what the process then keeps."""
    trainer = Trainer(MemberSession(folder, spec, False, ranks.first), NoView(), ranks)
    batches = torch.split(torch.zeros(4, 33, dtype=torch.long), 2)
    with Gathers() as seen:
        trainer.parallel.backward(batches, trainer.objective.losses, trainer._weighted)
    trainer.optimizers.zero_grad()
    trainer.one_step()
    kept = [*trainer.decoder.parameters(), *(trainer.optimizers.state().values())]
    trainer.close()
    return {"gathered": dict(seen.bytes), "kept": {local(tensor).dtype for tensor in kept}}


@pytest.mark.parametrize(("zero_stage", "times", "root_times"), [(1, 1, 1), (2, 1, 1), (3, 4, 2)])
def test_a_block_s_matrices_are_gathered_in_bf16_and_kept_in_fp32(
    zero_stage: int,
    times: int,
    root_times: int,
    text_folder: Path,
    folder: Path,
) -> None:
    """Once a step, with ZeRO 3 for each pass of two micro batches; embedding and last norm once, or for each batch."""
    spec = make("mixture", "adamw", text_folder, 2, zero_stage=zero_stage)
    model = spec.model
    assert model.moe is not None
    attention = 2 * model.hidden * (model.heads + model.kv_heads) * model.head_dim
    experts = 3 * model.moe.experts * model.moe.expert_hidden * model.hidden
    blocks, root = model.layers * (attention + experts), root_times * (model.vocab + 1) * model.hidden
    small = model.layers * (4 * model.hidden + model.moe.experts * model.hidden)
    for precision in ("fp32", "bf16"):
        run_spec = spec if precision == "fp32" else low(spec)
        with open_run(run_spec, folder=folder / "runs" / f"{run_spec.name}-gathers") as session:
            found = together(2, gather_some, session.folder, run_spec)
        expected = {torch.float32: 4 * (root + times * (blocks + small))}
        if precision == "bf16":
            expected = {torch.float32: 4 * root, torch.bfloat16: 2 * times * blocks}
        for of_process in found:
            assert of_process["gathered"] == expected
            assert of_process["kept"] == {torch.float32}
