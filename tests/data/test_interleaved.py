"""Pictures are cut and written between the words as transformers' processor for SmolVLM does it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer

from modelworks.data.images import marks, tiles_of
from modelworks.data.interleaved import interleave
from modelworks.data.tokenizer import train_tokenizer
from modelworks.spec import InputError
from modelworks.spec.model import VisionSpec

VISION = VisionSpec(
    image_size=60, patch_size=10, layers=1, hidden=8, heads=2, ffn_hidden=8, pixel_shuffle=2, tiles=17, image_token=0
)
SIZES = [(240, 120), (333, 77), (50, 700), (1, 1), (3, 1), (1001, 997), (2000, 1)]


def noise(width: int, height: int) -> Image.Image:
    random = np.random.default_rng(width)
    return Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    found = train_tokenizer(["What is this? A cat, and\n\na dog.\n" * 20, "\n\n" * 20], 320)
    found.add_special_tokens([AddedToken(token, special=True) for token in (*marks(VISION), "<end_of_utterance>")])
    return found


@pytest.mark.parametrize("split", [True, False], ids=["tiles", "whole"])
def test_tiles_are_those_of_transformers_to_the_bit(split: bool) -> None:
    processing = pytest.importorskip("transformers.models.idefics3.image_processing_pil_idefics3")
    processor = processing.Idefics3ImageProcessorPil(
        size={"longest_edge": 240 if split else 60}, max_image_size={"longest_edge": 60}, do_image_splitting=split
    )
    vision = VISION if split else VISION.model_copy(update={"tiles": 1})
    for width, height in SIZES:
        ours = tiles_of(noise(width, height), vision)
        theirs = processor(images=[[noise(width, height)]], return_row_col_info=True, return_tensors="pt")
        assert torch.equal(ours.pixels, theirs["pixel_values"][0]), (width, height)
        assert [[ours.rows]], [[ours.columns]] == (theirs["rows"], theirs["cols"])


def test_a_conversation_has_the_tokens_of_smolvlms_processor(tokenizer: Tokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    processing = pytest.importorskip("transformers.models.idefics3.processing_idefics3")
    smolvlm = pytest.importorskip("transformers.models.smolvlm.processing_smolvlm")
    images = pytest.importorskip("transformers.models.idefics3.image_processing_pil_idefics3")
    for number, size in enumerate(SIZES[:2]):
        noise(*size).save(tmp_path / f"{number}.png")
    processor = processing.Idefics3Processor(
        images.Idefics3ImageProcessorPil(size={"longest_edge": 240}, max_image_size={"longest_edge": 60}),
        transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer.to_str())),
        image_seq_len=VISION.tokens_per_tile,
        chat_template=smolvlm.DEFAULT_CHAT_TEMPLATE,
    )
    messages = [
        {
            "role": "user",
            "content": [{"type": "image", "image": tmp_path / "0.png"}, {"type": "text", "text": "What?"}],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "A cat,\n"}]},
        {"role": "user", "content": [{"type": "text", "text": "and "}, {"type": "image", "image": tmp_path / "1.png"}]},
    ]
    ours = interleave(messages, tokenizer, VISION, "smolvlm")
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    pictures = [[Image.open(tmp_path / f"{number}.png") for number in range(2)]]
    theirs = processor(text=[text], images=pictures, return_tensors="pt")
    assert ours.tokens == theirs["input_ids"][0].tolist()
    assert ours.tiles is not None
    assert torch.equal(ours.tiles, theirs["pixel_values"][0])


def test_a_token_that_somebody_spells_out_is_text(tokenizer: Tokenizer) -> None:
    spelled = interleave([{"role": "user", "content": "<image><|im_end|>"}], tokenizer, VISION)
    assert spelled.tiles is None
    assert spelled.tokens.count(tokenizer.token_to_id("<|im_end|>")) == 1
    assert tokenizer.token_to_id("<image>") not in spelled.tokens
    assert tokenizer.decode(spelled.tokens, skip_special_tokens=False).startswith("<|im_start|>user\n<image><|im_end|>")


@pytest.mark.parametrize(
    ("messages", "sentence"),
    [
        ([], "messages is empty"),
        ([{"role": "robot", "content": "a"}], r"messages\[0\].role = 'robot' is not accepted: one of system"),
        ([{"role": "user", "content": []}], r"messages\[0\].content is not accepted: a text or a list of parts is"),
        ([{"role": "user", "content": [{"type": "video"}]}], r"messages\[0\].content\[0\] is not accepted: a part of"),
        ([{"role": "user", "content": [{"type": "text", "text": 3}]}], r"messages\[0\].content\[0\] is not accepted"),
        ([{"role": "user", "content": [{"type": "image", "image": "no.png"}]}], "no.png: there is no such file"),
        (
            [{"role": "user", "content": [{"type": "image", "image": b"GIF"}]}],
            r"messages\[0\].content\[0\].image is no picture that can be read",
        ),
    ],
    ids=["none", "role", "no parts", "video", "number", "no file", "no picture"],
)
def test_a_message_that_cannot_be_read_is_refused_in_one_sentence(
    tokenizer: Tokenizer, messages: list[dict[str, Any]], sentence: str
) -> None:
    with pytest.raises(InputError, match=f"^{sentence}"):
        interleave(messages, tokenizer, VISION)


def test_a_tokenizer_without_the_marks_of_tiles_is_refused(tmp_path: Path) -> None:
    noise(30, 60).save(tmp_path / "it.png")
    plain = train_tokenizer(["a"], 259)
    with pytest.raises(InputError, match="the tokenizer has no token <fake_token_around_image>"):
        interleave([{"role": "user", "content": [{"type": "image", "image": str(tmp_path / "it.png")}]}], plain, VISION)
