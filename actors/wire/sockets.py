"""How soon a connection between a caller and a replica is known to be lost with its machine.

A process that ends closes its connections; a machine that is gone says nothing. While nothing is
under way it is asked now and then; but what was sent and not acknowledged is only sent again, for a
quarter of an hour by default, and nothing is asked meanwhile. So both have a limit.
"""

import socket
from asyncio import BaseTransport

IDLE_S, INTERVAL_S, TRIES = 5, 2, 3
LOST_AFTER_S = IDLE_S + INTERVAL_S * TRIES

_OPTIONS = (
    ("TCP_KEEPIDLE", IDLE_S),
    ("TCP_KEEPINTVL", INTERVAL_S),
    ("TCP_KEEPCNT", TRIES),
    ("TCP_USER_TIMEOUT", LOST_AFTER_S * 1000),
)


def notice_loss(transport: BaseTransport) -> None:
    """Have a connection end some `LOST_AFTER_S` after its other side is gone, where that works."""
    raw = transport.get_extra_info("socket")
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _OPTIONS:
        if hasattr(socket, name):  # not everywhere
            raw.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
