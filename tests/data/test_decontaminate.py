import gzip
import json
from pathlib import Path

import pytest

from piccolo_jax.config import DecontaminateConfig
from piccolo_jax.data import formats
from piccolo_jax.data.decontaminate import Decontaminator, Report
from piccolo_jax.errors import UnusableDatasetError, UserError


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return str(path)


@pytest.fixture
def dropped(tmp_path):
    """dropped(training rows, *paths of evaluation sets, **options) -> rows of the report."""

    def run(rows, *paths, task="", **options):
        source = formats.open_source(write(tmp_path / "train.jsonl", rows), task)
        config = DecontaminateConfig(paths=tuple(map(str, paths)), **options)
        report = Report(tmp_path / "dropped.jsonl")
        placed = list(source._placed())
        kept = list(Decontaminator(config, True).keep(source.path, iter(placed), report))
        report.close()
        out = [json.loads(line) for line in (tmp_path / "dropped.jsonl").open(encoding="utf-8")]
        lines = {int(row["place"].rpartition(":")[2]) for row in out}
        assert kept == [item for i, (_, item) in enumerate(placed, 1) if i not in lines]
        assert report.count == report.summary["rows"] == len(out)
        assert sum(by["rows"] for by in report.summary["by"]) == len(out)
        return out

    return run


def lines_of(report):
    return [int(row["place"].rpartition(":")[2]) for row in report]


# What is found, by layout of the evaluation set: (rows, texts that count)

ROW_LAYOUTS = {
    "pairs": ({"text": "甲一", "text_pair": "乙一", "label": 1}, "甲一 乙一"),
    "sts": ({"sentence1": "甲一", "sentence2": "乙一", "score": 3}, "甲一 乙一"),
    "reranking": (
        {"query": "甲一", "positive": ["乙一", "丙一"], "negative": ["丁一"]},
        "甲一 乙一 丙一 丁一",
    ),
    "triplets": ({"text": "甲一", "text_pos": "乙一", "text_neg": ["丙一"]}, "甲一 乙一 丙一"),
    "flag embedding": ({"query": "甲一", "pos": ["乙一"], "neg": ["丙一"]}, "甲一 乙一 丙一"),
    "numbered": ({"anchor": "甲一", "positive": "乙一", "negative_2": "丙一"}, "甲一 乙一 丙一"),
    "tevatron": (
        {"query": "甲一", "positive_passages": [{"docid": "1", "title": "题", "text": "乙一"}]},
        "甲一 乙一 题乙一",
    ),
    "labels": ({"text": "甲一", "text_pos": "体育", "text_neg": ["财经"], "label": 3}, "甲一"),
    "typed labels": ({"text": "甲一", "text_pos": "体育", "type": "cls_contrast"}, "甲一"),
    "plain labels": ({"text": "甲一", "label": "体育"}, "甲一"),
    "passages": ({"id": "1", "title": "题", "text": "甲一"}, "甲一 题甲一"),
    "bitext": ({"zh": "甲一", "en": "one"}, "甲一 One!"),
    "clusters": ({"sentences": ["甲一", "乙一"], "labels": ["体育", "财经"]}, "甲一 乙一"),
}  # fmt: skip
EVERYTHING = [
    "甲一",
    "乙一",
    "丙一",
    "丁一",
    "体育",
    "财经",
    "题",
    "题甲一",
    "题乙一",
    "One!",
    "无关",
]


@pytest.mark.parametrize("layout", ROW_LAYOUTS)
def test_the_texts_of_every_layout_are_found_but_label_texts(dropped, tmp_path, layout):
    row, texts = ROW_LAYOUTS[layout]
    dev = write(tmp_path / "dev.jsonl", [row])
    train = [{"query": text, "pos": [f"答 {i}"]} for i, text in enumerate(EVERYTHING)]
    report = dropped(train, dev, task="retrieval")
    assert [EVERYTHING[line - 1] for line in lines_of(report)] == [
        text for text in EVERYTHING if text in texts.split()
    ]
    assert {r["field"] for r in report} == {"query"}


def test_a_row_is_dropped_whichever_of_its_texts_occurs(dropped, tmp_path):
    dev = write(tmp_path / "dev.jsonl", [{"query": "甲", "positive": ["乙"], "negative": []}])
    rows = [
        {"query": "一", "pos": ["二", "三"], "neg": ["四"]},
        {"query": "甲", "pos": ["二"], "neg": []},
        {"query": "一", "pos": ["二", "“乙”"], "neg": []},
        {"query": "一", "pos": ["二"], "neg": ["四", "五", "甲 "]},
    ]
    report = dropped(rows, dev, task="retrieval")
    assert [(r["field"], r["text"], r["evaluation_field"]) for r in report] == [
        ("query", "甲", "query"), ("positive", "“乙”", "positive"), ("negative", "甲 ", "query"),
    ]  # fmt: skip
    assert all(r["evaluation"] == f"{dev}:1" for r in report)
    assert all((r["rule"], r["overlap"]) == ("same text", 1) for r in report)
    pairs = [{"text": a, "text_pair": b, "label": 1} for a, b in ("一二", "甲二", "一乙", "乙甲")]
    assert lines_of(dropped(pairs, dev)) == [2, 3, 4]


def test_label_texts_of_training_are_not_compared(dropped, tmp_path):
    dev = write(tmp_path / "dev.jsonl", [{"text": "体育", "label": "体育"}])
    rows = [
        {"text": "球赛", "text_pos": "体育", "text_neg": ["财经"], "type": "cls_contrast"},
        {"text": "体育", "text_pos": "财经", "text_neg": ["体育"], "type": "cls_contrast"},
    ]
    assert lines_of(dropped(rows, dev)) == [2]


def test_rejected_rows_stay_rejected(dropped, tmp_path):
    dev = write(tmp_path / "dev.jsonl", [{"text": "甲"}])
    rows = [
        {"query": "甲", "pos": []},
        {"query": "甲", "pos": ["乙"]},
        {"query": "丙", "pos": ["乙"]},
    ]
    assert lines_of(dropped(rows, dev, task="retrieval")) == [2]


def test_all_written_forms_are_found_across_chunks_of_rows_and_nothing_else(
    dropped, tmp_path, monkeypatch
):
    monkeypatch.setattr("piccolo_jax.data.decontaminate._ROWS_AT_ONCE", 7)
    originals = [f"第{i}个问题, No. {i} ABC?" for i in range(40)]
    forms = [
        lambda t: t, str.lower, lambda t: t.replace(" ", "\u3000"), lambda t: f"《{t}》",
        lambda t: "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in t),
        lambda t: t.replace("?", "？！"), lambda t: f"  {t}\n",
    ]  # fmt: skip
    dev = write(tmp_path / "dev.jsonl", [{"text": t} for t in originals])
    rows = [{"query": f"第{i}个问题, No. {i + 1} ABC?", "pos": ["答"]} for i in range(40)]
    for i, text in enumerate(originals):
        rows.append({"query": "另外", "pos": [forms[i % len(forms)](text)]})
    report = dropped(rows, dev, task="retrieval")
    assert lines_of(report) == list(range(41, 81))
    assert [r["evaluation"] for r in report] == [f"{dev}:{i}" for i in range(1, 41)]


def test_passages_of_rows_can_be_left_out(dropped, tmp_path):
    dev = write(tmp_path / "dev.jsonl", [{"query": "甲", "positive": ["乙"], "negative": ["丙"]}])
    rows = [{"query": text, "pos": ["答"]} for text in "甲乙丙丁"]
    assert lines_of(dropped(rows, dev, task="retrieval")) == [1, 2, 3]
    assert lines_of(dropped(rows, dev, task="retrieval", passages="none")) == [1]


def test_shared_ngrams_are_dropped_if_asked_for_and_said(dropped, tmp_path):
    text = "今天北京的天气怎么样适合出门散步吗"
    dev = write(tmp_path / "dev.jsonl", [{"text": text}, {"text": "what is the capital of france"}])
    rows = [
        {"query": text + "请问", "pos": ["答"]},
        {"query": "tell me What is the capital, of France?", "pos": ["答"]},
        {"query": "今天北京的天气", "pos": ["答"]},
    ]
    assert dropped(rows, dev, task="retrieval") == []
    report = dropped(rows, dev, task="retrieval", ngram_threshold=0.7, ngram_size=5)
    assert [(r["rule"], r["overlap"], r["evaluation"]) for r in report] == [
        ("n-grams", 1.0, f"{dev}:1"), ("n-grams", 1.0, f"{dev}:2"),
    ]  # fmt: skip


# Directories


def beir(folder, **files):
    write(folder / "corpus.jsonl", [{"id": "d", "title": "题", "text": "文章"}])
    for name, rows in files.items():
        write(folder / f"{name.replace('_', '.')}.jsonl", rows)
    return folder


def test_of_a_beir_directory_the_queries_of_all_splits_but_train_count(dropped, tmp_path):
    queries = {f"queries_{s}": [{"id": s, "text": s}] for s in ("train", "dev", "test")}
    folder = beir(tmp_path / "beir", **queries, other=[{"text": "别的"}])
    rows = [
        {"query": t, "pos": ["答"]} for t in ("train", "DEV", "test", "文章", "题 文章", "别的")
    ]
    assert lines_of(dropped(rows, folder, task="retrieval")) == [2, 3, 6]
    assert lines_of(dropped(rows, folder, task="retrieval", passages="corpus")) == [2, 3, 4, 5, 6]
    assert lines_of(dropped(rows, folder / "queries.train.jsonl", task="retrieval")) == [1]
    assert lines_of(dropped(rows, folder / "corpus.jsonl", task="retrieval")) == [4, 5]
    (folder / "corpus.jsonl").unlink()  # its queries are what counts
    write(folder / "qrels.test.tsv", ["query-id\tcorpus-id\tscore", "test\td\t1"])
    assert lines_of(dropped(rows, folder, task="retrieval")) == [2, 3, 6]


def test_a_beir_directory_may_be_compressed(dropped, tmp_path):
    folder = beir(tmp_path / "beir", queries_test=[{"id": "1", "text": "问"}])
    for file in folder.iterdir():
        file.with_name(f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes()))
        file.unlink()
    rows = [{"query": t, "pos": ["答"]} for t in ("问", "文章", "别的")]
    assert lines_of(dropped(rows, folder, task="retrieval")) == [1]
    assert lines_of(dropped(rows, folder, task="retrieval", passages="corpus")) == [1, 2]


def test_a_file_that_is_named_is_known_by_its_content_too(dropped, tmp_path):
    dev = write(tmp_path / "dev_set", [{"text": "甲"}])
    assert lines_of(dropped([{"query": "甲", "pos": ["乙"]}, {"query": "丙", "pos": ["丁"]}],
                            dev, task="retrieval")) == [1]  # fmt: skip


def test_of_queries_of_all_splits_those_judged_beside_train_count(dropped, tmp_path):
    queries = [{"_id": f"q{i}", "text": f"问{i}"} for i in range(4)]
    folder = beir(tmp_path / "beir", queries=queries)
    rows = [{"query": f"问{i}", "pos": ["答"]} for i in range(5)]
    assert lines_of(dropped(rows, folder, task="retrieval")) == [1, 2, 3, 4]
    (folder / "qrels").mkdir()
    for split, query in (("train", "q0"), ("dev", "q1"), ("test", "q2")):
        text = f"query-id\tcorpus-id\tscore\n{query}\td\t1\n"
        (folder / "qrels" / f"{split}.tsv").write_text(text)
    assert lines_of(dropped(rows, folder, task="retrieval")) == [2, 3]


def test_of_other_directories_all_files_below_count_but_train_splits(dropped, tmp_path):
    root = tmp_path / "sets"
    for i, name in enumerate(
        ("a.dev.jsonl", "a.train.jsonl", "train/b.jsonl", "sub/c_test.jsonl", "training.jsonl"), 1
    ):
        write(root / name, [{"text": f"文{i}"}])
    beir(root / "beir", queries_test=[{"id": "1", "text": "文6"}])
    write(root / "manifest.json", [{"files": []}])
    write(root / "beir" / "pairs.test.jsonl", [{"text": "文8", "text_pair": "文9"}])
    write(root / "beir" / "more" / "sts.jsonl", [{"text": "文10"}])
    write(root / "sub" / "lines.json", [{"text": "文11"}])
    write(root / "sub" / "more.json", [{"text": "文12"}, {"text": "文13"}])
    (root / "sub" / "pretty.json").write_text('{\n "text": "文14"\n}\n', encoding="utf-8")
    rows = [{"query": f"文{i}", "pos": ["答"]} for i in range(1, 15)]
    assert lines_of(dropped(rows, root, task="retrieval")) == [1, 4, 5, 6, *range(8, 14)]
    assert lines_of(dropped(rows, root / "*.jsonl", task="retrieval")) == [1, 5]
    assert lines_of(dropped(rows, root / "**" / "c*.jsonl", task="retrieval")) == [4]


# What can't be used


def decontaminator(*paths, **options):
    return Decontaminator(DecontaminateConfig(tuple(map(str, paths)), **options), True)


@pytest.mark.parametrize("name", ["none.jsonl", "", "*.none"])
def test_a_missing_evaluation_set_is_an_error_at_once(tmp_path, name):
    with pytest.raises(UserError, match="no such evaluation set"):
        decontaminator(f"{tmp_path / 'sets' / name}" if name else "")


def test_what_holds_no_evaluation_set_is_an_error_at_once(tmp_path):
    write(tmp_path / "empty" / "a.train.jsonl", [{"text": "甲"}])
    with pytest.raises(UserError, match="empty: holds no evaluation set"):
        decontaminator(tmp_path / "empty")
    (tmp_path / "readme.md").write_text("# x")
    with pytest.raises(UserError, match=r"readme\.md: not a data file"):
        decontaminator(tmp_path / "readme.md")
    only_train = beir(tmp_path / "beir", queries_train=[{"id": "1", "text": "甲"}])
    with pytest.raises(UserError, match=r"has no queries\.SPLIT\.jsonl but of train"):
        decontaminator(only_train)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "甲"}, '{"text": "乙'], r"dev\.jsonl:2: broken JSON"),
        ([{"text": "甲"}, {"text": 3}], r"dev\.jsonl:2: text is int, not text"),
        ([{"query": "甲", "positive": ["乙", 1.5]}], r"dev\.jsonl:1: positive is float, not text"),
        ([{"正文": "甲"}], r"dev\.jsonl:1: columns 正文 hold no text that is known; rename"),
        ([], r"dev\.jsonl: holds no text to look for"),
        ([{"text": None}, {"text": " "}], r"dev\.jsonl: holds no text to look for"),
    ],
)
def test_a_broken_evaluation_set_is_an_error_that_names_the_line(dropped, tmp_path, rows, message):
    dev = write(tmp_path / "dev.jsonl", rows)
    with pytest.raises(UserError, match=message):
        dropped([{"query": "甲", "pos": ["乙"]}], dev, task="retrieval")


def test_a_training_set_of_which_nothing_stays_is_an_error(dropped, tmp_path):
    dev = write(tmp_path / "dev.jsonl", [{"text": "甲"}])
    with pytest.raises(UnusableDatasetError, match=r"train\.jsonl: all its 2 usable rows occur"):
        dropped([{"query": "甲", "pos": ["乙"]}] * 2, dev, task="retrieval")


def test_a_file_that_is_trained_on_is_no_evaluation_set(tmp_path):
    rows = [{"text": "甲", "text_pair": "乙", "label": 1}]
    train, dev = write(tmp_path / "a.jsonl", rows), write(tmp_path / "copy.jsonl", rows)
    digests = [formats.digest_of(Path(train))]
    with pytest.raises(UserError, match=r"a\.jsonl: is trained on, but .*copy\.jsonl"):
        decontaminator(dev).check(train, digests)
    decontaminator(write(tmp_path / "other.jsonl", rows * 2)).check(train, digests)


def test_the_description_follows_content_and_options_and_not_places(tmp_path):
    rows = [{"text": "甲"}]
    a, b = write(tmp_path / "a.jsonl", rows), write(tmp_path / "b" / "c.jsonl", rows)
    first = decontaminator(a).description
    assert first == decontaminator(b).description == decontaminator(a, b).description
    others = [
        decontaminator(write(tmp_path / "d.jsonl", [{"text": "乙"}])),
        decontaminator(a, passages="none"),
        decontaminator(a, ngram_threshold=0.5),
        decontaminator(a, ngram_size=5),
    ]
    assert all(first != other.description for other in others)
    folder = beir(tmp_path / "beir", queries=[{"id": "1", "text": "甲"}])
    before = decontaminator(folder).description
    (folder / "qrels.test.tsv").write_text("1\td\t1\n")
    assert decontaminator(folder).description != before
