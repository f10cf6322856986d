"""Distinct texts of a dataset, tokenised once each, in about 100 bytes of memory a text."""

import hashlib
from array import array
from collections.abc import Callable, Sequence

import numpy as np

from piccolo_jax.data.store import TextColumn
from piccolo_jax.data.tokenizer import Tokenizer


class DigestTable:
    """Numbers distinct 16-byte digests from 0, in their order of arrival.

    A hash table with open addressing: `_slots` holds numbers, -1 where free, and is at most half
    full. It takes 32 to 64 bytes a digest, where a dict of bytes takes more than 120.
    """

    def __init__(self) -> None:
        self._count = 0
        self._digests = np.zeros((2**12, 2), np.uint64)
        self._slots = np.full(2 * len(self._digests), -1, np.int32)

    def __len__(self) -> int:
        return self._count

    def add(self, digests: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """Each digest's number, int32 [n], and the indices into `digests` of the new numbers."""
        first: dict[bytes, int] = {}
        for i, digest in enumerate(digests):
            first.setdefault(digest, i)
        keys = np.frombuffer(b"".join(first), np.uint64).reshape(-1, 2)
        numbers = self._find(keys)
        new = np.flatnonzero(numbers < 0)
        numbers[new] = np.arange(self._count, self._count + len(new))
        self._insert(keys[new])
        by_digest = dict(zip(first, numbers.tolist(), strict=True))
        indices = np.fromiter(first.values(), np.int64, len(first))[new]
        return np.fromiter((by_digest[d] for d in digests), np.int32, len(digests)), indices

    def _find(self, keys: np.ndarray) -> np.ndarray:
        """Numbers of distinct digests, -1 for those that aren't there."""
        found = np.full(len(keys), -1, np.int32)
        slot = self._home(keys)
        todo = np.arange(len(keys))
        while todo.size:
            held = self._slots[slot[todo]]
            todo, held = todo[held >= 0], held[held >= 0]
            same = (self._digests[held] == keys[todo]).all(axis=1)
            found[todo[same]] = held[same]
            todo = todo[~same]
            slot[todo] = (slot[todo] + 1) % len(self._slots)
        return found

    def _insert(self, keys: np.ndarray) -> None:
        """Gives distinct digests that aren't there the next numbers."""
        begin, self._count = self._count, self._count + len(keys)
        if self._count > len(self._digests):
            size = 2 ** int(self._count - 1).bit_length()
            self._digests = np.concatenate(
                [self._digests[:begin], np.zeros((size - begin, 2), np.uint64)]
            )
            self._slots = np.full(2 * size, -1, np.int32)
            for start in range(0, begin, 2**20):
                stop = min(start + 2**20, begin)
                self._place(self._digests[start:stop], np.arange(start, stop, dtype=np.int32))
        self._digests[begin : self._count] = keys
        self._place(keys, np.arange(begin, self._count, dtype=np.int32))

    def _place(self, keys: np.ndarray, numbers: np.ndarray) -> None:
        slot = self._home(keys)
        todo = np.arange(len(keys))
        while todo.size:
            free = todo[self._slots[slot[todo]] < 0]
            self._slots[slot[free]] = numbers[free]  # of several at one slot one stays
            todo = todo[self._slots[slot[todo]] != numbers[todo]]
            slot[todo] = (slot[todo] + 1) % len(self._slots)

    def _home(self, keys: np.ndarray) -> np.ndarray:
        return (keys[:, 0] % np.uint64(len(self._slots))).astype(np.int64)


class TextTable:
    """Gives texts ids, tokenising each distinct one once and passing its tokens to `write`.

    Texts are the same if their tokens are: what the model can't tell apart is one text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompts: dict[str, str],
        query_max_length: int,
        max_length: int,
        write: Callable[[bytes], object] = lambda tokens: None,
    ):
        self._tokenizer, self._prompts, self._write = tokenizer, prompts, write
        self._limits = {True: query_max_length, False: max_length}
        self._by_text, self._by_tokens = DigestTable(), DigestTable()
        self._ids, self._cut = array("i"), array("b")  # of each distinct text
        self._lengths = array("i")

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each id, int32 [ids]."""
        return np.array(self._lengths, np.int32)

    @property
    def truncated(self) -> int:
        """Distinct texts (with prompt and limit) that were cut."""
        return self._cut.count(1)

    @property
    def tokenised(self) -> int:
        """Distinct texts (with prompt and limit)."""
        return len(self._by_text)

    def add(self, texts: Sequence[str], column: TextColumn) -> tuple[np.ndarray, np.ndarray]:
        """Each text's id, int32 [n], and whether it was cut, bool [n]."""
        if not texts:
            return np.zeros(0, np.int32), np.zeros(0, bool)
        prompt, limit = self._prompts[column.prompt], self._limits[column.is_query]
        keys = [_digest(f"{limit} {prompt}{text}".encode()) for text in texts]
        numbers, new = self._by_text.add(keys)
        encoded, cut = self._tokenizer.encode([prompt + texts[i] for i in new], limit)
        records = [tokens.tobytes() for tokens in encoded]
        ids, new_ids = self._by_tokens.add([_digest(record) for record in records])
        for i in new_ids.tolist():
            self._lengths.append(len(encoded[i]))
            self._write(records[i])
        self._ids.frombytes(ids.tobytes())
        self._cut.extend(cut)
        of_text, was_cut = np.frombuffer(self._ids, np.int32), np.frombuffer(self._cut, np.bool_)
        return of_text[numbers], was_cut[numbers]


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()
