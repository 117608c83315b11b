"""Pictures as a vision tower takes them: tiles at the picture's own aspect ratio, and one view of the whole.

A picture is resized to a whole number of tiles each way (`spec.picture`), cut into them row by row, and followed by
itself squeezed into one tile, as Idefics3 and SmolVLM do it. In the text it is a run of image tokens for each tile
behind a mark that says where the tile lies.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from modelworks.spec.model import PIXEL_DEVIATION, PIXEL_MEAN, VisionSpec
from modelworks.spec.picture import fitted, open_picture

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGE, AROUND, WHOLE = "<image>", "<fake_token_around_image>", "<global-img>"
"""The token that holds an image's places, the one before and after each tile, and the one before the whole view."""


class Mark(str):
    """A token that is named, beside text that is encoded: what somebody writes is never one."""

    __slots__ = ()


Piece = Mark | str


@dataclass(frozen=True)
class Tiles:
    """A picture cut into tiles."""

    pixels: Tensor
    """(tiles, 3, image_size, image_size) fp32, normalised; row by row, the view of the whole last."""
    rows: int
    """Of tiles; 0 where there is the view of the whole alone."""
    columns: int

    def pieces(self, vision: VisionSpec) -> list[Piece]:
        """What stands for the picture in a text: as many image tokens as it takes, between the marks of its tiles."""
        places = [Mark(IMAGE)] * vision.tokens_per_tile
        found: list[Piece] = []
        for row in range(1, self.rows + 1):
            for column in range(1, self.columns + 1):
                found += [Mark(AROUND), Mark(f"<row_{row}_col_{column}>"), *places]
            found.append("\n")
        return [*found, *(["\n"] if self.rows else []), Mark(AROUND), Mark(WHOLE), *places, Mark(AROUND)]


def marks(vision: VisionSpec) -> list[str]:
    """The tokens that a tokenizer needs for a tower's pictures."""
    side = range(1, vision.tiles_per_side + 1) if vision.tiles_per_side > 1 else range(0)
    return [IMAGE, AROUND, WHOLE, *(f"<row_{row}_col_{column}>" for row in side for column in side)]


def tiles_of(picture: Image, vision: VisionSpec) -> Tiles:
    """Cut a picture (RGB) into tiles."""
    from PIL.Image import Resampling

    size = vision.image_size
    whole = fitted(picture, size, vision.tiles_per_side)
    if vision.tiles_per_side == 1:
        return Tiles(_normalised(np.asarray(whole)[None]), 0, 0)
    rows, columns = whole.height // size, whole.width // size
    grid = np.asarray(whole).reshape(rows, size, columns, size, 3).swapaxes(1, 2).reshape(-1, size, size, 3)
    view = np.asarray(whole.resize((size, size), Resampling.LANCZOS))
    return Tiles(_normalised(np.concatenate((grid, view[None]))), rows, columns)


def read_tiles(source: Path | bytes, vision: VisionSpec, name: str) -> Tiles:
    """Open a picture and cut it into tiles.

    Raises
    ------
    InputError
        If it can't be opened; see `spec.picture.open_picture`.
    """
    return tiles_of(open_picture(source, name), vision)


def _normalised(pixels: np.ndarray) -> Tensor:
    """(N, height, width, 3) bytes as (N, 3, height, width) around zero."""
    scaled = torch.from_numpy(np.array(pixels)).permute(0, 3, 1, 2).float() / 255
    return ((scaled - PIXEL_MEAN) / PIXEL_DEVIATION).contiguous()
