"""Free ports, for what runs on machines without pytest, too."""

import os
import socket


def free_ports(count: int) -> int:
    """The first of ``count`` free ports in a row, below those that the system hands out to connections."""
    for first in range(10_000 + os.getpid() % 1000, 30_000, count):
        try:
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        return first
    raise OSError("no free ports")
