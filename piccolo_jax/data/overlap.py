"""Which texts occur in a set of evaluation texts: the same but for writing, or by shared n-grams.

Two texts are the same if `normalise` makes them so: NFKC (full and half width, ligatures, circled
digits), case folded, without white space, punctuation and invisible characters. Traditional and
simplified characters stay different.

For n-grams a text is a sequence of units: a character of a script without spaces (Chinese,
Japanese, Thai, ...) or a word of any other. The overlap of a text with an evaluation text is the
share of the latter's distinct n-grams that are in the former, as PaLM (arXiv 2204.02311, section 8)
and Tulu 3 (arXiv 2411.15124) count it, both with n = 8.

Memory grows with the evaluation texts alone: about 40 bytes a text, and 12 a distinct n-gram of it.
N-grams of more than _COMMON evaluation texts say nothing and are left out, so that a text is
compared with a bounded number of others.
"""

import dataclasses
import hashlib
import itertools
import re
import unicodedata
import zlib
from array import array
from collections.abc import Iterator, Sequence

import numpy as np

_COMMON = 100
_UNITS_AT_ONCE = 2**16  # of which n-grams are looked up together
_SPACELESS = (
    r"\u0e00-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao, Tibetan, Burmese, Khmer
    r"\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Kana, Han
)
_UNIT = re.compile(rf"[{_SPACELESS}]|[^\W_{_SPACELESS}]+")


class _Removed(dict[int, int | None]):
    """For str.translate: None for code points of white space, punctuation and control, filled as
    they occur.
    """

    def __missing__(self, code: int) -> int | None:
        removed = unicodedata.category(chr(code))[0] in "PZC"
        self[code] = None if removed else code
        return self[code]


_REMOVED = _Removed()


def normalise(text: str) -> str:
    """What two texts that are the same but for writing have in common.

    A text of nothing but punctuation keeps it: `?!` is not the same as `...`.
    """
    folded = _folded(text)
    return folded.translate(_REMOVED) or "".join(folded.split())


def _folded(text: str) -> str:
    # Case folding can undo NFKC, and NFKC case folding.
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())


@dataclasses.dataclass(frozen=True, slots=True)
class Match:
    """An evaluation text that a text repeats."""

    rule: str  # "same text" or "n-grams"
    overlap: float  # share of the evaluation text's n-grams; 1 for the same text
    place: str  # of the evaluation text: FILE:LINE or FILE:row N
    field: str

    @property
    def strength(self) -> tuple[bool, float]:
        """Orders matches: the same text before n-grams."""
        return self.rule == "same text", self.overlap


class EvaluationTexts:
    """An index of evaluation texts: add() them all, then find().

    threshold: the least overlap that counts; None: no n-grams.
    """

    def __init__(self, ngram_size: int = 8, threshold: float | None = None):
        self._n, self._threshold = ngram_size, threshold
        self._prefixes: dict[str, int] = {}  # of places, which end with a number
        self._fields: dict[str, int] = {}
        self._keys, self._numbers = array("Q"), array("Q")
        self._prefix_of, self._field_of = array("I"), array("H")
        self._pending: list[tuple[int, str]] = []
        self._grams: list[np.ndarray] = []
        self._owners: list[np.ndarray] = []
        self._ready = False

    def __len__(self) -> int:
        return len(self._keys)

    def add(self, text: str, place: str, field: str) -> None:
        """One evaluation text; of those that are the same the first one is named as a match."""
        prefix, number = re.fullmatch(r"(.*?)(\d*)", place, re.DOTALL).groups()  # type: ignore[union-attr]
        if self._threshold is not None:
            self._pending.append((len(self._keys), text))
            if len(self._pending) == 1024:
                self._take_pending()
        self._keys.append(_key(text))
        self._numbers.append(int(number or 0))
        self._prefix_of.append(self._prefixes.setdefault(prefix, len(self._prefixes)))
        self._field_of.append(self._fields.setdefault(field, len(self._fields)))

    def find(self, texts: Sequence[str]) -> list[Match | None]:
        """For each text the evaluation text that it repeats: the same, or that of most overlap."""
        if not self._ready:
            self._build()
        found: list[Match | None] = [None] * len(texts)
        if not len(self) or not texts:
            return found
        keys = np.fromiter(map(_key, texts), np.uint64, len(texts))
        at = np.minimum(np.searchsorted(self._sorted, keys), len(self._sorted) - 1)
        same = self._sorted[at] == keys
        for i in np.flatnonzero(same).tolist():
            found[i] = self._match("same text", 1.0, int(self._first[at[i]]))
        if self._threshold is not None:
            others = np.flatnonzero(~same)
            for i, text, overlap in self._overlaps(texts, others, self._threshold):
                found[i] = self._match("n-grams", overlap, text)
        return found

    def _match(self, rule: str, overlap: float, text: int) -> Match:
        number = self._numbers[text] or ""
        place = f"{list(self._prefixes)[self._prefix_of[text]]}{number}"
        return Match(rule, overlap, place, list(self._fields)[self._field_of[text]])

    def _build(self) -> None:
        self._ready = True
        keys = np.frombuffer(self._keys, np.uint64) if self._keys else np.zeros(0, np.uint64)
        self._sorted, self._first = np.unique(keys, return_index=True)
        if self._threshold is None:
            return
        self._take_pending()
        grams = np.concatenate([np.zeros(0, np.uint64), *self._grams])
        owners = np.concatenate([np.zeros(0, np.int32), *self._owners])
        self._grams, self._owners = [], []
        distinct = np.zeros(len(self), bool)
        distinct[self._first] = True
        grams, owners = grams[distinct[owners]], owners[distinct[owners]]
        order = np.argsort(grams, kind="stable")
        grams, owners = grams[order], owners[order]
        begins = np.flatnonzero(np.diff(grams, prepend=~grams[:1]))
        times = np.diff(begins, append=len(grams))
        often = np.repeat(times, times)
        self._gram, self._owner = grams[often <= _COMMON], owners[often <= _COMMON]
        self._grams_of = np.bincount(self._owner, minlength=len(self))

    def _take_pending(self) -> None:
        numbers = np.array([number for number, _ in self._pending], np.int32)
        grams, owner = ngrams([text for _, text in self._pending], self._n)
        self._grams.append(grams)
        self._owners.append(numbers[owner])
        self._pending = []

    def _overlaps(
        self, texts: Sequence[str], candidates: np.ndarray, threshold: float
    ) -> Iterator[tuple[int, int, float]]:
        """(i, evaluation text, overlap) of each candidate text whose overlap is large enough."""
        for part in _parts(texts, candidates.tolist()):
            grams, owner = ngrams([texts[i] for i in part], self._n)
            left = np.searchsorted(self._gram, grams, "left")
            counts = np.searchsorted(self._gram, grams, "right") - left
            owner, left, counts = owner[counts > 0], left[counts > 0], counts[counts > 0]
            within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
            evaluated = self._owner[np.repeat(left, counts) + within].astype(np.int64)
            pairs, shared = np.unique(
                np.repeat(owner, counts) * len(self) + evaluated, return_counts=True
            )
            text, evaluated = np.divmod(pairs, len(self))
            overlap = shared / self._grams_of[evaluated]
            # The largest last, so that it stays.
            enough = np.flatnonzero(overlap >= threshold)
            for j in enough[np.argsort(overlap[enough], kind="stable")].tolist():
                yield part[int(text[j])], int(evaluated[j]), float(overlap[j])


def ngrams(texts: Sequence[str], n: int) -> tuple[np.ndarray, np.ndarray]:
    """Hashes, uint64 [m], of each text's distinct n-grams of units, and whose they are, [m]."""
    units = [_UNIT.findall(_folded(text)) for text in texts]
    owner = np.repeat(np.arange(len(texts)), [len(u) for u in units])
    values = np.fromiter(
        (zlib.crc32(unit.encode(errors="surrogatepass")) for u in units for unit in u),
        np.uint64, len(owner),
    )  # fmt: skip
    if len(values) < n:
        return np.zeros(0, np.uint64), np.zeros(0, np.int64)
    values = _mixed(values)
    hashes = np.zeros(len(values) - n + 1, np.uint64)
    for i in range(n):
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + values[i : len(values) - n + 1 + i]
    whole = owner[: len(hashes)] == owner[n - 1 :]
    hashes, owner = _mixed(hashes[whole]), owner[: len(hashes)][whole]
    order = np.lexsort((hashes, owner))
    hashes, owner = hashes[order], owner[order]
    first = np.ones(len(hashes), bool)
    first[1:] = (hashes[1:] != hashes[:-1]) | (owner[1:] != owner[:-1])
    return hashes[first], owner[first]


def _mixed(values: np.ndarray) -> np.ndarray:
    """Each value's bits, spread over all 64 (splitmix64, Steele, Lea and Flood 2014)."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _parts(texts: Sequence[str], indices: list[int]) -> Iterator[list[int]]:
    """The indices in turn, in groups of texts of about _UNITS_AT_ONCE characters."""
    sizes = itertools.accumulate(len(texts[i]) for i in indices)
    pairs = zip(indices, sizes, strict=True)
    for _, group in itertools.groupby(pairs, key=lambda pair: pair[1] // _UNITS_AT_ONCE):
        yield [i for i, _ in group]


def _key(text: str) -> int:
    data = normalise(text).encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest())
