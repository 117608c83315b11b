"""A model as something that answers messages: a network of ours in ChatML, or a server by its address.

Answers are greedy, so that the same model gives the same ones. A network writes its dialogues out in ChatML, whose two
marks its tokenizer must have; a server applies its model's own template.
"""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from modelworks.evaluate.models import Model, load_model
from modelworks.evaluate.reports import is_address
from modelworks.model.attention import KeyValueCache
from modelworks.model.generation import generate
from modelworks.spec.errors import InputError, OperationError

START, END = "<|im_start|>", "<|im_end|>"
_PATIENCE_S = 600.0


class Answer(NamedTuple):
    """What a model says."""

    text: str
    finished: bool
    """Whether it came to an end by itself, rather than to the limit of its tokens."""


Messages = Sequence[dict[str, str]]
Speaker = Callable[[Sequence[Messages]], Iterator[tuple[int, Answer]]]
"""Answers several dialogues, in any order: the place of each with its answer."""


def speaker(model: str, tokens: int, served_as: str | None = None) -> Speaker:
    """What answers for a model, in at most so many tokens.

    Raises
    ------
    InputError
        If there is no such model, or it knows no ChatML.
    OperationError
        If a run has no checkpoint that is whole.
    """
    if is_address(model):
        return _at_address(model, tokens, served_as or "default")
    return _of_network(load_model(model), tokens)


def _of_network(model: Model, tokens: int) -> Speaker:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model.tokenizer))
    start, end = tokenizer.token_to_id(START), tokenizer.token_to_id(END)
    if start is None or end is None:
        raise InputError(f"{model.name}: its tokenizer has no {START} and {END}, with which dialogues are written out")

    def forward(ids: Tensor, cache: KeyValueCache) -> Tensor:
        hidden, _ = model.decoder.hidden_states(ids, cache=cache)
        return model.logits(hidden[:, -1:])

    def written(messages: Messages) -> list[int]:
        ids: list[int] = []
        for message in messages:
            ids += [start, *model.encode(f"{message['role']}\n{message['content']}"), end, *model.encode("\n")]
        return [*ids, start, *model.encode("assistant\n")]

    def answers(dialogues: Sequence[Messages]) -> Iterator[tuple[int, Answer]]:
        alike: dict[int, list[tuple[int, list[int]]]] = defaultdict(list)  # by length: these go through as one batch
        for place, messages in enumerate(dialogues):
            ids = written(messages)
            alike[len(ids)].append((place, ids))
        for length, batch in sorted(alike.items()):
            given = torch.tensor([ids for _, ids in batch])
            said = generate(forward, model.decoder.spec, given, tokens, stop=[end])[:, length:].tolist()
            for (place, _), row in zip(batch, said, strict=True):
                whole = row[: row.index(end)] if end in row else row
                yield place, Answer(str(tokenizer.decode(whole)).strip(), end in row)

    return answers


def _at_address(address: str, tokens: int, model: str) -> Speaker:
    base = address.rstrip("/").removesuffix("/v1")
    key = os.environ.get("OPENAI_API_KEY", "")
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})

    def answer(messages: Messages) -> Answer:
        asked = {"model": model, "messages": list(messages), "temperature": 0, "max_tokens": tokens, "seed": 0}
        request = urllib.request.Request(  # noqa: S310 - http and https alone come here
            f"{base}/v1/chat/completions",
            data=json.dumps(asked).encode(),
            headers=headers,
        )
        try:
            with urllib.request.urlopen(request, timeout=_PATIENCE_S) as response:  # noqa: S310
                choice = json.load(response)["choices"][0]
            return Answer(str(choice["message"]["content"]).strip(), choice["finish_reason"] == "stop")
        except urllib.error.HTTPError as error:
            raise OperationError(f"{base} answers {error.code}: {error.read(300).decode(errors='replace')}") from None
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise OperationError(f"{base} gives no answer: {error}") from None

    return lambda dialogues: ((place, answer(messages)) for place, messages in enumerate(dialogues))
