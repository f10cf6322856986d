"""Hard negatives that change while a model trains: mined anew, or replaced when they are easy.

Both happen between two steps and are functions of the parameters of that moment and of the lists
and blocks before it. Those are saved with each checkpoint, so that a resumed run goes on with them.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from piccolo_jax.config import Config
from piccolo_jax.data.store import Ragged, Store
from piccolo_jax.errors import UserError
from piccolo_jax.evaluation.encoder import Encoder, cut
from piccolo_jax.metrics import say
from piccolo_jax.mining.rules import Limits
from piccolo_jax.mining.search import search
from piccolo_jax.types import Params

_EASIER, _HARD = 1.15, 0.8  # of Conan's rule
_AT_ONCE = 8192  # texts whose tokens are in memory


@dataclasses.dataclass
class _Lists:
    """The negatives of a dataset: all of a row in `all`, in use by blocks.

    block: int32 [rows], the row's block in use; start: float32 [rows], the mean cosine of query and
    block when it came into use; NaN: not known yet.
    """

    store: Store
    passages: np.ndarray  # ids of all texts that the dataset's files list, increasing
    all: Ragged
    block: np.ndarray
    start: np.ndarray

    def save(self) -> dict[str, np.ndarray]:
        return {
            "values": np.array(self.all.values), "offsets": np.array(self.all.offsets),
            "block": self.block.copy(), "start": self.start.copy(),
        }  # fmt: skip


class ChangingNegatives:
    """The negatives of a run's retrieval datasets; what is in use is a column of their stores.

    Raises UserError if a dataset has fewer passages than config.data.remine_ranks asks for.
    """

    def __init__(self, config: Config, stores: Sequence[Store], encoder: Encoder):
        self._config, self._encoder = config.data, encoder
        self._seed = config.seed
        self._every = [n for n in (config.data.remine_every, config.data.replace_every) if n]
        self._lists: dict[str, _Lists] = {}
        for i, store in enumerate(stores if self._every else ()):
            if store.task == "retrieval":
                passages = _passages(store)
                self._check(store.name, len(passages))
                self._lists[str(i)] = _new(store, passages, store.columns["negatives"])
        if self._every and not self._lists:
            raise UserError(
                "config.data.remine_every, config.data.replace_every: there is no retrieval dataset"
                " whose negatives could change"
            )

    def _check(self, name: str, count: int) -> None:
        if self._config.remine_every and self._config.remine_ranks[1] > count:
            raise UserError(
                f"config.data.remine_ranks = {self._config.remine_ranks}: dataset {name} has only"
                f" {count} passages"
            )

    def next_change(self, step: int, stop: int) -> int:
        """The first step after `step` before which something may change, or `stop`."""
        return min([stop, *((step // n + 1) * n for n in self._every)])

    def update(self, step: int, params: Params) -> None:
        """Changes what is due before `step`. All processes must call it."""
        mine, replace = self._config.remine_every, self._config.replace_every
        for name, lists in self._lists.items():
            if mine and step and step % mine == 0:
                mined = self._mine(lists, params, step)
                self._lists[name] = lists = _new(lists.store, lists.passages, mined)
            if replace and step % replace == 0:
                self._replace(lists, params, step)
            self._use(lists)

    def save(self) -> dict[str, Any] | None:
        """For a checkpoint; None where nothing changes."""
        return {name: lists.save() for name, lists in self._lists.items()} or None

    def restore(self, saved: dict[str, Any]) -> None:
        """Inverse of save()."""
        for name, lists in self._lists.items():
            values = {key: np.array(value) for key, value in saved[name].items()}
            lists.all = Ragged(values["values"], values["offsets"])
            lists.block, lists.start = values["block"], values["start"]
            self._use(lists)

    def _use(self, lists: _Lists) -> None:
        columns = lists.store.columns
        columns["negatives"] = (
            _block(lists.all, lists.block, self._config.negatives)
            if self._config.replace_every
            else lists.all
        )

    def _mine(self, lists: _Lists, params: Params, step: int) -> Ragged:
        """Negatives of every row from the window of ranks among the dataset's passages.

        Not among them: positives of the query, the query's own text, and what the filter removes.
        A row of which nothing is left keeps what it had.
        """
        c, store, passages, before = self._config, lists.store, lists.passages, lists.all
        ids, place = np.unique(store.columns["query"], return_inverse=True)
        embed = self._embedder(store, params, f"mining at step {step}")
        queries, keys = embed(ids), embed(passages)
        first, last = c.remine_ranks
        # On the devices everywhere, so that a run of several processes finds the same.
        found = search(queries, keys, last, self._encoder.mesh, on_host=False)
        positives: Ragged = store.columns["positives"]
        own = _members_by_query(positives, place, len(ids))
        queries, keys = cut(queries, queries.shape[1]), cut(keys, keys.shape[1])
        limits = Limits(c.remine_max_positive_ratio)
        rows, short = [], 0
        for row in range(store.num_rows):
            query = place[row]
            texts = passages[found.indices[query, first - 1 : last]]
            mine = np.asarray(positives.values[positives.offsets[row] : positives.offsets[row + 1]])
            lowest = (keys[np.searchsorted(passages, mine)] @ queries[query]).min()
            removed = np.isin(texts, own[query]) | (texts == ids[query])
            scores = found.scores[query, first - 1 : last]
            left = texts[~np.logical_or.reduce([removed, *limits.reasons(scores, lowest)])]
            rng = np.random.default_rng((self._seed, step, row))
            count = min(c.remine_count, len(left))
            chosen = left[np.sort(rng.choice(len(left), count, replace=False))]
            if not count:
                chosen = before.values[before.offsets[row] : before.offsets[row + 1]]
            short += count < c.remine_count
            rows.append(np.asarray(chosen, np.int32))
        few = f"; {short} rows have fewer than {c.remine_count} in the window" if short else ""
        say(f"step {step}: negatives of {store.name} mined among {len(passages)} passages{few}")
        return _ragged(rows)

    def _replace(self, lists: _Lists, params: Params, step: int) -> None:
        """Conan's rule (arXiv 2408.15710): a row goes on to its next block if the present one is
        easy, 1.15 s_now < s_start and |s_now| < 0.8 with s its mean cosine with the query.
        """
        store, size = lists.store, self._config.negatives
        embed = self._embedder(store, params, f"replacing at step {step}")
        every = np.arange(store.num_rows)
        now = _mean_cosines(store, every, _block(lists.all, lists.block, size), embed)
        known = ~np.isnan(lists.start)
        easy = known & (_EASIER * now < lists.start) & (np.abs(now) < _HARD)
        rows = np.flatnonzero(easy & (lists.all.sizes(every) > (lists.block + 1) * size))
        lists.start = np.where(known, lists.start, now)
        lists.block[rows] += 1
        if len(rows):
            new = _block(lists.all, lists.block, size)
            lists.start[rows] = _mean_cosines(store, rows, new, embed)
        say(f"step {step}: negatives of {len(rows)} of {store.num_rows} rows of {store.name}"
            f" replaced; {int(easy.sum()) - len(rows)} easy ones have no next")  # fmt: skip

    def _embedder(
        self, store: Store, params: Params, progress: str
    ) -> Callable[[np.ndarray], np.ndarray]:
        """From text ids, increasing, to embeddings [texts, width]."""
        progress = progress if jax.process_index() == 0 else ""

        def embed(ids: np.ndarray) -> np.ndarray:
            order = np.argsort(-store.lengths[ids].astype(np.int64), kind="stable")
            out = np.empty((len(ids), self._encoder.width), np.float32)
            for start in range(0, len(ids), _AT_ONCE):
                part = order[start : start + _AT_ONCE]
                tokens = store.tokens(ids[part])
                out[part] = self._encoder.encode_tokens(params, tokens, progress)
            return out

        return embed


def _new(store: Store, passages: np.ndarray, lists: Ragged) -> _Lists:
    block = np.zeros(store.num_rows, np.int32)
    return _Lists(store, passages, lists, block, np.full(store.num_rows, np.nan, np.float32))


def _passages(store: Store) -> np.ndarray:
    columns = (store.columns[name].values for name in ("positives", "negatives"))
    return np.unique(np.concatenate([np.asarray(values) for values in columns]))


def _block(lists: Ragged, block: np.ndarray, size: int) -> Ragged:
    """Of each row's list the members [block * size, (block + 1) * size), as far as it has them."""
    rows = np.arange(len(block))
    starts = lists.offsets[:-1] + block.astype(np.int64) * size
    sizes = np.clip(lists.offsets[1:] - starts, 0, size)
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    owner = np.repeat(rows, sizes)
    place = np.arange(offsets[-1]) - offsets[owner]
    return Ragged(np.asarray(lists.values[starts[owner] + place], np.int32), offsets)


def _ragged(rows: list[np.ndarray]) -> Ragged:
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
    return Ragged(np.concatenate([np.zeros(0, np.int32), *rows]), offsets)


def _members_by_query(lists: Ragged, query: np.ndarray, count: int) -> list[np.ndarray]:
    """The members of the lists of all rows that have a query, for each query."""
    owner = np.repeat(query, lists.sizes(np.arange(len(query))))
    order = np.argsort(owner, kind="stable")
    bounds = np.searchsorted(owner[order], np.arange(count + 1))
    values = np.asarray(lists.values)[order]
    return [values[bounds[i] : bounds[i + 1]] for i in range(count)]


def _mean_cosines(
    store: Store, rows: np.ndarray, negatives: Ragged, embed: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """float32 [rows]: mean cosine of each row's query and its negatives; NaN without any."""
    sizes = negatives.sizes(rows)
    owner = np.repeat(np.arange(len(rows)), sizes)
    within = np.arange(len(owner)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    texts = negatives.values[negatives.offsets[rows][owner] + within]
    queries = np.asarray(store.columns["query"])[rows]
    ids = np.unique(np.concatenate([queries, texts]))
    vectors = embed(ids)
    vectors = cut(vectors, vectors.shape[1])
    first, second = np.searchsorted(ids, queries)[owner], np.searchsorted(ids, texts)
    cosines = np.empty(len(texts))
    for start in range(0, len(texts), _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        cosines[part] = (vectors[first[part]] * vectors[second[part]]).sum(axis=1)
    total = np.bincount(owner, cosines, minlength=len(rows))
    return np.where(sizes > 0, total / np.maximum(sizes, 1), math.nan).astype(np.float32)
