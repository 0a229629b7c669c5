"""The child's first breath: leash and limits are on before any numerical library is loaded.

Run as `python -P -m worker.child <file descriptor>` in the job's private directory.
"""

from __future__ import annotations

import ctypes
import os
import resource
import select
import signal
import sys
import threading
from importlib import import_module

PR_SET_PDEATHSIG = 1
CLONE_NEWUSER = 0x10000000
CLONE_NEWNET = 0x40000000
MEMORY_VARIABLE = "BURNISH_CHILD_MEMORY_BYTES"


def main() -> None:
    """Bind this process to its supervisor's life, shut the network, limit the memory, then run the pipeline."""
    file_descriptor = int(sys.argv[1])
    die_with_parent()
    leave_network()
    limit_memory(int(os.environ[MEMORY_VARIABLE]))
    threading.Thread(target=_watch, args=(file_descriptor,), name="leash", daemon=True).start()
    import_module("worker.pipeline").main(file_descriptor)


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent is gone, however it went."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def leave_network() -> bool:
    """Move into a network namespace with nothing in it; False where the system does not allow that."""
    flags = CLONE_NEWNET if os.geteuid() == 0 else CLONE_NEWUSER | CLONE_NEWNET
    return bool(ctypes.CDLL(None, use_errno=True).unshare(flags) == 0)


def limit_memory(memory_bytes: int) -> None:
    """Make an allocation beyond the limit fail here, before it takes the machine down; no core files."""
    resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _watch(file_descriptor: int) -> None:
    # The supervisor's end is gone: end the whole group, this process included.
    poller = select.poll()
    poller.register(file_descriptor, 0)  # a hang-up is always reported
    poller.poll()
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
