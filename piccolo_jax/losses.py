"""The losses of the recipe and their variants: pure functions of embeddings and index arrays.

Everything is global: `embeddings` holds the N texts of the whole batch, index arrays point into
it, and negatives are the documents of all B rows, on however many devices. The cosine is taken
anew on every Matryoshka prefix; a loss is the mean over the prefixes. Each returns the loss (before
the task's weight) and metrics. The defaults are the recipe (arXiv 2405.06932); what else there is
says whose idea it was.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from piccolo_jax.ops import contrastive
from piccolo_jax.sharding import BATCH_AXES, constrain

Loss = tuple[Float[Array, ""], dict[str, Float[Array, ""]]]

_SAME_COSINE = 1e-6  # of equal texts' embeddings, in float32, by two orders of summation


class Logits(NamedTuple):
    """The logit of a cosine, of something that belongs to a row and of something that doesn't."""

    own: contrastive.Score
    other: contrastive.Score


def logits(temperature: float, circle_margin: float | None = None, hardness: float = 0.0) -> Logits:
    """Logits of the softmax losses, cosine / temperature, or of circle loss.

    Circle loss (arXiv 2002.10857, eq. 4, with scale 1 / temperature) weighs each cosine by
    its distance from the optimum, 1 + margin or -margin. `hardness` > 0 multiplies each negative by
    exp(hardness * cosine), through which no gradient flows (LLaVE, arXiv 2503.04812;
    EmbeddingGemma, arXiv 2509.20354, does so with the hard negatives alone).
    """
    stop = jax.lax.stop_gradient
    if circle_margin is None:
        own, other = (lambda c: c / temperature,) * 2
    else:
        m = circle_margin
        own = lambda c: stop(jnp.maximum(1 + m - c, 0)) * (c - (1 - m)) / temperature  # noqa: E731
        other = lambda c: stop(jnp.maximum(c + m, 0)) * (c - m) / temperature  # noqa: E731
    if not hardness:
        return Logits(own, other)
    return Logits(own, lambda c: other(c) + stop(hardness * c))


def info_nce(
    embeddings: Float[Array, "texts width"],
    query: Int[Array, " rows"],
    positive: Int[Array, "rows positives"] | Int[Array, " rows"],
    negative: Int[Array, "rows negatives"],
    negative_keep: Bool[Array, "rows negatives"],
    positive_keep: Bool[Array, "rows positives"] | None = None,
    *,
    dims: tuple[int, ...],
    temperature: float,
    candidates: str = "all",
    duplicates: str = "once",
    terms: tuple[str, ...] = ("qd",),
    false_negative_margin: float | None = None,
    hardness: float = 0.0,
    circle_margin: float | None = None,
    spread_out: float = 0.0,
    block_size: int = 4096,
) -> Loss:
    """-log softmax of each query's positive among its candidates (arXiv 1807.03748, eq. 4).

    Args:
      positive: one per row, or several: then the loss is the mean over a row's kept ones, and none
        of them is a candidate beside another (arXiv 2004.11362, eq. 2, without their terms below
        the line). With circle loss they enter its own sum over positives.
      candidates: "all": every positive and every kept negative of the batch; "own_positive": the
        row's own positive and every kept negative, or every positive if no negative is kept.
      duplicates: a document that occurs several times in the batch enters the denominator "once",
        so it is never a negative of its own query; "count" enters each occurrence, as REF does.
      terms: what the denominator holds: "qd" the query with documents, "qq" with other queries,
        "dq" the positive with other queries, "dd" with other documents (arXiv 2308.03281).
      false_negative_margin: leaves out what is nearer than the positive (the farthest of several)
        by more than this, in cosine at full width (arXiv 2506.05176, eq. 1, with 0.1).
      hardness, circle_margin: see logits().
      spread_out: weight of the mean squared cosine of two queries plus that of two positives
        (arXiv 1708.06320; arXiv 2509.20354).
      block_size: see nested_log_sum_exp().

    Returns: the loss; `accuracy`, the share of queries whose positive is nearest at full width;
      with a margin `false_negatives`, the share of the candidates that it leaves out.

    Collectives: those of take() and, per term, of nested_log_sum_exp(), and sums of scalars.
    """
    num_texts = len(embeddings)
    positive = positive.reshape(len(query), -1)
    if positive_keep is None:
        positive_keep = jnp.ones(positive.shape, bool)
    allowed = ~negative_keep.any() if candidates == "own_positive" else jnp.array(True)
    ids = jnp.concatenate([positive.ravel(), negative.ravel()])
    kept = jnp.concatenate([(positive_keep & allowed).ravel(), negative_keep.ravel()])
    occurrences = jnp.zeros(num_texts).at[ids].add(kept)
    query_occurrences = jnp.zeros(num_texts).at[query].add(1.0)
    times_own = jnp.ones(positive.shape)
    if duplicates == "once":
        occurrences, query_occurrences = (
            jnp.minimum(n, 1.0) for n in (occurrences, query_occurrences)
        )
    else:
        # 1 where it isn't kept: of log(0) the gradient is NaN, though nothing else depends on it.
        times_own = jnp.where(positive_keep, occurrences[positive] + ~allowed, 1)

    vectors = contrastive.take(embeddings, jnp.concatenate([query[:, None], positive], axis=1))
    queries, positives = vectors[:, 0], vectors[:, 1:]
    cosines = contrastive.paired_cosines(queries[:, None], positives, dims)
    farthest = jnp.where(positive_keep, cosines[-1], jnp.inf).min(axis=1)
    limit = None
    if false_negative_margin is not None:
        limit = farthest + false_negative_margin + _SAME_COSINE
    score = logits(temperature, circle_margin, hardness)
    own_documents = jnp.where(positive_keep, positive, -1)
    sides = {
        "q": (queries, query_occurrences, query[:, None]),
        "d": (positives[:, 0], occurrences, own_documents),
    }
    found = {}
    for term in terms:
        anchors, (_, weights, own) = sides[term[0]][0], sides[term[1]]
        found[term] = contrastive.nested_log_sum_exp(
            anchors, embeddings, weights, _none_of(own, num_texts), limit,
            dims=dims, score=score.other, block_size=block_size,
        )  # fmt: skip
    others = functools.reduce(jnp.logaddexp, [term.value for term in found.values()])

    own = score.own(cosines)
    if circle_margin is None:
        losses = jnp.logaddexp(jnp.log(times_own), others[..., None] - own)
        losses = jnp.where(positive_keep, losses, 0).sum(-1) / positive_keep.sum(-1)
    else:
        hard = jax.nn.logsumexp(jnp.where(positive_keep, -own, -jnp.inf), axis=-1)
        losses = jnp.logaddexp(0.0, others + hard)
    loss = jnp.mean(losses)
    if spread_out:
        spread = _mean_squared_cosine(queries, dims) + _mean_squared_cosine(positives[:, 0], dims)
        loss += spread_out * spread
    best = jnp.where(positive_keep, cosines[-1], -jnp.inf).max(axis=1)
    metrics = {"accuracy": jnp.mean(best >= found["qd"].nearest)}
    if limit is not None:
        left_out = sum(jnp.mean(term.too_near.astype(jnp.float32)) for term in found.values())
        pool = sum((sides[term[1]][1] > 0).sum() for term in terms)
        metrics["false_negatives"] = left_out / jnp.maximum(pool, 1)
    return loss, metrics


def cosent(
    embeddings: Float[Array, "texts width"],
    first: Int[Array, " rows"],
    second: Int[Array, " rows"],
    score: Float[Array, " rows"],
    *,
    dims: tuple[int, ...],
    temperature: float,
    normalize: bool = False,
    angle_weight: float = 0.0,
    circle_margin: float | None = None,
) -> Loss:
    """log(1 + sum over rows i, j with score_i > score_j of exp((s_j - s_i) / temperature)).

    CoSENT (kexue.fm/archives/8847), in O(B log B): after sorting by score, the sum over j is a
    running log-sum-exp over the strictly smaller scores.

    Args:
      normalize: divides the sum by its number of pairs (i, j), so that the loss does not grow with
        the batch; the recipe doesn't.
      angle_weight: adds the same loss of the normalised parts of the quotient of the two vectors
        read as complex, first half real and second half imaginary (AnglE, arXiv 2309.12871, with
        the sign of its authors' code: larger for pairs that score higher).
      circle_margin: see logits(); the pair that scores higher is the positive.

    Collectives: those of take(), and one all-gather of the similarities.
    """
    pairs = contrastive.take(embeddings, jnp.stack([first, second], axis=1))
    x, y = pairs[:, 0], pairs[:, 1]
    values = contrastive.paired_cosines(x, y, dims)
    if angle_weight:
        values = jnp.concatenate([values, _complex_quotients(x, y, dims)])
    values = constrain(values, None, None)

    score = jnp.asarray(score)
    order = jnp.argsort(score)
    smaller = jnp.searchsorted(score[order], score[order], side="left")  # rows with a lower score
    has_smaller = smaller > 0
    pair_count = jnp.maximum(smaller.astype(jnp.float32).sum(), 1) if normalize else 1.0

    def ordered(values: jax.Array, score: Logits) -> jax.Array:
        values = values[:, order]
        running = contrastive.cumulative_log_sum_exp(score.other(values))
        below = jnp.where(has_smaller, running[:, jnp.maximum(smaller - 1, 0)], 0.0)
        terms = jnp.where(has_smaller, below - score.own(values), -jnp.inf)
        return jnp.mean(_cross_entropy(jnp.zeros(len(values)), terms - jnp.log(pair_count)))

    loss = ordered(values[: len(dims)], logits(temperature, circle_margin))
    if angle_weight:
        loss += angle_weight * ordered(values[len(dims) :], logits(temperature))
    return loss, {}


def label_contrast(
    embeddings: Float[Array, "texts width"],
    text: Int[Array, " rows"],
    label: Int[Array, " rows"],
    other_labels: Int[Array, "rows others"],
    other_labels_keep: Bool[Array, "rows others"],
    *,
    dims: tuple[int, ...],
    temperature: float,
    circle_margin: float | None = None,
) -> Loss:
    """-log softmax of a text's label text among it and the row's own other label texts.

    No in-batch negatives: the labels of other rows are often the row's own (arXiv 2405.06932,
    eq. 3). A row without other labels contributes 0. `circle_margin`: see logits().

    Returns: the loss and `accuracy`, the share of rows whose label is nearest at full width.

    Collectives: those of take(), and sums of scalars.
    """
    index = jnp.concatenate([text[:, None], label[:, None], other_labels], axis=1)
    vectors = contrastive.take(embeddings, index)
    cosines = contrastive.paired_cosines(vectors[:, :1], vectors[:, 1:], dims)
    score = logits(temperature, circle_margin)
    own, others = cosines[..., 0], jnp.where(other_labels_keep, cosines[..., 1:], -jnp.inf)
    accuracy = jnp.mean((own[-1, :, None] >= others[-1]).all(axis=1))
    other_logits = jnp.where(other_labels_keep, score.other(cosines[..., 1:]), -jnp.inf)
    return jnp.mean(_cross_entropy(score.own(own), other_logits)), {"accuracy": accuracy}


def _cross_entropy(
    target: Float[Array, "*batch"], others: Float[Array, "*batch candidates"]
) -> Float[Array, "*batch"]:
    """log(exp(target) + sum of exp(others)) - target.

    Near a loss of 0 the others are many small numbers beside a 1. They are summed before the 1 is
    added, and the gradient flows through them alone, so that rounding takes neither: the textbook
    forms sum all in one go, and have gradients with p - 1 in them.
    """
    margins = others - target[..., None]
    largest = jax.lax.stop_gradient(margins.max(axis=-1, initial=0.0))
    total = jnp.exp(margins - largest[..., None]).sum(axis=-1)
    return largest + jnp.log(jnp.exp(-largest) + total)


def _none_of(ids: Int[Array, "rows k"], num_texts: int) -> Bool[Array, "rows texts"]:
    """Whether a text is none of a row's ids."""
    own = (ids[:, :, None] == jnp.arange(num_texts)).any(axis=1)
    return constrain(~own, BATCH_AXES, None)


def _mean_squared_cosine(x: Float[Array, "rows width"], dims: tuple[int, ...]) -> Float[Array, ""]:
    """Mean over prefixes and pairs of two rows; by a d x d matrix, not rows x rows."""
    rows = len(x)
    means = []
    for d in dims:
        unit = x[:, :d] * contrastive.inverse_norms(x, (d,))[0][:, None]
        products = jnp.einsum("rd,re->de", unit, unit, precision=jax.lax.Precision.HIGHEST)
        with_itself = (jnp.sum(unit * unit, axis=1) ** 2).sum()
        means.append((jnp.sum(products**2) - with_itself) / max(rows * (rows - 1), 1))
    return jnp.mean(jnp.stack(means))


def _complex_quotients(
    x: Float[Array, "rows width"], y: Float[Array, "rows width"], dims: tuple[int, ...]
) -> Float[Array, "dims rows"]:
    """|sum of the parts of x conj(y)| / (|x| |y|), each prefix read as complex numbers."""
    values = []
    for d in dims:
        a, b, c, e = x[:, : d // 2], x[:, d // 2 : d], y[:, : d // 2], y[:, d // 2 : d]
        parts = (a * c + b * e + b * c - a * e).sum(-1)
        norms = contrastive.inverse_norms(x, (d,))[0] * contrastive.inverse_norms(y, (d,))[0]
        values.append(jnp.abs(parts * norms))
    return jnp.stack(values)
