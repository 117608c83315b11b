"""What a checkpoint costs the training: asynchronous and synchronous saves, per save and in steps' times.

    python benchmarks/checkpoint_stall.py [--model grok-tiny] [--processes 1 2] [--rounds 5] [--json FILE]

The trainer itself makes steps of random text: some without a save, some behind an asynchronous one, some behind a
synchronous one, in turns. Told are, as medians over the rounds: the stall, which is how long the loop stands still at
the save; and the whole cost, which is how much longer the save and the steps behind it take than steps alone, since
what is hashed and written meanwhile uses processors too. The target: a stall below 5 % of a step.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TARGET = 0.05
STEPS = 2
"""Steps behind each save."""


def member(folder: Path, rounds: int) -> None:
    """What each process does; the first one leaves the times in ``times.json``."""
    from modelworks.train.loop import Trainer
    from modelworks.train.ranks import join
    from modelworks.train.record import RunRecord
    from modelworks.train.session import MemberSession
    from modelworks.train.view import NoView

    ranks = join()
    trainer = Trainer(MemberSession(folder, RunRecord(folder).spec(), False, ranks.first), NoView(), ranks)

    def timed(save: str | None) -> dict[str, float]:
        begun = time.perf_counter()
        if save is not None:
            trainer._save()
            if save == "synchronous":
                trainer.saving.finish()
        stalled = time.perf_counter() - begun
        for _ in range(STEPS):
            trainer.one_step()
        taken = time.perf_counter() - begun
        trainer.saving.finish()
        return {"stall_s": stalled, "taken_s": taken, "in_the_air_s": time.perf_counter() - begun}

    for save in (None, "asynchronous", "synchronous"):
        timed(save)  # Warms up: the optimizer's state and the staging buffers are there afterwards.
    kinds: dict[str, list[dict[str, float]]] = {"none": [], "asynchronous": [], "synchronous": []}
    for _ in range(rounds):
        for kind, times in kinds.items():
            times.append(timed(None if kind == "none" else kind))
    if ranks.first:
        held = sum(tensor.nbytes for tensor in trainer._tensors(as_part=True).values())
        (folder / "times.json").write_text(json.dumps({"bytes_per_process": held, "times": kinds}), encoding="utf-8")
    trainer.close()
    ranks.close()


def measure(model: str, processes: int, rounds: int) -> dict[str, Any]:
    """Medians over the rounds, in seconds and in steps."""
    from modelworks.launch.elastic import Processes
    from modelworks.spec.files import dumps, run_from

    with tempfile.TemporaryDirectory(prefix="modelworks-stall-") as name:
        home = Path(name)
        os.environ |= {"MODELWORKS_HOME": name, "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes))}
        draw = random.Random(1)
        (home / "text").mkdir()
        for index in range(20):
            (home / "text" / f"{index}.txt").write_text(" ".join(str(draw.random()) for _ in range(8000)))
        spec = run_from(
            {
                "name": "stall",
                "model": model,
                "data": {"source": "files", "files": [str(home / "text")]},
                "train": {"tokens": 10**9, "seq_len": 512, "global_batch": 8, "micro_batch": 4},
                "cluster": {
                    "preset": "local",
                    "gpus": processes,
                    "gpus_per_node": processes,
                    "scale_up_domain": processes,
                },
                "checkpoint": {"keep": 1, "every": 10**9},
            }
        )
        folder = home / "runs" / "stall"
        folder.mkdir(parents=True)
        (folder / "run.toml").write_text(dumps(spec), encoding="utf-8")
        arguments = [__file__, "--member", str(folder), "--rounds", str(rounds)]
        work = Processes(arguments, processes, folder / "processes", {1}, lambda: 0.0)
        while not work.wait(1.0):
            pass
        if work.failure is not None:
            raise SystemExit(str(work.failure))
        found = json.loads((folder / "times.json").read_text(encoding="utf-8"))
    times = found["times"]
    alone_s = statistics.median(one["taken_s"] for one in times["none"])
    step_s = alone_s / STEPS
    report: dict[str, Any] = {
        "model": model,
        "processes": processes,
        "step_s": step_s,
        "bytes_per_process": found["bytes_per_process"],
    }
    for kind in ("asynchronous", "synchronous"):
        stall_s = statistics.median(one["stall_s"] for one in times[kind])
        cost_s = statistics.median(one["taken_s"] for one in times[kind]) - alone_s
        report[kind] = {"stall_s": stall_s, "stall_steps": stall_s / step_s, "cost_steps": cost_s / step_s}
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="grok-tiny")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--member", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.member is not None:
        member(options.member, options.rounds)
        return
    reports = [measure(options.model, count, options.rounds) for count in options.processes]
    for report in reports:
        print(
            f"{report['model']} on {report['processes']} processes: a step takes {report['step_s']:.2f} s, a process "
            f"saves {report['bytes_per_process'] / 1e6:.0f} MB"
        )
        for kind in ("asynchronous", "synchronous"):
            one = report[kind]
            print(
                f"  {kind:13} stall {one['stall_s'] * 1e3:7.1f} ms = {one['stall_steps']:6.1%} of a step; "
                f"whole cost {one['cost_steps']:6.1%} of a step"
            )
    if options.json is not None:
        options.json.write_text(json.dumps(reports, indent=1) + "\n", encoding="utf-8")
    worst = max(report["asynchronous"]["stall_steps"] for report in reports)
    print(f"the longest asynchronous stall is {worst:.1%} of a step; the target is below {TARGET:.0%}")
    sys.exit(worst >= TARGET)


if __name__ == "__main__":
    main()
