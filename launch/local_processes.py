"""Trains with several processes on this machine, each with CPU devices of its own.

    python launch/local_processes.py --processes=2 --devices=4 -- --config=FILE --workdir=DIR

What follows `--` goes to every process. The exit code is that of the first process that failed; the
others have then 90 seconds to end by themselves. SIGTERM is passed on to all of them.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
from types import FrameType

_GRACE_SECONDS = 90  # more than JAX takes to end those that stay


def main() -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, usage=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--devices", type=int, default=4, help="of each process")
    parser.add_argument("--module", default="piccolo_jax.train", help="what python -m runs")
    parser.add_argument("arguments", nargs="*", help="of the module")
    args = parser.parse_args()
    address = f"localhost:{_free_port()}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", args.module, *args.arguments],
            env=_environment(address, args.processes, i, args.devices),
        )
        for i in range(args.processes)
    ]

    def pass_on(number: int, _: FrameType | None) -> None:
        for process in processes:
            process.send_signal(number)

    signal.signal(signal.SIGTERM, pass_on)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to all
    return _wait(processes)


def _environment(address: str, processes: int, index: int, devices: int) -> dict[str, str]:
    count = f"--xla_force_host_platform_device_count={devices}"
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {count}",  # of two the last counts
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": str(processes),
        "JAX_PROCESS_ID": str(index),
    }


def _wait(processes: list[subprocess.Popen[bytes]]) -> int:
    failed, deadline = 0, float("inf")
    while True:
        codes = [process.poll() for process in processes]
        if not failed and any(codes):
            failed = next(code for code in codes if code)
            deadline = time.monotonic() + _GRACE_SECONDS
        if None not in codes:
            return failed if failed >= 0 else 128 - failed
        if time.monotonic() > deadline:
            for process in processes:
                process.kill()
        time.sleep(0.05)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return int(free.getsockname()[1])


if __name__ == "__main__":
    sys.exit(main())
