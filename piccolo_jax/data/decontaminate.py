"""Drops training rows whose texts occur in evaluation sets, and says which and why.

What counts on the evaluation side is every text of its rows but label texts, which training shares
by design: queries, both texts of a pair, classified texts, and positives and negatives
(`passages="none"` leaves these out). Of a directory in BEIR layout the queries count; its corpus,
which training often shares too, only with `passages="corpus"`. Splits named train are left out of
directories and patterns.

On the training side a row is dropped if any of its texts, label texts aside, is one of those;
data/overlap.py says which texts are the same.
"""

import collections
import contextlib
import dataclasses
import glob
import itertools
import json
import os.path
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tqdm

from piccolo_jax.config import DecontaminateConfig
from piccolo_jax.data import formats
from piccolo_jax.data.overlap import EvaluationTexts, Match
from piccolo_jax.errors import UnusableDatasetError, UserError

REPORT = "dropped.jsonl"  # in the folder of a prepared dataset: one object per dropped row
_RULES_VERSION = 1  # of what is dropped, part of the prepared datasets' fingerprints
_ROWS_AT_ONCE = 1024
_SHOWN = 200  # characters of a dropped text
_TRAIN = re.compile(r"(^|[._-])train([._-]|$)", re.IGNORECASE)
_QUERIES = re.compile(r"queries.*\.jsonl(\.gz|\.zst)?")
_BEIR = re.compile(r"(corpus|queries(\..*)?)\.jsonl(\.gz|\.zst)?")  # one of a BEIR directory
_PART_OF_BEIR = re.compile(r"(queries|corpus|qrels)([._-]|$)")
_ASKED = (
    "text", "text_pair", "sentence", "sentences", "sentence1", "sentence2", "sent1", "sent2",
    "query", "question", "anchor", "premise", "hypothesis", "first", "second", "zh", "en",
)  # fmt: skip
_PASSAGES = re.compile(
    r"(text_(pos|neg)|(pos|neg)|(positive|negative)(s|_passages)?|passages?|documents?)(_\d+)?"
)


class Decontaminator:
    """The evaluation sets of a config. Their texts are read when the first row needs them.

    Raises UserError for paths that can't be used.
    """

    def __init__(self, config: DecontaminateConfig, quiet: bool = False):
        self._config, self._quiet = config, quiet
        files = [f for path in config.paths for f in _evaluation_files(path, config.passages)]
        self._digests = {formats.digest_of(file): file for file in files}
        self._texts: EvaluationTexts | None = None

    @property
    def description(self) -> dict[str, Any]:
        """All that decides what is dropped."""
        options = dataclasses.asdict(self._config)
        del options["paths"]
        return options | {"rules": _RULES_VERSION, "content": sorted(self._digests)}

    def check(self, path: str, digests: Sequence[str]) -> None:
        """Raises UserError if files of a training dataset (their digests) are evaluation sets."""
        for digest in digests:
            if digest in self._digests:
                raise UserError(
                    f"{path}: is trained on, but one of its files is {self._digests[digest]}, of"
                    " the evaluation sets of data.decontaminate.paths; leave one of them out"
                )

    def keep(
        self, path: str, items: formats.Placed, report: "Report"
    ) -> Iterator[formats.Example | formats.Rejected]:
        """The examples that stay, and rejected rows; `report` gets the others.

        Raises UnusableDatasetError if no example stays.
        """
        texts = self._evaluation_texts()
        kept = 0
        while chunk := list(itertools.islice(items, _ROWS_AT_ONCE)):
            fields = [_texts_of(example) for _, example in chunk]
            found = iter(texts.find([text for row in fields for _, text in row]))
            for (place, example), row in zip(chunk, fields, strict=True):
                matches = [(name, text, next(found)) for name, text in row]
                hits = [(name, text, match) for name, text, match in matches if match]
                if hits:
                    report.add(place, *max(hits, key=lambda hit: hit[2].strength))
                else:
                    kept += not isinstance(example, formats.Rejected)
                    yield example
        report.summarise()
        if not kept and report.count:
            raise UnusableDatasetError(
                f"{path}: all its {report.count} usable rows occur in the evaluation sets of"
                " data.decontaminate.paths; leave out the dataset (data.skip_unusable leaves out"
                " all such) or the evaluation set"
            )

    def _evaluation_texts(self) -> EvaluationTexts:
        if self._texts is None:
            index = EvaluationTexts(self._config.ngram_size, self._config.ngram_threshold)
            bar = tqdm.tqdm(
                desc="reading evaluation sets", unit=" texts", disable=self._quiet, leave=False
            )
            with contextlib.closing(bar):
                for path in self._config.paths:
                    before = len(index)
                    for place, field, text in _evaluation_texts(path, self._config.passages):
                        index.add(text, place, field)
                        bar.update()
                    if len(index) == before:
                        raise UserError(f"{path}: holds no text to look for; check the path")
            self._texts = index
        return self._texts


class Report:
    """Rows dropped from one dataset: each in a file, if any; `summary` is for the manifest."""

    def __init__(self, path: Path | None = None):
        self._file = path and path.open("w", encoding="utf-8", errors="backslashreplace")
        self._by: collections.Counter[tuple[str, str, str]] = collections.Counter()
        self.count = 0
        self.summary: dict[str, Any] = {"rows": 0, "by": []}

    def add(self, place: str, field: str, text: str, match: Match) -> None:
        """One row: where it is, which of its texts occurs, and where that occurs."""
        self.count += 1
        row = {
            "place": place, "field": field, "text": text[:_SHOWN], "rule": match.rule,
            "overlap": round(match.overlap, 4), "evaluation": match.place,
            "evaluation_field": match.field,
        }  # fmt: skip
        if self._file:
            self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self._by[match.place.rpartition(":")[0], match.field, match.rule] += 1

    def summarise(self) -> None:
        """Brings the summary up to date."""
        self.summary["rows"] = self.count
        self.summary["by"] = [
            {"evaluation": file, "field": name, "rule": rule, "rows": rows}
            for (file, name, rule), rows in self._by.most_common()
        ]

    def close(self) -> None:
        """Ends the file."""
        if self._file:
            self._file.close()


def _texts_of(example: formats.Example | formats.Rejected) -> list[tuple[str, str]]:
    """(name, text) of the texts of a training row that are compared: all but label texts."""
    match example:
        case formats.RetrievalExample(query, positives, negatives):
            named = [("positive", text) for text in positives]
            return [("query", query), *named, *(("negative", text) for text in negatives)]
        case formats.SimilarityExample(first, second):
            return [("first", first), ("second", second)]
        case formats.ClassificationExample(text):
            return [("text", text)]
    return []


def _evaluation_files(path: str, passages: str) -> list[Path]:
    """The files of an evaluation set whose texts count, or decide which do."""
    files = []
    for place in _places(path):
        if place.is_dir():
            files += [*_queries(place), *_qrels(place), *_corpus(place, passages)]
        else:
            files.append(place)
    return files


def _evaluation_texts(path: str, passages: str) -> Iterator[tuple[str, str, str]]:
    """(place, field, text) of all texts that count of an evaluation set."""
    for place in _places(path):
        if not place.is_dir():
            yield from _texts_of_rows(place, passages)
            continue
        judged = _judged_queries(place)
        for file in _queries(place):
            for where, row in formats.file_rows(file):
                # queries.SPLIT.jsonl are of one split, queries.jsonl of all.
                of_all = file.name.startswith("queries.jsonl")
                if judged is None or not of_all or _id(row) in judged:
                    yield from _members(where, "query", row.get("text"))
        for file in _corpus(place, passages):
            for where, row in formats.file_rows(file):
                yield from _members(where, "passage", row)


def _places(path: str) -> list[Path]:
    """The files and BEIR directories that a path, pattern or directory names, in order."""
    if os.path.exists(path):
        found = [Path(path)]
    else:
        names = sorted(glob.glob(path, recursive=True))
        found = [Path(name) for name in names if not _TRAIN.search(os.path.basename(name))]
    if not found:
        raise UserError(
            f"{path}: no such evaluation set; give a data file, a directory, or a pattern"
        )
    places = [place for one in found for place in (_below(one) if one.is_dir() else [one])]
    for file in (one for one in found if not one.is_dir()):
        formats.open_files(str(file))  # raises UserError for what is no data file
    if not places:
        raise UserError(f"{path}: holds no evaluation set (train splits are left out)")
    return places


def _below(directory: Path) -> list[Path]:
    is_beir = any(_BEIR.fullmatch(child.name) for child in directory.iterdir())
    if is_beir and not _queries(directory):
        raise UserError(f"{directory}: has no queries.SPLIT.jsonl but of train")
    places = [directory] if is_beir else []
    for child in sorted(directory.iterdir()):
        name = child.name
        if name.startswith((".", "cache-")) or _TRAIN.search(name):
            continue
        if is_beir and _PART_OF_BEIR.match(name):
            continue
        if child.is_dir():
            places += _below(child)
        elif formats.is_data_file(child) and not _is_metadata(child):
            places.append(child)
    return places


def _is_metadata(file: Path) -> bool:
    """Whether a JSON file is one object, as what describes a dataset is."""
    if file.suffix.lower() != ".json":
        return False
    try:
        content = file.read_text("utf-8-sig")
        return isinstance(json.loads(content), dict) and not _has_texts(content)
    except (OSError, ValueError, RecursionError):
        return False  # lines of JSON, or broken: reading it will say so


def _has_texts(content: str) -> bool:
    """Whether an object could be the only row of JSON lines."""
    return "\n" not in content.strip() and any(map(_is_known, json.loads(content)))


def _is_known(column: str) -> bool:
    return column in _ASKED or bool(_PASSAGES.fullmatch(column))


def _queries(directory: Path) -> list[Path]:
    files = (child for child in sorted(directory.iterdir()) if _QUERIES.fullmatch(child.name))
    return [file for file in files if not _TRAIN.search(file.name)]


def _qrels(directory: Path) -> list[Path]:
    files = sorted([*directory.glob("qrels*.tsv"), *directory.glob("qrels/*.tsv")])
    return [file for file in files if not _TRAIN.search(file.name)]


def _corpus(directory: Path, passages: str) -> list[Path]:
    files = sorted(directory.glob("corpus.jsonl*")) if passages == "corpus" else []
    return [file for file in files if _BEIR.fullmatch(file.name)]


def _judged_queries(directory: Path) -> set[str] | None:
    """Ids in the qrels of all splits but train; None where there are no qrels."""
    judged: set[str] = set()
    files = _qrels(directory)
    for file in files:
        try:
            judged.update(line.split("\t")[0] for line in file.read_text("utf-8").splitlines())
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{file}: can't be read ({error})") from None
    return judged if files else None


def _id(row: dict[str, Any]) -> str:
    return str(row.get("id", row.get("_id")))


def _texts_of_rows(file: Path, passages: str) -> Iterator[tuple[str, str, str]]:
    for place, row in formats.file_rows(file):
        asked = [name for name in row if name in _ASKED]
        listed = [name for name in row if _PASSAGES.fullmatch(name)]
        if not asked and not listed:
            raise UserError(
                f"{place}: columns {', '.join(map(str, row))[:200]} hold no text that is known;"
                f" rename one to {', '.join(_ASKED)}"
            )
        if passages == "none" or _is_labelled(row):
            listed = []
        for name in (*asked, *listed):
            yield from _members(place, name, row[name])
        if isinstance(row.get("title"), str):  # a passage with its title, as it is encoded
            yield from _members(place, "title text", row)


def _is_labelled(row: dict[str, Any]) -> bool:
    """Whether what would be passages of a row are label texts."""
    labelled = "text_pos" in row and isinstance(row.get("label"), int | str)
    return row.get("type") == "cls_contrast" or labelled


def _members(place: str, field: str, value: Any) -> Iterator[tuple[str, str, str]]:
    """The texts of a value: a text, a passage {title, text}, or a list of these; null has none."""
    if isinstance(value, list):
        for item in value:
            yield from _members(place, field, item)
    elif isinstance(value, dict):
        text, title = value.get("text"), value.get("title")
        if isinstance(title, str) and title and isinstance(text, str):
            yield place, field, f"{title} {text}"
        yield from _members(place, field, text)
    elif isinstance(value, str):
        if value.strip():
            yield place, field, value
    elif value is not None:
        raise UserError(f"{place}: {field} is {type(value).__name__}, not text; correct it")
