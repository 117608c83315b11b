"""Processes forked from a server that has imported what they need: PyTorch alone takes seconds of processor time.

Python's fork server is started once and forks the processes of every attempt. It computes nothing, and so has neither
threads nor a GPU that a fork would break; it ends after its processes and the one that started it.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import sys
import threading
import traceback
from collections.abc import Iterable, Mapping, Sequence

_AT_IMPORT = dict(os.environ)


def preload(modules: Iterable[str]) -> None:
    """Have the fork server import modules, if it has not been started."""
    ours = ["modelworks.launch.fork_server", __name__, "torch.distributed.elastic.multiprocessing"]
    multiprocessing.set_forkserver_preload([*ours, *modules])


def run(arguments: Sequence[str], environment: Mapping[str, str]) -> None:
    """Do as ``python ARGUMENTS`` would in an environment, to which the agent has added this process's rank.

    Raises
    ------
    SystemExit
        If the program ends with another code than 0.
    """
    from setproctitle import setproctitle

    from modelworks.launch.fork_server import PASSED_BY

    os.setsid()
    for number in PASSED_BY:
        signal.signal(number, signal.SIG_DFL)
    of_agent = {name: value for name, value in os.environ.items() if _AT_IMPORT.get(name) != value}
    os.environ.clear()
    os.environ.update(environment)
    os.environ.update(of_agent)
    setproctitle(f"process {os.environ['RANK']}: {' '.join(arguments)}")
    try:
        if arguments[0] == "-m":
            sys.argv = list(arguments[1:])
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = list(arguments)
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
    except (Exception, KeyboardInterrupt):  # noqa: BLE001 - what went wrong belongs in its log
        traceback.print_exc()
        sys.exit(1)
    # It waits now until all have ended; told to end before that, or left alone, it has nothing left to do.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(0)
