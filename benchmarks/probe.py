"""Asks /healthz again and again on one connection, in a process of its own: load does not measure itself.

An answer that comes late counts for all who would have asked meanwhile: one long silence is not one slow answer.
"""

from __future__ import annotations

import json
import select
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager

EVERY_SECONDS = 0.01
ASK = b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n"


@contextmanager
def probing(port: int) -> Iterator[list[tuple[float, float]]]:
    """When /healthz answered, by the monotonic clock, and how long it took who asked, in seconds.

    They are there once the context is over.

    Raises:
        RuntimeError: it did not answer, or not with 200.
    """
    answers = list[tuple[float, float]]()
    with tempfile.TemporaryFile("w+") as told:
        probe = subprocess.Popen([sys.executable, __file__, str(port)], stdin=subprocess.PIPE, stdout=told)
        try:
            yield answers
        finally:
            probe.communicate()
        if probe.returncode:
            raise RuntimeError("the probe was not answered")
        told.seek(0)
        for at, took in map(json.loads, told):
            answers += [(at, took - late * EVERY_SECONDS) for late in range(max(1, int(took / EVERY_SECONDS)))]


def main(port: int) -> None:
    """Ask until stdin is closed."""
    with socket.create_connection(("127.0.0.1", port)) as link:
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while not select.select([sys.stdin], [], [], EVERY_SECONDS)[0]:
            begin, answer = time.monotonic(), b""
            link.sendall(ASK)
            while not answer.endswith(b"}") and (more := link.recv(4096)):
                answer += more
            if not answer.startswith(b"HTTP/1.1 200"):
                raise RuntimeError(f"the service is not well: {answer!r}")
            now = time.monotonic()
            print(f"[{now}, {now - begin}]", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
