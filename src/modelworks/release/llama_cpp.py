"""llama.cpp beside us, in a process of its own: what it predicts, without being able to take us down with it.

`python -m modelworks.release.llama_cpp FILE` reads a question from standard input and writes the answer to FILE.
It runs on one thread, with keys and values in fp32 and without flash attention, so that what it computes is the
network and not a shortcut.
"""

from __future__ import annotations

import json
import string
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from modelworks.spec.errors import OperationError
from modelworks.spec.gguf_header import read_gguf_header

TIMEOUT_S = 600.0


def next_token_probabilities(
    model: Path,
    prompts: Sequence[Sequence[int]],
    vocabulary: int,
    timeout_s: float = TIMEOUT_S,
    adapter: Path | None = None,
) -> np.ndarray:
    """What llama.cpp expects after each prompt.

    Parameters
    ----------
    model
        A GGUF file.
    prompts
        Token ids.
    vocabulary
        How many pieces the network's vocabulary has.
    adapter
        A GGUF adapter that changes it.

    Returns
    -------
    np.ndarray
        (prompts, vocabulary) in fp64, each row summing to one.

    Raises
    ------
    OperationError
        If llama.cpp refuses the file, crashes or takes too long; its last words are in the message.
    """
    # llama.cpp answers nothing after a token that ends the text or is a part of a character. So it is made to choose a
    # letter; the probabilities are those of the network, before that.
    asked: dict[str, Any] = {"n_predict": 1, "n_probs": vocabulary, "temperature": 0.0, "cache_prompt": False}
    asked["logit_bias"] = [[_letter(model), 1e4]]
    bodies = [{"prompt": list(prompt), **asked} for prompt in prompts]
    probabilities = np.zeros((len(prompts), vocabulary))
    for row, answer in zip(probabilities, _ask(model, bodies, timeout_s, adapter), strict=True):
        ids, logarithms = answer["ids"], answer["logprobs"]
        if len(ids) != vocabulary:
            raise OperationError(f"{model}: llama.cpp gave {len(ids)} probabilities for a vocabulary of {vocabulary}")
        row[ids] = np.exp(logarithms)
    # llama.cpp's own sums are in fp32 and miss one by some 1e-4.
    probabilities /= probabilities.sum(-1, keepdims=True)
    return probabilities


def _letter(model: Path) -> int:
    """The id of a piece that is one letter."""
    tokens = read_gguf_header(model).metadata.get("tokenizer.ggml.tokens", [])
    for index, token in enumerate(tokens):
        if len(token) == 1 and token in string.ascii_letters:
            return index
    raise OperationError(f"{model}: its tokenizer has no letters")


def _ask(
    model: Path, bodies: list[dict[str, Any]], timeout_s: float, adapter: Path | None = None
) -> list[dict[str, Any]]:
    """Put questions to a llama.cpp of our own and wait for all answers."""
    longest = max(len(body["prompt"]) + body["n_predict"] for body in bodies)
    question = {"model": str(model), "context": longest + 8, "bodies": bodies}
    if adapter is not None:
        question["adapter"] = str(adapter)
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        command = [sys.executable, "-m", __name__, str(answer)]
        try:
            finished = subprocess.run(
                command, input=json.dumps(question), capture_output=True, text=True, timeout=timeout_s, check=False
            )
        except subprocess.TimeoutExpired:
            raise OperationError(f"{model}: llama.cpp took more than {timeout_s:.0f} s") from None
        if finished.returncode != 0 or not answer.is_file():
            raise OperationError(f"{model}: llama.cpp failed ({_last_words(finished.stderr, finished.returncode)})")
        answers: list[dict[str, Any]] = json.loads(answer.read_text())
    return answers


def _last_words(stderr: str, code: int) -> str:
    told = [line.strip() for line in stderr.splitlines() if "error" in line.lower()]
    return told[-1][-300:] if told else f"exit code {code}"


def _answer(question: dict[str, Any]) -> list[dict[str, Any]]:
    """What the process of its own does: load the model, ask it over its own HTTP address, shorten the answers."""
    import xllamacpp  # type: ignore[import-untyped]

    settings = xllamacpp.CommonParams()
    settings.model.path = question["model"]
    settings.n_ctx = question["context"]
    settings.n_parallel = 1
    settings.warmup = False
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if "adapter" in question:
        settings.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(question["adapter"], 1.0)]
    server = xllamacpp.Server(settings)
    return [_shortened(_post(f"{server.listening_address}/completion", body)) for body in question["bodies"]]


def _post(address: str, body: dict[str, Any]) -> dict[str, Any]:
    # The address is that of our own server.
    request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})  # noqa: S310
    try:
        with urllib.request.urlopen(request) as response:  # noqa: S310
            answer: dict[str, Any] = json.load(response)
    except urllib.error.HTTPError as error:
        raise OperationError(f"error {error.code}: {error.read().decode(errors='replace')[:200]}") from None
    return answer


def _shortened(answer: dict[str, Any]) -> dict[str, Any]:
    listed = answer.get("completion_probabilities", [])
    top = listed[0]["top_logprobs"] if listed else []
    return {
        "ids": [entry["id"] for entry in top],
        "logprobs": [max(entry["logprob"], -1e30) for entry in top],
    }


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(_answer(json.load(sys.stdin))))
