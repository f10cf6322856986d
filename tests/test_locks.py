import fcntl
import subprocess
import sys

import pytest

from piccolo_jax import locks


def test_one_process_has_a_lock_until_it_closes_it_or_ends(tmp_path):
    path = tmp_path / "lock"
    first = locks.take(path)
    assert first is not None
    assert locks.take(path) is None
    first.close()
    holding = (
        "import pathlib, sys\nfrom piccolo_jax import locks\n"
        f"kept = locks.take(pathlib.Path({str(path)!r}))\n"
        "print('held', flush=True)\nsys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", holding], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert other.stdout.readline() == b"held\n"
    assert locks.take(path) is None
    other.kill()
    other.communicate()
    locks.take(path).close()


def test_what_cannot_be_locked_keeps_nobody_out(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    locks.take(tmp_path / "lock").close()
    with pytest.raises(FileNotFoundError):
        locks.take(tmp_path / "none" / "lock")
