"""The serving engine as the one that draws a network's replies while it is trained.

The rooms that train, release and serve don't know each other; here the weights of the moment are written as a GGUF
file, of a network with a LoRA adapter the adapter alone, and llama.cpp is loaded with it as for any chat. The weights
aren't rounded: they are in fp32, or where the trainer keeps frozen ones in bf16, in that. The engine is asked by tokens
and answers with tokens, so that what is learnt is what was drawn.

What several chats compute at once depends in its last bits on which these are. So a seed draws the same reply nearly
always, not always: a run that is interrupted and resumed makes the same course up to that.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tokenizers import Tokenizer
from torch import Tensor

from modelworks.model.adapters import adapted, is_of_adapter
from modelworks.model.decoder import Decoder
from modelworks.release.adapters import write_gguf_adapter
from modelworks.release.gguf_export import Described, pieces_of, reading, write_tensors
from modelworks.release.gguf_network import metadata_of
from modelworks.release.quantization import Precision
from modelworks.release.runs import RunContent
from modelworks.release.vocabulary import read_vocabulary
from modelworks.serve.engine import usage_of
from modelworks.serve.store import Store
from modelworks.spec.errors import InputError
from modelworks.spec.run import RunSpec
from modelworks.train.rollouts import Reply, Sampling

if TYPE_CHECKING:
    from modelworks.serve.llamacpp import LlamaCppEngine

_MODEL, _ADAPTER = "policy", "policy-adapter"
_SLOTS = 16
"""Replies that are drawn side by side."""
_SPARE = 8
"""Tokens of a slot's context beyond those of the longest prompt and reply: the engine stops before the last."""


def refuse_unloadable(spec: RunSpec) -> None:
    """Raise `InputError` if llama.cpp has no place for a run's network."""
    try:
        metadata_of(spec.model)
    except InputError as error:
        raise InputError(f"grpo.engine = 'llama.cpp' is not accepted: {error}; 'trainer' is") from None


class EngineSampler:
    """Draws replies with llama.cpp; see `train.rollouts.Sampler`.

    Parameters
    ----------
    spec
        The run.
    run_folder
        Where its tokenizer is.
    """

    def __init__(self, spec: RunSpec, run_folder: Path) -> None:
        self._spec, self._tokenizer = spec, run_folder / "tokenizer.json"
        self._folder = tempfile.TemporaryDirectory(prefix="modelworks-rollouts-")

    @cached_property
    def _words(self) -> Tokenizer:
        words = Tokenizer.from_file(str(self._tokenizer))
        words.encode_special_tokens = True  # written out, they are text
        return words

    def close(self) -> None:
        """Remove the weights that were written."""
        self._folder.cleanup()

    def __call__(
        self, decoder: Decoder, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[int]
    ) -> list[Reply]:
        """A reply of the network, as it is now, to each prompt."""
        from modelworks.serve.llamacpp import EngineSettings, LlamaCppEngine  # loads llama.cpp

        store = Store(Path(self._folder.name) / "models")
        model = self._store(store, decoder)
        context = max(len(prompt) for prompt in prompts) + sampling.max_new_tokens + _SPARE
        settings = EngineSettings(slots=min(_SLOTS, len(prompts)), context=context)
        said = asyncio.run(_said(LlamaCppEngine(store, settings), model, prompts, sampling, seeds))
        return [self._reply(one, sampling) for one in said]

    def _store(self, store: Store, decoder: Decoder) -> str:
        """Bring the network's weights to where the engine finds them; returns the name that they have there."""
        adapter, source = self._spec.adapter, f"run {self._spec.name}"
        with tempfile.TemporaryDirectory(dir=self._folder.name) as folder:
            file = Path(folder) / f"{_MODEL}.gguf"
            if adapter is None or adapter.kind == "dora":  # which llama.cpp doesn't compute
                self._write(file, decoder)
                return store.add(_MODEL, file, source=source).name
            if not store.list():
                self._write(file, decoder)
                store.add(_MODEL, file, source=source)
            trained = {name: part.detach() for name, part in decoder.named_parameters() if is_of_adapter(name)}
            content = RunContent(self._tokenizer.parent, self._spec, decoder, self._tokenizer.parent, adapter=trained)
            changes = Path(folder) / f"{_ADAPTER}.gguf"
            write_gguf_adapter(changes, content)
            return store.add_adapter(_ADAPTER, changes, _MODEL, source=source).name

    def _reply(self, said: _Said, sampling: Sampling) -> Reply:
        """What was said as tokens. The engine keeps back those of a character's first bytes: a reply that has such is
        encoded from its text, which is certain if that gives as many tokens and the text isn't broken."""
        if len(said.tokens) == said.count:
            return Reply(said.tokens, said.log_probabilities)
        tokens = self._words.encode(said.text, add_special_tokens=False).ids + [sampling.end] * said.finished
        certain = len(tokens) == said.count and "\ufffd" not in said.text
        return Reply(tokens[: sampling.max_new_tokens], certain=certain)

    def _write(self, path: Path, decoder: Decoder) -> None:
        """Write the network without a LoRA adapter, and with a DoRA one merged into it."""
        dora = self._spec.adapter is not None and self._spec.adapter.kind == "dora"
        merged = {f"{name}.weight": part for name, part in adapted(decoder)} if dora else {}
        plain = reading(decoder)

        def read(ours: str, expert: int | None, shape: tuple[int, ...]) -> Tensor:
            return merged[ours].merged() if ours in merged else plain(ours, expert, shape)

        spec = decoder.spec
        vocabulary = read_vocabulary(self._tokenizer, spec.vocab)
        half = any(part.dtype == torch.bfloat16 for part in decoder.parameters())
        precision: Precision = "bf16" if half else "f32"
        write_tensors(path, spec, vocabulary, precision, Described(self._spec.name), pieces_of(spec, read))


@dataclass
class _Said:
    """What the engine has said to one prompt."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    log_probabilities: list[float] = field(default_factory=list)
    count: int = 0
    """How many tokens it drew."""
    finished: bool = False


async def _said(
    engine: LlamaCppEngine, model: str, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[int]
) -> list[_Said]:
    """Ask for all replies at once; the engine lets those wait that it has no slot for."""
    try:
        async with asyncio.TaskGroup() as group:
            asked = [
                group.create_task(_say(engine, model, prompt, sampling, seed))
                for prompt, seed in zip(prompts, seeds, strict=True)
            ]
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    finally:
        await engine.close()
    return [task.result() for task in asked]


async def _say(engine: LlamaCppEngine, model: str, prompt: Sequence[int], sampling: Sampling, seed: int) -> _Said:
    # Drawn from all of the softmax: what else narrows it is turned off, since the trainer wouldn't know of it.
    body = {
        "prompt": list(prompt), "max_tokens": sampling.max_new_tokens, "temperature": sampling.temperature,
        "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repeat_penalty": 1.0, "seed": seed, "logprobs": 1,
    }  # fmt: skip
    said = _Said()
    async with aclosing(engine.stream("completions", model, body)) as batches:
        async for batch in batches:
            for chunk in map(json.loads, batch):
                for choice in chunk["choices"]:
                    said.text += choice.get("text") or ""
                    said.finished = said.finished or choice.get("finish_reason") == "stop"
                    for token in (choice.get("logprobs") or {}).get("content") or []:
                        said.tokens.append(token["id"])
                        said.log_probabilities.append(token["logprob"])
                usage = usage_of(chunk)
                said.count = said.count if usage is None else usage.completion_tokens
    return said
