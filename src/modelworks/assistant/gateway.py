"""The gateway with accounts: what `serve` asks for (`serve.access.Access`), answered from the database, and its routes.

The database works in threads, so that the streams of others don't wait for a commit. SQLite takes one writer at a time
and lets the others sleep and try again; so what requests write goes to it over one thread, in turn.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Body, Request
from pydantic import BaseModel, ConfigDict, Field

from modelworks.assistant.accounts import Accounts, Key
from modelworks.assistant.database import Database, default_database
from modelworks.assistant.ledger import BEAT_S, Ledger, priced
from modelworks.assistant.retention import keep
from modelworks.serve.access import SCOPES, Grant, Outcome, Principal, Wanted, address_of, principal_of
from modelworks.serve.config import PriceConfig, load_config, oidc_of, prices_of
from modelworks.serve.errors import RequestError, UnavailableError
from modelworks.spec.errors import InputError, OperationError

_LOG = logging.getLogger("modelworks.accounts")
_WRITERS = 8
"""Threads that write what requests use, where the database takes several writers."""


class AccountAccess:
    """`serve.access.Access` over a database.

    Parameters
    ----------
    accounts : Accounts
        Users and keys.
    ledger : Ledger
        What was used.
    config_file : Path, optional
        The configuration that says how long things are kept.
    """

    def __init__(self, accounts: Accounts, ledger: Ledger, config_file: Path | None = None) -> None:
        self.accounts = accounts
        self.ledger = ledger
        self._config_file = config_file
        self._chores: list[asyncio.Task[None]] = []
        writers = 1 if accounts.database.engine.dialect.name == "sqlite" else _WRITERS
        self._writers = ThreadPoolExecutor(writers, thread_name_prefix="ledger")

    async def start(self) -> None:
        """Begin to say that this process runs, and to remove what is too old."""
        self._chores.append(asyncio.create_task(self._beat(), name="beat"))
        if self._config_file is not None:
            self._chores.append(asyncio.create_task(keep(self.accounts.database, self._config_file), name="retention"))

    async def close(self) -> None:
        """End it."""
        for chore in self._chores:
            chore.cancel()
        self._writers.shutdown(wait=False)

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(BEAT_S)
            try:
                await _in_thread(self.ledger.beat)
                await _in_thread(self.accounts.lockout.forget)
            except UnavailableError:
                continue  # a database that is away for a while

    async def authenticate(self, key: str, address: str) -> Principal:
        """Whose key it is."""
        principal: Principal = await _in_thread(self.accounts.recognise, key, address)
        return principal

    async def still(self, key_id: str) -> Principal:
        """Whose key it is now."""
        principal: Principal = await _in_thread(self.accounts.still, key_id)
        return principal

    def usage(self, days: float, user_id: str | None = None) -> list[dict[str, Any]]:
        """What was used, with its cost at the configuration's prices."""
        return priced(self.ledger.usage(days, user_id=user_id), self.prices())

    def prices(self) -> dict[str, PriceConfig]:
        """What models cost, as the configuration says now; nothing while it can't be used, as the log says."""
        try:
            return prices_of(load_config(self._config_file)) if self._config_file is not None else {}
        except InputError as error:
            _LOG.error("there are no prices: %s", error)
            return {}

    async def admit(self, principal: Principal, wanted: Wanted) -> Grant:
        """Set aside what a request may use."""
        grant: Grant = await _in_thread(self.ledger.admit, principal, wanted, of=self._writers)
        return grant

    async def settle(self, grant: Grant, outcome: Outcome) -> None:
        """Put down what it has used."""
        await _in_thread(self.ledger.settle, grant, outcome, of=self._writers)

    async def note(self, actor: str, action: str, subject: str) -> None:
        """Write down an administrative act."""
        await _in_thread(self.accounts.note, action, subject, actor)


def access_if_wanted(config_file: Path | None = None) -> AccountAccess | None:
    """The accounts, if this installation has users or an OpenID provider; None if it has neither, and all is open.

    Raises
    ------
    InputError
        If the configuration file can't be used.
    """
    where = default_database()
    provider = oidc_of(load_config(config_file) if config_file is not None else None)
    if provider is None and isinstance(where, Path) and not where.exists():
        return None
    database = Database(where)
    accounts = Accounts(database)
    if provider is None and not accounts.users():
        database.close()
        return None
    return AccountAccess(accounts, Ledger(database), config_file)


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)


class SignIn(_Body):
    """``POST /v1/account/login``."""

    user: Annotated[str, Field(min_length=1, max_length=64)]
    password: Annotated[str, Field(min_length=1, max_length=256)]


class NewKey(_Body):
    """``POST /v1/account/keys``."""

    name: Annotated[str, Field(max_length=64)] = ""
    scopes: list[str] | None = None
    """Left out, those of the key that asks."""
    lasts_s: Annotated[float, Field(gt=0, le=1e10)] | None = None


class NewPassword(_Body):
    """``PUT /v1/account/password``."""

    current: Annotated[str, Field(min_length=1, max_length=256)]
    new: Annotated[str, Field(min_length=1, max_length=256)]


def account_routes(access: AccountAccess) -> APIRouter:
    """What a user sees and changes of the own account; an account's id is never taken from the request."""
    routes, accounts = APIRouter(prefix="/account", tags=["account"]), access.accounts

    @routes.post("/login")
    async def login(request: Request, given: Annotated[SignIn, Body()]) -> dict[str, Any]:
        """Get a key for twelve hours, for a name and a password."""
        key, whole = await _in_thread(accounts.sign_in, given.user, given.password, address_of(request))
        return described(key) | {"key": whole}

    @routes.get("")
    async def account(request: Request) -> dict[str, Any]:
        """The account, its tier, and what is used of it."""
        who = _who(request)
        used = await _in_thread(access.ledger.standing, who)
        return {"user": who.user, "team": who.team, "key": who.key_id, "tier": who.tier.model_dump(), "used": used}

    @routes.get("/usage")
    async def usage(request: Request, days: float = 30.0) -> dict[str, Any]:
        """What was used, by model."""
        return {"data": await _asked(access.usage, days, _who(request).user_id)}

    @routes.get("/keys")
    async def keys(request: Request) -> dict[str, Any]:
        """The account's keys."""
        return {"data": [described(key) for key in await _in_thread(accounts.keys, _who(request).user)]}

    @routes.post("/keys")
    async def create_key(request: Request, given: Annotated[NewKey, Body()]) -> dict[str, Any]:
        """Make a key. It can do no more than the key that makes it, and is shown this once."""
        who = _who(request)
        scopes = given.scopes if given.scopes is not None else [scope for scope in SCOPES if scope in who.scopes]
        beyond = sorted(set(scopes) - who.scopes)
        if beyond:
            raise RequestError(f"this key lacks the scope {beyond[0][:40]!r} and can't give it", status=403)

        def create() -> tuple[Key, str]:
            return accounts.create_key(who.user, given.name, scopes=scopes, lasts_s=given.lasts_s, actor=who.user)

        key, whole = await _asked(create)
        return described(key) | {"key": whole}

    @routes.get("/keys/{key_id}")
    async def key(request: Request, key_id: str) -> dict[str, Any]:
        """One of the account's keys."""
        return described(await _in_thread(accounts.key_of, _who(request).user_id, key_id))

    @routes.delete("/keys/{key_id}")
    async def revoke_key(request: Request, key_id: str) -> dict[str, Any]:
        """Make one of the account's keys worthless."""
        who = _who(request)

        def revoke() -> Key:
            return accounts.revoke_key(key_id, user_id=who.user_id, actor=who.user)

        return described(await _in_thread(revoke))

    @routes.put("/password")
    async def password(request: Request, given: Annotated[NewPassword, Body()]) -> dict[str, Any]:
        """Change the password; all sign-ins end."""
        who = _who(request)
        await _in_thread(accounts.check_password, who.user, given.current, address_of(request))
        await _asked(accounts.set_password, who.user, given.new, who.user)
        return {"changed": True}

    return routes


def administration_routes(access: AccountAccess) -> APIRouter:
    """What an administrator sees of everyone."""
    routes, accounts = APIRouter(prefix="/admin", tags=["admin"]), access.accounts

    @routes.get("/users")
    async def users() -> dict[str, Any]:
        """All users."""
        return {"data": [vars(user) for user in await _in_thread(accounts.users)]}

    @routes.get("/usage")
    async def usage(days: float = 30.0) -> dict[str, Any]:
        """What was used, by user and model."""
        return {"data": await _asked(access.usage, days)}

    @routes.get("/audit")
    async def audit() -> dict[str, Any]:
        """What was done to accounts."""
        return {"data": await _in_thread(accounts.audit)}

    return routes


def described(key: Key) -> dict[str, Any]:
    """A key as plain values, without its secret."""
    shown = {name: getattr(key, name) for name in ("id", "prefix", "user", "name", "created", "expires", "revoked")}
    return shown | {"scopes": list(key.scopes), "last_used": key.last_used}


async def _asked(work: Callable[..., Any], *arguments: Any) -> Any:
    """Work in a thread; what can't be used is the request's fault."""
    try:
        return await _in_thread(work, *arguments)
    except RequestError:
        raise
    except InputError as error:
        raise RequestError(str(error), code="invalid_value") from None


async def _in_thread(work: Callable[..., Any], *arguments: Any, of: Executor | None = None) -> Any:
    """Work in a thread. What is wrong with the database is the log's; who asks learns that it is away."""
    try:
        return await asyncio.get_running_loop().run_in_executor(of, work, *arguments)
    except OperationError as error:
        _LOG.error("%s", error)
        raise UnavailableError("the accounts can't be reached now") from None


def _who(request: Request) -> Principal:
    principal = principal_of(request)
    assert principal is not None  # no route here is open but the sign-in
    return principal
