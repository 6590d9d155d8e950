"""The address at which other replicas reach this one."""

import socket
from urllib.parse import urlsplit

from paca_lightning.core.errors import PaCAError


def lighthouse_place(lighthouse: str) -> tuple[str, int]:
    """Host and port of a lighthouse's address.

    Raises:
        PaCAError: If it is no ``http://HOST:PORT``.
    """
    parts = urlsplit(lighthouse)
    try:
        host, port = parts.hostname, parts.port
    except ValueError:  # a port that is no number
        host = port = None
    if parts.scheme != "http" or not host or not port:
        raise PaCAError(f"lighthouse={lighthouse!r} has to be the address of a lighthouse, http://HOST:29510.")
    return host, port


def own_address(lighthouse: str) -> str:
    """The address of this machine on the network on which it reaches the lighthouse. Nothing is sent.

    Gloo would take that of the machine's own name, which in many systems is 127.0.1.1, where no other machine gets to.

    Raises:
        PaCAError: If the lighthouse's name cannot be resolved, or no network leads to it.
    """
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect(lighthouse_place(lighthouse))  # of datagrams: only chooses the interface
            return str(probe.getsockname()[0])
    except OSError as error:
        raise PaCAError(
            f"the lighthouse's host is not found: lighthouse={lighthouse!r} ({error}). Correct it, or set the "
            "strategy's host to the address at which the others reach this replica."
        ) from error
