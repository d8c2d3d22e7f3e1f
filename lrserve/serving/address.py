"""Where a server listens: whether the address is free, and who reaches it."""

from __future__ import annotations

import ipaddress
import socket
import sys

from lrserve.errors import InputError


def bound(host: str, port: int) -> socket.socket:
    """Return a socket at an address, before minutes of loading; it listens once the server is ready.

    Args:
        host: an address or a name; empty is all addresses of the machine.
        port: 0 is any that is free.

    Raises:
        InputError: the address is not this machine's, or the port is taken.
    """
    try:
        family, kind, protocol, _, address = _resolved(host, port)[0]
        found = socket.socket(family, kind, protocol)
        try:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            found.bind(address)
        except OSError:
            found.close()
            raise
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no name of a machine"
        raise InputError(f"cannot listen on {host[:100] or '*'}:{port} ({reason}); give another --host or --port") from error
    return found


def exposed(host: str) -> bool:
    """Say whether other machines may reach what listens there; a name that nobody knows counts as reached."""
    try:
        addresses = {str(address[0]).partition("%")[0] for *_, address in _resolved(host, 0)}
    except (OSError, UnicodeError):
        return True
    return not all(_is_loopback(address) for address in addresses)


def warn_if_open(host: str, port: int, keys: object, routes: str, remedy: str) -> None:
    """Say on standard error what is open to whom, where other machines reach a server that asks for no key.

    Args:
        host: where it listens.
        port: of the same.
        keys: what clients must show, empty if nothing.
        routes: what is open, as the end of `... may use`.
        remedy: how a key is set.
    """
    if keys or not exposed(host):
        return
    whom = f"at {host}" if host not in ("", "0.0.0.0", "::") else "at any address of this machine"
    print(
        f"warning: this server has no key: everyone who reaches port {port} {whom} may use {routes}. {remedy}, or leave out --host",
        file=sys.stderr,
        flush=True,
    )


def _resolved(host: str, port: int) -> list[tuple[int, int, int, str, tuple[object, ...]]]:
    return socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)  # type: ignore[return-value]


def _is_loopback(text: str) -> bool:
    address = ipaddress.ip_address(text)
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback
