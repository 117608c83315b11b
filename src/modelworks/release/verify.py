"""Holds a network's logits against reference ones that another implementation gave."""

from __future__ import annotations

import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from modelworks.model.decoder import Decoder
from modelworks.release.huggingface import load_pretrained
from modelworks.release.runs import load_run_content
from modelworks.spec.errors import InputError

TOLERANCE = 2e-3
"""Of `max_rel_std`: what two orders of the same fp32 sums may differ by, with room."""


@dataclass(frozen=True)
class Verification:
    """How far a network's logits are from the reference."""

    tokens: int
    """Positions compared."""
    logits: tuple[int, ...]
    """The logits' shape (B, T, V)."""
    max_abs: float
    """The largest absolute difference."""
    max_rel_std: float
    """The same over the standard deviation of the reference's logits."""
    tolerance: float
    passed: bool
    """Whether `max_rel_std` is within `tolerance`."""

    def as_dict(self) -> dict[str, Any]:
        """The fields as plain values."""
        return {**asdict(self), "logits": list(self.logits)}


def verify(model: Path, logits: Path, tolerance: float = TOLERANCE) -> Verification:
    """Compare a model's fp32 logits with reference ones.

    Parameters
    ----------
    model
        A Hugging Face folder, or a run's folder.
    logits
        An ``.npz`` with `tokens` (B, T) and `logits` (B, T, V).
    tolerance
        Of the largest difference over the reference's standard deviation.

    Raises
    ------
    InputError
        If either can't be read, or the tokens or logits don't fit the network.
    """
    if not tolerance > 0:
        raise InputError(f"tolerance = {tolerance} is not accepted: a positive number is")
    if not model.is_dir():
        raise InputError(f"{model}: there is no such folder; a Hugging Face folder or a run's folder is accepted")
    tokens, reference = _reference(logits)
    decoder = load_run_content(model).decoder if (model / "run.toml").is_file() else load_pretrained(model)
    return compare(decoder, tokens, reference, tolerance, str(logits))


def compare(decoder: Decoder, tokens: np.ndarray, reference: np.ndarray, tolerance: float, where: str) -> Verification:
    """Run the network on tokens (B, T) and compare its logits with reference ones (B, T, V)."""
    spec = decoder.spec
    if reference.shape != (*tokens.shape, spec.vocab):
        raise InputError(
            f"{where}: logits has the shape {reference.shape}, and {(*tokens.shape, spec.vocab)} is needed"
        )
    if tokens.min() < 0 or tokens.max() >= spec.vocab:
        raise InputError(f"{where}: tokens are from {tokens.min()} to {tokens.max()}, and 0 to {spec.vocab - 1} fit")
    if tokens.shape[1] > spec.context:
        raise InputError(f"{where}: {tokens.shape[1]} tokens are longer than the network's context of {spec.context}")
    decoder.eval()
    with torch.inference_mode():
        given = decoder(torch.from_numpy(tokens.astype(np.int64)))
    difference = np.abs(given.numpy().astype(np.float64) - reference)
    deviation = float(reference.std())
    largest = float(difference.max())
    # A reference that is constant has no scale of its own.
    relative = largest / deviation if deviation > 0 else (0.0 if largest == 0 else float("inf"))
    passed = bool(relative <= tolerance)
    return Verification(tokens.size, tuple(reference.shape), largest, relative, tolerance, passed)


def _reference(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """`tokens` (B, T) and `logits` (B, T, V) in fp64 of an ``.npz``, read without pickles."""
    try:
        with np.load(path, allow_pickle=False) as content:
            tokens, logits = content["tokens"], content["logits"]
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file") from None
    except KeyError:
        raise InputError(f"{path}: tokens and logits are needed, and one of them is missing") from None
    except (OSError, ValueError, EOFError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: cannot be read as a NumPy .npz of numbers: {error}") from None
    if tokens.ndim != 2 or tokens.dtype.kind not in "iu" or tokens.size == 0:
        raise InputError(f"{path}: tokens of shape {tokens.shape}, {tokens.dtype}: integers (B, T) are accepted")
    if logits.ndim != 3 or logits.dtype.kind != "f" or not np.all(np.isfinite(logits)):
        raise InputError(
            f"{path}: logits of shape {logits.shape}, {logits.dtype}: finite floats (B, T, V) are accepted"
        )
    return tokens, logits.astype(np.float64)
