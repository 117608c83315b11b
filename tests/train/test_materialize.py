"""A network that is built part by part is the network of one process, and takes no more memory than its part."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).parent))
from processes import together
from tiny_runs import make

from modelworks.model.decoder import Decoder
from modelworks.spec.run import RunSpec
from modelworks.train.layout import layout
from modelworks.train.parallelize import Parallel
from modelworks.train.ranks import Ranks

FAMILIES: list[tuple[str, int, dict[str, int]]] = [
    ("dense", 2, {"zero_stage": 0}),
    ("dense", 2, {"zero_stage": 3}),
    ("dense", 2, {"tensor": 2}),
    ("mixture", 2, {"context": 2, "zero_stage": 3}),
    ("mixture", 2, {"expert": 2, "zero_stage": 1}),
    ("mixture", 2, {"tensor": 2, "expert_tensor": 2}),
]
FAMILIES_OF_FOUR: list[tuple[str, int, dict[str, int]]] = [
    ("dense", 4, {"tensor": 2, "zero_stage": 3}),
    ("dense", 4, {"zero_stage": 2, "shard": 2}),
    ("mixture", 4, {"tensor": 2, "expert_tensor": 2, "expert": 2, "zero_stage": 3}),
    ("mixture", 4, {"tensor": 2, "expert": 4}),
    ("mixture", 4, {"context": 2, "expert": 2, "zero_stage": 3}),
]


def weights(ranks: Ranks, spec: RunSpec) -> dict[str, Any]:
    """A new network's parameters, whole."""
    with torch.device("meta"):
        decoder = Decoder(spec.model)
    parallel = Parallel(layout(spec, ranks.world), ranks)
    parallel.apply(decoder, seed=spec.train.seed)
    found = {}
    for name, parameter in decoder.named_parameters():
        whole = parallel.whole(name, parameter.detach())
        found[name] = (whole.full_tensor() if isinstance(whole, DTensor) else whole).numpy()
    return found


def check(network: str, processes: int, fields: dict[str, int]) -> None:
    spec = make(network, "adamw", None, processes, micro_batch=1, **fields)
    expected = Decoder(spec.model)
    expected.initialize(spec.train.seed)
    for found in together(processes, weights, spec):
        assert found.keys() == dict(expected.named_parameters()).keys()
        for name, parameter in expected.named_parameters():
            assert torch.equal(torch.from_numpy(found[name]), parameter.detach()), name


def test_one_process_begins_with_the_weights_of_its_seed() -> None:
    check("mixture", 1, {})


@pytest.mark.parametrize(("network", "processes", "fields"), FAMILIES)
def test_two_processes_begin_with_the_weights_of_one(network: str, processes: int, fields: dict[str, int]) -> None:
    check(network, processes, fields)


@pytest.mark.slow
@pytest.mark.parametrize(("network", "processes", "fields"), FAMILIES_OF_FOUR)
def test_four_processes_begin_with_the_weights_of_one(network: str, processes: int, fields: dict[str, int]) -> None:
    check(network, processes, fields)


BUILD = """
import resource, sys, torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from modelworks.model.decoder import Decoder
from modelworks.spec.files import run_from
from modelworks.train.layout import layout
from modelworks.train.parallelize import Parallel, local
from modelworks.train.ranks import Ranks

fields = eval(sys.argv[1], {"__builtins__": {}})
spec = run_from({
    "name": "large",
    "model": {"layers": 4, "hidden": 512, "heads": 8, "kv_heads": 8, "vocab": 16384, "context": 64,
              "moe": {"experts": 8, "top_k": 2, "expert_hidden": 3584}},
    "train": {"seq_len": 64, "global_batch": 8},
    "parallel": fields,
    "cluster": {"preset": "local", "gpus": 8, "gpus_per_node": 8, "scale_up_domain": 8},
})
dist.init_process_group("fake", store=FakeStore(), rank=3, world_size=8)

def build(spec):
    with torch.device("meta"):
        decoder = Decoder(spec.model)
    Parallel(layout(spec, 8), Ranks(3, 8)).apply(decoder, seed=1)
    return decoder

build(spec.model_copy(update={"model": spec.model.model_copy(update={"hidden": 64, "head_dim": 8, "vocab": 64})}))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
decoder = build(spec)
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(grown * 1024, 4 * sum(local(p).numel() for p in decoder.parameters()), 4 * spec.model.parameters.total)
"""
"""Builds one of eight processes of a network of 800 MB, after a small one that loads what is loaded once."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields", [{"zero_stage": 3}, {"expert": 8, "zero_stage": 3}, {"tensor": 8, "expert_tensor": 8}], ids=str
)
def test_building_a_network_takes_little_more_memory_than_the_process_keeps_of_it(fields: dict[str, int]) -> None:
    result = subprocess.run(
        [sys.executable, "-c", BUILD, repr(fields)], capture_output=True, text=True, check=False, timeout=300
    )
    assert result.returncode == 0, result.stderr
    peak, own, whole = map(int, result.stdout.split())
    assert own < 0.15 * whole
    # Beside its own part: one block of rows twice (as drawn, and scaled), and the allocator's rounding.
    assert peak < own + 48 * 2**20 < 0.3 * whole
