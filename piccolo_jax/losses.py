"""The three losses of the recipe: pure functions of embeddings and index arrays.

Everything is global: `embeddings` holds the N texts of the whole batch, index arrays point into
it, and negatives are the documents of all B rows, on however many devices. The cosine is taken
anew on every Matryoshka prefix; a loss is the mean over the prefixes. Each returns the loss (before
the task's weight) and metrics.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from piccolo_jax.ops import contrastive
from piccolo_jax.sharding import BATCH_AXES, constrain

Loss = tuple[Float[Array, ""], dict[str, Float[Array, ""]]]


def info_nce(
    embeddings: Float[Array, "texts width"],
    query: Int[Array, " rows"],
    positive: Int[Array, " rows"],
    negative: Int[Array, "rows negatives"],
    negative_keep: Bool[Array, "rows negatives"],
    *,
    dims: tuple[int, ...],
    temperature: float,
    candidates: str = "all",
    duplicates: str = "once",
) -> Loss:
    """-log softmax of each query's positive among its candidates (arXiv 1807.03748, eq. 4).

    Args:
      candidates: "all": every positive and every kept negative of the batch; "own_positive": the
        row's own positive and every kept negative, or every positive if no negative is kept.
      duplicates: a document that occurs several times in the batch enters the denominator "once",
        so it is never a negative of its own query; "count" enters each occurrence, as REF does.

    Returns: the loss and `accuracy`, the share of queries whose positive is nearest at full width.
    """
    rows = query.shape[0]
    negative, negative_keep = negative.reshape(-1), negative_keep.reshape(-1)
    documents = jnp.concatenate([positive, negative])
    others_positives = ~negative_keep.any() if candidates == "own_positive" else jnp.array(True)
    allowed = jnp.concatenate([jnp.broadcast_to(others_positives, rows), negative_keep])
    own = documents[None, :] == positive[:, None]
    if duplicates == "once":
        counted = _first_occurrences(documents, allowed, len(embeddings))
        times_own = jnp.ones(rows)
    else:
        counted = allowed
        times_own = (own & counted).sum(axis=1) + ~allowed[:rows]
    others = counted & ~own

    gathered = constrain(embeddings, None, None)
    queries = constrain(gathered[query], BATCH_AXES, None)
    keys = gathered[documents]
    losses = []
    for cosines in contrastive.nested_cosines(queries, keys, dims):
        logits = constrain(cosines, BATCH_AXES, None) / temperature
        target = jnp.diagonal(logits[:, :rows])
        logits = jnp.where(others, logits, -jnp.inf)
        losses.append(jnp.mean(_cross_entropy(target, logits, times_own)))
    accuracy = jnp.mean((target[:, None] >= logits).all(axis=1))
    return jnp.mean(jnp.stack(losses)), {"accuracy": accuracy}


def cosent(
    embeddings: Float[Array, "texts width"],
    first: Int[Array, " rows"],
    second: Int[Array, " rows"],
    score: Float[Array, " rows"],
    *,
    dims: tuple[int, ...],
    temperature: float,
) -> Loss:
    """log(1 + sum over rows i, j with score_i > score_j of exp((s_j - s_i) / temperature)).

    CoSENT (kexue.fm/archives/8847), in O(B log B): after sorting by score, the sum over j is a
    running log-sum-exp over the strictly smaller scores. Not divided by the number of pairs.
    """
    gathered = constrain(embeddings, None, None)
    cosines = contrastive.paired_cosines(
        constrain(gathered[first], BATCH_AXES, None),
        constrain(gathered[second], BATCH_AXES, None),
        dims,
    )
    order = jnp.argsort(score)
    scaled = constrain(cosines, None, None)[:, order] / temperature
    smaller = jnp.searchsorted(score[order], score[order], side="left")  # rows with a lower score
    running = contrastive.cumulative_log_sum_exp(scaled)
    has_smaller = smaller > 0
    below = jnp.where(has_smaller, running[:, jnp.maximum(smaller - 1, 0)], 0.0)
    terms = jnp.where(has_smaller, below - scaled, -jnp.inf)
    return jnp.mean(_cross_entropy(jnp.zeros(len(dims)), terms)), {}


def label_contrast(
    embeddings: Float[Array, "texts width"],
    text: Int[Array, " rows"],
    label: Int[Array, " rows"],
    other_labels: Int[Array, "rows others"],
    other_labels_keep: Bool[Array, "rows others"],
    *,
    dims: tuple[int, ...],
    temperature: float,
) -> Loss:
    """-log softmax of a text's label text among it and the row's own other label texts.

    No in-batch negatives: the labels of other rows are often the row's own (arXiv 2405.06932,
    eq. 3). A row without other labels contributes 0.

    Returns: the loss and `accuracy`, the share of rows whose label is nearest at full width.
    """
    gathered = constrain(embeddings, None, None)
    candidates = jnp.concatenate([label[:, None], other_labels], axis=1)
    cosines = contrastive.paired_cosines(
        constrain(gathered[text], BATCH_AXES, None)[:, None, :],
        constrain(gathered[candidates], BATCH_AXES, None, None),
        dims,
    )
    logits = cosines / temperature
    target, others = logits[..., 0], jnp.where(other_labels_keep, logits[..., 1:], -jnp.inf)
    accuracy = jnp.mean((target[-1, :, None] >= others[-1]).all(axis=1))
    return jnp.mean(_cross_entropy(target, others)), {"accuracy": accuracy}


def _cross_entropy(
    target: Float[Array, "*batch"],
    others: Float[Array, "*batch candidates"],
    times_target: Float[Array, " batch"] | float = 1.0,
) -> Float[Array, "*batch"]:
    """log(times_target * exp(target) + sum of exp(others)) - target.

    Near a loss of 0 the others are many small numbers beside a 1. They are summed before the 1 is
    added, and the gradient flows through them alone, so that rounding takes neither: the textbook
    forms sum all in one go, and have gradients with p - 1 in them.
    """
    margins = others - target[..., None]
    largest = jax.lax.stop_gradient(margins.max(axis=-1, initial=0.0))
    total = jnp.exp(margins - largest[..., None]).sum(axis=-1)
    return largest + jnp.log(times_target * jnp.exp(-largest) + total)


def _first_occurrences(
    texts: Int[Array, " documents"], occurs: Bool[Array, " documents"], num_texts: int
) -> Bool[Array, " documents"]:
    """True where a document occurs and its text has not occurred before."""
    position = jnp.arange(len(texts))
    first = jax.ops.segment_min(
        jnp.where(occurs, position, len(texts)), texts, num_segments=num_texts
    )
    return first[texts] == position
