"""Whether a node is fit to take part: ``python -m modelworks.launch.health FOLDER [--node NAME] [--attempt NAME]``.

An engine runs it on every node before the run starts there. It looks at what most often spoils a start: the run's
folder (shared, writable, with room), memory, devices, the software's versions against those of whoever submitted the
run, and a clock that differs from that of the shared folder. What it finds is one sentence, and goes into the node's
log, which decides whether the node is used again. A run whose last attempts all began where it stands is given up here.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path

import psutil

from modelworks.launch.submission import NodeLog, futile, read_submission, versions
from modelworks.spec.errors import InputError
from modelworks.spec.fields import validate
from modelworks.spec.files import device_spec
from modelworks.spec.run import RunSpec

_CLOCK_S = 60.0
_DEVICES_S = 60.0
GIVEN_UP, UNHEALTHY = 3, 4
"""Exit codes: of a run that isn't worth another attempt, and of a node that isn't fit."""


def faults(folder: Path, spec: RunSpec, expected: dict[str, str]) -> list[str]:
    """What is wrong with this node for a run, one sentence each."""
    return [*_of_folder(folder, spec), *_of_memory(spec), *_of_versions(expected), *_of_devices(spec)]


def _of_folder(folder: Path, spec: RunSpec) -> list[str]:
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".health.") as file:
            skew = Path(file.name).stat().st_mtime - time.time()
    except OSError as error:
        return [f"the run's folder {folder} cannot be written: {error.strerror}"]
    found = []
    free = shutil.disk_usage(folder).free
    if free < spec.launch.free_disk:
        found.append(f"{folder} has {free:,} bytes left, and launch.free_disk asks for {spec.launch.free_disk:,}")
    if abs(skew) > _CLOCK_S:
        found.append(f"the clock is {abs(skew):.0f} s {'behind' if skew > 0 else 'ahead of'} that of {folder}")
    return found


def _of_memory(spec: RunSpec) -> list[str]:
    free, asked = psutil.virtual_memory().available, spec.launch.free_memory
    if free >= asked:
        return []
    return [f"{free:,} bytes of memory are free, and launch.free_memory asks for {asked:,}"]


def _of_versions(expected: dict[str, str]) -> list[str]:
    here = versions()
    return [
        f"{name} is {here.get(name, 'absent')} here, and {version} where the run was submitted"
        for name, version in expected.items()
        if here.get(name) != version
    ]


def _of_devices(spec: RunSpec) -> list[str]:
    if not needs_gpus(spec):
        return []
    wanted = spec.cluster.gpus // spec.nodes
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=_DEVICES_S, check=False)
    except FileNotFoundError:
        return [f"nvidia-smi is not there, and {wanted} GPUs are needed"]
    except subprocess.TimeoutExpired:
        return [f"nvidia-smi didn't answer within {_DEVICES_S:.0f} s"]
    found = sum(line.startswith("GPU ") for line in listed.stdout.splitlines())
    if listed.returncode or found < wanted:
        return [f"{found} GPUs are seen, and {wanted} are needed"]
    return []


def needs_gpus(spec: RunSpec) -> bool:
    """Whether a run's devices are GPUs."""
    if spec.cluster.device == "local":
        return False
    try:
        return device_spec(spec.cluster.device).kind == "gpu"
    except InputError:
        return True


def main(arguments: list[str]) -> int:
    """Check this node; returns the exit code."""
    parser = argparse.ArgumentParser(prog="modelworks.launch.health", description="Is this node fit to train?")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--node", default=os.environ.get("SLURMD_NODENAME") or platform.node())
    parser.add_argument("--attempt", default=os.environ.get("MODELWORKS_ATTEMPT", ""))
    given = parser.parse_args(arguments)
    spec = validate(RunSpec, tomllib.loads((given.folder / "run.toml").read_text(encoding="utf-8")))
    submission, log = read_submission(given.folder), NodeLog(given.folder, given.node, given.attempt)
    if (tried := futile(given.folder, given.attempt)) >= spec.launch.attempts:
        print(f"{spec.name} is given up: {tried} attempts in a row brought it no further", file=sys.stderr)
        log.write("ended", GIVEN_UP, "given up")
        return GIVEN_UP
    found = faults(given.folder, spec, submission.versions if submission else {})
    for fault in found:
        print(f"{given.node} is not fit: {fault}", file=sys.stderr)
    if found:
        try:
            log.write("unhealthy", UNHEALTHY, "; ".join(found))
        except OSError as error:
            print(f"{given.node} cannot write to {given.folder}: {error.strerror}", file=sys.stderr)
    return UNHEALTHY if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
