"""The queries to mine negatives for, and what answers them."""

import dataclasses
import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from piccolo_jax.data import formats
from piccolo_jax.errors import UserError
from piccolo_jax.mining import corpus as corpus_lib
from piccolo_jax.mining.corpus import Corpus

# Columns that tell a training file from a corpus.
_TRAINING_COLUMNS = ("text_pos", "pos", "positive", "positives", "positive_passages")


@dataclasses.dataclass(frozen=True)
class Query:
    """A query, the texts that answer it, and rows of the corpus that do (known by their ids)."""

    text: str
    positives: tuple[str, ...]
    rows: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Queries and corpus; `notes` say what of them was left out."""

    queries: list[Query]
    corpus: Corpus
    notes: tuple[str, ...]


def read(path: str, corpus_path: str, split: str, progress: bool = True) -> Inputs:
    """Queries of a training file (any format that training reads) or a BEIR directory.

    Without a corpus: that of the directory, or the passages of the training file. Raises UserError
    for files that can't be used, relevance judgements of unknown passages, or no queries.
    """
    folder = Path(path)
    if folder.is_dir() and list(folder.glob("queries*.jsonl")):
        return _read_beir(folder, Path(corpus_path or folder), split, progress)
    queries, ids, passages, notes = _read_training(path)
    if corpus_path:
        wanted = {passage for of_query in ids for passage in of_query}
        corpus = _read_corpus(Path(corpus_path), wanted, progress)
        for n, own in enumerate(ids):
            known = tuple(corpus.index[i] for i in own if i in corpus.index)
            queries[n] = dataclasses.replace(queries[n], rows=known)
    else:
        corpus = corpus_lib.of_texts(passages, path)
    return Inputs(queries, corpus, (*notes, *_left_out(corpus)))


def _read_training(
    path: str,
) -> tuple[list[Query], list[tuple[str, ...]], dict[str, None], list[str]]:
    """Queries, the ids of what answers each, all passages, and notes."""
    source = formats.open_source(path, "retrieval")
    queries, ids, rejected = [], [], []
    passages: dict[str, None] = {}
    answers = source.layout.columns[1]
    rows: Iterable[tuple[str, Any]] = itertools.repeat(("", {}))
    if answers == "positive_passages":
        rows = source.rows
    for item, (_, row) in zip(source, rows, strict=False):
        if isinstance(item, formats.Rejected):
            rejected.append(f"{item.place}: {item.reason}")
        elif isinstance(item, formats.RetrievalExample):
            queries.append(Query(item.query, item.positives))
            ids.append(_docids(row.get(answers)))
            passages.update(dict.fromkeys((*item.positives, *item.negatives)))
    if not queries:
        first = f"; the first: {rejected[0]}" if rejected else ""
        raise UserError(f"{path}: no usable row{first}")
    return queries, ids, passages, _note(rejected, "rows of the queries")


def _docids(passages: Any) -> tuple[str, ...]:
    """The ids of Tevatron's passages: a list of objects, or an object of lists."""
    if isinstance(passages, dict):
        ids = passages.get("docid")
    else:
        ids = [passage.get("docid") for passage in passages or ()]
    return tuple(str(i) for i in ids if isinstance(i, str | int)) if isinstance(ids, list) else ()


def _read_corpus(path: Path, wanted: set[str], progress: bool) -> Corpus:
    if path.is_dir() and (path / "corpus.jsonl").exists():
        path = path / "corpus.jsonl"
    if not path.exists():
        raise UserError(f"--corpus={path}: no such file")
    rows = (row for _, row in formats.open_files(str(path)) if isinstance(row, dict))
    first = next(rows, {})
    if any(name in first for name in _TRAINING_COLUMNS):
        return corpus_lib.of_texts(_read_training(str(path))[2], str(path))
    return corpus_lib.read(path, wanted, progress)


def _read_beir(folder: Path, corpus_path: Path, split: str, progress: bool) -> Inputs:
    qrels_path = _one_of(folder, split, (f"qrels.{split}.tsv", f"qrels/{split}.tsv"))
    queries_path = _one_of(folder, split, (f"queries.{split}.jsonl", "queries.jsonl"))
    relevant = _read_qrels(qrels_path)
    wanted = {passage for passages in relevant.values() for passage in passages}
    corpus = _read_corpus(corpus_path, wanted, progress)
    for passages in relevant.values():
        for passage, place in passages.items():
            if passage not in corpus.index:
                raise UserError(
                    f"{place}: passage {passage!r} is not in {corpus.source}, or has no text there"
                )
    queries, without = [], 0
    texts = _read_queries(queries_path)
    for name, text in texts.items():
        if name in relevant:
            rows = tuple(corpus.index[passage] for passage in relevant[name])
            queries.append(Query(text, tuple(dict.fromkeys(corpus.texts[r] for r in rows)), rows))
        else:
            without += 1
    for name, passages in relevant.items():
        if name not in texts:
            place = next(iter(passages.values()))
            raise UserError(f"{place}: query {name!r} is not in {queries_path}")
    if not queries:
        raise UserError(f"{qrels_path}: no query has a relevant passage")
    notes = [f"{without} queries of {queries_path} have no relevant passage in {qrels_path.name},"
             " and are left out"] if without else []  # fmt: skip
    return Inputs(queries, corpus, (*notes, *_left_out(corpus)))


def _one_of(folder: Path, split: str, names: tuple[str, ...]) -> Path:
    for name in names:
        if (folder / name).exists():
            return folder / name
    found = sorted(p.name for p in (*folder.glob("q*"), *folder.glob("qrels/*")))
    raise UserError(
        f"{folder}: has neither {' nor '.join(names)}; --split names another split than {split!r}"
        f" (there are {', '.join(found)})"
    )


def _read_qrels(path: Path) -> dict[str, dict[str, str]]:
    """Places of the judgements above 0, by passage id, by query id."""
    relevant: dict[str, dict[str, str]] = {}
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: can't be read ({error})") from None
    for number, line in enumerate(lines, 1):
        parts = line.split("\t") if "\t" in line else line.split()
        if not parts:
            continue
        if len(parts) == 4:  # of TREC: query, iteration, passage, score
            parts = [parts[0], *parts[2:]]
        score = _number(parts[-1])
        if score is None and number == 1:
            continue  # the header
        if len(parts) != 3 or score is None:
            raise UserError(f"{path}:{number}: must be QUERY-ID, CORPUS-ID, SCORE")
        if score > 0:
            relevant.setdefault(parts[0], {})[parts[1]] = f"{path}:{number}"
    return relevant


def _read_queries(path: Path) -> dict[str, str]:
    texts: dict[str, str] = {}
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: can't be read ({error})") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            name, text = row.get("id", row.get("_id")), row["text"]
            if not isinstance(name, str | int) or not isinstance(text, str) or not text.strip():
                raise ValueError("id and text must be texts, not empty")
            text.encode()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path}:{number}: must be an object with `id` and `text` ({error})"
            ) from None
        if str(name) in texts:
            raise UserError(f"{path}:{number}: id {name!r} occurs twice; ids must differ")
        texts[str(name)] = text
    return texts


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _left_out(corpus: Corpus) -> list[str]:
    return _note(corpus.unusable, "passages of the corpus")


def _note(rejected: list[str] | tuple[str, ...], what: str) -> list[str]:
    if not rejected:
        return []
    return [f"{len(rejected)} {what} are left out, the first: {rejected[0]}"]
