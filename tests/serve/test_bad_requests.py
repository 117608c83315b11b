"""Whatever is sent, the answer is a 4xx in OpenAI's error shape: never a 5xx, never a crash."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modelworks.serve.requests import ChatRequest, CompletionRequest

MODEL = "smollm2-135m"
HELLO = [{"role": "user", "content": "Hello"}]


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


def schema_format(schema: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}


def image(url: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]


BAD_CHATS: dict[str, dict[str, Any]] = {
    "messages": {"messages": []},
    "messages.0": {"messages": [{"role": "user", "content": None}]},
    "messages.0.role": {"messages": [{"role": "wizard", "content": "Hello"}]},
    "temperature": {"temperature": -0.1},
    "top_p": {"top_p": 1.5},
    "max_tokens": {"max_tokens": -1},
    "max_completion_tokens": {"max_completion_tokens": 0},
    "n": {"n": 0},
    "presence_penalty": {"presence_penalty": 3},
    "top_logprobs": {"logprobs": True, "top_logprobs": 21},
    "logit_bias": {"logit_bias": {"-5": 1}},
    "stop": {"stop": ["a"] * 17},
    "stop.0": {"stop": [""]},
    "seed": {"seed": 1.5},
    "stream": {"stream": "yes"},
    "response_format.type": {"response_format": {"type": "yaml"}},
    "response_format.json_schema.schema": schema_format(nested(40)),
    "tools.0.function.name": {"tools": [{"type": "function", "function": {"name": "no spaces"}}]},
    "tool_choice.literal['none','auto','required']": {"tool_choice": "perhaps"},
}


def post(address: str, path: str, body: Any) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return httpx.post(f"{address}{path}", content=content, timeout=120)


def assert_refused(answer: httpx.Response, status: int = 400) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    return dict(error)


@pytest.mark.parametrize("field", BAD_CHATS)
def test_a_bad_field_is_named(address: str, field: str) -> None:
    body = {"model": MODEL, "messages": HELLO, "max_tokens": 2} | BAD_CHATS[field]
    error = assert_refused(post(address, "/v1/chat/completions", body))
    assert error["param"] == field
    assert error["message"].startswith(field)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"model": "smollm2-135m", "messages": [{"role": "user", "content": "\\ud800"}]}',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"model": "smollm2-135m", "messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
    ],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/embeddings"])
def test_a_body_that_is_no_request_is_refused(address: str, path: str, body: bytes) -> None:
    assert_refused(post(address, path, body))


def test_top_logprobs_without_logprobs_are_refused(address: str) -> None:
    assert_refused(post(address, "/v1/chat/completions", {"model": MODEL, "messages": HELLO, "top_logprobs": 2}))


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "strange"},
        {"$ref": "http://127.0.0.1:9/schema.json"},
        {"$ref": "#/nowhere"},
        {"enum": []},
        {"type": "string", "minLength": 10_000_000},
        {"type": "array", "items": {"type": "string"}, "minItems": 1_000_000},
    ],
)
def test_a_schema_that_cannot_be_obeyed_is_refused(address: str, schema: Any) -> None:
    body = {"model": MODEL, "messages": HELLO, "max_tokens": 2} | schema_format(schema)
    assert_refused(post(address, "/v1/chat/completions", body))


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/cat.png", "https://example.com/cat.png", "file:///etc/passwd"])
def test_an_image_address_is_refused_and_not_fetched(address: str, url: str) -> None:
    error = assert_refused(post(address, "/v1/chat/completions", {"model": MODEL, "messages": image(url)}))
    assert "not fetched" in error["message"]


def test_an_image_is_refused_by_a_model_that_reads_text_only(address: str) -> None:
    body = {"model": MODEL, "messages": image("data:image/png;base64,iVBORw0KGgo=")}
    assert "text only" in assert_refused(post(address, "/v1/chat/completions", body))["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_of_a_hundred_thousand_tokens_is_refused(client: openai.OpenAI, stream: bool) -> None:
    messages = [{"role": "user", "content": "word " * 100_000}]
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model=MODEL, messages=messages, stream=stream)
    assert refused.value.code == "context_length_exceeded"


@pytest.mark.parametrize("prompt", [[], [[]], [1.5], [-1], [10**9], [[1], "a"], {"a": 1}, ""])
def test_a_prompt_that_is_none_is_refused(address: str, prompt: Any) -> None:
    assert_refused(post(address, "/v1/completions", {"model": MODEL, "prompt": prompt, "max_tokens": 1}))


@pytest.mark.parametrize("given_input", [[], "", [""], [1, 2], "word " * 5000])
def test_an_input_that_cannot_be_embedded_is_refused(address: str, given_input: Any) -> None:
    assert_refused(post(address, "/v1/embeddings", {"model": MODEL, "input": given_input}))


@pytest.mark.parametrize("name", ["gpt-9", "../smollm2-135m", "smollm2-135m/", "\x00"])
def test_an_unknown_model_is_not_found(address: str, name: str) -> None:
    error = assert_refused(post(address, "/v1/chat/completions", {"model": name, "messages": HELLO}), 404)
    assert error["code"] == "model_not_found"
    assert MODEL in error["message"]


def test_an_unknown_model_is_the_clients_not_found_error(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-9")


def test_a_path_that_does_not_exist_is_not_found(address: str) -> None:
    assert_refused(httpx.get(f"{address}/v1/nothing"), 404)
    assert_refused(httpx.get(f"{address}/nothing"), 404)


def test_a_body_over_the_limit_is_refused(address: str) -> None:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "x" * (2 << 20)}]}
    assert_refused(post(address, "/v1/chat/completions", body), 413)


values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False),
    st.text(max_size=20),
    st.lists(st.one_of(st.integers(), st.text(max_size=5), st.none()), max_size=3),
    st.dictionaries(st.text(max_size=5), st.integers(), max_size=2),
)
fields = st.sampled_from(sorted({*ChatRequest.model_fields, *CompletionRequest.model_fields} - {"model"}))


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(wrong=st.dictionaries(fields, values, min_size=1, max_size=3), chat=st.booleans())
def test_no_mixture_of_values_makes_the_server_fail(address: str, wrong: dict[str, Any], chat: bool) -> None:
    path = "/v1/chat/completions" if chat else "/v1/completions"
    body = {"model": MODEL, "messages": HELLO, "prompt": "Hello", "max_tokens": 1} | wrong
    if not isinstance(body["max_tokens"], int) or body["max_tokens"] > 3:
        body["max_tokens"] = 1
    answer = post(address, path, body)
    assert answer.status_code < 500, answer.text


def test_the_server_still_answers_after_all_this(client: openai.OpenAI) -> None:
    assert client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=2).choices
