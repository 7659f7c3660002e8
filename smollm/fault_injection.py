"""Named places where a test can make a run fail. Does nothing unless FAULT is set.

    FAULT=save.weights:kill:2     SIGKILL this process the second time it reaches `save.weights`

Actions: a signal to this process (kill, term, int, hup, usr1), error (OSError EIO), full (OSError
ENOSPC), memory (torch.OutOfMemoryError), sleep (two seconds, for a test that sends a signal at that
moment). The last number counts visits from 1; `3+` means the third and each later one. So a test
can place a fault exactly between two system calls.
"""

import errno
import os
import signal
import time
from collections import Counter

_visits: Counter[str] = Counter()


def point(name: str) -> None:
    """Do what FAULT asks for at the place called `name`.

    Raises:
        OSError, torch.OutOfMemoryError: FAULT asks for it here.
    """
    wanted = os.environ.get("FAULT")
    if not wanted:
        return
    place, action, when = (wanted + ":1").split(":")[:3]
    if place != name:
        return
    _visits[name] += 1
    first, lasting = int(when.rstrip("+")), when.endswith("+")
    if _visits[name] != first and not (lasting and _visits[name] > first):
        return
    if number := getattr(signal, f"SIG{action.upper()}", None):
        os.kill(os.getpid(), number)
    elif action == "sleep":
        time.sleep(2)
    elif action == "memory":
        import torch

        raise torch.OutOfMemoryError(f"fault at {name}")
    else:
        number = errno.ENOSPC if action == "full" else errno.EIO
        raise OSError(number, os.strerror(number), f"fault at {name}")
