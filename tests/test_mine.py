"""The command, on excerpts of CSL and a small random model."""

import errno
import json
import os

import numpy as np
import pytest
import small
from small import one_error, run_command

from piccolo_jax import build, export, mine
from piccolo_jax.config import Config, DatasetConfig
from piccolo_jax.data.prepare import prepare_datasets
from piccolo_jax.data.tokenizer import Tokenizer
from piccolo_jax.evaluation import encoder
from piccolo_jax.evaluation.encoder import Encoder, cut
from piccolo_jax.tasks import TASKS

DATA = small.TOKENIZER.parent
ROWS = 40


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    config = small.config(embed_dim=30)
    parts = build.build(config)
    path = tmp_path_factory.mktemp("run") / "export"
    export.write(path, small.params(parts), parts, config)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """train.jsonl of ROWS rows without negatives."""
    path = tmp_path_factory.mktemp("files")
    lines = (DATA / "retrieval.train.jsonl").read_text("utf-8").splitlines()[:ROWS]
    rows = [{**json.loads(line), "text_neg": []} for line in lines]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (path / "train.jsonl").write_text(text, encoding="utf-8")
    return path


def run(model, folder, *flags, output="out.jsonl"):
    return run_command(
        mine.main, f"--model={model}", f"--queries={folder / 'train.jsonl'}",
        f"--output={folder / output}", *flags,
    )  # fmt: skip


def read(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def mined(model, folder):
    assert run(model, folder, "--ranks=3:20", "--count=5", output="first.jsonl") == 0
    return read(folder / "first.jsonl")


def test_negatives_have_the_ranks_and_scores_of_an_exact_search(mined, model, folder):
    made, params = encoder.load(model)
    rows = read(folder / "train.jsonl")
    prompt = "查询："  # which the model's directory names
    passages = list(dict.fromkeys(text for row in rows for text in small_list(row["text_pos"])))
    queries = cut(made.encode(params, [row["text"] for row in rows], prompt), 30)
    keys = cut(made.encode(params, passages), 30)
    assert len(mined) == ROWS
    for row, source, query in zip(mined, rows, queries, strict=True):
        assert list(row) == ["text", "text_pos", "text_neg", "neg_ranks", "neg_scores", "type"]
        assert (row["text"], row["type"]) == (source["text"], "retri_contrast")
        assert row["text_pos"] == small_list(source["text_pos"])
        assert len(row["text_neg"]) == len(row["neg_ranks"]) == len(row["neg_scores"]) == 5
        assert not set(row["text_neg"]) & set(row["text_pos"])
        assert all(3 <= rank <= 20 for rank in row["neg_ranks"])
        cosines = keys @ query
        for text, rank, score in zip(
            row["text_neg"], row["neg_ranks"], row["neg_scores"], strict=True
        ):
            place = passages.index(text)
            assert score == pytest.approx(cosines[place], abs=2e-6)
            assert (
                abs((cosines > cosines[place]).sum() + 1 - rank)
                <= (np.abs(cosines - cosines[place]) < 1e-6).sum() - 1
            )


def small_list(value):
    return value if isinstance(value, list) else [value]


def test_a_report_says_scores_by_rank_and_what_each_rule_removed(mined, folder):
    report = json.loads((folder / "first.report" / "report.json").read_text("utf-8"))
    assert report["queries"] == ROWS
    assert report["candidates"] == ROWS * 18 == report["kept"] + sum(report["removed"].values())
    assert report["negatives"] == sum(len(row["text_neg"]) for row in mined)
    assert [row["rank"] for row in report["score_by_rank"]] == list(range(3, 21))
    medians = [row["50%"] for row in report["score_by_rank"]]
    assert medians == sorted(medians, reverse=True)
    for name in ("score_by_rank.png", "removed.png"):
        content = (folder / "first.report" / name).read_bytes()
        assert content.startswith(b"\x89PNG")
        assert len(content) > 5000
    assert not list(folder.rglob("*.partial*"))


def test_another_window_encodes_nothing_and_a_seed_repeats_its_draws(
    mined, model, folder, monkeypatch
):
    def never(*_, **__):
        raise AssertionError("encodes")

    monkeypatch.setattr(Encoder, "encode", never)
    flags = ("--ranks=3:20", "--count=5")
    assert run(model, folder, *flags, output="again.jsonl") == 0
    assert read(folder / "again.jsonl") == mined
    assert run(model, folder, *flags, "--seed=1", output="seed.jsonl") == 0
    assert read(folder / "seed.jsonl") != mined
    assert run(model, folder, "--ranks=1:4", "--count=2", "--dim=8", output="dim.jsonl") == 0
    assert {rank for row in read(folder / "dim.jsonl") for rank in row["neg_ranks"]} <= {1, 2, 3, 4}


def test_queries_with_too_few_are_said_and_have_what_there_is(model, folder, capsys):
    flags = ("--ranks=1:6", "--count=6", "--max-positive-ratio=0.95", "--margin=0.01")
    assert run(model, folder, *flags, "--max-score=0.99", output="few.jsonl") == 0
    rows = read(folder / "few.jsonl")
    short = sum(len(row["text_neg"]) < 6 for row in rows)
    assert short > 0
    assert f"{short} queries have fewer than 6 negatives" in capsys.readouterr().out
    report = json.loads((folder / "few.report" / "report.json").read_text("utf-8"))
    assert report["queries_with_too_few"] == short
    assert len(report["first_queries_with_too_few"]) == short


def test_the_output_is_prepared_directly(mined, folder, tmp_path):
    config = Config(batch_size=2)
    config.data.datasets = (DatasetConfig(path=str(folder / "first.jsonl")),)
    tokenizer = Tokenizer(small.TOKENIZER)
    (dataset,) = prepare_datasets(config, tokenizer, TASKS, tmp_path, quiet=True)
    assert (dataset.store.task, dataset.store.num_rows) == ("retrieval", ROWS)
    assert dataset.store.manifest["rejected"] == 0
    sizes = dataset.store.columns["negatives"].sizes(np.arange(ROWS))
    assert sizes.tolist() == [5] * ROWS


def test_a_beir_folder_is_mined_and_positives_are_known_by_id(model, tmp_path, capsys):
    passages = [{"id": str(i), "text": f"第{i}篇文章"} for i in range(12)]
    for name, rows in (("corpus", passages), ("queries.dev", [{"id": "q", "text": "第三篇"}])):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(text, encoding="utf-8")
    (tmp_path / "qrels.dev.tsv").write_text("q\t3\t1\nq\t5\t1\n")
    done = run_command(
        mine.main, f"--model={model}", f"--queries={tmp_path}", "--split=dev", "--ranks=1:12",
        "--count=12", f"--output={tmp_path / 'out.jsonl'}", f"--cache={tmp_path / 'c'}",
    )  # fmt: skip
    assert done == 0
    (row,) = read(tmp_path / "out.jsonl")
    assert row["text_pos"] == ["第3篇文章", "第5篇文章"]
    assert len(row["text_neg"]) == 10
    assert not set(row["text_neg"]) & set(row["text_pos"])
    report = json.loads((tmp_path / "out.report" / "report.json").read_text("utf-8"))
    assert report["removed"]["positive by id"] == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--ranks=1:500",), "goes beyond the 40 passages"),
        (("--ranks=1:4", "--count=5"), "--count=5: must be from 1 to 4"),
        (("--ranks=1:9", "--count=5", "--dim=31"), "--dim=31: must be from 1 to 30"),
        (("--ranks=1:9", "--count=5", "--max-length=65"), "must be from 3 to 64 tokens"),
        (("--max-positive-ratio=nan",), "--max-positive-ratio=nan: must be"),
        (("--device-memory=-1",), "--device-memory=-1.0: must be"),
        (("--ranks=1:9", "--count=5", "--device-memory=1e-6"), "must hold 2048 embeddings"),
        (("--corpus=nowhere.jsonl",), "nowhere.jsonl: no such file"),
        (("--model=nowhere",), "nowhere: is not a folder"),
        (("--output=nowhere/out.jsonl",), "the folder does not exist"),
        (("--output=out.npy",), "must end in .jsonl"),
        (("--queries=nowhere.jsonl",), "nowhere.jsonl: no such file"),
    ],
)
def test_what_cant_be_done_is_one_message(mined, model, folder, flags, message, capsys):
    assert run(model, folder, *flags, output="bad.jsonl") == 2
    assert message in one_error(capsys)
    assert not (folder / "bad.jsonl").exists()


def test_a_run_that_fails_at_the_end_leaves_nothing_behind(mined, model, folder, monkeypatch):
    before = sorted(p.name for p in folder.iterdir())

    def no_room(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(mine.os, "replace", no_room)
    assert run(model, folder, "--ranks=1:9", "--count=1", output="full.jsonl") == 2
    assert sorted(p.name for p in folder.iterdir()) == before


def test_what_is_there_is_replaced_only_if_asked_for(mined, model, folder, capsys):
    assert run(model, folder, "--ranks=1:9", "--count=1", output="first.jsonl") == 2
    assert "first.jsonl exists; --overwrite replaces it" in one_error(capsys)
    before = (folder / "first.jsonl").read_bytes()
    (folder / "taken.jsonl").write_bytes(before)
    flags = ("--ranks=1:9", "--count=1", "--overwrite")
    assert run(model, folder, *flags, output="taken.jsonl") == 0
    assert len(read(folder / "taken.jsonl")[0]["text_neg"]) == 1
