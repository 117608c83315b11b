"""The bill of materials follows from the topology, and power and cost agree with what was published."""

from __future__ import annotations

import pytest

from modelworks.simulate.machine import gpus_for_budget, machine, network
from modelworks.spec import InputError, cluster_spec, facts

PARTS = facts.parts("h100-cluster")


def test_a_full_three_level_network_of_radix_k_has_five_quarters_k_squared_switches() -> None:
    # Al-Fares et al. 2008, A Scalable, Commodity Data Center Network Architecture: k^3/4 hosts, 5 k^2/4 switches.
    k = 128
    net = network(cluster_spec("colossus-100k", k**3 // 4), PARTS)
    assert net is not None
    assert net.switches == (k * k // 2, k * k // 2, k * k // 4)
    assert sum(net.switches) == 5 * k * k // 4
    assert net.links == (k**3 // 4,) * 3


def test_a_full_two_level_network_has_half_as_many_spines_as_leaves() -> None:
    k = 128
    cluster = cluster_spec("h100-superpod", k * k // 2)
    net = network(cluster, PARTS)
    assert net is not None
    assert net.switches == (k, k // 2)


def test_a_network_that_would_not_reach_gets_another_level() -> None:
    assert cluster_spec("h100-superpod").network.levels == 2  # type: ignore[union-attr]
    net = network(cluster_spec("h100-superpod", 16_384), PARTS)
    assert net is not None
    assert len(net.switches) == 3


def test_oversubscription_thins_the_uppermost_links_and_the_bisection() -> None:
    full = cluster_spec("colossus-100k")
    thin = full.model_copy(update={"network": full.network.model_copy(update={"oversubscription": 4.0})})  # type: ignore[union-attr]
    one, other = network(full, PARTS), network(thin, PARTS)
    assert one is not None
    assert other is not None
    assert other.links == (one.links[0], one.links[1], one.links[2] // 4)
    assert other.bisection_bytes == one.bisection_bytes / 4
    # Half of 100,000 NICs of 400 Gbit/s.
    assert one.bisection_bytes == pytest.approx(50_000 * 50e9)


def test_a_single_node_has_no_network() -> None:
    built = machine(cluster_spec("h100-superpod", 8))
    assert built.network is None
    assert built.counts["transceiver"] == built.counts["leaf_switch"] == 0
    assert (built.counts["gpu"], built.counts["node"]) == (8, 1)


def test_100_000_h100_agree_with_the_published_analysis() -> None:
    # SemiAnalysis, 100,000 H100 Clusters (June 2024): 150 MW, 1.59 TWh and 123.9 M$ a year at 0.078 $/kWh, more than
    # 4 G$ of servers. Ours comes from its own parts and prices; a list price of August 2024 gives 3.96 G$.
    cluster = cluster_spec("colossus-100k").model_copy(update={"electricity_usd_per_kwh": 0.078})
    built = machine(cluster)
    assert built.power.it_w == pytest.approx(150e6, rel=0.07)
    assert built.power.year_wh() == pytest.approx(1.59e12, rel=0.03)
    assert built.cost.energy_usd_per_year == pytest.approx(123.9e6, rel=0.03)
    assert built.cost.servers_usd == pytest.approx(4e9, rel=0.02)


def test_synchronised_steps_swing_by_tens_of_megawatts() -> None:
    # Grattafiori et al. 2024, section 3.3.4: "on the order of tens of megawatts" for tens of thousands of GPUs.
    power = machine(cluster_spec("colossus-100k", 24_000)).power
    assert 5e6 < power.it_w - power.idle_w < 50e6
    assert 0 < power.swing_w < power.it_w - power.idle_w
    corners = power.profile(5.0, steps=2, down_s=60.0)
    assert corners == sorted(corners, key=lambda corner: corner[0])
    assert {watts for _, watts in corners} == {power.it_w, power.communicating_w, power.idle_w}


def test_a_budget_buys_what_costs_no_more() -> None:
    cluster = cluster_spec("colossus-100k")
    gpus = gpus_for_budget(cluster, 1e9, "h100-cluster", "h100-2024")
    spent = machine(cluster.model_copy(update={"gpus": gpus})).cost.capital_usd
    more = machine(cluster.model_copy(update={"gpus": gpus + 8})).cost.capital_usd
    assert spent <= 1e9 < more
    assert gpus_for_budget(cluster, 1e9, "h100-cluster", "h100-2024", building=False) > gpus


def test_ten_million_gpus_are_taken_for_a_slip() -> None:
    with pytest.raises(InputError, match="10_000_000 is not accepted: up to 2_000_000 are"):
        machine(cluster_spec("colossus-100k", 10_000_000))


def test_racks_of_nvl72_are_the_unit_where_nvlink_joins_a_rack() -> None:
    cluster = cluster_spec("colossus-100k").model_copy(
        update={"device": "gb200-nvl72", "gpus": 7200, "gpus_per_node": 4, "scale_up_domain": 72}
    )
    built = machine(cluster)
    assert built.counts["rack"] == 100
    assert built.nodes_per_scope["rack"] == 18
