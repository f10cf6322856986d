"""Which dataset and which of its rows step t trains on: a pure function of (seed, step, weights).

Nothing depends on earlier steps, on the number of processes or on the length of the run, so a
resumed run asks for its next step and gets it.
"""

import dataclasses
import functools
import heapq

import numpy as np

# Separate streams of random numbers, so that no two uses share one.
_PHASES, _SHUFFLE, _DRAW = range(3)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Datasets take turns by weight; each is read in epochs of its own, shuffled anew.

    The k-th batch of a dataset with share p has the virtual time (k + phase) / p, with a random
    phase in [0, 1); steps follow virtual time (stride scheduling, Waldspurger and Weihl 1995).
    Equal weights are a round robin.
    """

    seed: int
    batch_size: int
    sizes: tuple[int, ...]  # rows of each dataset
    weights: tuple[float, ...]

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
        """Passes over each dataset that the first `steps` steps make."""
        pairs = zip(self.uses(steps), self.sizes, strict=True)
        return [uses * self.batch_size / size for uses, size in pairs]

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
        """Row ids, int64 [batch_size], of the dataset's batch number `use`.

        Batches follow each other through the epochs: what doesn't fill a batch at the end of one
        begins the next batch.
        """
        size = self.sizes[dataset]
        position = np.arange(use * self.batch_size, (use + 1) * self.batch_size)
        epoch, place = np.divmod(position, size)
        rows = np.empty(self.batch_size, np.int64)
        for e in np.unique(epoch):
            rows[epoch == e] = _permutation(self.seed, dataset, int(e), size)[place[epoch == e]]
        return rows

    def rng(self, dataset: int, use: int) -> np.random.Generator:
        """Random numbers for what a batch draws: positives, negatives, other labels."""
        return np.random.default_rng((self.seed, _DRAW, dataset, use))


@functools.lru_cache(maxsize=64)
def _permutation(seed: int, dataset: int, epoch: int, size: int) -> np.ndarray:
    rng = np.random.default_rng((seed, _SHUFFLE, dataset, epoch))
    return rng.permutation(size)
