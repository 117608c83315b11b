"""Rotary positions: the angle of each pair of a head's dimensions, stretched over longer contexts, and the turn itself.

RoFormer (arXiv:2104.09864) turns pair i of D / 2 by `position * base ** (-2 i / D)`. Every kind of context extension
is another set of those frequencies, and in YaRN a factor on cosine and sine as well; `RopeScalingSpec` names the
kinds and their papers.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from modelworks.spec.model import ModelSpec
from modelworks.spec.rope import RopeScalingSpec


class Rotary(NamedTuple):
    """What attention has to know of positions: the rotation of each, where each one's document begins, and how warm it
    is.

    The two tables are (T, D) in fp32, or (B, 1, T, D) where sequences differ.
    """

    cosine: Tensor
    sine: Tensor
    first: Tensor | None = None
    """(B, T) int64: the first position that each may attend to; None for the sequence's first."""
    temperature: Tensor | None = None
    """(T) in fp32: what the logits of each are multiplied with after their cap; None for one everywhere."""
    shared: Tensor | None = None
    """(B, T, 2) int64: the positions before `first`, from one up to another, that each may attend to as well."""


def rotary_base(spec: ModelSpec, seq_len: int | None = None) -> float:
    """The base after an NTK-aware change of it (bloc97 2023; the YaRN paper, section 3.1).

    Parameters
    ----------
    spec
        The network.
    seq_len
        The sequence at hand, which `dynamic` goes by; the network's whole context if unset.
    """
    scaling, factor = spec.rope_scaling, 1.0
    if scaling is not None and scaling.rope_type == "ntk":
        factor = scaling.factor
    if scaling is not None and scaling.rope_type == "dynamic":
        original = scaling.original_max_position_embeddings or spec.context
        longest = max(original, spec.context if seq_len is None else seq_len)
        factor = scaling.factor * longest / original - (scaling.factor - 1.0)
    exponent = spec.head_dim / (spec.head_dim - 2) if spec.head_dim > 2 else 0.0
    return float(spec.rope_base * factor**exponent)


def rotary_frequencies(spec: ModelSpec, device: torch.device, seq_len: int | None = None) -> Tensor:
    """The angle per position of each pair of a head's dimensions (D / 2), in fp32; parameters as in `rotary_base`."""
    exponents = torch.arange(0, spec.head_dim, 2, dtype=torch.float32, device=device) / spec.head_dim
    frequencies = 1.0 / rotary_base(spec, seq_len) ** exponents
    scaling = spec.rope_scaling
    if scaling is None or scaling.rope_type in ("ntk", "dynamic"):
        return frequencies
    if scaling.rope_type == "linear":
        return frequencies / scaling.factor
    kept = _kept_by_llama3(scaling, frequencies) if scaling.rope_type == "llama3" else _kept_by_yarn(spec, scaling)
    kept = kept.to(device)
    if scaling.rope_type == "yarn_log":
        return frequencies * scaling.factor ** (kept - 1.0)
    return kept * frequencies + (1.0 - kept) * frequencies / scaling.factor


def _kept_by_llama3(scaling: RopeScalingSpec, frequencies: Tensor) -> Tensor:
    """How much of each frequency stays: a ramp over the turns that it makes in the original context."""
    assert scaling.original_max_position_embeddings
    assert scaling.low_freq_factor
    assert scaling.high_freq_factor
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    return ((turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)).clamp(0.0, 1.0)


def _kept_by_yarn(spec: ModelSpec, scaling: RopeScalingSpec) -> Tensor:
    """How much of each frequency stays: a ramp over the dimensions (the YaRN paper, section 3.2 and appendix A.2)."""
    assert scaling.original_max_position_embeddings
    pairs = spec.head_dim // 2

    def pair_that_turns(times: float) -> float:
        """Which pair, counted from 0 and broken, makes so many turns in the original context."""
        wavelengths = scaling.original_max_position_embeddings / (times * 2 * math.pi)  # type: ignore[operator]
        return pairs * math.log(wavelengths) / math.log(spec.rope_base)

    first, last = pair_that_turns(scaling.fast), pair_that_turns(scaling.slow)
    if scaling.truncate is not False:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, spec.head_dim - 1)
    ramp = (torch.arange(pairs, dtype=torch.float32) - first) / (last - first if last != first else 0.001)
    return (1.0 - ramp.clamp(0.0, 1.0)) * scaling.extrapolated


def attention_factor(spec: ModelSpec) -> float:
    """What cosine and sine are multiplied with: YaRN's inverse root of the temperature (its eq. 22); else 1."""
    scaling = spec.rope_scaling
    if scaling is None or not scaling.rope_type.startswith("yarn"):
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    stretched = 0.1 * math.log(scaling.factor)
    if scaling.mscale is not None and scaling.mscale_all_dim is not None:
        return (scaling.mscale * stretched + 1.0) / (scaling.mscale_all_dim * stretched + 1.0)
    return stretched + 1.0


def rotary_tables(spec: ModelSpec, start: int, length: int, device: torch.device) -> Rotary:
    """The rotations of the positions `start` to `start + length`, the last of them the sequence's last."""
    positions = torch.arange(start, start + length, dtype=torch.float32, device=device)
    return rotations(spec, positions, start + length)


class Documents(NamedTuple):
    """How sequences that hold several documents, one behind another, are told apart."""

    separator: int
    """The token that ends each document."""
    restart: bool = False
    """Whether the positions of each begin at 0."""
    picture: int | None = None
    """A picture's token, if a document without one is another question about the picture before it: it goes on behind
    that picture as if nothing else stood there (Deitke et al. 2024, arXiv:2409.17146)."""


def document_starts(tokens: Tensor, separator: int) -> Tensor:
    """Where in its sequence the document of each token (B, T) begins: (B, T) int64."""
    return _last(_begins(tokens, separator))


def _begins(tokens: Tensor, separator: int) -> Tensor:
    """Whether a document begins with each token (B, T)."""
    begins = torch.zeros_like(tokens, dtype=torch.bool)
    begins[:, 1:] = tokens[:, :-1] == separator
    return begins


def _last(marked: Tensor) -> Tensor:
    """The last marked place (B, T) up to each; 0 where there is none."""
    return torch.where(marked, torch.arange(marked.shape[1], device=marked.device), 0).cummax(1).values


def pictures_before(tokens: Tensor, separator: int, picture: int) -> Tensor:
    """From where to where the picture stands that each token's document, which has none itself, is about.

    Parameters
    ----------
    tokens
        (B, T)
    separator, picture
        The tokens of a document's end, and of a picture.

    Returns
    -------
    Tensor
        (B, T, 2) int64, with the beginning of the picture's document and the mark that closes it; 0 and 0 for the
        tokens of documents that have pictures.
    """
    begins, pictures = _begins(tokens, separator), tokens.eq(picture)
    number = begins.cumsum(1)
    shows = torch.zeros_like(tokens).scatter_add_(1, number, pictures.long()).gather(1, number) > 0
    until = _last(pictures) + 2
    return torch.where(shows[..., None], 0, torch.stack((_last(begins & shows), until), -1))


def packed_tables(spec: ModelSpec, tokens: Tensor, documents: Documents | None) -> Rotary:
    """The rotations of whole sequences of tokens (B, T), and where the documents in them begin."""
    length = tokens.shape[1]
    if documents is None:
        return rotary_tables(spec, 0, length, tokens.device)
    separator, picture = documents.separator, documents.picture
    first = document_starts(tokens, separator)
    shared = None if picture is None else pictures_before(tokens, separator, picture)
    if not documents.restart:
        return rotary_tables(spec, 0, length, tokens.device)._replace(first=first, shared=shared)
    positions = torch.arange(length, device=tokens.device) - first  # (B, T)
    if shared is not None:
        positions += shared[..., 1] - shared[..., 0]
    cosine, sine, *_ = rotations(spec, positions.flatten(), length)
    shape = (*positions.shape, -1)
    return Rotary(cosine.view(shape).unsqueeze(1), sine.view(shape).unsqueeze(1), first, shared=shared)


def rotations(spec: ModelSpec, positions: Tensor, seq_len: int) -> Rotary:
    """The rotations, and the temperature where there is one, of any positions (T) of a sequence of `seq_len` tokens."""
    frequencies = rotary_frequencies(spec, positions.device, seq_len)
    angles = torch.outer(positions.float(), frequencies).repeat(1, 2)  # (T, D)
    factor = attention_factor(spec)
    return Rotary(angles.cos() * factor, angles.sin() * factor, temperature=temperature(spec, positions))


def temperature(spec: ModelSpec, positions: Tensor) -> Tensor | None:
    """What the attention logits of positions (T) are multiplied with: `log(position) / log(length)` beyond `length`.

    As SGLang computes Grok-2 (``triton_ops/extend_attention.py``, `xai_temperature_len`), after the soft cap.
    """
    length = spec.attention_temperature_length
    return None if length is None else positions.float().clamp(min=length).log() / math.log(length)


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Turn the heads (B, heads, T, D) by their positions, in fp32, pairing dimension i with i + D / 2 (rotate-half)."""
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (x.float() * rotary.cosine + turned * rotary.sine).to(x.dtype)
