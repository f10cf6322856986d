"""Locks between processes, which end with the process that has them."""

import fcntl
from pathlib import Path
from typing import IO


def take(path: Path) -> IO[bytes] | None:
    """The open file that locks `path` until it is closed; None if another process has it.

    On a file system without locks nobody is kept out. Raises OSError if it can't be opened.
    """
    file = path.open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    except OSError:  # without locks
        pass
    return file
