"""``/v1/responses`` as the official client sees it, over the real model, and its events one by one."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import httpx
import openai
import pytest
from openai.types.responses import Response as OfficialResponse

from modelworks.serve.responses import Response, ResponsesRequest

MODEL = "smollm2-135m"
QUESTION = "What is the capital of France?"
WEATHER = {
    "type": "function",
    "name": "weather",
    "description": "The weather of a city",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}


def ask(client: openai.OpenAI, **options: Any) -> Any:
    asked: dict[str, Any] = {"model": MODEL, "input": QUESTION, "max_output_tokens": 16, "temperature": 0}
    return client.responses.create(**(asked | options))


def test_a_response_says_what_the_chat_says_and_counts_its_tokens(client: openai.OpenAI) -> None:
    response = ask(client)
    messages: Any = [{"role": "user", "content": QUESTION}]
    chat = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=16, temperature=0)
    assert response.output_text == chat.choices[0].message.content
    assert response.usage.output_tokens == chat.usage.completion_tokens  # type: ignore[union-attr]
    assert response.usage.input_tokens == chat.usage.prompt_tokens  # type: ignore[union-attr]
    assert response.status == ("completed" if chat.choices[0].finish_reason == "stop" else "incomplete")


def test_its_events_come_in_their_order_and_make_up_the_whole(client: openai.OpenAI) -> None:
    whole, events = ask(client, max_output_tokens=4), list(ask(client, max_output_tokens=4, stream=True))
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert set(kinds[4:-4]) == {"response.output_text.delta"}
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",  # four tokens were not enough
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == events[-4].text == events[-1].response.output_text == whole.output_text
    assert events[-1].response.incomplete_details.reason == "max_output_tokens"


def test_the_next_response_goes_on_from_the_one_it_names_in_front_of_its_own_instructions(
    client: openai.OpenAI,
) -> None:
    first = ask(client, instructions="Be short.")
    named = ask(client, previous_response_id=first.id, input="And of Italy?")
    history: Any = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "And of Italy?"},
    ]
    said = ask(client, input=history)
    assert named.output_text == said.output_text
    assert named.usage.input_tokens == said.usage.input_tokens  # the first one's instructions are not taken over


def test_what_was_kept_is_found_listed_and_forgotten(client: openai.OpenAI) -> None:
    response = ask(client)
    assert client.responses.retrieve(response.id) == response
    items = client.responses.input_items.list(response.id, order="asc").data
    assert [(item.role, item.content[0].text) for item in items] == [("user", QUESTION)]  # type: ignore[union-attr]
    client.responses.delete(response.id)
    for forgotten in (response.id, ask(client, store=False).id):
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(forgotten)
        with pytest.raises(openai.NotFoundError, match="there is no response"):
            ask(client, previous_response_id=forgotten)


def test_a_function_is_called_and_its_answer_read(client: openai.OpenAI) -> None:
    asked: Any = {"tools": [WEATHER], "tool_choice": "required", "max_output_tokens": 64}
    response = ask(client, input="What is the weather in Rome?", **asked)
    (call,) = response.output
    assert (call.type, call.name) == ("function_call", "weather")
    assert json.loads(call.arguments)["city"] in {"Paris", "Rome"}
    output: Any = [{"type": "function_call_output", "call_id": call.call_id, "output": "It rains."}]
    assert ask(client, previous_response_id=response.id, input=output, tools=[WEATHER]).output


def test_a_schema_binds_the_text(client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]}
    text: Any = {"format": {"type": "json_schema", "name": "city", "schema": schema}}
    assert json.loads(ask(client, text=text, max_output_tokens=64).output_text)["city"] in {"Paris", "Rome"}


def test_the_texts_tokens_come_with_their_probabilities(client: openai.OpenAI) -> None:
    response = ask(client, include=["message.output_text.logprobs"], top_logprobs=2)
    part = response.output[0].content[0]
    assert "".join(token.token for token in part.logprobs) == response.output_text
    assert all(len(token.top_logprobs) == 2 for token in part.logprobs)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "item 0 of type 'item_reference' is not accepted"),
        ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "a part of type 'input_file' in item 0"),
        ({"input": [{"type": "function_call", "name": "weather"}]}, "item 0 needs arguments, a text"),
        ({"input": []}, "input: List should have at least 1 item"),
        ({"input": 7}, "input"),
        ({"input": [{"role": "nobody", "content": "x"}]}, "input: Input should be"),
        ({"tools": [{"type": "web_search"}]}, "a tool of type 'web_search' is not accepted: function is"),
        ({"background": True}, "background is not supported"),
        ({"previous_response_id": "../../etc/passwd"}, "previous_response_id: String should match"),
        ({"max_output_tokens": 0}, "max_output_tokens: Input should be greater"),
        ({"model": "grok-9"}, "grok-9"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type: Input should be"),
        ({"search_parameters": {"mode": "on"}}, "the model smollm2-135m doesn't search; mode = off is accepted"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_sentence(address: str, fields: dict[str, Any], says: str) -> None:
    answer = httpx.post(f"{address}/v1/responses", json={"model": MODEL, "input": "x"} | fields)
    assert answer.status_code in {400, 404}
    assert says in answer.json()["error"]["message"]


def told(*deltas: dict[str, Any], finish: str = "stop", **last: Any) -> list[dict[str, Any]]:
    """The events of a response whose chat says so."""
    usage = {"prompt_tokens": 3, "completion_tokens": 5}
    chunks: list[dict[str, Any]] = [{"choices": [{"delta": delta}]} for delta in deltas]
    chunks += [{"choices": [{"delta": {}, "finish_reason": finish}], "usage": usage, **last}]

    async def batches() -> AsyncGenerator[list[str], None]:
        for chunk in chunks:
            yield [json.dumps({"id": "x", "created": 1, "model": "m", **chunk})]

    async def all_of_them() -> list[dict[str, Any]]:
        response = Response(ResponsesRequest(model="m", input="x"), batches())
        found = b"".join([events async for events in response.events()])
        return [json.loads(line[6:]) for line in found.decode().splitlines() if line.startswith("data: ")]

    return asyncio.run(all_of_them())


def test_reasoning_a_message_and_two_calls_are_four_items() -> None:
    def call(index: int, name: str | None, arguments: str) -> dict[str, Any]:
        function = {"arguments": arguments} | ({"name": name} if name else {})
        return {"tool_calls": [{"index": index, **({"id": f"call_{index}"} if name else {}), "function": function}]}

    events = told(
        {"reasoning_content": "Let me "},
        {"reasoning_content": "think."},
        {"content": "I look."},
        call(0, "weather", '{"city": '),
        call(0, None, '"Rome"}'),
        call(1, "weather", '{"city": "Paris"}'),
        finish="tool_calls",
    )
    response = OfficialResponse.model_validate(events[-1]["response"])
    assert [item.type for item in response.output] == ["reasoning", "message", "function_call", "function_call"]
    assert response.output_text == "I look."
    calls: Any = response.output[2:]
    assert [(one.call_id, one.arguments) for one in calls] == [
        ("call_0", '{"city": "Rome"}'),
        ("call_1", '{"city": "Paris"}'),
    ]
    done = [event["item"]["id"] for event in events if event["type"] == "response.output_item.done"]
    assert done == [item.id for item in response.output]
    assert response.usage is not None
    assert response.usage.total_tokens == 8


def test_what_was_found_is_cited() -> None:
    events = told({"content": "It rains."}, citations=["https://example.org/weather"])
    (annotation,) = events[-1]["response"]["output"][0]["content"][0]["annotations"]
    assert (annotation["type"], annotation["url"]) == ("url_citation", "https://example.org/weather")
