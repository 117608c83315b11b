"""Weights of another network to begin with, read part by part; a dense network's become a mixture of experts'.

Sparse upcycling (Komatsuzaki et al. 2022, arXiv:2212.05055): every expert begins as a copy of the dense feed-forward
network, and the router with random weights. As long as the experts are alike and their gates sum to one (the spec's
`moe.renormalize`), what the mixture computes is what the dense network computed, whichever experts are chosen; where a
norm follows (`sandwich`) the sum doesn't matter.

The weights lie in a run's folder ``initial``, under our names, in safetensors; ``index.json`` says which file holds
which. `release.beginning` writes them from what others published.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from modelworks.spec.errors import InputError, OperationError
from modelworks.spec.model import ModelSpec, VisionSpec

FOLDER, INDEX, TOKENIZER = "initial", "index.json", "tokenizer.json"
_EXPERTS = re.compile(r"(blocks\.\d+)\.moe\.(gate|up|down)")
_ROUTER = re.compile(r"blocks\.\d+\.moe\.router\.weight")
_MAY_DIFFER = ("name", "preset", "context", "rope_base", "rope_scaling", "attention_temperature_length", "moe")
"""What a network may have otherwise than the one that its weights come from: names, its context and how it is reached,
and by upcycling its experts."""


class InitialWeights:
    """The weights that a run begins with.

    Raises
    ------
    OperationError
        If the folder is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        try:
            self._file_of: dict[str, str] = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weights"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise OperationError(f"{folder}: the weights to begin with cannot be read ({error})") from None

    @torch.no_grad()
    def fill(self, part: Tensor, name: str, shape: Sequence[int] = (), start: Sequence[int] = ()) -> bool:
        """Give a parameter, or a part of it, its first values; False where it is to be drawn: new routers and eyes.

        Parameters
        ----------
        part, name, shape, start
            As in `initialization.fill`.

        Raises
        ------
        OperationError
            If the weights lack the parameter, or have it in another shape.
        """
        if part.numel() == 0:
            return True
        start = tuple(start) or (0,) * part.dim()
        whole = tuple(shape) or tuple(part.shape)
        if name in self._file_of:
            self._copy(part, name, whole, start)
            return True
        experts = _EXPERTS.fullmatch(name)
        if experts is not None:
            for expert in part:
                self._copy(expert, f"{experts[1]}.mlp.{experts[2]}.weight", whole[1:], start[1:])
            return True
        if _ROUTER.fullmatch(name) or name.startswith("eyes."):
            return False
        raise OperationError(f"{self._folder}: holds no {name}")

    def _copy(self, part: Tensor, name: str, whole: tuple[int, ...], start: Sequence[int]) -> None:
        file = self._folder / self._file_of.get(name, "")
        if name not in self._file_of:
            raise OperationError(f"{self._folder}: holds no {name}")
        try:
            with safe_open(file, framework="pt") as content:
                stored = content.get_slice(name)
                if tuple(stored.get_shape()) != whole:
                    raise OperationError(f"{file}: {name} has the shape {stored.get_shape()} and should have {whole}")
                here = tuple(slice(first, first + size) for first, size in zip(start, part.shape, strict=True))
                part.copy_(stored[here])
        except (OSError, SafetensorError) as error:
            raise OperationError(f"{file}: is missing or damaged: {error}") from None


def _same_eyes(given: VisionSpec, theirs: VisionSpec) -> bool:
    """Whether two differ in nothing but the pictures to a sequence."""
    return given == theirs.model_copy(update={"images": given.images})


def refuse_other(spec: ModelSpec, source: ModelSpec, where: str) -> None:
    """Refuse to begin a network with the weights of another one, unless it is the same or its upcycled form.

    Raises
    ------
    InputError
        Naming the first field that stands in the way.
    """
    upcycled = source.moe is None and spec.moe is not None
    for field in ModelSpec.model_fields:
        given, theirs = getattr(spec, field), getattr(source, field)
        alike = given == theirs or (field == "attention_multiplier" and spec.attention_scale == source.attention_scale)
        free = field in _MAY_DIFFER and (field != "moe" or upcycled)
        given_eyes = field == "vision" and (theirs is None or (given is not None and _same_eyes(given, theirs)))
        # With experts in every layer no network is that wide.
        unused = field == "ffn_hidden" and spec.moe is not None and not spec.moe.residual and spec.dense_layers == 0
        if not (alike or free or given_eyes or unused):
            raise _refusal(field, given, where, theirs)
    if spec.moe is None or not upcycled:
        return
    if spec.moe.expert_hidden != source.ffn_hidden:
        raise _refusal("moe.expert_hidden", spec.moe.expert_hidden, where, source.ffn_hidden)
    if spec.moe.residual:
        raise _refusal("moe.residual", True, where, False)
    if source.mlp_bias:
        raise InputError(f"train.init_from: {where} has biases in its feed-forward networks, and experts have none")
    if not spec.moe.renormalize and spec.norm_placement == "pre":
        raise InputError(
            "model.moe.renormalize = false is not accepted where train.init_from is a dense network: true is, so that "
            "the gates of its copies sum to one"
        )


def _refusal(field: str, given: Any, where: str, accepted: Any) -> InputError:
    return InputError(f"model.{field} = {given!r} is not accepted: the weights of {where} have {accepted!r}")
