"""Scaling laws give back what their papers say."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelworks.plan.scaling import compute_for, expert_optima, joint_law, optima, optimum, routed_law, scaling_law

CHINCHILLA = 5.76e23
"""FLOPs that Gopher and Chinchilla took."""


def test_the_refit_agrees_with_chinchilla_itself() -> None:
    """Hoffmann et al. 2022 trained 70 billion parameters on 1.4 trillion tokens, 20 for each."""
    best = optimum(scaling_law("besiroglu-2024"), CHINCHILLA)
    assert best.parameters == pytest.approx(70e9, rel=0.1)
    assert best.tokens == pytest.approx(1.4e12, rel=0.1)
    assert best.parameters_low is not None
    assert best.parameters_high is not None
    assert best.parameters_low < 70e9 < best.parameters_high


def test_approach_3_as_published_wants_a_smaller_model() -> None:
    """Hoffmann et al. 2022, table A3: 40 billion parameters for Gopher's compute; a = 0.46, b = 0.54 (table 2)."""
    law = scaling_law("hoffmann-2022")
    assert optimum(law, CHINCHILLA).parameters == pytest.approx(40e9, rel=0.05)
    assert law.allocation == pytest.approx(0.46, abs=0.005)


def test_the_refits_allocation_is_the_published_one() -> None:
    """Besiroglu et al. 2024, table 1: a = 0.512."""
    assert scaling_law("besiroglu-2024").allocation == pytest.approx(0.5126, abs=5e-4)


@given(st.floats(1e18, 1e28), st.sampled_from(["besiroglu-2024", "hoffmann-2022"]))
def test_no_other_split_of_the_same_compute_does_better(compute: float, name: str) -> None:
    law = scaling_law(name)
    best = optimum(law, compute)
    assert 6 * best.parameters * best.tokens == pytest.approx(compute)
    for factor in np.geomspace(0.2, 5, 41):
        parameters = best.parameters * float(factor)
        assert law.loss(parameters, compute / 6 / parameters) >= best.loss - 1e-12


def test_more_compute_widens_the_range_and_lowers_the_loss() -> None:
    small, large = optima(1e22)[0], optima(1e26)[0]
    assert large.loss < small.loss
    assert math.log(large.parameters_high / large.parameters_low) > math.log(  # type: ignore[operator]
        small.parameters_high / small.parameters_low  # type: ignore[operator]
    )


def test_experts_saturate_and_stop_helping_where_clark_et_al_say() -> None:
    """Clark et al. 2022: one expert counts as E_start; past N = 10^(-b/c), about 10^12 for S-BASE, none helps."""
    law = routed_law()
    assert law.saturated(1.0) == pytest.approx(law.experts_start)
    assert law.saturated(1e12) == pytest.approx(law.experts_most, rel=1e-6)
    limit = 10 ** (-law.experts / law.both)
    assert limit == pytest.approx(1e12, rel=0.1)
    assert law.dense_equivalent(limit * 2, 64) == limit * 2
    assert law.dense_equivalent(1.3e9, 1) == pytest.approx(1.3e9)


def test_more_experts_count_for_more_parameters_and_less_so_in_larger_models() -> None:
    law = routed_law()
    gains = [law.dense_equivalent(1.3e9, experts) for experts in (1, 2, 8, 64, 512)]
    assert gains == sorted(gains)
    assert law.dense_equivalent(25e6, 64) / 25e6 > law.dense_equivalent(1.3e9, 64) / 1.3e9 > 1


@pytest.mark.parametrize(
    ("experts", "m", "mu", "n", "nu"),
    [
        (1, 30.3640, 0.1817, 53.9838, 0.1965),
        (2, 27.7982, 0.1780, 66.8401, 0.2065),
        (4, 24.8462, 0.1731, 87.7022, 0.2192),
        (8, 21.8330, 0.1676, 119.9126, 0.2338),
        (16, 19.0159, 0.1617, 167.5073, 0.2494),
        (32, 16.5424, 0.1557, 234.6726, 0.2652),
    ],
)
def test_the_joint_law_has_hoffmanns_form_for_each_number_of_experts(
    experts: int, m: float, mu: float, n: float, nu: float
) -> None:
    """Ludziejewski et al. 2025, table 4, as far as table 3's rounded coefficients go."""
    law = joint_law().at(experts)
    assert law.parameters_factor == pytest.approx(m, rel=3e-3)
    assert law.parameters_exponent == pytest.approx(mu, abs=2e-4)
    assert law.tokens_factor == pytest.approx(n, rel=3e-3)
    assert law.tokens_exponent == pytest.approx(nu, abs=2e-4)
    assert law.irreducible == 1.3637


@pytest.mark.parametrize(
    ("compute", "experts", "active", "tokens"),
    [
        (1e20, 1, 1.7e9, 9.7e9), (1e20, 8, 990e6, 17e9), (1e20, 32, 669e6, 24.9e9),
        (1e21, 1, 5.7e9, 29.3e9), (1e21, 8, 3.8e9, 44.3e9), (1e21, 32, 2.85e9, 58.4e9),
        (1e22, 1, 18.8e9, 88.6e9), (1e22, 8, 14.4e9, 115.8e9), (1e22, 32, 12.2e9, 136.9e9),
    ],
)  # fmt: skip
def test_the_joint_laws_optima_are_the_published_ones(
    compute: float, experts: int, active: float, tokens: float
) -> None:
    """Ludziejewski et al. 2025, table 1."""
    best = optimum(joint_law().at(experts), compute)
    assert best.parameters == pytest.approx(active, rel=0.03)
    assert best.tokens == pytest.approx(tokens, rel=0.03)


def test_with_more_experts_the_same_compute_goes_further() -> None:
    """Ludziejewski et al. 2025, findings 1 and 2."""
    found = expert_optima(1e22)
    dense = optimum(joint_law().at(1), 1e22)
    losses = [dense.loss, *(many.best.loss for many in found)]
    assert losses == sorted(losses, reverse=True)
    assert all(many.best.tokens > dense.tokens for many in found)
    savings = [many.dense_compute_flop for many in found]
    assert savings == sorted(savings)
    assert savings[0] > 1e22
    for many in found:
        assert optimum(joint_law().at(1), many.dense_compute_flop).loss == pytest.approx(many.best.loss, rel=1e-9)
        assert many.best.parameters < many.total_parameters < many.experts * many.best.parameters


@given(st.floats(1e18, 1e27))
def test_the_compute_for_a_loss_is_what_gives_that_loss(compute: float) -> None:
    law = scaling_law("besiroglu-2024")
    assert compute_for(law, optimum(law, compute).loss) == pytest.approx(compute, rel=1e-6)
