"""A gateway with accounts over a stub engine, behind a real port."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).parents[1] / "serve"))
from gateways import Stub, plain_client, serving

from modelworks.assistant.accounts import Accounts
from modelworks.assistant.database import Database
from modelworks.assistant.gateway import AccountAccess, account_routes, administration_routes
from modelworks.assistant.kept import DatabaseStorage
from modelworks.assistant.ledger import Ledger
from modelworks.serve.api import create_app
from modelworks.serve.config import ServeConfig
from modelworks.serve.fairness import FairQueue
from modelworks.serve.listen import admin_routes
from modelworks.serve.routing import Router
from modelworks.serve.store import Store
from modelworks.spec.fields import validate


@dataclass
class Gateway:
    """A gateway, its accounts, and the stub behind it."""

    address: str
    accounts: Accounts
    ledger: Ledger
    stub: Stub
    schema: dict[str, Any]
    client: httpx.Client
    queue: FairQueue

    def user(self, name: str, *limits: str, **options: Any) -> str:
        """A user with a tier of its own, and the user's key."""
        self.accounts.set_tier(f"tier-{name}", ["models=['stub', 'seen']", "parallel=100", *limits])
        scopes = options.pop("scopes", ("generate", "embed", "models", "account"))
        self.accounts.add_user(name, tier=f"tier-{name}", **options)
        return self.accounts.create_key(name, scopes=scopes)[1]

    def call(self, key: str | None, method: str, path: str, **options: Any) -> httpx.Response:
        """One request."""
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return self.client.request(method, self.address + path, headers=headers, **options)

    def operations(self) -> list[tuple[str, str]]:
        """Every method and path of the OpenAPI schema."""
        return [(method.upper(), path) for path, methods in self.schema["paths"].items() for method in methods]


@contextlib.contextmanager
def gateway_over(stub: Stub, folder: Path) -> Iterator[Gateway]:
    """A gateway whose things are in a folder."""
    stub.control(fault="none", rate=200, tokens=8)
    engine = {"url": stub.url, "concurrency": 8}
    models = {"seen": {"on": {"a": "stub"}, "images": True, "search": True}}
    router = Router(validate(ServeConfig, {"engines": {"a": engine}, "models": models}))
    database = Database(folder / "modelworks.db")
    access = AccountAccess(Accounts(database), Ledger(database))

    async def reload() -> ServeConfig:
        return validate(ServeConfig, {"engines": {"a": engine}, "models": models})

    routers = [admin_routes(router, reload), account_routes(access), administration_routes(access)]
    queue = FairQueue(router.capacity)
    storage = DatabaseStorage(database)
    app = create_app(router, Store(folder / "models"), access=access, queue=queue, storage=storage, routers=routers)
    with serving(app) as address, plain_client() as client:
        yield Gateway(address, access.accounts, access.ledger, stub, app.openapi(), client, queue)
    database.close()
