"""Packed documents that don't see each other: the network on a packed sequence against it on each document alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from modelworks.model.decoder import Decoder
from modelworks.model.rotary import Documents, document_starts
from modelworks.spec.model import ModelSpec

END = 7
LENGTHS = (5, 40, 1, 18)
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"ffn_hidden": 48},
    "grok": {
        "attention_softcap": 30.0,
        "norm_placement": "sandwich",
        "moe": {"experts": 4, "top_k": 2, "expert_hidden": 32},
    },
    "windowed": {"ffn_hidden": 48, "sliding_window": 9},
    "learned from YaRN": {
        "ffn_hidden": 48,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    },
}


def packed() -> tuple[torch.Tensor, list[slice]]:
    torch.manual_seed(1)
    tokens, places, start = [], [], 0
    for length in LENGTHS:
        document = torch.randint(8, 32, (length,))
        document[-1] = END
        tokens.append(document)
        places.append(slice(start, start + length))
        start += length
    return torch.cat(tokens)[None], places


def test_a_document_begins_behind_each_separator() -> None:
    tokens = torch.tensor([[1, 2, END, 3, END, END, 4], [END, 1, 1, 1, 1, 1, 1]])
    assert document_starts(tokens, END).tolist() == [[0, 0, 0, 3, 3, 5, 6], [0, 1, 1, 1, 1, 1, 1]]


@pytest.mark.parametrize("restart", [False, True], ids=["positions go on", "positions restart"])
@pytest.mark.parametrize("fields", SHAPES.values(), ids=SHAPES)
def test_each_document_of_a_packed_sequence_is_as_if_alone(fields: dict[str, Any], restart: bool) -> None:
    decoder = Decoder(ModelSpec(layers=2, hidden=32, heads=4, kv_heads=2, vocab=32, context=64, **fields))
    tokens, places = packed()
    with torch.no_grad():
        open_to_all = decoder(tokens)
        decoder.documents = Documents(END, restart)
        together = decoder(tokens)
        for place in places:
            alone = decoder(tokens[:, place])
            torch.testing.assert_close(together[:, place], alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together[:, places[0]], open_to_all[:, places[0]])
    assert not torch.allclose(together[:, places[1]], open_to_all[:, places[1]], atol=1e-3)


def test_gradients_of_a_packed_sequence_are_those_of_its_documents() -> None:
    spec = ModelSpec(layers=2, hidden=32, heads=4, kv_heads=2, vocab=32, context=64, ffn_hidden=48)
    decoder = Decoder(spec)
    tokens, places = packed()
    targets = torch.randint(0, 32, tokens.shape)
    decoder.documents = Documents(END)
    decoder(tokens, targets).cross_entropy.backward()
    together = {name: parameter.grad.clone() for name, parameter in decoder.named_parameters()}  # type: ignore[union-attr]
    decoder.zero_grad()
    decoder.documents = None
    for place in places:
        share = LENGTHS[places.index(place)] / tokens.shape[1]
        (decoder(tokens[:, place], targets[:, place]).cross_entropy * share).backward()
    for name, parameter in decoder.named_parameters():
        torch.testing.assert_close(parameter.grad, together[name], rtol=1e-4, atol=1e-6)
