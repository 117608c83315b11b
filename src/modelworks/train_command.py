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
from modelworks.train.worker import FINAL_CODES, PRELOADED

if TYPE_CHECKING:
    from modelworks.launch.elastic import Failure, Processes
    from modelworks.launch.meeting import Meeting
    from modelworks.train.copies import Copies
    from modelworks.train.result import TrainResult
    from modelworks.train.rollouts import Sampler
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
    spec = with_layout(spec, resume)
    if not resume:
        _refuse_beginning(spec)
    copies = _copies(spec, resume, say)
    with open_run(spec, resume) as session, copies or contextlib.nullcontext():
        _write_plan(session.folder, spec)
        _bring_weights(session, spec)
        if spec.cluster.gpus == 1:
            from modelworks.train.loop import train

            with contextlib.ExitStack() as stack:
                result = train(session, view, sampler=_sampler(session, spec, stack))
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


def _refuse_beginning(spec: RunSpec) -> None:
    """Refuse weights that the run can't begin with, and an engine that doesn't load it, before its folder is made."""
    if spec.train.objective == "grpo" and spec.grpo.engine == "llama.cpp":
        from modelworks.rollout_engine import refuse_unloadable

        refuse_unloadable(spec)
    if spec.train.init_from is not None:
        from modelworks.release.beginning import refuse_beginning

        refuse_beginning(spec)


def _bring_weights(session: RunSession, spec: RunSpec) -> None:
    """Put the weights that the run begins with into its folder, unless it is past its beginning."""
    past = any((session.folder / "checkpoints").glob("step-*"))
    # A checkpoint holds an adapter alone: what it adapts is needed again where the folder doesn't have it any more.
    if spec.train.init_from is None or (past and (spec.adapter is None or (session.folder / "initial").is_dir())):
        return
    from modelworks.release.beginning import bring_weights

    session.report(message=f"bringing the weights of {spec.train.init_from}")
    bring_weights(spec, session.folder)


def _sampler(session: RunSession, spec: RunSpec, stack: contextlib.ExitStack) -> Sampler | None:
    """The serving engine, where it draws the network's replies; closed with the stack."""
    if spec.train.objective != "grpo" or spec.grpo.engine != "llama.cpp":
        return None
    from modelworks.rollout_engine import EngineSampler

    return stack.enter_context(contextlib.closing(EngineSampler(spec, session.folder)))


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
    from modelworks.train.preparing import prepare_data
    from modelworks.train.refusals import refuse_unsupported
    from modelworks.train.result import TrainResult

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
            lambda: _last_commit(record),
            Watchdog(Path(pulses), count, limit_s(spec.guard.hang)),
            meeting,
            preload=PRELOADED,
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


def _last_commit(record: RunRecord) -> float:
    """When the last checkpoint was committed. Its step says less: one that is damaged may be of a later step."""
    times = [0.0]
    for path in record.checkpoints():
        with contextlib.suppress(FileNotFoundError):  # it has just been rotated away
            times.append(path.stat().st_mtime)
    return max(times)


def release(folder: Path, spec: RunSpec, say: Say) -> dict[str, Any]:
    """Turn a run's newest checkpoint into packages, and offer its GGUF to the chat under the run's name."""
    from modelworks.release.package import release_run

    say("releasing")
    packages = release_run(folder, to=list(spec.release.to), quantize=list(spec.release.quantize))
    served_as = None
    if packages.gguf is not None:
        served_as = offer(spec, packages.gguf, packages.eyes)
    elif packages.adapter is not None:
        served_as = offer_adapter(spec, packages.adapter)
    return {"files": {kind: str(path) for kind, path in packages.files.items()}, "served_as": served_as}


def offer(spec: RunSpec, gguf: Path, eyes: Path | None = None) -> str:
    """Store a run's GGUF file, and its eyes', among the models that can be talked to; returns its name there, which is
    the run's."""
    from modelworks.serve.store import Store

    source, context = f"run {spec.name}", spec.model.context
    return Store().add(spec.name, gguf, source=source, license=spec.release.license, context=context, eyes=eyes).name


def offer_adapter(spec: RunSpec, gguf: Path) -> str | None:
    """Store a run's adapter under its name, where the model that it was trained on is stored; returns that name."""
    from modelworks.serve.store import Store

    store = Store()
    base = _stored_base(
        spec.train.init_from or "", {model.name: model.bytes for model in store.list() if not model.adapts}
    )
    if base is None:
        return None
    source = f"run {spec.name}, an adapter of {base}"
    return store.add_adapter(spec.name, gguf, base, source=source, license=spec.release.license).name


def _stored_base(init_from: str, stored: dict[str, int]) -> str | None:
    """The stored model whose file was imported as the weights that a run began with."""
    try:
        source = json.loads((Path(init_from).expanduser() / "manifest.json").read_text(encoding="utf-8"))["source"]
        files = dict(source["files"]) if source["kind"] == "gguf" else {}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return next((name for name, size in stored.items() if files == {f"{name}.gguf": size}), None)


def compare(record: RunRecord) -> dict[str, Any]:
    """A run's plan beside what was measured: per quantity ``planned``, ``measured`` and ``ratio``.

    The measurement is that of the median step, as on the model card, of all that were logged but the first, which also
    warms up: a machine that slept for an hour makes one step long, and says nothing of the others. ``reasons`` has the
    same of the seconds that a step spends on each reason; their medians need not add up to the median step.

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
    compared: dict[str, Any] = {key: _beside(plan.get(key), value) for key, value in measured.items()}
    looked_at = [row["reasons"] for row in rows if "reasons" in row]
    planned = plan.get("best", {}).get("reasons", {})
    compared["reasons"] = {
        reason: _beside(
            sum(planned.get(part, 0.0) for part in parts) if planned else None,
            statistics.median(row[reason] for row in looked_at),
        )
        for reason, parts in _PLANNED.items()
        if looked_at
    }
    return compared


_PLANNED = {
    "compute": ("matmul", "attention", "memory", "launch", "recompute", "vision"),
    "tensor": ("tensor",),
    "context": ("context",),
    "expert": ("expert",),
    "data": ("data",),
    "bubble": ("bubble", "pipeline"),
    "optimizer": ("optimizer",),
    "host": ("host",),
    "jitter": ("jitter",),
}
"""Which of the plan's reasons a measured one (`train.waits.MEASURED`) stands beside."""


def _beside(planned: float | None, measured: float) -> dict[str, float | None]:
    return {"planned": planned, "measured": measured, "ratio": measured / planned if planned else None}


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


def dry_run(spec: RunSpec, ranks: list[int] | None = None) -> dict[str, Any]:
    """Build some of a run's processes without the others and without memory, and hold what they keep against the plan.

    Parameters
    ----------
    spec
        The run; `auto` degrees are resolved first.
    ranks
        Which processes; the first, one of a middle stage and the last if unset.

    Returns
    -------
    dict
        ``processes``, ``layout`` in words, and for each rank in ``ranks`` what it holds (`train.dry_run.Member`), with
        ``planned`` bytes of weights, gradients and optimizer state, and ``ratio``, measured over planned, of their sum.
        ``without`` names what of the spec neither counts.

    Raises
    ------
    InputError
        If the layout can't be trained.
    """
    from modelworks.plan.stated import stated_memory
    from modelworks.train.dry_run import members
    from modelworks.train.layout import layout

    # The trainer has no vision tower: what is counted is the decoder, and the plan is held to the same.
    without = [] if spec.model.vision is None else ["model.vision"]
    spec = spec.model_copy(update={"model": spec.model.model_copy(update={"vision": None})})
    spec = with_layout(spec, device=spec.cluster.device)
    degrees = layout(spec, spec.cluster.gpus)
    chosen = {name: getattr(degrees, name) for name in LAID_OUT}
    stated = spec.model_copy(update={"parallel": spec.parallel.model_copy(update=chosen)})
    planned = stated_memory(stated, "modelworks")
    rows = []
    for member in members(spec, ranks):
        row = member.as_dict()
        row["planned"] = {name: planned[member.kind][name] for name in STATE}
        row["ratio"] = {name: row[name] / row["planned"][name] for name in STATE}
        row["ratio"]["state"] = sum(row[name] for name in STATE) / sum(row["planned"].values())
        rows.append(row)
    return {
        "name": spec.name,
        "processes": degrees.processes,
        "layout": degrees.describe(),
        "without": without,
        "zero_stage": degrees.zero_stage,
        "device_memory_bytes": device_spec(spec.cluster.device).memory_bytes,
        "ranks": rows,
    }


STATE = ("weights", "gradients", "optimizer")
"""What of a device's memory a dry run counts."""


def with_layout(spec: RunSpec, resume: bool = False, device: str = "local") -> RunSpec:
    """The run with the degrees that its spec leaves to `auto` made numbers: the planner's best that `train` can do.

    Degrees that the spec states stay. Where the planner has none, data parallelism takes what the others leave, and a
    warning says why. A resumed run keeps the layout that it has, unless it now has another number of processes.
    `device` is what a process has: a share of this machine, or what an engine's cluster is made of.

    Raises
    ------
    InputError
        If the stated degrees can't be trained on so many processes.
    """
    from modelworks.plan.ranking import ranked
    from modelworks.train.layout import layout
    from modelworks.train.refusals import refuse_unsupported

    processes = spec.cluster.gpus
    if processes == 1 or "auto" not in (getattr(spec.parallel, name) for name in LAID_OUT):
        return spec
    if resume and (before := _recorded_layout(spec)) is not None:
        return before
    reason = "train can do none of its layouts"
    try:
        for laid_out in ranked(spec, device_spec(device)):
            candidate = _with_degrees(spec, laid_out)
            if _accepted(candidate):
                return candidate
    except InputError as error:
        reason = str(error)
    refuse_unsupported(spec, processes)
    logger.warning("the planner has no layout for this run (%s): data parallelism takes what is left open", reason)
    degrees = layout(spec, processes)
    chosen = {name: getattr(degrees, name) for name in LAID_OUT}
    return spec.model_copy(update={"parallel": spec.parallel.model_copy(update=chosen)})


def _accepted(spec: RunSpec) -> bool:
    from modelworks.train.refusals import refuse_unsupported

    try:
        refuse_unsupported(spec, spec.cluster.gpus)
    except InputError:
        return False
    return True


def _with_degrees(spec: RunSpec, laid_out: RunSpec) -> RunSpec:
    """A run with another's layout; how many sequences go through the network at once stays the trainer's choice,
    unless they are what fills a pipeline."""
    stated = {name: value for name, value in spec.parallel.model_dump().items() if value != "auto"}
    chosen: dict[str, Any] = {"parallel": laid_out.parallel.model_copy(update=stated)}
    if laid_out.parallel.pipeline != 1:
        chosen["train"] = spec.train.model_copy(update={"micro_batch": laid_out.train.micro_batch})
    return spec.model_copy(update=chosen)


def _recorded_layout(spec: RunSpec) -> RunSpec | None:
    """A run that is resumed, with the layout of its earlier part if that had as many processes."""
    try:
        before = RunRecord(spec.name).spec()
    except (InputError, OperationError):
        return None
    if before.cluster.gpus != spec.cluster.gpus:
        return None
    kept = {
        name: value for name, value in before.parallel.model_dump().items() if getattr(spec.parallel, name) == "auto"
    }
    micro_batch = before.train.micro_batch if spec.train.micro_batch == "auto" else spec.train.micro_batch
    return spec.model_copy(
        update={
            "parallel": spec.parallel.model_copy(update=kept),
            "train": spec.train.model_copy(update={"micro_batch": micro_batch}),
        }
    )


LAID_OUT = ("data", "shard", "tensor", "pipeline", "context", "expert", "expert_tensor", "zero_stage")
"""What says which part of a run a process has."""


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
    chosen: dict[str, Any] = {name: getattr(degrees, name) for name in LAID_OUT}
    if spec.parallel.recompute == "auto":
        chosen["recompute"] = "none"
    return spec.model_copy(
        update={
            "parallel": spec.parallel.model_copy(update=chosen),
            "train": spec.train.model_copy(update={"micro_batch": micro_batch(spec, degrees)}),
        }
    )
