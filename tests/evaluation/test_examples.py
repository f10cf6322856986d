import numpy as np
import pytest
import scipy.stats

from piccolo_jax.evaluation import examples


def made(kind, n=60, seed=0):
    rng = np.random.default_rng(seed)
    if kind == "STS":
        return {"cosine": rng.integers(0, 20, n) / 20, "gold": rng.integers(0, 6, n).astype(float)}
    if kind == "PairClassification":
        label = rng.integers(0, 2, n)
        scores = {name: rng.integers(0, 25, n) / 25 + 0.3 * label for name in
                  ("cosine", "dot", "manhattan", "euclidean")}  # fmt: skip
        return scores | {"label": label}
    if kind == "Clustering":
        label = rng.integers(0, 4, n)
        cluster = np.where(rng.random(n) < 0.6, label, rng.integers(0, 4, n))
        return {"cluster": cluster, "label": label, "set": np.repeat([0, 1], [n // 3, n - n // 3])}
    return {"score": rng.random(n)}


KINDS = ("STS", "PairClassification", "Clustering", "Retrieval")


def repeated(found, weights):
    return {name: np.repeat(values, weights) for name, values in found.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_is_how_often_an_example_occurs(kind):
    found = made(kind)
    weights = np.random.default_rng(1).integers(0, 4, 60)
    assert examples.metric(found, weights) == pytest.approx(
        examples.metric(repeated(found, weights)), abs=1e-12
    )
    assert examples.metric(found, weights) != pytest.approx(examples.metric(found), abs=1e-4)


def test_spearman_is_scipy_s_with_ties():
    found = made("STS")
    expected = scipy.stats.spearmanr(found["cosine"], found["gold"]).statistic
    assert examples.metric(found) == pytest.approx(expected, abs=1e-12)
    assert examples.metric({"cosine": np.ones(3), "gold": np.arange(3.0)}) == 0


def test_v_measure_is_the_library_s_and_the_mean_over_sets():
    metrics = pytest.importorskip("sklearn.metrics")
    found = made("Clustering")
    expected = [
        metrics.v_measure_score(found["label"][s], found["cluster"][s])
        for s in (found["set"] == 0, found["set"] == 1)
    ]
    assert examples.metric(found) == pytest.approx(np.mean(expected), abs=1e-12)


def test_best_accuracy_by_hand():
    scores = np.array([0.9, 0.8, 0.7, 0.6])
    same = {name: scores for name in ("dot", "manhattan", "euclidean")}

    def accuracy(cosine, labels):
        zeros = {name: np.zeros(4) for name in same}  # a constant tells nothing
        return examples.metric({"cosine": np.array(cosine), "label": np.array(labels), **zeros})

    assert accuracy(scores, [1, 1, 0, 0]) == 1
    assert accuracy(scores, [1, 0, 1, 0]) == 0.75
    assert accuracy(scores, [0, 0, 1, 1]) == 0.25
    assert accuracy([0.5, 0.5, 0.5, 0.4], [1, 0, 0, 0]) == 0.5  # no threshold between equals
    assert accuracy([0.5] * 4, [1, 0, 0, 0]) == 0
    best = {"cosine": -scores, "label": np.array([1, 1, 0, 0]), **same}
    assert examples.metric(best) == 1  # the best of the four scores


@pytest.mark.parametrize("kind", KINDS)
def test_they_are_what_was_saved(tmp_path, kind):
    found = made(kind)
    examples.save(tmp_path / "a" / "x.npz", found)
    again = examples.load(tmp_path / "a" / "x.npz")
    assert sorted(again) == sorted(found)
    assert all((again[name] == found[name]).all() for name in found)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["x.npz"]


def test_none_and_damaged_ones_are_none(tmp_path):
    assert examples.load(tmp_path / "none.npz") is None
    (tmp_path / "x.npz").write_bytes(b"PK\x03\x04 half")
    assert examples.load(tmp_path / "x.npz") is None
    (tmp_path / "x.npz").write_bytes(b"")
    assert examples.load(tmp_path / "x.npz") is None


def test_models_are_paired_by_what_is_not_theirs():
    first, second = made("STS", seed=1), made("STS", seed=1)
    second["cosine"] = second["cosine"][::-1]
    assert examples.identity(first) == examples.identity(second)
    second["gold"] = second["gold"] + 1
    assert examples.identity(first) != examples.identity(second)
    assert examples.identity({"score": np.ones(3)}) != examples.identity({"score": np.ones(4)})
