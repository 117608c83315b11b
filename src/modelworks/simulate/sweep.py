"""Knobs turned: one or two of them over a range, or each a little, to see which matters.

A sweep changes the run spec and simulates each point with the same seed. A tornado changes the resolved scenario one
knob at a time, half and double, and ranks the knobs by what that does to the ETTR; all meet the same failures.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError

from modelworks.simulate.answers import Answer, answer
from modelworks.simulate.montecarlo import simulate
from modelworks.simulate.scenario import Scenario
from modelworks.spec.errors import InputError
from modelworks.spec.fields import ByteRate, Bytes, Count, Duration
from modelworks.spec.run import RunSpec

POINTS = 9
MOST_POINTS = 400
_FAILURES = 250
_QUANTITIES: tuple[TypeAdapter[Any], ...] = tuple(TypeAdapter(kind) for kind in (Duration, Bytes, ByteRate, Count))


@dataclass(frozen=True)
class Knob:
    """A field of the run spec and the values it takes."""

    field: str
    values: tuple[Any, ...]


@dataclass(frozen=True)
class Point:
    """One combination of values and its answer."""

    values: dict[str, Any]
    answer: Answer


def knob(text: str) -> Knob:
    """Read ``checkpoint.every=1min..60min``, ``simulate.spares.hot=0..64:5`` or ``simulate.rate=0.5,1,2``.

    A range has nine points, or as many as stand behind its colon: in equal ratios where it spans more than a factor of
    five, in equal steps otherwise.

    Raises
    ------
    InputError
        Saying how it is written.
    """
    field, equals, values = text.partition("=")
    if not equals or not field.strip() or not values.strip():
        raise InputError(f"--sweep {text!r} is not accepted: it is written field=low..high or field=a,b,c")
    field = field.strip()
    if ".." not in values:
        return Knob(field, tuple(_value(each.strip(), text) for each in values.split(",")))
    ends, colon, points = values.partition(":")
    number = int(points) if points.isdigit() else POINTS
    if (colon and not points.isdigit()) or not 2 <= number <= MOST_POINTS:
        raise InputError(f"--sweep {text!r} is not accepted: a range has 2 to {MOST_POINTS} points, as in field=1..9:5")
    low, high = (_value(each.strip(), text) for each in ends.split("..", 1))
    if not isinstance(low, int | float) or not isinstance(high, int | float) or not low < high:
        raise InputError(f"--sweep {text!r} is not accepted: a range goes from a smaller to a larger number")
    spaced = np.geomspace(low, high, number) if low > 0 and high / low > 5 else np.linspace(low, high, number)
    if isinstance(low, int) and isinstance(high, int) and not _has_unit(ends):
        return Knob(field, tuple(dict.fromkeys(round(each) for each in spaced)))
    return Knob(field, tuple(float(f"{each:.6g}") for each in spaced))


def sweep(
    build: Callable[[list[str]], RunSpec],
    knobs: Sequence[Knob],
    samples: int,
    progress: Callable[[float], None] | None = None,
) -> list[Point]:
    """Simulate all combinations of the knobs' values.

    Parameters
    ----------
    build
        Makes the run spec with overrides, as ``"a.b=value"``.
    """
    combinations = list(itertools.product(*(each.values for each in knobs)))
    if len(combinations) > MOST_POINTS:
        raise InputError(f"--sweep: {len(combinations)} combinations are not accepted: up to {MOST_POINTS} are")
    points = []
    for number, combination in enumerate(combinations):
        values = {each.field: value for each, value in zip(knobs, combination, strict=True)}
        found = answer(build([f"{field}={value}" for field, value in values.items()]), samples, search=False)
        points.append(Point(values, found))
        if progress is not None:
            progress((number + 1) / len(combinations))
    return points


@dataclass(frozen=True)
class Bar:
    """What a knob does to the ETTR when it is halved and doubled."""

    name: str
    half: float
    double: float

    def width(self, middle: float) -> float:
        """The larger of the two effects."""
        return max(abs(self.half - middle), abs(self.double - middle))


def tornado(
    resolved: Scenario, samples: int, seed: int, progress: Callable[[float], None] | None = None
) -> tuple[float, list[Bar]]:
    """The finished machine's ETTR, and each knob's effect on it, the largest first."""
    trial = resolved.steady(_FAILURES)
    middle = float(simulate(trial, samples, seed).ettr.mean())
    bars = []
    for number, (name, turned) in enumerate(_KNOBS.items()):
        half, double = (float(simulate(turned(trial, by), samples, seed).ettr.mean()) for by in (0.5, 2.0))
        bars.append(Bar(name, half, double))
        if progress is not None:
            progress((number + 1) / len(_KNOBS))
    return middle, sorted(bars, key=lambda bar: -bar.width(middle))


def _rates(s: Scenario, by: float) -> Scenario:
    return replace(s, causes=tuple(replace(cause, per_s=cause.per_s * by) for cause in s.causes))


def _detection(s: Scenario, by: float) -> Scenario:
    return replace(s, causes=tuple(replace(cause, detect_s=cause.detect_s * by) for cause in s.causes))


def _repairs(s: Scenario, by: float) -> Scenario:
    return replace(s, causes=tuple(replace(cause, repair_s=cause.repair_s * by) for cause in s.causes))


def _interval(s: Scenario, by: float) -> Scenario:
    plan = s.checkpoints
    return replace(s, checkpoints=replace(plan, every_s=max(plan.every_s * by, plan.lag_s / plan.ratio, 1e-3)))


def _checkpoint_cost(s: Scenario, by: float) -> Scenario:
    plan = s.checkpoints
    changed = replace(
        plan,
        stall_s=plan.stall_s * by,
        durable_stall_s=plan.durable_stall_s * by,
        lag_s=min(plan.lag_s * by, plan.every_s * plan.ratio),
    )
    return replace(s, checkpoints=changed)


_KNOBS: dict[str, Callable[[Scenario, float], Scenario]] = {
    "failure rates": _rates,
    "restart time": lambda s, by: replace(s, restart_s=s.restart_s * by),
    "detection time": _detection,
    "checkpoint interval": _interval,
    "checkpoint cost": _checkpoint_cost,
    "hot spares": lambda s, by: replace(s, hot=int(s.hot * by)),
    "repair time": _repairs,
    "technicians": lambda s, by: replace(s, technicians=max(1, int(s.technicians * by))),
    "burn-in": lambda s, by: replace(s, burn_in_s=s.burn_in_s * by),
    "lemons": lambda s, by: replace(s, lemon_fraction=min(1.0, s.lemon_fraction * by)),
    "waits for a person": lambda s, by: replace(s, manual_fraction=min(1.0, s.manual_fraction * by)),
}


def _value(text: str, whole: str) -> Any:
    for read in (int, float):
        try:
            return read(text.replace("_", ""))
        except ValueError:
            continue
    for quantity in _QUANTITIES:
        try:
            return quantity.validate_python(text)
        except ValidationError:
            continue
    if text.replace("-", "").isalnum():
        return text
    raise InputError(f"--sweep {whole!r} is not accepted: {text!r} is no number, quantity or word")


def _has_unit(text: str) -> bool:
    return any(letter.isalpha() for letter in text)
