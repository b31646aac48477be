"""Ports that a page is served on: which are free, and what to say of one that is not."""

import errno
import socket

from ablab.core.errors import UserError

LAST_PORT = 65535


def check_port(host: str, port: int, usual: int, command: str) -> None:
    """Refuse a port that cannot be listened on, and name one that can.  command: what was typed, without its port."""
    if not 0 < port <= LAST_PORT:
        raise UserError(f"--port {port} is not in 1-{LAST_PORT}; the usual one is {usual}")
    refused = refusal(host, port)
    if refused is None:
        return
    advice = "choose another with --host and --port"
    if refused.errno in (errno.EADDRINUSE, errno.EACCES) and (free := _free(host, port, usual)):
        advice = f"try: {command} --port {free}"
    why = str(refused.strerror).lower()
    raise UserError(f"port {port} on {host} cannot be used: {why}; {advice}")


def _free(host: str, port: int, usual: int) -> int | None:
    """The next port that can be listened on, of a hundred."""
    first, last = max(port + 1, usual), min(port + 99, LAST_PORT)
    for other in range(first, last + 1):
        if refusal(host, other) is None:
            return other
    return None


def free_port(host: str) -> int:
    """Any that is free now."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


def refusal(host: str, port: int) -> OSError | None:
    """Why the server could not listen there; None if it could."""
    try:
        family = socket.getaddrinfo(host, port)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            # As the server will: a port just left is free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as refused:
        return refused
    return None
