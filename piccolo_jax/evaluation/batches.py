"""Which texts are encoded together: batches of a few shapes, so that few programs are compiled."""

import dataclasses
from collections.abc import Iterator

import numpy as np

from piccolo_jax.data import packing

_COUNTS = 3  # numbers of rows that a batch of a row length can have
_STEP = 8  # each so many times the one below it
_SHORT = 64  # tokens of a row that a small call may need alone


@dataclasses.dataclass(frozen=True)
class Ladder:
    """The shapes that batches can have.

    `lengths` are those of rows, in rising order; rows of more than `shared` tokens hold one text. A
    full batch has `tokens` tokens on each shard; what remains takes batches of an eighth and of a
    64th of its rows. A token takes 1 + length / `attention` times what it takes without attention.
    """

    lengths: tuple[int, ...]
    shared: int
    tokens: int
    attention: int

    def row_length(self, tokens: int) -> int:
        """The row length at which many texts of so many tokens cost the least."""
        fitting = [n for n in self.lengths if n >= tokens] or [self._beyond(tokens)]
        return min(
            (n for n in fitting if n <= self.shared or n == fitting[0]),
            key=lambda n: self._cost(n) / min(n // max(tokens, 1), packing.num_segments(n)),
        )

    def few_length(self, longest: int, total: int) -> int:
        """The row length for fewer texts than fill a batch: a power of 2, so that these are few.

        Texts that fit into one short row together, by the sum of their tokens, get that.
        """
        least = max(longest, min(total, _SHORT))
        powers = (n for n in self.lengths if n >= least and n & (n - 1) == 0)
        return next(powers, self._beyond(longest))

    def row_counts(self, length: int) -> tuple[int, ...]:
        """Rows that a shard's part of a batch can have, in falling order; 1 is among them."""
        full = max(self.tokens // length, 1)
        return tuple(sorted({max(full // _STEP**k, 1) for k in range(_COUNTS)}, reverse=True))

    def most_programs(self, max_length: int) -> int:
        """The most shapes that texts of up to `max_length` tokens can need."""
        used = {self.row_length(n) for n in range(1, max_length + 1)}
        used |= {self.few_length(n, n) for n in range(1, max_length + 1)}
        return sum(len(self.row_counts(length)) for length in used)

    def _beyond(self, tokens: int) -> int:
        return -(-tokens // self.lengths[-1]) * self.lengths[-1]

    def _cost(self, length: int) -> float:
        return length * (1 + length / self.attention)


@dataclasses.dataclass(frozen=True)
class TextBatch:
    """Texts, by their index among all, and where they lie in a batch of `shape`."""

    members: np.ndarray
    layout: packing.Layout
    shape: packing.Shape

    @property
    def slots(self) -> np.ndarray:
        """Where each text lies in the global grid of (row, segment), flat."""
        row = self.layout.shard * self.shape.rows + self.layout.row
        return row * packing.num_segments(self.shape.length) + self.layout.segment - 1


def plan(lengths: np.ndarray, ladder: Ladder, shards: int) -> Iterator[TextBatch]:
    """Batches of all texts, given their lengths in tokens [n], the longest rows first."""
    row_lengths = _row_lengths(lengths, ladder, shards)
    for length in np.unique(row_lengths)[::-1].tolist():
        members = np.flatnonzero(row_lengths == length)
        packed = packing.plan_layout(lengths[members], length, shards=1)
        order = np.argsort(packed.row, kind="stable")
        start = 0
        for rows in _split(packed.rows_needed, ladder.row_counts(length), shards):
            stop = start + rows * shards
            first, last = np.searchsorted(packed.row[order], (start, stop))
            chosen = order[first:last]
            shard, row = np.divmod(packed.row[chosen] - start, rows)
            layout = packing.Layout(
                shard, row, packed.segment[chosen], packed.start[chosen], packed.slot[chosen],
                rows, 0,
            )  # fmt: skip
            yield TextBatch(members[chosen], layout, packing.Shape(length, rows, 0))
            start = stop


def _row_lengths(lengths: np.ndarray, ladder: Ladder, shards: int) -> np.ndarray:
    """The row length of each text, int64 [n].

    Where the texts of a row length are fewer than fill a batch, they go to rows of few_length:
    together, if they fit into one batch.
    """
    best = {n: ladder.row_length(n) for n in np.unique(lengths).tolist()}
    chosen = np.asarray([best[n] for n in lengths.tolist()], np.int64)
    found, group = np.unique(chosen, return_inverse=True)
    full = ladder.tokens * shards
    few = (np.bincount(group, lengths, len(found)) < full)[group]
    total = int(lengths[few].sum())
    if total <= full:
        chosen[few] = ladder.few_length(int(lengths[few].max(initial=0)), total)
    else:
        chosen[few] = [ladder.few_length(n, total) for n in lengths[few].tolist()]
    return chosen


def _split(rows: int, counts: tuple[int, ...], shards: int) -> Iterator[int]:
    """Rows per shard of each batch: the largest that are at least half full."""
    while rows > 0:
        count = next((n for n in counts if n * shards <= 2 * rows), counts[-1])
        yield count
        rows -= count * shards
