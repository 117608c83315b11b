"""Gradients in buckets: sums that begin before the backward pass ends, once a step, in the gradients' own memory."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from processes import together

from modelworks.train import buckets
from modelworks.train.buckets import Buckets, Summed
from modelworks.train.ranks import Ranks


def two_micro_batches(ranks: Ranks) -> dict[str, Any]:
    """What happens, in its order, in the backward passes of four layers whose buckets take two of them each."""
    torch.manual_seed(0)
    network = nn.Sequential(*(nn.Linear(16, 16, bias=False) for _ in range(4)))
    group = dist.group.WORLD
    assert group is not None
    buckets.BUCKET_BYTES = buckets._FIRST_BYTES = 2 * 16 * 16 * 4
    gathered = Buckets([Summed(layer.weight, group, 1.0 / ranks.world) for layer in network])  # type: ignore[arg-type]
    events: list[str] = []
    exchange = dist.all_reduce

    def noted(*arguments: Any, **named: Any) -> Any:
        events.append("sum")
        return exchange(*arguments, **named)

    for number, layer in enumerate(network):
        layer.weight.register_post_accumulate_grad_hook(lambda _, number=number: events.append(f"layer {number}"))
    dist.all_reduce = noted
    try:
        for step in range(2):  # the second begins with what the first has left
            torch.manual_seed(10 * step + ranks.rank)
            batches = torch.randn(2, 8, 16)
            events.clear()
            for place, batch in enumerate(batches):
                gathered.expect(first=place == 0, last=place == 1)
                network(batch).square().mean().backward()
            gathered.finish()
    finally:
        dist.all_reduce = exchange
    found = [layer.weight.grad for layer in network]
    mean = [torch.zeros_like(layer.weight) for layer in network]
    for rank in range(ranks.world):
        torch.manual_seed(10 + rank)
        for batch in torch.randn(2, 8, 16):
            of_batch = torch.autograd.grad(network(batch).square().mean(), list(network.parameters()))
            for total, part in zip(mean, of_batch, strict=True):
                total += part / ranks.world
    off = max(float((one - other).abs().max()) for one, other in zip(found, mean, strict=True))
    memories = [one.untyped_storage().data_ptr() for one in found]
    return {"events": events, "off": off, "memories": len(set(memories))}


def test_a_bucket_is_summed_as_soon_as_the_last_micro_batch_completes_it() -> None:
    first = ["layer 3", "layer 2", "layer 1", "layer 0"]
    for found in together(2, two_micro_batches):
        assert found["off"] < 1e-6
        assert found["memories"] == 2
        # What the bucket has registered is called before what the test has.
        assert found["events"] == [*first, "layer 3", "sum", "layer 2", "layer 1", "sum", "layer 0"]
