"""The passages that are searched: a JSONL file that stays on disk, or texts in memory."""

import codecs
import collections
import dataclasses
import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tqdm

from piccolo_jax.data import formats
from piccolo_jax.data.containers import NoRow, compression_of
from piccolo_jax.data.overlap import normalise
from piccolo_jax.errors import UserError

Texts = Sequence[str]


def digest(text: str) -> int:
    """64 bits that stand for a text."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


@dataclasses.dataclass(frozen=True)
class Corpus:
    """n passages.

    texts: what is encoded, `title + " " + text`; lengths: in characters, int32 [n]; exact, normal:
    digests of the texts and of their normalised forms, uint64 [n]; index: rows of the ids asked
    for; unusable: places and reasons of passages that are left out.
    """

    source: str
    texts: Texts
    lengths: np.ndarray
    exact: np.ndarray
    normal: np.ndarray
    index: dict[str, int] = dataclasses.field(default_factory=dict)
    unusable: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.texts)

    def fingerprint(self) -> str:
        """Of all texts, in their order."""
        return hashlib.sha256(self.exact.tobytes() + self.lengths.tobytes()).hexdigest()


def of_texts(texts: Iterable[str], source: str) -> Corpus:
    """The distinct ones of some texts, in the order of their first occurrence.

    Raises UserError if there are none.
    """
    distinct = list(dict.fromkeys(texts))
    if not distinct:
        raise UserError(f"{source}: holds no passages; name a corpus by --corpus")
    return Corpus(
        source,
        distinct,
        np.asarray([len(text) for text in distinct], np.int32),
        np.asarray([digest(text) for text in distinct], np.uint64),
        np.asarray([digest(normalise(text)) for text in distinct], np.uint64),
    )


def read(path: Path, wanted: collections.abc.Container[str] = (), progress: bool = True) -> Corpus:
    """The corpus of a file or directory with rows `{id, title, text}` or `{text}`.

    Of JSON lines only where they begin is kept in memory, 28 bytes a passage; of other kinds of
    files, and compressed ones, the texts. `wanted`: the ids for `index` (`id`, `_id` or `docid`).
    Passages without text, or with what is no text, are left out. Raises UserError for broken lines,
    ids that occur twice, and a file without passages.
    """
    texts: list[str] = []
    offsets, lengths = array("q"), array("i")
    exact, normal = array("Q"), array("Q")
    index: dict[str, int] = {}
    unusable: list[str] = []
    stays = _is_plain_jsonl(path)
    for place, offset, row in _rows_on_disk(path, progress) if stays else _rows(path, progress):
        if isinstance(row, NoRow):
            unusable.append(f"{place}: {row.reason}")
            continue
        name = row.get("id", row.get("_id", row.get("docid")))
        name = str(name) if isinstance(name, int) else name
        if name is not None and not isinstance(name, str):
            raise UserError(f"{place}: the id must be a text or a whole number")
        try:
            text = _passage(row)
        except ValueError as reason:
            unusable.append(f"{place}: {reason}")
            continue
        if name is not None and name in wanted:
            if name in index:
                raise UserError(f"{place}: id {name!r} occurs twice; ids must differ")
            index[name] = len(lengths)
        if stays:
            offsets.append(offset)
        else:
            texts.append(text)
        lengths.append(len(text))
        exact.append(digest(text))
        normal.append(digest(normalise(text)))
    if not lengths:
        first = f"; the first: {unusable[0]}" if unusable else ""
        raise UserError(f"{path}: holds no passages, rows {{id, title, text}} or {{text}}{first}")
    return Corpus(
        str(path),
        _FileTexts(path, np.frombuffer(offsets, np.int64)) if stays else texts,
        np.frombuffer(lengths, np.int32),
        np.frombuffer(exact, np.uint64),
        np.frombuffer(normal, np.uint64),
        index,
        tuple(unusable),
    )


class _FileTexts(Sequence[str]):
    """The passages of a JSONL file, read when asked for."""

    def __init__(self, path: Path, offsets: np.ndarray):
        self._path, self._offsets = path, offsets
        self._file = path.open("rb")

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        self._file.seek(self._offsets[index])
        try:
            return _passage(_row(self._file.readline(), str(self._path)))
        except ValueError:
            raise UserError(f"{self._path}: was changed while it was read") from None


_Placed = Iterator[tuple[str, int, dict[str, Any] | NoRow]]  # (place, where it begins, row)


def _is_plain_jsonl(path: Path) -> bool:
    """Whether lines can be found again by where they begin."""
    is_jsonl = path.suffix.lower() in (".jsonl", ".json", ".ndjson")
    try:
        return is_jsonl and path.is_file() and not compression_of(path)
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror})") from None


def _rows_on_disk(path: Path, progress: bool) -> _Placed:
    with _bar(path, progress) as bar:
        for number, (offset, line) in enumerate(_lines(path), 1):
            bar.update(len(line))
            if line.strip():
                place = f"{path}:{number}"
                yield place, offset, _row(line, place)


def _rows(path: Path, progress: bool) -> _Placed:
    rows = formats.open_files(str(path))
    doing = f"reading {path.name}"
    for place, row in tqdm.tqdm(rows, doing, unit=" rows", leave=False, disable=not progress):
        if isinstance(row, NoRow) and row.damaged:
            raise UserError(f"{place}: {row.reason}")
        yield place, 0, row


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines and where they begin; a byte order mark at the beginning is skipped."""
    try:
        with path.open("rb") as file:
            mark = file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8
            offset = file.seek(len(codecs.BOM_UTF8) if mark else 0)
            for line in file:
                yield offset, line
                offset += len(line)
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror})") from None


def _bar(path: Path, progress: bool) -> tqdm.tqdm:
    total = path.stat().st_size if path.is_file() else None
    return tqdm.tqdm(
        total=total, desc=f"reading {path.name}", unit="B", unit_scale=True, leave=False,
        disable=not progress,
    )  # fmt: skip


def _row(line: bytes, place: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: broken JSON or not UTF-8 ({error}); mend or delete it") from None
    if not isinstance(row, dict):
        raise UserError(f"{place}: not a JSON object; write one object per line")
    return row


def _passage(row: dict[str, Any]) -> str:
    """`title + " " + text`; ValueError saying why there is none."""
    title, text = row.get("title") or "", row.get("text")
    if not isinstance(text, str) or not isinstance(title, str):
        raise ValueError("no `text`, or it (or `title`) is not a text")
    passage = f"{title} {text}".strip()
    if not passage:
        raise ValueError("the text is empty")
    try:
        passage.encode()
    except UnicodeEncodeError:
        raise ValueError("the text holds a lone surrogate, which is no character") from None
    return passage
