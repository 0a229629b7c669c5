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
MAX_FILE_BYTES = 64 * 2**30
MEMORY_VARIABLE = "BURNISH_CHILD_MEMORY_BYTES"


def main() -> None:
    """Bind this process to its supervisor's life, shut the network, limit the memory, then run the pipeline."""
    file_descriptor = int(sys.argv[1])
    die_with_parent()
    if not leave_network():
        print("this system does not let a job leave the network", file=sys.stderr, flush=True)
    limit_memory(int(os.environ[MEMORY_VARIABLE]))
    threading.Thread(target=_watch, args=(file_descriptor,), name="leash", daemon=True).start()
    import_module("worker.pipeline").main(file_descriptor)


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent is gone, however it went."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def leave_network() -> bool:
    """Move into a network namespace with nothing in it; False where the system does not allow that.

    The user namespace that comes with it also takes every privilege over other processes, root's too.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    return any(libc.unshare(flags) == 0 for flags in (CLONE_NEWUSER | CLONE_NEWNET, CLONE_NEWNET))


def limit_memory(memory_bytes: int) -> None:
    """Make an allocation beyond the limit fail here, before it takes the machine down; no core files."""
    for limit, most in ((resource.RLIMIT_DATA, memory_bytes), (resource.RLIMIT_FSIZE, MAX_FILE_BYTES)):
        _, hard = resource.getrlimit(limit)
        allowed = most if hard == resource.RLIM_INFINITY else min(most, hard)  # what the worker may not, it may not
        resource.setrlimit(limit, (allowed, allowed))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _watch(file_descriptor: int) -> None:
    # The supervisor's end is gone: end the whole group, this process included.
    poller = select.poll()
    poller.register(file_descriptor, 0)  # a hang-up is always reported
    poller.poll()
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
