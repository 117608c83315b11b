"""An engine as one user has it: the user's tier, limits and place in the queue hold for what the pages ask as well.

Pages ask the engine inside this process, and not over HTTP; what they ask passes the same gate.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import orjson
from starlette.requests import Request

from modelworks.assistant.accounts import Accounts
from modelworks.serve.access import Principal, Tier
from modelworks.serve.answer import capped
from modelworks.serve.engine import Activity, Endpoint, Engine, ModelCard
from modelworks.serve.errors import RequestError, UnknownModelError
from modelworks.serve.gate import Gate
from modelworks.serve.metrics import Metrics
from modelworks.serve.requests import ChatRequest, parse
from modelworks.spec.errors import OperationError


class PersonalEngine(Engine):
    """An engine for one user's conversations.

    Parameters
    ----------
    engine : Engine
        What answers.
    principal : Principal
        Who asks, as the sign-in had it; the tier is looked up anew for each answer.
    accounts : Accounts
        Where it is looked up.
    gate : Gate
        Which each answer passes.
    metrics : Metrics
        Told of each answer.
    """

    def __init__(self, engine: Engine, principal: Principal, accounts: Accounts, gate: Gate, metrics: Metrics) -> None:
        self._engine = engine
        self._principal = principal
        self._accounts = accounts
        self._gate = gate
        self._metrics = metrics

    async def _now(self) -> Principal:
        return await asyncio.to_thread(self._accounts.still, self._principal.key_id)

    async def tier(self) -> Tier:
        """The user's tier, as it is now."""
        return (await self._now()).tier

    def activity(self) -> dict[str, Activity]:
        """How busy each model is."""
        return self._engine.activity()

    async def models(self) -> list[ModelCard]:
        """What the user's tier has."""
        tier = await self.tier()
        return [_as_in(tier, card) for card in await self._engine.models() if tier.has(card.name)]

    async def card(self, model: str) -> ModelCard:
        """One of the models."""
        principal = await self._now()
        if not principal.tier.has(model):
            raise UnknownModelError(model, [card.name for card in await self.models()])
        return _as_in(principal.tier, await self._engine.card(model))

    async def stream(self, endpoint: Endpoint, model: str, body: dict[str, Any]) -> AsyncGenerator[list[str], None]:
        """Answer a chat if the user may have it; see `Engine.stream`."""
        principal = await self._now()
        card = await self._engine.card(model)
        asked = parse(ChatRequest, orjson.dumps(body | {"model": model}))
        request = Request({"type": "http", "headers": [], "state": {"principal": principal}, "client": None})
        status = 499
        try:
            async with self._gate.visit(request, asked, card, endpoint) as visit:
                answer = self._engine.stream(endpoint, model, capped(body, visit.answer_tokens))
                batches = self._metrics.measured(model, answer, visit.outcomes)
                try:
                    async with aclosing(batches):
                        async for batch in batches:
                            yield batch
                    visit.status = status = 200
                except OperationError:
                    visit.status = status = 503
                    raise
        except RequestError as error:
            status = error.status
            raise
        finally:
            self._metrics.count(endpoint, model, status)

    async def embed(self, model: str, texts: list[str]) -> tuple[list[list[float]], int]:
        """The pages embed nothing."""
        raise RequestError("vectors are not made here", status=403)

    async def load(self, model: str) -> None:
        """Make a model ready."""
        await self._engine.load(model)

    async def close(self) -> None:
        """Nothing: the engine belongs to the server."""


def _as_in(tier: Tier, card: ModelCard) -> ModelCard:
    """A model as a tier has it: without sight, if the tier includes no images."""
    return replace(card, images=card.images and tier.images)
