"""Attention in blocks against its definition: caps, windows, documents, temperatures, lengths; and the fused one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from modelworks.model import attention as module
from modelworks.model.attention import KeyValueCache, attention, blockwise_attention
from modelworks.model.decoder import Decoder
from modelworks.spec.model import ModelSpec

SCALE, CAP = 0.3, 5.0


def naive_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    softcap: float | None = None,
    window: int | None = None,
    first: Tensor | None = None,
    temperature: Tensor | None = None,
    shared: Tensor | None = None,
) -> Tensor:
    """The definition, with every key-value head repeated and every logit in memory."""
    groups, length, seen = queries.shape[1] // keys.shape[1], queries.shape[2], keys.shape[2]
    keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
    logits = torch.einsum("bhtd,bhsd->bhts", queries, keys) * SCALE
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if temperature is not None:
        logits = logits * temperature[:, None]
    places = torch.arange(seen - length, seen)[:, None], torch.arange(seen)
    visible = (places[1] <= places[0])[None, None]
    if window is not None:
        visible = visible & (places[1] > places[0] - window)
    if first is not None:
        own = places[1] >= first[:, None, :, None]
        if shared is not None:
            since, until = shared[:, None, :, None].unbind(-1)
            own = own | ((places[1] >= since) & (places[1] < until))
        visible = visible & own
    return logits.masked_fill(~visible, -torch.inf).softmax(-1) @ values


def random_heads(length: int, seen: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(length * 1000 + seen)
    shapes = [(2, 6, length, 16), (2, 2, seen, 16), (2, 2, seen, 16)]
    return [(2 * torch.randn(shape)).to(dtype).requires_grad_() for shape in shapes]


def firsts(length: int, seen: int) -> Tensor:
    """Where the documents of two packed sequences begin, for each query."""
    torch.manual_seed(seen)
    begins = torch.rand(2, seen) < 0.03
    starts = torch.where(begins, torch.arange(seen), 0).cummax(1).values
    return starts[:, seen - length :]


def about_one_before(first: Tensor) -> dict[str, Tensor]:
    """Documents that see a part of what stands before them, or nothing of it."""
    until = torch.where(first % 3 > 0, first // 2, 0)
    return {"first": first, "shared": torch.stack((until // 2, until), -1)}


LIMITS: dict[str, Any] = {
    "all": lambda length, seen: {},
    "a window": lambda length, seen: {"window": 37},
    "documents": lambda length, seen: {"first": firsts(length, seen)},
    "a window of documents": lambda length, seen: {"window": 37, "first": firsts(length, seen)},
    "documents about one before": lambda length, seen: about_one_before(firsts(length, seen)),
    "a window of documents about one before": lambda length, seen: (
        {"window": 37} | about_one_before(firsts(length, seen))
    ),
    "temperatures": lambda length, seen: {"temperature": torch.linspace(0.5, 2.0, length)},
}


@pytest.mark.parametrize("limit", LIMITS.values(), ids=LIMITS)
@pytest.mark.parametrize("softcap", [None, CAP, 80.0], ids=["plain", "capped", "capped high"])
@pytest.mark.parametrize(("length", "seen"), [(1, 1), (7, 7), (128, 128), (300, 300), (1, 200), (5, 140), (150, 260)])
def test_attention_in_blocks_equals_its_definition_in_values_and_gradients(
    length: int, seen: int, softcap: float | None, limit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "KEY_BLOCK", 96)
    limits = limit(length, seen)
    ours = random_heads(length, seen)
    theirs = [tensor.detach().double().requires_grad_() for tensor in ours]
    output = blockwise_attention(*ours, SCALE, softcap, **limits)
    expected = naive_attention(*theirs, softcap, **limits)
    torch.testing.assert_close(output.double(), expected, rtol=1e-4, atol=5e-5)
    torch.testing.assert_close(attention(*ours, SCALE, softcap, **limits), output, rtol=1e-4, atol=1e-5)
    upstream = torch.randn_like(output)
    for got, wanted in zip(
        torch.autograd.grad(output, ours, upstream),
        torch.autograd.grad(expected, theirs, upstream.double()),
        strict=True,
    ):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=5e-4)


@pytest.mark.parametrize("window", [1, 4, 39, 40, 100])
@pytest.mark.parametrize(("length", "seen"), [(9, 9), (40, 40), (1, 40), (5, 40), (30, 40), (3, 4)])
def test_attention_over_a_window_sees_the_last_keys_alone(length: int, seen: int, window: int) -> None:
    heads = random_heads(length, seen)
    expected = naive_attention(*heads, window=window)
    torch.testing.assert_close(attention(*heads, SCALE, window=window), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("softcap", [None, 20.0])
def test_a_cached_position_has_the_temperature_of_its_place(softcap: float | None) -> None:
    sizes = {"layers": 1, "hidden": 32, "heads": 2, "ffn_hidden": 32, "vocab": 50, "context": 64}
    values = sizes | {"attention_softcap": softcap, "attention_temperature_length": 8}
    decoder = Decoder(ModelSpec.model_validate(values)).eval()
    tokens = torch.arange(40)[None]
    cache = KeyValueCache(decoder.spec, 1, 40)
    with torch.no_grad():
        stepwise = torch.cat([decoder.logits(part, cache) for part in tokens.split(5, 1)], 1)
        whole = decoder.logits(tokens)
        plain = Decoder(decoder.spec.model_copy(update={"attention_temperature_length": None})).eval().logits(tokens)
    torch.testing.assert_close(stepwise, whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(whole[:, :9], plain[:, :9])  # At the length itself the factor is still one.
    assert (whole[:, 9:] - plain[:, 9:]).abs().amax() > 1e-4


def test_huge_logits_are_no_trouble() -> None:
    queries, keys, values = random_heads(130, 130)
    heads = queries.detach() * 40, keys.detach() * 40, values.detach()
    output = blockwise_attention(*heads, SCALE)
    torch.testing.assert_close(output, naive_attention(*heads), rtol=1e-3, atol=1e-4)


def test_capped_attention_in_bfloat16_stays_near_the_definition() -> None:
    ours = random_heads(140, 140, torch.bfloat16)
    output = attention(*ours, SCALE, CAP)
    assert output.dtype == torch.bfloat16
    expected = naive_attention(*(tensor.detach().float() for tensor in ours), CAP)
    torch.testing.assert_close(output.float(), expected, rtol=2e-2, atol=5e-2)
    gradients = torch.autograd.grad(output.float().square().sum(), ours)
    assert all(gradient.dtype == torch.bfloat16 and gradient.isfinite().all() for gradient in gradients)


@settings(max_examples=15)
@given(changed=st.integers(1, 199), softcap=st.sampled_from([None, CAP]))
def test_no_position_hears_of_a_later_one(changed: int, softcap: float | None) -> None:
    queries, keys, values = (tensor.detach() for tensor in random_heads(200, 200))
    before = attention(queries, keys, values, SCALE, softcap)
    keys[:, :, changed:] += 1.0
    values[:, :, changed:] -= 1.0
    after = attention(queries, keys, values, SCALE, softcap)
    torch.testing.assert_close(after[:, :, :changed], before[:, :, :changed], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(after[:, :, changed:], before[:, :, changed:])
