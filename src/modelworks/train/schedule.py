"""How the learning rate goes over a run: a factor of its peak, as a function of the run's progress from 0 to 1.

Progress is the share of the steps done or, where the run has a time budget, of the time spent, whichever is more: the
decay is then over when the run is. A step takes the factor of the progress that it completes, so that the first one
moves the weights and the last one has the final rate.
"""

from __future__ import annotations

import math

from modelworks.spec.run import TrainSpec


def progress(spec: TrainSpec, step: int, elapsed_s: float) -> float:
    """How much of the run is done after `step` optimizer steps and `elapsed_s` seconds, from 0 to 1."""
    by_time = elapsed_s / spec.max_time if spec.max_time else 0.0
    return min(1.0, max(step / spec.steps, by_time))


def factor(spec: TrainSpec, done: float) -> float:
    """The learning rate as a factor of its peak.

    Parameters
    ----------
    spec
        Its `schedule`, `warmup_fraction`, `decay_fraction` and `final_fraction` are used.
    done
        The run's progress, from 0 to 1.

    Notes
    -----
    ``wsd`` is warmup-stable-decay with a linear decay (Hu et al. 2024, arXiv:2404.06395, section 4; linear as in
    Haegele et al. 2024, arXiv:2405.18392); ``cosine`` that of Loshchilov and Hutter 2017, arXiv:1608.03983, eq. 5,
    without restarts. Warmup is linear.
    """
    if done < spec.warmup_fraction:
        return done / spec.warmup_fraction
    if spec.schedule == "constant":
        return 1.0
    if spec.schedule == "cosine":
        after_warmup = (done - spec.warmup_fraction) / max(1e-12, 1 - spec.warmup_fraction)
        return spec.final_fraction + (1 - spec.final_fraction) * (1 + math.cos(math.pi * after_warmup)) / 2
    decayed = max(0.0, (done - (1 - spec.decay_fraction)) / max(1e-12, spec.decay_fraction))
    return 1 - (1 - spec.final_fraction) * min(1.0, decayed)
