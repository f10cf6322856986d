"""Which of a query's neighbours are negatives, and which of those are drawn."""

import collections
import dataclasses

import numpy as np

from piccolo_jax.data.overlap import normalise
from piccolo_jax.errors import UserError
from piccolo_jax.mining.corpus import Corpus, digest
from piccolo_jax.mining.queries import Query
from piccolo_jax.mining.search import Neighbours

# Why a candidate is removed; the first that applies counts.
RULES = (
    "positive by id",
    "positive by text",
    "near-duplicate of a positive",
    "the query itself",
    "duplicate of a nearer candidate",
    "max positive ratio",
    "margin",
    "max score",
)
KEPT = -1


@dataclasses.dataclass(frozen=True)
class Window:
    """Ranks that candidates come from (from 1, both inclusive), and how many of them are drawn."""

    first: int
    last: int
    count: int

    @property
    def size(self) -> int:
        """Ranks in the window."""
        return self.last - self.first + 1


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a candidate's score must stay below; None: no such limit.

    max_positive_ratio: r times the positive's score s (NV-Retriever's TopK-PercPos, arXiv
    2407.15831), s - (1 - r)|s| where that is negative; margin: the positive's score less this;
    max_score: this. Of several positives the one with the lowest score counts.
    """

    max_positive_ratio: float | None = None
    margin: float | None = None
    max_score: float | None = None

    def reasons(self, scores: np.ndarray, positive: np.ndarray) -> list[np.ndarray]:
        """Whether each score [..., candidates] is too high, by limit; positive scores [..., 1]."""
        never = np.zeros(scores.shape, bool)
        ratio, margin, most = self.max_positive_ratio, self.margin, self.max_score
        return [
            never if ratio is None else scores >= positive - (1 - ratio) * np.abs(positive),
            never if margin is None else scores >= positive - margin,
            never if most is None else scores >= most,
        ]


def parse_window(ranks: str, count: int) -> Window:
    """The window of `FIRST:LAST`. Raises UserError if it is none, or holds fewer than `count`."""
    parts = ranks.split(":")
    if len(parts) != 2 or not all(part.isdecimal() for part in parts):
        raise UserError(f"--ranks={ranks}: must be FIRST:LAST, e.g. 50:100 (1 is the nearest)")
    window = Window(int(parts[0]), int(parts[1]), count)
    if not 1 <= window.first <= window.last:
        raise UserError(f"--ranks={ranks}: FIRST must be 1 or more, and at most LAST")
    if not 1 <= count <= window.size:
        raise UserError(
            f"--count={count}: must be from 1 to {window.size}, the ranks in --ranks={ranks}"
        )
    return window


@dataclasses.dataclass(frozen=True)
class Mined:
    """What was found for each query.

    reasons: int8 [queries, window], a place in RULES or KEPT; drawn: places in the window of the
    negatives that were drawn, by rank, for each query.
    """

    window: Window
    neighbours: Neighbours  # those of the window
    reasons: np.ndarray
    drawn: list[np.ndarray]

    @property
    def short(self) -> np.ndarray:
        """Queries that have fewer negatives than asked for."""
        counts = np.asarray([len(places) for places in self.drawn])
        return np.flatnonzero(counts < self.window.count)


def mine(
    queries: list[Query],
    corpus: Corpus,
    found: Neighbours,
    positive_scores: np.ndarray,
    window: Window,
    limits: Limits,
    seed: int,
) -> Mined:
    """Screens the window of each query and draws from what is left, at random without replacement.

    Ranks are those of the search over the whole corpus, positives included. Queries of the same
    text share their positives. What is drawn for a query depends on the seed and its place alone.

    Args:
      found: at least `window.last` neighbours of each query.
      positive_scores: float32 [queries], the lowest of each query's positives.
    """
    part = slice(window.first - 1, window.last)
    found = Neighbours(found.scores[:, part], found.indices[:, part])
    exact, normal = _positives(queries)
    reasons = np.full(found.indices.shape, KEPT, np.int8)
    drawn = []
    for i, query in enumerate(queries):
        rows = found.indices[i]
        normals = corpus.normal[rows]
        own = digest(normalise(query.text))
        _, firsts = np.unique(normals, return_index=True)
        repeated = np.ones(len(rows), bool)
        repeated[firsts] = False
        checks = [
            np.isin(rows, query.rows),
            np.isin(corpus.exact[rows], exact[own]),
            np.isin(normals, normal[own]),
            normals == own,
            repeated,
            *limits.reasons(found.scores[i], positive_scores[i]),
        ]
        for number, removed in reversed(list(enumerate(checks))):
            reasons[i, removed] = number
        left = np.flatnonzero(reasons[i] == KEPT)
        rng = np.random.default_rng((seed, i))
        drawn.append(np.sort(rng.choice(left, min(window.count, len(left)), replace=False)))
    return Mined(window, found, reasons, drawn)


def _positives(queries: list[Query]) -> tuple[dict[int, np.ndarray], dict[int, np.ndarray]]:
    """Digests of the positives' texts and normalised texts, by that of the query's."""
    exact: dict[int, set[int]] = collections.defaultdict(set)
    normal: dict[int, set[int]] = collections.defaultdict(set)
    for query in queries:
        own = digest(normalise(query.text))
        for text in query.positives:
            exact[own].add(digest(text))
            normal[own].add(digest(normalise(text)))
    return _arrays(exact), _arrays(normal)


def _arrays(sets: dict[int, set[int]]) -> dict[int, np.ndarray]:
    return {key: np.asarray(sorted(values), np.uint64) for key, values in sets.items()}
