"""What LlamaIndex makes of a server, printed as JSON; `test_clients` runs it in an environment of LlamaIndex's own.

python llama_index_client.py BASE_URL MODEL
"""

from __future__ import annotations

import asyncio
import json
import sys

from llama_index.core.llms import ChatMessage  # type: ignore[import-not-found,unused-ignore]
from llama_index.core.tools import FunctionTool  # type: ignore[import-not-found,unused-ignore]
from llama_index.embeddings.openai_like import OpenAILikeEmbedding  # type: ignore[import-not-found,unused-ignore]
from llama_index.llms.openai_like import OpenAILike  # type: ignore[import-not-found,unused-ignore]


def weather(city: str) -> str:
    """The weather of a city."""
    return f"It rains in {city}."


def main() -> None:
    """Ask, stream, call a tool, embed."""
    url, model = sys.argv[1:]
    options = {"is_chat_model": True, "is_function_calling_model": True, "temperature": 0, "max_retries": 0}
    llm = OpenAILike(model=model, api_base=url, api_key="none", max_tokens=48, context_window=2048, **options)
    question = [
        ChatMessage(role="system", content="You are a helpful assistant."),
        ChatMessage(role="user", content="What is the capital of France?"),
    ]
    pieces = [piece.delta for piece in llm.stream_chat(question)]
    called = llm.chat_with_tools([FunctionTool.from_defaults(weather)], "The weather in Rome?", tool_required=True)
    vectors = OpenAILikeEmbedding(model_name=model, api_base=url, api_key="none").get_text_embedding_batch(["a", "b c"])
    found = {
        "answer": llm.chat(question).message.content,
        "answer_later": asyncio.run(llm.achat(question)).message.content,
        "streamed": "".join(pieces),
        "pieces": len(pieces),
        "tools": [call.tool_name for call in llm.get_tool_calls_from_response(called)],
        "dimensions": [len(vector) for vector in vectors],
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
