"""What the losses can do beside the recipe, against the formulas written out in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from piccolo_jax import losses

pytestmark = pytest.mark.usefixtures("quick_compiling")

WIDTH, DIMS, TEMPERATURE = 12, (6, 12), 0.1
QUERY = np.array([0, 1, 2, 0])
POSITIVE = np.array([[3, 4], [5, 0], [6, 7], [8, 5]])
POSITIVE_KEEP = np.array([[1, 1], [1, 0], [1, 1], [1, 1]], bool)
NEGATIVE = np.array([[9, 10], [9, 0], [11, 4], [12, 13]])
NEGATIVE_KEEP = np.array([[1, 1], [1, 0], [1, 1], [0, 1]], bool)
SCORE = np.array([1, 0, 2, 1, 0, 2, 0.5, 0], np.float32)


def texts(n=14, seed=0):
    # A common direction, as real embeddings have: cosines around 0.5.
    return (np.random.default_rng(seed).normal(size=(n, WIDTH)) + 1).astype(np.float32)


def cosine(x, y):
    return x @ y / np.sqrt((x @ x) * (y @ y))


def circle_own(c, frozen, margin, temperature):
    return max(1 + margin - frozen, 0) * (c - (1 - margin)) / temperature


def circle_other(c, frozen, margin, temperature):
    return max(frozen + margin, 0) * (c - margin) / temperature


def naive_info_nce(
    e, frozen, several=False, terms=("qd",), margin=None, hardness=0.0, circle=None, spread=0.0
):
    """`frozen` are the embeddings behind a stop_gradient."""
    positives = [p[k] if several else p[:1] for p, k in zip(POSITIVE, POSITIVE_KEEP, strict=True)]
    kept = [n for row, keep in zip(NEGATIVE, NEGATIVE_KEEP, strict=True) for n in row[keep]]
    pools = {"d": sorted({*np.concatenate(positives), *kept}), "q": sorted(set(QUERY))}
    total = 0.0
    for d in DIMS:
        s = lambda i, j, x=e, d=d: cosine(x[i, :d], x[j, :d])  # noqa: E731
        full = lambda i, j: cosine(frozen[i], frozen[j])  # noqa: E731
        stopped = functools.partial(s, x=frozen)
        for q, own in zip(QUERY, positives, strict=True):
            limit = np.inf if margin is None else min(full(q, p) for p in own) + margin
            others = 0.0
            for anchor_side, pool_side in terms:
                anchor = q if anchor_side == "q" else own[0]
                excluded = [q] if pool_side == "q" else own
                for x in pools[pool_side]:
                    if x in excluded or full(anchor, x) > limit:
                        continue
                    c, c0 = s(anchor, x), stopped(anchor, x)
                    logit = c / TEMPERATURE
                    if circle is not None:
                        logit = circle_other(c, c0, circle, TEMPERATURE)
                    others += np.exp(logit + hardness * c0)
            if circle is not None:
                hard = sum(
                    np.exp(-circle_own(s(q, p), stopped(q, p), circle, TEMPERATURE)) for p in own
                )
                total += np.log1p(others * hard)
            else:
                total += np.mean([np.log1p(others / np.exp(s(q, p) / TEMPERATURE)) for p in own])
        if spread:
            for side in (QUERY, [own[0] for own in positives]):
                pairs = [
                    s(i, j) ** 2 for a, i in enumerate(side) for b, j in enumerate(side) if a != b
                ]
                total += spread * np.mean(pairs) * len(QUERY)
    return total / len(DIMS) / len(QUERY)


def info_nce(e, several=False, terms=("qd",), margin=None, hardness=0.0, circle=None, spread=0.0):
    positive = (POSITIVE, POSITIVE_KEEP) if several else (POSITIVE[:, :1], POSITIVE_KEEP[:, :1])
    return losses.info_nce(
        e, QUERY, positive[0], NEGATIVE, NEGATIVE_KEEP, positive[1],
        dims=DIMS, temperature=TEMPERATURE, terms=terms, false_negative_margin=margin,
        hardness=hardness, circle_margin=circle, spread_out=spread, block_size=5,
    )  # fmt: skip


def naive_angle(e, first, second, d):
    """The formula of the authors' code: quotient of complex vectors, normalised, summed."""
    x = e[first, : d // 2] + 1j * e[first, d // 2 : d]
    y = e[second, : d // 2] + 1j * e[second, d // 2 : d]
    norms = np.sqrt((abs(x) ** 2).sum()), np.sqrt((abs(y) ** 2).sum())
    quotient = x * y.conj() / norms[1] ** 2 / (norms[0] / norms[1])
    return abs(quotient.real.sum() + quotient.imag.sum())


def naive_cosent(e, frozen, normalize=False, angle=0.0, circle=None):
    rows = range(len(SCORE))
    pairs = [(i, j) for i in rows for j in rows if SCORE[i] > SCORE[j]]
    count = len(pairs) if normalize else 1

    def of(upper, lower):
        return np.log1p(sum(np.exp(lower[j] - upper[i]) for i, j in pairs) / count)

    total = 0.0
    for d in DIMS:
        s, s0 = ([cosine(x[i, :d], x[i + 6, :d]) for i in rows] for x in (e, frozen))
        upper = lower = np.array(s) / TEMPERATURE
        if circle is not None:
            both = list(zip(s, s0, strict=True))
            upper = [circle_own(c, c0, circle, TEMPERATURE) for c, c0 in both]
            lower = [circle_other(c, c0, circle, TEMPERATURE) for c, c0 in both]
        total += of(upper, lower)
        if angle:
            angles = np.array([naive_angle(e, i, i + 6, d) for i in rows]) / TEMPERATURE
            total += angle * of(angles, angles)
    return total / len(DIMS)


def cosent(e, normalize=False, angle=0.0, circle=None):
    first = np.arange(len(SCORE))
    return losses.cosent(
        e, first, first + 6, jnp.asarray(SCORE), dims=DIMS, temperature=TEMPERATURE,
        normalize=normalize, angle_weight=angle, circle_margin=circle,
    )  # fmt: skip


def naive_label_contrast(e, frozen, circle):
    total = 0.0
    for d in DIMS:
        s = lambda i, j, x=e, d=d: cosine(x[i, :d], x[j, :d])  # noqa: E731
        for t, label, others, keep in zip(
            QUERY, POSITIVE[:, 0], NEGATIVE, NEGATIVE_KEEP, strict=True
        ):
            own = s(t, label) / TEMPERATURE
            logits = [s(t, x) / TEMPERATURE for x in others[keep]]
            if circle is not None:
                own = circle_own(s(t, label), s(t, label, frozen), circle, TEMPERATURE)
                logits = [
                    circle_other(s(t, x), s(t, x, frozen), circle, TEMPERATURE)
                    for x in others[keep]
                ]
            total += np.log1p(np.exp(np.array(logits) - own).sum())
    return total / len(DIMS) / len(QUERY)


def label_contrast(e, circle):
    return losses.label_contrast(
        e, QUERY, POSITIVE[:, 0], NEGATIVE, NEGATIVE_KEEP,
        dims=DIMS, temperature=TEMPERATURE, circle_margin=circle,
    )  # fmt: skip


CASES = {
    "several positives": (info_nce, naive_info_nce, {"several": True}),
    "query-query": (info_nce, naive_info_nce, {"terms": ("qd", "qq")}),
    "document-document": (info_nce, naive_info_nce, {"terms": ("qd", "dd")}),
    "all terms": (info_nce, naive_info_nce, {"terms": ("qd", "qq", "dq", "dd")}),
    "false negatives": (info_nce, naive_info_nce, {"margin": 0.05}),
    "false negatives of all terms and several positives": (
        info_nce,
        naive_info_nce,
        {"margin": 0.05, "terms": ("qd", "qq", "dq", "dd"), "several": True},
    ),
    "hardness": (info_nce, naive_info_nce, {"hardness": 5.0}),
    "spread-out": (info_nce, naive_info_nce, {"spread": 0.7}),
    "circle": (info_nce, naive_info_nce, {"circle": 0.25}),
    "circle with several positives": (
        info_nce, naive_info_nce, {"circle": 0.25, "several": True, "hardness": 1.0},
    ),
    "similarity normalised": (cosent, naive_cosent, {"normalize": True}),
    "similarity with angles": (cosent, naive_cosent, {"angle": 0.3}),
    "similarity circle": (cosent, naive_cosent, {"circle": 0.25}),
    "similarity all": (cosent, naive_cosent, {"circle": 0.1, "angle": 2.0, "normalize": True}),
    "labels circle": (label_contrast, naive_label_contrast, {"circle": 0.25}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_an_option_equals_its_formula_in_value_and_gradient(case):
    loss, naive, options = CASES[case]
    e = texts()
    (value, _), gradient = jax.jit(
        jax.value_and_grad(functools.partial(loss, **options), has_aux=True)
    )(e)
    exact = e.astype(np.float64)
    # Rounding of a cosine in float32, 1e-7, divided by the temperature.
    np.testing.assert_allclose(value, naive(exact, exact, **options), rtol=1e-5)
    expected, step = np.zeros_like(exact), 1e-6
    for i in np.ndindex(*exact.shape):
        above, below = exact.copy(), exact.copy()
        above[i] += step
        below[i] -= step
        difference = naive(above, exact, **options) - naive(below, exact, **options)
        expected[i] = difference / (2 * step)
    np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("case", CASES)
def test_an_option_changes_the_formula(case):
    # Or else the test above says nothing of it.
    _, naive, options = CASES[case]
    plain = {"circle": None} if naive is naive_label_contrast else {}
    e = texts().astype(np.float64)
    assert abs(naive(e, e, **options) - naive(e, e, **plain)) > 1e-3


def test_the_share_of_false_negatives_is_reported():
    e = np.eye(6, WIDTH, dtype=np.float32)
    e[4] = e[0]  # the first query's negative is the query itself
    e[2, 0] = 0.5  # so that its positive is somewhat near
    rows = np.array([0, 1]), np.array([[2], [3]]), np.array([[4], [5]]), np.ones((2, 1), bool)
    options = {"dims": (WIDTH,), "temperature": TEMPERATURE}
    loss = functools.partial(losses.info_nce, **options)
    _, metrics = jax.jit(functools.partial(loss, false_negative_margin=0.1))(e, *rows)
    assert metrics["false_negatives"] == pytest.approx(1 / 2 / 4)  # of 4 documents, 2 queries
    assert "false_negatives" not in jax.eval_shape(loss, e, *rows)[1]


def test_what_is_as_near_as_the_positive_stays_at_a_margin_of_0():
    rows, width = 64, 256
    rng = np.random.default_rng(0)
    query = rng.normal(size=(rows, width))
    document = query + rng.normal(size=(rows, width))
    e = np.concatenate([query, document, document]).astype(np.float32)  # two texts, cut to the same
    at = np.arange(rows)
    _, metrics = jax.jit(functools.partial(
        losses.info_nce, dims=(width,), temperature=TEMPERATURE, false_negative_margin=0.0,
    ))(e, at, at + rows, at[:, None] + 2 * rows, np.ones((rows, 1), bool))  # fmt: skip
    assert metrics["false_negatives"] == 0


def test_a_row_without_others_and_with_a_masked_positive_has_a_finite_gradient():
    def loss(e):  # text 0, where the masked positive points, is no document
        return losses.info_nce(
            e, np.array([1]), np.array([[2, 0]]), np.zeros((1, 0), int), np.zeros((1, 0), bool),
            np.array([[True, False]]), dims=DIMS, temperature=TEMPERATURE, duplicates="count",
            terms=("qd", "qq"), false_negative_margin=0.0,
        )[0]  # fmt: skip

    value, gradient = jax.jit(jax.value_and_grad(loss))(texts(3))
    assert value == 0
    assert not np.any(gradient)


def test_a_loss_that_is_divided_by_its_pairs_does_not_grow_with_the_batch():
    rng = np.random.default_rng(0)

    def value(rows, normalize):
        e = rng.normal(size=(2 * rows, WIDTH)).astype(np.float32)
        first, score = np.arange(rows), jnp.asarray(rng.integers(0, 2, rows), jnp.float32)
        options = {"dims": DIMS, "temperature": 1.0, "normalize": normalize}
        loss = jax.jit(functools.partial(losses.cosent, **options))
        return float(loss(e, first, first + rows, score)[0])

    assert value(2048, True) == pytest.approx(value(64, True), rel=0.2)
    assert value(2048, False) > 1.5 * value(64, False)


def test_cosent_of_65536_rows_is_that_of_the_dense_form():
    rows = 65_536
    rng = np.random.default_rng(0)
    e = rng.normal(size=(2 * rows, 4)).astype(np.float32)
    score = rng.integers(0, 6, rows).astype(np.float32)
    first = np.arange(rows)
    loss = functools.partial(losses.cosent, dims=(4,), temperature=0.05)
    # Scores are an argument: XLA sorts a constant when compiling, for 20 s.
    (actual, _), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(
        e, first, first + rows, score
    )
    x, y = e[:rows].astype(np.float64), e[rows:].astype(np.float64)
    s = (x * y).sum(1) / np.sqrt((x * x).sum(1) * (y * y).sum(1)) / 0.05
    total = sum(
        np.exp(s[score == low] - 20).sum() * np.exp(-s[score == high]).sum()
        for low in range(6)
        for high in range(low + 1, 6)
    )
    assert actual == pytest.approx(np.log(total) + 20, rel=1e-6)
    assert np.isfinite(gradient).all()
