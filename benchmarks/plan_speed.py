"""How many layouts the planner evaluates in full per CPU-second, and what the largest search takes.

One thread. Each evaluation is whole: time by fourteen reasons, memory by seven components, whether it fits, MFU. The
layouts are Grok-1's on 1,024 H100s, in the order of a search, none left out. Beside it the public figure of Calculon,
a performance model of the same kind (https://github.com/calculon-ai/calculon): 72 full evaluations per CPU-second,
taken on a machine like this one.

    OMP_NUM_THREADS=1 python benchmarks/plan_speed.py

The last line is ``evaluations_per_cpu_second: N``.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time

from modelworks.plan.layout import PRECISIONS
from modelworks.plan.planner import plan, setting_for, software_spec
from modelworks.plan.search import Space, candidates, evaluations, search
from modelworks.spec.files import cluster_spec, device_spec, loads_run, model_spec

CALCULON = 72.0
"""Full evaluations per CPU-second."""
BOTH = (PRECISIONS.index("bf16"), PRECISIONS.index("fp8"))


def measure(count: int, rounds: int) -> float:
    """Evaluations per CPU-second, the median of some rounds."""
    setting = setting_for(
        model_spec("grok-1"), 8192, cluster_spec("colossus-100k", 1024), device_spec("h100-sxm"),
        software_spec("megatron-core"),
    )  # fmt: skip
    space = Space(
        most_devices=1024, least_devices=1024, devices_per_node=8, domain=8, island=512,
        memory_limit=float(setting.device.memory_bytes), accepted={"precision": BOTH, "sequence_parallel": (True,)},
    )  # fmt: skip
    every = candidates(setting, 1024, space)
    rates = []
    for _ in range(rounds):
        done, begun = 0, time.process_time()
        for numbers, _found in evaluations(setting, 1024, every):
            done += len(numbers)
            if done >= count:
                break
        rates.append(done / (time.process_time() - begun))
        print(f"{done:,} evaluations, layers included: {rates[-1]:,.0f} per CPU-second")
    return statistics.median(rates)


def measure_search() -> None:
    """The whole space of Grok-1 on 100,000 H100s, in a process of its own for its memory."""
    setting = setting_for(
        model_spec("grok-1"),
        8192,
        cluster_spec("colossus-100k"),
        device_spec("h100-sxm"),
        software_spec("megatron-core"),
    )
    space = Space(
        most_devices=100_000, least_devices=90_000, devices_per_node=8, domain=8, island=512,
        memory_limit=float(setting.device.memory_bytes), accepted={"precision": BOTH[:1]},
    )  # fmt: skip
    found = search(setting, 12_288, space)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"Grok-1 on 100,000 H100s: {len(found.candidates):,} layouts searched in {found.seconds:.1f} CPU-seconds and "
        f"{peak:.2f} GiB; {found.evaluated:,} of them in full, the others ruled out by a bound"
    )


def measure_plan() -> None:
    """A whole plan for Grok-1 on 1,024 H100s, sensitivities included."""
    run = loads_run(
        'model = "grok-1"\n[train]\nseq_len = 8192\nglobal_batch = 1024\n'
        '[cluster]\npreset = "colossus-100k"\ngpus = 1024\n'
    )
    plan(run)
    print(f"a plan for Grok-1 on 1,024 H100s, start-up included: {time.process_time():.2f} CPU-seconds")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2_000_000, help="evaluations in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--part", choices=["search", "plan"], help="only this, in this process")
    given = parser.parse_args()
    if given.part is not None:
        {"search": measure_search, "plan": measure_plan}[given.part]()
        return
    for part in ("search", "plan"):
        subprocess.run([sys.executable, __file__, "--part", part], check=True)
    rate = measure(given.count, given.rounds)
    print(f"Calculon: {CALCULON:.0f} full evaluations per CPU-second; {rate / CALCULON:,.0f} times as many here")
    print(f"evaluations_per_cpu_second: {rate:.0f}")


if __name__ == "__main__":
    main()
