"""Several processes that run one function together, for tests of what they do to each other.

They are forked from a server that has loaded PyTorch once, since importing it takes longer than most tests.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["torch", "torch.distributed.fsdp", "torch.distributed.tensor", "modelworks.train.loop"]
)


def together(count: int, function: Callable[..., Any], *arguments: Any, timeout_s: float = 120.0) -> list[Any]:
    """What `function(ranks, *arguments)` returns in each of `count` processes.

    Function, arguments and results must be picklable. A process that raises, or one that is late, fails the test.
    """
    with tempfile.TemporaryDirectory() as folder:
        receivers, processes = [], []
        for rank in range(count):
            receiver, sender = _CONTEXT.Pipe(duplex=False)
            process = _CONTEXT.Process(
                target=_member, args=(rank, count, Path(folder), dict(os.environ), sender, function, arguments)
            )
            process.start()
            sender.close()
            receivers.append(receiver)
            processes.append(process)
        try:
            results = []
            for rank, receiver in enumerate(receivers):
                if not receiver.poll(timeout_s):
                    raise AssertionError(f"process {rank} of {count} has not answered within {timeout_s:.0f} s")
                failed, result = receiver.recv()
                assert not failed, f"process {rank} of {count}:\n{result}"
                results.append(result)
            return results
        finally:
            for process in processes:
                process.kill()
                process.join()


def _member(
    rank: int,
    count: int,
    folder: Path,
    environment: dict[str, str],
    sender: Any,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    import torch
    import torch.distributed as dist

    from modelworks.train.ranks import Ranks

    os.environ.update(environment)
    torch.set_num_threads(1)
    try:
        if count > 1:
            store = dist.FileStore(str(folder / "store"), count)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=count)
        result = function(Ranks(rank, count), *arguments)
        sender.send((False, result))
    except BaseException:  # noqa: BLE001 - whatever it is, the test shows it
        sender.send((True, traceback.format_exc()))
