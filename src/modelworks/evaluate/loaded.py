"""A network of ours as lm-evaluation-harness takes a model: log-likelihoods of texts, and texts that go on.

Sequences are scored in batches of similar length. Continuations after the same tokens, as the one-token choices of a
question have, share one pass.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tokenizers import Tokenizer
from torch import Tensor

from modelworks.data.tokenizer import SPECIAL_TOKENS, separator_id
from modelworks.evaluate.models import Model
from modelworks.model.attention import KeyValueCache
from modelworks.model.generation import choose

TOKENS = 8192
"""Of a batch, padding included."""
_GENERATED = 256

Tokens = tuple[Any, list[int], list[int]]
"""A request with the tokens before its continuation, and the continuation's."""


class LoadedModel(TemplateLM):  # type: ignore[misc,unused-ignore]
    """A loaded network.

    Parameters
    ----------
    model
        The network with its tokenizer.
    seed
        Of what tasks ask to be drawn.
    """

    def __init__(self, model: Model, seed: int = 0) -> None:
        super().__init__()
        self.model = model
        self._words = Tokenizer.from_file(str(model.tokenizer))
        self._first, self._ends = special_tokens(model.tokenizer, self._words)
        self._chance = torch.Generator().manual_seed(seed)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self._ends[0]

    @property
    def prefix_token_id(self) -> int:
        """The token before a text that nothing stands before."""
        return self._first

    @property
    def tokenizer_name(self) -> str:
        """What tells its tokenizer from another."""
        return str(self.model.tokenizer)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """The tokens of a text; special tokens are never added."""
        return self.model.encode(string)

    def _loglikelihood_tokens(self, requests: list[Tokens], **kwargs: Any) -> list[tuple[float, bool]]:
        """The log-likelihood of each continuation, and whether each of its tokens is the most likely one."""
        wanted: dict[tuple[int, ...], list[int]] = {}
        for number, (_, before, after) in enumerate(requests):
            seen = (before + after)[-self.model.context - 1 : -1]
            wanted.setdefault(tuple(seen), []).append(number)
        found: dict[int, tuple[float, bool]] = {}
        for batch in _batches(sorted(wanted, key=len)):
            for tokens, states in zip(batch, self._states(batch), strict=True):
                for number in wanted[tokens]:
                    found[number] = self._scored(states[: len(tokens)], requests[number][2])
        return [found[number] for number in range(len(requests))]

    @torch.inference_mode()
    def _states(self, batch: list[tuple[int, ...]]) -> Tensor:
        """The states (B, T, H) of sequences, padded on the right, where a causal network doesn't look."""
        tokens = torch.zeros(len(batch), len(batch[-1]), dtype=torch.int64)
        for row, ids in zip(tokens, batch, strict=True):
            row[: len(ids)] = torch.tensor(ids)
        return self.model.decoder.hidden_states(tokens)[0]

    def _scored(self, states: Tensor, after: list[int]) -> tuple[float, bool]:
        after = after[-len(states) :]
        logits = self.model.logits(states[len(states) - len(after) :]).float()
        targets = torch.tensor(after)
        likelihoods = logits.log_softmax(-1).gather(-1, targets[:, None])
        return float(likelihoods.sum()), bool((logits.argmax(-1) == targets).all())

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each text, in windows of the context where it is longer."""
        windows, counts = [], []
        for request in requests:
            rolling = get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.model.context, 1
            )
            of_text = [(None, *make_disjoint_window(window)) for window in rolling]
            windows += of_text
            counts.append(len(of_text))
        scored = iter(self._loglikelihood_tokens(windows))
        return [sum(next(scored)[0] for _ in range(count)) for count in counts]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Each prompt's continuation up to the first of its stop texts, which is left out."""
        return [self._generated(*request.args) for request in requests]

    @torch.inference_mode()
    def _generated(self, prompt: str, wanted: dict[str, Any]) -> str:
        asked: dict[str, Any] = dict(normalize_gen_kwargs(wanted, _GENERATED))
        stops = [stop for stop in asked["until"] if stop]
        context = self.model.context
        new = min(asked["max_gen_toks"], context - 1)
        ids = self.tok_encode(prompt)[-(context - new) :] or [self.prefix_token_id]
        temperature = float(asked.get("temperature") or 0.0) if asked["do_sample"] else 0.0
        cache = KeyValueCache(self.model.decoder.spec, 1, len(ids) + new)
        fresh, made = torch.tensor([ids]), list[int]()
        text = ""
        while len(made) < new:
            logits = self.model.decoder.logits(fresh, cache)[:, -1]
            fresh = choose(logits, temperature, float(asked.get("top_p", 1.0)), self._chance)
            if int(fresh) in self._ends:
                break
            made.append(int(fresh))
            text = self._words.decode(made, skip_special_tokens=False)
            if any(stop in text for stop in stops):
                break
        return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]


def _batches(sequences: list[tuple[int, ...]]) -> list[list[tuple[int, ...]]]:
    """Sequences in the order of their lengths, cut where a padded batch would have more than `TOKENS`."""
    batches: list[list[tuple[int, ...]]] = []
    for ids in sequences:
        if batches and (len(batches[-1]) + 1) * len(ids) <= TOKENS:
            batches[-1].append(ids)
        else:
            batches.append([ids])
    return batches


def special_tokens(tokenizer: Path, words: Tokenizer) -> tuple[int, list[int]]:
    """What stands before a text, and what ends one: as the files beside a tokenizer say, or as our tokenizers have it.

    Raises
    ------
    InputError
        If no token is known that ends a text.
    """
    named = _table(tokenizer.with_name("tokenizer_config.json"))
    numbered = [_table(tokenizer.with_name(name)) for name in ("generation_config.json", "config.json")]

    def known(kind: str) -> list[int]:
        name = named.get(f"{kind}_token")
        text = name.get("content") if isinstance(name, dict) else name
        found = [words.token_to_id(text)] if isinstance(text, str) else []
        for table in numbered:
            ids = table.get(f"{kind}_token_id")
            found += ids if isinstance(ids, list) else [ids]
        return [number for number in dict.fromkeys(found) if isinstance(number, int)]

    ends = known("eos") or [separator_id(words)]
    turn = words.token_to_id(SPECIAL_TOKENS[-1])
    return (known("bos") or ends)[0], [*ends, *([] if turn is None else [turn])]


def _table(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
