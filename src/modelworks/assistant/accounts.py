"""Users, teams and keys: made, listed, changed, and recognised.

A key is ``mw-ID-SECRET``. The id is shown and finds the row; of the secret only its hash is kept, so that a key is
seen once, when it is made. Whatever changes an account writes in the same transaction who did it.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from sqlalchemy import CursorResult, delete, func, or_, select, update
from sqlalchemy.orm import Session

from modelworks.assistant import tiers as tier_book
from modelworks.assistant.database import Database
from modelworks.assistant.passwords import Lockout, hashed, matches, network
from modelworks.assistant.removal import remove_conversations
from modelworks.assistant.tables import (
    AttemptRow,
    AuditRow,
    Base,
    ConversationRow,
    FolderRow,
    KeyRow,
    PersonaRow,
    ShareRow,
    TeamRow,
    UserRow,
)
from modelworks.serve.access import SCOPES, Principal, Tier
from modelworks.serve.errors import RequestError
from modelworks.spec.errors import InputError, OperationError

COMMAND_LINE = "command line"
REMOVED = "(removed)"
"""Stands for a user's name where it was taken out."""
SIGN_IN_S = 12 * 3600.0
"""How long a sign-in lasts."""
DEFAULT_SCOPES = ("generate", "embed", "models", "account")
_KEY = re.compile(r"mw-([0-9a-f]{16})-([A-Za-z0-9_-]{43})")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@+-]{0,63}")
_LAST_USED_S = 60.0
"""How exactly it is known when a key was used last."""
_WRONG_KEYS = 20
_WRONG_PASSWORDS = {"pair": 5, "user": 50, "address": 100}


@dataclass(frozen=True)
class User:
    """A user; times in seconds since 1970."""

    id: str
    name: str
    tier: str
    team: str | None
    admin: bool
    disabled: bool
    has_password: bool
    created: float
    issuer: str | None = None
    """The OpenID provider that the user signs in with."""


@dataclass(frozen=True)
class Identity:
    """What an OpenID provider says of somebody, as far as accounts go."""

    issuer: str
    subject: str
    name: str
    tier: str = "free"
    team: str | None = None
    admin: bool = False


@dataclass(frozen=True)
class Key:
    """A key, without its secret."""

    id: str
    user: str
    name: str
    scopes: tuple[str, ...]
    created: float
    expires: float | None
    revoked: float | None
    last_used: float | None

    @property
    def prefix(self) -> str:
        """The part of the key that is shown."""
        return f"mw-{self.id}-..."


class Accounts:
    """The users and keys of a database. Safe to use from several threads and processes.

    Parameters
    ----------
    database : Database
        Where they are.
    clock
        Gives the time in seconds since 1970.
    """

    def __init__(self, database: Database, clock: Callable[[], float] = time.time) -> None:
        self.database = database
        self._clock = clock
        self.lockout = Lockout(database, clock)

    # --- users

    def add_user(
        self,
        name: str,
        *,
        tier: str = "free",
        team: str | None = None,
        password: str | None = None,
        admin: bool = False,
        actor: str = COMMAND_LINE,
    ) -> User:
        """Make a user.

        Raises
        ------
        InputError
            If the name is taken or can't be one, there is no such tier, or the password is not accepted.
        """
        if not _NAME.fullmatch(name):
            raise InputError(f"the user {name!r} is not accepted: up to 64 letters, digits, and . _ @ + - are")
        kept = hashed(password, name) if password is not None else None
        with self.database.write() as session:
            if session.scalar(select(UserRow.id).where(func.lower(UserRow.name) == name.lower())):
                raise InputError(f"there is a user {name!r} already")
            tier_book.tier_named(session, tier)
            row = UserRow(
                id=secrets.token_hex(8),
                name=name,
                password=kept,
                tier=tier,
                team_id=self._team(session, team),
                admin=admin,
                disabled=False,
                created=self._clock(),
            )
            session.add(row)
            session.flush()
            self._note(session, actor, "add user", f"{name} tier={tier} admin={admin}")
            return _user(session, row)

    def users(self) -> list[User]:
        """All users, by name."""
        with self.database.read() as session:
            return [_user(session, row) for row in session.scalars(select(UserRow).order_by(UserRow.name))]

    def user(self, name: str) -> User:
        """One user.

        Raises
        ------
        InputError
            If there is none of that name.
        """
        with self.database.read() as session:
            return _user(session, _user_row(session, name))

    def change_user(
        self,
        name: str,
        *,
        tier: str | None = None,
        team: str | None = None,
        admin: bool | None = None,
        disabled: bool | None = None,
        actor: str = COMMAND_LINE,
    ) -> User:
        """Change what is given; the team ``""`` is none. It holds from the next request on."""
        with self.database.write() as session:
            row = _user_row(session, name)
            if tier is not None:
                row.tier = tier_book.tier_named(session, tier).name
            if team is not None:
                row.team_id = self._team(session, team)
            row.admin = row.admin if admin is None else admin
            row.disabled = row.disabled if disabled is None else disabled
            session.flush()
            self._note(session, actor, "change user", f"{name} {tier=} {team=} {admin=} {disabled=}")
            return _user(session, row)

    def set_password(self, name: str, password: str, actor: str = COMMAND_LINE) -> None:
        """Give a user another password, and end all sign-ins."""
        kept = hashed(password, name)
        with self.database.write() as session:
            row = _user_row(session, name)
            row.password = kept
            now = self._clock()
            for key in session.scalars(select(KeyRow).where(KeyRow.user_id == row.id, KeyRow.name == "sign-in")):
                key.revoked = key.revoked or now
            self._note(session, actor, "set password", name)

    def remove_user(self, name: str, actor: str = COMMAND_LINE, everything: bool = False) -> None:
        """Remove a user with all keys, conversations, and all record of what was used.

        What was done by or to the user stays in the audit log, unless it is to be `everything`: then the name is
        taken out of it, and failed sign-ins under that name are forgotten.
        """
        with self.database.write() as session:
            row = _user_row(session, name)
            name, user_id = row.name, row.id
            remove_conversations(session, ConversationRow.user_id == user_id)
            for table in Base.metadata.tables.values():
                if "user_id" in table.columns:
                    session.execute(delete(table).where(table.c.user_id == user_id))
            session.execute(delete(UserRow).where(UserRow.id == user_id))
            if everything:
                self._forget(session, name)
            self._note(session, actor, "remove user", REMOVED if everything else name)

    def _forget(self, session: Session, name: str) -> None:
        """Take a name out of the audit log and of the failed attempts."""
        session.execute(update(AuditRow).where(func.lower(AuditRow.actor) == name.lower()).values(actor=REMOVED))
        whole = re.compile(rf"(?<![A-Za-z0-9._@+-]){re.escape(name)}(?![A-Za-z0-9._@+-])", re.IGNORECASE)
        for row in session.scalars(select(AuditRow).where(AuditRow.subject.icontains(name, autoescape=True))):
            row.subject = whole.sub(REMOVED, row.subject)
        mine = f"sign-in {name.lower()}"
        own = or_(AttemptRow.subject == mine, AttemptRow.subject.startswith(f"{mine} from ", autoescape=True))
        session.execute(delete(AttemptRow).where(own))

    def give_conversations(self, name: str, actor: str = COMMAND_LINE) -> int:
        """Give a user the conversations from before there were users, and their folders, personas, links; how many."""
        with self.database.write() as session:
            row = _user_row(session, name)
            given = 0  # that of the last, the conversations
            for table in (FolderRow, PersonaRow, ShareRow, ConversationRow):
                ownerless = update(table).where(table.user_id.is_(None)).values(user_id=row.id)
                given = cast("CursorResult[Any]", session.execute(ownerless)).rowcount
            self._note(session, actor, "give conversations", f"{row.name}: {given}")
            return given

    def identified(self, identity: Identity, actor: str) -> User:
        """The user of an OpenID provider's subject; made if it is the first time, and brought up to date.

        A user of that name who signs in otherwise is left alone: the new one gets a number behind the name, so that
        a provider's word alone takes over nobody's account.

        Raises
        ------
        RequestError
            403, if the account is closed.
        """
        with self.database.write() as session:
            known = select(UserRow).where(UserRow.issuer == identity.issuer, UserRow.subject == identity.subject)
            row = session.scalar(known)
            tier = tier_book.tier_named(session, identity.tier).name
            team = self._team(session, identity.team)
            if row is None:
                row = UserRow(
                    id=secrets.token_hex(8),
                    name=_free_name(session, identity.name),
                    password=None,
                    tier=tier,
                    team_id=team,
                    admin=identity.admin,
                    disabled=False,
                    created=self._clock(),
                    issuer=identity.issuer,
                    subject=identity.subject,
                )
                session.add(row)
                session.flush()
                self._note(session, actor, "add user", f"{row.name} {tier=} admin={identity.admin}")
            elif row.disabled:
                raise RequestError("this account is closed", status=403, code="account_closed")
            elif (row.tier, row.team_id, row.admin) != (tier, team, identity.admin):
                row.tier, row.team_id, row.admin = tier, team, identity.admin
                session.flush()
                self._note(session, actor, "change user", f"{row.name} {tier=} admin={identity.admin}")
            return _user(session, row)

    def sign_in_as(self, user: User, how: str) -> str:
        """A session for a user whom somebody else has vouched for; returns the whole key."""
        with self.database.write() as session:
            row = session.get_one(UserRow, user.id)
            key, whole = self._new_key(session, row, "sign-in", SCOPES if row.admin else DEFAULT_SCOPES, SIGN_IN_S)
            self._note(session, row.name, f"sign in with {how}"[:64], key.prefix)
            return whole

    # --- keys

    def create_key(
        self,
        user: str,
        name: str = "",
        *,
        scopes: Sequence[str] = DEFAULT_SCOPES,
        lasts_s: float | None = None,
        actor: str = COMMAND_LINE,
    ) -> tuple[Key, str]:
        """Make a key; also the whole of it, which is never seen again.

        Raises
        ------
        InputError
            If there is no such user or scope, or the user is no administrator and the scope is ``admin``.
        """
        unknown = sorted(set(scopes) - set(SCOPES))
        if unknown or not scopes:
            raise InputError(f"the scope {unknown[0] if unknown else ''!r} is not accepted: {', '.join(SCOPES)} are")
        if len(name) > 64 or not name.isprintable():
            raise InputError("the key's name is not accepted: up to 64 printable characters are")
        if lasts_s is not None and lasts_s <= 0:
            raise InputError(f"a key that lasts {lasts_s:g} s is not accepted: a time over 0 is")
        with self.database.write() as session:
            row = _user_row(session, user)
            if "admin" in scopes and not row.admin:
                raise InputError(f"the scope 'admin' is not accepted: the user {user} is no administrator")
            made, whole = self._new_key(session, row, name, scopes, lasts_s)
            self._note(session, actor, "create key", f"{made.prefix} user={user} scopes={' '.join(scopes)}")
            return made, whole

    def _new_key(
        self, session: Session, user: UserRow, name: str, scopes: Sequence[str], lasts_s: float | None
    ) -> tuple[Key, str]:
        identity, secret, now = secrets.token_hex(8), secrets.token_urlsafe(32), self._clock()
        row = KeyRow(
            id=identity,
            user_id=user.id,
            name=name,
            hash=_hash(secret),
            scopes=" ".join(scope for scope in SCOPES if scope in scopes),
            created=now,
            expires=now + lasts_s if lasts_s is not None else None,
            revoked=None,
            last_used=None,
        )
        session.add(row)
        session.flush()
        return _key(row, user.name), f"mw-{identity}-{secret}"

    def keys(self, user: str | None = None) -> list[Key]:
        """The keys of a user, or of all, the newest first."""
        query = select(KeyRow, UserRow.name).join(UserRow, KeyRow.user_id == UserRow.id).order_by(KeyRow.created.desc())
        with self.database.read() as session:
            if user is not None:
                query = query.where(KeyRow.user_id == _user_row(session, user).id)
            return [_key(row, name) for row, name in session.execute(query)]

    def key_of(self, user_id: str, key_id: str) -> Key:
        """One of a user's own keys.

        Raises
        ------
        RequestError
            404, also if it is somebody else's.
        """
        with self.database.read() as session:
            row = session.get(KeyRow, key_id)
            if row is None or row.user_id != user_id:
                raise RequestError(f"there is no key {key_id[:40]!r}", status=404, code="not_found")
            return _key(row, session.get_one(UserRow, user_id).name)

    def revoke_key(self, key_id: str, *, user_id: str | None = None, actor: str = COMMAND_LINE) -> Key:
        """Make a key worthless, from the next request on; `user_id` restricts it to that user's.

        Raises
        ------
        InputError
            If there is no such key.
        """
        shown = re.fullmatch(r"(?:mw-)?([0-9a-f]{16})(?:-\S*)?", key_id)
        with self.database.write() as session:
            row = session.get(KeyRow, shown[1]) if shown else None
            if row is None or (user_id is not None and row.user_id != user_id):
                raise RequestError(f"there is no key {key_id[:19]!r}", status=404, code="not_found")
            row.revoked = row.revoked or self._clock()
            found = _key(row, session.get_one(UserRow, row.user_id).name)
            self._note(session, actor, "revoke key", found.prefix)
            return found

    # --- coming in

    def recognise(self, key: str, address: str) -> Principal:
        """Whose key it is.

        Raises
        ------
        RequestError
            401 if it is nobody's, expired, revoked, or its user's account is closed; all in the same words. 429 if too
            many wrong ones came from that address. A right one always passes.
        """
        found = _KEY.fullmatch(key)
        identity, secret = (found[1], found[2]) if found else ("0" * 16, "")
        now = self._clock()
        with self.database.read() as session:
            row = session.get(KeyRow, identity)
            right = hmac.compare_digest(_hash(secret), row.hash if row is not None else "0" * 64)
            usable = row is not None and row.revoked is None and (row.expires is None or now < row.expires)
            if row is not None and right and usable:
                user = session.get_one(UserRow, row.user_id)
                if not user.disabled:
                    principal = self._principal(session, user, row)
                    stale = row.last_used is None or now - row.last_used > _LAST_USED_S
        if not (right and usable) or row is None or user.disabled:
            self.lockout.attempt({f"keys from {network(address)}": _WRONG_KEYS})
            raise RequestError("this key is not valid", status=401, code="invalid_api_key")
        if stale:
            self._used(identity, now)
        return principal

    def still(self, key_id: str) -> Principal:
        """Whose key it is now, of one that has been recognised before; its user may have another tier by now.

        Raises
        ------
        RequestError
            401 if it is no longer valid.
        """
        now = self._clock()
        with self.database.read() as session:
            row = session.get(KeyRow, key_id)
            if row is not None and row.revoked is None and (row.expires is None or now < row.expires):
                user = session.get_one(UserRow, row.user_id)
                if not user.disabled:
                    return self._principal(session, user, row)
        raise RequestError("this sign-in has ended", status=401, code="invalid_api_key")

    def _principal(self, session: Session, user: UserRow, key: KeyRow) -> Principal:
        scopes = frozenset(key.scopes.split()) - (frozenset() if user.admin else {"admin"})
        tier = tier_book.tier_named(session, user.tier)
        team = session.get_one(TeamRow, user.team_id).name if user.team_id else None
        return Principal(user.id, user.name, key.id, scopes, tier, team)

    def _used(self, key_id: str, now: float) -> None:
        with self.database.write() as session:
            row = session.get(KeyRow, key_id)
            if row is not None:
                row.last_used = now

    def sign_in(self, name: str, password: str, address: str) -> tuple[Key, str]:
        """A key that lasts for a sign-in.

        Raises
        ------
        RequestError
            401 if name and password don't belong together, in the same words and time whatever is wrong; 429 if there
            were too many wrong ones of this name or address.
        """
        row = self.check_password(name, password, address)
        with self.database.write() as session:
            user = session.get_one(UserRow, row.id)
            scopes = SCOPES if user.admin else DEFAULT_SCOPES
            made = self._new_key(session, user, "sign-in", scopes, SIGN_IN_S)
            self._note(session, user.name, "sign in", made[0].prefix)
            return made

    def check_password(self, name: str, password: str, address: str) -> UserRow:
        """The user of a name and a password; errors as in `sign_in`."""
        place, who = network(address), name[:64].lower()
        pair, user_wide = f"sign-in {who} from {place}", f"sign-in {who}"
        allowed = {pair: _WRONG_PASSWORDS["pair"], user_wide: _WRONG_PASSWORDS["user"]}
        self.lockout.attempt(allowed | {f"sign-in from {place}": _WRONG_PASSWORDS["address"]})
        with self.database.read() as session:
            row = session.scalar(select(UserRow).where(func.lower(UserRow.name) == who))
            kept = row.password if row is not None and not row.disabled else None
        if not matches(password, kept) or row is None:
            raise RequestError("the name or the password is wrong", status=401, code="invalid_credentials")
        self.lockout.succeeded([pair])
        return row

    # --- tiers, and what was done

    def tiers(self) -> dict[str, Tier]:
        """All tiers."""
        with self.database.read() as session:
            return tier_book.tiers(session)

    def set_tier(self, name: str, changes: list[str], actor: str = COMMAND_LINE) -> Tier:
        """Make or change a tier; see `assistant.tiers.set_tier`."""
        with self.database.write() as session:
            tier = tier_book.set_tier(session, name, changes)
            self._note(session, actor, "set tier", f"{name} {' '.join(changes)}")
            return tier

    def remove_tier(self, name: str, actor: str = COMMAND_LINE) -> None:
        """Remove an operator's tier; see `assistant.tiers.remove_tier`."""
        with self.database.write() as session:
            tier_book.remove_tier(session, name)
            self._note(session, actor, "remove tier", name)

    def audit(self, last: int = 100) -> list[dict[str, Any]]:
        """What was done to accounts, the latest first."""
        with self.database.read() as session:
            rows = session.scalars(select(AuditRow).order_by(AuditRow.id.desc()).limit(last))
            return [{"at": row.at, "actor": row.actor, "action": row.action, "subject": row.subject} for row in rows]

    def note(self, action: str, subject: str, actor: str = COMMAND_LINE) -> None:
        """Write down what was done elsewhere, such as a reload of the configuration."""
        with self.database.write() as session:
            self._note(session, actor, action, subject)

    def _note(self, session: Session, actor: str, action: str, subject: str) -> None:
        session.add(AuditRow(at=self._clock(), actor=actor, action=action, subject=subject))

    def _team(self, session: Session, name: str | None) -> str | None:
        """A team's id; a team that isn't there is made."""
        if not name:
            return None
        if not _NAME.fullmatch(name):
            raise InputError(f"the team {name!r} is not accepted: up to 64 letters, digits, and . _ @ + - are")
        row = session.scalar(select(TeamRow).where(TeamRow.name == name))
        if row is None:
            row = TeamRow(id=secrets.token_hex(8), name=name, created=self._clock())
            session.add(row)
            session.flush()
        return row.id


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _user_row(session: Session, name: str) -> UserRow:
    row = session.scalar(select(UserRow).where(func.lower(UserRow.name) == name.lower()))
    if row is None:
        raise InputError(f"there is no user {name!r}")
    return row


def _free_name(session: Session, wanted: str) -> str:
    """A name that nobody has, made of the one that is wanted."""
    name = re.sub(r"[^A-Za-z0-9._@+-]", "-", wanted).lstrip("._@+-")[:56] or "user"
    for number in range(1, 1_000_000):
        tried = name if number == 1 else f"{name}-{number}"
        if not session.scalar(select(UserRow.id).where(func.lower(UserRow.name) == tried.lower())):
            return tried
    raise OperationError(f"there are too many users by the name {name}")


def _user(session: Session, row: UserRow) -> User:
    team = session.get_one(TeamRow, row.team_id).name if row.team_id else None
    known = row.password is not None
    return User(row.id, row.name, row.tier, team, row.admin, row.disabled, known, row.created, row.issuer)


def _key(row: KeyRow, user: str) -> Key:
    scopes = tuple(row.scopes.split())
    return Key(row.id, user, row.name, scopes, row.created, row.expires, row.revoked, row.last_used)
