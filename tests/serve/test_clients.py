"""Other people's clients against our server, with the real model behind it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import BaseModel, SecretStr

pytest.importorskip("langchain_openai", reason="langchain-openai is not installed")
from langchain_core.messages import HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAIEmbeddings

MODEL = "smollm2-135m"
QUESTION = [SystemMessage("You are a helpful assistant."), HumanMessage("What is the capital of France?")]

LLAMA_INDEX = ("llama-index-llms-openai-like==0.8.1", "llama-index-embeddings-openai-like==0.4.0")


class City(BaseModel):
    """A city."""

    name: Literal["Paris", "Rome"]


@tool
def weather(city: Literal["Paris", "Rome"]) -> str:
    """The weather of a city."""
    return f"It rains in {city}."


def chat(address: str, **options: Any) -> ChatOpenAI:
    return ChatOpenAI(
        model=MODEL, base_url=f"{address}/v1", api_key=SecretStr("none"), temperature=0, max_retries=0, **options
    )


@pytest.mark.parametrize("responses", [False, True], ids=["chat", "responses"])
def test_langchain_asks_and_streams(address: str, responses: bool) -> None:
    model = chat(address, max_tokens=16, use_responses_api=responses)
    answer = model.invoke(QUESTION)
    assert "Paris" in answer.text
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["output_tokens"] > 0
    pieces = list(model.stream(QUESTION))
    assert "".join(piece.text for piece in pieces) == answer.text
    assert len(pieces) > 3


def test_langchain_calls_a_tool_and_goes_on_with_what_it_gave(address: str) -> None:
    question = HumanMessage("What is the weather in Rome?")
    called = chat(address, max_tokens=64).bind_tools([weather], tool_choice="required").invoke([question])
    (call,) = called.tool_calls
    assert call["name"] == "weather"
    given = ToolMessage(weather.invoke(call["args"]), tool_call_id=call["id"])
    assert chat(address, max_tokens=16).bind_tools([weather]).invoke([question, called, given]).text


def test_langchain_gets_an_object_of_a_class(address: str) -> None:
    model = chat(address, max_tokens=64).with_structured_output(City, method="json_schema")
    assert isinstance(model.invoke("Name the capital of France."), City)


def test_langchain_embeds(address: str) -> None:
    embeddings = OpenAIEmbeddings(
        model=MODEL, base_url=f"{address}/v1", api_key=SecretStr("none"), check_embedding_ctx_length=False
    )
    one, other = embeddings.embed_documents(["Paris is in France.", "Rome is in Italy."])
    assert sum(x * x for x in one) == pytest.approx(1.0, abs=1e-3)
    assert sum(x * y for x, y in zip(one, other, strict=True)) < 1.0


@pytest.mark.slow
def test_llama_index_asks_streams_calls_a_tool_and_embeds(address: str, tmp_path: Path) -> None:
    # It wants an older `openai` than ours, so it has an environment of its own.
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path], check=True)
    python = str(tmp_path / "bin" / "python")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--disable-pip-version-check"]
    # Compiled is what is imported, which is little of it.
    installing = [*pip, "--no-compile", *LLAMA_INDEX]
    installed = subprocess.run(installing, capture_output=True, text=True, check=False)
    if installed.returncode:
        pytest.skip(f"LlamaIndex can't be installed here: {installed.stderr[-500:]}")
    asking = [python, str(Path(__file__).with_name("llama_index_client.py")), f"{address}/v1", MODEL]
    asked = subprocess.run(asking, capture_output=True, text=True, check=False, timeout=300)
    assert asked.returncode == 0, asked.stderr
    found = json.loads(asked.stdout)
    assert "Paris" in found["answer"]
    assert found["answer"] == found["answer_later"] == found["streamed"]
    assert found["pieces"] > 3
    assert found["tools"] == ["weather"]
    assert found["dimensions"] == [576, 576]
