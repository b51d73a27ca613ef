"""What the server asks of the system before anything heavy happens: its address, and descriptors for its clients."""

from __future__ import annotations

import errno
import resource
import socket

from models.errors import SlipstreamError

BACKLOG = 2048
SPARE_DESCRIPTORS = 128
"""Kept for what is no connection: models, logs, uploads on their way to a file."""
REMEDIES = {
    errno.EADDRINUSE: "is taken: stop what listens there, or choose another with --port (SLIPSTREAM_PORT)",
    errno.EACCES: "is not for this user: choose one from 1024 with --port (SLIPSTREAM_PORT)",
    errno.EADDRNOTAVAIL: "cannot be had: no such address is on this machine, choose one with --host (SLIPSTREAM_HOST)",
}


class CannotListen(SlipstreamError):
    """The address cannot be had; the message is one line with the remedy."""


def listen(host: str, port: int) -> list[socket.socket]:
    """Sockets that listen on every address of a host, all on one port. Raises `CannotListen`."""
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError) as error:
        raise CannotListen(f"host {host!r} is not known ({error}): choose another with --host") from error
    sockets: list[socket.socket] = []
    missing: OSError | None = None
    chosen = port
    try:
        for family, kind, protocol, _, address in dict.fromkeys(found):
            try:
                one = socket.socket(family, kind, protocol)
            except OSError as error:
                missing = error
                continue
            sockets.append(one)
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            try:
                one.bind((address[0], chosen, *address[2:]))
            except OSError as error:
                if error.errno != errno.EADDRNOTAVAIL:
                    raise
                missing = error  # a name may have an address of a kind that this machine does not speak
                sockets.remove(one)
                one.close()
                continue
            chosen = one.getsockname()[1]  # of port 0: what the first address got, so that all have one
            one.listen(BACKLOG)
            one.setblocking(False)
        if not sockets and missing is not None:
            raise missing
    except OSError as error:
        for one in sockets:
            one.close()
        why = REMEDIES.get(error.errno or 0, f"cannot be listened on: {error.strerror}")
        raise CannotListen(f"port {port} of {host} {why}") from error
    return sockets


def room_for(connections: int) -> int:
    """How many connections there are descriptors for, at most as many as asked for; raises the soft limit for them."""
    wanted = connections + SPARE_DESCRIPTORS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return connections if soft == resource.RLIM_INFINITY else max(1, min(connections, soft - SPARE_DESCRIPTORS))
