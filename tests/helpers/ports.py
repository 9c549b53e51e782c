"""A port for rank 0 of a job, which no other test takes before the job listens on it."""

from __future__ import annotations

import secrets
import socket
from pathlib import Path

FIRST = 10_000
GIVEN_OUT = Path("/proc/sys/net/ipv4/ip_local_port_range")


def free_port() -> int:
    """A port that nobody listens on, below those that the system gives out by itself.

    gloo has the system give it one for every group of every rank, so a port of those may be free
    here and taken by the other worker's job a second later. Not from `random`, which hypothesis
    seeds alike in every worker.
    """
    end = int(GIVEN_OUT.read_text().split()[0]) if GIVEN_OUT.exists() else 0
    ports = range(FIRST, end) or range(FIRST, 32_768)
    while True:
        port = secrets.choice(ports)
        with socket.socket() as s:
            try:
                s.bind(("", port))
            except OSError:
                continue
            return port
