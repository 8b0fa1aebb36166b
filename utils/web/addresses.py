"""Which IP addresses are public, which are one's own, and which are nobody's business."""

from __future__ import annotations

import functools
import ipaddress
import socket

_PRIVATE = [
    ipaddress.ip_network(network)
    for network in (
        *("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "127.0.0.0/8"),
        *("::1/128", "fc00::/7", "fec0::/10"),
    )
]
# Cloud metadata services outside the link-local range, and what Python calls global although nothing public is there.
# Source: IANA special-purpose address registries.
_NEVER = [
    ipaddress.ip_network(network)
    for network in ("100.100.100.200/32", "fd00:ec2::254/128", "192.0.0.0/24", "192.88.99.0/24", "2001::/23")
]
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_GLOBAL_V6 = ipaddress.IPv6Network("2000::/3")  # all that IANA has given out as unicast


@functools.lru_cache(10_000)
def scope(address: str) -> str:
    """ "public", "private" (this machine, or a network of one's own) or "never" (link-local, multicast, reserved ...).

    An IPv4 address inside an IPv6 one (mapped, 6to4, NAT64) counts as what it is.
    """
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = (
            ip.ipv4_mapped or ip.sixtofour or (ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF) if ip in _NAT64 else None)
        )
        if inner:
            return scope(str(inner))
    if any(ip in network for network in _NEVER if network.version == ip.version):
        return "never"
    if any(ip in network for network in _PRIVATE if network.version == ip.version):
        return "private"
    public = ip.is_global and not (ip.is_multicast or ip.is_reserved or ip.is_link_local or ip.is_unspecified)
    return "public" if public and (ip.version == 4 or ip in _GLOBAL_V6) else "never"


def literal_scope(host: str) -> str | None:
    """The scope of a host that needs no DNS: an address in any spelling that browsers know, or localhost. Else None."""
    host = host.rstrip(".").lower()
    if host == "localhost" or host.endswith((".localhost", ".localdomain")):
        return "private"
    try:
        return scope(host if ":" in host else socket.inet_ntoa(socket.inet_aton(host)))  # also 127.1, 0x7f000001, ...
    except (OSError, ValueError):
        return None
