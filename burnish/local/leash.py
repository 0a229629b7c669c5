"""Runs one command on a leash: when the holder of the leash dies, the command and all its descendants die too.

Started as a script, `python leash.py HOLD LOCK STOP GRACE IDENTITY COMMAND...`, once for each child of local mode:

HOLD is the read end of a pipe whose write end only the holder has: its end-of-file is the holder's death. LOCK is
the directory's lock, kept until the last descendant is gone, or -1. STOP is the signal that asks the command to end
and GRACE the seconds it has for it, once the leash itself gets SIGTERM. IDENTITY is who runs the command: `same`,
`namespace` (root becomes an ordinary user inside a user namespace of its own) or the name of a user.

The leash adopts orphans (PR_SET_CHILD_SUBREAPER), so a descendant in another process group or session does not
escape; and should the leash be killed, the kernel kills its command (PR_SET_PDEATHSIG). It has one thread and needs
the standard library alone.
"""

from __future__ import annotations

import ctypes
import os
import pwd
import select
import signal
import sys
import time
from typing import NoReturn

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
CLONE_NEWUSER = 0x10000000

_libc = ctypes.CDLL(None, use_errno=True)


def main(arguments: list[str]) -> int:
    """Run the command to its end and return its exit status, 128 + n if signal n killed it."""
    hold, lock, stop, grace = int(arguments[0]), int(arguments[1]), int(arguments[2]), float(arguments[3])
    identity, command = arguments[4], arguments[5:]
    for inherited in (hold, lock):
        if inherited >= 0:
            os.set_inheritable(inherited, False)
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    awake, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGTERM, lambda *_: None)

    child = _start(command, identity)
    try:
        return _watch(child, hold, awake, stop, grace)
    finally:
        _kill_descendants()


def _start(command: list[str], identity: str) -> int:
    """Fork, become `identity`, and execute `command` in a process group of its own; return its process id."""
    leash = os.getpid()
    child = os.fork()
    if child:
        return child
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setpgid(0, 0)
        _become(identity)
        _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # last: a change of identity clears it
        if os.getppid() != leash:
            os._exit(1)
        os.execvp(command[0], command)
    except OSError as error:
        os.write(2, f"{command[0]} cannot be started: {error}\n".encode())
    finally:
        os._exit(127)


def _become(identity: str) -> None:
    if identity == "same":
        return
    if identity == "namespace":
        user, group = os.geteuid(), os.getegid()
        if _libc.unshare(CLONE_NEWUSER) != 0:
            error = ctypes.get_errno()
            raise OSError(error, f"no user namespace: {os.strerror(error)}")
        for name, text in (("setgroups", "deny"), ("uid_map", f"1000 {user} 1"), ("gid_map", f"1000 {group} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
        return
    account = pwd.getpwnam(identity)
    os.setgroups([])
    os.setgid(account.pw_gid)
    os.setuid(account.pw_uid)


def _watch(child: int, hold: int, awake: int, stop: int, grace: float) -> int:
    """Wait for the command's end, the holder's death, or the end of the grace that SIGTERM opens."""
    deadline: float | None = None
    poll = select.poll()
    poll.register(hold, select.POLLIN | select.POLLHUP)
    poll.register(awake, select.POLLIN)
    while True:
        wait_ms = None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000
        ready = {descriptor for descriptor, _ in poll.poll(wait_ms)}
        if hold in ready:
            return 128 + signal.SIGKILL
        if awake in ready and signal.SIGTERM in os.read(awake, 4096) and deadline is None:
            deadline = time.monotonic() + grace
            os.kill(child, stop)
        status = _reap(child)
        if status is not None:
            return status
        if deadline is not None and time.monotonic() >= deadline:
            return 128 + signal.SIGKILL


def _reap(child: int) -> int | None:
    """Collect every descendant that has ended; return the command's exit status if it is among them."""
    status: int | None = None
    while True:
        try:
            ended, how = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return status
        if ended == 0:
            return status
        if ended == child:
            code = os.waitstatus_to_exitcode(how)
            status = code if code >= 0 else 128 - code


def _kill_descendants() -> None:
    """Kill generation after generation: whoever loses its parent becomes a child of this process."""
    while True:
        for child in _children():
            os.kill(child, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def _children() -> list[int]:
    """This process's children, ended ones included, so none of these numbers can belong to anyone else."""
    own, found = os.getpid(), []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat") as file:
                    parent = int(file.read().rpartition(")")[2].split()[1])
            except OSError:
                continue
            if parent == own:
                found.append(int(name))
    return found


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


def run() -> NoReturn:
    sys.exit(main(sys.argv[1:]))


if __name__ == "__main__":
    run()
