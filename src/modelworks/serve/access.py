"""Who may ask for what: the interface between the API and whoever keeps the accounts.

The API knows no users. It is given an `Access`, which turns a key into a `Principal` with its tier, and keeps account
of what was used; without one, everything is open. Every path needs a scope, and a path that nobody has thought of
needs ``admin``: what is new is closed until it is opened here.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal, Protocol

from pydantic import Field
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from modelworks.serve.errors import RequestError
from modelworks.spec.errors import OperationError
from modelworks.spec.fields import Count, Duration, PositiveFloat, PositiveInt, Section

SCOPES = ("generate", "embed", "models", "account", "admin")
"""What a key may be for: answers, vectors, the list of models, its owner's keys and usage, everything of everyone."""
BATCH_SHARE = 0.1
"""The share of full engines that a user's batches have, beside the user's other requests."""
OPEN_PATHS = frozenset({"/health", "/v1/account/login"})
"""What needs no key."""
_SCOPE_OF = (
    ("/v1/chat/completions", "generate"),
    ("/v1/completions", "generate"),
    ("/v1/chats", "generate"),
    ("/v1/sources", "generate"),
    ("/v1/responses", "generate"),
    ("/v1/files", "generate"),
    ("/v1/batches", "generate"),
    ("/v1/embeddings", "embed"),
    ("/v1/models", "models"),
    ("/v1/account", "account"),
)


class Tier(Section):
    """What a user may use."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9.+_-]{0,31}$")]
    """Such as ``premium``."""
    models: list[str] = ["*"]
    """Patterns of models' names, such as ``grok-*``."""
    modes: list[Literal["fast", "think"]] = ["fast"]
    """Ways of answering: ``think`` is a reasoning effort over ``low``."""
    personas: list[Literal["regular", "fun", "own"]] = ["regular", "fun", "own"]
    """Modes of conversations: the two that are ours, and ``own`` for those that a user writes."""
    context: PositiveInt | None = None
    """Tokens that a prompt may have, about; left out, what the model can take."""
    answer: PositiveInt = 4096
    """Tokens that an answer may have."""
    images: bool = False
    """Whether messages may hold images."""
    live_knowledge: bool = False
    """Whether an answer may search for what is new (``search_parameters``), and have live sources."""
    messages: PositiveInt | None = None
    """Answers per window; left out, as many as one likes."""
    window_s: Duration = 7200.0
    """The window's length; it slides."""
    tokens_per_day: Count | None = None
    """Read and written in any 24 hours; left out, as many as one likes."""
    parallel: PositiveInt = 4
    """Answers at once."""
    priority: PositiveFloat = 1.0
    """The share of full engines beside that of others."""
    file_bytes: Count = 1 << 30
    """Bytes that a user's files may hold in all."""

    def has(self, model: str) -> bool:
        """Whether the tier includes a model."""
        return any(fnmatchcase(model, pattern) for pattern in self.models)


@dataclass(frozen=True)
class Principal:
    """Whose request it is."""

    user_id: str
    user: str
    key_id: str
    scopes: frozenset[str]
    tier: Tier
    team: str | None = None
    batch: bool = False
    """Whether the request is one of a batch, which waits behind those that somebody waits for."""

    @property
    def tenant(self) -> str:
        """Who takes turns with others."""
        return f"{self.user_id} batch" if self.batch else self.user_id

    @property
    def weight(self) -> float:
        """The tenant's share beside that of others."""
        return self.tier.priority * (BATCH_SHARE if self.batch else 1.0)


@dataclass(frozen=True)
class Grant:
    """What was set aside for a request before it runs."""

    id: int
    answer_tokens: int
    """Tokens that each of its answers may have."""


@dataclass
class Outcome:
    """What a request has used. `status` is the HTTP status, 499 if the client left."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    first_s: float | None = None
    seconds: float = 0.0
    status: int = 200


@dataclass(frozen=True)
class Wanted:
    """What a request asks for, as far as limits go."""

    endpoint: str
    model: str
    prompt_tokens: int
    """Of all its prompts, about."""
    answers: int = 1
    answer_tokens: int = 0
    """Of each answer, at most."""


class Access(Protocol):
    """Keeps the accounts."""

    async def start(self) -> None:
        """Called before the first request."""

    async def close(self) -> None:
        """Called after the last one."""

    async def authenticate(self, key: str, address: str) -> Principal:
        """Whose key it is.

        Raises
        ------
        RequestError
            401 if it is nobody's, expired or revoked; 429 if this address has tried too many that were.
        """

    async def still(self, key_id: str) -> Principal:
        """Whose key it is now, of one that has been recognised before.

        Raises
        ------
        RequestError
            401 if it is no longer valid.
        """

    async def admit(self, principal: Principal, wanted: Wanted) -> Grant:
        """Set aside what a request may use, at once and for good: two requests never share what one could have.

        Raises
        ------
        RequestError
            429 if the tier's limits don't leave enough; it says when they will.
        """

    async def settle(self, grant: Grant, outcome: Outcome) -> None:
        """Put what a request has used in the place of what was set aside."""

    async def note(self, actor: str, action: str, subject: str) -> None:
        """Write down an administrative act: who did what to what."""


def scope_of(path: str) -> str:
    """The scope that a path needs."""
    for start, scope in _SCOPE_OF:
        if path == start or path.startswith(f"{start}/"):
            return scope
    return "admin"


class KeysOnly:
    """Lets a request through if its key may do what it asks; the others get 401 or 403 and OpenAI's error shape.

    What a layer outside of this one has admitted (``state["admitted"]``: the pages, by their sign-in) passes.

    Parameters
    ----------
    app
        The application behind it.
    access
        Who knows the keys.
    refuse
        Sends a refusal.
    """

    def __init__(
        self, app: ASGIApp, access: Access, refuse: Callable[[Exception], Callable[..., Awaitable[None]]]
    ) -> None:
        self._app = app
        self._access = access
        self._refuse = refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] in {"http", "websocket"} and (scope.get("state") or {}).get("admitted"):
            await self._app(scope, receive, send)
            return
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": "a key is needed"})
            return
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            try:
                scope.setdefault("state", {})["principal"] = await self._principal(Request(scope))
            except (RequestError, OperationError) as error:
                await self._refuse(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    async def _principal(self, request: Request) -> Principal:
        kind, _, key = request.headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not key.strip():
            raise RequestError(
                "a key is needed: send it as Authorization: Bearer KEY", status=401, code="invalid_api_key"
            )
        principal = await self._access.authenticate(key.strip(), address_of(request))
        needed = scope_of(request.url.path)
        if needed not in principal.scopes:
            raise RequestError(
                f"this key may not use {request.url.path[:100]}: it lacks the scope {needed}",
                status=403,
                code="insufficient_scope",
            )
        return principal


def address_of(request: Request) -> str:
    """Where a request comes from."""
    return request.client.host if request.client else "unknown"


def principal_of(request: Request) -> Principal | None:
    """Whose request it is; None where everything is open."""
    state: dict[str, Any] = request.scope.get("state") or {}
    found = state.get("principal")
    assert found is None or isinstance(found, Principal)
    return found


def owner_of(request: Request) -> str | None:
    """Whose things a request is about; None where everything is open."""
    principal = principal_of(request)
    return principal.user_id if principal is not None else None
