"""Training in stages: one run spec as a chain of runs, each of which begins with the last one's weights.

A stage says what changes: longer sequences, another rotary base, fewer tokens, another text. Written out it is a run
spec like any other, so that plans, checkpoints, metrics and releases need know nothing of stages.
"""

from __future__ import annotations

from typing import Any

from modelworks.spec.errors import InputError
from modelworks.spec.fields import nearest, validate
from modelworks.spec.run import RunSpec, StageSpec

_MODEL = ("rope_base", "rope_scaling", "context")
_DATA = ("files", "kinds")


def chain(spec: RunSpec) -> list[RunSpec]:
    """The runs of a spec, in order: itself without its stages, and one for each stage, named ``NAME-STAGE``.

    Raises
    ------
    InputError
        If a stage's run isn't one that could stand alone.
    """
    runs = [spec.model_copy(update={"stages": [], "stage": ""})]
    for stage in spec.stages:
        runs.append(_run_of(stage, runs[-1], spec.name))
    return runs


def one_stage(spec: RunSpec, name: str) -> RunSpec:
    """The run of one stage, by its name.

    Raises
    ------
    InputError
        If there is no such stage.
    """
    names = [stage.name for stage in spec.stages]
    if name not in names:
        raise InputError(f"stage = {name!r} is not accepted; {nearest(name, names)}")
    return chain(spec)[1 + names.index(name)]


def _run_of(stage: StageSpec, before: RunSpec, base: str) -> RunSpec:
    """A stage's run: the one before it with the stage's fields over its own."""
    given = stage.model_dump(exclude_none=True, exclude={"name"})
    values: dict[str, Any] = before.model_dump(mode="json", exclude_none=True)
    model, data, train = values["model"], values["data"], values["train"]
    if "rope_scaling" in given:
        model.pop("rope_scaling", None)
    model |= {field: given.pop(field) for field in _MODEL if field in given}
    data |= {field: given.pop(field) for field in _DATA if field in given}
    train |= given | {"init_from": before.name}
    model["context"] = max(model["context"], train["seq_len"])
    return validate(RunSpec, values | {"name": f"{base}-{stage.name}"}, where=f"stage {stage.name!r}")
