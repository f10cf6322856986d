"""Folders that are written under another name and renamed when whole.

A process holds a lock on what it writes, which ends with the process however that ends. So what a
killed one left can be told from what another is writing, and is removed by the next to come.
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
import socket
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO

_LOCK = "lock"
_FOREIGN_SECONDS = 2 * 24 * 3600  # another machine's lock can't be seen: so long it is left alone


@contextlib.contextmanager
def written_whole(directory: Path) -> Iterator[Path]:
    """Gives a new folder to write to, which becomes `directory` at the end, unless by an error.

    Where another process was faster, its folder stays. Raises OSError.
    """
    lock = None
    while lock is None:  # else another process took the folder for an abandoned one just then
        here = f"{_host()}-{uuid.uuid4().hex[:8]}"
        folder = directory.with_name(f"{directory.name}.partial-{here}")
        folder.mkdir(parents=True)
        try:
            lock = _locked(folder)
        except OSError:
            lock = (folder / _LOCK).open("ab")  # a file system without locks, or a full one
    try:
        with lock:
            yield folder
            (folder / _LOCK).unlink()
            _to_disk(folder)
            try:
                os.rename(folder, directory)
            except OSError:
                if not directory.exists():
                    raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_abandoned(root: Path) -> None:
    """Removes folders below `root` that a process which is no more left half-written."""
    for folder in root.glob("*.partial-*"):
        with contextlib.suppress(OSError):
            if f".partial-{_host()}-" in folder.name and (folder / _LOCK).exists():
                lock = _locked(folder)
                if lock:
                    with lock:
                        shutil.rmtree(folder, ignore_errors=True)
            elif time.time() - _last_change(folder) > _FOREIGN_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)


def _locked(folder: Path) -> IO[bytes] | None:
    """The open lock of a folder; None if another process has it or has removed the folder.

    Raises OSError where files can't be locked.
    """
    try:
        lock = (folder / _LOCK).open("ab")
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.stat(folder / _LOCK)
    except (BlockingIOError, FileNotFoundError):
        lock.close()
        return None
    except OSError:
        lock.close()
        raise
    return lock


def _last_change(folder: Path) -> float:
    return max(p.stat().st_mtime for p in (folder, *folder.iterdir()))


def _host() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def _to_disk(folder: Path) -> None:
    """So that after a power cut, too, a whole name means whole files."""
    for path in (*folder.iterdir(), folder):
        number = os.open(path, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)
