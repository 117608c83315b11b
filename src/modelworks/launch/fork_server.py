"""Imported by the fork server of a run's processes, and by nothing else: signals that are meant for them pass it by.

A terminal, or Slurm, sends them to all processes that belong together.
"""

import signal

from setproctitle import setproctitle

PASSED_BY = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
for _number in PASSED_BY:
    signal.signal(_number, signal.SIG_IGN)
# Here as well, since the place of a title is found by an environment that nobody has changed.
setproctitle("fork server of a run's processes")
