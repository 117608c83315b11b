"""A network that sees, asked in words and pictures without a server."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Tokenizer

from modelworks.data.interleaved import interleave
from modelworks.evaluate.models import load_model
from modelworks.model.vision import SeeingDecoder
from modelworks.spec.errors import InputError


class Sight:
    """A run or a Hugging Face folder as an `endpoint.Chat`; its answers are the likeliest ones.

    Parameters
    ----------
    name
        As of `load_model`.

    Raises
    ------
    InputError
        If there is no such model, or it doesn't see.
    """

    def __init__(self, name: str) -> None:
        model = load_model(name)
        if not isinstance(model.decoder, SeeingDecoder) or model.decoder.spec.vision is None:
            raise InputError(f"{name} doesn't see: a model with [model.vision] is accepted")
        self.name = name
        self._network, self._vision = model.decoder, model.decoder.spec.vision
        self._tokenizer = Tokenizer.from_file(str(model.tokenizer))
        ends = ("<end_of_utterance>", "<|im_end|>", "<|endoftext|>")
        self._ends = [found for mark in ends if (found := self._tokenizer.token_to_id(mark)) is not None]
        self._template: Any = "smolvlm" if self._tokenizer.token_to_id(ends[0]) is not None else "chatml"

    def ask(self, content: Sequence[str | bytes], max_tokens: int) -> str:
        """The answer to one message: texts, and pictures as the bytes of their files, in the order given."""
        parts = [
            {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part}
            for part in content
        ]
        asked = interleave([{"role": "user", "content": parts}], self._tokenizer, self._vision, self._template)
        room = min(max_tokens, self._network.spec.context - len(asked.tokens))
        if room < 1:
            raise InputError(
                f"the question has {len(asked.tokens)} tokens, and {self.name} takes {self._network.spec.context} with "
                "the answer: a shorter one is accepted"
            )
        tokens = torch.tensor([asked.tokens])
        whole = self._network.generate(tokens, room, stop=self._ends, tiles=asked.tiles)[0].tolist()
        answer = [token for token in whole[len(asked.tokens) :] if token not in self._ends]
        return self._tokenizer.decode(answer).strip()
