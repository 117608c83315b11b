"""Which addresses may be connected to on somebody's behalf: public ones, and what the operator allows.

The guard makes the socket. So it sees the very address that is connected to, after names were resolved and on every
redirect; a name that resolves to another address the second time gains nothing.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Sequence
from typing import Any

import psutil

from modelworks.spec.errors import InputError

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
REFUSED = "is not a public address"
_PUBLIC = ipaddress.IPv6Network("2000::/3")
"""What IANA has given out of IPv6 for use in public."""
_TRANSLATED = ipaddress.IPv6Network("64:ff9b::/96")
"""IPv4 addresses behind a translator (RFC 6052)."""
_SPECIAL = tuple(map(ipaddress.ip_network, ("192.0.0.0/24", "192.88.99.0/24", "2002::/16", "2001::/32", "3fff::/20")))
"""For protocols and documents, which not every version of Python counts as private."""


class PrivateAddressError(OSError):
    """An address that nobody may be sent to on somebody else's behalf."""


class Guard:
    """Makes sockets to public addresses alone, and to none of this machine's own: they are behind its firewall.

    Parameters
    ----------
    allowed
        Addresses and networks that are allowed although they aren't public, such as ``10.1.0.0/16``.

    Raises
    ------
    InputError
        If one of them is no network.
    """

    def __init__(self, allowed: Sequence[str] = ()) -> None:
        self._allowed = tuple(map(network_of, allowed))

    def allows(self, address: str) -> bool:
        """Whether an IP address may be connected to."""
        found = _unwrapped(ipaddress.ip_address(address.partition("%")[0]))
        return any(found in network for network in self._allowed) or (is_public(found) and found not in _own())

    def socket(self, found: tuple[Any, ...]) -> socket.socket:
        """A socket for what `socket.getaddrinfo` has found.

        Raises
        ------
        PrivateAddressError
            If that is no address that may be connected to.
        """
        family, kind, protocol, _, where = found
        if family not in {socket.AF_INET, socket.AF_INET6} or not self.allows(where[0]):
            raise PrivateAddressError(f"{where[0]} {REFUSED}")
        return socket.socket(family, kind, protocol)


def is_public(address: Address) -> bool:
    """Whether an address is one of the public Internet's."""
    if isinstance(address, ipaddress.IPv6Address) and address not in _PUBLIC:
        return False
    if any(address in network for network in _SPECIAL):
        return False
    return address.is_global and not (address.is_multicast or address.is_reserved)


def network_of(text: str) -> Network:
    """A network, or an address as one.

    Raises
    ------
    InputError
        If it is neither.
    """
    try:
        return ipaddress.ip_network(text)
    except ValueError:
        raise InputError(f"{text!r} is not accepted: an address or a network such as '10.1.0.0/16' is") from None


def _own() -> set[Address]:
    """This machine's addresses, as they are now."""
    families = (socket.AF_INET, socket.AF_INET6)
    listed = (one for of_card in psutil.net_if_addrs().values() for one in of_card if one.family in families)
    return {ipaddress.ip_address(one.address.partition("%")[0]) for one in listed}


def _unwrapped(address: Address) -> Address:
    """The IPv4 address that an IPv6 address stands for, if it does."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return address.ipv4_mapped
        if address in _TRANSLATED:
            return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address
