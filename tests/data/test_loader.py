import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from piccolo_jax.config import Config, DatasetConfig
from piccolo_jax.data import loader
from piccolo_jax.data.loader import Batches
from piccolo_jax.data.packing import Shape, num_segments
from piccolo_jax.data.prepare import prepare_datasets
from piccolo_jax.data.tokenizer import Tokenizer
from piccolo_jax.errors import UserError
from piccolo_jax.tasks import TASKS

TOKENIZER = Path(__file__).resolve().parents[2] / "configs" / "quickstart_data" / "tokenizer"
BATCH_SIZE = 10
QUERY_LIMIT, LIMIT = 12, 30
SIZES = {"retrieval": 34, "similarity": 25, "classification": 23}
LABELS = ["体育", "财经", "国际", "文化", "教育", "军事"]


def sentences(rng, n):
    """Distinct texts of 3 to 45 characters, some beyond the limits."""
    alphabet = list("的一是在不了有和人这中大为上个国我以要他时来用们生到作地于出就分对成会")
    return [
        f"{i} " + "".join(rng.choice(alphabet, rng.integers(3, 46))) for i in map(str, range(n))
    ]


def make_rows(task, seed=0):
    """Rows that share passages and labels, with lists of any length."""
    rng = np.random.default_rng(seed)
    texts, n = sentences(rng, 200), SIZES[task]
    if task == "retrieval":
        return [
            {
                "text": texts[i],
                "text_pos": rng.choice(texts[100:], rng.integers(1, 4), replace=False).tolist(),
                "text_neg": rng.choice(texts[100:], rng.integers(0, 4), replace=False).tolist(),
                "type": "retri_contrast",
            }
            for i in range(n)
        ]
    if task == "similarity":
        return [
            {"text": texts[i], "text_pair": texts[50 + i // 2], "label": i / 7, "type": "cosent"}
            for i in range(n)
        ]
    rows = []
    for i in range(n):
        label, *others = rng.permutation(LABELS).tolist()
        others = others[: i % 4]  # of some rows, none
        rows.append(
            {"text": texts[i], "text_pos": label, "text_neg": others, "type": "cls_contrast"}
        )
    return rows


def make_config(folder, tasks, seed=0):
    config = Config(seed=seed, batch_size=BATCH_SIZE)
    config.data.query_max_length, config.data.max_length = QUERY_LIMIT, LIMIT
    config.data.negatives = 2
    config.loss.classification.max_negatives = 3
    datasets = []
    for task in tasks:
        path = folder / f"{task}.jsonl"
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in make_rows(task)]
        path.write_text("".join(lines), encoding="utf-8")
        datasets.append(DatasetConfig(str(path), query_prompt="问", passage_prompt="文:"))
    config.data.datasets = tuple(datasets)
    return config


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(TOKENIZER)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def batches(folder, tokenizer):
    """batches(*tasks, shards=1, local=None, chunks=1, **fields of DataConfig) -> Batches"""

    def make(*tasks, shards=1, local=None, seed=0, chunks=1, **fields):
        config = make_config(folder, tasks, seed)
        config.train.micro_batches = chunks
        config.data = dataclasses.replace(config.data, **fields)
        datasets = prepare_datasets(config, tokenizer, TASKS, folder / "prepared")
        return Batches(
            config, datasets, TASKS, 64, shards, range(shards) if local is None else local
        )

    return make


def expected_tokens(tokenizer, text, prompt="文:", limit=LIMIT):
    encode = tokenizer.hf(prompt + text, truncation=True, max_length=limit)
    return tuple(encode["input_ids"])


def read_texts(batch):
    """The token ids of every text slot, read from the token arrays."""
    arrays, texts = batch.sharded, []
    for slot in arrays["text_slots"]:
        row, segment = divmod(int(slot), num_segments(batch.shape.length))
        (columns,) = np.nonzero(arrays["segments"][row] == segment + 1)
        assert (arrays["positions"][row, columns] == np.arange(len(columns))).all()
        texts.append(tuple(arrays["tokens"][row, columns].tolist()))
    return texts


def same(a, b):
    """Whether two batches are equal in every number."""
    return all(
        getattr(a, field.name) == getattr(b, field.name)
        for field in dataclasses.fields(a)
        if field.name not in ("sharded", "replicated")
    ) and all(
        getattr(a, name).keys() == getattr(b, name).keys()
        and all(np.array_equal(v, getattr(b, name)[k]) for k, v in getattr(a, name).items())
        for name in ("sharded", "replicated")
    )


# A batch is its rows, written down independently: raw JSON and transformers' own encoding.


@pytest.mark.parametrize("shards", [1, 3, 8])
def test_a_retrieval_batch_holds_the_rows_texts(batches, tokenizer, shards):
    rows = make_rows("retrieval")
    of_query = {expected_tokens(tokenizer, r["text"], "问", QUERY_LIMIT): r for r in rows}
    assert len(of_query) == len(rows)
    all_batches = batches("retrieval", shards=shards)
    seen, drawn = [], set()
    for step in range(34):
        batch = all_batches.at(step)
        texts, arrays = read_texts(batch), batch.replicated
        assert arrays.keys() == {
            "query", "positive", "positive_keep", "negative", "negative_keep",
        }  # fmt: skip
        assert arrays["negative"].shape == arrays["negative_keep"].shape == (BATCH_SIZE, 2)
        used = {int(i) for name in ("query", "positive", "negative") for i in arrays[name].flat}
        assert len({texts[i] for i in used}) == len(used)  # each text is there once
        assert batch.num_tokens == sum(len(texts[i]) for i in used)
        assert batch.fill == batch.num_tokens / batch.sharded["tokens"].size
        for i in range(BATCH_SIZE):
            row = of_query[texts[arrays["query"][i]]]
            seen.append(row["text"])
            positives = [expected_tokens(tokenizer, t) for t in row["text_pos"]]
            negatives = [expected_tokens(tokenizer, t) for t in row["text_neg"]]
            keep = arrays["negative_keep"][i]
            chosen = [texts[j] for j in arrays["negative"][i][keep]]
            assert texts[arrays["positive"][i, 0]] in positives
            assert len(set(chosen)) == len(chosen) == min(2, len(negatives))
            assert set(chosen) <= set(negatives)
            drawn.update((row["text"], texts[arrays["positive"][i, 0]], t) for t in chosen)
    assert len(seen) == 10 * len(rows)  # ten epochs, each with every row
    for epoch in range(10):
        assert len(set(seen[34 * epoch : 34 * (epoch + 1)])) == 34
    possible = sum(len(r["text_pos"]) * len(r["text_neg"]) for r in rows)
    assert len(drawn) > 0.8 * possible  # every positive and negative has its turn


@pytest.mark.parametrize("shards", [1, 3, 8])
def test_a_similarity_batch_holds_the_rows_texts_and_scores(batches, tokenizer, shards):
    expected = {
        tuple(expected_tokens(tokenizer, row[k], "问") for k in ("text", "text_pair")): row["label"]
        for row in make_rows("similarity")
    }
    all_batches, seen = batches("similarity", shards=shards), []
    for step in range(5):
        batch = all_batches.at(step)
        texts, arrays = read_texts(batch), batch.replicated
        assert arrays["score"].dtype == np.float32
        for first, second, score in zip(
            *(arrays[n] for n in ("first", "second", "score")), strict=True
        ):
            pair = texts[first], texts[second]
            assert score == np.float32(expected[pair])
            seen.append(pair)
    assert sorted(seen) == sorted([*expected, *expected])


@pytest.mark.parametrize("shards", [1, 3, 8])
def test_a_classification_batch_holds_the_rows_texts_and_each_label_once(
    batches, tokenizer, shards
):
    label_of = {expected_tokens(tokenizer, label): label for label in LABELS}
    row_of = {expected_tokens(tokenizer, r["text"], "问"): r for r in make_rows("classification")}
    all_batches = batches("classification", shards=shards)
    drawn = {}
    for step in range(23):
        batch = all_batches.at(step)
        texts, arrays = read_texts(batch), batch.replicated
        assert sum(text in label_of for text in texts) <= len(LABELS)
        for i in range(BATCH_SIZE):
            row = row_of[texts[arrays["text"][i]]]
            assert label_of[texts[arrays["label"][i]]] == row["text_pos"]
            keep = arrays["other_labels_keep"][i]
            others = {label_of[texts[j]] for j in arrays["other_labels"][i][keep]}
            assert len(others) == keep.sum() == (len(row["text_neg"]) or 3)
            possible = set(row["text_neg"] or LABELS) - {row["text_pos"]}
            assert others <= possible
            drawn.setdefault(row["text"], set()).update(others)
    assert all(len(drawn[r["text"]]) == (len(r["text_neg"]) or 5) for r in row_of.values())


# The same batch on any number of devices and processes


@pytest.mark.parametrize("task", SIZES)
def test_shards_change_the_places_of_texts_and_nothing_else(batches, task):
    one, *others = (batches(task, shards=shards) for shards in (1, 3, 8))
    for step in (0, 5):
        expected, expected_texts = one.at(step), read_texts(one.at(step))
        for batch in (other.at(step) for other in others):
            texts = read_texts(batch)
            assert batch.num_tokens == expected.num_tokens
            for name, array in expected.replicated.items():
                actual = batch.replicated[name]
                assert actual.dtype == array.dtype
                if name in TASKS[task].text_arrays:
                    mask = batch.replicated.get(f"{name}_keep", np.ones(array.shape, bool))
                    assert [texts[i] for i in actual[mask]] == [
                        expected_texts[i] for i in array[mask]
                    ]
                else:
                    assert (actual == array).all()


@pytest.mark.parametrize("local", [[0], [1, 2], [2]])
@pytest.mark.parametrize("task", SIZES)
def test_a_process_holds_its_part_of_the_global_batch(batches, task, local):
    whole, part = batches(task, shards=3), batches(task, shards=3, local=local)
    for step in range(4):
        a, b = whole.at(step), part.at(step)
        assert (a.shape, a.num_tokens, a.fill) == (b.shape, b.num_tokens, b.fill)
        for name, array in a.sharded.items():
            parts = array.reshape(3, -1, *array.shape[1:])[local]
            assert (b.sharded[name] == parts.reshape(-1, *array.shape[1:])).all()
        for name, array in a.replicated.items():
            assert (b.replicated[name] == array).all()


def test_texts_and_their_slots_are_on_the_same_shard(batches):
    batch = batches("retrieval", shards=3).at(1)
    slots = batch.sharded["text_slots"].reshape(3, batch.shape.texts)
    per_shard = batch.shape.rows * num_segments(batch.shape.length)
    assert (slots // per_shard == np.arange(3)[:, None]).all()


# Any step, directly


def test_a_step_is_the_same_whenever_it_is_asked_for(batches):
    a, b = batches(*SIZES), batches(*SIZES)
    backwards = {step: a.at(step) for step in reversed(range(12))}
    for step in range(12):
        assert same(b.at(step), backwards[step])
        assert backwards[step].step == step
    assert {batch.task for batch in backwards.values()} == set(SIZES)
    assert not same(batches(*SIZES, seed=1).at(3), b.at(3))


def test_a_resumed_run_gets_the_batches_that_remain(batches):
    a, b = batches(*SIZES), batches(*SIZES)
    whole = list(a.start(0, 11))
    assert [batch.step for batch in whole] == list(range(11))
    for first in (1, 6, 10):
        rest = list(b.start(first, 11))
        assert len(rest) == 11 - first
        assert all(map(same, rest, whole[first:]))
    assert list(b.start(11, 11)) == []


def test_errors_of_the_reading_threads_reach_the_caller(batches, monkeypatch):
    broken = batches("similarity")

    def fail(texts):
        raise UserError("damaged")

    monkeypatch.setattr(broken.stores[0], "tokens", fail)
    with pytest.raises(UserError, match="damaged"):
        list(broken.start(0, 2))


# Negatives


def test_no_negatives_leave_an_empty_axis(batches):
    batch = batches("retrieval", negatives=0, shards=3).at(0)
    assert batch.replicated["negative"].shape == (BATCH_SIZE, 0)
    assert batch.replicated["negative_keep"].shape == (BATCH_SIZE, 0)
    texts = {*batch.replicated["query"], *batch.replicated["positive"].flat}
    assert batch.num_tokens == sum(len(read_texts(batch)[i]) for i in texts)


def test_masked_entries_point_at_a_text_of_the_batch_and_cost_none(batches):
    batch = batches("retrieval", negatives=20, shards=3).at(0)
    texts, arrays = read_texts(batch), batch.replicated
    keep = arrays["negative_keep"]
    assert not keep.all()
    used = {*arrays["query"], *arrays["positive"].flat, *arrays["negative"][keep]}
    assert set(arrays["negative"][~keep]) <= used
    assert batch.num_tokens == sum(len(texts[i]) for i in used)


def test_all_negatives_are_drawn_in_arrays_no_wider_than_the_longest_list(batches):
    batch = batches("retrieval", negatives=2**31 - 1, positives=10**9).at(0)
    assert batch.replicated["negative"].shape == (BATCH_SIZE, 3)
    assert batch.replicated["positive"].shape == (BATCH_SIZE, 3)
    fewer = batches("retrieval", negatives=3, positives=3).at(0)
    assert same(batch, fewer)


def test_labels_are_drawn_in_arrays_no_wider_than_there_are_labels(folder, tokenizer):
    config = make_config(folder, ["classification"])
    config.loss.classification.max_negatives = 10**9
    datasets = prepare_datasets(config, tokenizer, TASKS, folder / "prepared")
    batch = Batches(config, datasets, TASKS, 64, 1, [0]).at(0)
    assert batch.replicated["other_labels"].shape == (BATCH_SIZE, len(LABELS))


# Shapes


def test_a_batch_larger_than_every_dataset_is_an_error_that_says_what_fits(folder, tokenizer):
    config = make_config(folder, SIZES)
    config.batch_size = 35
    datasets = prepare_datasets(config, tokenizer, TASKS, folder / "prepared")
    with pytest.raises(
        UserError, match=r"batch_size = 35: dataset retrieval\.jsonl has only 34 .* most 34"
    ):
        Batches(config, datasets, TASKS, 64, 1, [0])


@pytest.mark.parametrize("shards", [1, 3])
def test_datasets_smaller_than_the_batch_have_smaller_batches(folder, tokenizer, shards):
    config = make_config(folder, SIZES)
    config.batch_size = 30
    config.data.datasets[1].batch_size = 7
    config.data.datasets[0].max_rows = 31
    datasets = prepare_datasets(config, tokenizer, TASKS, folder / "prepared")
    batches = Batches(config, datasets, TASKS, 64, shards, range(shards))
    assert [note.split(":")[0] for note in batches.notes] == ["classification.jsonl"]
    expected = {"retrieval": (30, 31), "similarity": (7, 25), "classification": (23, 23)}
    uses = dict.fromkeys(SIZES, 0)
    for step in range(15):
        batch = batches.at(step)
        rows, used = expected[batch.task]
        uses[batch.task] += 1
        assert batch.rows == rows
        assert batch.epoch == uses[batch.task] * rows / used
        for name in TASKS[batch.task].text_arrays:
            assert len(batch.replicated[name]) == rows
    assert set(uses.values()) == {5}
    seen = {tuple(np.sort(batches.schedule.rows(0, use))) for use in range(31)}
    assert len(set().union(*seen)) == 31


def test_labels_without_any_listed_others_are_contrasted_with_all_of_the_dataset(folder, tokenizer):
    """Thousands of labels, one or several a row, and names that no row has."""
    rng = np.random.default_rng(0)
    names = {str(i): f"标签 {i}" for i in range(3000)}
    own = [sorted(rng.choice(2990, rng.integers(1, 4), replace=False).tolist()) for _ in range(40)]
    own[0] = [5] * 3
    rows = [{"text": f"文 {i}", "label": own[i] if i % 2 else own[i][0]} for i in range(40)]
    own = [set(own[i]) if i % 2 else {own[i][0]} for i in range(40)]
    path = folder / "many.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "names.json").write_text(json.dumps(names))
    config = make_config(folder, ())
    config.loss.classification.max_negatives = 8
    config.data.datasets = (DatasetConfig(str(path), label_names=str(folder / "names.json")),)
    (dataset,) = prepare_datasets(config, tokenizer, TASKS, folder / "prepared")
    size = sum(f.stat().st_size for f in (folder / "prepared").glob("many*/*labels*"))
    assert size < 20_000  # nothing is listed for each row
    batches = Batches(config, [dataset], TASKS, 64, 1, [0])
    number_of = {expected_tokens(tokenizer, f"标签 {i}", ""): i for i in range(3000)}
    row_of = {expected_tokens(tokenizer, f"文 {i}", ""): i for i in range(40)}
    drawn, chosen = set(), {}
    for step in range(40):
        batch = batches.at(step)
        texts, arrays = read_texts(batch), batch.replicated
        for i in range(BATCH_SIZE):
            row = row_of[texts[arrays["text"][i]]]
            label = number_of[texts[arrays["label"][i]]]
            others = {number_of[texts[j]] for j in arrays["other_labels"][i]}
            assert arrays["other_labels_keep"][i].all()
            assert label in own[row]
            assert len(others) == 8
            assert not others & own[row]
            drawn |= others
            chosen.setdefault(row, set()).add(label)
    assert sum(map(len, chosen.values())) > 0.9 * sum(map(len, own))  # each has its turn
    assert len(drawn) > 1500
    assert drawn & set(range(2990, 3000))  # also those that are no row's


@pytest.mark.parametrize("shards", [1, 8])
def test_planned_shapes_hold_every_batch_of_many_epochs(batches, shards):
    all_batches = batches(*SIZES, shards=shards)
    shapes = {(b.task, b.shape) for b in map(all_batches.at, range(90))}
    planned = zip(SIZES, (plan.shape for plan in all_batches.plans), strict=True)
    assert shapes == set(planned)
    assert all(0.4 < plan.fill <= 1 for plan in all_batches.plans)


def test_a_batch_beyond_the_plan_gets_the_next_shape_of_a_ladder(batches):
    all_batches = batches("retrieval")
    before = all_batches.at(0)
    tight = Shape(length=before.shape.length, rows=3, texts=7)
    all_batches.plans[0] = loader.Plan(tight, 1.0)
    shapes = {all_batches.at(step).shape for step in range(34)}
    assert len(shapes) == len({shape.rows for shape in shapes}) <= 3
    after = all_batches.at(0)
    assert before.shape != after.shape
    assert after.shape.length == before.shape.length
    texts, expected = read_texts(after), read_texts(before)
    for name in ("query", "positive"):
        assert [texts[i] for i in after.replicated[name].flat] == [
            expected[i] for i in before.replicated[name].flat
        ]


def test_the_ladder_of_shapes_is_short_and_grows_by_a_bounded_factor():
    planned = Shape(length=64, rows=20, texts=100)
    need = dataclasses.make_dataclass("Need", ["rows_needed", "texts_needed"])
    needs = [need(rows, texts) for rows in range(1, 2000, 7) for texts in range(1, 9000, 501)]
    shapes = [loader._smallest_fitting(planned, n) for n in needs]
    for shape, n in zip(shapes, needs, strict=True):
        assert shape.rows >= n.rows_needed
        assert shape.texts >= n.texts_needed
        if n.rows_needed <= 20 and n.texts_needed <= 100:
            assert shape == planned
    ladder = sorted(set(shapes))
    assert len(ladder) < 25
    for a, b in itertools.pairwise(ladder):
        assert 1.2 * a.rows < b.rows < 1.45 * a.rows
        assert 1.2 * a.texts < b.texts < 1.45 * a.texts


def test_rounded_sizes_are_few_and_at_most_an_eighth_too_large():
    sizes = [loader._round_up(n) for n in range(1, 10_000)]
    assert all(n <= size <= 1.125 * n for n, size in enumerate(sizes, 1))
    assert sizes[:16] == list(range(1, 17))
    assert len(set(sizes)) < 100


def test_rows_come_in_equal_chunks_or_the_run_is_refused(batches):
    for chunks in (3, 4):
        chunked = batches("retrieval", chunks=chunks)
        assert chunked.plans[0].shape.rows % chunks == 0
        chunked.plans[0] = loader.Plan(Shape(length=128, rows=chunks, texts=7, chunks=chunks), 1.0)
        assert all(chunked.at(step).shape.rows % chunks == 0 for step in range(5))
    with pytest.raises(UserError, match=r"train\.micro_batches = 1000: .* make it at most \d+, or"):
        batches("retrieval", chunks=1000)


def test_rows_are_as_long_as_the_longest_text_of_the_dataset(batches):
    (plan,) = batches("retrieval").plans
    assert plan.shape.length >= LIMIT
    assert plan.shape.length in loader._ROW_LENGTHS
