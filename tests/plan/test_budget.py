"""What a sum of money, a power supply or a date allows."""

from __future__ import annotations

import json
from datetime import date

import pytest

from modelworks.plan.budget import Budget, Limits, budget, parse_date, parse_power, parse_usd
from modelworks.plan.cost import cost_rules, power_w
from modelworks.spec import InputError
from modelworks.spec.files import cluster_spec, device_spec

TODAY = date(2026, 11, 1)


@pytest.fixture(scope="module")
def six_billion() -> Budget:
    return budget(cluster_spec("colossus-100k"), Limits(usd=6e9, by=date(2025, 10, 1)), today=TODAY)


def test_six_billion_buys_a_cluster_of_the_size_of_colossus(six_billion: Budget) -> None:
    assert 50_000 < six_billion.devices < 150_000
    assert six_billion.bound_by == "money"
    assert six_billion.devices_low < six_billion.devices < six_billion.devices_high
    assert six_billion.capital_usd is not None
    assert six_billion.running_usd is not None
    assert six_billion.capital_usd + six_billion.running_usd == pytest.approx(6e9, rel=1e-3)
    assert any("2025-10-01 is past" in note for note in six_billion.notes)


def test_the_compute_is_spent_as_the_laws_say(six_billion: Budget) -> None:
    for best in six_billion.optima:
        assert 6 * best.parameters * best.tokens == pytest.approx(six_billion.compute_flop)
    for many in six_billion.expert_optima:
        assert 6 * many.best.parameters * many.best.tokens == pytest.approx(six_billion.compute_flop)
        assert many.dense_compute_flop > six_billion.compute_flop
    assert any("its authors state no errors" in note for note in six_billion.notes)
    device = device_spec("h100-sxm")
    most = six_billion.devices * device.peak_flops["bf16"] * six_billion.train_days * 86400
    assert six_billion.compute_flop <= most * six_billion.mfu * cost_rules().goodput * (1 + 1e-9)
    json.dumps(six_billion.as_dict())


def test_power_bounds_what_runs_at_once() -> None:
    cluster = cluster_spec("colossus-100k")
    found = budget(cluster, Limits(power_w=15e6), today=TODAY)
    assert found.bound_by == "power"
    assert found.power_w <= 15e6
    node = power_w(cluster, device_spec("h100-sxm"), 8, cost_rules())
    assert found.power_w + node > 15e6
    assert found.rented_devices is None


def test_of_two_limits_the_tighter_one_binds() -> None:
    cluster = cluster_spec("colossus-100k")
    both = budget(cluster, Limits(usd=6e9, power_w=15e6), today=TODAY)
    assert both.bound_by == "power"
    assert both.devices == budget(cluster, Limits(power_w=15e6), today=TODAY).devices


def test_an_earlier_date_leaves_less_compute() -> None:
    cluster = cluster_spec("colossus-100k")
    late, early = (
        budget(cluster, Limits(power_w=15e6, by=day), today=TODAY) for day in (date(2027, 10, 1), date(2027, 5, 1))
    )
    assert early.compute_flop < late.compute_flop
    assert early.train_days == (date(2027, 5, 1) - TODAY).days - round(cost_rules().build_days)


@pytest.mark.parametrize(
    ("limits", "sentence"),
    [
        (Limits(by=date(2027, 10, 1)), "--by alone bounds no cluster: give --budget or --power"),
        (Limits(usd=1e9, by=date(2026, 12, 1)), "--by 2026-12-01 is not accepted: building takes until 2027-03-03"),
        (Limits(usd=1000.0), "--budget 1000 is not accepted: a node of 8 x h100-sxm needs"),
        (Limits(power_w=500.0), "--power 500 W is not accepted: a node of 8 x h100-sxm needs 11.7 kW"),
    ],
)
def test_limits_that_allow_nothing_are_refused_in_a_sentence(limits: Limits, sentence: str) -> None:
    with pytest.raises(InputError) as refused:
        budget(cluster_spec("colossus-100k"), limits, today=TODAY)
    assert sentence in str(refused.value)


def test_a_device_without_a_price_is_refused_in_a_sentence() -> None:
    with pytest.raises(InputError, match="no price of local is known: state price_usd"):
        budget(cluster_spec("local"), Limits(usd=1e6), today=TODAY)


@pytest.mark.parametrize(("text", "value"), [("6e9", 6e9), ("6B", 6e9), ("$250M", 2.5e8), ("1_000_000", 1e6)])
def test_a_sum_is_read_with_its_unit(text: str, value: float) -> None:
    assert parse_usd(text) == value


@pytest.mark.parametrize(("text", "value"), [("150MW", 1.5e8), ("1.2 GW", 1.2e9), ("300kW", 3e5)])
def test_a_power_is_read_with_its_unit(text: str, value: float) -> None:
    assert parse_power(text) == value


def test_a_date_is_a_day_or_a_month() -> None:
    assert parse_date("2027-10") == date(2027, 10, 1)
    assert parse_date("2027-10-15") == date(2027, 10, 15)


@pytest.mark.parametrize("text", ["", "0", "-5", "six", "6 EUR", "nan", "1e999"])
def test_what_is_no_sum_power_or_date_is_refused(text: str) -> None:
    for parse in (parse_usd, parse_power, parse_date):
        with pytest.raises(InputError, match="is not accepted"):
            parse(text)
