"""The simulation held against published runs: what it says of each, beside what was reported.

Nothing is fitted here. A run gets the default practices (restart, detection, spares) and its own GPUs, days and
checkpoints; the failure rates are Llama 3's, or, where a fleet's own rate was published, that one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from modelworks.simulate.answers import answer
from modelworks.spec.files import loads_run
from modelworks.spec.machine import PublishedRunSpec

_DAYS = 30.0
"""Where no time was published."""


@dataclass(frozen=True)
class Check:
    """One published run and what the simulation says of it; None for what wasn't published."""

    run: PublishedRunSpec
    interruptions: float | None
    low: float | None
    high: float | None
    """The 95 % interval of the interruptions."""
    ettr: float | None
    mttf_hours: float | None


def check(run: PublishedRunSpec, samples: int = 200, seed: int = 0) -> Check:
    """Simulate a published run.

    The interruptions are those of the causes that were counted; relapses of lemons are among them.
    """
    days = run.days or _DAYS
    overrides = [f"cluster.gpus={run.gpus}", f"cluster.device={run.device}", f"simulate.days={days}"]
    if run.checkpoint_every_s:
        overrides.append(f"checkpoint.every={run.checkpoint_every_s}")
    if run.peer_memory:
        overrides.append("simulate.state.kind=peer")
    if run.failures_per_node_day:
        overrides.append("simulate.failures=meta-rsc-1")
    text = 'model = "gpt3-175b"\n[train]\ntokens = 1_000_000_000_000_000_000\nseq_len = 2048\n'
    text += 'global_batch = 1536\n[cluster]\npreset = "colossus-100k"\n'
    found = answer(loads_run(text, overrides), samples, seed, search=False)
    counted = [index for index, name in enumerate(found.cause_names) if not run.causes or name in run.causes]
    counts = found.outcome.interruptions[:, counted].sum(axis=1)
    low, high = (float(value) for value in np.percentile(counts, [2.5, 97.5]))
    wanted = run.interruptions is not None
    return Check(
        run=run,
        interruptions=float(counts.mean()) if wanted else None,
        low=low if wanted else None,
        high=high if wanted else None,
        ettr=float(found.outcome.ettr.mean()) if run.ettr is not None else None,
        mttf_hours=found.mttf_hours() if run.mttf_hours is not None else None,
    )
