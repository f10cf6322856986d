"""The task types. Adding one is adding an entry to TASKS, a loss in losses.py and its Example.

An entry says which columns a row has and how its texts are cut (`columns`), which rows become which
index arrays (`draw`, numpy, on the host), which of those arrays point at texts (`text_arrays`), and
which loss they go to.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Array, Float

from piccolo_jax import losses
from piccolo_jax.config import Config, LossConfig
from piccolo_jax.data.store import Columns, Ragged, TextColumn
from piccolo_jax.types import Batch

Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Task:
    """One task type.

    columns: the text columns of an Example, in order; score_column: its number column, if any.
    draw: (columns, row ids [B], rng, config) -> index arrays, which hold the dataset's text ids
      where their names are in `text_arrays`.
    loss: (embeddings [N, D], batch, loss config) -> (weighted loss, metrics); batch holds the same
      arrays, pointing into the embeddings.
    """

    columns: tuple[TextColumn, ...]
    draw: Callable[[Columns, np.ndarray, np.random.Generator, Config], Arrays]
    text_arrays: tuple[str, ...]
    loss: Callable[[Float[Array, "texts width"], Batch, LossConfig], losses.Loss]
    score_column: str | None = None


def _draw_retrieval(
    columns: Columns, rows: np.ndarray, rng: np.random.Generator, config: Config
) -> Arrays:
    positive, positive_keep = draw_members(columns["positives"], rows, config.data.positives, rng)
    negative, negative_keep = draw_members(columns["negatives"], rows, config.data.negatives, rng)
    return {
        "query": columns["query"][rows],
        "positive": positive,
        "positive_keep": positive_keep,
        "negative": negative,
        "negative_keep": negative_keep,
    }


def _retrieval_loss(embeddings: Any, batch: Batch, config: LossConfig) -> losses.Loss:
    c = config.retrieval
    loss, metrics = losses.info_nce(
        embeddings,
        batch["query"],
        batch["positive"],
        batch["negative"],
        batch["negative_keep"],
        batch["positive_keep"],
        dims=config.dims,
        temperature=c.temperature,
        candidates=c.candidates,
        duplicates=c.duplicates,
        terms=c.terms,
        false_negative_margin=c.false_negative_margin,
        hardness=c.hardness,
        circle_margin=config.circle_margin,
        spread_out=c.spread_out,
        block_size=config.block_size,
    )
    return c.weight * loss, metrics


def _draw_similarity(
    columns: Columns, rows: np.ndarray, rng: np.random.Generator, config: Config
) -> Arrays:
    return {
        "first": columns["first"][rows],
        "second": columns["second"][rows],
        "score": columns["score"][rows],
    }


def _similarity_loss(embeddings: Any, batch: Batch, config: LossConfig) -> losses.Loss:
    c = config.similarity
    loss, metrics = losses.cosent(
        embeddings,
        batch["first"],
        batch["second"],
        batch["score"],
        dims=config.dims,
        temperature=c.temperature,
        normalize=c.normalize,
        angle_weight=c.angle_weight,
        circle_margin=config.circle_margin,
    )
    return c.weight * loss, metrics


def _draw_classification(
    columns: Columns, rows: np.ndarray, rng: np.random.Generator, config: Config
) -> Arrays:
    label, _ = draw_members(columns["labels"], rows, 1, rng)
    count = config.loss.classification.max_negatives
    others, keep = draw_members(columns["other_labels"], rows, count, rng)
    keep &= others != label  # two label texts can become the same tokens
    bare = np.flatnonzero(~keep.any(axis=1))  # rows without others: any label of the dataset
    if len(bare):
        others[bare], keep[bare] = _draw_not_own(columns, rows[bare], count, rng)
    return {
        "text": columns["text"][rows],
        "label": label[:, 0],
        "other_labels": others,
        "other_labels_keep": keep,
    }


def _draw_not_own(
    columns: Columns, rows: np.ndarray, count: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Up to `count` of the dataset's labels that aren't a text's own, as draw_members() does.

    A text's own are those of all its rows. Each row's are a stretch of one random order of all
    labels, from a random place on.
    """
    texts, labels = columns["text"], columns["labels"]
    by_text, ordered = labels.by_key(texts)
    wanted = np.unique(texts[rows])
    ends = zip(*(np.searchsorted(ordered, wanted, s) for s in ("left", "right")), strict=True)
    same = np.concatenate([by_text[begin:end] for begin, end in ends])
    owner, source = _flat(labels, same)
    own = np.unique(_pairs(texts[same][owner], labels.values[source]))
    most = int(np.unique(own >> 32, return_counts=True)[1].max())
    order = rng.permutation(labels.distinct)
    start = rng.integers(0, len(order), (len(rows), 1))
    stretch = np.arange(min(count + most, len(order)))
    drawn = order[(start + stretch) % len(order)]
    usable = ~np.isin(_pairs(texts[rows][:, None], drawn), own)
    first = np.argsort(~usable, axis=1, kind="stable")[:, :count]
    members = np.zeros((len(rows), count), np.int32)
    keep = np.zeros((len(rows), count), bool)
    members[:, : first.shape[1]] = np.take_along_axis(drawn, first, axis=1)
    keep[:, : first.shape[1]] = np.take_along_axis(usable, first, axis=1)
    return np.where(keep, members, 0), keep


def _classification_loss(embeddings: Any, batch: Batch, config: LossConfig) -> losses.Loss:
    c = config.classification
    loss, metrics = losses.label_contrast(
        embeddings,
        batch["text"],
        batch["label"],
        batch["other_labels"],
        batch["other_labels_keep"],
        dims=config.dims,
        temperature=c.temperature,
        circle_margin=config.circle_margin,
    )
    return c.weight * loss, metrics


TASKS: dict[str, Task] = {
    "retrieval": Task(
        columns=(
            TextColumn("query", prompt="query", is_query=True),
            TextColumn("positives", prompt="passage", ragged=True),
            TextColumn("negatives", prompt="passage", ragged=True),
        ),
        draw=_draw_retrieval,
        text_arrays=("query", "positive", "negative"),
        loss=_retrieval_loss,
    ),
    "similarity": Task(
        columns=(TextColumn("first", prompt="query"), TextColumn("second", prompt="query")),
        score_column="score",
        draw=_draw_similarity,
        text_arrays=("first", "second"),
        loss=_similarity_loss,
    ),
    "classification": Task(
        columns=(
            TextColumn("text", prompt="query"),
            TextColumn("labels", prompt="passage", ragged=True),
            TextColumn("other_labels", prompt="passage", ragged=True),
        ),
        draw=_draw_classification,
        text_arrays=("text", "label", "other_labels"),
        loss=_classification_loss,
    ),
}


def draw_members(
    column: Ragged, rows: np.ndarray, count: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Up to `count` members of each row's list, at random without replacement.

    Returns: members int32 [B, count], 0 where a list is shorter, and the mask of real ones.
    """
    owner, source = _flat(column, rows)
    place = source - column.offsets[rows][owner]
    order = np.lexsort((rng.random(len(owner)), owner))  # shuffles each row's members
    chosen = place < count
    members = np.zeros((len(rows), count), np.int32)
    keep = np.zeros((len(rows), count), bool)
    members[owner[chosen], place[chosen]] = column.values[source[order][chosen]]
    keep[owner[chosen], place[chosen]] = True
    return members, keep


def _flat(column: Ragged, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of all members of the rows' lists, end to end: which of `rows` each is of, and its place."""
    sizes = column.sizes(rows)
    owner = np.repeat(np.arange(len(rows)), sizes)
    before = np.cumsum(sizes) - sizes
    return owner, np.arange(len(owner)) + (column.offsets[rows] - before)[owner]


def _pairs(texts: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Two ids as one number."""
    return (texts.astype(np.int64) << 32) | labels
