"""Images in a request, made fit for llama.cpp before it sees them.

llama.cpp unpacks whatever it is given and gives up the whole process over some of it. So each image is opened here,
within limits, and handed on as an image of our own making: upright, in RGB, resized to a whole number of the model's
tiles as its training resizes them, which leaves nothing but the cutting to llama.cpp, and the view of the whole.
"""

from __future__ import annotations

import base64
import binascii
import io
from dataclasses import dataclass
from typing import Any

from modelworks.serve.errors import RequestError
from modelworks.spec.errors import InputError
from modelworks.spec.gguf_header import GgufHeader
from modelworks.spec.picture import fitted, open_picture

_LEAST_SIDE = 2
MOST_IMAGES = 64
"""In one request."""


@dataclass(frozen=True)
class TileSize:
    """How a model's eyes cut images."""

    size: int
    """Height and width of a tile in pixels."""
    per_side: int
    """Tiles along an image's longer side."""

    @classmethod
    def of(cls, eyes: GgufHeader) -> TileSize | None:
        """As the file of a model's eyes says; None where they don't cut as Idefics3's do.

        Raises
        ------
        InputError
            If the file's numbers make no sense.
        """
        size, longest = (eyes.metadata.get(f"clip.vision.{key}") for key in ("image_size", "preproc_image_size"))
        if eyes.metadata.get("clip.projector_type") != "idefics3":
            return None
        if not isinstance(size, int) or not isinstance(longest, int) or not 0 < size <= longest <= 8192:
            raise InputError(f"{eyes.path}: image_size = {size!r} and preproc_image_size = {longest!r} make no sense")
        return cls(size, longest // size)


def with_fitted_images(body: dict[str, Any], tiles: TileSize | None) -> dict[str, Any]:
    """A request whose images are ours; the same one where it has none.

    Raises
    ------
    RequestError
        If an image can't be read, is too large or too small, or there are more than `MOST_IMAGES`.
    """
    if not any(isinstance(message.get("content"), list) for message in body["messages"]):
        return body
    messages, count = [], 0
    for message in body["messages"]:
        content = message.get("content")
        if isinstance(content, list):
            parts = []
            for part in content:
                if part.get("type") == "image_url":
                    count += 1
                    if count > MOST_IMAGES:
                        raise RequestError(f"a request has up to {MOST_IMAGES} images", param="messages")
                    part = {"type": "image_url", "image_url": {"url": _fitted(part["image_url"]["url"], count, tiles)}}
                parts.append(part)
            message = {**message, "content": parts}
        messages.append(message)
    return {**body, "messages": messages}


def _fitted(url: str, number: int, tiles: TileSize | None) -> str:
    """A ``data:`` URL of the same image as it suits the model."""
    name = f"image {number}"
    _, found, encoded = url.partition(";base64,")
    try:
        content = base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError):
        found = ""
    if not found or not url.startswith("data:image/"):
        raise RequestError(f"{name} is not accepted: a data:image/...;base64, URL is", param="messages")
    try:
        picture = open_picture(content, name, _LEAST_SIDE)
    except InputError as error:
        raise RequestError(str(error), param="messages") from None
    if tiles is not None:
        picture = fitted(picture, tiles.size, tiles.per_side)
    written = io.BytesIO()
    picture.save(written, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(written.getvalue()).decode()
