"""What filters ask of a text: its normalised form, length, language and likeness to others."""

import re
import zlib

import datasketch

from piccolo_jax.data.overlap import normalise

_HAN = r"\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_KANA = r"\u3040-\u30ff"
_UNIT = re.compile(rf"[{_HAN}{_KANA}]|[^\W_{_HAN}{_KANA}]+")
_SCRIPTS = {  # of a language's words; other languages are not checked
    "zh": re.compile(rf"[{_HAN}]"),
    "en": re.compile(r"[A-Za-z\u00c0-\u024f]"),
}
_SHINGLE = 3  # characters
_PERMUTATIONS = 128


def units(text: str) -> list[str]:
    """What a length counts: each Chinese (or Japanese) character, each word of other scripts."""
    return _UNIT.findall(text)


def language_share(text: str, language: str) -> float:
    """The share of a text's units, numbers aside, in the script of a language; 1 if not known."""
    script = _SCRIPTS.get(language)
    if script is None:
        return 1.0
    words = [unit for unit in units(text) if not unit.isdecimal()]
    return sum(bool(script.match(word)) for word in words) / len(words) if words else 0.0


def is_checked(language: str) -> bool:
    """Whether language_share() knows the language."""
    return language in _SCRIPTS


def shingles(text: str) -> frozenset[str]:
    """The character trigrams of a text's normalised form (the whole form if it is shorter)."""
    form = normalise(text)
    last = max(len(form) - _SHINGLE, 0)
    return frozenset(form[i : i + _SHINGLE] for i in range(last + 1))


def likeness(first: frozenset[str], second: frozenset[str]) -> float:
    """Jaccard similarity of two texts' shingles."""
    return len(first & second) / len(first | second)


class SeenTexts:
    """Texts so far, to tell what is nearly one: a Jaccard similarity of `threshold` or more.

    Candidates come from MinHash and locality-sensitive hashing (Broder 1997; Indyk and Motwani
    1998) and are compared exactly, so nothing is taken for a duplicate that isn't one.
    """

    def __init__(self, threshold: float):
        self._threshold = threshold
        self._texts: list[str] = []
        # Candidates cost little and those missed stay, so the index takes what is a bit less alike.
        self._index = datasketch.MinHashLSH(
            threshold=min(0.85 * threshold, 0.8), num_perm=_PERMUTATIONS, weights=(0.1, 0.9)
        )

    def find(self, text: str) -> str | None:
        """An earlier text that this one nearly is."""
        own = shingles(text)
        for i in sorted(self._index.query(_minhash(own))):
            if likeness(own, shingles(self._texts[i])) >= self._threshold:
                return self._texts[i]
        return None

    def add(self, text: str) -> None:
        """Adds a text."""
        self._index.insert(len(self._texts), _minhash(shingles(text)))
        self._texts.append(text)


def _minhash(own: frozenset[str]) -> datasketch.MinHash:
    made = datasketch.MinHash(num_perm=_PERMUTATIONS, seed=1, hashfunc=zlib.crc32)
    made.update_batch([shingle.encode() for shingle in own])
    return made
