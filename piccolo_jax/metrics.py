"""What a run reports: JSON lines, messages and tables, written by process 0 only."""

import contextlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import tqdm


def say(message: str) -> None:
    """A line on standard error, above the progress bar."""
    if jax.process_index() == 0:
        tqdm.tqdm.write(message, file=sys.stderr)


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Text columns: the first to the left, the others to the right."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for row in cells:
        first, *others = (
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join([first, *others]).rstrip())
    return "\n".join(lines)


def hardware() -> dict[str, Any]:
    """What the run computes on, as in metrics.jsonl."""
    return {
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
    }


class JsonLines:
    """Appends objects to a file, one a line, each with a `step`.

    Opening drops lines of later steps than `last_step`, which a resumed run makes anew, and a line
    that a killed process left half-written. `kept` are the lines that stay.
    """

    def __init__(self, path: Path, last_step: int):
        self._writes = jax.process_index() == 0
        self.path = path
        self.kept = [line for line in read(path) if line["step"] <= last_step]
        if self._writes and path.exists():
            partial = path.with_name(path.name + ".partial")
            partial.write_text("".join(map(_line, self.kept)), encoding="utf-8")
            os.replace(partial, path)

    def write(self, values: dict[str, Any]) -> None:
        """Adds one object."""
        if self._writes:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(_line(values))


def read(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a file of JSON lines with a step; empty if there is no file."""
    values = []
    if path.exists():
        for line in path.read_bytes().split(b"\n"):
            with contextlib.suppress(ValueError):  # half a line, or half a character at its end
                values.append(json.loads(line))
    return [v for v in values if isinstance(v, dict) and isinstance(v.get("step"), int)]


def _line(values: dict[str, Any]) -> str:
    return json.dumps(values, ensure_ascii=False) + "\n"
