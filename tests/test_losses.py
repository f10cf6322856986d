"""The losses against the formulas written out row by row in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from piccolo_jax import losses

pytestmark = pytest.mark.usefixtures("quick_compiling")

WIDTH = 12
DIMS = (5, 12)


@functools.partial(jax.jit, static_argnames=("loss", "dims", "candidates", "duplicates"))
def value_and_gradient(e, *arrays, loss, **options):
    """A loss and its gradient; compiled, which is faster here than step by step."""
    return jax.value_and_grad(lambda e: loss(e, *arrays, **options)[0])(e)


def cosine(x, y):
    return x @ y / np.sqrt((x @ x) * (y @ y))


def log_sum_exp(values):
    values = np.array(values)
    return values.max() + np.log(np.exp(values - values.max()).sum())


def naive_info_nce(
    e, query, positive, negative, negative_keep, *, dims, temperature, candidates, duplicates
):
    kept = [n for row, keep in zip(negative, negative_keep, strict=True) for n in row[keep]]
    total = 0.0
    for d in dims:
        for q, p in zip(query, positive, strict=True):
            if candidates == "all":
                documents = [*positive, *kept]
            else:
                documents = [p, *kept] if kept else list(positive)
            if duplicates == "once":
                documents = sorted(set(documents))
            logits = [cosine(e[q, :d], e[x, :d]) / temperature for x in documents]
            total += log_sum_exp(logits) - cosine(e[q, :d], e[p, :d]) / temperature
    return total / len(dims) / len(query)


def naive_cosent(e, first, second, score, *, dims, temperature):
    total = 0.0
    for d in dims:
        s = [cosine(e[a, :d], e[b, :d]) / temperature for a, b in zip(first, second, strict=True)]
        pairs = [
            s[j] - s[i]
            for i in range(len(s))
            for j in range(len(s))
            if score[i] > score[j]
        ]  # fmt: skip
        total += log_sum_exp([0.0, *pairs])
    return total / len(dims)


def naive_label_contrast(e, text, label, other_labels, other_labels_keep, *, dims, temperature):
    total = 0.0
    for d in dims:
        for t, own, others, keep in zip(text, label, other_labels, other_labels_keep, strict=True):
            logits = [cosine(e[t, :d], e[x, :d]) / temperature for x in (own, *others[keep])]
            total += log_sum_exp(logits) - logits[0]
    return total / len(dims) / len(text)


def finite_differences(f, x, step=1e-6):
    gradient = np.zeros_like(x)
    for i in np.ndindex(*x.shape):
        above, below = x.copy(), x.copy()
        above[i] += step
        below[i] -= step
        gradient[i] = (f(above) - f(below)) / (2 * step)
    return gradient


def assert_equals_formula(loss, naive, embeddings, *arrays, **options):
    # A cosine's rounding in float32, up to 1e-7, is divided by the temperature.
    value, gradient = value_and_gradient(embeddings, *arrays, loss=loss, **options)
    f = functools.partial(naive, **options)
    exact = embeddings.astype(np.float64)
    np.testing.assert_allclose(value, f(exact, *arrays), rtol=1e-5, atol=1e-7)
    expected = finite_differences(lambda e: f(e, *arrays), exact)
    np.testing.assert_allclose(
        gradient, expected, rtol=0, atol=1e-5 * np.abs(expected).max() + 1e-8
    )


def texts(n, seed=0):
    return np.random.default_rng(seed).normal(size=(n, WIDTH)).astype(np.float32)


def all_kept(negative):
    return np.ones(np.shape(negative), bool)


RETRIEVAL = {
    "distinct": ([0, 1, 2], [3, 4, 5], [[6, 7], [8, 9], [10, 11]], None),
    "no column of negatives": ([0, 1, 2], [3, 4, 5], np.zeros((3, 0), int), None),
    "no negative kept": ([0, 1, 2], [3, 4, 5], [[0, 0]] * 3, np.zeros((3, 2), bool)),
    "ragged, a row without any": (
        [0, 1, 2],
        [3, 4, 5],
        [[6, 7], [8, 0], [0, 0]],
        np.array([[1, 1], [1, 0], [0, 0]], bool),
    ),
    "shared positives": ([0, 1, 2], [4, 4, 5], [[6, 7], [7, 8], [8, 9]], None),
    "shared negatives": ([0, 1, 2], [3, 4, 5], [[6, 7], [7, 6], [6, 8]], None),
    "a negative is its own positive": ([0, 1, 2], [3, 4, 5], [[3, 6], [7, 8], [5, 5]], None),
    "a negative is another's positive": ([0, 1, 2], [3, 4, 5], [[4, 6], [5, 7], [3, 3]], None),
    "a masked slot points at a positive": (
        [3, 1, 2],
        [0, 4, 5],
        [[6, 0], [0, 0], [7, 8]],
        np.array([[1, 0], [0, 0], [1, 1]], bool),
    ),
    "queries that are documents": ([0, 1, 0], [1, 2, 3], [[0, 5], [4, 1], [2, 2]], None),
    "one row": ([0], [1], np.zeros((1, 0), int), None),
}


@pytest.mark.parametrize("duplicates", ["once", "count"])
@pytest.mark.parametrize("candidates", ["all", "own_positive"])
@pytest.mark.parametrize("case", RETRIEVAL)
def test_info_nce_equals_its_formula(case, candidates, duplicates):
    query, positive, negative, keep = RETRIEVAL[case]
    negative = np.array(negative)
    assert_equals_formula(
        losses.info_nce,
        naive_info_nce,
        texts(12),
        np.array(query),
        np.array(positive),
        negative,
        all_kept(negative) if keep is None else keep,
        dims=DIMS,
        temperature=0.1,
        candidates=candidates,
        duplicates=duplicates,
    )


def test_info_nce_equals_its_formula_at_many_prefixes_and_the_temperature_of_the_recipe():
    rng = np.random.default_rng(3)
    query, positive = np.arange(5), np.arange(5, 10)
    negative = rng.integers(5, 20, (5, 3))
    assert_equals_formula(
        losses.info_nce,
        naive_info_nce,
        texts(20),
        query,
        positive,
        negative,
        rng.random((5, 3)) < 0.7,
        dims=(1, 2, 5, 11),
        temperature=0.01,
        candidates="all",
        duplicates="once",
    )


def test_a_duplicate_is_no_negative_of_its_own_query():
    value, gradient = value_and_gradient(
        texts(6), np.array([0, 2]), np.array([1, 1]), np.array([[1], [1]]), np.ones((2, 1), bool),
        loss=losses.info_nce, dims=DIMS, temperature=0.1,
    )  # fmt: skip
    assert value == 0
    assert not np.any(gradient)


SIMILARITY = {
    "distinct scores": [3.0, 1.0, 2.0, 5.0, 4.0],
    "ties": [1.0, 0.0, 1.0, 0.0, 1.0],
    "three levels": [2.0, 0.0, 1.0, 1.0, 2.0],
    "all ties": [1.0] * 5,
    "one above": [0.0, 0.0, 0.0, 0.0, 1.0],
    "one below": [1.0, 1.0, 0.0, 1.0, 1.0],
    "one row": [2.0],
    "extreme": [3e38, -3e38, 1e-37, 0.0, -0.0],
    "neighbours in float32": [1.0, np.nextafter(np.float32(1), np.float32(2)), 1.0, 2.0, 3.0],
}


@pytest.mark.parametrize("temperature", [0.05, 1.0])
@pytest.mark.parametrize("case", SIMILARITY)
def test_cosent_equals_its_formula(case, temperature):
    score = np.array(SIMILARITY[case], np.float32)
    first = np.arange(len(score))
    assert_equals_formula(
        losses.cosent,
        naive_cosent,
        texts(10),
        first,
        first + 5,
        score,
        dims=DIMS,
        temperature=temperature,
    )


@pytest.mark.parametrize("order", [1, -1])
def test_cosent_is_exact_where_similarities_lie_far_apart(order):
    # Cosines from -1 to 1 at temperature 0.01: logits from -100 to 100, both ways round.
    angles = np.linspace(0.1, np.pi - 0.1, 8)
    e = np.zeros((16, WIDTH), np.float32)
    e[:8, 0] = 1
    e[8:, 0], e[8:, 1] = np.cos(angles), np.sin(angles)
    rows = np.arange(8)
    assert_equals_formula(
        losses.cosent,
        naive_cosent,
        e,
        rows,
        rows + 8,
        (order * rows).astype(np.float32),
        dims=(2, 12),
        temperature=0.01,
    )


@pytest.mark.parametrize("score", [[1.0] * 4, [7.0]])
def test_cosent_without_an_ordered_pair_is_0_and_moves_nothing(score):
    rows = np.arange(len(score))
    value, gradient = value_and_gradient(
        texts(8), rows, rows + 4, np.array(score, np.float32),
        loss=losses.cosent, dims=DIMS, temperature=0.05,
    )  # fmt: skip
    assert value == 0
    assert not np.any(gradient)


LABELS = {
    "all kept": np.ones((4, 3), bool),
    "ragged": np.array([[1, 1, 1], [1, 0, 0], [0, 1, 0], [0, 1, 1]], bool),
    "rows without any": np.array([[0, 0, 0], [1, 1, 0], [0, 0, 0], [1, 1, 1]], bool),
    "none": np.zeros((4, 3), bool),
    "no column": np.zeros((4, 0), bool),
}


@pytest.mark.parametrize("case", LABELS)
def test_label_contrast_equals_its_formula(case):
    keep = LABELS[case]
    rng = np.random.default_rng(5)
    assert_equals_formula(
        losses.label_contrast,
        naive_label_contrast,
        texts(10),
        np.arange(4),
        np.array([4, 5, 4, 6]),
        rng.integers(4, 10, keep.shape),
        keep,
        dims=DIMS,
        temperature=0.05,
    )


@functools.partial(jax.jit, static_argnames="dims")
@functools.partial(jax.value_and_grad, has_aux=True)
def every_loss(e, query, positive, negative, keep, score, dims=(3, 12)):
    """(sum of all losses, each of them), and the gradient of the sum."""
    args = {"dims": dims, "temperature": 0.05}
    rows = query, positive, negative, keep
    values = jnp.stack([
        losses.info_nce(e, *rows, **args)[0],
        losses.info_nce(e, *rows, **args, duplicates="count", candidates="own_positive")[0],
        losses.cosent(e, query, positive, score, **args)[0],
        losses.label_contrast(e, *rows, **args)[0],
    ])  # fmt: skip
    return values.sum(), values


BATCH = (*map(np.array, RETRIEVAL["ragged, a row without any"]), np.array([1, 0, 1], np.float32))


def test_the_order_of_the_rows_changes_nothing():
    e = texts(12)
    (_, values), gradient = every_loss(e, *BATCH)
    (_, other_values), other_gradient = every_loss(e, *(array[[2, 0, 1]] for array in BATCH))
    np.testing.assert_allclose(values, other_values, rtol=1e-6)
    np.testing.assert_allclose(gradient, other_gradient, atol=1e-6 * np.abs(gradient).max())


def test_the_order_of_the_texts_changes_nothing():
    e = texts(12)
    order = np.random.default_rng(4).permutation(12)
    where = np.argsort(order)
    (_, values), gradient = every_loss(e, *BATCH)
    pointers, rest = BATCH[:3], BATCH[3:]
    (_, other_values), other_gradient = every_loss(e[order], *(where[p] for p in pointers), *rest)
    np.testing.assert_allclose(values, other_values, rtol=1e-6)
    np.testing.assert_allclose(gradient[order], other_gradient, atol=1e-6 * np.abs(gradient).max())


def test_the_lengths_of_the_vectors_change_nothing():
    e = texts(12)
    scales = np.random.default_rng(4).uniform(1e-3, 1e3, (12, 1)).astype(np.float32)
    np.testing.assert_allclose(
        every_loss(e, *BATCH)[0][1], every_loss(e * scales, *BATCH)[0][1], rtol=2e-5
    )


def test_texts_that_no_row_points_at_have_no_part():
    e = texts(12)
    expected = every_loss(e, *BATCH)
    e[9:] = np.nan  # 9, 10 and 11 are in no row
    (_, values), gradient = every_loss(e, *BATCH)
    np.testing.assert_array_equal(values, expected[0][1])
    np.testing.assert_array_equal(gradient, expected[1])
    assert not np.any(gradient[9:])


def test_gradients_are_finite_at_zero_vectors_and_where_all_texts_are_equal():
    zero = texts(12)
    zero[[0, 3, 4, 8]] = 0  # a query, its positive, another's, a negative
    zero[5, :3] = 0
    for e in (zero, np.zeros((12, WIDTH), np.float32), np.ones((12, WIDTH), np.float32)):
        (_, values), gradient = every_loss(e, *BATCH)
        assert np.isfinite(values).all()
        assert np.isfinite(gradient).all()


def nearly_solved(cosine_of_others, count):
    """A row whose positive has cosine 1 and whose `count` others have another."""
    e = np.zeros((count + 2, 4), np.float32)
    e[:2, 0] = 1
    e[2:, 0], e[2:, 1] = cosine_of_others, np.sqrt(1 - cosine_of_others**2)
    return e


def test_many_small_candidates_add_up_beside_a_1():
    # Each adds exp(-17.5) = 2.5e-8 to a sum of 1, less than float32 can tell from 1.
    count, temperature = 1024, 0.04
    e = nearly_solved(0.3, count)
    others = np.arange(2, count + 2)[None]
    one = np.zeros(1, int)
    args = {"dims": (4,), "temperature": temperature}
    exact = np.log1p(count * np.exp((np.float64(np.float32(0.3)) - 1) / temperature))
    assert 2e-5 < exact < 3e-5
    for loss in (losses.info_nce, losses.label_contrast):
        value, _ = value_and_gradient(e, one, one + 1, others, all_kept(others), loss=loss, **args)
        np.testing.assert_allclose(value, exact, rtol=5e-3)
    # One pair that scores high above as many that score low.
    rows = np.arange(1, count + 2)
    value, _ = value_and_gradient(
        e, 0 * rows, rows, (rows == 1).astype(np.float32), loss=losses.cosent, **args
    )
    np.testing.assert_allclose(value, exact, rtol=5e-3)


def test_gradients_of_nearly_solved_rows_keep_their_digits():
    # p differs from 1 by 1e-9: p - 1 in float32 would be 0.
    e = nearly_solved(0.1, 3)
    e[0, 2] = 0.1  # so that the positive's gradient isn't 0 by symmetry
    rows = np.zeros(1, int), np.ones(1, int), np.array([[2, 3, 4]]), np.ones((1, 3), bool)
    for loss in (losses.info_nce, losses.label_contrast):
        args = {"loss": loss, "dims": (4,), "temperature": 0.04}
        actual = value_and_gradient(e, *rows, **args)[1]
        with jax.enable_x64(True):
            expected = value_and_gradient(e.astype(np.float64), *rows, **args)[1]
        assert 0 < np.abs(expected[1]).max() < 1e-7
        np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def test_accuracy_is_of_queries_and_documents_whatever_other_terms_there_are():
    # Each query is nearest to its own document; the documents are nearer to each other.
    e = np.array([[1, 0, 0.5], [-1, 0, 0.5], [0.2, 0, 1], [-0.2, 0, 1]], np.float32)
    loss = functools.partial(
        losses.info_nce, dims=(3,), temperature=0.1, terms=("qd", "qq", "dq", "dd")
    )
    no_negatives = np.zeros((2, 0), int), np.zeros((2, 0), bool)
    metrics = jax.jit(loss)(e, np.arange(2), np.array([[2], [3]]), *no_negatives)[1]
    assert metrics["accuracy"] == 1


def test_accuracy_is_the_share_of_rows_whose_own_is_nearest_at_full_width():
    e = np.zeros((6, 4), np.float32)
    e[0], e[1] = (1, 1, 0, 0), (0, 0, 1, 0)  # queries
    e[2], e[3] = (1, 0.9, 0, 0), (0, 0, 1, 1)  # their positives
    e[4], e[5] = (1, 0, 0, 0), (0, 0, 1, 0)  # nearer to the first by 1 prefix only; to the second
    rows = np.array([0, 1]), np.array([2, 3]), np.array([[4], [5]])
    keep = np.ones((2, 1), bool)
    for loss in (losses.info_nce, losses.label_contrast):
        accuracy = jax.jit(
            lambda *a, loss=loss: loss(*a, dims=(1, 4), temperature=0.1)[1]["accuracy"]
        )
        assert accuracy(e, *rows, keep) == 0.5
        assert accuracy(e, *rows, ~keep) == 1
