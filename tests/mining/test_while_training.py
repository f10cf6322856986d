"""Negatives that change while training, on a small store and on whole runs."""

import re
import shutil

import numpy as np
import pytest
import small
import tiny
from small import one_error, run_command

from piccolo_jax import sharding, train
from piccolo_jax.config import MeshConfig
from piccolo_jax.data.store import Ragged
from piccolo_jax.errors import UserError
from piccolo_jax.evaluation.encoder import cut
from piccolo_jax.mining.while_training import ChangingNegatives

WIDTH = 12
PASSAGES = 60  # texts 0..59 are passages, 60..89 queries, in LookUp's store


class LookUp:
    """An encoder whose parameters are the embedding of each text, which its first token names."""

    width = WIDTH

    def __init__(self):
        self.mesh = sharding.make_mesh(MeshConfig())
        self.encoded = 0

    def encode_tokens(self, params, tokens, progress=""):
        self.encoded += len(tokens)
        return params[[int(ids[0]) for ids in tokens]]


class Store:
    name, task, num_rows = "made", "retrieval", 30
    lengths = np.ones(90, np.int32)

    def __init__(self, negatives=4):
        rng = np.random.default_rng(0)
        lists = [rng.permutation(PASSAGES)[:negatives] for _ in range(self.num_rows)]
        self.columns = {
            "query": np.arange(60, 90, dtype=np.int32),
            "positives": ragged([[2 * row, 2 * row + 1] for row in range(self.num_rows)]),
            "negatives": ragged(lists),
        }

    def tokens(self, texts):
        return [np.asarray([text]) for text in texts]


def ragged(lists):
    offsets = np.cumsum([0, *map(len, lists)]).astype(np.int64)
    return Ragged(np.concatenate([np.zeros(0), *lists]).astype(np.int32), offsets)


def listed(column, row):
    return column.values[column.offsets[row] : column.offsets[row + 1]].tolist()


def config(**fields):
    c = tiny.config()
    for name, value in fields.items():
        setattr(c.data, name, value)
    return c


def embeddings(seed=0):
    return np.random.default_rng(seed).normal(size=(90, WIDTH)).astype(np.float32)


def changing(store, **fields):
    return ChangingNegatives(config(**fields), [store], LookUp())


def ranked(params, query):
    vectors = cut(params, WIDTH)
    return np.argsort(-vectors[:PASSAGES] @ vectors[query], kind="stable")


def test_mined_negatives_are_of_the_window_and_never_positives():
    store, params = Store(), embeddings()
    negatives = changing(store, remine_every=5, remine_ranks=(3, 12), remine_count=4)
    before = store.columns["negatives"]
    negatives.update(0, params)
    assert store.columns["negatives"] is before  # the files' own, until the first n steps are over
    negatives.update(5, params)
    for row in range(store.num_rows):
        window = ranked(params, 60 + row)[2:12].tolist()
        mined = listed(store.columns["negatives"], row)
        assert len(mined) == 4
        assert sorted(mined, key=window.index) == mined  # by rank
        assert not {2 * row, 2 * row + 1} & set(mined)


def test_another_step_mines_with_the_weights_and_the_draws_of_that_step():
    store = Store()
    negatives = changing(store, remine_every=5, remine_ranks=(1, 20), remine_count=4)
    seen = []
    for step, seed in ((5, 0), (10, 0), (15, 1)):
        negatives.update(step, embeddings(seed))
        seen.append(store.columns["negatives"].values.tolist())
    assert seen[0] != seen[1] != seen[2]


def test_the_filter_leaves_out_what_is_as_near_as_the_positive():
    store, params = Store(), embeddings()
    before = [listed(store.columns["negatives"], row) for row in range(store.num_rows)]
    fields = {"remine_every": 1, "remine_ranks": (1, 60), "remine_count": 60}
    changing(store, **fields, remine_max_positive_ratio=0.5).update(1, params)
    vectors = cut(params, WIDTH)
    for row in range(store.num_rows):
        cosines = vectors[:PASSAGES] @ vectors[60 + row]
        lowest = cosines[[2 * row, 2 * row + 1]].min()
        limit = lowest - 0.5 * abs(lowest)
        own = {2 * row, 2 * row + 1}
        expected = {i for i in range(PASSAGES) if cosines[i] < limit and i not in own}
        expected = expected or set(before[row])
        assert set(listed(store.columns["negatives"], row)) == expected


def test_rows_of_one_query_share_their_positives():
    store, params = Store(), embeddings()
    store.columns["query"][1] = store.columns["query"][0]
    changing(store, remine_every=1, remine_ranks=(1, 60), remine_count=60).update(1, params)
    for row in (0, 1):
        assert not {0, 1, 2, 3} & set(listed(store.columns["negatives"], row))


def test_a_row_with_nothing_left_keeps_its_negatives(capsys):
    store, params = Store(), embeddings()
    params[:2] = -params[60]  # row 0's positives are as far as can be
    before = listed(store.columns["negatives"], 0)
    fields = {"remine_every": 1, "remine_ranks": (1, 60), "remine_count": 5}
    changing(store, **fields, remine_max_positive_ratio=0.9).update(1, params)
    assert listed(store.columns["negatives"], 0) == before
    assert "rows have fewer than 5" in capsys.readouterr().err


def test_more_ranks_than_passages_are_refused():
    with pytest.raises(UserError, match=r"remine_ranks = \(50, 100\): dataset made has only 60"):
        changing(Store(), remine_every=1)


def with_cosine(params, query, texts, cosine):
    """Puts texts at a cosine from a query."""
    q = params[query] / np.linalg.norm(params[query])
    for text in texts:
        other = params[text] - (params[text] @ q) * q
        other /= np.linalg.norm(other)
        params[text] = cosine * q + np.sqrt(1 - cosine**2) * other


@pytest.mark.parametrize(
    ("start", "now", "moves"),
    [(0.7, 0.5, True), (0.7, 0.62, False), (0.99, 0.85, False), (0.5, 0.6, False)],
)
def test_a_block_gives_way_if_it_is_easy_now_and_was_not(start, now, moves):
    store = Store()
    store.columns["negatives"] = ragged([[10, 11, 12, 13, 14]] + [[]] * 29)
    negatives = changing(store, replace_every=100, negatives=2)
    params = embeddings()
    with_cosine(params, 60, (10, 11), start)
    negatives.update(0, params)
    assert listed(store.columns["negatives"], 0) == [10, 11]
    assert negatives.next_change(0, 1000) == 100
    with_cosine(params, 60, (10, 11), now)
    negatives.update(100, params)
    assert listed(store.columns["negatives"], 0) == ([12, 13] if moves else [10, 11])


def test_each_block_is_measured_from_when_it_came_into_use_and_the_last_one_stays():
    store = Store()
    store.columns["negatives"] = ragged([[10, 11, 12]] + [[]] * 29)
    negatives = changing(store, replace_every=10, negatives=1)
    params = embeddings()
    steps = ((0.7, 0.1), (0.5, 0.4), (0.3, 0.39), (0.3, 0.3), (0.3, 0.1))
    used = []
    for i, (first, second) in enumerate(steps):
        with_cosine(params, 60, (10,), first)
        with_cosine(params, 60, (11,), second)
        with_cosine(params, 60, (12,), 0.7 - 0.1 * i)
        negatives.update(10 * i, params)
        used += listed(store.columns["negatives"], 0)
    assert used == [10, 11, 11, 12, 12]


def test_what_was_saved_goes_on_where_it_was():
    fields = {"remine_every": 6, "remine_ranks": (1, 30), "remine_count": 6, "replace_every": 2}
    one, other = Store(), Store()
    straight = changing(one, **fields, negatives=2)
    for step in (0, 2, 4, 6, 8):
        straight.update(step, embeddings(step))
    saved = straight.save()
    assert saved["0"]["block"].sum() > 0
    resumed = changing(other, **fields, negatives=2)
    resumed.restore(saved)
    for field, value in resumed.save()["0"].items():
        np.testing.assert_array_equal(value, saved["0"][field], err_msg=field)
    for step in (10, 12):
        straight.update(step, embeddings(step))
        resumed.update(step, embeddings(step))
        for field in ("values", "offsets"):
            a, b = (getattr(s.columns["negatives"], field) for s in (one, other))
            np.testing.assert_array_equal(a, b)


def test_nothing_changes_by_default():
    store = Store()
    negatives = ChangingNegatives(tiny.config(), [store], LookUp())
    before = store.columns["negatives"]
    negatives.update(0, None)
    assert negatives.save() is None
    assert negatives.next_change(0, 1000) == 1000
    assert store.columns["negatives"] is before


CONFIG = """
import runpy
from piccolo_jax.config import DatasetConfig


def get_config():
    config = runpy.run_path({tiny!r})["get_config"]()
    config.total_steps, config.eval.datasets = 10, ()
    config.data.datasets = (DatasetConfig(path={data!r}),)
    config.data.remine_every, config.data.remine_ranks, config.data.remine_count = 4, (2, 9), 4
    config.data.replace_every = 2
    config.checkpoint.every, config.checkpoint.keep = 1, 10
    return config
"""


def write_config(directory, task):
    files = small.write_training_files(directory)
    config = CONFIG.format(tiny=str(files / "tiny.py"), data=str(files / f"{task}.jsonl"))
    path = files / "changing.py"
    path.write_text(config, encoding="utf-8")
    return path


def run(config, workdir):
    return run_command(train.main, f"--config={config}", f"--workdir={workdir}")


def test_a_run_resumed_from_any_checkpoint_ends_bit_by_bit_the_same(
    tmp_path, quick_compiling, capsys
):
    config, straight = write_config(tmp_path, "retrieval"), tmp_path / "straight"
    assert run(config, straight) == 0
    said = capsys.readouterr().err
    assert re.findall(r"step (\d+): negatives of retrieval\.jsonl mined", said) == ["4", "8"]
    assert re.findall(r"step (\d+): negatives of \d+ of", said) == ["0", "2", "4", "6", "8"]
    expected = (straight / "export" / "model.safetensors").read_bytes()
    for step in (5, 8):  # between changes, and just before both
        resumed = tmp_path / str(step)
        shutil.copytree(straight, resumed)
        for checkpoint in (resumed / "checkpoints").iterdir():
            if int(checkpoint.name) > step:
                shutil.rmtree(checkpoint)
        assert run(config, resumed) == 0
        assert (resumed / "export" / "model.safetensors").read_bytes() == expected, step


def test_a_run_without_retrieval_has_nothing_to_mine(tmp_path, quick_compiling, capsys):
    config = write_config(tmp_path, "similarity")
    assert run(config, tmp_path / "run") == 2
    assert "no retrieval dataset" in one_error(capsys)
