"""What a run costs, worked by hand."""

from __future__ import annotations

import pytest

from modelworks.plan.cost import capital_usd, cost_rules, power_w, price_of, run_cost
from modelworks.spec.catalog import entry, names
from modelworks.spec.files import cluster_spec, device_spec

HOUR, YEAR_H = 3600.0, 365.25 * 24


def test_a_months_run_of_1000_gpus_worked_by_hand() -> None:
    cluster, device, rules = cluster_spec("colossus-100k", 1000), device_spec("h100-sxm"), cost_rules()
    price = price_of(device)
    assert price is not None
    found = run_cost(cluster, device, 1000, 720 * HOUR)
    watts = (1000 * 700 * rules.draw + 125 * 4600) * 1.25
    assert found.power_w == pytest.approx(watts)
    assert found.device_hours == pytest.approx(720_000)
    assert found.energy_kwh == pytest.approx(watts * 720 / 1000)
    assert found.electricity_usd == pytest.approx(watts * 0.72 * 0.07)
    assert found.rent_usd == pytest.approx(720_000 * price.rent_usd_per_hour)
    assert found.buy_usd == pytest.approx(1000 * (price.price_usd + price.network_usd))
    share = 720 / YEAR_H
    owned = found.electricity_usd + share * (
        found.buy_usd / rules.life_years + watts * rules.site_usd_per_w / rules.site_life_years
    )
    assert found.owned_usd == pytest.approx(owned)


def test_twice_the_devices_for_half_the_time_cost_the_same() -> None:
    cluster, device = cluster_spec("colossus-100k"), device_spec("h100-sxm")
    one, two = run_cost(cluster, device, 512, 2 * HOUR), run_cost(cluster, device, 1024, HOUR)
    assert two.rent_usd == pytest.approx(one.rent_usd)
    assert two.energy_kwh == pytest.approx(one.energy_kwh)
    assert two.owned_usd == pytest.approx(one.owned_usd)


def test_prices_that_the_hardware_file_states_win() -> None:
    cluster = cluster_spec("colossus-100k").model_copy(update={"node_overhead_usd": 80_000.0})
    device = device_spec("h100-sxm").model_copy(update={"price_usd": 25_000.0, "rent_usd_per_hour": 2.0})
    price = price_of(device)
    assert price is not None
    assert run_cost(cluster, device, 8, HOUR).rent_usd == pytest.approx(16.0)
    assert capital_usd(cluster, device, price) == pytest.approx(25_000 + 10_000 + price.network_usd)


def test_without_a_price_energy_is_known_and_money_is_not() -> None:
    device = device_spec("local")
    found = run_cost(cluster_spec("local"), device, 1, HOUR)
    assert (found.rent_usd, found.buy_usd, found.owned_usd) == (None, None, None)
    assert found.energy_kwh > 0


@pytest.mark.parametrize("name", [name for name in names("prices") if name != "rules"])
def test_every_price_is_whole_and_no_rent_is_below_what_owning_costs(name: str) -> None:
    device = device_spec(name)
    price = price_of(device)
    assert price is not None
    year = run_cost(cluster_spec("colossus-100k"), device, 8, YEAR_H * HOUR)
    assert year.owned_usd is not None
    assert year.rent_usd is not None
    assert year.owned_usd < year.rent_usd
    assert entry("prices", name).provenance.certainty in ("estimated", "assumed")


def test_colossus_draws_what_was_reported_of_it() -> None:
    """150 MW at 100,000 H100, as of autumn 2024."""
    cluster = cluster_spec("colossus-100k")
    assert power_w(cluster, device_spec("h100-sxm"), 100_000, cost_rules()) == pytest.approx(150e6, rel=0.1)
