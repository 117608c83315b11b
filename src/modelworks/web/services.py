"""What the pages show, in one value: the rooms that they call, and the models that are on their way here."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from modelworks.assistant.chat import Assistant
from modelworks.serve.engine import Engine
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
