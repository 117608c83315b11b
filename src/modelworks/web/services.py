"""What the pages show, in one value: the rooms that they call, and the models that are on their way here."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from starlette.requests import Request

from modelworks.assistant.chat import Assistant
from modelworks.assistant.gateway import AccountAccess
from modelworks.assistant.personal import PersonalEngine
from modelworks.serve.access import Principal, principal_of
from modelworks.serve.engine import Engine
from modelworks.serve.routing import Member
from modelworks.serve.store import Store
from modelworks.spec.errors import InputError, OperationError


@dataclass
class Pull:
    """A model on its way here; sizes in bytes, 0 while unknown."""

    name: str
    done: int = 0
    total: int = 0
    error: str | None = None
    task: asyncio.Task[None] | None = None

    @property
    def fraction(self) -> float:
        """How much of it is here."""
        return self.done / self.total if self.total else 0.0


@dataclass
class Services:
    """The rooms behind the pages."""

    store: Store
    engine: Engine
    assistant: Assistant
    pulls: dict[str, Pull] = field(default_factory=dict)
    begun_runs: set[str] = field(default_factory=set)
    """Names of the runs that this server began or resumed; they end with it."""
    access: AccountAccess | None = None
    """The accounts, where there are users."""
    principal: Principal | None = None
    """Whose services they are, where there are users."""
    personal: Callable[[Principal], PersonalEngine] | None = None
    """Makes the engine as one user has it."""
    members: Callable[[], list[Member]] | None = None
    """The engines of a configuration, where there is one."""

    @property
    def is_admin(self) -> bool:
        """Whether whoever is at the page may change what is everyone's: without users, whoever it is."""
        return self.access is None or (self.principal is not None and "admin" in self.principal.scopes)

    def of(self, request: Request) -> Services:
        """The services as whoever sent a request has them: the user's conversations, models and limits."""
        principal = principal_of(request)
        if self.access is None or self.principal is not None:
            return self
        assert principal is not None, "a page was reached without a sign-in"
        assert self.personal is not None
        engine = self.personal(principal)
        assistant = self.assistant.of(principal.user_id, engine, engine.tier, "admin" in principal.scopes)
        return replace(self, assistant=assistant, principal=principal)

    def pull(self, name: str) -> Pull:
        """Begin to fetch a model, unless it is on its way already."""
        current = self.pulls.get(name)
        if current is not None and current.error is None:
            return current
        pull = self.pulls[name] = Pull(name)
        pull.task = asyncio.create_task(self._fetch(pull), name=f"pull {name}")
        return pull

    async def _fetch(self, pull: Pull) -> None:
        def progress(done: int, total: int) -> None:
            pull.done, pull.total = done, total

        try:
            await asyncio.to_thread(self.store.pull, pull.name, progress)
        except (InputError, OperationError) as error:
            pull.error = str(error)
        else:
            del self.pulls[pull.name]
