"""``/v1/files`` and ``/v1/batches`` as the official client sees them, over the real model, where all is open."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from gateways import wait_for

from modelworks.serve.batches import MOST_LINES, read_lines

MODEL = "smollm2-135m"
CHAT = "/v1/chat/completions"
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"model": MODEL, "messages": [{"role": "user", "content": "Say yes."}], "max_tokens": 4},
    "/v1/completions": {"model": MODEL, "prompt": "One, two,", "max_tokens": 4},
    "/v1/responses": {"model": MODEL, "input": "Say yes.", "max_output_tokens": 4},
}


def line(custom_id: str, url: str = CHAT, **changes: Any) -> bytes:
    """One request."""
    asked = {"custom_id": custom_id, "method": "POST", "url": url, "body": BODIES.get(url, {})} | changes
    return json.dumps(asked).encode() + b"\n"


@pytest.mark.parametrize("endpoint", BODIES)
def test_a_batch_gives_what_its_requests_give_by_themselves(client: openai.OpenAI, address: str, endpoint: Any) -> None:
    body = BODIES[endpoint] | {"temperature": 0}
    file = client.files.create(
        file=("asked.jsonl", line("a", endpoint, body=body) + line("b", endpoint, body=body)), purpose="batch"
    )
    batch = client.batches.create(
        input_file_id=file.id, endpoint=endpoint, completion_window="24h", metadata={"why": "a test"}
    )
    assert batch.status == "validating"
    done = wait_for(lambda: (now := client.batches.retrieve(batch.id)).status == "completed" and now, 60)
    assert (done.request_counts.total, done.request_counts.completed, done.metadata) == (2, 2, {"why": "a test"})
    lines = [json.loads(text) for text in client.files.content(done.output_file_id).text.splitlines()]
    answer = httpx.post(address + endpoint, json=body, timeout=60).json()
    for given in lines:
        assert given["error"] is None
        assert given["response"]["status_code"] == 200
        assert _said(given["response"]["body"]) == _said(answer)
    assert batch.id in [one.id for one in client.batches.list()]


def _said(answer: dict[str, Any]) -> Any:
    if "output" in answer:
        return answer["output"][0]["content"][0]["text"]
    choice = answer["choices"][0]
    return choice["text"] if "text" in choice else choice["message"]["content"]


def test_a_file_is_kept_as_it_was_sent_and_is_never_a_page(client: openai.OpenAI, address: str) -> None:
    content = b"<script>alert(1)</script>\x00\xff"
    file = client.files.create(file=("../../etc/x\r\n.html", content), purpose="user_data")
    assert file.filename.endswith(".html")
    assert "/" not in file.filename
    assert "\r" not in file.filename
    got = httpx.get(f"{address}/v1/files/{file.id}/content")
    assert got.content == content
    assert got.headers["content-type"] == "application/octet-stream"
    assert got.headers["content-disposition"] == "attachment"
    assert client.files.retrieve(file.id).bytes == len(content)
    assert client.files.delete(file.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.content(file.id)


def test_a_file_lasts_as_long_as_is_asked(client: openai.OpenAI) -> None:
    asked: Any = {"anchor": "created_at", "seconds": 7200}
    file = client.files.create(file=("a", b"x"), purpose="user_data", expires_after=asked)
    assert file.expires_at is not None
    assert file.expires_at - file.created_at == pytest.approx(7200, abs=1)


@pytest.mark.parametrize(
    ("form", "param"),
    [
        ({"data": {"purpose": "batch"}}, "file"),
        ({"files": {"file": ("a", b"x")}}, "purpose"),
        ({"files": {"file": ("a", b"x")}, "data": {"purpose": "fine-tune"}}, "purpose"),
        ({"data": {"file": "text", "purpose": "batch"}}, "file"),
        (
            {
                "files": {"file": ("a", b"x")},
                "data": {
                    "purpose": "batch",
                    "expires_after[anchor]": "created_at",
                    "expires_after[seconds]": "9" * 400,
                },
            },
            "expires_after.seconds",
        ),
    ],
)
def test_what_is_no_file_is_refused_by_name(address: str, form: dict[str, Any], param: str) -> None:
    answer = httpx.post(f"{address}/v1/files", **form)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_what_is_no_form_is_refused(address: str) -> None:
    for content, kind in ((b"{}", "application/json"), (b"--x\r\nbad", "multipart/form-data; boundary=x"), (b"", "")):
        answer = httpx.post(f"{address}/v1/files", content=content, headers={"Content-Type": kind})
        assert answer.status_code == 400, (content, answer.text)


@pytest.mark.parametrize(
    ("content", "code", "at"),
    [
        (b"", "empty_file", None),
        (b"\n\n", "empty_file", None),
        (b"not json\n", "invalid_json_line", 1),
        (line("a") + b"[]\n", "invalid_value", 2),
        (line("a") + line("a"), "duplicate_custom_id", 2),
        (line("a", "/v1/embeddings"), "mismatched_endpoint", 1),
        (line("a", method="GET"), "invalid_value", 1),
        (line("a", body={"stream": True}), "invalid_value", 1),
        (line(""), "invalid_value", 1),
        (b"\xff\xfe\n", "invalid_json_line", 1),
        (b"[" * 100_000 + b"\n", "invalid_json_line", 1),
        (None, "file_not_found", None),
    ],
    ids=[
        "empty",
        "blank",
        "not-json",
        "no-object",
        "twice",
        "other-endpoint",
        "get",
        "stream",
        "no-name",
        "no-utf8",
        "deep",
        "gone",
    ],
)
def test_a_line_that_can_not_be_asked_is_named(content: bytes | None, code: str, at: int | None) -> None:
    error = read_lines(content, CHAT)[1][0]
    assert (error["code"], error["line"]) == (code, at)


def test_a_file_with_too_many_lines_is_not_begun_with() -> None:
    content = b"".join(line(str(number), body={}) for number in range(MOST_LINES + 1))
    assert read_lines(content, CHAT)[1][0]["code"] == "too_many_requests"
    assert len(read_lines(content[: content.rstrip().rfind(b"\n") + 1], CHAT)[0]) == MOST_LINES


def test_a_batch_of_a_bad_file_fails_and_says_where(client: openai.OpenAI) -> None:
    file = client.files.create(file=("asked.jsonl", line("a") + b"{}\n"), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
    failed = wait_for(lambda: (now := client.batches.retrieve(batch.id)).status == "failed" and now)
    assert failed.errors is not None
    assert failed.errors.data is not None
    assert [(error.line, error.param) for error in failed.errors.data] == [(2, "custom_id")]
    assert failed.output_file_id is None


def test_only_a_file_that_was_sent_for_a_batch_makes_one(client: openai.OpenAI) -> None:
    file = client.files.create(file=("a", line("a")), purpose="user_data")
    with pytest.raises(openai.BadRequestError, match="purpose 'batch' is needed"):
        client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
    with pytest.raises(openai.NotFoundError):
        client.batches.create(input_file_id="file-0", endpoint=CHAT, completion_window="24h")
