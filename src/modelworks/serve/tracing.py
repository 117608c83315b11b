"""OpenTelemetry traces of requests: how long each waited, was tried, and wrote. Off unless an endpoint is named.

A request is a trace: ``request``, and in it ``queue`` (waiting for a place), ``attempt`` (one engine, until it begins),
``first token`` and ``stream``. Names and figures are in them, and never what was said. A caller's own trace is gone on
with (W3C ``traceparent``).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from modelworks import __version__
from modelworks.spec.errors import InputError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span, Tracer

ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
"""The environment variables that say where traces go, as OpenTelemetry names them."""
_tracer: Tracer | None = None
_provider: Any = None
_PARENT: ContextVar[Any] = ContextVar("parent", default=None)
"""The context of the request that is being answered. Ours and not OpenTelemetry's: an answer is made by generators,
which end in other contexts than they begin in."""


def begin_tracing(exporter: SpanExporter | None = None) -> None:
    """Send traces from now on, if the environment says where to.

    Parameters
    ----------
    exporter : SpanExporter, optional
        Where they go instead, at once.

    Raises
    ------
    InputError
        If an endpoint is named and OpenTelemetry is not installed.
    """
    global _tracer, _provider
    if _provider is not None or (exporter is None and not any(os.environ.get(name) for name in ENDPOINTS)):
        return
    try:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor

        named = Resource.create({"service.name": os.environ.get("OTEL_SERVICE_NAME", "modelworks")})
        _provider = TracerProvider(resource=named)
        if exporter is not None:
            _provider.add_span_processor(SimpleSpanProcessor(exporter))
        else:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

            _provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    except ModuleNotFoundError as error:
        raise InputError(
            f"{ENDPOINTS[0]} is set, and the package {error.name} is not installed: pip install "
            "'modelworks[telemetry]', or unset it"
        ) from None
    _tracer = _provider.get_tracer("modelworks", __version__)


def check_tracing() -> None:
    """Say before anything begins that traces are wanted and can't be made; see `begin_tracing`."""
    begin_tracing()
    end_tracing()


def end_tracing() -> None:
    """Send what has not been sent, and trace no more."""
    global _tracer, _provider
    if _provider is not None:
        _provider.shutdown()
    _tracer = _provider = None


class Traced:
    """A span that may not be there."""

    def __init__(self, span: Span | None) -> None:
        self._span = span

    def say(self, **attributes: Any) -> None:
        """Add figures and names; those that are None are left out."""
        if self._span is not None:
            self._span.set_attributes({name: value for name, value in attributes.items() if value is not None})

    def end(self, **attributes: Any) -> None:
        """End it."""
        self.say(**attributes)
        if self._span is not None:
            self._span.end()


def begin(name: str, **attributes: Any) -> Traced:
    """Begin a span of the request that is being answered; `Traced.end` ends it."""
    if _tracer is None:
        return Traced(None)
    traced = Traced(_tracer.start_span(name, context=_PARENT.get()))
    traced.say(**attributes)
    return traced


@contextmanager
def traced(name: str, **attributes: Any) -> Iterator[Traced]:
    """A span for as long as a block runs. An error's kind is told, and not what it says."""
    span = begin(name, **attributes)
    try:
        yield span
    except BaseException as error:
        span.say(error=type(error).__name__)
        raise
    finally:
        span.end()


@contextmanager
def traced_request(headers: Mapping[str, str], **attributes: Any) -> Iterator[Traced]:
    """The span of a whole request; those that begin while it runs, in its task or those that it starts, are parts."""
    if _tracer is None:
        yield Traced(None)
        return
    from opentelemetry.trace import SpanKind, set_span_in_context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    callers = TraceContextTextMapPropagator().extract({"traceparent": headers.get("traceparent", "")})
    span = _tracer.start_span("request", context=callers, kind=SpanKind.SERVER)
    request = Traced(span)
    request.say(**attributes)
    before = _PARENT.get()
    _PARENT.set(set_span_in_context(span, callers))
    try:
        yield request
    except BaseException as error:
        request.say(error=type(error).__name__)
        raise
    finally:
        _PARENT.set(before)
        request.end()
