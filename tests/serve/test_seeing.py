"""A network with eyes, exported for llama.cpp and served, answers as it does in PyTorch; bad images harm nobody."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import string
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer

from modelworks.data.images import marks
from modelworks.data.interleaved import interleave
from modelworks.data.tokenizer import train_tokenizer
from modelworks.model.vision import SeeingDecoder
from modelworks.release.gguf_import import import_huggingface
from modelworks.release.huggingface import save_pretrained
from modelworks.serve.errors import RequestError
from modelworks.serve.llamacpp import EngineSettings, LlamaCppEngine
from modelworks.serve.seeing import MOST_IMAGES, TileSize, with_fitted_images
from modelworks.serve.store import Store
from modelworks.spec import InputError, ModelSpec
from modelworks.spec.model import VisionSpec

EYES = {
    "image_size": 64, "patch_size": 16, "layers": 2, "hidden": 64, "heads": 2, "ffn_hidden": 96, "pixel_shuffle": 2,
    "tiles": 5,
}  # fmt: skip
SIZES = {"layers": 2, "hidden": 64, "ffn_hidden": 96, "heads": 4, "kv_heads": 2, "context": 1024}


def picture(width: int, height: int, tone: float) -> bytes:
    """A PNG of smooth waves."""
    down, across = np.mgrid[:height, :width] / np.array([height, width])[:, None, None]
    waves = (128 + 120 * np.sin(3 * across + tone), 255 * down, 128 + 120 * np.cos(4 * across * down + 2 * tone))
    content = io.BytesIO()
    Image.fromarray(np.stack(waves, axis=-1).clip(0, 255).astype(np.uint8)).save(content, "PNG")
    return content.getvalue()


def url(content: bytes, kind: str = "png") -> dict[str, Any]:
    data = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    return {"type": "image_url", "image_url": {"url": data}}


def vocabulary(template: str) -> Tokenizer:
    tokenizer = train_tokenizer(["a b\n\nc d\n\n\ne" * 50, "\n\n" * 10], 300)
    named = [*marks(VisionSpec(**EYES)), *(["<end_of_utterance>"] if template == "smolvlm" else [])]
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in named])
    return tokenizer


def network(tokenizer: Tokenizer) -> SeeingDecoder:
    """Random weights whose answers are letters, so that tokens and text say the same."""
    eyes = EYES | {"image_token": tokenizer.token_to_id("<image>")}
    decoder = SeeingDecoder(ModelSpec.model_validate(SIZES | {"vocab": tokenizer.get_vocab_size(), "vision": eyes}))
    random = torch.Generator().manual_seed(3)
    letters = [tokenizer.token_to_id(letter) for letter in string.ascii_letters]
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=random) * 0.2)
            elif name == "embed.weight":
                parameter.normal_(generator=random)
            elif name.startswith("eyes"):
                if "patches" in name or "positions" in name:  # such that smooth pictures are told apart
                    parameter.normal_(std=parameter.shape[-1] ** -0.5, generator=random)
                parameter.mul_(2)
        assert decoder.head is not None
        silent = torch.ones(len(decoder.head.weight), dtype=torch.bool)
        silent[letters] = False
        decoder.head.weight[silent] = 0
    return decoder.eval()


@pytest.fixture(scope="module", params=["chatml", "smolvlm"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The network, its tokenizer, its template, and a store with what import and `models add` made of its folder."""
    folder = tmp_path_factory.mktemp("eyes")
    tokenizer = vocabulary(request.param)
    decoder = network(tokenizer)
    save_pretrained(decoder, folder / "hf")
    tokenizer.save(str(folder / "hf" / "tokenizer.json"))
    import_huggingface(folder / "hf", folder / "out", to=["gguf"], precision="f32")
    store = Store(folder / "models")
    store.add("eyes", folder / "out/out-f32.gguf", source="a test", eyes=folder / "out/mmproj-out-f32.gguf")
    return decoder, tokenizer, request.param, store


@contextmanager
def asked(store: Store) -> Iterator[Any]:
    engine = LlamaCppEngine(store, EngineSettings(slots=1, threads=1, context=1024))
    with asyncio.Runner() as runner:

        async def answer(messages: list[dict[str, Any]], **options: Any) -> str:
            chat = engine.chat("eyes", messages, temperature=0.0, **options)
            return "".join([delta.text async for delta in chat])

        async def images() -> bool:
            return (await engine.card("eyes")).images

        try:
            yield lambda messages, **options: runner.run(answer(messages, **options)), runner.run(images())
        finally:
            runner.run(engine.close())


def test_the_served_answers_about_pictures_are_pytorchs(served: Any) -> None:
    decoder, tokenizer, template, store = served
    answers = set()
    with asked(store) as (answer, sees):
        assert sees
        for tone in range(4):
            wide, high = picture(150, 90, tone), picture(40, 128, tone + 0.5)
            ours = [
                {"role": "system", "content": "Look."},
                {"role": "user", "content": [{"type": "image", "image": wide}, {"type": "text", "text": "a b c"}]},
                {"role": "assistant", "content": "c"},
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "and "}, {"type": "image", "image": high},
                        {"type": "text", "text": "?"},
                    ],
                },
            ]  # fmt: skip
            theirs = json.loads(json.dumps(ours, default=lambda content: content.hex()))
            for message in theirs:
                for place, part in enumerate(message["content"]):
                    if isinstance(part, dict) and part["type"] == "image":
                        message["content"][place] = url(bytes.fromhex(part["image"]))
            seen = interleave(ours, tokenizer, decoder.spec.vision, template)
            tokens = torch.tensor([seen.tokens])
            with torch.inference_mode():
                continued = decoder.generate(tokens, 16, tiles=seen.tiles)[0, tokens.shape[1] :].tolist()
            text = tokenizer.decode(continued)
            assert answer(theirs, max_tokens=16) == text
            answers.add(text)
    assert len(answers) > 1


def cut_off(content: bytes) -> bytes:
    return content[: len(content) // 2]


def claiming_to_be_large() -> bytes:
    content = io.BytesIO()
    Image.new("1", (20_000, 19_000)).save(content, "PNG")
    return content.getvalue()


@pytest.mark.parametrize(
    ("part", "sentence"),
    [
        (url(cut_off(picture(64, 64, 0))), "image 1 is cut off or damaged"),
        (url(b"<svg/>", "svg+xml"), "image 1 is no picture that can be read"),
        (url(picture(1, 1, 0)), "image 1 is 1 by 1 pixels: 2 to 20,000 a side"),
        (url(claiming_to_be_large()), "image 1 has too many pixels"),
        ({"type": "image_url", "image_url": {"url": "data:image/png;base64,%%%"}}, "image 1 is not accepted: a data:"),
        ({"type": "image_url", "image_url": {"url": "http://127.0.0.1/x.png"}}, "image 1 is not accepted: a data:"),
    ],
    ids=["cut off", "svg", "one pixel", "bomb", "not base64", "address"],
)
def test_an_image_that_cannot_be_seen_is_refused_before_llama_cpp_sees_it(part: dict[str, Any], sentence: str) -> None:
    body = {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, part]}]}
    with pytest.raises(RequestError, match=f"^{sentence}"):
        with_fitted_images(body, TileSize(64, 2))


def test_images_are_handed_on_as_a_whole_number_of_tiles_and_not_too_many() -> None:
    one = url(picture(150, 90, 0))
    body = {"messages": [{"role": "user", "content": [one] * MOST_IMAGES}, {"role": "assistant", "content": "a"}]}
    fitted = with_fitted_images(body, TileSize(64, 2))
    encoded = fitted["messages"][0]["content"][0]["image_url"]["url"].partition(",")[2]
    assert Image.open(io.BytesIO(base64.b64decode(encoded))).size == (128, 128)
    assert fitted["messages"][1] == body["messages"][1]
    with pytest.raises(RequestError, match="up to 64 images"):
        with_fitted_images({"messages": [{"role": "user", "content": [one] * (MOST_IMAGES + 1)}]}, TileSize(64, 2))


def test_the_command_stores_a_model_with_its_eyes_and_refuses_what_does_not_fit(served: Any, tmp_path: Path) -> None:
    *_, store = served
    model, eyes = store.path("eyes"), store.eyes(store.get("eyes"))
    home = {"MODELWORKS_HOME": str(tmp_path), "PATH": "", "PYTHONPATH": ":".join(sys.path)}

    def add(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "modelworks", "models", "add", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, env=home, check=False)

    stored = json.loads(add("sees", model, "--eyes", eyes, "--json").stdout)
    assert stored["eyes_bytes"] == eyes.stat().st_size
    assert Store(tmp_path / "models").get("sees").eyes_sha256 == stored["eyes_sha256"]
    refused = add("sees", eyes)
    assert refused.returncode == 2
    assert "holds the eyes of a model" in refused.stderr
    with pytest.raises(InputError, match="holds no eyes: a GGUF file of the architecture 'clip'"):
        store.add("blind", model, source="a test", eyes=model)
