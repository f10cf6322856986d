import jax
import numpy as np
import pytest

from piccolo_jax import sharding
from piccolo_jax.config import MeshConfig
from piccolo_jax.errors import UserError
from piccolo_jax.evaluation.encoder import cut
from piccolo_jax.mining.search import search
from piccolo_jax.ops.top_k import TILE


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(MeshConfig(), jax.devices()[:1])


def whole(kind, n, width):
    """Vectors with small whole numbers of one length, whose cosines have no rounding error."""
    rng = np.random.default_rng((kind, n, width))
    x = np.zeros((n, width), np.float32)
    for row in x:
        row[rng.permutation(width)[:4]] = rng.choice([-0.5, 0.5], 4)
    return x


@pytest.mark.parametrize("on_host", [True, False])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (700, 700), (TILE + 5, 17), (2 * TILE + 300, 2500)])
def test_neighbours_are_those_of_sorting_all_products(mesh, on_host, n, k):
    queries, corpus = whole(0, 3, 12), whole(1, n, 12)
    found = search(queries, corpus, k, mesh, on_host=on_host)
    products = queries @ corpus.T
    order = np.argsort(-products, axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(found.indices, order)
    np.testing.assert_array_equal(found.scores, np.take_along_axis(products, order, axis=1))


@pytest.mark.parametrize("on_host", [True, False])
def test_blocks_find_what_the_whole_finds(mesh, on_host, tmp_path):
    queries, corpus = whole(0, 5, 16), whole(1, 3 * TILE + 9, 16)
    np.save(tmp_path / "corpus.npy", corpus)
    mapped = np.load(tmp_path / "corpus.npy", mmap_mode="r")
    one = search(queries, corpus, 40, mesh, on_host=on_host)
    tile = 4 * TILE * 16
    other = search(queries, mapped, 40, mesh, device_bytes=tile, on_host=on_host)
    np.testing.assert_array_equal(one.indices, other.indices)
    np.testing.assert_array_equal(one.scores, other.scores)
    with pytest.raises(UserError, match=f"must hold {TILE} embeddings"):
        search(queries, mapped, 40, mesh, device_bytes=tile - 1, on_host=on_host)


def test_a_prefix_is_cut_and_then_normalised(mesh):
    rng = np.random.default_rng(0)
    queries, corpus = rng.normal(size=(4, 20)), rng.normal(size=(300, 20)) * 7
    queries, corpus = queries.astype(np.float32), corpus.astype(np.float32)
    found = search(queries, corpus, 10, mesh, dim=8)
    cosines = cut(queries, 8) @ cut(corpus, 8).T
    np.testing.assert_array_equal(found.indices, np.argsort(-cosines, axis=1)[:, :10])
    np.testing.assert_allclose(found.scores, -np.sort(-cosines, axis=1)[:, :10], atol=1e-6)


def test_more_neighbours_than_passages_are_nobody(mesh):
    found = search(whole(0, 2, 8), whole(1, 5, 8), 7, mesh)
    assert (found.indices[:, 5:] == -1).all()
    assert np.isneginf(found.scores[:, 5:]).all()
    assert np.sort(found.indices[0, :5]).tolist() == [0, 1, 2, 3, 4]


def test_no_queries_have_no_neighbours(mesh):
    assert search(np.zeros((0, 8), np.float32), whole(1, 5, 8), 3, mesh).indices.shape == (0, 3)


def test_every_mesh_finds_the_same_bits(run_python):
    done = run_python("tests/mining/search_on_meshes.py", devices=8)
    assert done.stdout == "compared\n"


def test_two_processes_find_what_one_finds(run_python, tmp_path):
    module = "tests.mining.search_in_processes"
    run_python("-m", module, tmp_path / "one.npz", devices=8)
    done = run_python(
        "launch/local_processes.py", "--processes=2", "--devices=4", f"--module={module}", "--",
        tmp_path / "two.npz",
    )  # fmt: skip
    assert "2 processes" in done.stdout
    one, two = np.load(tmp_path / "one.npz"), np.load(tmp_path / "two.npz")
    for field in ("scores", "indices"):
        np.testing.assert_array_equal(one[field], two[field])


def test_neighbours_are_those_of_faiss(mesh):
    faiss = pytest.importorskip("faiss")
    rng = np.random.default_rng(0)
    queries = cut(rng.normal(size=(50, 64)).astype(np.float32), 64)
    corpus = cut(rng.normal(size=(5000, 64)).astype(np.float32), 64)
    index = faiss.IndexFlatIP(64)
    index.add(corpus)
    scores, indices = index.search(queries, 200)
    found = search(queries, corpus, 200, mesh)
    np.testing.assert_allclose(found.scores, scores, atol=1e-6)
    differ = found.indices != indices
    assert differ.mean() < 1e-3
    np.testing.assert_allclose(found.scores[differ], scores[differ], atol=1e-6)
