"""Traces of requests: what each was doing when, by what, and nothing of what was said."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from gateways import Stub, client_of, serving, text_of

from modelworks.serve.api import create_app
from modelworks.serve.config import ServeConfig
from modelworks.serve.fairness import FairQueue
from modelworks.serve.routing import Router
from modelworks.serve.store import Store
from modelworks.serve.tracing import begin_tracing, end_tracing
from modelworks.spec.fields import validate

pytest.importorskip("opentelemetry.sdk", reason="pip install 'modelworks[telemetry]'")
SECRET = "the word that nobody may see"
CALLERS = "0af7651916cd43dd8448eb211c80319c"


@pytest.fixture
def spans() -> Iterator[Any]:
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter = InMemorySpanExporter()
    begin_tracing(exporter)
    yield exporter
    end_tracing()


def test_a_request_is_one_trace_that_says_where_its_time_went(spans: Any, tmp_path: Path) -> None:
    bad, good = Stub("stub"), Stub("stub")
    try:
        # It is asked first, since it takes more, and is well until then.
        bad.control(fault="busy")
        good.control(fault="none", tokens=4, rate=100)
        engines = {"bad": {"url": bad.url, "concurrency": 64}, "good": {"url": good.url, "concurrency": 32}}
        router = Router(validate(ServeConfig, {"engines": engines, "affinity": False}))
        app = create_app(router, Store(tmp_path), queue=FairQueue(router.capacity))
        with serving(app) as address, client_of(address) as client:
            header = {"traceparent": f"00-{CALLERS}-b7ad6b7169203331-01"}
            asked = [{"role": "user", "content": SECRET}]
            chunks = client.chat.completions.create(model="stub", messages=asked, stream=True, extra_headers=header)
            said = text_of(chunks)
    finally:
        bad.end()
        good.end()
    found = {span.name: span for span in spans.get_finished_spans()}
    assert set(found) == {"request", "queue", "attempt", "first token", "stream"}
    attempts = [span for span in spans.get_finished_spans() if span.name == "attempt"]
    assert [(span.attributes["engine"], span.attributes.get("error")) for span in attempts] == [
        ("bad", "UnavailableError"),
        ("good", None),
    ]
    request = found["request"]
    assert format(request.context.trace_id, "032x") == CALLERS
    for span in spans.get_finished_spans():
        assert span.context.trace_id == request.context.trace_id
        assert span is request or span.parent.span_id == request.context.span_id
        assert request.start_time <= span.start_time <= span.end_time <= request.end_time
    assert found["queue"].end_time <= attempts[0].start_time <= attempts[0].end_time <= attempts[1].start_time
    assert found["first token"].end_time <= found["stream"].end_time
    assert (request.attributes["status"], request.attributes["completion_tokens"]) == (200, 4)
    everything = "".join(span.to_json() for span in spans.get_finished_spans())
    assert SECRET not in everything
    assert said not in everything


def test_nothing_of_opentelemetry_is_imported_when_no_endpoint_is_named() -> None:
    program = (
        "import sys; from modelworks.serve.tracing import begin_tracing, traced; begin_tracing()\n"
        "with traced('queue', model='x') as span: span.say(more=1)\n"
        "assert not any(name.startswith('opentelemetry') for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, env={"PATH": "", "PYTHONPATH": ":".join(sys.path)})
