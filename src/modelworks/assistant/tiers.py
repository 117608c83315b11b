"""Tiers: three that are there from the start, as data, and those that the operator made or changed."""

from __future__ import annotations

import json
import tomllib
from importlib.resources import files
from typing import Any

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from modelworks.assistant.tables import TierRow, UserRow
from modelworks.serve.access import Tier
from modelworks.spec.errors import InputError
from modelworks.spec.fields import validate


def given_tiers() -> dict[str, Tier]:
    """The tiers of ``assistant/tiers.toml``."""
    text = (files("modelworks.assistant") / "tiers.toml").read_text(encoding="utf-8")
    return {
        name: validate(Tier, {"name": name, **limits}, "tiers.toml") for name, limits in tomllib.loads(text).items()
    }


def tiers(session: Session) -> dict[str, Tier]:
    """All tiers; the operator's stand before those that are given."""
    own = {row.name: Tier.model_validate_json(row.limits) for row in session.scalars(select(TierRow))}
    return given_tiers() | own


def tier_named(session: Session, name: str) -> Tier:
    """One tier.

    Raises
    ------
    InputError
        If there is none of that name.
    """
    row = session.get(TierRow, name)
    if row is not None:
        return Tier.model_validate_json(row.limits)
    given = given_tiers()
    if name not in given:
        raise InputError(f"there is no tier {name!r}; there are {', '.join(tiers(session))}")
    return given[name]


def set_tier(session: Session, name: str, changes: list[str]) -> Tier:
    """Make a tier, or change some of its limits, each given as ``key=value`` in TOML's words.

    Raises
    ------
    InputError
        Naming what is not accepted.
    """
    known = tiers(session)
    values: dict[str, Any] = known[name].model_dump() if name in known else {"name": name}
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals:
            raise InputError(
                f"{change!r} is not accepted: key=value is, such as tokens_per_day=2M or models='[\"grok-*\"]'"
            )
        values[key.strip()] = _value(value.strip())
    tier = validate(Tier, values, f"tier {name}")
    session.merge(TierRow(name=name, limits=tier.model_dump_json()))
    return tier


def remove_tier(session: Session, name: str) -> None:
    """Remove an operator's tier; one that is given goes back to what it was.

    Raises
    ------
    InputError
        If there is no such tier of the operator's, or users have it.
    """
    if session.get(TierRow, name) is None:
        raise InputError(f"there is no tier {name!r} that could be removed")
    if name not in given_tiers() and session.scalar(select(UserRow.id).where(UserRow.tier == name).limit(1)):
        raise InputError(f"the tier {name!r} can't be removed: users have it; give them another with users set")
    session.execute(delete(TierRow).where(TierRow.name == name))


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        pass
    try:
        return json.loads(text)
    except ValueError:
        return text
