"""One of the processes that train a run together: ``python -m modelworks.train.worker FOLDER [--resume] [--pulse DIR]``

It is started by an agent (`launch.elastic`, torchrun) that has put rank and meeting point into the environment, while
a parent process holds the run's folder. It gives signs of life in a file of the folder DIR, says nothing of its own but
an error, in one line, and ends with a code that tells the agent whether another attempt could do better.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from modelworks.spec.errors import InputError, OperationError
from modelworks.train.interrupt import Interrupted
from modelworks.train.record import RunRecord
from modelworks.train.session import MemberSession
from modelworks.train.watchdog import Pulse, pulse_file

FINAL_CODES: dict[int, type[InputError] | type[OperationError]] = {2: InputError, 3: OperationError}
"""Exit codes of what another attempt wouldn't change, and the error that each stands for; a loss of peers or a defect
ends with 1."""
DIFFERING = 4
"""The exit code of processes that hold other weights than they should: another attempt may go well."""
PRELOADED = (
    "modelworks.data.tokenizer",
    "modelworks.train.loop",
    "modelworks.train.ranks",
    "modelworks.train.worker",
    "safetensors.torch",
    "torch.distributed.checkpoint",
)
"""What it imports and a fork server can import for all processes."""
_PREDECESSOR_S = 120.0
"""How long the processes of an earlier attempt may take to leave."""


def main(arguments: list[str]) -> int:
    """Train until the run ends; returns the exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    folder = Path(arguments[0])
    rank = int(os.environ["RANK"])
    pulse = None
    if "--pulse" in arguments:
        pulse = Pulse(pulse_file(Path(arguments[arguments.index("--pulse") + 1]), os.environ["LOCAL_RANK"]))
    resume = "--resume" in arguments or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    try:
        with _alone(folder / ".processes.lock") if rank == 0 else contextlib.nullcontext():
            session = MemberSession(folder, RunRecord(folder).spec(), resume, first=rank == 0)
            if pulse is not None:
                session.pulse = pulse.beat
            with session.interrupt:
                return _train(session)
    except Interrupted:
        return 0
    except (InputError, OperationError) as error:
        print(error, file=sys.stderr)
        return next(code for code, kind in FINAL_CODES.items() if isinstance(error, kind))


def _train(session: MemberSession) -> int:
    import torch

    from modelworks.train.agreement import ReplicasDiffer
    from modelworks.train.loop import train
    from modelworks.train.ranks import join

    if "OMP_NUM_THREADS" not in os.environ:
        # The processes of a machine share its cores.
        torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ["LOCAL_WORLD_SIZE"])))
    ranks = join()
    try:
        train(session, ranks=ranks)
    except ReplicasDiffer as found:
        print(found, file=sys.stderr)
        return DIFFERING
    ranks.close()
    return 0


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold a file that the first process of an earlier attempt may still hold, its parent being gone."""
    try:
        with FileLock(path, timeout=_PREDECESSOR_S):
            yield
    except Timeout:
        raise OperationError(f"processes of an earlier attempt are still at work in {path.parent}") from None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
