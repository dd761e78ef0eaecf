"""Runs a command that must not outlive the process which started it.

`python -S -I child.py LIFELINE COMMAND...`, started as the leader of a new session. LIFELINE is the number of an
inherited descriptor: the read end of a pipe whose only write end the starter holds, so that end of file means that
the starter is gone, however it went. This process becomes COMMAND (its pid, signals and exit code are COMMAND's own);
a fork of it stays behind as a watchdog. When the starter is gone the watchdog ends COMMAND, and when COMMAND has ended
it ends whatever COMMAND left in its process group. On Linux the kernel also kills COMMAND when the starter's thread
ends, which holds even if the watchdog was killed.

Standard library only: it starts in about 20 ms, once per child.
"""

import contextlib
import os
import select
import signal
import sys
import time
from typing import NoReturn

_GRACE_SECONDS = 5.0
_LOOK_EVERY_SECONDS = 0.2
_PR_SET_PDEATHSIG = 1


def _watch(target: int, lifeline: int) -> NoReturn:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)
    while os.getppid() == target:
        if select.select([lifeline], [], [], _LOOK_EVERY_SECONDS)[0]:
            with contextlib.suppress(ProcessLookupError):  # the kernel was quicker, and its group may still have others
                os.kill(target, signal.SIGTERM)
            give_up_at = time.monotonic() + _GRACE_SECONDS
            while os.getppid() == target and time.monotonic() < give_up_at:
                time.sleep(0.05)
            break
    os.killpg(target, signal.SIGKILL)  # this process too
    os._exit(0)


def _die_with_parent() -> None:
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def main(arguments: list[str]) -> NoReturn:
    """Becomes the command; exits with 127 when it cannot be run."""
    lifeline, command = int(arguments[0]), arguments[1:]
    target = os.getpid()
    if os.fork() == 0:
        _watch(target, lifeline)
    os.close(lifeline)
    _die_with_parent()
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # Python ignores it, and exec would pass that on
    try:
        os.execvp(command[0], command)
    except OSError as error:
        print(f"cannot run {command[0]}: {error.strerror}", file=sys.stderr, flush=True)
        os._exit(127)


if __name__ == "__main__":
    main(sys.argv[1:])
