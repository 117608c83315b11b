"""Tokens one after another: the most likely, or drawn by temperature and nucleus, over a key-value cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from modelworks.model.attention import KeyValueCache
from modelworks.spec.errors import InputError
from modelworks.spec.model import ModelSpec


@torch.no_grad()
def generate(
    forward: Callable[[Tensor, KeyValueCache], Tensor],
    spec: ModelSpec,
    tokens: Tensor,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    stop: Sequence[int] = (),
    seed: int | None = None,
) -> Tensor:
    """Continue each sequence of a batch.

    Parameters
    ----------
    forward
        The network: logits (B, T, V) of tokens (B, T) that stand after those of the cache.
    spec
        Its shape.
    tokens
        (B, T) int64 with T >= 1.
    max_new_tokens
        At most so many are added; together with `tokens` at most `spec.context`.
    temperature
        0 takes the most likely token; else tokens are drawn from the softmax of the logits over it.
    top_p
        Draw from the smallest set of tokens whose probabilities reach this sum (Holtzman et al., arXiv:1904.09751).
    stop
        A sequence that drew one of these is finished: it repeats it until all sequences are.
    seed
        Of the draws; without one they differ from call to call.

    Returns
    -------
    Tensor
        (B, T + new) int64: the given tokens and the new ones.

    Raises
    ------
    InputError
        If a parameter is out of its range.
    """
    _check(spec, tokens, max_new_tokens, temperature, top_p)
    generator = torch.Generator(tokens.device)
    generator.manual_seed(seed) if seed is not None else generator.seed()
    stops = torch.tensor(list(stop), dtype=tokens.dtype, device=tokens.device)
    finished = torch.zeros(len(tokens), 1, dtype=torch.bool, device=tokens.device)
    cache = KeyValueCache(spec, len(tokens), tokens.shape[1] + max_new_tokens)
    output, fresh = tokens, tokens
    for _ in range(max_new_tokens):
        chosen = choose(forward(fresh, cache)[:, -1], temperature, top_p, generator)  # (B, 1)
        fresh = torch.where(finished, output[:, -1:], chosen)
        output = torch.cat((output, fresh), dim=1)
        finished |= torch.isin(fresh, stops)
        if finished.all():
            break
    return output


def choose(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None = None) -> Tensor:
    """One token (B, 1) from each row of logits (B, V); parameters as in `generate`."""
    if temperature == 0.0:
        return logits.argmax(-1, keepdim=True)
    probabilities, ids = (logits.float() / temperature).softmax(-1).sort(-1, descending=True)
    before = probabilities.cumsum(-1) - probabilities
    kept = probabilities.masked_fill(before >= top_p, 0.0)  # the first is always kept
    return ids.gather(1, kept.multinomial(1, generator=generator))


def _check(spec: ModelSpec, tokens: Tensor, max_new_tokens: int, temperature: float, top_p: float) -> None:
    if tokens.dim() != 2 or not tokens.numel():
        raise InputError(
            f"tokens: a shape of {tuple(tokens.shape)} is not accepted: (batch, length) with both above 0 is"
        )
    if max_new_tokens < 0:
        raise InputError(f"max_new_tokens = {max_new_tokens} is not accepted: 0 or more is")
    if tokens.shape[1] + max_new_tokens > spec.context:
        raise InputError(
            f"max_new_tokens = {max_new_tokens} after {tokens.shape[1]} tokens is not accepted: together at most "
            f"model.context = {spec.context} are"
        )
    if not temperature >= 0.0:
        raise InputError(f"temperature = {temperature} is not accepted: 0 or more is")
    if not 0.0 < top_p <= 1.0:
        raise InputError(f"top_p = {top_p} is not accepted: above 0 and at most 1 is")
