"""What `modelworks train` does: plan, train, release, offer to the chat.

The rooms don't know each other; this is the one place that takes a run from its spec to a model that can be talked
to. It sits beside the command line since it uses them all.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelworks.spec.errors import InputError, OperationError
from modelworks.spec.files import device_spec
from modelworks.spec.home import write_atomically
from modelworks.spec.run import RunSpec
from modelworks.train.interrupt import Interrupted
from modelworks.train.record import RunRecord
from modelworks.train.session import open_run

if TYPE_CHECKING:
    from modelworks.train.loop import TrainResult
    from modelworks.train.view import View

logger = logging.getLogger(__name__)
Say = Callable[[str], None]


def train_and_release(spec: RunSpec, resume: bool, view: View, say: Say) -> tuple[TrainResult, dict[str, Any] | None]:
    """Train a run to its end and release it where its spec says so.

    Parameters
    ----------
    spec
        The run.
    resume
        Go on with a run that was begun.
    view
        Shows the training.
    say
        Told in a few words what goes on after the training.

    Returns
    -------
    tuple
        How the training ended, and what was released: ``files`` by format and ``served_as``; None where the run was
        stopped or releases nothing.
    """
    with open_run(spec, resume) as session:
        _write_plan(session.folder, spec)
        from modelworks.train.loop import train

        result = train(session, view)
        released = None
        if result.state == "finished" and spec.release.to:
            session.report(message="releasing")
            try:
                released = release(session.folder, spec, say)
            except (InputError, OperationError, Interrupted) as error:
                session.report(message=f"trained, but not released: {error}")
                raise
            session.report(message=None, released=True, served_as=released["served_as"])
    return result, released


def release(folder: Path, spec: RunSpec, say: Say) -> dict[str, Any]:
    """Turn a run's newest checkpoint into packages, and offer its GGUF to the chat under the run's name."""
    from modelworks.release.package import release_run

    say("releasing")
    packages = release_run(folder, to=list(spec.release.to), quantize=list(spec.release.quantize))
    served_as = None
    if packages.gguf is not None:
        from modelworks.serve.store import Store

        Store().add(
            spec.name,
            packages.gguf,
            source=f"run {spec.name}",
            license=spec.release.license,
            context=spec.model.context,
        )
        served_as = spec.name
    return {"files": {kind: str(path) for kind, path in packages.files.items()}, "served_as": served_as}


def compare(record: RunRecord) -> dict[str, dict[str, float | None]]:
    """A run's plan beside what was measured: per quantity ``planned``, ``measured`` and ``ratio``.

    The measurement is the mean over all logged steps but the first, which also warms up.

    Raises
    ------
    OperationError
        If the run has no plan, or has not logged two steps.
    """
    plan, rows = record.plan(), record.metrics()[1:]
    if plan is None:
        raise OperationError(f"run {record.name} has no plan.json: it was not started by the train command")
    if not rows:
        raise OperationError(f"run {record.name} has not logged two steps yet")
    step_time = sum(row["step_time_s"] for row in rows) / len(rows)
    tokens_per_s = record.spec().train.tokens_per_step / step_time
    mfu_per_rate = rows[-1]["mfu"] / rows[-1]["tokens_per_s"]
    measured = {"step_time_s": step_time, "tokens_per_s": tokens_per_s, "mfu": tokens_per_s * mfu_per_rate}
    return {
        key: {
            "planned": plan.get(key),
            "measured": value,
            "ratio": value / plan[key] if plan.get(key) else None,
        }
        for key, value in measured.items()
    }


def refuse_engine(on: str, processes: int) -> None:
    """Refuse what isn't this machine and one process.

    Raises
    ------
    InputError
        Naming the option and what is accepted.
    """
    if on != "local":
        raise InputError(f"--on {on} is not accepted: local (this machine) is")
    if processes != 1:
        raise InputError(f"--nproc {processes} is not accepted: 1 process is")


def _write_plan(folder: Path, spec: RunSpec) -> None:
    """Predict the run before it begins, for `runs compare`; a run that can't be predicted is trained all the same."""
    from modelworks.plan.planner import plan

    try:
        prediction = plan(spec, device=device_spec("local"))
    except InputError as error:
        logger.warning("this run cannot be planned: %s", error)
        return
    write_atomically(folder / "plan.json", json.dumps(prediction.as_dict(), indent=1) + "\n")
