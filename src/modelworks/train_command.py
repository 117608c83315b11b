"""What `modelworks train` does: plan, train, release, offer to the chat.

The rooms don't know each other; this is the one place that takes a run from its spec to a model that can be talked
to. It sits beside the command line since it uses them all.
"""

from __future__ import annotations

import json
import logging
import signal
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelworks.spec.errors import InputError, OperationError
from modelworks.spec.files import device_spec
from modelworks.spec.home import write_atomically
from modelworks.spec.run import RunSpec
from modelworks.train.interrupt import Interrupted
from modelworks.train.record import MetricsReader, RunRecord, Status
from modelworks.train.session import RunSession, open_run
from modelworks.train.watchdog import Watchdog, limit_s
from modelworks.train.worker import FINAL_CODES

if TYPE_CHECKING:
    from modelworks.launch.elastic import Failure
    from modelworks.train.loop import TrainResult
    from modelworks.train.view import View

logger = logging.getLogger(__name__)
_LOOK_S = 0.25
"""How often a run's other processes are looked at."""
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
        if spec.cluster.gpus == 1:
            from modelworks.train.loop import train

            result = train(session, view)
        else:
            result = train_in_processes(session, view)
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


def train_in_processes(session: RunSession, view: View) -> TrainResult:
    """Train the session's run on as many processes of this machine as its cluster has devices.

    The session stays with this process, which prepares the data, shows what the others report, passes signals on to
    them, and says how it ended. A process that is lost is replaced and the run goes on from its last checkpoint.

    Raises
    ------
    InputError, OperationError
        As `train` does; with the words of the process that failed.
    Interrupted
        If a signal ended the work before it could be saved.
    """
    from modelworks.launch.elastic import Processes
    from modelworks.train.loop import TrainResult, prepare_data, refuse_unsupported

    record, interrupt, processes = RunRecord(session.folder), session.interrupt, session.spec.cluster.gpus
    refuse_unsupported(session.spec, processes)
    with view, tempfile.TemporaryDirectory(prefix="modelworks-pulse-") as pulses:
        prepare_data(session, view)
        reader = MetricsReader(session.folder)
        reader.read()
        arguments = ["-m", "modelworks.train.worker", str(session.folder), "--pulse", pulses]
        work = Processes(
            [*arguments, "--resume"] if session.resume else arguments,
            processes,
            session.folder / "processes",
            FINAL_CODES,
            lambda: _newest_step(record),
            Watchdog(Path(pulses), processes, limit_s(session.spec.guard.hang)),
        )
        try:
            interrupt.graceful, passed_on = True, False
            while not work.wait(_LOOK_S):
                if interrupt.received is not None and not passed_on:
                    work.signal(signal.SIGTERM)
                    passed_on = True
                session.reread()
                view.show(session.status, reader.read()[0])
        finally:
            interrupt.graceful = False
            work.kill()
        session.reread()
        view.show(session.status, reader.read()[0])
    if session.status.state not in ("finished", "stopped"):
        if interrupt.received is not None:
            raise Interrupted(interrupt.received)
        raise _end_of(work.failure, session.status)
    return TrainResult.of_checkpoint(record.checkpoints()[-1], session.status.state, interrupt.received)


def _end_of(failure: Failure | None, status: Status) -> InputError | OperationError:
    """The error that a failed process ended with, in this process."""
    if failure is None:
        return OperationError(f"the run's processes ended without having finished: {status.message}")
    if failure.exit_code in FINAL_CODES:
        return FINAL_CODES[failure.exit_code](failure.last_words)
    return OperationError(f"{failure}; its output is in the run's folder, in processes")


def _newest_step(record: RunRecord) -> float:
    return float(max((int(path.name.removeprefix("step-")) for path in record.checkpoints()), default=-1))


def release(folder: Path, spec: RunSpec, say: Say) -> dict[str, Any]:
    """Turn a run's newest checkpoint into packages, and offer its GGUF to the chat under the run's name."""
    from modelworks.release.package import release_run

    say("releasing")
    packages = release_run(folder, to=list(spec.release.to), quantize=list(spec.release.quantize))
    served_as = None
    if packages.gguf is not None:
        served_as = offer(spec, packages.gguf)
    return {"files": {kind: str(path) for kind, path in packages.files.items()}, "served_as": served_as}


def offer(spec: RunSpec, gguf: Path) -> str:
    """Store a run's GGUF file among the models that can be talked to; returns its name there, which is the run's."""
    from modelworks.serve.store import Store

    source = f"run {spec.name}"
    return Store().add(spec.name, gguf, source=source, license=spec.release.license, context=spec.model.context).name


def compare(record: RunRecord) -> dict[str, dict[str, float | None]]:
    """A run's plan beside what was measured: per quantity ``planned``, ``measured`` and ``ratio``.

    The measurement is that of the median step, as on the model card, of all that were logged but the first, which also
    warms up: a machine that slept for an hour makes one step long, and says nothing of the others.

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
    step_time = statistics.median(row["step_time_s"] for row in rows)
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


def engine_overrides(on: str, processes: int | None) -> list[str]:
    """What ``--on`` and ``--nproc`` change in a run spec: the devices of its cluster, which are processes here.

    Raises
    ------
    InputError
        Naming the option and what is accepted.
    """
    if on != "local":
        raise InputError(f"--on {on} is not accepted: local (this machine) is")
    if processes is None:
        return []
    if processes < 1:
        raise InputError(f"--nproc {processes} is not accepted: 1 or more is")
    return [f"cluster.{field}={processes}" for field in ("gpus", "gpus_per_node", "scale_up_domain")]


def _write_plan(folder: Path, spec: RunSpec) -> None:
    """Predict the run before it begins, for `runs compare`; a run that can't be predicted is trained all the same."""
    from modelworks.plan.planner import plan

    try:
        prediction = plan(_as_trained(spec), device=device_spec("local"))
    except InputError as error:
        logger.warning("this run cannot be planned: %s", error)
        return
    write_atomically(folder / "plan.json", json.dumps(prediction.as_dict(), indent=1) + "\n")


def _as_trained(spec: RunSpec) -> RunSpec:
    """The run with its open choices made as the trainer makes them, which are not always the planner's best."""
    from modelworks.train.batching import micro_batch
    from modelworks.train.layout import layout

    degrees = layout(spec, spec.cluster.gpus)
    names = ("data", "shard", "tensor", "pipeline", "context", "expert", "expert_tensor", "zero_stage")
    chosen: dict[str, Any] = {name: getattr(degrees, name) for name in names}
    if spec.parallel.recompute == "auto":
        chosen["recompute"] = "none"
    return spec.model_copy(
        update={
            "parallel": spec.parallel.model_copy(update=chosen),
            "train": spec.train.model_copy(update={"micro_batch": micro_batch(spec, degrees)}),
        }
    )
