"""Rows of retrieval and reranking sets, checked as in `rows`."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from piccolo_jax.errors import UserError
from piccolo_jax.evaluation.rows import Data, rows_of, text_in, texts_in

_GAIN = re.compile(r"-?\d{1,9}")  # pytrec_eval takes no long ones
_LIMITED_CORPUS = 10  # documents kept per query of a limited retrieval set, beside the relevant


def read_reranking(path: Path, limit: int = 0) -> Data:
    """{query, positive, negative}: a query's documents are ranked among each other."""
    data = Data(candidates={})
    number: dict[str, str] = {}
    for n, (place, row) in enumerate(rows_of(path)):
        if limit and n == limit:
            break
        positives, negatives = (texts_in(row, place, name) for name in ("positive", "negative"))
        if not positives:
            raise UserError(f"{place}: positive is empty; a query needs a relevant document")
        documents = list(dict.fromkeys([*positives, *negatives]))
        for text in documents:
            number.setdefault(text, f"d{len(number)}")
        query = f"q{n}"
        data.queries[query] = text_in(row, place, "query")
        data.relevant[query] = {
            number[text]: int(text in positives) for text in documents
        }  # what is both is positive
        assert data.candidates is not None
        data.candidates[query] = [number[text] for text in documents]
    data.documents.update({key: ("", text) for text, key in number.items()})
    return data


def read_passages(path: Path, limit: int = 0) -> Data:
    """Retrieval from a training file, {text, text_pos, text_neg}: among all its passages."""
    data = Data()
    number: dict[str, str] = {}
    for n, (place, row) in enumerate(rows_of(path)):
        passages = [texts_in(row, place, "text_pos"), texts_in(row, place, "text_neg", default=[])]
        if not passages[0]:
            raise UserError(f"{place}: text_pos is empty; a query needs a relevant passage")
        for text in (*passages[0], *passages[1]):
            number.setdefault(text, f"d{len(number)}")
        if limit and n >= _LIMITED_CORPUS * limit:
            break
        if limit and n >= limit:
            continue
        data.queries[f"q{n}"] = text_in(row, place, "text")
        data.relevant[f"q{n}"] = {number[text]: 1 for text in passages[0]}
    data.documents.update({key: ("", text) for text, key in number.items()})
    return data


def read_retrieval(corpus: Path, queries: Path, qrels: Path, limit: int = 0) -> Data:
    """A BEIR folder: {id, title, text}, {id, text}, and lines QUERY-ID, CORPUS-ID, SCORE.

    With a limit: that many queries, and of the documents the relevant ones and the first ten times
    as many.
    """
    documents = {key: _document(row, place) for key, place, row in _by_id(corpus)}
    texts = {key: text_in(row, place, "text") for key, place, row in _by_id(queries)}
    relevant: dict[str, dict[str, int]] = {}
    for place, query, document, gain in _judgements(qrels):
        if query not in texts:
            raise UserError(f"{place}: query {query!r} is not in {queries.name}")
        if document not in documents:
            raise UserError(f"{place}: document {document!r} is not in {corpus.name}")
        relevant.setdefault(query, {})[document] = gain
    used = [key for key in texts if any(gain > 0 for gain in relevant.get(key, {}).values())]
    used = used[: limit or None]
    if not used:
        raise UserError(f"{qrels}: no query of {queries.name} has a document of a score above 0")
    relevant = {key: relevant[key] for key in used}
    if limit:
        judged = {document for gains in relevant.values() for document in gains}
        first = list(documents)[: _LIMITED_CORPUS * limit]
        documents = {key: documents[key] for key in documents if key in judged or key in set(first)}
    return Data(queries={key: texts[key] for key in used}, documents=documents, relevant=relevant)


def _judgements(path: Path) -> Iterator[tuple[str, str, str, int]]:
    """(place, query, document, gain) of a qrels file, with or without a header."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: can't be read ({error})") from None
    for number, line in enumerate(lines, 1):
        cells = line.rstrip("\r").split("\t")
        gain = cells[-1].strip()
        if not line.strip() or (number == 1 and not gain.lstrip("-").isdecimal()):
            continue
        if len(cells) != 3 or not _GAIN.fullmatch(gain):
            raise UserError(
                f"{path}:{number}: must be QUERY-ID, CORPUS-ID and a whole number of at most 9"
                " digits, by tabs"
            )
        yield f"{path}:{number}", cells[0], cells[1], int(gain)


def _by_id(path: Path) -> Iterator[tuple[str, str, dict[str, Any]]]:
    seen: dict[str, str] = {}
    for place, row in rows_of(path):
        key = row.get("id", row.get("_id"))
        if not isinstance(key, str) or not key:
            raise UserError(f"{place}: id is {key!r}; write a text")
        text_in(row, place, "id" if "id" in row else "_id")
        if key in seen:
            raise UserError(f"{place}: id {key!r} is also at {seen[key]}; ids must be unique")
        seen[key] = place
        yield key, place, row


def _document(row: dict[str, Any], place: str) -> tuple[str, str]:
    """Title and text, of which one may be absent or empty."""
    if not row.get("title"):
        return "", text_in(row, place, "text")
    title = text_in(row, place, "title")
    return title, text_in(row, place, "text") if row.get("text") else ""
