"""Where the nodes of one run meet: torchrun's c10d rendezvous, hosted by the node that holds the run's folder.

Three ideas. The host opens the meeting point at once and says when the run is ready (its data prepared, which may take
hours); until then the others wait without having joined, so that joining itself can have a short limit. Ranks follow
the nodes' own order (which an engine derives from the network's topology) instead of torchrun's order of addresses, so
that neighbours in rank are neighbours in the network. And every round has one number on all nodes, whichever of them
has failed, since processes that restart must not meet what an earlier round has left in the store.

A node alone meets itself on the loopback interface.
"""

from __future__ import annotations

import datetime
import json
import socket
import time
import uuid
from dataclasses import dataclass
from typing import Any

from torch._C._distributed_c10d import TCPStore
from torch.distributed.elastic.rendezvous import RendezvousParameters, registry
from torch.distributed.elastic.rendezvous.api import RendezvousHandler, RendezvousInfo

from modelworks.launch.losses import LostError
from modelworks.launch.submission import NodeLog
from modelworks.spec.errors import OperationError

_CONNECT_S = 600
"""How long the host may be in coming: nodes of one job don't start at once."""
_LOOK_S = 0.5
_JOIN_S = 600
"""How long a round may take to have all nodes."""
_HEARTBEAT_S, _HEARTBEATS = 5, 12
"""A node that was silent for so many heartbeats counts as lost."""
_READY = "modelworks.ready"


@dataclass(frozen=True)
class Place:
    """Where a node stands among those that train a run together."""

    nodes: int = 1
    node: int = 0
    """Its number; 0 holds the run's folder and hosts the meeting point."""
    host: str = "127.0.0.1"
    """The address by which the others reach node 0."""
    port: int = 0
    attempt: str = ""
    """The same on all nodes that were started together, and another at the next start."""
    topology: str = ""
    """The switches above this node, from the top down; nodes are ranked by it first."""

    @property
    def first(self) -> bool:
        """Whether this node holds the run's folder."""
        return self.node == 0


class Meeting:
    """One node's part in a meeting.

    Parameters
    ----------
    place
        Where the node stands; alone if unset.
    log
        Where losses of its processes are noted.

    Raises
    ------
    OperationError
        On construction, if the port is in use, or if the host doesn't appear.
    """

    def __init__(self, place: Place | None = None, log: NodeLog | None = None) -> None:
        self._log = log
        self.place = place or Place(attempt=uuid.uuid4().hex)
        try:
            self._store = TCPStore(
                self.place.host,
                self.place.port,
                is_master=self.place.first,
                wait_for_workers=False,
                multi_tenant=True,
                timeout=datetime.timedelta(seconds=_CONNECT_S),
            )
        except (RuntimeError, ValueError) as error:
            where = f"{self.place.host}:{self.place.port}"
            if self.place.first:
                reason = "the port is in use" if "EADDRINUSE" in str(error) else str(error).splitlines()[0]
                raise OperationError(
                    f"nodes cannot meet at {where}: {reason}; launch.port says which is used"
                ) from None
            raise LostError(f"the first node didn't answer at {where} within {_CONNECT_S} s") from None

    def note_loss(self, words: str) -> None:
        """Note in the node's log that it has lost a process."""
        if self._log is not None:
            self._log.write("lost a process", message=words)

    def note_told(self) -> None:
        """Note in the node's log that it was told to end, and won't have failed if it isn't given the time to."""
        if self._log is not None:
            self._log.write("told to end")

    def announce(self) -> None:
        """Say that the run is ready for its processes."""
        self._store.set(_READY, "yes")

    def wait_until_ready(self) -> None:
        """Wait until the host has announced the run.

        Raises
        ------
        OperationError
            If the host is gone.
        """
        try:
            while not self._store.check([_READY]):
                time.sleep(_LOOK_S)
        except RuntimeError as error:
            raise LostError(f"the first node, {self.place.host}, is gone: {str(error).splitlines()[0]}") from None

    def handler(self) -> Rounds:
        """torchrun's side of the meeting."""
        own = "127.0.0.1" if self.place.host == "127.0.0.1" else self._own_address()
        parameters = RendezvousParameters(
            backend="c10d",
            endpoint=f"{self.place.host}:{self._store.port}",
            run_id=self.place.attempt,
            min_nodes=self.place.nodes,
            max_nodes=self.place.nodes,
            local_addr=own,
            is_host="false",
            join_timeout=_JOIN_S,
            keep_alive_interval=_HEARTBEAT_S,
            keep_alive_max_attempt=_HEARTBEATS,
        )
        return Rounds(registry.get_rendezvous_handler(parameters), (self.place.topology, self.place.node))

    def _own_address(self) -> str:
        """The address of this node on the network that it shares with the first one."""
        if self.place.first:
            return self.place.host
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((self.place.host, self.place.port))
            return str(probe.getsockname()[0])


class Rounds(RendezvousHandler):
    """A rendezvous that ranks nodes by their place and gives each round a number on which all nodes agree.

    Attributes
    ----------
    round
        The number of the last round, from 0.
    """

    def __init__(self, inner: RendezvousHandler, place: tuple[str, int]) -> None:
        self.round = -1
        self._inner, self._place = inner, place

    def next_rendezvous(self) -> RendezvousInfo:
        """Wait for all nodes; the result has this node's rank by its place."""
        info = self._inner.next_rendezvous()
        # The store is this round's own, so that what is read there has been written in this round.
        info.store.set(f"place.{info.rank}", json.dumps([*self._place, self.round + 1]))
        told: list[list[Any]] = [json.loads(info.store.get(f"place.{rank}")) for rank in range(info.world_size)]
        self.round = max(number for *_, number in told)
        order = sorted(tuple(where) for *where, _ in told)
        assert info.bootstrap_store_info is not None
        return RendezvousInfo(info.store, order.index(self._place), info.world_size, info.bootstrap_store_info)

    @property
    def use_agent_store(self) -> bool:
        """As of the rendezvous inside; so are the methods below."""
        return self._inner.use_agent_store

    def get_backend(self) -> str:
        return self._inner.get_backend()

    def is_closed(self) -> bool:
        return self._inner.is_closed()

    def set_closed(self) -> None:
        self._inner.set_closed()  # type: ignore[no-untyped-call]

    def num_nodes_waiting(self) -> int:
        return self._inner.num_nodes_waiting()

    def get_run_id(self) -> str:
        return self._inner.get_run_id()

    def shutdown(self) -> bool:
        return self._inner.shutdown()
