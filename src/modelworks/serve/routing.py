"""Many engines as one: each request goes to the engine that is best for it now, and to another if that one fails.

Of the engines that answer for a model and are well, a conversation goes to the one that read its beginning (it still
has it in its cache), unless that one has a quarter more to do than the mean: rendezvous hashing (Thaler and
Ravishankar 1998) with bounded loads (Mirrokni, Thorup and Zadimoghaddam 2018). What has no beginning in common goes to
the least loaded. An engine that does not begin to answer is passed over; once an answer has begun, it stays.

The configuration can be replaced while answers run. They end where they began; an engine that is no longer named is
closed when its last answer has ended.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from typing import Any

import orjson
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_after_attempt
from tenacity.wait import wait_random_exponential

from modelworks.serve.breaker import Breaker
from modelworks.serve.config import EngineConfig, ModelConfig, ServeConfig
from modelworks.serve.engine import Activity, Endpoint, Engine, ModelCard
from modelworks.serve.errors import RequestError, UnavailableError, UnknownModelError
from modelworks.serve.tracing import traced
from modelworks.serve.upstream import UpstreamEngine
from modelworks.spec.errors import InputError, OperationError

_LOG = logging.getLogger("modelworks.routing")
_BOUND = 1.25
"""How much more than the mean an engine may have to do before a conversation leaves it."""
_MISSED_CHECKS = 2
"""Checks in a row without an answer, after which an engine counts as down."""
_BACKOFF = wait_random_exponential(multiplier=0.1, max=1)
_MODEL = re.compile(r'"model":\s*"((?:[^"\\]|\\.)*)"')


class Member:
    """One engine, and what is known of it."""

    def __init__(self, name: str, config: EngineConfig, engine: Engine) -> None:
        self.name = name
        self.config = config
        self.engine = engine
        self.breaker = Breaker()
        self.load = 0
        self.missed = 0
        self.idle = asyncio.Event()
        self.idle.set()
        self._cards: dict[str, ModelCard] = {}

    @property
    def capacity(self) -> int:
        """Requests that it is given at once."""
        return self.config.slots if self.config.embedded else self.config.concurrency

    @property
    def well(self) -> bool:
        """Whether it answers when it is asked, and hasn't failed lately."""
        return self.missed < _MISSED_CHECKS and self.breaker.closed

    @property
    def cards(self) -> dict[str, ModelCard]:
        """Its models at the last look."""
        return self._cards

    async def look(self) -> bool:
        """See whether it is well and which models it has; whether they have changed."""
        try:
            if isinstance(self.engine, UpstreamEngine):
                await self.engine.check()
            if self.missed >= _MISSED_CHECKS:
                _LOG.warning("the engine %s is back", self.name)
            self.missed = 0
        except UnavailableError as error:
            self.missed += 1
            if self.missed == _MISSED_CHECKS:
                _LOG.warning("%s", error)
        cards = {card.name: card for card in await self.engine.models()}
        changed, self._cards = cards != self._cards, cards
        return changed

    def taken(self) -> None:
        """One request more."""
        self.load += 1
        self.idle.clear()
        self.breaker.begin()

    def released(self) -> None:
        """One request less."""
        self.load -= 1
        if not self.load:
            self.idle.set()


@dataclass(frozen=True)
class Target:
    """A model at an engine, by its name there."""

    member: Member
    model: str


@dataclass(frozen=True)
class Route:
    """A model as the gateway offers it."""

    name: str
    targets: tuple[Target, ...]
    fallback: tuple[str, ...] = ()
    context: int | None = None
    images: bool = False
    search: bool = False

    def card(self) -> ModelCard:
        """What is said of it: what all its engines can do."""
        cards = [target.member.cards[target.model] for target in self.targets if target.model in target.member.cards]
        if not cards:
            return ModelCard(
                self.name, self.context or 4096, 0, "unknown", "unknown", images=self.images, search=self.search
            )
        context = self.context or min(card.context for card in cards)
        images = self.images or all(card.images for card in cards)
        return replace(cards[0], name=self.name, context=context, images=images, search=self.search)


class Router(Engine):
    """The engines of a configuration, as one.

    Parameters
    ----------
    config : ServeConfig
        The engines and models.
    embedded : callable, optional
        Makes the engine of an entry with ``embedded = true``.
    """

    def __init__(self, config: ServeConfig, embedded: Callable[[EngineConfig], Engine] | None = None) -> None:
        self._embedded = embedded
        self._config = config
        self._members = {name: self._member(name, engine) for name, engine in config.engines.items()}
        self._routes: dict[str, Route] = {}
        self._checks: dict[str, asyncio.Task[None]] = {}
        self._retiring: set[asyncio.Task[None]] = set()
        self._reloading = asyncio.Lock()

    def _member(self, name: str, config: EngineConfig) -> Member:
        if not config.embedded:
            return Member(name, config, UpstreamEngine(name, config))
        if self._embedded is None:
            raise InputError(f"engines.{name}: embedded = true is not accepted here")
        return Member(name, config, self._embedded(config))

    async def start(self) -> None:
        """Look at all engines once, and from now on now and then."""
        await asyncio.gather(*(member.look() for member in self._members.values()))
        self._draw_up()
        self._watch()

    async def reload(self, config: ServeConfig) -> None:
        """Go over to another configuration. Answers that run are not disturbed.

        Engines whose entry is the same stay, with what is known of them; new ones are looked at before they are asked.
        """
        async with self._reloading:
            before, members = self._members, {}
            fresh = []
            for name, engine in config.engines.items():
                kept = before.get(name)
                members[name] = kept if kept and kept.config == engine else self._member(name, engine)
                if members[name] is not kept:
                    fresh.append(members[name])
            await asyncio.gather(*(member.look() for member in fresh))
            self._members, self._config = members, config
            self._draw_up()
            for name, member in before.items():
                if members.get(name) is not member:
                    self._checks.pop(name).cancel()
                    task = asyncio.create_task(_retire(member))
                    self._retiring.add(task)
                    task.add_done_callback(self._retiring.discard)
            self._watch()
        _LOG.warning("the configuration was replaced: %s", ", ".join(members))

    def _watch(self) -> None:
        for name, member in self._members.items():
            if name not in self._checks:
                self._checks[name] = asyncio.create_task(self._keep_looking(member), name=f"check {name}")

    async def _keep_looking(self, member: Member) -> None:
        while True:
            await asyncio.sleep(member.config.check_every_s)
            try:
                if await member.look():
                    self._draw_up()
            except Exception:  # noqa: BLE001 (one look that goes wrong must not be the last)
                _LOG.exception("the engine %s could not be looked at", member.name)

    def _draw_up(self) -> None:
        """Which models are offered, and by whom."""
        routes: dict[str, Route] = {}
        mapped = {name for name, model in self._config.models.items() if model.on}
        for member in self._members.values():
            for model in member.cards:
                if model not in mapped:
                    known = routes.get(model) or Route(model, ())
                    routes[model] = replace(known, targets=(*known.targets, Target(member, model)))
        for name, known_of in self._config.models.items():
            if known_of.on:
                targets = tuple(Target(self._members[engine], there) for engine, there in known_of.on.items())
                routes[name] = Route(name, targets)
            if name in routes:
                routes[name] = _with(routes[name], known_of)
        self._routes = routes

    def activity(self) -> dict[str, Activity]:
        """How busy each model is, by the names of the gateway where they are the engines' own."""
        total: dict[str, Activity] = {}
        for member in self._members.values():
            for model, busy in member.engine.activity().items():
                before = total.get(model, Activity(0, 0))
                total[model] = Activity(before.running + busy.running, before.waiting + busy.waiting)
        return total

    def members(self) -> list[Member]:
        """The engines, for whoever shows them."""
        return list(self._members.values())

    def capacity(self, model: str) -> int:
        """Requests that those engines of a model that are well are given at once."""
        targets = self._routes[model].targets if model in self._routes else ()
        well = [target for target in targets if target.member.well]
        # When none is well, none is waited for: a request learns so at once.
        return sum(target.member.capacity for target in well or targets)

    async def models(self) -> list[ModelCard]:
        """What is offered."""
        await self._look_again()
        return [self._routes[name].card() for name in sorted(self._routes)]

    async def card(self, model: str) -> ModelCard:
        """One of the models."""
        if model not in self._routes:
            await self._look_again()
        return self._route(model).card()

    async def _look_again(self) -> None:
        """Models can be added to the embedded engine's store at any time."""
        for member in self._members.values():
            if member.config.embedded and await member.look():
                self._draw_up()

    def _route(self, model: str) -> Route:
        if model not in self._routes:
            raise UnknownModelError(model, sorted(self._routes))
        return self._routes[model]

    async def load(self, model: str) -> None:
        """Make a model ready where it isn't always."""
        for target in self._route(model).targets:
            await target.member.engine.load(target.model)

    async def stream(self, endpoint: Endpoint, model: str, body: dict[str, Any]) -> AsyncGenerator[list[str], None]:
        """Answer a request by the best engine that begins to; see `Engine.stream`."""
        member, batches, batch, name = await self._first(
            model, _beginning(endpoint, body), lambda target: _open(target, endpoint, body)
        )
        member.breaker.begun()
        try:
            async with aclosing(batches):
                rename = _renaming(batch[0], name)
                yield [rename(chunk) for chunk in batch] if rename else batch
                async for batch in batches:
                    yield [rename(chunk) for chunk in batch] if rename else batch
            member.breaker.succeeded()
        except OperationError as error:
            member.breaker.failed()
            _LOG.warning("%s", error)
            raise
        finally:
            member.released()

    async def embed(self, model: str, texts: list[str]) -> tuple[list[list[float]], int]:
        """Vectors from the best engine that answers."""

        async def ask(target: Target) -> tuple[Any, Any]:
            return await target.member.engine.embed(target.model, texts), None

        member, vectors, _, _ = await self._first(model, None, ask, fallback=False)
        member.released()
        member.breaker.succeeded()
        found: tuple[list[list[float]], int] = vectors
        return found

    async def _first(
        self, model: str, beginning: bytes | None, ask: Callable[[Target], Any], fallback: bool = True
    ) -> tuple[Member, Any, Any, str]:
        """The first engine that begins to answer, with what `ask` gave; it has one request more, to be released.

        Vectors of another model can't stand for this one's, so that embeddings have no fallback.
        """
        route = self._route(model)
        chain = [route, *(self._routes[name] for name in route.fallback if fallback and name in self._routes)]
        failures: list[UnavailableError] = []
        for each in chain:
            with suppress(UnavailableError):
                return *await self._tried(each, beginning, ask, failures), each.name
        raise _given_up(model, failures)

    async def _tried(
        self, route: Route, beginning: bytes | None, ask: Callable[[Target], Any], failures: list[UnavailableError]
    ) -> tuple[Member, Any, Any]:
        passed_over: set[str] = set()

        def wait(state: RetryCallState) -> float:
            """None while there is an engine that has not been asked."""
            fresh = any(target.member.name not in passed_over and target.member.well for target in route.targets)
            return 0.0 if fresh else float(_BACKOFF(state))

        retrying = AsyncRetrying(
            stop=stop_after_attempt(self._config.tries),
            wait=wait,
            retry=retry_if_exception_type(UnavailableError),
            reraise=True,
        )
        async for attempt in retrying:
            with attempt:
                target = self._choose(route, beginning, passed_over)
                member = target.member
                member.taken()
                begun = False
                try:
                    with traced("attempt", engine=member.name, model=target.model):
                        given, first = await ask(target)
                    begun = True
                except UnavailableError as error:
                    failures.append(error)
                    passed_over.add(member.name)
                    if error.busy_s is None:
                        member.breaker.failed()
                        _LOG.warning("%s", error)
                    raise
                except RequestError:
                    member.breaker.succeeded()  # it is well: the request is not
                    raise
                finally:
                    if not begun:
                        member.released()
                return member, given, first
        raise AssertionError  # the last attempt raises

    def _choose(self, route: Route, beginning: bytes | None, passed_over: set[str]) -> Target:
        """The engine to ask now.

        Raises
        ------
        UnavailableError
            If none of them is well.
        """
        well = [target for target in route.targets if target.member.well]
        if not well:
            raise UnavailableError(f"no engine of the model {route.name} is well")
        fresh = [target for target in well if target.member.name not in passed_over] or well
        if beginning is not None and self._config.affinity and len(fresh) > 1:
            capacity = sum(target.member.capacity for target in fresh)
            share = (sum(target.member.load for target in fresh) + 1) / capacity
            for target in sorted(fresh, key=lambda target: _rank(beginning, target.member.name), reverse=True):
                if target.member.load < _BOUND * share * target.member.capacity:
                    return target
        return min(fresh, key=lambda target: (target.member.load / target.member.capacity, -target.member.capacity))

    async def close(self) -> None:
        """Stop all answers and close all engines."""
        for task in [*self._checks.values(), *self._retiring]:
            task.cancel()
        await asyncio.gather(*self._checks.values(), *self._retiring, return_exceptions=True)
        self._checks.clear()
        await asyncio.gather(*(member.engine.close() for member in self._members.values()))


def _with(route: Route, model: ModelConfig) -> Route:
    return replace(
        route, fallback=tuple(model.fallback), context=model.context, images=model.images, search=model.search
    )


async def _open(target: Target, endpoint: Endpoint, body: dict[str, Any]) -> tuple[Any, list[str]]:
    """The stream of an answer and its first chunks."""
    batches = target.member.engine.stream(endpoint, target.model, body)
    begun = False
    try:
        first = await anext(batches)
        begun = True
    except StopAsyncIteration:
        raise UnavailableError(f"the engine {target.member.name} said nothing") from None
    except UnavailableError:
        raise
    except OperationError as error:
        _LOG.warning("%s", error)  # it may name files, which are no business of the client
        raise UnavailableError(f"the engine {target.member.name} could not begin to answer") from None
    finally:
        if not begun:
            await batches.aclose()
    return batches, first


async def _retire(member: Member) -> None:
    """Close an engine when its last answer has ended."""
    try:
        await member.idle.wait()
    finally:
        await member.engine.close()


def _given_up(model: str, failures: Iterable[UnavailableError]) -> Exception:
    """What the client is told: that there is too much to do, if that is all there is to say, or that it is down."""
    busy = [error.busy_s for error in failures if error.busy_s is not None]
    if busy:
        text = f"the engines of the model {model} have too much to do"
        return RequestError(text, status=429, code="overloaded", retry_after_s=min(busy))
    return UnavailableError(f"no engine of the model {model} answers now")


def _beginning(endpoint: Endpoint, body: dict[str, Any]) -> bytes | None:
    """What all turns of a conversation have in common: its tools, and its messages up to the first of the user."""
    if endpoint != "chat":
        return None
    messages = body["messages"]
    first = next((index for index, message in enumerate(messages) if message.get("role") == "user"), 0)
    return hashlib.blake2b(orjson.dumps([body.get("tools"), messages[: first + 1]]), digest_size=16).digest()


def _rank(beginning: bytes, engine: str) -> bytes:
    """Rendezvous hashing: the engine with the highest rank has the conversation."""
    return hashlib.blake2b(engine.encode(), key=beginning, digest_size=8).digest()


def _renaming(chunk: str, name: str) -> Callable[[str], str] | None:
    """How chunks get the gateway's name of the model; None if they have it.

    An unescaped quote can't stand inside generated text, so that only the field itself matches.
    """
    found = _MODEL.search(chunk)
    if found is None or found[1] == name:
        return None
    written = orjson.dumps(name).decode()
    given, wanted = found[0], f'"model":{written}'
    return lambda chunk: chunk.replace(given, wanted, 1)
