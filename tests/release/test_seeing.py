"""Networks that see go to Hugging Face folders and back; `transformers` sees the same through the same weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from modelworks.data.images import tiles_of
from modelworks.model.vision import SeeingDecoder
from modelworks.release.gguf_eyes import refuse_eyes
from modelworks.release.huggingface import load_pretrained, save_pretrained
from modelworks.release.vocabulary import CHATML, CHATML_SEEING, SMOLVLM, Vocabulary
from modelworks.release.weights_folder import load_tower
from modelworks.spec import InputError, ModelSpec

IMAGE = 90
EYES = {
    "image_size": 60, "patch_size": 10, "layers": 2, "hidden": 32, "heads": 2, "ffn_hidden": 56, "pixel_shuffle": 2,
    "tiles": 5, "image_token": IMAGE,
}  # fmt: skip
SIZES = {"layers": 2, "hidden": 48, "ffn_hidden": 80, "heads": 4, "kv_heads": 2, "vocab": 96, "context": 256}


def randomised(network: torch.nn.Module) -> Any:
    """Weights, biases and norms that all count."""
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            drawn = torch.randn(parameter.shape, generator=random)
            parameter.copy_(drawn * 0.15 if parameter.dim() > 1 else 1 + drawn * 0.2)
    return network.eval()


def conversation(network: SeeingDecoder) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens with a wide and a high picture among them, and both pictures' tiles."""
    from PIL import Image

    random = torch.Generator().manual_seed(2)
    assert network.spec.vision is not None
    parts, tiles = [torch.randint(0, 80, (3,), generator=random)], []
    for size in ((200, 90), (30, 111)):
        pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=random, dtype=torch.uint8)
        seen = tiles_of(Image.fromarray(pixels.numpy()), network.spec.vision)
        for tile in seen.pixels:
            parts += [torch.full((9,), IMAGE), torch.randint(0, 80, (2,), generator=random)]
            tiles.append(tile)
    return torch.cat(parts)[None], torch.stack(tiles)


@pytest.mark.parametrize("kind", ["Idefics3", "SmolVLM"])
def test_transformers_networks_have_the_same_logits_here_and_after_the_way_back(tmp_path: Path, kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    text = {
        "model_type": "llama", "num_hidden_layers": 2, "hidden_size": 48, "intermediate_size": 80,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 96, "max_position_embeddings": 256,
        "pad_token_id": 0,
    }  # fmt: skip
    vision = {
        "num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 56, "num_attention_heads": 2, "image_size": 60,
        "patch_size": 10,
    }  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(
        text_config=text, vision_config=vision, scale_factor=2, image_token_id=IMAGE, tie_word_embeddings=False,
        pad_token_id=0,
    )  # fmt: skip
    theirs = randomised(getattr(transformers, f"{kind}ForConditionalGeneration")(config))
    theirs.save_pretrained(tmp_path / "theirs")
    split = {"size": {"longest_edge": 120}, "max_image_size": {"longest_edge": 60}}
    (tmp_path / "theirs/preprocessor_config.json").write_text(json.dumps(split))
    ours = load_pretrained(tmp_path / "theirs")
    assert isinstance(ours, SeeingDecoder)
    assert ours.spec.vision is not None
    assert ours.spec.vision.tiles == 5
    tokens, tiles = conversation(ours)
    assert len(tiles) == 6
    with torch.inference_mode():
        expected = theirs(input_ids=tokens, pixel_values=tiles[None]).logits
        given = ours(tokens, tiles=tiles)
    assert (given - expected).abs().max() < 1e-4
    assert expected.std() > 0.1
    save_pretrained(ours, tmp_path / "ours")
    back = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "ours").eval()
    with torch.inference_mode():
        assert (back(input_ids=tokens, pixel_values=tiles[None]).logits - expected).abs().max() < 1e-4
    assert load_pretrained(tmp_path / "ours").spec.vision == ours.spec.vision


@pytest.mark.parametrize("part", ["SiglipModel", "SiglipVisionModel"])
def test_siglips_tower_sees_as_in_transformers(tmp_path: Path, part: str) -> None:
    transformers = pytest.importorskip("transformers")
    vision = {
        "num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 56, "num_attention_heads": 2, "image_size": 60,
        "patch_size": 10,
    }  # fmt: skip
    text = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    config = (
        transformers.SiglipVisionConfig(**vision)
        if part == "SiglipVisionModel"
        else transformers.SiglipConfig(text_config=text | {"vocab_size": 50}, vision_config=vision)
    )
    theirs = randomised(getattr(transformers, part)(config))
    theirs.save_pretrained(tmp_path)
    tower = load_tower(tmp_path)
    tiles = torch.randn(3, 3, 60, 60, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        vision_model = theirs if part == "SiglipVisionModel" else theirs.vision_model
        expected = vision_model(pixel_values=tiles).last_hidden_state
        assert (tower(tiles).flatten(1, 2) - expected).abs().max() < 1e-4


def test_a_tower_of_another_shape_than_its_config_says_is_refused(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    vision = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 56, "num_attention_heads": 2}
    transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**vision)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"patch_size": 32}))
    with pytest.raises(InputError, match=r"patch_embedding.weight has the shape .* says \(32, 3, 32, 32\)"):
        load_tower(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "clip"}))
    with pytest.raises(InputError, match="model_type = 'clip' is not accepted: 'siglip'"):
        load_tower(tmp_path)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"vision": EYES | {"connector_hidden": 64}}, "connector_hidden = 64 has no place in the config of Idefics3"),
        ({"qk_norm": True}, "model.vision has no place beside a decoder of the layout qwen3"),
    ],
    ids=["connector of two maps", "decoder of another family"],
)
def test_a_network_that_idefics3_has_no_place_for_is_not_written(
    tmp_path: Path, change: dict[str, Any], sentence: str
) -> None:
    network = SeeingDecoder(ModelSpec.model_validate(SIZES | {"vision": EYES} | change))
    with pytest.raises(InputError, match=sentence):
        save_pretrained(network, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"vision": EYES | {"connector_hidden": 64}}, "connector_hidden = 64 has no place in llama.cpp's idefics3"),
        ({"vision": EYES | {"tiles": 1}}, "tiles = 1 has no place in llama.cpp's idefics3"),
        ({"vision": EYES, "embedding_multiplier": 2.0}, "embedding_multiplier = 2.0 is not accepted"),
        ({"vision": EYES}, "the tokenizer has no piece for two newlines"),
    ],
    ids=["connector of two maps", "one tile", "multiplied embeddings", "no piece for two newlines"],
)
def test_eyes_that_llama_cpp_would_see_otherwise_with_are_not_written(change: dict[str, Any], sentence: str) -> None:
    vocabulary = Vocabulary(["a"], [1], [], "gpt-2", 0, 0, None, CHATML)
    with pytest.raises(InputError, match=sentence):
        refuse_eyes(ModelSpec.model_validate(SIZES | change), vocabulary)


def test_the_chat_templates_are_those_of_smolvlm_and_of_chatml_with_images() -> None:
    jinja2 = pytest.importorskip("jinja2")
    processing = pytest.importorskip("transformers.models.smolvlm.processing_smolvlm")
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}, {"type": "image"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "That."}]},
        {"role": "user", "content": [{"type": "text", "text": "And "}, {"type": "image"}]},
    ]
    given = {"messages": messages, "add_generation_prompt": True}
    ours = SMOLVLM.replace("BEGIN", repr("<|im_start|>"))
    assert jinja2.Template(ours).render(given) == jinja2.Template(processing.DEFAULT_CHAT_TEMPLATE).render(given)
    plain = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    assert jinja2.Template(CHATML_SEEING).render(messages=plain) == jinja2.Template(CHATML).render(messages=plain)
    shown = jinja2.Template(CHATML_SEEING).render(messages=messages[:1])
    assert shown == "<|im_start|>user\n<image>What?<image><|im_end|>\n"
