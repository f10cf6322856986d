import itertools
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

from piccolo_jax.config import TASK_NAMES, Config
from piccolo_jax.data import formats
from piccolo_jax.data.store import Ragged
from piccolo_jax.tasks import TASKS, draw_members


def ragged(*lists):
    offsets = np.cumsum([0, *map(len, lists)]).astype(np.int64)
    return Ragged(np.asarray(list(itertools.chain(*lists)), np.int32), offsets)


def rng(seed=0):
    return np.random.default_rng(seed)


def draw(task, columns, rows, seed=0, config=None):
    return TASKS[task].draw(columns, np.asarray(rows), rng(seed), config or Config())


# Members of lists


def test_members_are_drawn_without_replacement_up_to_what_a_row_lists():
    lists = [[1, 2, 3, 4, 5], [], [6], [7, 8]]
    rows = np.asarray([3, 0, 1, 2, 0])
    for seed in range(20):
        members, keep = draw_members(ragged(*lists), rows, 3, rng(seed))
        assert members.shape == keep.shape == (5, 3)
        assert members.dtype == np.int32
        assert keep.sum(axis=1).tolist() == [2, 3, 0, 1, 3]
        assert not members[~keep].any()
        for row, chosen, real in zip(rows, members, keep, strict=True):
            assert len(set(chosen[real])) == real.sum()
            assert set(chosen[real]) <= set(lists[row])


def test_every_subset_is_as_likely_as_another():
    column = ragged([1, 2, 3, 4])
    members, _ = draw_members(column, np.zeros(6000, int), 2, rng())
    counts = Counter(frozenset(pair) for pair in members.tolist())
    assert len(counts) == 6
    assert all(abs(n - 1000) < 150 for n in counts.values())


@pytest.mark.parametrize("count", [0, 1, 5])
def test_lists_without_members_give_nothing(count):
    members, keep = draw_members(ragged([], [], []), np.asarray([2, 0]), count, rng())
    assert members.shape == keep.shape == (2, count)
    assert not keep.any()


def test_a_row_that_occurs_twice_draws_twice():
    members, _ = draw_members(ragged(range(1000)), np.zeros(2, int), 3, rng())
    assert set(members[0]) != set(members[1])


# Tasks


def test_the_names_of_tasks_columns_and_arrays_fit_each_other():
    assert set(TASKS) == set(TASK_NAMES)
    examples = {
        "retrieval": formats.RetrievalExample,
        "similarity": formats.SimilarityExample,
        "classification": formats.ClassificationExample,
    }
    for name, task in TASKS.items():
        fields = [c.name for c in task.columns] + [task.score_column] * bool(task.score_column)
        assert fields == list(examples[name].__slots__)


def test_retrieval_draws_one_positive_and_the_configured_negatives():
    columns = {
        "query": np.asarray([10, 11, 12]),
        "positives": ragged([20, 21], [22], [23]),
        "negatives": ragged([30, 31, 32], [], [33]),
    }
    config = Config()
    config.data.negatives = 2
    positives = set()
    for seed in range(20):
        arrays = draw("retrieval", columns, [0, 2, 1], seed, config)
        assert arrays["query"].tolist() == [10, 12, 11]
        assert arrays["positive"][1:].tolist() == [[23], [22]]
        assert arrays["positive_keep"].all()
        assert arrays["negative_keep"].tolist() == [[True, True], [True, False], [False, False]]
        assert arrays["negative"][1, 0] == 33
        positives.add(int(arrays["positive"][0, 0]))
    assert positives == {20, 21}


def test_retrieval_draws_as_many_positives_as_asked_for():
    columns = {
        "query": np.asarray([10, 11]),
        "positives": ragged([20, 21, 22], [23]),
        "negatives": ragged([], []),
    }
    config = Config()
    config.data.positives = 2
    arrays = draw("retrieval", columns, [0, 1], 0, config)
    assert arrays["positive_keep"].tolist() == [[True, True], [True, False]]
    assert len(set(arrays["positive"][0].tolist())) == 2
    assert arrays["positive"][1, 0] == 23


def test_similarity_takes_rows_as_they_are():
    columns = {
        "first": np.asarray([1, 2]), "second": np.asarray([3, 4]), "score": np.asarray([0.5, 2.0]),
    }  # fmt: skip
    arrays = draw("similarity", columns, [1, 0])
    assert {name: array.tolist() for name, array in arrays.items()} == {
        "first": [2, 1], "second": [4, 3], "score": [2.0, 0.5],
    }  # fmt: skip


def classify(labels, others, rows, seed=0, most=3, texts=None):
    columns = {
        "text": np.arange(100, 100 + len(labels)) if texts is None else np.array(texts, np.int32),
        "labels": ragged(*labels),
        "other_labels": ragged(*others),
    }
    config = SimpleNamespace(
        loss=SimpleNamespace(classification=SimpleNamespace(max_negatives=most))
    )
    arrays = draw("classification", columns, rows, seed, config)
    keep = arrays["other_labels_keep"]
    return arrays, [set(o[k].tolist()) for o, k in zip(arrays["other_labels"], keep, strict=True)]


def test_classification_draws_among_a_rows_own_other_labels():
    _, others = classify([[1], [2]], [[2, 3, 4, 5, 6], [7]], [0, 1])
    assert others[0] < {2, 3, 4, 5, 6}
    assert len(others[0]) == 3
    assert others[1] == {7}


def test_rows_that_list_no_other_label_draw_any_of_the_dataset():
    labels = [[1], [2], [3], [4], [1, 5]]
    seen = [set() for _ in labels]
    for seed in range(40):
        arrays, others = classify(labels, [[]] * 5, range(5), seed)
        for i, chosen in enumerate(others):
            assert len(chosen) == arrays["other_labels_keep"][i].sum() == 3
            assert arrays["label"][i] in labels[i]
            seen[i] |= chosen
    assert seen == [{1, 2, 3, 4, 5} - set(own) for own in labels]


def test_each_label_of_the_dataset_is_drawn_as_often_as_another():
    drawn = Counter()
    for seed in range(300):
        for others in classify([[1], [2], [3], [4], [5]], [[]] * 5, [0] * 20, seed, most=2)[1]:
            assert len(others) == 2
            drawn.update(others)
    assert set(drawn) == {2, 3, 4, 5}
    assert all(abs(n - 3000) < 300 for n in drawn.values())


def test_fewer_labels_than_asked_for_are_all_drawn():
    _, others = classify([[1], [2]], [[], []], [0, 1, 0], most=10)
    assert others == [{2}, {1}, {2}]


def test_a_label_is_never_its_own_negative_even_if_only_its_tokens_are_the_same():
    for seed in range(20):
        _, others = classify([[1], [2], [3]], [[1, 2, 3], [2], []], [0, 1, 2], seed)
        assert others[0] <= {2, 3}
        assert others[1] == {1, 3}  # nothing else listed: any of the dataset
        assert others[2] == {1, 2}


def test_what_a_text_is_labelled_in_another_row_is_not_drawn():
    labels = [[1], [2], [3], [1, 4], [5]]
    for seed in range(10):
        _, others = classify(labels, [[]] * 5, range(5), seed, texts=[9, 7, 9, 7, 8])
        assert others == [{2, 4, 5}, {3, 5}, {2, 4, 5}, {3, 5}, others[4]]
        assert others[4] < {1, 2, 3, 4}
        assert len(others[4]) == 3


def test_draws_depend_on_the_random_numbers_alone():
    labels, lists = [[i % 7] for i in range(50)], [[] if i % 2 else [8, 9] for i in range(50)]
    a, b, c = (classify(labels, lists, range(50), seed)[0] for seed in (1, 1, 2))
    assert all((a[name] == b[name]).all() for name in a)
    assert not (a["other_labels"] == c["other_labels"]).all()
