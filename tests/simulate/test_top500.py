"""The list's machines are those of the list, and the estimates follow from them by the stated methods."""

from __future__ import annotations

import pytest

from modelworks.simulate.machine import machine
from modelworks.simulate.top500 import beside, hpl, hpl_mxp
from modelworks.spec import cluster_spec
from modelworks.spec.facts import top500


def test_the_machines_named_in_2024_are_there_with_what_the_list_says() -> None:
    listed = {each.title: each for each in top500()}
    for name, rmax, rpeak, power in (
        ("El Capitan", 1742.00, 2746.38, 29_581),
        ("Frontier", 1353.00, 2055.72, 24_607),
        ("Aurora", 1012.00, 1980.01, 38_698),
        ("Fugaku", 442.01, 537.21, 29_899),
    ):
        assert (listed[name].rmax_flops, listed[name].rpeak_flops) == pytest.approx((rmax * 1e15, rpeak * 1e15))
        assert listed[name].power_w == pytest.approx(power * 1e3)
    assert listed["Eagle"].rmax_flops == pytest.approx(561.2e15)
    assert all(each.rmax_flops < each.rpeak_flops for each in listed.values())
    # Published efficiencies: Frontier 54.98 and El Capitan 58.89 GFLOP/s for a watt (Green500, November 2024).
    for name, efficiency in (("Frontier", 54.98), ("El Capitan", 58.89)):
        assert listed[name].rmax_flops / (listed[name].power_w or 1) == pytest.approx(efficiency * 1e9, rel=0.01)


def test_the_hpl_estimate_gives_a_listed_machine_its_own_result() -> None:
    eagle = hpl(machine(cluster_spec("colossus-100k", 14_400)), top500())
    assert eagle is not None
    assert eagle.flops == pytest.approx(561.2e15)
    assert eagle.low_flops <= eagle.flops <= eagle.high_flops


def test_the_hpl_mxp_estimate_gives_selene_its_own_result() -> None:
    selene = cluster_spec("h100-superpod", 4480).model_copy(update={"device": "a100-80gb"})
    found = hpl_mxp(machine(selene), top500())
    assert found is not None
    assert found.flops == pytest.approx(0.63e18, rel=1e-6)


def test_a_chip_that_the_list_lacks_gets_no_hpl_estimate() -> None:
    b200 = cluster_spec("colossus-100k").model_copy(update={"device": "b200"})
    assert hpl(machine(b200), top500()) is None


def test_100_000_h100_lead_the_list_in_what_training_needs() -> None:
    found = beside(machine(cluster_spec("colossus-100k")), tokens_per_day=1e12)
    assert found.rows[0].estimated
    assert found.rows[0].bf16_flops == pytest.approx(98.94e18, rel=1e-3)
    assert found.hpl is not None
    assert found.hpl.flops == pytest.approx(3.9e18, rel=0.01)
    assert len(found.rows) > 10
