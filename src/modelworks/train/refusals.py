"""What a run may ask for and this trainer doesn't do, refused in a sentence before anything is prepared.

Asked by whoever submits a run as well, so it needs no PyTorch.
"""

from __future__ import annotations

from modelworks.spec.errors import InputError
from modelworks.spec.run import RunSpec
from modelworks.train.layout import Layout, layout


def refuse_unsupported(spec: RunSpec, processes: int) -> None:
    """Refuse what can't be done on so many processes of this machine, before anything is prepared."""
    if spec.cluster.gpus != processes:
        raise InputError(
            f"cluster.gpus = {spec.cluster.gpus} is not accepted: this run is trained by {processes} processes, one "
            "for each"
        )
    one = layout(spec, processes)
    if spec.train.objective == "grpo" and processes > 1:
        raise InputError(
            f"cluster.gpus = {processes} is not accepted with train.objective = 'grpo': 1 is, since one process draws "
            "replies and learns from them"
        )
    _refuse_splits(spec, one)
    if spec.train.document_mask and one.pipeline > 1:
        raise InputError(
            f"train.document_mask = true is not accepted with parallel.pipeline = {one.pipeline}, whose later stages "
            "don't see the tokens: 1 is"
        )
    if spec.train.restart_positions and spec.model.attention_temperature_length is not None:
        raise InputError(
            "train.restart_positions = true is not accepted with model.attention_temperature_length, which counts from "
            "a sequence's beginning: false is"
        )
    if spec.train.compile is True and (reason := not_compiled(spec, one)):
        raise InputError(f"train.compile = true is not accepted with {reason}: auto is")


def _refuse_splits(spec: RunSpec, one: Layout) -> None:
    """Refuse to split a network that has an adapter or eyes, or a sequence of which only some tokens are learnt."""
    if spec.adapter is not None:
        what = "[adapter]"
    elif spec.model.vision is not None:
        what = "[model.vision]"
    elif spec.data.source == "dialogues":
        what = "data.source = 'dialogues'"
    else:
        return
    for name in ("tensor", "pipeline", "context", "expert"):
        if (degree := getattr(one, name)) > 1:
            raise InputError(f"parallel.{name} = {degree} is not accepted with {what}: 1 is, and parallel.data splits")
    if spec.adapter is not None and spec.train.precision == "fp8":
        raise InputError("train.precision = 'fp8' is not accepted with [adapter]: auto, fp32 and bf16 are")


def not_compiled(spec: RunSpec, one: Layout) -> str | None:
    """Why the blocks of a run are not compiled, in words that follow "with"."""
    if spec.train.objective == "grpo":
        return "train.objective = 'grpo', whose replies are of many lengths"
    for name in ("tensor", "context", "expert"):
        if (degree := getattr(one, name)) > 1:
            # Compiled blocks with exchanges in them are known to have given wrong gradients without a word.
            return f"parallel.{name} = {degree}, whose exchanges within a block are not compiled"
    if one.schedule == "zero-bubble":
        return "parallel.schedule = 'zero-bubble', which splits a backward pass that compilation joins"
    if spec.parallel.recompute in ("selective", "projections"):
        return f"parallel.recompute = {spec.parallel.recompute!r}, which looks at each product by itself"
    return None
