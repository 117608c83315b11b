"""Nodes that meet: in which order they are ranked, and that they number their rounds alike."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor

import pytest

from modelworks.launch.meeting import Meeting, Place
from modelworks.spec.errors import OperationError


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_ranks_follow_the_switches_and_then_the_nodes_numbers_and_rounds_are_counted_alike() -> None:
    port = _free_port()
    switches = {0: "s0.s2", 1: "s0.s1", 2: "s0.s1"}
    places = [Place(3, node, "127.0.0.1", port, "attempt", switch) for node, switch in switches.items()]
    with ThreadPoolExecutor(3) as threads:
        meetings = list(threads.map(Meeting, places))
        handlers = [meeting.handler() for meeting in meetings]
        for number in (0, 1):
            met = list(threads.map(lambda handler: handler.next_rendezvous(), handlers))
            assert [info.rank for info in met] == [2, 0, 1]
            assert {info.world_size for info in met} == {3}
            assert [handler.round for handler in handlers] == [number] * 3
            stores = {(i.bootstrap_store_info.master_addr, i.bootstrap_store_info.master_port) for i in met}
            assert len(stores) == 1, "all processes are sent to the same store"
        for handler in handlers:
            handler.shutdown()


def test_a_port_in_use_is_said_with_the_field_that_names_it() -> None:
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(OperationError, match=rf"127\.0\.0\.1:{port}: the port is in use; launch\.port"):
            Meeting(Place(2, 0, "127.0.0.1", port, "attempt"))
