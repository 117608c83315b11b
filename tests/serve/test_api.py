"""The API as the official `openai` client sees it, with a real model behind a real server."""

from __future__ import annotations

import json
import math
import re
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

MODEL = "smollm2-135m"
QUESTION = [
    {"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": "What is the capital of France?"},
]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


def ask(client: openai.OpenAI, **options: Any) -> Any:
    return client.chat.completions.create(**{"model": MODEL, "messages": QUESTION, "max_tokens": 12, **options})


def gauge(address: str, name: str) -> float:
    page = httpx.get(f"{address}/metrics").text
    found = re.search(rf'^modelworks_{name}\{{[^}}]*model="{MODEL}"[^}}]*\}} (\S+)$', page, re.MULTILINE)
    return float(found[1]) if found else 0.0


def wait_until_idle(address: str, seconds: float = 10) -> float:
    started = time.perf_counter()
    while gauge(address, "requests_running") and time.perf_counter() - started < seconds:
        time.sleep(0.01)
    return time.perf_counter() - started


def test_the_model_is_listed_and_found_by_its_name(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL


def test_an_answer_has_text_and_counts_its_tokens(client: openai.OpenAI) -> None:
    answer = ask(client, temperature=0, max_tokens=16)
    assert "Paris" in answer.choices[0].message.content
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_streamed_answer_is_the_same_text_as_a_whole_one(client: openai.OpenAI) -> None:
    whole = ask(client, temperature=0)
    chunks = list(ask(client, temperature=0, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == whole.choices[0].finish_reason
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_stream_has_no_usage_unless_it_is_asked_for(client: openai.OpenAI) -> None:
    assert all(chunk.usage is None and chunk.choices for chunk in ask(client, stream=True))


def test_the_greedy_answer_is_the_one_of_llama_cpps_own_server(client: openai.OpenAI, gguf: Any) -> None:
    xllamacpp = pytest.importorskip("xllamacpp")
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(gguf)
    parameters.n_ctx, parameters.n_parallel, parameters.n_batch, parameters.n_ubatch = 1024, 1, 256, 256
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
    parameters.verbosity = 0
    other = xllamacpp.Server(parameters)
    request = {"messages": QUESTION, "temperature": 0, "max_tokens": 24}
    theirs = httpx.post(f"{other.listening_address}/v1/chat/completions", json=request, timeout=60).json()
    del other
    ours = ask(client, temperature=0, max_tokens=24, extra_body={"cache_prompt": False})
    assert ours.choices[0].message.content == theirs["choices"][0]["message"]["content"]


def test_a_stop_text_ends_the_answer_and_is_not_in_it(client: openai.OpenAI) -> None:
    whole = ask(client, temperature=0).choices[0].message.content
    word = whole.split()[3]
    stopped = ask(client, temperature=0, stop=[word]).choices[0]
    assert stopped.message.content == whole[: whole.index(word)]
    assert stopped.finish_reason == "stop"


def test_a_seed_gives_the_same_answer_again_and_another_seed_another(client: openai.OpenAI) -> None:
    answers = [ask(client, seed=seed, temperature=1.2).choices[0].message.content for seed in (7, 7, 8, -7)]
    assert answers[0] == answers[1]
    assert len(set(answers)) > 1


def test_two_choices_have_their_own_index_and_their_tokens_are_added(client: openai.OpenAI) -> None:
    answer = ask(client, n=2, temperature=1.2, max_tokens=5, seed=1)
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.usage.completion_tokens == 10
    assert answer.choices[0].message.content != answer.choices[1].message.content


def test_two_streamed_choices_come_under_one_id(client: openai.OpenAI) -> None:
    chunks = list(ask(client, n=2, max_tokens=4, stream=True, stream_options={"include_usage": True}))
    assert len({chunk.id for chunk in chunks}) == 1
    assert {chunk.choices[0].index for chunk in chunks if chunk.choices} == {0, 1}
    assert chunks[-1].usage.completion_tokens == 8


def test_more_choices_than_slots_are_answered(client: openai.OpenAI) -> None:
    assert len(ask(client, n=5, max_tokens=2).choices) == 5


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_are_those_of_the_likeliest_tokens(client: openai.OpenAI, stream: bool) -> None:
    answer = ask(client, temperature=0, logprobs=True, top_logprobs=3, max_tokens=5, stream=stream)
    parts = [chunk.choices[0].logprobs for chunk in answer] if stream else [answer.choices[0].logprobs]
    tokens = [token for part in parts if part for token in part.content]
    assert len(tokens) == 5
    for token in tokens:
        assert len(token.top_logprobs) == 3
        assert token.logprob == token.top_logprobs[0].logprob <= 0
        assert sum(math.exp(top.logprob) for top in token.top_logprobs) <= 1 + 1e-6
        assert bytes(token.bytes).decode() == token.token


@pytest.mark.parametrize("stream", [False, True])
def test_text_completions_have_log_probabilities_in_their_own_form(client: openai.OpenAI, stream: bool) -> None:
    answer = client.completions.create(
        model=MODEL, prompt="Once upon a", max_tokens=4, temperature=0, logprobs=2, echo=True, stream=stream
    )
    choices = [chunk.choices[0] for chunk in answer] if stream else [answer.choices[0]]
    text = "".join(choice.text for choice in choices)
    parts = [choice.logprobs for choice in choices if choice.logprobs]
    tokens = [token for part in parts for token in part.tokens]
    offsets = [offset for part in parts for offset in part.text_offset]
    assert text.startswith("Once upon a")
    assert [text[offset : offset + len(token)] for token, offset in zip(tokens, offsets, strict=True)] == tokens
    assert all(len(top) == 2 for part in parts for top in part.top_logprobs)


def test_each_of_several_prompts_is_continued(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL, prompt=["One, two,", "The capital of France is"], max_tokens=3, temperature=0
    )
    assert "three" in answer.choices[0].text
    assert "Paris" in answer.choices[1].text


def test_a_prompt_of_token_numbers_is_continued_like_its_text(client: openai.OpenAI) -> None:
    text = client.completions.create(model=MODEL, prompt="Hello", max_tokens=3, temperature=0)
    numbers = client.completions.create(model=MODEL, prompt=[19556], max_tokens=3, temperature=0)
    assert numbers.usage.prompt_tokens == text.usage.prompt_tokens == 1
    assert numbers.choices[0].text == text.choices[0].text


def test_a_json_schema_is_obeyed(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}, "people": {"type": "integer"}},
        "required": ["city", "people"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "city", "schema": schema, "strict": True}}
    content = ask(client, response_format=form, max_tokens=80, temperature=0).choices[0].message.content
    answer = json.loads(content)
    assert set(answer) == {"city", "people"}
    assert isinstance(answer["people"], int)


def test_a_json_object_is_an_object(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": 'Answer with the JSON object {"ok": true}'}]
    form = {"type": "json_object"}
    content = ask(client, messages=messages, response_format=form, max_tokens=100, temperature=0, stop=["}"])
    assert content.choices[0].message.content.lstrip().startswith("{")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_required_tool_call_is_made_with_arguments_of_its_schema(
    client: openai.OpenAI, choice: Any, stream: bool
) -> None:
    messages = [{"role": "user", "content": "What is the weather in Paris?"}]
    answer = ask(
        client, messages=messages, tools=[WEATHER], tool_choice=choice, max_tokens=60, temperature=0, stream=stream
    )
    if stream:
        choices = [chunk.choices[0] for chunk in answer]
        call = next(one.delta.tool_calls[0] for one in choices if one.delta.tool_calls)
        finish = choices[-1].finish_reason
    else:
        call, finish = answer.choices[0].message.tool_calls[0], answer.choices[0].finish_reason
    assert finish == "tool_calls"
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments)["city"] in {"Paris", "Rome"}


def test_a_conversation_with_a_past_call_goes_on(client: openai.OpenAI) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
    messages = [
        *QUESTION,
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "18 degrees, sunny"},
    ]
    assert ask(client, messages=messages, tools=[WEATHER], tool_choice="none").choices[0].message.content


def test_embeddings_have_unit_length_and_near_texts_are_near(client: openai.OpenAI) -> None:
    texts = ["The cat sat on the mat.", "A cat is sitting on a mat.", "Quarterly revenue grew by nine percent."]
    answer = client.embeddings.create(model=MODEL, input=texts)
    cat, also_cat, revenue = [item.embedding for item in answer.data]
    assert math.isclose(sum(x * x for x in cat), 1, rel_tol=1e-3)
    assert sum(a * b for a, b in zip(cat, also_cat, strict=True)) > sum(
        a * b for a, b in zip(cat, revenue, strict=True)
    )
    assert answer.usage.prompt_tokens > 15


def test_two_chats_are_answered_at_once(client: openai.OpenAI, address: str) -> None:
    with ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(ask, client, max_tokens=60, temperature=0) for _ in range(2)]
        most = 0.0
        while not all(answer.done() for answer in answers):
            most = max(most, gauge(address, "requests_running"))
    assert answers[0].result().choices[0].message.content
    assert most == 2


def test_a_client_that_leaves_frees_its_slot_at_once(client: openai.OpenAI, address: str) -> None:
    wait_until_idle(address)
    before = gauge(address, "completion_tokens_total")
    stream = ask(client, max_tokens=900, stream=True, messages=[{"role": "user", "content": "Tell a long story"}])
    next(iter(stream))
    assert gauge(address, "requests_running") == 1
    stream.close()
    assert wait_until_idle(address, 60) < 60
    assert gauge(address, "completion_tokens_total") - before < 300


def test_a_client_that_leaves_while_its_long_prompt_is_read_frees_its_slot(address: str) -> None:
    wait_until_idle(address)
    before = gauge(address, "completion_tokens_total")
    messages = [{"role": "user", "content": "alpha beta gamma " * 290}]
    body = {"model": MODEL, "messages": messages, "seed": 1, "stream": True}
    timeout = httpx.Timeout(60, read=0.3)
    with (
        pytest.raises(httpx.ReadTimeout),
        httpx.stream("POST", f"{address}/v1/chat/completions", json=body, timeout=timeout) as answer,
    ):
        for _ in answer.iter_bytes():
            pass
    assert wait_until_idle(address, 120) < 120
    assert gauge(address, "requests_waiting") == 0
    assert gauge(address, "completion_tokens_total") == before  # the engine stopped reading, and wrote nothing


def test_metrics_count_requests_and_tokens_by_model(client: openai.OpenAI, address: str) -> None:
    before = gauge(address, "completion_tokens_total")
    ask(client, max_tokens=7, temperature=0)
    page = httpx.get(f"{address}/metrics").text
    assert gauge(address, "completion_tokens_total") >= before + 7
    for name in ("time_to_first_token_seconds_bucket", "time_per_output_token_seconds_sum", "prompt_tokens_total"):
        assert f"modelworks_{name}{{" in page
    assert f'modelworks_requests_total{{endpoint="chat",model="{MODEL}",status="200"}}' in page


def test_health_says_ok(address: str) -> None:
    assert httpx.get(f"{address}/health").json() == {"status": "ok"}
