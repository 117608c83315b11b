"""A run that is killed, stopped, slowed, robbed of its disk and its checkpoints, and ends as if nothing had been.

    python benchmarks/soak.py [--minutes 30] [--processes 4] [--every 12] [--seed 1] [--json FILE]

A small mixture of experts trains on several processes with ``modelworks train``, while an injector strikes at random
moments, a third of them in the middle of a save, some of them in the middle of a restart:

    kill     SIGKILL to one process
    stop     SIGSTOP to one process, which nobody continues: the watchdog has to find it
    slow     a process is stopped and continued in turns for some seconds, less long than the watchdog waits
    parent   SIGKILL to the process that holds the run; what is left saves and ends, and the run is resumed
    corrupt  a bit of the newest checkpoint is turned over, then a process is killed
    disk     the disk is filled until the run ends, then emptied, and the run is resumed (needs root: a small tmpfs)

Then an undisturbed run makes as many steps, and every tensor of the two last checkpoints, the optimizer's included, is
compared bit by bit. Beside that: faults by kind, the steps that each cost, and the goodput (the time that the steps
took which count, over all time) beside what `modelworks.simulate` says of the same faults, given the run's measured
step time, its stalls, its saves and its restarts.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from modelworks.spec.files import dumps, run_from
from modelworks.spec.home import runs_folder
from modelworks.spec.run import RunSpec
from modelworks.train.record import MetricsReader, RunRecord

KINDS = {"kill": 10, "stop": 3, "slow": 3, "parent": 2, "corrupt": 3, "disk": 2}
"""How often each kind is drawn."""
SAVE_EVERY = 20
"""Steps between checkpoints."""
HANG_S = 10.0
"""The run's `guard.hang`."""
MID_SAVE, MID_RESTART = 0.35, 0.15
"""Shares of the faults that wait for a save to be in the air, and that don't wait for the restart before."""
DISK_BYTES = 24 << 20
_LOOK_S = 0.02
_PATIENCE_S = 400.0
"""How long anything may take here before the benchmark gives up."""


@dataclass
class Fault:
    """One strike. Times are seconds since the run's first step."""

    kind: str
    time_s: float
    step: int
    mid_save: bool
    saved: int
    """The step of the newest checkpoint that nobody damaged."""
    rank: int | None = None
    outage_s: float = 0.0
    """For which the injector itself kept the run down, or slow."""
    resumed_from: int | None = None
    down_s: float | None = None
    """Until the first new step was made."""

    @property
    def lost_more(self) -> bool:
        """Whether steps were lost that a checkpoint held."""
        return self.resumed_from is not None and self.resumed_from < self.saved

    @property
    def lost_steps(self) -> int:
        """Steps that had to be made again."""
        return 0 if self.resumed_from is None else max(0, self.step - self.resumed_from)


class Run:
    """`modelworks train` in a process of its own, and what can be seen of it from outside."""

    def __init__(self, spec: RunSpec, home: Path) -> None:
        self.spec, self.folder, self._file = spec, runs_folder() / spec.name, home / f"{spec.name}.toml"
        self._file.write_text(dumps(spec), encoding="utf-8")
        self._log = (home / f"{spec.name}.log").open("ab")
        self._reader = MetricsReader(self.folder)
        self.rows: list[dict[str, Any]] = []
        self.went_back_to: int | None = None
        """The last step that was kept when the metrics were cut back since this was last cleared."""
        self.floor = 0
        """A later step is a new one since the last strike, restart or return to a checkpoint."""
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, or go on with it."""
        command = [sys.executable, "-m", "modelworks", "train", str(self._file)]
        if (self.folder / "checkpoints").exists():
            command.append("--resume")
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.floor = self.step
        self.process = subprocess.Popen(command, stdout=self._log, stderr=self._log, env=environment)

    @property
    def step(self) -> int:
        """The last step that was logged."""
        self._look()
        return self.rows[-1]["step"] if self.rows else 0

    def _look(self) -> None:
        rows, restarted = self._reader.read()
        if restarted:
            self.went_back_to = max((one for one in self.saved() if rows and one <= rows[-1]["step"]), default=0)
            self.rows, self.floor = [], self.went_back_to
        self.rows += rows

    @property
    def ended(self) -> bool:
        """Whether its process has ended."""
        assert self.process is not None
        return self.process.poll() is not None

    def workers(self) -> dict[int, psutil.Process]:
        """Its processes that live, by rank."""
        found = {}
        with contextlib.suppress(psutil.Error):
            assert self.process is not None
            for child in psutil.Process(self.process.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error, IndexError):
                    title = re.match(r"process (\d+): -m modelworks\.train\.worker ", child.cmdline()[0])
                    if title:
                        found[int(title[1])] = child
        return found

    def saved(self, damaged: Collection[int] = ()) -> list[int]:
        """The steps of its checkpoints, but for damaged folders, which are known by their inodes."""
        found = RunRecord(self.folder).checkpoints()
        return [int(path.name.removeprefix("step-")) for path in found if path.stat().st_ino not in damaged]

    def saving(self) -> bool:
        """Whether a checkpoint is in the air."""
        return any((self.folder / "checkpoints").glob(".step-*.tmp"))

    def wait(self, happened: Callable[[], bool], patience_s: float = _PATIENCE_S) -> None:
        """Look until something has happened."""
        deadline = time.monotonic() + patience_s
        while not happened():
            if time.monotonic() > deadline:
                raise SystemExit(f"the run did not get on within {patience_s:.0f} s: {self.words()}")
            time.sleep(_LOOK_S)
            self._look()
        self._look()

    def words(self) -> str:
        """The last that it printed."""
        return "\n".join(Path(self._log.name).read_text(encoding="utf-8", errors="replace").splitlines()[-5:])

    def close(self) -> None:
        """End whatever is left of it."""
        for worker in self.workers().values():
            with contextlib.suppress(psutil.Error):
                worker.kill()
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._log.close()


class Injector:
    """Strikes a run until its time is over."""

    def __init__(self, run: Run, seed: int, every_s: float, kinds: dict[str, int]) -> None:
        self.run, self.kinds, self.faults = run, kinds, list[Fault]()
        self._draw, self._every_s, self.resumes = random.Random(seed), every_s, 0
        self._begun = 0.0
        self._damaged: set[int] = set()
        self._struck: set[int] = set()
        """Processes that will be gone once the run has noticed."""

    def strike_for(self, seconds: float) -> float:
        """Train for so long, and then until the run has recovered; returns seconds from the first step on."""
        self.run.start()
        self.run.wait(lambda: self.run.step > 0 or self.run.ended)
        self._begun = time.monotonic()
        bag: list[str] = []
        while self._now < seconds:
            if not bag:  # Every kind comes in its share, in an order of its own.
                bag = [kind for kind, share in self.kinds.items() for _ in range(share)]
                self._draw.shuffle(bag)
            self._pause(min(self._draw.expovariate(1 / self._every_s), 4 * self._every_s, seconds - self._now))
            if self._now >= seconds:
                break
            if not self.run.ended:
                self._strike(bag.pop())
            if self._draw.random() < MID_RESTART and self._now < seconds:
                time.sleep(self._draw.uniform(0.2, 3.0))
                self._strike("kill")
            self._recover()
        self._recover()
        return self._now

    @property
    def _now(self) -> float:
        return time.monotonic() - self._begun

    def _pause(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until and not self.run.ended:
            time.sleep(_LOOK_S)
            self.run._look()

    def _strike(self, kind: str) -> None:
        mid_save = self._draw.random() < MID_SAVE and self._wait_for_save()
        workers = self.run.workers()
        rank = self._draw.choice(sorted(workers)) if workers else None
        saved = [0, *self.run.saved(self._damaged)]
        newest = saved[-2 if kind == "corrupt" and len(saved) > 1 else -1]
        fault = Fault(kind, self._now, self.run.step, mid_save, newest, rank)
        self.run.went_back_to, self.run.floor = None, fault.step
        try:
            getattr(self, f"_{kind}")(fault, workers.get(rank) if rank is not None else None)
        except psutil.NoSuchProcess:
            return  # It has just ended by itself: nothing was done to it.
        if kind != "slow":
            self._struck |= {one.pid for one in workers.values()}
        self.faults.append(fault)

    def _wait_for_save(self) -> bool:
        until = time.monotonic() + 10.0
        while time.monotonic() < until and not self.run.ended:
            if self.run.saving():
                time.sleep(self._draw.uniform(0.0, 0.05))
                return self.run.saving()
            time.sleep(0.001)
        return False

    def _kill(self, fault: Fault, worker: psutil.Process | None) -> None:
        if worker is None:
            raise psutil.NoSuchProcess(0)
        worker.kill()

    def _stop(self, fault: Fault, worker: psutil.Process | None) -> None:
        if worker is None:
            raise psutil.NoSuchProcess(0)
        worker.suspend()

    def _slow(self, fault: Fault, worker: psutil.Process | None) -> None:
        if worker is None:
            raise psutil.NoSuchProcess(0)
        begun = time.monotonic()
        while time.monotonic() - begun < 4.0:
            worker.suspend()
            time.sleep(0.3)
            worker.resume()
            time.sleep(0.2)
        fault.outage_s = time.monotonic() - begun

    def _parent(self, fault: Fault, worker: psutil.Process | None) -> None:
        left = self.run.workers().values()
        assert self.run.process is not None
        self.run.process.kill()
        self.run.process.wait()
        begun = time.monotonic()
        psutil.wait_procs(left, timeout=_PATIENCE_S)
        fault.outage_s = time.monotonic() - begun

    def _corrupt(self, fault: Fault, worker: psutil.Process | None) -> None:
        folders = RunRecord(self.run.folder).checkpoints()
        if worker is None or len(folders) < 2:
            raise psutil.NoSuchProcess(0)
        path = self._draw.choice([path for path in folders[-1].iterdir() if path.stat().st_size])
        with path.open("r+b") as file:
            place = self._draw.randrange(path.stat().st_size)
            file.seek(place)
            byte = file.read(1)[0]
            file.seek(place)
            file.write(bytes([byte ^ 1 << self._draw.randrange(8)]))
        self._damaged.add(folders[-1].stat().st_ino)
        worker.kill()

    def _disk(self, fault: Fault, worker: psutil.Process | None) -> None:
        begun, filler = time.monotonic(), self.run.folder / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 16))
        self.run.wait(lambda: self.run.ended)
        filler.unlink()
        fault.step = max(fault.step, self.run.step)
        fault.outage_s = time.monotonic() - begun

    def _recover(self) -> None:
        """Wait until a step is made beyond the last one seen, the run being resumed wherever it has ended."""
        waiting = [fault for fault in self.faults if fault.down_s is None]

        def onward() -> bool:
            if self.run.ended:
                self.resumes += 1
                self.run.start()
            if self._struck & {one.pid for one in self.run.workers().values()}:
                return False
            if self._struck and self.run.went_back_to is None:  # They may have logged the step that they were in.
                self.run.floor = self.run.step
            self._struck = set()
            return self.run.step > self.run.floor

        self.run.wait(onward)
        for fault in waiting:
            fault.down_s, fault.resumed_from = self._now - fault.time_s, self.run.went_back_to
        if len(waiting) > 1:  # One restart served them all, and what was lost was lost to the first.
            for fault in waiting[1:]:
                fault.resumed_from = None


def spec_of(name: str, folder: Path, processes: int, tokens: int) -> RunSpec:
    """A small mixture of experts whose schedule doesn't know how long the run is."""
    text = folder / "text"
    if not text.exists():
        text.mkdir()
        draw = random.Random(5)
        words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 8))) for _ in range(400)]
        for index in range(60):
            content = " ".join(draw.choices(words, weights=range(400, 0, -1), k=400))
            (text / f"{index:02d}.txt").write_text(content + ".\n", encoding="utf-8")
    return run_from(
        {
            "name": name,
            "model": {
                "layers": 2, "hidden": 64, "heads": 4, "kv_heads": 2, "vocab": 512, "context": 64,
                "norm_placement": "sandwich", "tied_embeddings": True,
                "moe": {"experts": 4, "top_k": 2, "expert_hidden": 64},
            },
            "data": {"source": "files", "files": [str(text)], "validation_fraction": 0.2},
            "train": {
                "tokens": tokens, "seq_len": 64, "global_batch": 4 * processes, "micro_batch": 2, "precision": "fp32",
                "compile": False, "schedule": "constant", "warmup_fraction": 0.0, "validate_every": 0,
                "validation_tokens": 64,
            },
            "cluster": {"preset": "local", "gpus": processes, "gpus_per_node": processes, "scale_up_domain": processes},
            "parallel": {"zero_stage": 2, "shard": max(1, processes // 2)},
            "checkpoint": {"every_steps": SAVE_EVERY, "keep": 3},
            "guard": {"hang": HANG_S, "agreement_every": 10},
        }
    )  # fmt: skip


def differences(one: Path, other: Path) -> list[str]:
    """The tensors of two checkpoints that aren't equal bit by bit."""
    import torch
    from safetensors.torch import load_file

    found = []
    if {path.name for path in one.glob("*.safetensors")} != {path.name for path in other.glob("*.safetensors")}:
        return ["not the same files"]
    for path in sorted(one.glob("*.safetensors")):
        left, right = load_file(path), load_file(other / path.name)
        found += sorted(left.keys() ^ right.keys())
        found += [key for key in left.keys() & right.keys() if not torch.equal(left[key], right[key])]
    return found


def predicted(run: RunSpec, faults: list[Fault], rows: list[dict[str, Any]], elapsed_s: float, save_s: float) -> float:
    """The goodput that the simulation gives for the faults; what only slowed a rank is taken out before.

    Measured of the run: its median step, the stall of a save, how long a save is in the air, and for each fault how
    long it took from there, less what the injector itself kept the run down and the watchdog waited, to a new step.
    """
    from modelworks.simulate.events import replay
    from modelworks.simulate.scenario import scenario
    from modelworks.simulate.trace import stream

    stops = [fault for fault in faults if fault.kind != "slow"]
    slowed_s = sum(fault.outage_s for fault in faults if fault.kind == "slow")
    step_s = statistics.fmean(row["step_time_s"] for row in rows)
    took = [max(step_s, (fault.down_s or 0.0) - fault.outage_s - detect_s(fault) - step_s) for fault in stops]
    restart_s = statistics.fmean(took) if took else 0.0
    with tempfile.TemporaryDirectory() as folder:
        catalog = Path(folder) / "faults.toml"
        mean_h = max(1e-6, elapsed_s / max(1, len(stops)) / 3600.0)
        causes = "".join(
            f'[causes.{kind}]\ncomponent = "job"\nmtbf_hours = {mean_h * len(KINDS)}\nscope = "none"\n'
            "repair_fraction = 0.0\n"
            for kind in KINDS
            if kind != "slow"
        )
        catalog.write_text(f"[observation]\ngpus = 8\ndays = 1.0\n{causes}", encoding="utf-8")
        values = run.model_dump(exclude_none=True)
        values["train"]["tokens"] = 10**15
        values["simulate"] = {
            "days": max(1.0, elapsed_s - slowed_s) / 86400.0,
            "failures": str(catalog),
            "step_time": step_s,
            "spares": {"hot": 0, "pool": 0},
            "repair": {"lemon_fraction": 0.0},
            "restart": {
                "drain": 0.0, "swap": 0.0, "scheduler": restart_s, "container": 0.0, "communicator": 0.0,
                "communicator_per_rank": 0.0, "warm_up": 0.0, "spread": 0.0, "manual_fraction": 0.0,
            },
            "state": {"kind": "async", "stall": stall_s(rows), "write": min(save_s, SAVE_EVERY * step_s), "read": 0.0},
        }  # fmt: skip
        found = scenario(run_from(values))
        trace = [
            {
                "time_s": fault.time_s,
                "cause": fault.kind,
                "detect_s": detect_s(fault),
                "outage_s": fault.outage_s,
                "restart": restart / restart_s,
            }
            for fault, restart in zip(stops, took, strict=True)
        ]
        return float(replay(found, stream(trace, found)).outcome.ettr[0])


def detect_s(fault: Fault) -> float:
    """How long it takes until a fault is noticed."""
    return HANG_S if fault.kind == "stop" else 0.0


def kill_times(faults: list[Fault]) -> list[float]:
    """How long after each kill the first new step was made, where nothing else happened meanwhile."""
    restarts = [fault for fault in faults if fault.kind in ("kill", "corrupt") and fault.down_s is not None]
    alone = [
        fault
        for fault, after in zip(faults, [*faults[1:], None], strict=True)
        if fault in restarts and (after is None or after.time_s > fault.time_s + (fault.down_s or 0.0))
    ]
    return [fault.down_s or 0.0 for fault in alone or restarts] or [0.0]


def stall_s(rows: list[dict[str, Any]]) -> float:
    """What a save stops the loop for: the run's clock between two steps, less the second one's own time."""
    stalls = [
        after["time_s"] - before["time_s"] - after["step_time_s"]
        for before, after in itertools.pairwise(rows)
        if after["step"] == before["step"] + 1 and before["step"] % SAVE_EVERY == 0
    ]
    return max(0.0, statistics.median(stalls)) if stalls else 0.0


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[str | None]:
    """A disk of so many bytes under a folder; or why there is none."""
    folder.mkdir(parents=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True, check=False
    )
    try:
        yield mounted.stderr.decode().strip() if mounted.returncode else None
    finally:
        if not mounted.returncode:
            subprocess.run(["umount", "-l", str(folder)], check=False)


def soak(minutes: float, processes: int, every_s: float, seed: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Strike a run for so long and hold it against an undisturbed one; the report as plain values."""
    with tempfile.TemporaryDirectory(prefix="modelworks-soak-") as name:
        home = Path(name)
        os.environ["MODELWORKS_HOME"] = name
        with small_disk(runs_folder() / "soaked", DISK_BYTES) as refused:
            kinds = dict(KINDS)
            if refused is not None:
                del kinds["disk"]
                say(f"the disk is not filled: a small one can't be mounted ({refused})")
            run = Run(spec_of("soaked", home, processes, 10**12), home)
            try:
                injector = Injector(run, seed, every_s, kinds)
                say(f"training on {processes} processes for {minutes:g} minutes, a fault about every {every_s:g} s")
                injector.strike_for(60.0 * minutes)
                run.process.send_signal(signal.SIGTERM)  # type: ignore[union-attr]
                run.wait(lambda: run.ended)
                code, elapsed_s = run.process.returncode, injector._now  # type: ignore[union-attr]
                if code:
                    say(f"after SIGTERM it ended with {code}: {run.words()}")
            finally:
                run.close()
            last = RunRecord(run.folder).checkpoints()[-1]
            steps = int(last.name.removeprefix("step-"))
            say(f"{len(injector.faults)} faults; an undisturbed run makes the same {steps:,} steps")
            alone = Run(spec_of("alone", home, processes, steps * run.spec.train.tokens_per_step), home)
            try:
                alone.start()
                alone.wait(lambda: alone.ended, patience_s=60.0 * 60.0)
            finally:
                alone.close()
            if alone.process is None or alone.process.returncode:
                raise SystemExit(f"the undisturbed run failed: {alone.words()}")
            differing = differences(last, alone.folder / "checkpoints" / last.name)
            save_s = seconds_of_a_save(alone)
        log = (home / "soaked.log").read_text(encoding="utf-8", errors="replace")
        faults, rows = injector.faults, run.rows[:steps]
        step_s = statistics.fmean(row["step_time_s"] for row in rows)
        lost = [fault.lost_steps for fault in faults if fault.kind != "corrupt"]
        damaged = [fault.lost_steps for fault in faults if fault.kind == "corrupt"]
        return {
            "minutes": elapsed_s / 60.0,
            "processes": processes,
            "faults": len(faults),
            "by_kind": dict(Counter(fault.kind for fault in faults)),
            "mid_save": sum(fault.mid_save for fault in faults),
            "restarts_by_the_agent": log.count("all are started again"),
            "resumes": injector.resumes,
            "exit_code_after_sigterm": code,
            "steps": steps,
            "last_checkpoint": last.name,
            "differing_tensors": differing,
            "equal_losses": [row["loss"] for row in rows] == [row["loss"] for row in RunRecord(alone.folder).metrics()],
            "save_every_steps": SAVE_EVERY,
            "lost_more_than_a_checkpoint_held": sum(fault.lost_more for fault in faults),
            "most_steps_lost": max(lost, default=0),
            "most_steps_lost_with_the_newest_checkpoint_damaged": max(damaged, default=0),
            "step_s": step_s,
            "stall_s": stall_s(rows),
            "save_s": save_s,
            "restart_s": statistics.fmean(kill_times(faults)),
            "goodput": steps * step_s / elapsed_s,
            "goodput_predicted": predicted(run.spec, faults, rows, elapsed_s, save_s)
            * (1.0 - sum(fault.outage_s for fault in faults if fault.kind == "slow") / elapsed_s),
            "trace": [asdict(fault) for fault in faults],
        }


def seconds_of_a_save(run: Run) -> float:
    """How long the last save of a run was in the air: from its first file to its manifest."""
    folder = RunRecord(run.folder).checkpoints()[-1]
    times = [path.stat().st_mtime for path in folder.iterdir()]
    return max(times) - min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--every", type=float, default=6.0, help="seconds between a recovery and the next fault")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the report there, every fault included")
    options = parser.parse_args()
    report = soak(options.minutes, options.processes, options.every, options.seed, lambda text: print(text, flush=True))
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(report["by_kind"].items()))
    print(f"faults in {report['minutes']:.1f} minutes: {report['faults']} ({kinds}); {report['mid_save']} mid-save")
    print(f"started again by the agent {report['restarts_by_the_agent']} times, resumed {report['resumes']} times")
    print(f"steps: {report['steps']:,}; checkpoint every {report['save_every_steps']}")
    print(
        f"most steps lost to one fault: {report['most_steps_lost']}, and "
        f"{report['most_steps_lost_with_the_newest_checkpoint_damaged']} with the newest checkpoint damaged"
    )
    print(
        f"step {report['step_s'] * 1e3:.0f} ms, a save stalls {report['stall_s'] * 1e3:.1f} ms and takes "
        f"{report['save_s'] * 1e3:.0f} ms, a kill costs {report['restart_s']:.1f} s"
    )
    print(f"goodput: measured {report['goodput']:.3f}, simulated for these faults {report['goodput_predicted']:.3f}")
    wrong = {
        "tensors differ": report["differing_tensors"][:5],
        "losses differ": not report["equal_losses"],
        "exit code after SIGTERM": report["exit_code_after_sigterm"],
        "faults that cost more than a checkpoint held": report["lost_more_than_a_checkpoint_held"],
    }
    if any(wrong.values()):
        raise SystemExit(f"FAILED: {', '.join(f'{what}: {value}' for what, value in wrong.items() if value)}")
    print("the last checkpoint equals the undisturbed run's, weights and optimizer, to the bit")


if __name__ == "__main__":
    main()
