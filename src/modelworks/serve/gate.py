"""What a request passes before an engine sees it: its tier, what is set aside for it, and the queue.

Everything that is taken here is given back when the request ends, however it ends.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import AbstractContextManager, ExitStack, asynccontextmanager, nullcontext, suppress
from dataclasses import dataclass, field

from starlette.requests import Request

from modelworks.serve.access import Access, Grant, Outcome, Principal, Wanted, address_of, principal_of
from modelworks.serve.engine import ModelCard
from modelworks.serve.errors import RequestError
from modelworks.serve.fairness import FairQueue
from modelworks.serve.metrics import Metrics
from modelworks.serve.requests import ChatRequest, CompletionRequest, EmbeddingRequest
from modelworks.serve.tracing import Traced, traced, traced_request
from modelworks.spec.errors import InputError, OperationError

BYTES_PER_TOKEN = 4
"""Of a prompt in UTF-8, about: what English has."""
_LOG = logging.getLogger("modelworks.requests")
_CLIENT_GONE = 499

Asked = ChatRequest | CompletionRequest | EmbeddingRequest


@dataclass
class Visit:
    """A request on its way through: who sent it, what it may use, what it has used."""

    principal: Principal | None
    endpoint: str
    model: str
    answer_tokens: int | None = None
    """Tokens that each of its answers may have, where a tier says so."""
    outcomes: list[Outcome] = field(default_factory=list)
    """One per stream that has ended."""
    status: int = _CLIENT_GONE
    """What it ends with, as long as nothing else is known."""


class Gate:
    """The way in.

    Parameters
    ----------
    metrics : Metrics
        Told of every request.
    access : Access, optional
        Who keeps the accounts; without one, everything is open.
    queue : FairQueue, optional
        Where requests wait; without one, the engine lets them wait.
    """

    def __init__(self, metrics: Metrics, access: Access | None, queue: FairQueue | None) -> None:
        self._metrics = metrics
        self._access = access
        self._queue = queue
        self._giving_back: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def visit(self, request: Request, asked: Asked, card: ModelCard, endpoint: str) -> AsyncIterator[Visit]:
        """Let a request in, and keep account of it when it leaves.

        Raises
        ------
        RequestError
            If the tier doesn't include what is asked for, its limits are reached, or there is too much to do.
        """
        principal = principal_of(request)
        with traced_request(request.headers, endpoint=endpoint, model=card.name) as span:
            async with self._visit(request, asked, card, Visit(principal, endpoint, card.name), span) as visit:
                yield visit

    @asynccontextmanager
    async def _visit(
        self, request: Request, asked: Asked, card: ModelCard, visit: Visit, span: Traced
    ) -> AsyncIterator[Visit]:
        principal, endpoint, began = visit.principal, visit.endpoint, time.perf_counter()
        try:
            if isinstance(asked, ChatRequest) and asked.holds_images and not card.images:
                raise RequestError(f"the model {card.name} takes text only, and a message holds an image")
            wanted = _wanted(asked, card, endpoint)
            grant = None
            if principal is not None and self._access is not None:
                _check(principal, asked, card, wanted)
            if isinstance(asked, ChatRequest) and asked.searches and not card.search:
                raise RequestError(
                    f"search_parameters: the model {card.name} doesn't search; mode = off is accepted",
                    code="invalid_value",
                    param="search_parameters",
                )
            if principal is not None and self._access is not None:
                with self._arriving(principal, wanted):
                    grant = await self._admitted(self._access, principal, wanted)
                visit.answer_tokens = grant.answer_tokens
            try:
                async with self._place(request, principal, wanted, visit):
                    yield visit
            except RequestError as error:
                visit.status = error.status
                raise
            finally:
                if grant is not None and self._access is not None:
                    await asyncio.shield(_settle(self._access, grant, _total(visit, wanted, began)))
        except RequestError as error:
            visit.status = error.status
            raise
        finally:
            total = _total(visit, None, began)
            span.say(
                status=visit.status,
                user=principal.user if principal else None,
                prompt_tokens=total.prompt_tokens,
                completion_tokens=total.completion_tokens,
            )
            self._note(visit, total)

    def _arriving(self, principal: Principal, wanted: Wanted) -> AbstractContextManager[None]:
        if self._queue is None:
            return nullcontext()
        return self._queue.arriving(wanted.model, principal.tenant, principal.weight)

    async def _admitted(self, access: Access, principal: Principal, wanted: Wanted) -> Grant:
        """What is set aside; if the client leaves while it is, it is given back."""
        admitting = asyncio.ensure_future(access.admit(principal, wanted))
        try:
            return await asyncio.shield(admitting)
        except asyncio.CancelledError:
            self._giving_back.add(task := asyncio.create_task(_give_back(access, admitting)))
            task.add_done_callback(self._giving_back.discard)
            raise

    @asynccontextmanager
    async def _place(
        self, request: Request, principal: Principal | None, wanted: Wanted, visit: Visit
    ) -> AsyncIterator[None]:
        if self._queue is None:
            yield
            return
        tenant = principal.tenant if principal else address_of(request)
        weight = principal.weight if principal else 1.0
        with ExitStack() as waiting:
            waiting.enter_context(traced("queue", model=wanted.model))
            async with self._queue.place(wanted.model, tenant, weight, wanted.prompt_tokens) as place:
                waiting.close()
                try:
                    yield
                finally:
                    total = _total(visit, wanted, 0.0)
                    place.spent(total.prompt_tokens, total.completion_tokens)

    def _note(self, visit: Visit, total: Outcome) -> None:
        """One line for the log and the tenant's figures; nothing of what was said is in it."""
        principal = visit.principal
        if principal is not None:
            self._metrics.count_tenant(principal.user, visit.model, visit.status, total)
        _LOG.info(
            "request",
            extra={
                "fields": {
                    "endpoint": visit.endpoint,
                    "model": visit.model,
                    "status": visit.status,
                    "user": principal.user if principal else None,
                    "team": principal.team if principal else None,
                    "key": principal.key_id if principal else None,
                    "prompt_tokens": total.prompt_tokens,
                    "completion_tokens": total.completion_tokens,
                    "first_s": round(total.first_s, 4) if total.first_s is not None else None,
                    "seconds": round(total.seconds, 4),
                }
            },
        )


async def _settle(access: Access, grant: Grant, outcome: Outcome) -> None:
    """Put down what was used. The answer has been sent by then: what goes wrong here is said in `access`'s log."""
    with suppress(OperationError):
        await access.settle(grant, outcome)


async def _give_back(access: Access, admitting: asyncio.Future[Grant]) -> None:
    with suppress(InputError, OperationError):
        await access.settle(await admitting, Outcome(status=_CLIENT_GONE))


def _wanted(asked: Asked, card: ModelCard, endpoint: str) -> Wanted:
    tokens = asked.prompt_bytes // BYTES_PER_TOKEN + 1
    if isinstance(asked, EmbeddingRequest):
        return Wanted(endpoint, card.name, tokens)
    prompts = len(asked.prompts()) if isinstance(asked, CompletionRequest) else 1
    count = asked.n or 1
    return Wanted(endpoint, card.name, tokens * count, prompts * count, asked.longest_answer or card.context)


def _check(principal: Principal, asked: Asked, card: ModelCard, wanted: Wanted) -> None:
    """Refuse what the tier doesn't include."""
    tier = principal.tier

    def refuse(what: str, param: str) -> RequestError:
        return RequestError(
            f"the tier {tier.name} does not include {what}", status=403, code="not_in_tier", param=param
        )

    if not tier.has(card.name):
        raise refuse(f"the model {card.name}", "model")
    longest = asked.longest_prompt_bytes // BYTES_PER_TOKEN
    if tier.context is not None and longest > tier.context:
        raise refuse(f"prompts of about {longest:,} tokens: up to {tier.context:,} are accepted", "messages")
    if isinstance(asked, ChatRequest):
        if asked.holds_images and not tier.images:
            raise refuse("images", "messages")
        if asked.searches and not tier.live_knowledge:
            raise refuse("live knowledge", "search_parameters")
        if asked.mode not in tier.modes:
            raise refuse(f"the mode {asked.mode}", "reasoning_effort")


def _total(visit: Visit, wanted: Wanted | None, began: float) -> Outcome:
    """What all streams of a request have used. A prompt whose stream was cut counts as what it was taken for."""
    outcomes = visit.outcomes
    read = sum(outcome.prompt_tokens for outcome in outcomes)
    if wanted is not None and outcomes and any(not outcome.prompt_tokens for outcome in outcomes):
        read = max(read, wanted.prompt_tokens)
    firsts = [outcome.first_s for outcome in outcomes if outcome.first_s is not None]
    return Outcome(
        prompt_tokens=read,
        completion_tokens=sum(outcome.completion_tokens for outcome in outcomes),
        cached_tokens=sum(outcome.cached_tokens for outcome in outcomes),
        first_s=min(firsts) if firsts else None,
        seconds=time.perf_counter() - began,
        status=visit.status,
    )
