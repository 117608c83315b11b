"""Writes tower and connector as the GGUF file that llama.cpp calls a multimodal projector, beside a decoder's own.

Its architecture is `clip`, its projector `idefics3`: llama.cpp resizes and cuts pictures itself, puts the marks of
tiles between them and computes tower and connector in a graph of its own. What it doesn't have a place for is refused
here. Source: llama.cpp, ``tools/mtmd`` (2026).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor

from modelworks.model.vision import Eyes
from modelworks.release.gguf_export import Described
from modelworks.release.huggingface import Progress
from modelworks.release.layouts import EYES_GGUF_TABLE, TensorPlace, places_of
from modelworks.release.vocabulary import Vocabulary
from modelworks.spec.errors import InputError, OperationError
from modelworks.spec.model import PIXEL_DEVIATION, PIXEL_MEAN, ModelSpec, VisionSpec

_PIECES = {"ĊĊ": "two newlines", "Ċ": "a newline"} | {
    mark: mark for mark in ("<fake_token_around_image>", "<global-img>")
}
"""Pieces that llama.cpp looks up by what they stand for."""


def eyes_file(model: Path) -> Path:
    """Where the eyes of a model's file stand beside it."""
    return model.with_name(f"mmproj-{model.name}")


def refuse_eyes(spec: ModelSpec, vocabulary: Vocabulary) -> None:
    """Raise an `InputError` if llama.cpp would not see with a network's eyes, or not as the network does."""
    vision = _vision(spec)
    if vision.connector_hidden is not None:
        raise InputError(
            f"model.vision.connector_hidden = {vision.connector_hidden} has no place in llama.cpp's idefics3: "
            "leaving it out is accepted"
        )
    if vision.tiles_per_side == 1:
        raise InputError(
            f"model.vision.tiles = {vision.tiles} has no place in llama.cpp's idefics3, which cuts every image: 5 or "
            "more are accepted"
        )
    if spec.embedding_multiplier != 1.0:
        raise InputError(
            f"model.embedding_multiplier = {spec.embedding_multiplier} is not accepted beside model.vision in a GGUF "
            "file, where it would be applied to images too: 1.0 is"
        )
    there = set(vocabulary.tokens)
    missing = [named for piece, named in _PIECES.items() if piece not in there]
    if missing:
        raise InputError(
            f"the tokenizer has no piece for {missing[0]}, which llama.cpp puts around the tiles of images"
        )


def write_eyes(
    path: Path,
    spec: ModelSpec,
    read: Callable[[str, int | None, tuple[int, ...]], Tensor],
    described: Described,
    *,
    half: bool,
    progress: Progress | None = None,
) -> None:
    """Write the eyes of a network; the file has its name only when it is whole.

    Parameters
    ----------
    path
        Where.
    spec
        The network; `refuse_eyes` has passed it.
    read
        Gives a parameter in fp32, from its name, None, and its shape.
    described
        What the file says of itself.
    half
        Whether the matrices of blocks and connector are in fp16; all else, and everything otherwise, is in fp32.

    Raises
    ------
    OperationError
        If it can't be written.
    """
    part = path.with_name(f"{path.name}.part")
    listed = places(spec)
    writer = gguf.GGUFWriter(part, "clip")
    try:
        _write_metadata(writer, spec, described, half)
        for done, place in enumerate(listed):
            if progress is not None:
                progress("writing the eyes' GGUF", done, len(listed))
            numbers = read(f"eyes.{place.ours}", None, place.shape).to(torch.float32).numpy()
            matrix = len(place.shape) == 2 and "position" not in place.theirs
            writer.add_tensor(place.theirs, numbers.astype(np.float16) if half and matrix else numbers)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        part.rename(path)
    except OSError as error:
        raise OperationError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            writer.close()
        part.unlink(missing_ok=True)


def places(spec: ModelSpec) -> list[TensorPlace]:
    """Every tensor of a network's eyes under llama.cpp's names."""
    vision = _vision(spec)
    with torch.device("meta"):
        eyes = Eyes(vision, spec.hidden)
    shapes = {name: tuple(parameter.shape) for name, parameter in eyes.named_parameters()}
    return places_of(shapes, dict(EYES_GGUF_TABLE), "gguf", vision)


def _write_metadata(writer: gguf.GGUFWriter, spec: ModelSpec, described: Described, half: bool) -> None:
    vision = _vision(spec)
    writer.add_type("mmproj")
    writer.add_name(described.name)
    if described.license is not None:
        writer.add_license(described.license)
    writer.add_file_type(int(gguf.LlamaFileType.MOSTLY_F16 if half else gguf.LlamaFileType.ALL_F32))
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type("idefics3")
    writer.add_vision_projection_dim(spec.hidden)
    writer.add_vision_image_size(vision.image_size)
    writer.add_vision_preproc_image_size(vision.tiles_per_side * vision.image_size)
    writer.add_vision_patch_size(vision.patch_size)
    writer.add_vision_embedding_length(vision.hidden)
    writer.add_vision_feed_forward_length(vision.ffn_hidden)
    writer.add_vision_block_count(vision.layers)
    writer.add_vision_head_count(vision.heads)
    writer.add_vision_attention_layernorm_eps(vision.norm_eps)
    writer.add_vision_image_mean([PIXEL_MEAN] * 3)
    writer.add_vision_image_std([PIXEL_DEVIATION] * 3)
    writer.add_vision_projector_scale_factor(vision.pixel_shuffle)
    writer.add_vision_use_gelu(True)


def _vision(spec: ModelSpec) -> VisionSpec:
    assert spec.vision is not None
    return spec.vision
