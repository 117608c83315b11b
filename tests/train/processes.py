"""Several processes that run one function together, for tests of what they do to each other.

They are forked from a server that has loaded PyTorch, since importing it takes longer than most tests, and end with the
call: PyTorch keeps the threads of every group that a process has ever been in. Python has one such server in a process,
which a run's agent uses as well: whoever starts it here has it import the same, for all tests that follow.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from modelworks.launch import forked
from modelworks.train.worker import PRELOADED

# The processes find a test's functions by its module's name, `tests.train...`, from the folder above.
sys.path.insert(0, str(Path(__file__).parents[2]))
_CONTEXT = multiprocessing.get_context("forkserver")
forked.preload([*PRELOADED, "pytest"])


def together(count: int, function: Callable[..., Any], *arguments: Any, timeout_s: float = 300.0) -> list[Any]:
    """What `function(ranks, *arguments)` returns in each of `count` processes.

    Function, arguments and results must be picklable. A process that raises, or one that is late, fails the test.
    """
    members = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            ranks: dict[Any, int] = {}
            for rank in range(count):
                ours, theirs = _CONTEXT.Pipe()
                call = (theirs, rank, count, Path(folder), dict(os.environ), function, arguments)
                members.append(_CONTEXT.Process(target=_member, args=call, daemon=True))
                members[-1].start()
                theirs.close()
                ranks[ours] = rank
            results: dict[int, Any] = {}
            deadline = time.monotonic() + timeout_s
            while ranks:
                # The first one to fail is shown, and not those that wait for it.
                ready = multiprocessing.connection.wait(list(ranks), max(0.0, deadline - time.monotonic()))
                if not ready:
                    late = ", ".join(map(str, ranks.values()))
                    raise AssertionError(f"of {count} processes {late} have not answered within {timeout_s:.0f} s")
                for pipe in ready:
                    rank = ranks.pop(pipe)
                    failed, results[rank] = pipe.recv()
                    assert not failed, f"process {rank} of {count}:\n{results[rank]}"
            return [results[rank] for rank in range(count)]
        finally:
            for process in members:
                process.kill()
                process.join()


def _member(
    pipe: Any,
    rank: int,
    count: int,
    folder: Path,
    environment: dict[str, str],
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    import torch
    import torch.distributed as dist

    from modelworks.train import machine
    from modelworks.train.ranks import Ranks

    torch.set_num_threads(1)
    os.environ.update(environment)
    # No test looks at how fast this machine multiplies, which each process would measure for half a second.
    measure = machine.matmul_flops
    machine.matmul_flops = lambda precision, budget_s=1.0: measure(precision, budget_s / 50)
    try:
        if count > 1:
            store = dist.FileStore(str(folder / "store"), count)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=count)
        result = function(Ranks(rank, count), *arguments)
        if count > 1:
            dist.barrier()
            dist.destroy_process_group()
        pipe.send((False, result))
    except BaseException:  # noqa: BLE001 - whatever it is, the test shows it
        pipe.send((True, traceback.format_exc()))
