"""How large a model, and how many tokens, a given amount of compute is best spent on.

Loss after N parameters and D tokens is E + A / N^alpha + B / D^beta (Hoffmann et al. 2022, arXiv:2203.15556, approach
3), and training takes 6 N D FLOPs; so for given FLOPs one N is best. Hoffmann's own parameters and the refit of
Besiroglu et al. 2024 (arXiv:2404.10102) disagree, by much where compute is large: both are given, and the refit's
standard error as a range. Experts count for more than the parameters that a token meets: Clark et al. 2022
(arXiv:2202.01169) say for how many of a dense model. Ludziejewski et al. 2025 (arXiv:2502.05172) put dense models and
experts into one law, which for each number of experts has Hoffmann's form with other numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from modelworks.spec import catalog
from modelworks.spec.fields import PositiveFloat, PositiveInt, Section, validate

FLOP_PER_PARAMETER_AND_TOKEN = 6.0
FEED_FORWARD_SHARE = 2 / 3
"""Of a dense model's parameters, its feed-forward networks' (8 h^2 of 12 h^2 in a layer), which experts multiply."""
_EIGHTY_PERCENT = 1.2816
"""Standard deviations to either side that hold 80 % of a normal distribution."""


class ScalingLaw(Section):
    """E + A / N^alpha + B / D^beta."""

    name: str
    irreducible: PositiveFloat
    parameters_factor: PositiveFloat
    parameters_exponent: PositiveFloat
    tokens_factor: PositiveFloat
    tokens_exponent: PositiveFloat
    allocation_error: PositiveFloat | None = None
    """Standard error of `allocation`."""
    fitted_compute_flop: PositiveFloat | None = None
    """Where the law is surest: the middle of the runs that it was fitted on."""

    @property
    def allocation(self) -> float:
        """The power of compute that the best size grows with (Hoffmann et al. 2022, eq. 4)."""
        return self.tokens_exponent / (self.parameters_exponent + self.tokens_exponent)

    def loss(self, parameters: float, tokens: float) -> float:
        """Nats per token on the authors' data and vocabulary."""
        return float(
            self.irreducible
            + self.parameters_factor * parameters**-self.parameters_exponent
            + self.tokens_factor * tokens**-self.tokens_exponent
        )


class JointLaw(Section):
    """Ludziejewski et al. 2025, eq. 6: a E'^delta N^(alpha + gamma ln E') + b E'^omega D^(beta + zeta ln E') + c.

    N are the parameters that a token meets, E' is the number of experts saturated as in `saturated`.
    """

    name: str
    parameters_factor: PositiveFloat
    parameters_exponent: float
    parameters_experts: float
    parameters_both: float
    tokens_factor: PositiveFloat
    tokens_exponent: float
    tokens_experts: float
    tokens_both: float
    experts_start: PositiveFloat
    experts_most: PositiveFloat
    irreducible: PositiveFloat
    most_experts: PositiveInt
    """Up to how many experts the law was fitted."""
    allocation_error: PositiveFloat | None = None
    fitted_compute_flop: PositiveFloat | None = None

    def at(self, experts: float) -> ScalingLaw:
        """The law of a model with so many experts for each that a token meets; 1 is a dense model."""
        count = saturated(experts, self.experts_start, self.experts_most)
        return ScalingLaw(
            name=self.name,
            irreducible=self.irreducible,
            parameters_factor=self.parameters_factor * count**self.parameters_experts,
            parameters_exponent=-(self.parameters_exponent + self.parameters_both * math.log(count)),
            tokens_factor=self.tokens_factor * count**self.tokens_experts,
            tokens_exponent=-(self.tokens_exponent + self.tokens_both * math.log(count)),
            allocation_error=self.allocation_error,
            fitted_compute_flop=self.fitted_compute_flop,
        )


def saturated(experts: float, start: float, most: float) -> float:
    """A number of experts, bent so that 1 counts as `start` and very many as `most` (Clark et al. 2022, eq. 5)."""
    shift = 1.0 / (1.0 / start - 1.0 / most)
    return 1.0 / (1.0 / (experts - 1.0 + shift) + 1.0 / most)


class RoutedLaw(Section):
    """Clark et al. 2022, eq. 2 and 7: loss of a model with experts by its size and their number; logarithms base 10."""

    name: str
    size: float
    experts: float
    both: float
    offset: float
    experts_start: PositiveFloat
    experts_most: PositiveFloat

    def saturated(self, experts: float) -> float:
        """The number of experts, saturated at both ends."""
        return saturated(experts, self.experts_start, self.experts_most)

    def loss(self, parameters: float, experts: float) -> float:
        """Nats per token after the 130 billion tokens of the study."""
        n, e = math.log10(parameters), math.log10(self.saturated(experts))
        return float(10.0 ** (self.size * n + self.experts * e + self.both * n * e + self.offset))

    def dense_equivalent(self, parameters: float, experts: float) -> float:
        """Parameters of the dense model with the same loss (their effective parameter count, section 5.1).

        At least `parameters`: where the law would have experts do harm, it is beyond what it was fitted on.
        """
        one = math.log10(self.saturated(1.0))
        wanted = math.log10(self.loss(parameters, experts)) - self.experts * one - self.offset
        return float(max(parameters, 10.0 ** (wanted / (self.size + self.both * one))))


@dataclass(frozen=True)
class Optimum:
    """What a law would do with some compute."""

    law: str
    compute_flop: float
    parameters: float
    tokens: float
    loss: float
    parameters_low: float | None
    """The best size lies between this and `parameters_high` with 80 % confidence; None where no error is known."""
    parameters_high: float | None

    def as_dict(self) -> dict[str, Any]:
        """The same as plain values, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class ExpertOptimum:
    """What some compute is best spent on with experts."""

    experts: int
    """For each expert that a token meets."""
    best: Optimum
    """Its parameters are those that a token meets."""
    total_parameters: float
    dense_compute_flop: float
    """What a dense model would take for the same loss, by the same law."""


def scaling_law(name: str) -> ScalingLaw:
    """A law of the catalog."""
    return validate(ScalingLaw, {"name": name} | catalog.entry("scaling", name).values, where=f"scaling {name}")


def routed_law(name: str = "clark-2022") -> RoutedLaw:
    """The law for models with experts."""
    return validate(RoutedLaw, {"name": name} | catalog.entry("scaling", name).values, where=f"scaling {name}")


def optimum(law: ScalingLaw, compute_flop: float) -> Optimum:
    """The size and tokens with the lowest loss for some compute (Hoffmann et al. 2022, eq. 4).

    Its range takes the standard error of the allocation's power from where the law was fitted to the asked compute.
    """
    a, b = law.parameters_exponent, law.tokens_exponent
    scale = (a * law.parameters_factor / (b * law.tokens_factor)) ** (1.0 / (a + b))
    products = compute_flop / FLOP_PER_PARAMETER_AND_TOKEN
    parameters = scale * products**law.allocation
    low = high = None
    if law.allocation_error is not None and law.fitted_compute_flop is not None:
        reach = abs(math.log(compute_flop / law.fitted_compute_flop))
        factor = math.exp(_EIGHTY_PERCENT * law.allocation_error * reach)
        low, high = parameters / factor, parameters * factor
    tokens = products / parameters
    return Optimum(law.name, compute_flop, parameters, tokens, law.loss(parameters, tokens), low, high)


def optima(compute_flop: float) -> tuple[Optimum, ...]:
    """What each law would do; the refit, which agrees with Hoffmann's other two approaches, first."""
    return tuple(optimum(scaling_law(name), compute_flop) for name in ("besiroglu-2024", "hoffmann-2022"))


def joint_law(name: str = "ludziejewski-2025") -> JointLaw:
    """The law for dense models and models with experts together."""
    return validate(JointLaw, {"name": name} | catalog.entry("scaling", name).values, where=f"scaling {name}")


def expert_optima(compute_flop: float, numbers: Sequence[int] = (4, 8, 16, 32)) -> tuple[ExpertOptimum, ...]:
    """What the joint law would do with some compute for several numbers of experts."""
    law, dense = joint_law(), joint_law().at(1)
    found = []
    for experts in numbers:
        best = optimum(law.at(experts), compute_flop)
        total = best.parameters * (1.0 - FEED_FORWARD_SHARE + FEED_FORWARD_SHARE * experts)
        found.append(ExpertOptimum(experts, best, total, compute_for(dense, best.loss)))
    return tuple(found)


def compute_for(law: ScalingLaw, loss: float) -> float:
    """FLOPs with which a law's best model reaches a loss.

    At the optimum both terms shrink with the same power of compute, a b / (a + b) (Hoffmann et al. 2022, eq. 4); so
    one point of the curve gives all of it.
    """
    a, b = law.parameters_exponent, law.tokens_exponent
    anchor = optimum(law, 1e21)
    ratio = (anchor.loss - law.irreducible) / (loss - law.irreducible)
    return float(1e21 * ratio ** ((a + b) / (a * b)))
