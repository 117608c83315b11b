"""Fields that only planning knows so far: windows of attention, and dense networks beside experts."""

from __future__ import annotations

import pytest

from modelworks.model.support import refuse_unsupported
from modelworks.spec.errors import InputError
from modelworks.spec.fields import validate
from modelworks.spec.files import model_spec
from modelworks.spec.flops import attention_flop_per_token, forward_flop_per_token, vision_flop_per_sequence
from modelworks.spec.model import ModelSpec


def test_grok_2_has_its_published_size() -> None:
    # 64 layers of 8 gated experts (8192 x 16384), a residual network (8192 x 32768) and attention (64 and 8 heads of
    # 128), and two tables of 131,072: 270 billion, as its release is called.
    count = model_spec("grok-2").parameters
    by_hand = 64 * (8 * 3 * 8192 * 16384 + 3 * 8192 * 32768 + 8192 * 128 * (2 * 64 + 2 * 8)) + 2 * 131072 * 8192
    assert count.total == pytest.approx(by_hand, rel=1e-4)
    assert round(count.total / 1e9) == 270
    assert count.active == pytest.approx(by_hand - 64 * 6 * 3 * 8192 * 16384, rel=1e-3)


def test_a_window_bounds_what_attention_costs() -> None:
    llama = model_spec("llama-3.1-8b")
    windowed = llama.model_copy(update={"sliding_window": 4096})
    # Averaged over positions by counting: token i attends to min(i, window) tokens.
    counted = sum(min(i, 4096) for i in range(1, 32769)) / 32768
    assert windowed.attended(32768) == pytest.approx(counted, rel=1e-3)
    assert windowed.attended(2048) == llama.attended(2048) == 1024
    ratio = attention_flop_per_token(windowed, 32768) / attention_flop_per_token(llama, 32768)
    assert ratio == pytest.approx(counted / 16384, rel=1e-3)
    assert forward_flop_per_token(windowed, 32768) < forward_flop_per_token(llama, 32768)


def test_siglip_so400m_has_its_published_size() -> None:
    # google/siglip-so400m-patch14-384: 428 million with its pooling head, which is no part of a tower: a probe of 1152,
    # attention, a norm and a feed-forward network (15.24 million).
    vision = model_spec("grok-1.5v").vision
    assert vision is not None
    pooling = 1152 + 4 * 1152**2 + 4 * 1152 + 2 * 1152 + 2 * 1152 * 4304 + 4304 + 1152
    alone = vision.model_copy(update={"connector_hidden": None, "pixel_shuffle": 1})
    model = ModelSpec(layers=1, hidden=64, ffn_hidden=64, heads=1, vocab=1, context=4096, vision=alone)
    tower = model.parameters.vision - 1152 * 64
    assert tower + pooling == 428_225_600


def test_smolvlm_256m_has_its_published_size() -> None:
    model = model_spec("smolvlm-256m")
    assert model.parameters.total == 256_484_928
    assert round(model.parameters.vision / 1e6) == 94  # its authors: a 93 million tower, and the connector
    assert model.vision is not None
    assert model.vision.tokens_per_sequence == 17 * 64  # 64 tokens a tile


def test_a_tower_counted_by_hand() -> None:
    """Two layers over tiles of 16 patches: 4 x 4 of 8 pixels; four become a token."""
    vision = {
        "image_size": 35, "patch_size": 8, "layers": 2, "hidden": 16, "heads": 2, "ffn_hidden": 24, "pixel_shuffle": 2,
        "connector_hidden": 40, "tiles": 3, "images": 2,
    }  # fmt: skip
    model = ModelSpec(layers=1, hidden=32, ffn_hidden=64, heads=2, vocab=100, context=64, vision=vision)
    blind = model.model_copy(update={"vision": None})
    assert model.vision is not None
    assert (model.vision.patches, model.vision.tokens_per_sequence) == (16, 24)
    embedding = 3 * 64 * 16 + 16 + 16 * 16
    layer = 4 * 16 * 16 + 4 * 16 + 2 * 16 * 24 + 24 + 16 + 2 * 2 * 16
    connector = 64 * 40 + 40 + 40 * 32 + 32
    assert model.parameters.vision == embedding + 2 * layer + 2 * 16 + connector
    assert model.parameters.total == blind.parameters.total + model.parameters.vision
    # Weights twice for each patch, scores and values over all 16 patches of a tile.
    patch = 2 * (3 * 64 * 16) + 2 * (2 * (4 * 16 * 16 + 2 * 16 * 24) + 2 * 2 * 16 * 16)
    seen = 6 * 16 * patch + 24 * 2 * (64 * 40 + 40 * 32)
    assert vision_flop_per_sequence(model) == seen
    assert forward_flop_per_token(model, 48) == pytest.approx(forward_flop_per_token(blind, 48) + seen / 48)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"pixel_shuffle": 2}, r"vision: pixel_shuffle = 2 doesn't divide image_size / patch_size = 27 patches"),
        ({"heads": 7}, r"vision: hidden = 1152 doesn't divide by heads = 7"),
        ({"patch_size": 400}, r"vision: patch_size = 400 is larger than image_size = 384"),
        ({"images": 0}, r"vision.images = 0 is not accepted: it should be greater than 0"),
        ({"patch": 14}, r"unknown key 'vision.patch'"),
    ],
)
def test_a_tower_that_cannot_be_is_refused_by_name(changed: dict[str, int], sentence: str) -> None:
    values = model_spec("grok-1.5v").model_dump(exclude_none=True)
    values["vision"] |= changed
    with pytest.raises(InputError, match=sentence):
        validate(ModelSpec, values)


def test_the_decoder_refuses_what_it_does_not_build() -> None:
    grok = model_spec("grok-tiny")
    with pytest.raises(InputError, match="is not implemented by the decoder"):
        refuse_unsupported(grok.model_copy(update={"position": "learned"}))
