"""Quality filters: which of the answered examples become training rows, and why others don't."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator

from piccolo_jax.data.overlap import normalise
from piccolo_jax.synthesis import wording


@dataclasses.dataclass(frozen=True)
class Row:
    """A training row and where it comes from."""

    number: int
    language: str
    topic: str
    query: str
    positive: str
    negative: str

    @property
    def documents(self) -> tuple[str, str]:
        """Both documents."""
        return self.positive, self.negative


@dataclasses.dataclass(frozen=True)
class Limits:
    """What rows must keep to. Lengths are in Chinese characters, or words of other scripts."""

    query_length: tuple[int, int] = (1, 200)
    document_length: tuple[int, int] = (10, 2000)
    language_share: float = 0.5  # of a document in the language asked for; a query: half of it
    leak_length: int = 3  # a query so long must not occur in a document word by word
    near_duplicate: float = 0.8  # Jaccard similarity of character trigrams


@dataclasses.dataclass(frozen=True)
class Dropped:
    """A row that a filter dropped."""

    row: Row
    rule: str  # one of RULES
    reason: str


def _length(row: Row, limits: Limits) -> str:
    for name, text, (least, most) in (
        ("query", row.query, limits.query_length),
        ("positive", row.positive, limits.document_length),
        ("negative", row.negative, limits.document_length),
    ):
        found = len(wording.units(text))
        if not least <= found <= most:
            return f"the {name} has {found} words, not {least} to {most}"
    return ""


def _language(row: Row, limits: Limits) -> str:
    for name, text, least in (
        ("query", row.query, limits.language_share / 2),
        ("positive", row.positive, limits.language_share),
        ("negative", row.negative, limits.language_share),
    ):
        share = wording.language_share(text, row.language)
        if share < least:
            return f"{share:.0%} of the {name} is in {row.language}, less than {least:.0%}"
    return ""


def _same(row: Row, limits: Limits) -> str:
    query, positive, negative = map(normalise, (row.query, *row.documents))
    if query in (positive, negative):
        return f"the query is the {'positive' if query == positive else 'negative'}"
    if positive == negative:
        return "positive and negative are the same"
    alike = wording.likeness(*map(wording.shingles, row.documents))
    if alike >= limits.near_duplicate:
        return f"positive and negative are nearly the same ({alike:.2f})"
    return ""


def _leak(row: Row, limits: Limits) -> str:
    query = normalise(row.query)
    if len(wording.units(row.query)) < limits.leak_length:
        return ""
    for name, text in (("positive", row.positive), ("negative", row.negative)):
        if query in normalise(text):
            return f"the {name} repeats the query"
    return ""


_CHECKS: dict[str, Callable[[Row, Limits], str]] = {
    "length": _length, "language": _language, "same": _same, "leak": _leak,
}  # fmt: skip
# In this order; a row is counted for the first that drops it. The last needs a model.
RULES = (*_CHECKS, "near-duplicate", "consistency")


def apply(rows: Iterable[Row], limits: Limits) -> Iterator[Row | Dropped]:
    """Each row, or why it is dropped. Of near-duplicates the first stays."""
    queries, positives = (wording.SeenTexts(limits.near_duplicate) for _ in range(2))
    for row in rows:
        reasons = ((rule, check(row, limits)) for rule, check in _CHECKS.items())
        rule, reason = next(((rule, why) for rule, why in reasons if why), ("", ""))
        if not rule:
            for name, seen, text in (
                ("query", queries, row.query), ("positive", positives, row.positive),
            ):  # fmt: skip
                if (like := seen.find(text)) is not None:
                    rule, reason = "near-duplicate", f"{name} like that of another: {like[:60]}"
                    break
        if rule:
            yield Dropped(row, rule, reason)
            continue
        queries.add(row.query)
        positives.add(row.positive)
        yield row
