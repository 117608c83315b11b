"""What Prometheus scrapes: requests, times to the first and to each further token, tokens, slots in use.

Running and waiting are read from the engine when the page is asked for, so they are what is, not what was counted.
A model's name becomes a label only if the model is served: labels are bounded.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from modelworks.serve.access import Outcome
from modelworks.serve.engine import Engine, usage_of
from modelworks.serve.fairness import FairQueue
from modelworks.serve.tracing import begin

_TTFT_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_TPOT_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1)


MULTIPROCESS = "PROMETHEUS_MULTIPROC_DIR"
_SHOW_S = 1.0
_GAUGES = {
    "modelworks_requests_running": "Requests in a slot",
    "modelworks_requests_waiting": "Requests waiting for a slot",
    "modelworks_requests_queued": "Requests waiting for an engine",
}


class Metrics:
    """One application's metrics."""

    def __init__(self, engine: Engine, queue: FairQueue | None = None) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "modelworks_requests", "Requests answered", ["endpoint", "model", "status"], registry=self._registry
        )
        self._first = Histogram(
            "modelworks_time_to_first_token_seconds",
            "From a request's arrival to its first token",
            ["model"],
            buckets=_TTFT_BUCKETS,
            registry=self._registry,
        )
        self._each = Histogram(
            "modelworks_time_per_output_token_seconds",
            "Mean time of a request's tokens after the first",
            ["model"],
            buckets=_TPOT_BUCKETS,
            registry=self._registry,
        )
        self._read = Counter("modelworks_prompt_tokens", "Tokens read", ["model"], registry=self._registry)
        self._written = Counter("modelworks_completion_tokens", "Tokens written", ["model"], registry=self._registry)
        self._tenants = Counter(
            "modelworks_tenant_requests", "Requests by user", ["user", "model", "status"], registry=self._registry
        )
        self._tenant_tokens = Counter(
            "modelworks_tenant_tokens", "Tokens by user", ["user", "model", "kind"], registry=self._registry
        )
        self._activity = _Activity(engine, queue)
        self.of_many = MULTIPROCESS in os.environ
        """Whether this process is one of several that are measured together."""
        if not self.of_many:
            self._registry.register(self._activity)
            return
        self._shown: dict[str, Gauge] = {}
        for name, meaning in _GAUGES.items():
            gauge = Gauge(name, meaning, ["model"], registry=self._registry, multiprocess_mode="livesum")
            self._shown[name] = gauge

    def page(self) -> bytes:
        """The metrics in Prometheus' text format; of all processes, where there are several."""
        if not self.of_many:
            return generate_latest(self._registry)
        self._show()
        registry = CollectorRegistry()
        MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return generate_latest(registry)

    async def keep_showing(self) -> None:
        """Write down for the other processes, every second, how busy this one is."""
        while self.of_many:
            self._show()
            await asyncio.sleep(_SHOW_S)

    def _show(self) -> None:
        for family in self._activity.collect():
            for sample in family.samples:
                self._shown[sample.name].labels(sample.labels["model"]).set(sample.value)

    def count(self, endpoint: str, model: str, status: int) -> None:
        """Count an answered request."""
        self._requests.labels(endpoint, model, str(status)).inc()

    def count_tenant(self, user: str, model: str, status: int, outcome: Outcome) -> None:
        """Count a user's request and its tokens."""
        self._tenants.labels(user, model, str(status)).inc()
        self._tenant_tokens.labels(user, model, "prompt").inc(outcome.prompt_tokens)
        self._tenant_tokens.labels(user, model, "completion").inc(outcome.completion_tokens)

    async def measured(
        self, model: str, batches: AsyncGenerator[list[str], None], outcomes: list[Outcome] | None = None
    ) -> AsyncGenerator[list[str], None]:
        """The same stream; its times and tokens are recorded, and added to `outcomes`, when it ends, however it ends.

        Without the engine's word, each chunk but the last counts as a token.
        """
        started = first = last = time.perf_counter()
        chunks, end, span = 0, "", begin("first token", model=model)
        try:
            async with aclosing(batches):
                async for batch in batches:
                    last = time.perf_counter()
                    if not chunks:
                        first = last
                        span.end()
                        span = begin("stream", model=model)
                        self._first.labels(model).observe(first - started)
                    chunks += len(batch)
                    end = batch[-1]
                    yield batch
        finally:
            usage = usage_of(json.loads(end)) if '"usage":' in end else None
            written = usage.completion_tokens if usage else max(chunks - 1, 0)
            span.end(completion_tokens=written)
            self._written.labels(model).inc(written)
            if outcomes is not None:
                read, cached = (usage.prompt_tokens, usage.cached_tokens) if usage else (0, 0)
                outcomes.append(Outcome(read, written, cached, first - started if chunks else None))
            if usage:
                self._read.labels(model).inc(usage.prompt_tokens)
            if written > 1:
                self._each.labels(model).observe((last - first) / (written - 1))


class _Activity(Collector):
    """Requests that have a slot, and those that wait for one."""

    def __init__(self, engine: Engine, queue: FairQueue | None) -> None:
        self._engine = engine
        self._queue = queue

    def collect(self) -> Iterator[GaugeMetricFamily]:
        running, waiting, queued = (GaugeMetricFamily(name, text, labels=["model"]) for name, text in _GAUGES.items())
        for model, activity in self._engine.activity().items():
            running.add_metric([model], activity.running)
            waiting.add_metric([model], activity.waiting)
        if self._queue is not None:
            for model, count in self._queue.waiting().items():
                queued.add_metric([model], count)
            yield queued
        yield from (running, waiting)
