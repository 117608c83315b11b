"""Runs on Slurm: one job whose single task per node starts torchrun's agent there, and which goes on by itself.

The job's script is short, and its decisions are made here, by ``python -m modelworks.launch.slurm before|after FOLDER``
on the job's first node. Before an attempt: is there anything left to do, and are we given nodes that have failed too
often (then the job is submitted anew without them). After it: is the run finished, was it asked to stop, does another
attempt make sense? If so the job requeues itself under its own id. Slurm signals the tasks, not the script, before the
time limit and at `runs stop`; they save and end well, and so the script gets to decide.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

from modelworks.launch.engine import Job, JobState, answer, log_tail
from modelworks.launch.health import needs_gpus
from modelworks.launch.submission import (
    Submission,
    failing_nodes,
    final_codes,
    newest_step,
    node_events,
    note_vanished,
    read_submission,
    versions,
)
from modelworks.spec.errors import InputError, OperationError
from modelworks.spec.fields import validate
from modelworks.spec.home import home
from modelworks.spec.run import RunSpec

NOTHING_LEFT = 9
"""What `before` ends with when there is nothing to do for this job."""
_FINAL = {2, 3}
"""Exit codes of nodes after which another attempt would end the same way."""
_STATES: dict[JobState, set[str]] = {
    "waiting": {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "SUSPENDED"},
    "running": {"RUNNING", "COMPLETING", "SIGNALING", "STAGE_OUT", "STOPPED"},
    "ended": {"COMPLETED"},
    "stopped": {"CANCELLED"},
}


class Slurm:
    """Slurm 21.08 or later, through its own commands."""

    name = "slurm"

    def render(self, spec: RunSpec, folder: Path) -> str:
        """The batch script."""
        return script(spec, folder, failing_nodes(folder, spec.launch.exclude_after))

    def submit(self, spec: RunSpec, folder: Path) -> Submission:
        """Submit the script; errors as of `engine.answer`."""
        excluded = failing_nodes(folder, spec.launch.exclude_after)
        job = _sbatch(script(spec, folder, excluded))
        submission = Submission(self.name, job, excluded=excluded, versions=versions())
        submission.write(folder)
        return submission

    def job(self, folder: Path, submission: Submission) -> Job:
        """Where the job stands; of an array, the part that is at work or comes next."""
        try:
            listed = answer(["squeue", "--noheader", "--states=all", f"--jobs={submission.job}", "--format=%T|%r|%N"])
        except OperationError as error:
            if "Invalid job id" in str(error):
                return Job("gone", f"Slurm no longer knows job {submission.job}")
            raise
        parts = [line.split("|") for line in listed.splitlines() if line.count("|") == 2]
        for wanted in ("running", "waiting"):
            for state, reason, nodes in parts:
                if _state(state) == wanted:
                    where = f" on {nodes}" if nodes else f" ({reason})" if reason != "None" else ""
                    return Job(_state(state), f"Slurm's job {submission.job} is {state}{where}")
        if not parts:
            return Job("gone", f"Slurm no longer knows job {submission.job}")
        state = parts[-1][0]
        return Job(_state(state), f"Slurm's job {submission.job} ended as {state}")

    def stop(self, folder: Path, submission: Submission) -> None:
        """Let the tasks save and end; a job that waits is withdrawn."""
        replace(submission, stop=True).write(folder)
        state = self.job(folder, submission).state
        if state == "running":
            answer(["scancel", "--signal=TERM", submission.job])
        elif state == "waiting":
            answer(["scancel", submission.job])

    def log(self, folder: Path, submission: Submission, lines: int) -> str:
        """What the job has printed, which is in the run's folder."""
        return log_tail(folder / "train.log", lines)


def script(spec: RunSpec, folder: Path, excluded: list[str]) -> str:
    """The batch script of a run."""
    launch, slurm = spec.launch, spec.launch.slurm
    options = [
        f"--job-name=modelworks-{spec.name}",
        f"--nodes={spec.nodes}",
        "--ntasks-per-node=1",
        f"--output={shlex.quote(str(folder / 'train.log'))}",
        "--open-mode=append",
        "--no-requeue" if slurm.array else "--requeue",
        f"--signal=TERM@{launch.grace:.0f}",
    ]
    if slurm.array:
        options.append(f"--array=1-{slurm.array}%1")
    if slurm.exclusive:
        options.append("--exclusive")
    if launch.time is not None:
        options.append(f"--time={_duration(launch.time)}")
    if needs_gpus(spec):
        options.append(f"--gpus-per-node={spec.cluster.gpus // spec.nodes}")
    if launch.cpus_per_node is not None:
        options.append(f"--cpus-per-task={launch.cpus_per_node}")
    if launch.memory_per_node is not None:
        options.append(f"--mem={launch.memory_per_node // 2**20}M")
    if slurm.switches is not None:
        options.append(f"--switches={slurm.switches}@{_duration(slurm.switches_wait)}")
    given = {name: getattr(slurm, name) for name in ("account", "partition", "qos", "reservation", "constraint")}
    options += [f"--{name}={shlex.quote(value)}" for name, value in given.items() if value is not None]
    if excluded:
        options.append(f"--exclude={','.join(excluded)}")
    options += slurm.options
    python = shlex.quote(sys.executable)
    run = shlex.quote(str(folder))
    variables = {"MODELWORKS_HOME": str(home()), "PYTHONUNBUFFERED": "1", **launch.environment}
    task = "srun --ntasks-per-node=1 --distribution=block --cpu-bind=none --cpus-per-task=$SLURM_CPUS_ON_NODE"
    lines = [
        "#!/bin/bash",
        *(f"#SBATCH {option}" for option in options),
        *(f"export {name}={shlex.quote(value)}" for name, value in variables.items()),
        "export MODELWORKS_ATTEMPT=$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}",
        *launch.setup,
        f"{python} -m modelworks.launch.slurm before {run}",
        "code=$?",
        f"if ((code == {NOTHING_LEFT})); then exit 0; fi",
        "# Nodes meet at the first one, at a port that another job, or this one's last attempt, doesn't use.",
        'first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        'address=$(sinfo --noheader --nodes="$first" --format=%o | head -n 1)',
        f"port=$(({launch.port} + (SLURM_JOB_ID + ${{SLURM_RESTART_COUNT:-0}}) % 1000))",
        "# Is every node fit? Then one agent per node, in the order of the network's switches.",
        f"{task} {python} -m modelworks.launch.health {run} &&",
        f"  {task} --kill-on-bad-exit=1 {python} -m modelworks.node_command {run} --nodes={spec.nodes} "
        '--meet="$address:$port"',
        f"{python} -m modelworks.launch.slurm after {run} --code=$?",
    ]
    return "\n".join(lines) + "\n"


def before(folder: Path) -> int:
    """Decide whether an attempt is to begin; returns the exit code."""
    spec, submission = _run(folder)
    mine = os.environ["MODELWORKS_ATTEMPT"]
    attempts = {event["attempt"] for events in node_events(folder).values() for event in events}
    for attempt in attempts - {mine}:
        note_vanished(folder, attempt)
    if submission.stop or _state_of(folder) == "finished":
        print(f"{folder.name} is {'to stop' if submission.stop else 'finished'}: nothing is left to do")
        return NOTHING_LEFT
    failing = failing_nodes(folder, spec.launch.exclude_after)
    given = answer(["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]]).split()
    if refused := sorted(set(given) & set(failing)):
        job = _sbatch(script(spec, folder, failing))
        replace(submission, job=job, excluded=failing).write(folder)
        print(f"{', '.join(refused)} failed in {spec.launch.exclude_after} attempts: job {job} goes on without")
        return NOTHING_LEFT
    return 0


def after(folder: Path, code: int) -> int:
    """Decide how it goes on after an attempt; returns the job's exit code."""
    spec, submission = _run(folder)
    mine, state = os.environ["MODELWORKS_ATTEMPT"], _state_of(folder)
    note_vanished(folder, mine)
    if state == "finished" or submission.stop:
        return code
    if final := final_codes(folder, mine) & _FINAL:
        return max(final)
    if spec.launch.slurm.array:
        return code
    print(f"{folder.name} is requeued at step {max(0, newest_step(folder))}")
    answer(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]])
    return code


def main(arguments: list[str]) -> int:
    """What the batch script calls around each attempt."""
    parser = argparse.ArgumentParser(prog="modelworks.launch.slurm", description="What goes on around an attempt.")
    parser.add_argument("what", choices=("before", "after"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--code", type=int, default=0)
    given = parser.parse_args(arguments)
    try:
        return before(given.folder) if given.what == "before" else after(given.folder, given.code)
    except (InputError, OperationError) as error:
        print(error, file=sys.stderr)
        return given.code or 1


def _run(folder: Path) -> tuple[RunSpec, Submission]:
    spec = validate(RunSpec, tomllib.loads((folder / "run.toml").read_text(encoding="utf-8")), str(folder))
    submission = read_submission(folder)
    if submission is None:
        raise OperationError(f"{folder} has no engine.json: it was not submitted from there")
    return spec, submission


def _state_of(folder: Path) -> str | None:
    try:
        state = json.loads((folder / "status.json").read_text(encoding="utf-8")).get("state")
    except (OSError, ValueError):
        return None
    return state if isinstance(state, str) else None


def _sbatch(text: str) -> str:
    """Submit a script; the job's id. A job's own variables aren't handed on to the next."""
    environment = {key: value for key, value in os.environ.items() if key == "SLURM_CONF" or key[:6] != "SLURM_"}
    return answer(["sbatch", "--parsable"], given=text, environment=environment).strip().split(";")[0]


def _state(slurms: str) -> JobState:
    return next((ours for ours, theirs in _STATES.items() if slurms in theirs), "failed")


def _duration(seconds: float) -> str:
    """A time as Slurm reads it: days-hours:minutes:seconds."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{days}-{hours:02}:{minutes:02}:{rest:02}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
