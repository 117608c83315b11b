"""Collectives across a network against the bounds of their algorithms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from modelworks.plan.block import Setting
from modelworks.plan.collectives import Fabric

GIB = 2.0**30


@pytest.fixture
def network(setting: Callable[..., Setting]) -> Fabric:
    """A network without latency that reaches its rate, so that only bytes count."""
    return replace(setting().fabric, nic_latency_s=0.0, efficiency=1.0, all_to_all_efficiency=1.0)


def one(value: float) -> np.ndarray:
    return np.array([value])


def whole(value: int) -> np.ndarray:
    return np.array([value], dtype=np.int64)


def test_a_ring_over_nodes_moves_what_thakur_2005_states(network: Fabric) -> None:
    # One rank a node: an all-reduce sends 2 (n - 1) / n of the bytes through each rank's port, the halves one each.
    for ranks in (2, 16, 128):
        share = (ranks - 1) / ranks * GIB / network.nic_bytes
        assert network.all_reduce(one(GIB), whole(ranks), whole(8))[0] == pytest.approx(2 * share)
        assert network.all_gather(one(GIB), whole(ranks), whole(8))[0] == pytest.approx(share)
        assert network.reduce_scatter(one(GIB), whole(ranks), whole(8))[0] == pytest.approx(share)


def test_ranks_that_share_a_node_share_its_ports(network: Fabric) -> None:
    # Eight ranks a node carry an eighth of the bytes each, in a ring of their own, if NVLink is fast enough for it.
    slow = replace(network, nic_bytes=network.nic_bytes / 4)
    alone = slow.all_gather(one(GIB), whole(128), whole(8))[0]
    together = slow.all_gather(one(GIB), whole(128), whole(1))[0]
    assert together == pytest.approx(alone / 8, rel=1e-6)


def test_one_rank_exchanges_nothing(network: Fabric) -> None:
    for exchange in (network.all_reduce, network.all_gather, network.reduce_scatter, network.all_to_all):
        assert exchange(one(GIB), whole(1), whole(4))[0] == 0.0


def test_an_all_to_all_sends_what_is_not_for_its_own_node(network: Fabric) -> None:
    # 64 ranks, 8 a node: 56 of 64 parts leave the node through each rank's own port.
    expected = GIB * 56 / 64 / network.nic_bytes
    assert network.all_to_all(one(GIB), whole(64), whole(1))[0] == pytest.approx(expected)


def test_placement_counts_the_ranks_of_a_domain(network: Fabric) -> None:
    ranks, stride = np.array([8, 8, 8, 2, 64]), np.array([1, 2, 8, 4, 1])
    assert network.placement(ranks, stride).tolist() == [8, 4, 1, 2, 8]


def test_a_faster_network_is_never_slower(network: Fabric) -> None:
    rng = np.random.default_rng(0)
    size, ranks = 10.0 ** rng.uniform(2, 10, 200), 2 ** rng.integers(0, 11, 200)
    stride = 2 ** rng.integers(0, 8, 200)
    faster = replace(network, nic_bytes=network.nic_bytes * 1.3)
    for kind in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all"):
        assert np.all(getattr(faster, kind)(size, ranks, stride) <= getattr(network, kind)(size, ranks, stride) + 1e-15)


def test_an_oversubscribed_level_slows_the_groups_that_cross_it_and_no_others(network: Fabric) -> None:
    thin = replace(network, island=256, oversubscription=3.0)
    assert thin.all_reduce(one(GIB), whole(32), whole(8)) == network.all_reduce(one(GIB), whole(32), whole(8))
    assert thin.all_reduce(one(GIB), whole(64), whole(8))[0] == pytest.approx(
        3 * network.all_reduce(one(GIB), whole(64), whole(8))[0]
    )
