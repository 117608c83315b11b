"""What `modelworks train` does: plan, train, release, offer to the chat.

The rooms don't know each other; this is the one place that takes a run from its spec to a model that can be talked
to. It sits beside the command line since it uses them all.
"""

from __future__ import annotations

import contextlib
import json
import logging
import signal
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelworks.launch.losses import LostError
from modelworks.spec.errors import InputError, OperationError
from modelworks.spec.files import device_spec
from modelworks.spec.home import runs_folder, write_atomically
from modelworks.spec.run import RunSpec
from modelworks.train.interrupt import Interrupt, Interrupted
from modelworks.train.record import MetricsReader, RunRecord, Status
from modelworks.train.session import RunSession, open_run
from modelworks.train.watchdog import Watchdog, limit_s
from modelworks.train.worker import FINAL_CODES

if TYPE_CHECKING:
    from modelworks.launch.elastic import Failure, Processes
    from modelworks.launch.meeting import Meeting
    from modelworks.train.copies import Copies
    from modelworks.train.loop import TrainResult
    from modelworks.train.view import View

logger = logging.getLogger(__name__)
_LOOK_S = 0.25
"""How often a run's other processes are looked at."""
Say = Callable[[str], None]


def train_and_release(
    spec: RunSpec, resume: bool, view: View, say: Say, meeting: Meeting | None = None
) -> tuple[TrainResult, dict[str, Any] | None]:
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
    meeting
        Where other nodes meet that train with this one.

    Returns
    -------
    tuple
        How the training ended, and what was released: ``files`` by format and ``served_as``; None where the run was
        stopped or releases nothing.
    """
    copies = _copies(spec, resume, say)
    with open_run(spec, resume) as session, copies or contextlib.nullcontext():
        _write_plan(session.folder, spec)
        if spec.cluster.gpus == 1:
            from modelworks.train.loop import train

            result = train(session, view)
        else:
            result = train_in_processes(session, view, meeting)
        if copies is not None:
            session.report(message=f"copying the last checkpoint to {spec.checkpoint.to}")
            copies.finish()
            session.report(message=None if result.state == "finished" else "saved; it can be resumed")
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


def _copies(spec: RunSpec, resume: bool, say: Say) -> Copies | None:
    """Where the run's checkpoints are copied to, the newest copy fetched if the run goes on from it."""
    if spec.checkpoint.to is None:
        return None
    from modelworks.train.copies import Copies

    copies = Copies(spec, runs_folder() / spec.name)
    if not resume:
        copies.refuse_taken()
    elif (step := copies.fetch()) is not None:
        say(f"fetched the checkpoint of step {step} from {spec.checkpoint.to}")
    return copies


def train_in_processes(session: RunSession, view: View, meeting: Meeting | None = None) -> TrainResult:
    """Train the session's run on as many processes as its cluster has devices, those of this node among them.

    The session stays with this process, which prepares the data, shows what the others report, passes signals on to
    them, and says how it ended. A process that is lost is replaced and the run goes on from its last checkpoint.

    Raises
    ------
    InputError, OperationError
        As `train` does; with the words of the process that failed.
    Interrupted
        If a signal ended the work before it could be saved.
    """
    from modelworks.train.loop import TrainResult, prepare_data, refuse_unsupported

    record, interrupt = RunRecord(session.folder), session.interrupt
    refuse_unsupported(session.spec, session.spec.cluster.gpus)
    with view:
        prepare_data(session, view)
        if meeting is not None:
            meeting.announce()
        reader = MetricsReader(session.folder)
        reader.read()

        def look() -> None:
            session.reread()
            view.show(session.status, reader.read()[0])

        failure = attend(record, interrupt, session.resume, look, meeting)
    if session.status.state not in ("finished", "stopped"):
        if interrupt.received is not None:
            raise Interrupted(interrupt.received)
        raise _end_of(failure, session.status)
    return TrainResult.of_checkpoint(record.checkpoints()[-1], session.status.state, interrupt.received)


def attend(
    record: RunRecord, interrupt: Interrupt, resume: bool, look: Callable[[], None], meeting: Meeting | None = None
) -> Failure | None:
    """Keep this node's processes of a run at work until the run ends; returns what ended it badly, if anything did.

    Parameters
    ----------
    record
        The run.
    interrupt
        A signal that it notes is passed on.
    resume
        Whether there is an earlier part to go on from.
    look
        Called several times a second.
    meeting
        Where the processes meet those of other nodes.

    Raises
    ------
    LostError
        If the other nodes are gone.
    """
    from modelworks.launch.elastic import Processes

    spec, logs = record.spec(), record.folder / "processes"
    if meeting is not None:
        logs /= f"node-{meeting.place.node:05d}"
    count = spec.cluster.gpus // (meeting.place.nodes if meeting is not None else 1)
    with tempfile.TemporaryDirectory(prefix="modelworks-pulse-") as pulses:
        arguments = ["-m", "modelworks.train.worker", str(record.folder), "--pulse", pulses]
        work = Processes(
            [*arguments, "--resume"] if resume else arguments,
            count,
            logs,
            FINAL_CODES,
            lambda: _newest_step(record),
            Watchdog(Path(pulses), count, limit_s(spec.guard.hang)),
            meeting,
        )
        _until_it_ends(work, interrupt, look, meeting)
    look()
    return work.failure


def _until_it_ends(work: Processes, interrupt: Interrupt, look: Callable[[], None], meeting: Meeting | None) -> None:
    """Pass a signal on to the processes, and look after them, until there are none."""
    try:
        interrupt.graceful, passed_on = True, False
        while not work.wait(_LOOK_S):
            if interrupt.received is not None:
                if not passed_on:
                    if meeting is not None:
                        meeting.note_told()
                    work.signal(signal.SIGTERM)
                    passed_on = True
                elif not work.at_work:
                    break
            look()
    finally:
        interrupt.graceful = False
        work.kill()


def _end_of(failure: Failure | None, status: Status) -> InputError | OperationError:
    """The error that a failed process ended with, in this process."""
    if failure is None:
        return OperationError(f"the run's processes ended without having finished: {status.message}")
    if failure.exit_code in FINAL_CODES:
        return FINAL_CODES[failure.exit_code](failure.last_words)
    return LostError(f"{failure}; its output is in the run's folder, in processes")


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


def engine_overrides(on: str, processes: int | None, nodes: int | None = None) -> list[str]:
    """What ``--on``, ``--nproc`` and ``--nodes`` change in a run spec: the devices of its cluster, which are processes
    here, and over how many nodes they are spread.

    Raises
    ------
    InputError
        Naming the option and what is accepted.
    """
    from modelworks.launch.engines import ACCEPTED

    if on not in ACCEPTED:
        raise InputError(f"--on {on} is not accepted: {', '.join(ACCEPTED)} are")
    if nodes is not None and (nodes < 1 or on == "local"):
        accepted = "1 or more is" if on != "local" else "this machine is one node; --on slurm takes several"
        raise InputError(f"--nodes {nodes} is not accepted: {accepted}")
    if processes is not None and processes < 1:
        raise InputError(f"--nproc {processes} is not accepted: 1 or more is")
    overrides = [f"launch.nodes={nodes}"] if nodes is not None else []
    if processes is not None:
        overrides += [f"cluster.{field}={processes}" for field in ("gpus", "gpus_per_node", "scale_up_domain")]
    return overrides


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
