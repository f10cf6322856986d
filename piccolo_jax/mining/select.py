"""The k largest scores of each row, on the host: for CPUs, where XLA's top_k sorts whole rows.

A score and the index of its key are one unsigned number, smaller for a larger score and, of equal
scores, for a smaller index: sorting and merging need nothing else.
"""

import math

import numpy as np

NONE = np.uint64(2**64 - 1)  # behind every pair
_ROOM = 3  # times k, that a row gathers before it forgets


def pack(scores: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """uint64 of float32 scores and the indices (below 2^32 - 1) of their keys, of equal shape.

    -inf becomes NONE.
    """
    bits = (scores + np.float32(0)).view(np.uint32)  # -0 becomes 0
    some_negative = scores.min(initial=0) < 0
    if some_negative:
        falling = np.where(bits >> 31, bits, bits ^ np.uint32(0x7FFFFFFF))
    else:
        falling = bits ^ np.uint32(0x7FFFFFFF)
    packed = falling.astype(np.uint64)
    packed <<= np.uint64(32)
    packed |= indices.astype(np.uint64)
    if some_negative:
        packed[np.isneginf(scores)] = NONE
    return packed


def unpack(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Float32 scores and int64 indices; -inf and -1 for NONE."""
    falling = (packed >> np.uint64(32)).astype(np.uint32)
    bits = np.where(falling >> 31, falling, falling ^ np.uint32(0x7FFFFFFF))
    indices = (packed & np.uint64(0xFFFFFFFF)).astype(np.int64)
    empty = packed == NONE
    scores = np.where(empty, np.float32(-np.inf), bits.view(np.float32))
    return scores, np.where(empty, -1, indices)


def merge(first: np.ndarray, second: np.ndarray, k: int) -> np.ndarray:
    """The k first of two packed arrays [rows, *], sorted."""
    both = np.concatenate((first, second), axis=1)
    both.sort(axis=1)
    return both[:, :k]


def floor(sample: np.ndarray, num_keys: int, k: int) -> np.ndarray | None:
    """Scores [rows, 1] that hardly ever fewer than k of `num_keys` are above, and few more.

    None where the sample tells too little.

       Args:
         sample: float32 [rows, n], scores of keys drawn evenly; is reordered.
    """
    width = sample.shape[1]
    among_best = k * width / num_keys  # of the sample, about as a Poisson variable
    rank = math.ceil(among_best + 4 * math.sqrt(among_best) + 4)  # more than that: 1 in 10^5
    if rank > width // 2:
        return None
    sample.partition(width - rank, axis=1)
    return sample[:, [width - rank]]


class Largest:
    """The k largest scores of each row, of tiles that come by one after another.

    A row keeps what is above its threshold, its k-th largest score when the thresholds were last
    taken; they are taken anew when a row has gathered 3 k. So all but a few of the scores are
    looked at once, while they are in the cache.
    """

    def __init__(self, best: np.ndarray, floor: np.ndarray | None = None):
        """`best`: packed [rows, k], sorted, of earlier tiles; NONE where there was nothing.

        `floor`: scores [rows, 1]; only what is above counts.
        """
        rows, k = best.shape
        self._k = k
        self._kept = np.full((rows, (_ROOM + 1) * k), NONE)
        self._kept[:, :k] = best
        self._count = (best != NONE).sum(axis=1)
        self._threshold = _kth(best)
        if floor is not None:
            self._threshold = np.maximum(self._threshold, floor)

    def add(self, scores: np.ndarray, first_index: int) -> None:
        """Looks at float32 [rows, keys], of consecutive keys from `first_index` on.

        All indices must be above those of earlier calls: of equal scores the earlier ones win.
        """
        rows, width = scores.shape
        place = np.flatnonzero(scores > self._threshold)
        row_starts = np.arange(rows) * width
        before = np.searchsorted(place, row_starts)
        more = np.diff(before, append=len(place))
        self._make_room(int((self._count + more).max(initial=0)))
        packed = pack(scores.ravel()[place], place + np.repeat(first_index - row_starts, more))
        room_starts = np.arange(rows) * self._kept.shape[1]
        room = np.arange(len(place)) + np.repeat(room_starts + self._count - before, more)
        self._kept.ravel()[room] = packed
        self._count += more
        gathered = np.flatnonzero(self._count >= _ROOM * self._k)
        if gathered.size:
            self._forget(gathered)

    def full(self) -> bool:
        """Whether all rows have k."""
        return bool(self._count.min(initial=self._k) >= self._k)

    def best(self) -> np.ndarray:
        """Packed [rows, k], sorted; NONE where a row has seen fewer than k."""
        filled = max(int(self._count.max(initial=0)), self._k)
        return np.sort(self._kept[:, :filled], axis=1)[:, : self._k]

    def _make_room(self, most: int) -> None:
        missing = most - self._kept.shape[1]
        if missing > 0:
            self._kept = np.pad(self._kept, ((0, 0), (0, missing)), constant_values=NONE)

    def _forget(self, rows: np.ndarray) -> None:
        """Keeps the k best of these rows and takes their thresholds from them."""
        k, most = self._k, int(self._count[rows].max())
        kept = np.partition(self._kept[rows, :most], k - 1, axis=1)[:, :k]
        self._kept[rows, :k] = kept
        self._kept[rows, k:most] = NONE
        self._count[rows] = k
        self._threshold[rows] = _kth(kept)


def _kth(packed: np.ndarray) -> np.ndarray:
    """The scores [rows, 1] in the last column: the k-th largest, -inf where there are fewer."""
    return unpack(packed[:, -1:])[0]
