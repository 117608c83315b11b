"""The base of every section of a spec, and the quantities that a spec may state with their units.

Three ideas: a section is frozen and refuses keys that it doesn't know, naming the nearest one that it does; a
quantity is kept in SI base units and may be written with its unit (``"5min"``, ``"80GiB"``, ``"400Gbit/s"``);
every error becomes one sentence (`InputError`) that names the field, the value and what is accepted.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Annotated, Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from modelworks.spec.errors import InputError

_DURATION_S = {
    unit: Decimal(size) for unit, size in (("ms", "0.001"), ("s", 1), ("min", 60), ("h", 3600), ("d", 86400))
}
_BYTES = {"B": Decimal(1)} | {
    f"{prefix}{suffix}": Decimal(base**power)
    for power, prefix in enumerate("KMGTP", start=1)
    for suffix, base in (("B", 1000), ("iB", 1024))
}
_RATE_BYTES = {
    f"{prefix}{unit}/s": Decimal(1000**power) / bits
    for power, prefix in enumerate(["", "K", "M", "G", "T"])
    for unit, bits in (("B", 1), ("bit", 8))
}
_COUNT = {"K": Decimal(10**3), "M": Decimal(10**6), "B": Decimal(10**9), "T": Decimal(10**12)}
_QUANTITY = re.compile(r"\s*([+-]?\d+(?:_\d+)*(?:\.\d+)?(?:[eE][+-]?\d+)?)\s*([A-Za-z/]*)\s*")


def _quantity(units: Mapping[str, Decimal], example: str) -> BeforeValidator:
    """Reads ``"2.3TB"`` as a number of base units, exactly; what is not text is left to the field's type."""

    def parse(value: Any) -> Any:
        if not isinstance(value, str):
            return value
        matched = _QUANTITY.fullmatch(value)
        if matched is None or matched[2] not in units or not math.isfinite(float(matched[1])):
            accepted = ", ".join(units)
            raise ValueError(f"a number with one of the units {accepted} is accepted, such as {example!r}")
        number = Decimal(matched[1]) * units[matched[2]]
        return int(number) if number == number.to_integral_value() else float(number)

    return BeforeValidator(parse)


Duration = Annotated[float, _quantity(_DURATION_S, "5min"), Field(ge=0, allow_inf_nan=False)]
"""A time in seconds; ``"5min"``, ``"90s"``, ``"2h"`` are accepted."""
Bytes = Annotated[int, _quantity(_BYTES, "80GiB"), Field(ge=0)]
"""A size in bytes; ``"80GiB"`` and ``"2TB"`` are accepted."""
ByteRate = Annotated[float, _quantity(_RATE_BYTES, "400Gbit/s"), Field(gt=0, allow_inf_nan=False)]
"""A rate in bytes per second; ``"400Gbit/s"`` and ``"3.35TB/s"`` are accepted."""
Count = Annotated[int, _quantity(_COUNT, "2B"), Field(gt=0)]
"""A positive count; ``"2B"`` and ``"1.5T"`` are accepted."""
PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class Section(BaseModel):
    """A frozen table of a spec that knows all its keys.

    Types are TOML's own: text doesn't stand for a number, nor true for 1; a whole number does where a number is asked.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=(), allow_inf_nan=False)


SectionType = TypeVar("SectionType", bound=Section)


def validate(kind: type[SectionType], values: Mapping[str, Any], where: str = "") -> SectionType:
    """Build a section from plain values, or raise one sentence.

    Parameters
    ----------
    kind
        The section's class.
    values
        Plain values as TOML gives them.
    where
        What is being read (a file name), put in front of the sentence.

    Raises
    ------
    InputError
        Naming the first offending field, its value, and what is accepted.
    """
    try:
        return kind.model_validate(dict(values))
    except ValidationError as error:
        raise InputError((f"{where}: " if where else "") + explain(error, kind)) from None


def explain(error: ValidationError, kind: type[BaseModel]) -> str:
    """One sentence for the first fault that pydantic found in a section of class `kind`."""
    faults = error.errors(include_url=False)
    # An unknown key explains a missing one more often than the other way round.
    fault = next((f for f in faults if f["type"] == "extra_forbidden"), faults[0])
    location = _keys(kind, fault["loc"])
    field = ".".join(map(str, location))
    if fault["type"] == "extra_forbidden":
        known = sorted(known_keys(_section_at(kind, location[:-1])))
        elsewhere = [key for key in dotted_keys(kind) if key.rsplit(".", 1)[-1] == location[-1]]
        return f"unknown key {field!r}; {nearest(str(location[-1]), known, elsewhere)}"
    if fault["type"] == "missing":
        return f"{field!r} is missing"
    # Each branch of a union ("a number or 'auto'") has a fault of its own at the same place.
    branches = [f for f in faults if _keys(kind, f["loc"]) == location]
    accepted = " or ".join(dict.fromkeys(map(_accepted, branches)))
    if fault["type"] == "value_error":
        if isinstance(fault["input"], Mapping):
            return f"{field}: {accepted}" if field else accepted
        return f"{field} = {_shown(fault['input'])} is not accepted: {accepted}"
    return f"{field} = {_shown(fault['input'])} is not accepted: it should be {accepted}"


_ACCEPTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text in quotes",
    "list_type": "a list",
    "dict_type": "a table",
    "model_type": "a table",
}


def _accepted(fault: Mapping[str, Any]) -> str:
    """What would have been accepted, in TOML's words instead of Python's."""
    stated = _ACCEPTED.get(fault["type"])
    return stated or re.sub(r"^(Value error, |Input should be )", "", fault["msg"])


def whole_numbers(option: str, given: str) -> list[int]:
    """Positive whole numbers with commas between; none for nothing.

    Raises
    ------
    InputError
        Naming the option and the part that is no such number.
    """
    found = []
    for part in filter(None, (piece.strip() for piece in given.split(","))):
        number = part.replace("_", "")
        if not number.isdecimal() or int(number) == 0:
            raise InputError(f"{option} {part} is not accepted: positive whole numbers with commas between are")
        found.append(int(number))
    return found


def nearest(given: str, known: Iterable[str], elsewhere: Iterable[str] = ()) -> str:
    """The hint behind a wrong name: the nearest one that is known, or all of them."""
    known = list(known)
    for candidate in elsewhere:
        return f"did you mean {candidate!r}?"
    close = difflib.get_close_matches(given, known, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]!r}?"
    return "known are " + ", ".join(known) if known else "none is known here"


def known_keys(kind: type[BaseModel] | None) -> list[str]:
    """The keys that a section has."""
    return list(kind.model_fields) if kind is not None else []


def dotted_keys(kind: type[BaseModel], prefix: str = "") -> list[str]:
    """All keys of a section and of those in it, dotted: ``train.seq_len``."""
    keys: list[str] = []
    for name, field in kind.model_fields.items():
        inner = _section_in(field.annotation)
        keys.append(prefix + name)
        if inner is not None:
            keys += dotted_keys(inner, f"{prefix}{name}.")
    return keys


def _section_at(kind: type[BaseModel], location: Iterable[Any]) -> type[BaseModel] | None:
    section: type[BaseModel] | None = kind
    for part in location:
        if section is None or part not in section.model_fields:
            return section
        section = _section_in(section.model_fields[part].annotation)
    return section


def _section_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        inner = _section_in(argument)
        if inner is not None:
            return inner
    return None


def _keys(kind: type[BaseModel], location: Iterable[Any]) -> list[Any]:
    """The keys in a location, without the names that pydantic adds for a union's branches."""
    keys: list[Any] = []
    place: Any = kind
    for part in location:
        container, section = _container_in(place), _section_in(place)
        if container is not None:
            keys.append(part)
            place = get_args(container)[-1]
        elif section is not None:
            keys.append(part)
            place = section.model_fields[part].annotation if part in section.model_fields else None
    return keys


def _container_in(annotation: Any) -> Any:
    """The list or table among an annotation's branches, if any."""
    if get_origin(annotation) in {dict, list}:
        return annotation
    return next((found for part in get_args(annotation) if (found := _container_in(part)) is not None), None)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
