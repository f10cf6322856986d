import json
from pathlib import Path

import numpy as np
import pytest

from piccolo_jax.config import Config, DatasetConfig
from piccolo_jax.data import check, check_report, collect
from piccolo_jax.data.check import check_dataset
from piccolo_jax.data.tokenizer import Tokenizer
from piccolo_jax.errors import UserError
from piccolo_jax.tasks import TASKS

TOKENIZER = Path(__file__).resolve().parents[2] / "configs" / "quickstart_data" / "tokenizer"


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(TOKENIZER)


@pytest.fixture
def checked(tmp_path, tokenizer, monkeypatch):
    """checked(rows, **fields of DatasetConfig) -> Checked, read two rows at a time."""
    monkeypatch.setattr(collect, "_ROWS_AT_ONCE", 2)

    def run(rows, config=None, **fields):
        path = tmp_path / "rows.jsonl"
        lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
        path.write_text("".join(line + "\n" for line in lines))
        config = config or Config()
        return check_dataset(DatasetConfig(str(path), **fields), config, tokenizer, TASKS, True)

    return run


def problems(checked):
    return {problem.what.split(": ")[1]: problem.count for problem in checked.problems}


def report(checked):
    return "\n".join(check_report.lines_of(checked))


def test_rows_texts_and_tokens_are_counted(checked):
    c = checked([
        {"query": "天气", "pos": ["好天", "中国北京"], "neg": ["雨"]},
        {"query": "首都", "pos": "中国北京"},
        {"query": "首 都", "pos": "好天", "neg": ["雨", "天气"]},
        {"query": "", "pos": "x"},
    ])  # fmt: skip
    assert (c.task, c.num_rows, c.num_texts, len(c.lengths), c.tokenised) == (
        "retrieval", 3, 10, 5, 7
    )  # fmt: skip
    sides = {side.name: (side.texts, len(side.lengths), side.limit) for side in c.sides}
    assert sides == {"query": (3, 2, 64), "positives": (4, 2, 512), "negatives": (3, 2, 512)}
    text = report(c)
    assert "rows       3 usable, 1 rejected" in text
    assert "texts      10, of which 5 unique (2 more differ in characters, not in tokens)" in text
    assert "texts per second" in text


def test_the_share_that_is_cut_is_told_for_each_side(checked):
    config = Config()
    config.data.query_max_length, config.data.max_length = 4, 6
    c = checked(
        [{"query": "天" * n, "pos": "雨" * n, "neg": ["中" * 9] * (n > 4)} for n in (1, 2, 3, 5)],
        config=config,
    )
    assert {side.name: (side.cut, side.texts) for side in c.sides} == {
        "query": (2, 4), "positives": (1, 4), "negatives": (1, 1)
    }  # fmt: skip
    query, positives, negatives = (
        line for line in report(c).split("\n") if "(" in line and "%" in line
    )
    assert query.endswith("2 (50.0%)")
    assert positives.endswith("1 (25.0%)")
    assert negatives.endswith("1 (100.0%)")


def test_positives_that_are_negatives_or_the_query_are_counted_with_prompts_too(checked):
    rows = [
        {"query": "a", "pos": ["b", "a"], "neg": ["c"]},
        {"query": "a", "pos": ["b"], "neg": ["b", "c"]},
        {"query": "d", "pos": ["e"], "neg": ["d"]},
        {"query": "d", "pos": ["f"], "neg": ["g", "d"]},
        {"query": "f", "pos": ["d"], "neg": ["a"]},
    ]
    for prompts in ({}, {"query_prompt": "问", "passage_prompt": "文"}):
        c = checked(rows, **prompts)
        assert problems(c) == {
            "the same as an earlier row": 0,
            "a positive is the query itself": 1,
            "a positive is also a negative": 1,
            "a negative is the query itself": 2,
            "a document is positive and negative for the same query": 1,
        }
    assert "         1  rows: a positive is also a negative: “b”" in report(c)


def test_a_document_that_two_rows_judge_differently_is_a_contradiction(checked):
    c = checked([
        {"query": "a", "pos": ["b", "c"], "neg": ["d"]},
        {"query": "a", "pos": ["e"], "neg": ["b", "c"]},
        {"query": "x", "pos": ["d"], "neg": ["e"]},
        {"query": "a", "pos": ["d"], "neg": ["b"]},
    ])  # fmt: skip
    assert problems(c)["a document is positive and negative for the same query"] == 3
    assert problems(c)["a positive is also a negative"] == 0


def test_rows_with_the_same_texts_are_duplicates_in_any_order_of_lists(checked):
    first = {"query": "a", "pos": ["b", "c"], "neg": ["d"]}
    c = checked([
        first, {"query": "a", "pos": ["c", "b"], "neg": ["d"]}, first,
        {"query": "a", "pos": ["b"], "neg": ["c", "d"]}, {"query": "b", "pos": ["a", "c"]},
        {"query": "d", "pos": ["b", "c"], "neg": ["a"]},
    ])  # fmt: skip
    assert problems(c)["the same as an earlier row"] == 2


def test_similarity_rows_with_equal_texts_and_contradicting_scores(checked):
    rows = [("a", "b", 1), ("b", "a", 0), ("a", "b", 1), ("c", "c", 2), ("c", "d", 2),
            ("d", "c", 2.5), ("f", "e", 3), ("e", "f", 1), ("g", "h", 0.0),
            ("h", "g", -0.0)]  # fmt: skip
    c = checked([{"sentence1": a, "sentence2": b, "score": s} for a, b, s in rows])
    assert problems(c) == {
        "the same as an earlier row": 1,
        "both texts are the same": 1,
        "the same texts with contradicting scores": 3,
    }
    assert c.scores == {0.0: 3, 1.0: 3, 2.0: 2, 2.5: 1, 3.0: 1}
    assert "scores     5 different, from 0 to 3, mean 1.25" in report(c)
    assert "         3   30.0%  1" in report(c)


def test_labels_are_listed_with_their_balance(checked):
    labels = ["体育"] * 5 + ["财经"] * 2 + ["军事"]
    rows = [
        {"text": f"球赛{i}", "text_pos": label, "text_neg": ["汽车"], "type": "cls_contrast"}
        for i, label in enumerate(labels)
    ]
    rows += [
        {**rows[0], "text_pos": "财经"},
        {**rows[0], "text": "体育", "text_neg": ["汽车", "体育"]},
    ]
    c = checked(rows)
    assert c.labels == {"体育": 6, "财经": 3, "军事": 1}
    assert problems(c) == {
        "the same as an earlier row": 0,
        "the text is its own label": 1,
        "a label is also among the others": 1,
        "with different labels in different rows": 1,
    }
    text = report(c)
    assert "labels     3, from 1 to 6 rows each (1 : 6.0); as varied as 2.5 even ones" in text
    assert "         6   60.0%  “体育”" in text


def test_of_many_labels_the_most_and_least_frequent_are_shown(checked):
    rows = [
        {"text": f"{i} {j}", "text_pos": f"天{i}", "text_neg": [], "type": "cls_contrast"}
        for i in range(30)
        for j in range(i + 1)
    ]
    text = report(checked(rows))
    assert "labels     30, from 1 to 30 rows each" in text
    assert "“天29”" in text
    assert "“天13”" in text
    assert "“天12”" not in text
    assert "… 10 more …" in text
    assert "“天0”" in text


def test_labels_that_are_too_many_to_name_count_in_the_balance(checked, monkeypatch):
    monkeypatch.setattr(check, "_MOST_LABELS_NAMED", 1)
    rows = [{"text": f"文{i}", "label": label} for i, label in enumerate("甲乙丙丙丙")]
    c = checked(rows)
    assert c.labels == {"甲": 1, "乙": 1}
    assert "labels     3, from 1 to 3 rows each (1 : 3.0)" in report(c)


def test_rejected_rows_are_listed_with_file_line_and_reason_and_broken_lines_among_them(
    checked, tmp_path
):
    c = checked(
        [{"query": "a", "pos": "b"}, {"query": " ", "pos": "b"}, '{"query": ', "[]",
         {"query": "c", "pos": []}, {"query": "d", "pos": "e"}]
    )  # fmt: skip
    file = tmp_path / "rows.jsonl"
    assert c.num_rows == 2
    assert [row.damaged for row in c.collected.rejected.first] == [False, True, True, False]
    text = report(c)
    assert f"  {file}:2: query is empty" in text
    assert f"  {file}:3: broken JSON" in text
    assert f"  {file}:4: not a JSON object" in text
    assert f"  {file}:5: no positive in pos" in text


def test_no_more_than_the_first_rejected_rows_are_kept(checked, monkeypatch):
    monkeypatch.setattr(collect, "_MOST_REJECTED_LISTED", 60)
    c = checked([{"query": "a", "pos": "b"}, *[{"query": "", "pos": "b"}] * 70])
    rejected = c.collected.rejected
    assert (rejected.count, len(rejected.first)) == (70, 60)
    assert dict(rejected.reasons) == {"query is empty": 70}
    assert "… 20 more" in report(c)


def test_what_preparing_refuses_is_refused(checked):
    with pytest.raises(UserError, match="no usable row"):
        checked([{"query": "", "pos": "b"}])
    with pytest.raises(UserError, match="at least two labels"):
        checked([{"text": "a", "text_pos": "体育", "type": "cls_contrast"}] * 2)


def test_the_histogram_counts_every_length_once():
    lengths = np.array([1, 2, 2, 31, 31, 31, 31, 15])
    lines = check_report._histogram(lengths)
    assert len(lines) == 16
    counts = [int(line.split()[-1].replace(",", "")) for line in lines]
    assert sum(counts) == 8
    assert counts[0] == 1
    assert counts[1] == 2
    assert counts[-1] == 4
    assert lines[-1].count("█") == 40
    assert lines[1].count("█") == 20
    assert lines[2].count("█") == 0
    assert len(check_report._histogram(np.array([3]))) >= 1


def test_the_picture_is_written_whole_or_not_at_all(checked, tmp_path, monkeypatch):
    c = checked([{"query": "天气", "pos": "好", "neg": ["雨"]}])
    check_report.save_histograms(tmp_path / "a.png", [c] * 4)
    data = (tmp_path / "a.png").read_bytes()
    assert data.startswith(b"\x89PNG")
    assert data.endswith(b"IEND\xaeB`\x82")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(check_report.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        check_report.save_histograms(tmp_path / "b.png", [c])
    assert sorted(p.name for p in tmp_path.glob("*png*")) == ["a.png"]


def test_sums_that_tell_rows_apart_are_spread_over_64_bits():
    mixed = check._mixed(np.arange(100_000, dtype=np.int32), 1)
    assert len(np.unique(mixed)) == 100_000
    bits = (mixed[:, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)
    assert np.abs(bits.mean(axis=0) - 0.5).max() < 0.01
