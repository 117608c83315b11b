"""xAI's own Python client against a gateway in a process of its own, with accounts, a stub and the real model."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import httpx
import pytest
from pydantic import BaseModel

sys.path.insert(0, str(Path(__file__).parent))
from gateways import Stub, numbers_of, plain_client, wait_for

from modelworks.assistant.accounts import Accounts
from modelworks.assistant.database import Database
from modelworks.serve.within import Caller, ask

pytest.importorskip("xai_sdk", reason="xai-sdk is not installed: pip install 'modelworks[xai]'")
import grpc
import xai_sdk
from google.rpc import error_details_pb2, status_pb2
from xai_sdk.chat import file, image, system, tool, tool_result, user
from xai_sdk.proto import chat_pb2, deferred_pb2, embed_pb2, models_pb2
from xai_sdk.search import SearchParameters, rss_source, web_source
from xai_sdk.tools import web_search

MODEL = "smollm2-135m"
QUESTION = [system("You are a helpful assistant."), user("What is the capital of France?")]
DOT = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAA"
    "AABJRU5ErkJggg=="
)
OPTIONS = [("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1)]


class City(BaseModel):
    """A city."""

    name: Literal["Paris", "Rome"]


WEATHER = tool("weather", "The weather of a city.", City.model_json_schema())

FUNCTION = chat_pb2.Function(name="weather", parameters="no JSON")
HALF = chat_pb2.Function(name="weather", parameters='{"title": "\\ud800"}')
DEEP, DEEPEST = (
    chat_pb2.Function(name="weather", parameters='{"a":' * depth + "1" + "}" * depth) for depth in (50, 50_000)
)


class Served:
    """`modelworks serve --grpc-port 0` with these options, over a configuration."""

    def __init__(self, home: Path, config: str, *options: str) -> None:
        (home / "serve.toml").write_text(config)
        self.log = home / "requests.jsonl"
        environment = {**os.environ, "MODELWORKS_HOME": str(home)}
        environment.pop("MODELWORKS_DATABASE", None)
        words = ["serve", "--config", str(home / "serve.toml"), "--port", "0", "--grpc-port", "0"]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "modelworks", *words, "--log", str(self.log), *options],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        said = self.process.stdout.readline() + self.process.stdout.readline()
        found = re.search(r"(http://[^/]+)/v1.*for xai-sdk on 127\.0\.0\.1:(\d+)", said, re.DOTALL)
        assert found is not None, said
        self.http, self.port = found[1], int(found[2])
        with plain_client(base_url=self.http) as client:
            wait_for(lambda: self._up(client), 180)  # a busy machine is not a failure

    def _up(self, client: Any) -> bool:
        try:
            return bool(client.get("/health").is_success)
        except (OSError, httpx.HTTPError):
            return False

    def options(self, key: str) -> dict[str, Any]:
        return {
            "api_key": key,
            "api_host": f"localhost:{self.port}",
            "use_insecure_channel": True,
            "timeout": 120,
            "channel_options": OPTIONS,
        }

    def client(self, key: str) -> xai_sdk.Client:
        return xai_sdk.Client(**self.options(key))

    def method(self, name: str, kind: Any = None) -> Callable[..., Any]:
        """A method by its name, with nothing of xAI's client between."""
        channel = grpc.insecure_channel(f"localhost:{self.port}", [*OPTIONS, ("grpc.max_send_message_length", -1)])
        read = kind.FromString if kind is not None else None
        return channel.unary_unary(f"/xai_api.{name}", response_deserializer=read)

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(60)


@pytest.fixture(scope="module")
def stub() -> Iterator[Stub]:
    stub = Stub("stub")
    yield stub
    stub.end()


@pytest.fixture(autouse=True)
def _well(stub: Stub) -> None:
    stub.control(fault="none", rate=200, tokens=8)


@pytest.fixture(scope="module")
def accounts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Accounts]:
    database = Database(tmp_path_factory.mktemp("home") / "modelworks.db")
    accounts = Accounts(database)
    key_of(accounts, "alice", "images=true", "live_knowledge=true", "modes=['fast', 'think']")
    yield accounts
    database.close()


@pytest.fixture(scope="module")
def served(accounts: Accounts, stub: Stub, address: str) -> Iterator[Served]:
    """One for all, as it takes seconds to start; the last test ends it."""
    home = Path(str(accounts.database.engine.url.database)).parent
    served = Served(
        home,
        f'drain_s = "20s"\n[engines.a]\nurl = "{stub.url}"\nconcurrency = 8\n[engines.b]\nurl = "{address}/v1"\n'
        '[models.seen]\non = { a = "stub" }\nimages = true\nsearch = true\n',
    )
    yield served
    served.end()


def key_of(
    accounts: Accounts, name: str, *limits: str, scopes: tuple[str, ...] = ("generate", "embed", "models")
) -> str:
    """The key of a user with a tier of its own, who is made if there is none."""
    accounts.set_tier(f"tier-{name}", ["models=['*']", "parallel=100", *limits])
    if name not in {one.name for one in accounts.users()}:
        accounts.add_user(name, tier=f"tier-{name}")
    return accounts.create_key(name, scopes=scopes)[1]


@pytest.fixture
def alice(served: Served, accounts: Accounts) -> Iterator[xai_sdk.Client]:
    key = accounts.create_key("alice", scopes=("generate", "embed", "models", "account"))[1]
    with served.client(key) as client:
        yield client


def refusal(call: Callable[[], Any]) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value


def test_the_real_model_answers_at_once_and_in_a_stream(alice: xai_sdk.Client) -> None:
    chat = alice.chat.create(MODEL, messages=QUESTION, temperature=0, max_tokens=16)
    answer = chat.sample()
    assert "Paris" in answer.content
    assert answer.usage.completion_tokens > 0
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    pieces = [(whole, piece.content) for whole, piece in chat.stream()]
    assert "".join(text for _, text in pieces) == answer.content == pieces[-1][0].content
    assert len([text for _, text in pieces if text]) > 3
    assert pieces[-1][0].usage.completion_tokens == answer.usage.completion_tokens
    assert pieces[-1][0].finish_reason == answer.finish_reason == "REASON_STOP"
    cut = alice.chat.create(MODEL, messages=QUESTION, temperature=0, max_tokens=2).sample()
    assert (cut.finish_reason, cut.usage.completion_tokens) == ("REASON_MAX_LEN", 2)


async def test_the_asynchronous_client_does_the_same(served: Served, accounts: Accounts) -> None:
    key = accounts.create_key("alice", scopes=("generate", "models"))[1]
    async with xai_sdk.AsyncClient(**served.options(key)) as client:
        assert {model.name for model in await client.models.list_language_models()} == {"seen", "stub", MODEL}
        chat = client.chat.create(MODEL, messages=QUESTION, temperature=0, max_tokens=16)
        answer = await chat.sample()
        assert "Paris" in answer.content
        assert "".join([piece.content async for _, piece in chat.stream()]) == answer.content


def test_a_function_is_called_and_its_result_gone_on_from(alice: xai_sdk.Client) -> None:
    chat = alice.chat.create(
        MODEL, messages=[user("What is the weather in Rome?")], tools=[WEATHER], tool_choice="required", max_tokens=64
    )
    answer = chat.sample()
    (call,) = answer.tool_calls
    assert call.function.name == "weather"
    assert City.model_validate_json(call.function.arguments)
    assert answer.finish_reason == "REASON_TOOL_CALLS"
    pieces = [piece.tool_calls for _, piece in chat.stream() if piece.tool_calls]
    assert [(one.function.name, bool(one.id)) for (one,) in pieces] == [("weather", True)]
    assert City.model_validate_json(pieces[0][0].function.arguments)
    told = alice.chat.create(MODEL, messages=[user("What is the weather in Rome?")], tools=[WEATHER], max_tokens=16)
    told.append(answer).append(tool_result("It rains.", tool_call_id=call.id))
    assert told.sample().content


def test_an_answer_is_an_object_of_a_class(alice: xai_sdk.Client) -> None:
    chat = alice.chat.create(MODEL, messages=[user("Name the capital of France.")], max_tokens=64)
    answer, city = chat.parse(City)
    assert city == City.model_validate_json(answer.content)


def test_several_choices_and_log_probabilities(alice: xai_sdk.Client) -> None:
    request = chat_pb2.GetCompletionsRequest(
        model=MODEL, messages=QUESTION, n=2, max_tokens=3, temperature=0, logprobs=True, top_logprobs=2
    )
    answer = alice.chat._stub.GetCompletion(request)
    assert [output.index for output in answer.outputs] == [0, 1]
    for output in answer.outputs:
        tokens = output.logprobs.content
        assert b"".join(token.bytes for token in tokens).decode() == output.message.content
        assert {(len(token.top_logprobs), token.logprob <= 0) for token in tokens} == {(2, True)}
    chunks = list(alice.chat._stub.GetCompletionChunk(request))
    assert {output.index for chunk in chunks for output in chunk.outputs} == {0, 1}


def test_what_is_asked_is_handed_on_as_over_http(alice: xai_sdk.Client, stub: Stub) -> None:
    search = SearchParameters(
        mode="on", max_search_results=3, sources=[web_source("US", safe_search=False), rss_source(["http://a.example"])]
    )
    alice.chat.create(
        "seen",
        messages=[user("What is this?", image(DOT)), user("And ", "now?")],
        temperature=0.7,
        top_p=0.9,
        seed=3,
        stop=["\n"],
        frequency_penalty=-2,
        reasoning_effort="high",
        search_parameters=search,
        user="somebody",
    ).sample()
    last = stub.seen()["last"]
    assert last["messages"][0]["content"][1] == {"type": "image_url", "image_url": {"url": DOT}}
    assert last["messages"][1]["content"] == "And now?"
    given = {name: last[name] for name in ("temperature", "top_p", "seed", "stop", "frequency_penalty")}
    assert given == {"temperature": 0.7, "top_p": 0.9, "seed": 3, "stop": ["\n"], "frequency_penalty": -2}
    assert last["reasoning_effort"] == "high"
    assert last["search_parameters"] == {
        "mode": "on",
        "max_search_results": 3,
        "return_citations": True,
        "sources": [
            {"type": "web", "country": "US", "safe_search": False},
            {"type": "rss", "links": ["http://a.example"]},
        ],
    }


@pytest.mark.parametrize(
    ("asked", "code", "words"),
    [
        ({"model": "nothing"}, "NOT_FOUND", "the model 'nothing' does not exist"),
        ({"messages": [user("what?", image(DOT))]}, "INVALID_ARGUMENT", "the model stub takes text only"),
        ({"messages": [user(image("http://127.0.0.1/a.png"))]}, "INVALID_ARGUMENT", "image URLs are not fetched"),
        ({"messages": [user(file("file_1"))]}, "INVALID_ARGUMENT", "a part of type 'file' is not accepted"),
        ({"tools": [web_search()]}, "INVALID_ARGUMENT", "tools.0.type"),
        ({"tools": [chat_pb2.Tool(function=FUNCTION)]}, "INVALID_ARGUMENT", "tools.0.function.parameters"),
        ({"tools": [chat_pb2.Tool(function=HALF)]}, "INVALID_ARGUMENT", "the body is not JSON"),
        ({"tools": [chat_pb2.Tool(function=DEEP)]}, "INVALID_ARGUMENT", "nested"),
        ({"tools": [chat_pb2.Tool(function=DEEPEST)]}, "INVALID_ARGUMENT", "tools.0.function.parameters"),
        ({"tool_choice": "required"}, "INVALID_ARGUMENT", "tool_choice asks for a call and tools is empty"),
        ({"temperature": 3}, "INVALID_ARGUMENT", "temperature"),
        ({"temperature": float("nan")}, "INVALID_ARGUMENT", "temperature"),
        ({"max_tokens": 0}, "INVALID_ARGUMENT", "max_tokens"),
        ({"reasoning_effort": "xhigh"}, "INVALID_ARGUMENT", "reasoning_effort"),
        ({"include": ["inline_citations"]}, "INVALID_ARGUMENT", "include: this server doesn't do that"),
        ({"use_encrypted_content": True}, "INVALID_ARGUMENT", "use_encrypted_content"),
        ({"search_parameters": SearchParameters(mode="on")}, "INVALID_ARGUMENT", "the model stub doesn't search"),
        ({"store_messages": True, "seed": 1}, "INVALID_ARGUMENT", "seed: not accepted together with"),
        ({"previous_response_id": "resp_" + "0" * 48}, "NOT_FOUND", "there is no response"),
    ],
)
def test_what_is_not_done_is_refused_with_one_sentence(
    alice: xai_sdk.Client, asked: dict[str, Any], code: str, words: str
) -> None:
    chat = alice.chat.create(**{"model": "stub", "messages": [user("hello")], **asked})
    for call in (chat.sample, lambda: list(chat.stream())):
        refused = refusal(call)
        assert refused.code().name == code
        assert words in refused.details()


def test_methods_that_are_not_here_say_so(alice: xai_sdk.Client) -> None:
    calls = [
        lambda: alice.tokenize.tokenize_text("hello", "stub"),
        lambda: alice.image.sample("a cat", model="stub"),
        lambda: alice.models.list_embedding_models(),
    ]
    for call in calls:
        refused = refusal(call)
        assert refused.code() is grpc.StatusCode.UNIMPLEMENTED
        assert "is not done by this server" in refused.details()


def test_a_key_is_needed_with_its_scope_and_tells_of_itself(
    served: Served, accounts: Accounts, alice: xai_sdk.Client
) -> None:
    right = key_of(accounts, "right")
    wrong = right[:-1] + ("y" if right.endswith("x") else "x")
    for client in (served.client("mw-nobody"), served.client(wrong)):
        assert refusal(client.models.list_language_models).code() is grpc.StatusCode.UNAUTHENTICATED
        chat = client.chat.create("stub", messages=[user("hello")])
        assert refusal(chat.sample).code() is grpc.StatusCode.UNAUTHENTICATED
        assert refusal(lambda chat=chat: next(iter(chat.stream()))).code() is grpc.StatusCode.UNAUTHENTICATED
    bare = served.method("Models/ListLanguageModels")
    assert "Authorization: Bearer" in refusal(lambda: bare(b"")).details()
    lists = served.client(key_of(accounts, "lister", scopes=("models",)))
    assert [model.name for model in lists.models.list_language_models()]
    refused = refusal(lists.chat.create("stub", messages=[user("hello")]).sample)
    assert refused.code() is grpc.StatusCode.PERMISSION_DENIED
    assert "lacks the scope generate" in refused.details()
    key = alice.auth.get_api_key_info()
    assert (key.user_id, sorted(key.acls)) == ("alice", ["account", "embed", "generate", "models"])
    assert key.redacted_api_key == f"mw-{key.api_key_id}-..."


def test_models_are_those_of_the_tier(served: Served, accounts: Accounts, alice: xai_sdk.Client) -> None:
    assert {model.name for model in alice.models.list_language_models()} == {"seen", "stub", MODEL}
    seen = alice.models.get_language_model("seen")
    assert list(seen.input_modalities) == [models_pb2.TEXT, models_pb2.IMAGE]
    assert (list(seen.output_modalities), seen.max_prompt_length) == ([models_pb2.TEXT], 4096)
    few = served.client(key_of(accounts, "few", "models=['stub']"))
    assert [model.name for model in few.models.list_language_models()] == ["stub"]
    assert refusal(lambda: few.models.get_language_model("seen")).code() is grpc.StatusCode.NOT_FOUND
    refused = refusal(few.chat.create("seen", messages=[user("hello")]).sample)
    assert refused.code() is grpc.StatusCode.PERMISSION_DENIED
    assert "the tier tier-few does not include the model seen" in refused.details()


def test_a_limit_that_is_reached_says_when_to_come_again(served: Served, accounts: Accounts) -> None:
    client = served.client(key_of(accounts, "once", "messages=1", "window_s=600"))
    chat = client.chat.create("stub", messages=[user("hello")])
    assert chat.sample().content
    refused = refusal(chat.sample)
    assert refused.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    trailing = dict(refused.trailing_metadata())
    assert 0 < int(trailing["retry-after"]) <= 600
    status, retry = status_pb2.Status.FromString(trailing["grpc-status-details-bin"]), error_details_pb2.RetryInfo()
    assert status.message == refused.details()
    (packed,) = [detail for detail in status.details if detail.Is(retry.DESCRIPTOR)]
    packed.Unpack(retry)
    assert retry.retry_delay.seconds == int(trailing["retry-after"])
    assert refusal(lambda: list(chat.stream())).code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_requests_over_grpc_and_http_share_a_limit(served: Served, accounts: Accounts) -> None:
    key = key_of(accounts, "both", "messages=1", "window_s=600")
    body = {"model": "stub", "messages": [{"role": "user", "content": "hello"}]}
    with plain_client(base_url=served.http, headers={"Authorization": f"Bearer {key}"}) as http:
        assert http.post("/v1/chat/completions", json=body).is_success
    refused = refusal(served.client(key).chat.create("stub", messages=[user("hello")]).sample)
    assert refused.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_who_hangs_up_frees_the_place_and_pays_for_what_was_written(
    served: Served, accounts: Accounts, stub: Stub
) -> None:
    stub.control(rate=20, tokens=1000)
    client = served.client(key_of(accounts, "leaver", "parallel=1"))
    accounts.add_user("root", tier="tier-leaver", admin=True)
    root = accounts.create_key("root", scopes=("admin",))[1]
    before, counted = stub.seen()["gone"], left_of(served, root)
    chat = client.chat.create("stub", messages=[user("hello")])
    stream = client.chat._stub.GetCompletionChunk(chat._make_request(1))
    assert [next(stream).outputs[0].delta.content[:2] for _ in range(4)] == ["0@", "1@", "2@", "3@"]
    assert refusal(chat.sample).code() is grpc.StatusCode.RESOURCE_EXHAUSTED  # the tier's one place is taken
    stream.cancel()
    wait_for(lambda: stub.seen()["gone"] == before + 1)
    waits = threading.Thread(target=lambda: refusal(chat.sample))
    wait_for(lambda: 499 in [line["status"] for line in lines_of(served, "leaver")])
    waits.start()
    wait_for(lambda: stub.seen()["running"] == 1)
    client.close()  # in the middle of an answer that doesn't stream
    waits.join(30)
    wait_for(lambda: stub.seen()["gone"] == before + 2)
    stub.control(rate=200, tokens=8)
    wait_for(lambda: [line["status"] for line in lines_of(served, "leaver")].count(499) == 2)
    left = next(line for line in lines_of(served, "leaver") if line["status"] == 499)
    assert left["completion_tokens"] >= 3
    wait_for(lambda: left_of(served, root) == counted + 2)


def left_of(served: Served, key: str) -> float:
    """How many chats with the stub were left by their clients, as Prometheus is told."""
    with plain_client(base_url=served.http, headers={"Authorization": f"Bearer {key}"}) as http:
        page = http.get("/metrics").text
    label = 'modelworks_requests_total{endpoint="chat",model="stub",status="499"}'
    return sum(float(line.split()[-1]) for line in page.splitlines() if line.startswith(label))


def lines_of(served: Served, name: str) -> list[dict[str, Any]]:
    """What the log says of a user's requests."""
    lines = [json.loads(line) for line in served.log.read_text().splitlines()]
    return [line for line in lines if line["message"] == "request" and line["user"] == name]


def test_an_engine_that_fails_is_told_apart_from_a_request_that_does(
    served: Served, accounts: Accounts, alice: xai_sdk.Client, stub: Stub
) -> None:
    chat = alice.chat.create("stub", messages=[user("hello")])
    stub.control(fault="bad")
    assert refusal(chat.sample).code() is grpc.StatusCode.INVALID_ARGUMENT
    stub.control(fault="refuse")
    once = served.method("Chat/GetCompletion")  # xAI's client asks again by itself
    metadata = (("authorization", f"Bearer {key_of(accounts, 'patient')}"),)
    refused = refusal(lambda: once(chat._make_request(1).SerializeToString(), metadata=metadata))
    assert refused.code() is grpc.StatusCode.UNAVAILABLE
    assert "/srv/secret" not in refused.details()
    stub.control(fault="error", rate=5)  # slowly, so that each token is passed on before the next comes
    pieces = []

    def listen() -> None:
        pieces.extend(piece.content for _, piece in chat.stream())

    refused = refusal(listen)
    assert refused.code() is grpc.StatusCode.INTERNAL
    assert numbers_of("".join(pieces)) == [0, 1, 2]
    assert "/srv/secret" not in refused.details()
    stub.control(fault="none", rate=200)

    def again() -> str:
        try:
            return chat.sample().content
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE:  # it is left alone for a few seconds
                raise
            return ""

    assert numbers_of(wait_for(again, 30)) == list(range(8))


async def test_what_breaks_off_by_an_error_of_ours_is_not_taken_for_a_whole_answer() -> None:
    events: list[dict[str, Any]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b'data: {"a":1}\n\n', "more_body": True})
        raise ZeroDivisionError

    async def take(event: dict[str, Any]) -> bool:
        events.append(event)
        return True

    with pytest.raises(ZeroDivisionError):
        await ask(app, Caller("127.0.0.1", 1, {}), "POST", "/", take=take)
    assert events == [{"a": 1}]


def test_an_answer_that_is_kept_is_gone_on_from_and_its_owners_alone(
    served: Served, accounts: Accounts, alice: xai_sdk.Client, stub: Stub
) -> None:
    answer = alice.chat.create("stub", messages=[user("hello")], store_messages=True).sample()
    (kept,) = alice.chat.get_stored_completion(answer.id)
    assert (kept.id, kept.content, kept.usage.total_tokens) == (answer.id, answer.content, answer.usage.total_tokens)
    further = alice.chat.create("stub", messages=[user("more")], previous_response_id=answer.id, store_messages=True)
    *_, (whole, _) = further.stream()
    assert numbers_of(whole.content) == list(range(8))
    assert (whole.finish_reason, whole.usage.completion_tokens) == ("REASON_STOP", 8)
    assert [message["content"] for message in stub.seen()["last"]["messages"]] == ["hello", answer.content, "more"]
    assert alice.chat.get_stored_completion(whole.id)[0].content == whole.content
    other = served.client(key_of(accounts, "other"))
    for call in (other.chat.get_stored_completion, other.chat.delete_stored_completion):
        assert refusal(lambda call=call: call(answer.id)).code() is grpc.StatusCode.NOT_FOUND
        assert refusal(lambda call=call: call(f"{answer.id}/input_items")).code() is grpc.StatusCode.NOT_FOUND
    stranger = other.chat.create("stub", messages=[user("more")], previous_response_id=answer.id)
    assert refusal(stranger.sample).code() is grpc.StatusCode.NOT_FOUND
    assert alice.chat.delete_stored_completion(answer.id) == answer.id
    assert refusal(lambda: alice.chat.get_stored_completion(answer.id)).code() is grpc.StatusCode.NOT_FOUND


def test_a_kept_chat_calls_functions(alice: xai_sdk.Client) -> None:
    options: dict[str, Any] = {"tools": [WEATHER], "tool_choice": "required", "max_tokens": 64, "store_messages": True}
    chat = alice.chat.create(MODEL, messages=[user("What is the weather in Rome?")], **options)
    *_, (whole, _) = chat.stream()
    (call,) = whole.tool_calls
    assert City.model_validate_json(call.function.arguments)
    assert whole.finish_reason == "REASON_TOOL_CALLS"
    told = alice.chat.create(MODEL, tools=[WEATHER], max_tokens=8, previous_response_id=whole.id)
    assert told.append(tool_result("It rains.", tool_call_id=call.id)).sample().content


def test_what_is_deferred_is_answered_later_and_its_owners_alone(
    served: Served, accounts: Accounts, alice: xai_sdk.Client
) -> None:
    answer = alice.chat.create("stub", messages=[user("hello")]).defer()
    assert numbers_of(answer.content) == list(range(8))
    started = alice.chat._stub.StartDeferredCompletion(
        chat_pb2.GetCompletionsRequest(model="nothing", messages=[user("hello")])
    )
    asked = deferred_pb2.GetDeferredRequest(request_id=started.request_id)
    other = served.client(key_of(accounts, "other"))
    assert refusal(lambda: other.chat._stub.GetDeferredCompletion(asked)).code() is grpc.StatusCode.NOT_FOUND

    def failure() -> grpc.RpcError | None:
        try:
            assert alice.chat._stub.GetDeferredCompletion(asked).status == deferred_pb2.PENDING
        except grpc.RpcError as error:
            return error
        return None

    failed = wait_for(failure, 60)
    assert failed.code() is grpc.StatusCode.NOT_FOUND
    assert "the model 'nothing' does not exist" in failed.details()


def test_texts_become_vectors(served: Served, accounts: Accounts) -> None:
    embed = served.method("Embedder/Embed", embed_pb2.EmbedResponse)
    inputs = [embed_pb2.EmbedInput(string=text) for text in ("Paris is in France.", "Rome is in Italy.")]
    asked = embed_pb2.EmbedRequest(model=MODEL, input=inputs).SerializeToString()
    metadata = (("authorization", f"Bearer {key_of(accounts, 'embedder')}"),)
    answer = embed(asked, metadata=metadata)
    (one,), (_,) = (vector.embeddings for vector in answer.embeddings)
    assert sum(x * x for x in one.float_array) == pytest.approx(1.0, abs=1e-3)
    assert answer.usage.num_text_embeddings == 2


def test_what_costs_much_to_read_is_refused_before_it_is_read(served: Served, accounts: Accounts) -> None:
    complete = served.method("Chat/GetCompletion")
    metadata = (("authorization", f"Bearer {key_of(accounts, 'flooder')}"),)
    assert refusal(lambda: complete(b"\xff\xff", metadata=metadata)).code() is grpc.StatusCode.INVALID_ARGUMENT
    large = refusal(lambda: complete(b"\0" * (9 << 20), metadata=metadata))
    assert (large.code(), "larger than max" in large.details()) == (grpc.StatusCode.RESOURCE_EXHAUSTED, True)
    packed = refusal(lambda: complete(b"\0" * (64 << 20), metadata=metadata, compression=grpc.Compression.Gzip))
    assert (packed.code(), "larger than max" in packed.details()) == (grpc.StatusCode.RESOURCE_EXHAUSTED, True)


def test_a_port_that_is_taken_is_refused_and_so_is_a_missing_package(served: Served) -> None:
    config = served.log.with_name("serve.toml")
    words = ["serve", "--config", str(config), "--port", "0", "--grpc-port", str(served.port)]
    run = "import sys; {}from modelworks.cli import main; sys.argv[1:] = {!r}; main()"
    environment = {**os.environ, "MODELWORKS_HOME": str(config.parent / "elsewhere")}
    for before, sentence in (
        ("", f"port {served.port} on 127.0.0.1 is in use; another --grpc-port is accepted"),
        ("sys.modules['xai_sdk'] = None; ", "the package xai_sdk is not installed; pip install 'modelworks[xai]'"),
    ):
        command = [sys.executable, "-c", run.format(before, words)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 2, done.stderr
        assert sentence in " ".join(done.stderr.split())


def test_workers_share_the_port(stub: Stub, tmp_path: Path) -> None:
    served = Served(tmp_path, f'[engines.a]\nurl = "{stub.url}"\n', "--workers", "2")
    try:
        for _ in range(8):
            with served.client("none") as client:
                chat = client.chat.create("stub", messages=[user("hello")])
                assert numbers_of(chat.sample().content) == list(range(8))
    finally:
        served.end()


def test_the_end_waits_for_answers_that_run(served: Served, accounts: Accounts, stub: Stub) -> None:
    stub.control(rate=10, tokens=30)
    chat = served.client(key_of(accounts, "last")).chat.create("stub", messages=[user("hello")])
    stream = chat.stream()
    text = next(stream)[1].content
    served.process.send_signal(signal.SIGTERM)
    text += "".join(piece.content for _, piece in stream)
    assert numbers_of(text) == list(range(30))
    served.process.wait(60)
