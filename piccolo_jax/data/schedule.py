"""Which dataset and which of its rows step t trains on: a pure function of (seed, step, weights).

Nothing depends on earlier steps, on the number of processes or on the length of the run, so a
resumed run asks for its next step and gets it.
"""

import dataclasses
import functools
import heapq
from collections.abc import Callable

import numpy as np

# Separate streams of random numbers, so that no two uses share one.
_PHASES, _SHUFFLE, _DRAW, _HEADS, _USED = range(5)
_EPOCHS_KEPT = 2  # of each dataset, in memory: the current one and the next


def used_rows(seed: int, dataset: int, size: int, total: int) -> np.ndarray:
    """Ids, int64 [size], increasing, of the rows used of the dataset with that number."""
    rng = np.random.default_rng((seed, _USED, dataset))
    return np.sort(rng.choice(total, size, replace=False, shuffle=False))


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Datasets take turns by weight; each is read in epochs of its own, shuffled anew.

    The k-th batch of a dataset with share p has the virtual time (k + phase) / p, with a random
    phase in [0, 1); steps follow virtual time (stride scheduling, Waldspurger and Weihl 1995).
    Equal weights are a round robin.
    """

    seed: int
    batch_sizes: tuple[int, ...]  # rows of a batch of each dataset, at most those it uses
    sizes: tuple[int, ...]  # rows that are used of each dataset
    weights: tuple[float, ...]  # shares of the steps, relative to each other
    totals: tuple[int, ...] = ()  # rows that each dataset has; empty: all are used

    @functools.cached_property
    def _shares(self) -> np.ndarray:
        weights = np.asarray(self.weights, np.float64)
        return weights / weights.sum()

    @functools.cached_property
    def _phases(self) -> np.ndarray:
        return np.random.default_rng((self.seed, _PHASES)).random(len(self.sizes))

    def at(self, step: int) -> tuple[int, int]:
        """(dataset, k): step `step`, counted from 0, is the k-th batch of that dataset."""
        _, dataset, use = self._queue(step)[0]
        return dataset, use

    def uses(self, steps: int) -> list[int]:
        """How many of the first `steps` steps each dataset gets."""
        return [use for _, _, use in sorted(self._queue(steps), key=lambda turn: turn[1])]

    def epochs(self, steps: int) -> list[float]:
        """Passes over the used rows of each dataset that the first `steps` steps make."""
        columns = zip(self.uses(steps), self.batch_sizes, self.sizes, strict=True)
        return [uses * batch_size / size for uses, batch_size, size in columns]

    def _queue(self, step: int) -> list[tuple[float, int, int]]:
        """Heap of each dataset's next turn (virtual time, dataset, k) when step `step` begins."""
        shares, phases = self._shares, self._phases
        # Between t - D and t + D turns of D datasets lie before virtual time t, so the turns before
        # this time are all over, and fewer than 3 D remain to be counted.
        begin = step - 2 * len(shares)
        over = np.maximum(np.ceil(begin * shares - phases), 0).astype(np.int64)
        queue = [((k + phases[d]) / shares[d], d, k) for d, k in enumerate(over.tolist())]
        heapq.heapify(queue)
        for _ in range(step - int(over.sum())):
            _, d, k = queue[0]
            heapq.heapreplace(queue, ((k + 1 + phases[d]) / shares[d], d, k + 1))
        return queue

    def rows(self, dataset: int, use: int) -> np.ndarray:
        """Row ids, int64 [batch size], of the dataset's batch number `use`; no row twice.

        Batches follow each other through the epochs: what doesn't fill a batch at the end of one
        begins the next batch.
        """
        batch_size = self.batch_sizes[dataset]
        position = np.arange(use * batch_size, (use + 1) * batch_size)
        epoch, place = np.divmod(position, self.sizes[dataset])
        rows = np.empty(batch_size, np.int64)
        for e in np.unique(epoch):
            rows[epoch == e] = self._orders[dataset](int(e))[place[epoch == e]]
        used = self._used[dataset]
        return rows if used is None else used[rows]

    def rng(self, dataset: int, use: int) -> np.random.Generator:
        """Random numbers for what a batch draws: positives, negatives, other labels."""
        return np.random.default_rng((self.seed, _DRAW, dataset, use))

    @functools.cached_property
    def _orders(self) -> list[Callable[[int], np.ndarray]]:
        """epoch -> order of the rows in it, for each dataset; the latest ones are kept."""
        orders = (functools.partial(self._order, dataset) for dataset in range(len(self.sizes)))
        return [functools.lru_cache(_EPOCHS_KEPT)(order) for order in orders]

    @functools.cached_property
    def _used(self) -> list[np.ndarray | None]:
        """Row ids, increasing, of the rows used of each dataset; None: all."""
        used: list[np.ndarray | None] = [None] * len(self.sizes)
        for dataset, (size, total) in enumerate(zip(self.sizes, self.totals, strict=False)):
            if size < total:
                used[dataset] = used_rows(self.seed, dataset, size, total)
        return used

    def _order(self, dataset: int, epoch: int) -> np.ndarray:
        """All rows in the order of an epoch: its head, the others as shuffled, its tail.

        The head completes the batch that the epoch before has begun; the tail begins the batch that
        the next epoch's head completes, and is the last rows of the shuffle that are in neither
        head.

        There are enough such rows. Of n rows in batches of B, let h and h' be the lengths of the
        heads of epochs e and e + 1, and t = B - h' that of the tail between. Heads of the same
        order (see _head) lie in each other, so n - max(h, h') rows are free, and h + t <= n, since
        both are of epoch e, and h' + t = B <= n. If the order changes, a multiple of B lies in
        (e (n - B), (e + 1) (n - B)], so h <= n - B, and n - h - h' >= B - h' = t rows are free.
        """
        size = self.sizes[dataset]
        rng = np.random.default_rng((self.seed, _SHUFFLE, dataset, epoch))
        shuffled = rng.permutation(np.arange(size, dtype=np.int32))
        tail_length = (epoch + 1) * size % self.batch_sizes[dataset]
        head = self._head(dataset, epoch)
        if not tail_length and not len(head):
            return shuffled
        kept = np.ones(size, bool)  # for the middle
        kept[head] = False
        free = kept.copy()
        free[self._head(dataset, epoch + 1)] = False
        candidates = shuffled[free[shuffled]]
        tail = candidates[len(candidates) - tail_length :]
        kept[tail] = False
        return np.concatenate([head, shuffled[kept[shuffled]], tail]).astype(np.int32)

    def _head(self, dataset: int, epoch: int) -> np.ndarray:
        """The rows that complete the batch which the epoch before has begun: none if it is full.

        Epochs of small datasets take their heads from the same random order, so that neither needs
        to know the other; from twice the batch on, each has an order of its own.
        """
        size, batch_size = self.sizes[dataset], self.batch_sizes[dataset]
        length = -epoch * size % batch_size
        order = epoch * (size - batch_size) // batch_size
        rng = np.random.default_rng((self.seed, _HEADS, dataset, order))
        return rng.choice(size, batch_size, replace=False)[:length]
