"""The journal of a synthesis: every answer, one line each, on disk before the next step.

Lines are only ever added. A last line that a killed process left half-written is cut off.
"""

import dataclasses
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import pydantic

from piccolo_jax.errors import UserError
from piccolo_jax.synthesis import answers
from piccolo_jax.synthesis.limits import Spending

Phase = Literal["topics", "examples"]
_Natural = Annotated[int, pydantic.Field(ge=0)]


class Record(pydantic.BaseModel):
    """A line of the journal: an answer, or why there was none. The rest is as in answers.Answer."""

    model_config = pydantic.ConfigDict(strict=True)

    phase: Phase
    number: _Natural
    attempt: _Natural  # 0: the first answer; 1, 2: after asking again
    topic: str = ""
    content: str | None = None
    finish_reason: str = ""
    prompt_tokens: _Natural = 0
    completion_tokens: _Natural = 0
    estimated: bool = False
    lost_tokens: _Natural = 0
    problem: str = ""  # why there is no content
    refused: bool = False  # by the endpoint: asking again is of no use


@dataclasses.dataclass
class Progress:
    """What has come of one request and of asking again."""

    attempts: int = 0  # answers so far
    value: answers.Value | None = None
    problem: str = ""  # why there is no value
    content: str = ""  # of the last answer, if there is no value
    topic: str = ""
    refused: bool = False  # by the endpoint, and not to be asked again
    failed: bool = False  # got no answer; asked again in the next run

    @property
    def settled(self) -> bool:
        """Whether there is nothing more to ask."""
        return bool(self.value or self.refused or self.attempts >= answers.MAX_ATTEMPTS)

    def take(self, record: Record) -> None:
        """Adds what a record says."""
        self.topic = record.topic or self.topic
        if record.content is None:
            self.problem, self.refused = record.problem, record.refused
            self.failed = not record.refused
            return
        self.attempts, self.failed = record.attempt + 1, False
        try:
            self.value = answers.parse(record.phase, record.content, record.finish_reason)
            self.problem = self.content = ""
        except answers.InvalidAnswerError as error:
            self.problem, self.content = str(error), record.content


class Journal:
    """The journal of a folder; a file lock keeps other processes from writing to it.

    Raises UserError for a line that is no record, and if another process is writing.
    """

    def __init__(self, path: Path):
        self.path = path
        self.progress: dict[tuple[Phase, int], Progress] = {}
        self.spending = Spending()
        self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._file)
            raise UserError(f"{path}: another process is writing to it; let it end") from None
        try:
            for record in self._read():
                self._take(record)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Gives the journal free."""
        os.close(self._file)

    @property
    def has_answers(self) -> bool:
        """Whether the endpoint has answered any request."""
        return any(progress.attempts for progress in self.progress.values())

    def of(self, phase: Phase, number: int) -> Progress:
        """What has come of a request so far."""
        return self.progress.setdefault((phase, number), Progress())

    def append(self, record: Record) -> Progress:
        """Writes a record and returns what has come of its request."""
        line = record.model_dump_json(exclude_defaults=True).encode() + b"\n"
        while line:
            line = line[os.write(self._file, line) :]
        os.fsync(self._file)
        return self._take(record)

    def _take(self, record: Record) -> Progress:
        progress = self.of(record.phase, record.number)
        progress.take(record)
        self.spending.add(record)
        return progress

    def _read(self) -> Iterator[Record]:
        """The records; cuts off a last line without an end."""
        whole = 0
        with self.path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.endswith(b"\n"):
                    os.ftruncate(self._file, whole)
                    return
                whole += len(line)
                try:
                    yield Record.model_validate_json(line)
                except pydantic.ValidationError as error:
                    reason = error.errors(include_url=False)[0]
                    raise UserError(
                        f"{self.path}:{number}: not a record of this program ({reason['msg']});"
                        " delete the line, and what it answered is asked again"
                    ) from None
