import jax
import numpy as np
import pytest

from piccolo_jax import sharding
from piccolo_jax.config import MeshConfig
from piccolo_jax.evaluation.encoder import cut
from piccolo_jax.mining import subspace
from piccolo_jax.mining.search import search


def scaled(n, hidden=40, width=256, seed=0):
    """What a scaling layer with a bias makes of hidden states with a mean of their own."""
    layer = np.random.default_rng(7)
    states = np.random.default_rng(seed).normal(size=(n, hidden)) + 1
    return (states @ layer.normal(size=(hidden, width)) + layer.normal(size=width)).astype("f4")


def test_a_scaling_layer_leaves_one_dimension_more_than_it_was_given():
    basis = subspace.find_basis(scaled(600), 256, num_queries=600)
    assert basis.columns.shape == (256, 41)
    np.testing.assert_allclose(basis.columns.T @ basis.columns, np.eye(41), atol=1e-6)


def test_coordinates_in_the_subspace_have_the_same_cosines():
    rows = cut(scaled(600), 256)
    found = subspace.project(rows, subspace.find_basis(rows, 256, 600)).astype(np.float64)
    exact = rows.astype(np.float64) @ rows.T
    # Rounding of coordinates near 1, each a sum of 256 float32 products.
    np.testing.assert_allclose(found @ found.T, exact, atol=2e-6)


@pytest.mark.parametrize("rank", [100, 180])
def test_larger_subspaces_are_found_by_larger_samples(rank):
    basis = subspace.find_basis(scaled(600, hidden=rank - 1), 256, num_queries=600)
    assert basis.columns.shape == (256, rank)


@pytest.mark.parametrize(
    ("rows", "num_queries"),
    [
        (np.random.default_rng(0).normal(size=(600, 256)).astype("f4"), 600),  # use all coordinates
        (scaled(600), 511),  # too few to repay it
        (scaled(511), 600),
        (np.full((600, 256), np.nan, np.float32), 600),
    ],
)
def test_without_a_gain_there_is_no_basis(rows, num_queries):
    assert subspace.find_basis(rows, 256, num_queries) is None


@pytest.mark.parametrize("on_host", [True, False])
@pytest.mark.parametrize("outside", ["none", "corpus", "query"])
def test_a_search_finds_the_same_whether_all_lie_in_the_subspace_or_not(on_host, outside):
    queries, corpus = scaled(512, seed=1), scaled(3000)
    stranger = np.random.default_rng(2).normal(size=256).astype("f4") * 50
    if outside == "corpus":
        corpus[1234] = stranger  # not among the sampled rows
        queries[0] = queries[0] + 3 * stranger
    elif outside == "query":
        queries[0] = queries[0] + 3 * stranger
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    found = search(queries, corpus, 20, mesh, on_host=on_host)
    cosines = cut(queries, 256).astype(np.float64) @ cut(corpus, 256).T
    order = np.argsort(-cosines, axis=1)[:, :20]
    np.testing.assert_allclose(found.scores, np.take_along_axis(cosines, order, axis=1), atol=2e-6)
    assert (found.indices == order).mean() > 0.999


@pytest.mark.parametrize(("length", "seen"), [(1e-7, False), (1e-3, True)])
def test_a_part_outside_of_the_subspace_is_seen_unless_it_is_rounding(length, seen):
    rows = cut(scaled(600), 256)
    basis = subspace.find_basis(rows, 256, 600)
    outside = np.random.default_rng(3).normal(size=256)
    outside -= basis.columns @ (basis.columns.T @ outside)
    rows[17] += (length * outside / np.linalg.norm(outside)).astype("f4")
    if seen:
        with pytest.raises(subspace.NotSpannedError):
            subspace.project(rows, basis)
    else:
        subspace.project(rows, basis)


def test_several_processes_search_in_all_dimensions(monkeypatch):
    # One that met a vector outside of the subspace would begin again, and the others not.
    monkeypatch.setattr(subspace, "find_basis", lambda *_: pytest.fail("looked for a subspace"))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    search(scaled(4, seed=1), scaled(30), 3, mesh, on_host=False)


def test_rows_of_zeros_stay_zeros():
    corpus = scaled(600)
    corpus[5] = 0
    basis = subspace.find_basis(corpus, 256, 600)
    assert not subspace.project(cut(corpus, 256), basis)[5].any()
