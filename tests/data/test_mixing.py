from types import SimpleNamespace

import numpy as np
import pytest

from piccolo_jax.config import Config, DatasetConfig
from piccolo_jax.data import mixing
from piccolo_jax.data.mixing import Dataset
from piccolo_jax.data.schedule import Schedule
from piccolo_jax.data.store import Ragged
from piccolo_jax.errors import UnusableDatasetError, UserError


def store(rows, name="a", task="retrieval", scores=None, positives=(3, 4), negatives=()):
    columns = {} if scores is None else {"score": np.asarray(scores, np.float32)}
    if task == "retrieval":
        columns["positives"] = Ragged(np.asarray(positives), np.arange(rows + 1))
        columns["negatives"] = Ragged(np.asarray(negatives, int), np.zeros(rows + 1, int))
    return SimpleNamespace(name=name, task=task, num_rows=rows, columns=columns)


def config(batch_size=8, **data):
    c = Config(batch_size=batch_size)
    for field, value in data.items():
        setattr(c.data, field, value)
    return c


def shares(config, *prepared):
    mixture = mixing.share_out(config, prepared)
    total = sum(dataset.weight for dataset in mixture)
    return [dataset.weight / total for dataset in mixture]


def one(rows, **fields):
    return DatasetConfig("a", **fields), [(store(rows), 1.0)]


# Shares


def test_without_a_temperature_weights_alone_count():
    assert shares(config(), one(10), one(10_000)) == [0.5, 0.5]
    assert shares(config(), one(10, weight=3.0), one(10_000)) == [0.75, 0.25]


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_a_temperature_makes_shares_follow_a_root_of_the_rows(temperature):
    c = config(mixing_temperature=temperature)
    rates = np.asarray([10, 1000, 100_000]) ** (1 / temperature)
    expected = rates / rates.sum()
    np.testing.assert_allclose(shares(c, one(10), one(1000), one(100_000)), expected)
    weighted = expected * [4, 1, 1] / (expected * [4, 1, 1]).sum()
    np.testing.assert_allclose(shares(c, one(10, weight=4.0), one(1000), one(100_000)), weighted)


def test_a_cap_counts_as_the_size_and_repeats_as_copies():
    c = config(mixing_temperature=2.0)
    assert shares(c, one(1000, max_rows=100), one(100)) == [0.5, 0.5]
    *copies, other = shares(c, one(50), one(50), one(50), one(70))
    assert shares(c, one(50, repeats=3.0), one(70)) == pytest.approx([sum(copies), other])
    assert shares(config(), one(10, repeats=2.0), one(30)) == pytest.approx([2 / 3, 1 / 3])


@pytest.mark.parametrize("temperature", [None, 1.0])
def test_a_meta_list_is_one_pool_of_rows(temperature):
    listed = [(store(100), 1.0), (store(300), 1.0), (store(100), 2.0)]
    c = config(mixing_temperature=temperature)
    np.testing.assert_allclose(shares(c, (DatasetConfig("a"), listed)), [1 / 6, 3 / 6, 2 / 6])
    capped = (DatasetConfig("a", max_rows=100), listed)
    np.testing.assert_allclose(shares(c, capped), [1 / 4, 1 / 4, 2 / 4])
    if temperature is None:  # its weight, times their number, beside that of others
        both = shares(c, (DatasetConfig("a"), listed), one(7))
        np.testing.assert_allclose(both, [1 / 8, 3 / 8, 2 / 8, 1 / 4])


# Batches


def test_a_dataset_smaller_than_the_batch_has_batches_of_all_its_rows_and_that_is_said():
    mixture = [Dataset(store(5, "small"), 1.0), Dataset(store(50, "large"), 1.0)]
    kept, notes = mixing.usable(config(), mixture)
    assert [(d.store.name, d.rows, d.batch_size) for d in kept] == [
        ("small", 5, 5), ("large", 50, 8),
    ]  # fmt: skip
    (note,) = notes
    assert note.startswith("small: 5 rows, fewer than config.batch_size = 8")
    assert mixing.usable(config(), mixture[1:])[1] == []


def test_a_batch_that_no_dataset_fills_is_an_error_that_says_what_fits():
    mixture = [Dataset(store(5, "small"), 1.0), Dataset(store(7, "larger"), 1.0)]
    message = r"batch_size = 8: dataset larger has only 7 usable rows.* at most 7"
    with pytest.raises(UserError, match=message):
        mixing.usable(config(), mixture)
    own = [Dataset(store(5, "small"), 1.0, batch_size=3), *mixture[1:]]
    assert [d.batch_size for d in mixing.usable(config(), own)[0]] == [3, 7]


def test_a_batch_size_of_its_own_and_a_cap():
    mixture = [
        Dataset(store(50), 1.0, max_rows=20, batch_size=16),
        Dataset(store(50), 1.0, max_rows=6),
        Dataset(store(50), 1.0, max_rows=500),
    ]
    kept, notes = mixing.usable(config(), mixture)
    assert [(d.rows, d.batch_size) for d in kept] == [(20, 16), (6, 6), (50, 8)]
    assert len(notes) == 1
    with pytest.raises(UserError, match=r"only 20 rows to use, fewer than the batch_size = 21"):
        mixing.usable(config(), [Dataset(store(50), 1.0, max_rows=20, batch_size=21)])


def test_as_many_rows_as_a_batch_or_the_least_one_are_enough():
    mixture = [Dataset(store(2), 1.0), Dataset(store(8), 1.0), Dataset(store(9), 1.0, 0, 9)]
    kept, notes = mixing.usable(config(), mixture)
    assert [d.batch_size for d in kept] == [2, 8, 9]
    assert [note.split(",")[0] for note in notes] == ["a: 2 rows"]


def test_negatives_make_up_for_a_single_positive():
    for negatives in ([5], [4, 7]):
        rows = store(9, positives=[4] * 9, negatives=negatives)
        mixing.check(config(), Dataset(rows, 1.0), 0)


def unusable():
    return {
        "fewer than config.data.min_batch_size = 2": Dataset(store(1, "bad"), 1.0),
        "all 9 rows have the score 2": Dataset(
            store(9, "bad", "similarity", [2.0] * 9), 1.0
        ),
        "all 9 rows used have the score 3": Dataset(
            store(1000, "bad", "similarity", [2.0] + [3.0] * 999), 1.0, max_rows=9
        ),
        "all 9 rows have the same positive and no negative": Dataset(
            store(9, "bad", positives=[4] * 9), 1.0
        ),
        "fewer than the batch_size = 10": Dataset(store(9, "bad"), 1.0, batch_size=10),
    }  # fmt: skip


@pytest.mark.parametrize("reason", unusable())
def test_what_can_teach_nothing_is_an_error_or_left_out_and_said(reason):
    good = Dataset(store(50, "good", "similarity", np.arange(50)), 1.0)
    mixture = [unusable()[reason], good]
    with pytest.raises(UnusableDatasetError, match=f"dataset bad.*{reason}"):
        mixing.usable(config(), mixture)
    kept, notes = mixing.usable(config(skip_unusable=True), mixture)
    assert [d.store.name for d in kept] == ["good"]
    assert [note.startswith("left out: dataset bad") for note in notes] == [True]
    with pytest.raises(UserError, match="no dataset can be used: left out: dataset bad"):
        mixing.usable(config(skip_unusable=True), mixture[:1])


def test_the_least_batch_can_be_raised_to_the_batch_itself():
    mixture = [Dataset(store(7, "small"), 1.0), Dataset(store(50, "large"), 1.0)]
    with pytest.raises(UserError, match="min_batch_size = 8"):
        mixing.usable(config(min_batch_size=8), mixture)
    kept, _ = mixing.usable(config(min_batch_size=8, skip_unusable=True), mixture)
    assert [d.store.name for d in kept] == ["large"]
    # A smaller batch that a dataset asks for is its own affair.
    asked = [Dataset(store(7, "small"), 1.0, batch_size=4), *mixture[1:]]
    assert len(mixing.usable(config(min_batch_size=8), asked)[0]) == 2


# What is said


def test_the_epochs_table_is_what_the_schedule_does():
    kept, _ = mixing.usable(
        config(), [Dataset(store(5, "small"), 1.0), Dataset(store(100, "large"), 3.0, max_rows=40)]
    )
    schedule = Schedule(0, (5, 8), (5, 40), (1.0, 3.0), (5, 100))
    table = mixing.epochs_table(kept, schedule, 80)
    assert table == [
        {"dataset": "small", "task": "retrieval", "rows": 5, "used": 5, "batch_size": 5,
         "share": 0.25, "steps": 20, "epochs": 20.0},
        {"dataset": "large", "task": "retrieval", "rows": 100, "used": 40, "batch_size": 8,
         "share": 0.75, "steps": 60, "epochs": 12.0},
    ]  # fmt: skip
    assert mixing.remarks(table, 80) == []
    table[1]["epochs"] = 0.5
    (note,) = mixing.remarks(table, 80)
    assert note.startswith("small: 20 passes over its 5 rows, while another dataset gets 0.5")
    table[1] |= {"steps": 0, "epochs": 0.0}
    assert mixing.remarks(table, 80) == ["large: none of the 80 steps is on it; raise its weight"]
