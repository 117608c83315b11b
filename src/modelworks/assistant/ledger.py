"""What is used, and what may still be: one row per request, and limits that are sums over these rows.

A request's row is written before the engine is asked, with all the tokens that it could use, in the same transaction
in which the limits are looked at; so requests that come at once can't share what one of them could have. When it ends,
the row gets what it has used. A row whose process has died holds nothing back: each process says every few seconds
which of its requests still run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from sqlalchemy import BigInteger, case, cast, delete, func, select, update
from sqlalchemy.orm import Session

from modelworks.assistant.database import Database
from modelworks.assistant.removal import remove_conversations
from modelworks.assistant.tables import ConversationRow, TeamRow, UsageRow, UserRow
from modelworks.assistant.tiers import tiers
from modelworks.serve.access import Grant, Outcome, Principal, Tier, Wanted
from modelworks.serve.config import PriceConfig
from modelworks.serve.errors import RequestError
from modelworks.spec.errors import InputError

DAY_S = 86400.0
BEAT_S = 15.0
_DEAD_S = 4 * BEAT_S
_AT_ONCE = 500
"""Rows of one statement; SQLite takes no more than so many values."""
_LEAST_ANSWER = 16
"""Tokens below which what is left of a day is not enough for an answer."""


USAGE_COLUMNS = (
    "user",
    "team",
    "model",
    "requests",
    "failed",
    "prompt_tokens",
    "cached_tokens",
    "completion_tokens",
)
"""What `Ledger.usage` gives."""


class Ledger:
    """Keeps account of requests in a database, for all servers that share it.

    Parameters
    ----------
    database : Database
        Where it is kept.
    clock
        Gives the time in seconds since 1970.
    """

    def __init__(self, database: Database, clock: Callable[[], float] = time.time) -> None:
        self._database = database
        self._clock = clock
        self._running: set[int] = set()

    def admit(self, principal: Principal, wanted: Wanted) -> Grant:
        """Set aside what a request may use; see `serve.access.Access.admit`."""
        now, tier = self._clock(), principal.tier
        with self._database.write() as session:
            # Where writers don't exclude each other anyway, a user's requests do.
            user = session.get(UserRow, principal.user_id, with_for_update=True)
            if user is None or user.disabled:
                raise RequestError("this key is not valid", status=401, code="invalid_api_key")
            alive = UsageRow.open & (UsageRow.alive > now - _DEAD_S)
            self._check_parallel(session, principal, alive)
            if wanted.answers and wanted.endpoint != "embeddings":
                self._check_messages(session, principal, wanted, alive, now)
            answer = min(tier.answer, wanted.answer_tokens) if wanted.answer_tokens else 0
            if tier.tokens_per_day is not None:
                answer = self._left(session, principal, wanted, alive, now, answer)
            row = UsageRow(
                at=now,
                user_id=user.id,
                team_id=user.team_id,
                key_id=principal.key_id,
                endpoint=wanted.endpoint,
                model=wanted.model,
                answers=wanted.answers,
                open=True,
                alive=now,
                reserved_tokens=wanted.prompt_tokens + answer * wanted.answers,
                prompt_tokens=0,
                cached_tokens=0,
                completion_tokens=0,
                status=0,
                first_s=None,
                seconds=0.0,
            )
            session.add(row)
            session.flush()
            grant = Grant(row.id, answer)
        self._running.add(grant.id)
        return grant

    def _check_parallel(self, session: Session, principal: Principal, alive: Any) -> None:
        most = principal.tier.parallel
        running = session.scalar(
            select(func.count()).select_from(UsageRow).where(UsageRow.user_id == principal.user_id, alive)
        )
        if (running or 0) >= most:
            raise _limited(principal.tier, f"{most} requests at once", 1.0)

    def _check_messages(self, session: Session, principal: Principal, wanted: Wanted, alive: Any, now: float) -> None:
        tier = principal.tier
        if tier.messages is None:
            return
        counted = (
            UsageRow.user_id == principal.user_id,
            UsageRow.at > now - tier.window_s,
            UsageRow.endpoint != "embeddings",
            alive | _was_answered(),
        )
        sent, first = session.execute(select(func.sum(UsageRow.answers), func.min(UsageRow.at)).where(*counted)).one()
        if (sent or 0) + wanted.answers > tier.messages:
            wait = (first + tier.window_s - now) if first is not None else tier.window_s
            raise _limited(tier, f"{tier.messages} answers in {tier.window_s / 3600:g} hours", wait)

    def _left(self, session: Session, principal: Principal, wanted: Wanted, alive: Any, now: float, answer: int) -> int:
        """The tokens that each answer may have, of those that are left of the day."""
        tier = principal.tier
        assert tier.tokens_per_day is not None
        used, first = session.execute(
            select(func.sum(_tokens(alive)), func.min(UsageRow.at)).where(
                UsageRow.user_id == principal.user_id, UsageRow.at > now - DAY_S
            )
        ).one()
        left = tier.tokens_per_day - int(used or 0) - wanted.prompt_tokens
        each = min(answer, left // wanted.answers)
        if left < 0 or each < min(answer, _LEAST_ANSWER):
            wait = (first + DAY_S - now) if first is not None else DAY_S
            raise _limited(tier, f"{tier.tokens_per_day:,} tokens in 24 hours", wait)
        return each

    def settle(self, grant: Grant, outcome: Outcome) -> None:
        """Put what a request has used in the place of what was set aside."""
        used = {
            "open": False,
            "prompt_tokens": outcome.prompt_tokens,
            "cached_tokens": outcome.cached_tokens,
            "completion_tokens": outcome.completion_tokens,
            "status": outcome.status,
            "first_s": outcome.first_s,
            "seconds": outcome.seconds,
        }
        self._running.discard(grant.id)  # first: a row that can't be written holds nothing back for long
        with self._database.write() as session:
            session.execute(update(UsageRow).where(UsageRow.id == grant.id).values(**used))

    def beat(self) -> None:
        """Say that this process still runs its requests."""
        mine = sorted(self._running)
        with self._database.write() as session:
            for start in range(0, len(mine), _AT_ONCE):
                here = UsageRow.id.in_(mine[start : start + _AT_ONCE])
                session.execute(update(UsageRow).where(here, UsageRow.open).values(alive=self._clock()))

    def standing(self, principal: Principal) -> dict[str, Any]:
        """What a user has used of the tier's limits."""
        now, tier = self._clock(), principal.tier
        alive = UsageRow.open & (UsageRow.alive > now - _DEAD_S)
        mine = UsageRow.user_id == principal.user_id
        sent = select(func.sum(UsageRow.answers)).where(
            mine, UsageRow.at > now - tier.window_s, UsageRow.endpoint != "embeddings", alive | _was_answered()
        )
        tokens = select(func.sum(_tokens(alive))).where(mine, UsageRow.at > now - DAY_S)
        with self._database.read() as session:
            return {"messages": int(session.scalar(sent) or 0), "tokens_today": int(session.scalar(tokens) or 0)}

    def usage(self, days: float = 30.0, user: str | None = None, user_id: str | None = None) -> list[dict[str, Any]]:
        """What was used by whom and of which model, in so many days: requests, failures and tokens."""
        if not days > 0:
            raise InputError(f"days = {days:g} is not accepted: a number over 0 is")
        failed = case((~_was_answered(), 1), else_=0)
        query = (
            select(
                UserRow.name,
                TeamRow.name,
                UsageRow.model,
                func.count(),
                func.sum(failed),
                func.sum(UsageRow.prompt_tokens),
                func.sum(UsageRow.cached_tokens),
                func.sum(UsageRow.completion_tokens),
            )
            .join(UserRow, UsageRow.user_id == UserRow.id)
            .join(TeamRow, UsageRow.team_id == TeamRow.id, isouter=True)
            .where(UsageRow.at > self._clock() - days * DAY_S, ~UsageRow.open)
            .group_by(UserRow.name, TeamRow.name, UsageRow.model)
            .order_by(UserRow.name, UsageRow.model)
        )
        if user is not None:
            query = query.where(UserRow.name == user)
        if user_id is not None:
            query = query.where(UserRow.id == user_id)
        with self._database.read() as session:
            return [dict(zip(USAGE_COLUMNS, row, strict=True)) for row in session.execute(query)]


def priced(rows: list[dict[str, Any]], prices: Mapping[str, PriceConfig]) -> list[dict[str, Any]]:
    """Rows of `Ledger.usage` with their `cost` in US dollars, at today's prices; None where a model has none."""
    found = []
    for row in rows:
        price = prices.get(row["model"])
        tokens = (int(row[name] or 0) for name in ("prompt_tokens", "cached_tokens", "completion_tokens"))
        found.append(row | {"cost": round(price.cost(*tokens), 6) if price is not None else None})
    return found


def used_by_day(database: Database, days: int, now: float) -> list[dict[str, Any]]:
    """What was used on each day (of UTC) and by whom, the earliest first: requests and tokens."""
    day = cast(UsageRow.at, BigInteger) // int(DAY_S)
    tokens = func.sum(UsageRow.prompt_tokens + UsageRow.completion_tokens)
    first = now // DAY_S - days + 1
    query = (
        select(day, UserRow.name, func.count(), tokens)
        .join(UserRow, UsageRow.user_id == UserRow.id)
        .where(UsageRow.at >= first * DAY_S, ~UsageRow.open)
        .group_by(day, UserRow.name)
        .order_by(day, UserRow.name)
    )
    with database.read() as session:
        rows = session.execute(query).all()
    return [{"day": int(row[0]), "user": row[1], "requests": row[2], "tokens": int(row[3])} for row in rows]


def prune(database: Database, now: float, conversations_s: float | None, requests_s: float | None) -> dict[str, int]:
    """Remove conversations that nobody has touched for so long, and requests that ended as long ago.

    Requests that a limit still counts are kept in any case: those of a day, and of the longest window of a tier.
    """
    removed = {"conversations": 0, "requests": 0}
    with database.write() as session:
        if conversations_s is not None:
            removed["conversations"] = remove_conversations(session, ConversationRow.updated < now - conversations_s)
        if requests_s is not None:
            kept_s = max(requests_s, DAY_S, *(tier.window_s for tier in tiers(session).values()))
            ended = delete(UsageRow).where(UsageRow.at < now - kept_s, UsageRow.alive < now - _DEAD_S)
            removed["requests"] = _count(session.execute(ended))
    return removed


def _count(result: Any) -> int:
    return int(result.rowcount)


def _was_answered() -> Any:
    """Whether a request that has ended counts as an answer: not if it was refused or an engine failed."""
    return ~UsageRow.open & (UsageRow.status.in_((200, 499)))


def _tokens(alive: Any) -> Any:
    """The tokens that a row stands for now."""
    used = UsageRow.prompt_tokens + UsageRow.completion_tokens
    return case((alive, UsageRow.reserved_tokens), (UsageRow.open, 0), else_=used)


def _limited(tier: Tier, limit: str, wait_s: float) -> RequestError:
    return RequestError(
        f"the tier {tier.name} allows {limit}, and they are used",
        status=429,
        code="rate_limit_exceeded",
        retry_after_s=max(wait_s, 1.0),
    )
