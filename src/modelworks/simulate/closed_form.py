"""What can be said without simulating: for constant rates, one kind of checkpoint, and a fixed time of restart.

The engines are held against these.
"""

from __future__ import annotations

import math


def young_s(cost_s: float, mttf_s: float) -> float:
    """Young's interval of work between checkpoints, in seconds: sqrt(2 C M) (Young 1974)."""
    return math.sqrt(2.0 * cost_s * mttf_s)


def daly_s(cost_s: float, mttf_s: float) -> float:
    """Daly's interval of work between checkpoints, in seconds (Daly 2006, eq. 37).

    M where a checkpoint costs more than 2 M.
    """
    if cost_s >= 2.0 * mttf_s:
        return mttf_s
    root = math.sqrt(cost_s / (2.0 * mttf_s))
    return math.sqrt(2.0 * cost_s * mttf_s) * (1.0 + root / 3.0 + root * root / 9.0) - cost_s


def effective_time_ratio(every_s: float, cost_s: float, restart_s: float, mttf_s: float) -> float:
    """Useful over elapsed time, failures being exponential and striking checkpoints and restarts as well.

    Daly 2006, eq. 20, for a long run: every / (M exp(R/M) (exp((every + C)/M) - 1)).

    Parameters
    ----------
    every_s
        Work between checkpoints.
    cost_s
        What a checkpoint stops the job for.
    restart_s
        From a failure to running again.
    mttf_s
        Mean time to failure; infinite for none.
    """
    if math.isinf(mttf_s):
        return every_s / (every_s + cost_s)
    return every_s / mttf_s / (math.exp(restart_s / mttf_s) * math.expm1((every_s + cost_s) / mttf_s))


def best_interval_s(cost_s: float, restart_s: float, mttf_s: float) -> float:
    """The interval that makes `effective_time_ratio` largest, by golden-section search. In seconds."""
    low, high = math.log(1e-6 * mttf_s), math.log(20.0 * mttf_s)
    golden = (math.sqrt(5.0) - 1.0) / 2.0
    while high - low > 1e-9:
        left, right = high - golden * (high - low), low + golden * (high - low)
        if effective_time_ratio(math.exp(left), cost_s, restart_s, mttf_s) > effective_time_ratio(
            math.exp(right), cost_s, restart_s, mttf_s
        ):
            high = right
        else:
            low = left
    return math.exp((low + high) / 2.0)


def erlang_c(servers: int, load: float) -> float:
    """Probability that a repair waits for a technician in an M/M/c queue (Erlang 1917).

    Parameters
    ----------
    servers
        Technicians, c.
    load
        Arrivals times mean repair time; below c, or the queue grows without end and 1 is returned.
    """
    if load >= servers:
        return 1.0
    blocked = 1.0
    for number in range(1, servers + 1):
        blocked = load * blocked / (number + load * blocked)
    return blocked / (1.0 - load / servers * (1.0 - blocked))


def repair_wait_s(servers: int, arrivals_per_s: float, repair_s: float) -> float:
    """Mean wait for a technician in an M/M/c queue, in seconds: Erlang's C over the spare capacity."""
    load = arrivals_per_s * repair_s
    if load >= servers:
        return math.inf
    return erlang_c(servers, load) * repair_s / (servers - load)
