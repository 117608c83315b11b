"""Engines behind the gateway: where a request goes, and what happens when an engine fails."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from gateways import HELLO, Stub, client_of, numbers_of, serving, text_of, wait_for

from modelworks.serve.api import create_app
from modelworks.serve.config import ServeConfig, load_config
from modelworks.serve.events import Events
from modelworks.serve.fairness import FairQueue
from modelworks.serve.llamacpp import EngineSettings, LlamaCppEngine
from modelworks.serve.routing import Router
from modelworks.serve.store import Store
from modelworks.spec.errors import InputError
from modelworks.spec.fields import validate

TOKENS = list(range(8))


@pytest.fixture(scope="module")
def stubs() -> Iterator[tuple[Stub, Stub]]:
    both = Stub(), Stub()
    yield both
    for stub in both:
        stub.end()


@pytest.fixture
def pair(stubs: tuple[Stub, Stub]) -> tuple[Stub, Stub]:
    for stub in stubs:
        stub.control(fault="none", rate=200, tokens=8)
        wait_for(lambda stub=stub: not stub.seen()["running"])
    return stubs


@contextmanager
def gateway(tmp_path: Path, config: dict[str, Any], engines: dict[str, str] | None = None) -> Iterator[openai.OpenAI]:
    """The client of a gateway over engines, given by name and address."""
    named = {name: {"url": url, "connect_s": 2.0, "check_every_s": 0.2} for name, url in (engines or {}).items()}
    for name, extra in config.pop("engines", {}).items():
        named[name] = named.get(name, {}) | extra
    spec = validate(ServeConfig, {"engines": named, **config})
    router = Router(spec)
    queue = FairQueue(router.capacity, spec.queue.waiting, spec.queue.wait_s)
    with serving(create_app(router, Store(tmp_path), queue=queue)) as address, client_of(address) as client:
        yield client


def ask(client: openai.OpenAI, text: str = "hello", **options: Any) -> Any:
    messages = [{"role": "user", "content": text}]
    return client.chat.completions.create(**{"model": "stub", "messages": messages, **options})


def requests_of(*stubs: Stub) -> list[int]:
    return [stub.seen()["requests"] for stub in stubs]


def test_an_answer_from_an_engine_elsewhere_is_whole_streamed_or_not(pair, tmp_path) -> None:
    with gateway(tmp_path, {}, {"a": pair[0].url}) as client:
        whole = ask(client)
        chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
        text = client.completions.create(model="stub", prompt="x", max_tokens=4)
    assert numbers_of(whole.choices[0].message.content) == TOKENS
    assert whole.usage.completion_tokens == 8
    assert numbers_of(text_of(chunks)) == TOKENS
    assert chunks[-1].usage.completion_tokens == 8
    assert numbers_of(text.choices[0].text) == TOKENS[:4]


def test_a_model_has_the_gateways_name_and_the_engine_is_asked_by_its_own(pair, tmp_path) -> None:
    with gateway(
        tmp_path, {"models": {"my/grok": {"on": {"a": "stub"}, "context": 999}}}, {"a": pair[0].url}
    ) as client:
        chunks = list(ask(client, model="my/grok", stream=True))
        card = client.models.retrieve("my/grok")
    assert {chunk.model for chunk in chunks} == {"my/grok"}
    assert pair[0].seen()["last"]["model"] == "stub"
    assert card.context_length == 999


def test_another_modelworks_stands_behind_ours_and_says_the_same(address, client, tmp_path) -> None:
    question = [{"role": "user", "content": "What is the capital of France?"}]
    options = {"model": "smollm2-135m", "messages": question, "temperature": 0, "max_tokens": 12}
    with gateway(tmp_path, {}, {"second": f"{address}/v1"}) as through:
        assert [model.id for model in through.models.list()] == ["smollm2-135m"]
        assert through.models.retrieve("smollm2-135m").context_length == 1024
        answer = through.chat.completions.create(**options)
        assert answer.choices[0].message.content == client.chat.completions.create(**options).choices[0].message.content
        vectors = [
            one.embeddings.create(model="smollm2-135m", input="a cat").data[0].embedding for one in (through, client)
        ]
        with pytest.raises(openai.BadRequestError) as error:
            through.chat.completions.create(**options | {"messages": [{"role": "user", "content": "word " * 2000}]})
    assert error.value.code == "context_length_exceeded"
    assert vectors[0] == pytest.approx(vectors[1], abs=1e-6)


def test_requests_go_to_the_engine_that_has_least_to_do(pair, tmp_path) -> None:
    for stub in pair:
        stub.control(rate=1)
    before = requests_of(*pair)
    with gateway(tmp_path, {"affinity": False}, {"a": pair[0].url, "b": pair[1].url}) as client:
        open_streams = [ask(client, stream=True) for _ in range(10)]
        for stream in open_streams:
            stream.close()
    assert [after - earlier for after, earlier in zip(requests_of(*pair), before, strict=True)] == [5, 5]


def test_a_conversation_stays_with_its_engine_and_conversations_are_spread(pair, tmp_path) -> None:
    homes = []
    with gateway(tmp_path, {}, {"a": pair[0].url, "b": pair[1].url}) as client:
        for topic in range(12):
            before = requests_of(*pair)
            messages = [{"role": "user", "content": f"topic {topic}"}]
            for turn in range(3):
                ask(client, messages=messages)
                messages += [{"role": "assistant", "content": "yes"}, {"role": "user", "content": f"turn {turn}"}]
            homes.append([after - earlier for after, earlier in zip(requests_of(*pair), before, strict=True)])
    assert all(sorted(home) == [0, 3] for home in homes)
    assert len({tuple(home) for home in homes}) == 2


def test_a_conversation_leaves_an_engine_that_has_too_much_to_do(pair, tmp_path) -> None:
    pair[0].control(rate=1)
    pair[1].control(rate=1)
    before = requests_of(*pair)
    with gateway(tmp_path, {}, {"a": pair[0].url, "b": pair[1].url}) as client:
        open_streams = [ask(client, "the same for all", stream=True) for _ in range(20)]
        for stream in open_streams:
            stream.close()
    spread = [after - earlier for after, earlier in zip(requests_of(*pair), before, strict=True)]
    assert min(spread) >= 7


@pytest.mark.parametrize("fault", ["refuse", "die", "silent", "busy"])
def test_an_engine_that_does_not_begin_is_passed_over(pair, tmp_path, fault: str) -> None:
    config = {"engines": {"a": {"first_token_s": 0.3}, "b": {"first_token_s": 0.3}}}
    with gateway(tmp_path, config, {"a": pair[0].url, "b": pair[1].url}) as client:
        pair[0].control(fault=fault)
        for topic in range(6):
            assert numbers_of(ask(client, f"topic {topic}").choices[0].message.content) == TOKENS


@pytest.mark.parametrize(
    ("fault", "says"),
    [("break", "broke off"), ("stall", "said nothing"), ("error", "failed"), ("error at once", "failed")],
)
def test_an_answer_that_has_begun_is_not_begun_again(pair, tmp_path, fault: str, says: str) -> None:
    config = {"engines": {"a": {"stall_s": 0.3}, "b": {"stall_s": 0.3}}}
    with gateway(tmp_path, config, {"a": pair[0].url, "b": pair[1].url}) as client:
        for stub in pair:
            stub.control(fault=fault)
        before, heard = sum(requests_of(*pair)), []
        with pytest.raises(openai.APIError, match=says) as error:
            heard.extend(chunk.choices[0].delta.content for chunk in ask(client, stream=True))
    assert numbers_of("".join(heard)) == [0, 1, 2]
    assert sum(requests_of(*pair)) == before + 1
    assert "secret" not in str(error.value)


def test_one_connection_carries_one_answer_after_the_other(pair, tmp_path) -> None:
    # With `check_every_s` at its longest nothing but requests calls the engine.
    with gateway(tmp_path, {"engines": {"a": {"check_every_s": 3600}}}, {"a": pair[0].url}) as client:
        ask(client)
        before = pair[0].seen()["connections"]
        for _ in range(5):
            assert numbers_of(text_of(ask(client, stream=True))) == TOKENS
        assert pair[0].seen()["connections"] == before


def test_what_is_wrong_with_a_request_is_said_once_and_tried_once(pair, tmp_path) -> None:
    with gateway(tmp_path, {}, {"a": pair[0].url, "b": pair[1].url}) as client:
        for stub in pair:
            stub.control(fault="bad")
        before = sum(requests_of(*pair))
        for _ in range(5):
            with pytest.raises(openai.BadRequestError, match="too hot") as error:
                ask(client)
        assert sum(requests_of(*pair)) == before + 5
        for stub in pair:
            stub.control(fault="none")
        assert ask(client).usage.completion_tokens == 8
    assert error.value.param == "temperature"


def test_when_all_engines_are_down_it_is_said_without_their_addresses(pair, tmp_path) -> None:
    with gateway(tmp_path, {}, {"a": pair[0].url}) as client:
        pair[0].control(fault="refuse")
        with pytest.raises(openai.InternalServerError) as error:
            ask(client)
    assert error.value.status_code == 503
    assert error.value.code == "unavailable"
    assert "127.0.0.1" not in str(error.value)
    assert "secret" not in str(error.value)


def test_when_all_engines_are_busy_the_client_learns_when_to_come_back(pair, tmp_path) -> None:
    with gateway(tmp_path, {}, {"a": pair[0].url}) as client:
        pair[0].control(fault="busy")
        with pytest.raises(openai.RateLimitError) as error:
            ask(client)
    assert error.value.response.headers["retry-after"] == "7"


def test_a_circuit_opens_after_failures_and_closes_after_a_trial(pair, tmp_path) -> None:
    with gateway(tmp_path, {"tries": 1}, {"a": pair[0].url}) as client:
        pair[0].control(fault="break")
        for _ in range(3):
            with pytest.raises(openai.APIError):
                text_of(ask(client, stream=True))
        pair[0].control(fault="die")
        for _ in range(3):
            with pytest.raises(openai.InternalServerError):
                ask(client)
        pair[0].control(fault="none")
        before = requests_of(pair[0])
        with pytest.raises(openai.InternalServerError):
            ask(client)
        assert requests_of(pair[0]) == before
        answer = wait_for(lambda: _or_none(client), 10)
    assert answer.usage.completion_tokens == 8


def _or_none(client: openai.OpenAI) -> Any:
    try:
        return ask(client)
    except openai.InternalServerError:
        return None


def test_an_engine_that_is_down_is_not_asked_and_one_that_is_back_is(tmp_path) -> None:
    first, second = Stub(), Stub()
    port = first.port
    try:
        with gateway(tmp_path, {"affinity": False}, {"a": first.url, "b": second.url}) as client:
            first.end()
            for _ in range(6):
                assert ask(client).usage.completion_tokens == 8
            first = Stub(port=port)
            wait_for(lambda: ask(client) and first.seen()["requests"])
    finally:
        first.end()
        second.end()


def test_a_fallback_answers_under_its_own_name(pair, tmp_path) -> None:
    config = {"models": {"big": {"on": {"a": "stub"}, "fallback": ["small"]}, "small": {"on": {"b": "stub"}}}}
    with gateway(tmp_path, config, {"a": pair[0].url, "b": pair[1].url}) as client:
        assert ask(client, model="big").model == "big"
        pair[0].control(fault="refuse")
        assert ask(client, model="big").model == "small"


def test_an_embedded_engine_that_cannot_load_its_model_gives_way_to_the_fallback(pair, gguf, tmp_path) -> None:
    store, copy = Store(tmp_path / "models"), tmp_path / "copy.gguf"
    content = gguf.read_bytes()
    copy.write_bytes(content[:4096].replace(b"llama", b"xlama") + content[4096:])  # a kind that llama.cpp doesn't know
    store.add("unknown", copy, source="test")
    engines = {"here": {"embedded": True, "slots": 1, "context": 256}, "a": {"url": pair[0].url}}
    config = validate(ServeConfig, {"engines": engines, "models": {"unknown": {"fallback": ["stub"]}}})
    settings = EngineSettings(slots=1, threads=1, context=256)
    router = Router(config, lambda _: LlamaCppEngine(store, settings))
    with serving(create_app(router, store)) as address, client_of(address) as client:
        assert {model.id for model in client.models.list()} == {"unknown", "stub"}
        answer = ask(client, model="unknown")
    assert (answer.model, answer.usage.completion_tokens) == ("stub", 8)


def test_a_client_that_leaves_frees_the_engine_at_once(pair, tmp_path) -> None:
    pair[0].control(rate=10, tokens=1000)
    with gateway(tmp_path, {}, {"a": pair[0].url}) as client:
        streams = [ask(client, stream=True) for _ in range(20)]
        wait_for(lambda: pair[0].seen()["running"] == 20)
        left = time.perf_counter()
        for stream in streams:
            stream.close()
        wait_for(lambda: not pair[0].seen()["running"])
        assert time.perf_counter() - left < 2
        waiting = threading.Thread(target=_leave_a_whole_answer, args=(client,))
        waiting.start()
        waiting.join()
        wait_for(lambda: not pair[0].seen()["running"])


def _leave_a_whole_answer(client: openai.OpenAI) -> None:
    with pytest.raises(openai.APITimeoutError):
        ask(client.with_options(timeout=0.3))


def test_an_engine_is_given_no_more_than_it_can_take_and_the_rest_waits(pair, tmp_path) -> None:
    pair[0].control(rate=100)
    config = {"engines": {"a": {"concurrency": 3}}}
    with gateway(tmp_path, config, {"a": pair[0].url}) as client:
        threads = [threading.Thread(target=ask, args=(client, f"topic {number}")) for number in range(12)]
        running = []
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            running.append(pair[0].seen()["running"])
            time.sleep(0.01)
    assert max(running) == 3


def test_who_comes_when_too_many_wait_is_refused_at_once(pair, tmp_path) -> None:
    pair[0].control(rate=1)
    config = {"engines": {"a": {"concurrency": 1}}, "queue": {"waiting": 0}}
    with gateway(tmp_path, config, {"a": pair[0].url}) as client, ask(client, stream=True):
        began = time.perf_counter()
        with pytest.raises(openai.RateLimitError) as error:
            ask(client)
        assert time.perf_counter() - began < 1
    assert error.value.code == "overloaded"
    assert int(error.value.response.headers["retry-after"]) >= 1


def test_an_image_is_passed_on_to_a_model_that_can_see_and_to_no_other(pair, tmp_path) -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
    messages = [{"role": "user", "content": [{"type": "text", "text": "What is this?"}, image]}]
    config = {"models": {"eye": {"on": {"a": "stub"}, "images": True}}}
    with gateway(tmp_path, config, {"a": pair[0].url}) as client:
        ask(client, model="eye", messages=messages)
        assert pair[0].seen()["last"]["messages"] == messages
        with pytest.raises(openai.BadRequestError, match="text only"):
            ask(client, model="stub", messages=messages)
        elsewhere = {"type": "image_url", "image_url": {"url": "http://169.254.169.254/latest"}}
        with pytest.raises(openai.BadRequestError, match="not fetched"):
            ask(client, model="eye", messages=[{"role": "user", "content": [elsewhere]}])


def test_the_engines_key_is_sent_to_it_and_shown_to_nobody(pair, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("STUB_KEY", "sk-very-secret")
    with gateway(tmp_path, {"engines": {"a": {"key_env": "STUB_KEY"}}}, {"a": pair[0].url}) as client:
        ask(client)
        assert pair[0].seen()["authorization"] == "Bearer sk-very-secret"
        pair[0].control(fault="refuse")
        with pytest.raises(openai.InternalServerError) as error:
            ask(client)
    assert "very-secret" not in str(error.value)


def test_a_long_list_of_models_is_read_whole(tmp_path) -> None:
    names = [f"model-{number:04}-{'x' * 60}" for number in range(1500)]
    stub = Stub(*names)
    try:
        with gateway(tmp_path, {}, {"a": stub.url}) as client:
            assert [model.id for model in client.models.list()] == names
    finally:
        stub.end()


def test_neither_a_redirect_nor_a_proxy_of_the_environment_leads_a_request_and_its_key_elsewhere(
    pair, tmp_path, monkeypatch
) -> None:
    monkeypatch.setenv("STUB_KEY", "sk-very-secret")
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, pair[1].url.removesuffix("/v1"))
    before = requests_of(pair[1])
    with gateway(tmp_path, {"engines": {"a": {"key_env": "STUB_KEY"}}}, {"a": pair[0].url}) as client:
        assert ask(client).usage.completion_tokens == 8
        pair[0].control(fault="redirect", elsewhere=f"{pair[1].url}/chat/completions")
        with pytest.raises(openai.InternalServerError):
            ask(client)
    assert requests_of(pair[1]) == before
    assert pair[1].seen()["authorization"] != "Bearer sk-very-secret"


def test_models_are_swapped_while_a_stream_runs_and_the_stream_loses_nothing(pair, tmp_path) -> None:
    pair[0].control(rate=40, tokens=40)
    file = tmp_path / "serve.toml"
    file.write_text(f'[engines.a]\nurl = "{pair[0].url}"\n[models.old]\non = {{ a = "stub" }}\n')
    command = [sys.executable, "-m", "modelworks", "serve", "--config", str(file), "--port", "0"]
    environment = os.environ | {"MODELWORKS_HOME": str(tmp_path)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        line = process.stdout.readline()
        address = next(word for word in line.split() if word.startswith("http")).removesuffix("/v1")
        with client_of(address) as client:
            wait_for(lambda: _listed(client) == {"old"})
            stream = iter(ask(client, model="old", stream=True))
            first = next(stream)
            file.write_text("engines = 3\n")
            process.send_signal(signal.SIGHUP)
            file.write_text(f'[engines.b]\nurl = "{pair[1].url}"\n[models.new]\non = {{ b = "stub" }}\n')
            process.send_signal(signal.SIGHUP)
            wait_for(lambda: _listed(client) == {"new"})
            assert numbers_of(text_of([first, *stream])) == list(range(40))
            assert ask(client, model="new").usage.completion_tokens == 8
            with pytest.raises(openai.NotFoundError):
                ask(client, model="old")
            assert httpx.post(f"{address}/v1/admin/reload").status_code == 404
    finally:
        process.terminate()
        process.wait(20)


def _listed(client: openai.OpenAI) -> set[str]:
    try:
        return {model.id for model in client.models.list()} - {"stub"}
    except openai.APIConnectionError:
        return set()


def test_a_reload_keeps_engines_whose_entry_is_the_same_and_closes_those_that_left(pair) -> None:
    async def walk() -> None:
        def config(**engines: Any) -> ServeConfig:
            return validate(ServeConfig, {"engines": {name: {"url": url} for name, url in engines.items()}})

        router = Router(config(a=pair[0].url, b=pair[1].url))
        await router.start()
        first, second = router.members()
        stream = router.stream("chat", "stub", {"messages": HELLO})
        await anext(stream)
        busy = first if first.load else second
        kept = {"a": pair[0].url} if busy is second else {"b": pair[1].url}
        await router.reload(config(**kept))
        assert router.members() == [first if busy is second else second]
        rest = [chunk async for batch in stream for chunk in batch]
        assert '"usage"' in rest[-1]
        await asyncio.wait_for(busy.idle.wait(), 5)
        await router.close()

    asyncio.run(walk())


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "'engines' is missing"),
        ("[engines]\n", "engines is empty"),
        ('[engines.a]\nurl = "ftp://x"\n', "engines.a.url = 'ftp://x' is not accepted: an address such as"),
        ('[engines.a]\nurl = "http://user:pw@x/v1"\n', "without user"),
        ('[engines.a]\nurl = "http://x/v1"\nembedded = true\n', "engines.a: either url or embedded = true"),
        ('[engines.a]\nurl = "http://x/v1"\nconcurency = 3\n', "did you mean 'concurrency'"),
        ('[engines.a]\nurl = "http://x/v1"\nkey_env = "NOT_SET_ANYWHERE"\n', "engines.a.key_env = 'NOT_SET_ANYWHERE'"),
        ('[engines.a]\nurl = "http://x/v1"\nconcurrency = 0\n', "engines.a.concurrency = 0 is not accepted"),
        (
            '[engines.a]\nurl = "http://x"\n[models.m]\non = { b = "m" }\n',
            "models.m.on names the engine 'b'; there are a",
        ),
        ('[engines.a]\nurl = "http://x"\n[models.m]\nfallback = ["m"]\n', "models.m.fallback names the model itself"),
        ("engines = [", "not TOML"),
    ],
)
def test_a_configuration_that_cannot_be_used_is_refused_in_one_sentence(tmp_path, text: str, says: str) -> None:
    file = tmp_path / "serve.toml"
    file.write_text(text)
    with pytest.raises(InputError) as error:
        load_config(file)
    assert says in str(error.value)
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 1000])
def test_events_are_the_same_however_the_network_cuts_them(size: int) -> None:
    sent = 'data: {"a":"ü\\n"}\n\n: comment\n\ndata:{"b":1}\r\n\r\ndata: [DONE]\n\n'.encode()
    events, found = Events(), []
    for start in range(0, len(sent), size):
        found += events.take(sent[start : start + size])
    assert found == ['{"a":"ü\\n"}', '{"b":1}']
    assert events.ended
