"""The data that ships for the quickstart: its form, its splits, its tokenizer, its making."""

import collections
import json
import re
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
import tokenizers
import transformers

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "configs" / "quickstart_data"
SOURCE = ROOT / ".." / "shared" / "data" / "open"
TASKS = ("retrieval", "similarity", "classification")
FILES = tuple(f"{task}.{split}.jsonl" for task in TASKS for split in ("train", "test"))
TYPES = {"retrieval": "retri_contrast", "similarity": "cosent", "classification": "cls_contrast"}


def read(name):
    with (FOLDER / name).open(encoding="utf-8", newline="\n") as lines:
        return [json.loads(line) for line in lines]


def document_texts(name):
    """Every text of a file that isn't a label text."""
    task = name.split(".")[0]
    for row in read(name):
        yield row["text"]
        if task == "similarity":
            yield row["text_pair"]
        elif task == "retrieval":
            yield from (row["text_pos"], *row["text_neg"])


def fold(text):
    """The letters and digits of a text, whatever their case and width."""
    text = unicodedata.normalize("NFKC", text).casefold()
    return "".join(c for c in text if c.isalnum())


@pytest.mark.parametrize("name", FILES)
def test_rows_have_the_columns_of_their_task(name):
    task = name.split(".")[0]
    pair = task == "similarity"
    columns = {"text", "type", *(("text_pair", "label") if pair else ("text_pos", "text_neg"))}
    for row in read(name):
        assert set(row) == columns
        assert row["type"] == TYPES[task]
        strings = [row["text"], row["text_pair"] if pair else row["text_pos"]]
        strings += [] if pair else row["text_neg"]
        assert all(isinstance(s, str) and s.strip() == s != "" for s in strings)
        if pair:
            assert row["label"] in (0, 1, 2)
        else:
            assert row["text_pos"] not in row["text_neg"]


@pytest.mark.parametrize("name", FILES)
def test_the_readme_states_the_number_of_rows(name):
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    (rows,) = re.findall(rf"^\| `{re.escape(name)}` \| (\d+) \|", readme, re.MULTILINE)
    assert int(rows) == len(read(name))


def test_texts_are_not_ascii_escaped_and_the_folder_is_small():
    for name in FILES:
        assert "\\u" not in (FOLDER / name).read_text(encoding="utf-8")
    size = sum(
        p.stat().st_size for p in FOLDER.rglob("*") if p.suffix in {".jsonl", ".json", ".txt"}
    )
    assert size < 4 * 2**20


def test_no_text_of_a_test_file_is_in_a_training_file():
    train = {fold(t) for name in FILES if ".train." in name for t in document_texts(name)}
    test = {fold(t) for name in FILES if ".test." in name for t in document_texts(name)}
    assert len(test) > 1000
    assert not train & test


def test_no_text_of_a_test_file_begins_like_one_of_a_training_file():
    train = {fold(t)[:50] for name in FILES if ".train." in name for t in document_texts(name)}
    test = {fold(t)[:50] for name in FILES if ".test." in name for t in document_texts(name)}
    assert not train & test


def test_retrieval_test_has_one_query_per_document():
    rows = read("retrieval.test.jsonl")
    assert len({row["text"] for row in rows}) == len(rows)
    assert len({row["text_pos"] for row in rows}) == len(rows)
    assert all(row["text_neg"] == [] for row in rows)


@pytest.mark.parametrize("split", ["train", "test"])
def test_no_title_and_no_abstract_tells_its_similarity_score(split):
    rows = read(f"similarity.{split}.jsonl")
    for column in ("text", "text_pair"):
        scores = collections.defaultdict(list)
        for row in rows:
            scores[row[column]].append(row["label"])
        assert all(sorted(s) == [0, 1, 2] for s in scores.values())


def test_every_row_of_classification_names_all_other_labels():
    train, test = read("classification.train.jsonl"), read("classification.test.jsonl")
    labels = {row["text_pos"] for row in train}
    assert len(labels) == 13
    assert {row["text_pos"] for row in test} == labels
    for row in train + test:
        assert sorted([row["text_pos"], *row["text_neg"]]) == sorted(labels)


@pytest.fixture(scope="module")
def fast():
    return tokenizers.Tokenizer.from_file(str(FOLDER / "tokenizer" / "tokenizer.json"))


@pytest.fixture(scope="module")
def auto():
    return transformers.AutoTokenizer.from_pretrained(FOLDER / "tokenizer", local_files_only=True)


def test_transformers_and_tokenizers_give_the_same_ids(fast, auto):
    texts = sorted(set(document_texts("retrieval.test.jsonl")))[:200]
    texts += ["基于Rodrigues参数(MRP)的±2.3℃处理", "a [MASK] b", "", "龘", "x" * 101]
    assert auto(texts)["input_ids"] == [fast.encode(t).ids for t in texts]
    assert auto.model_max_length == 512
    assert auto.pad_token_id == 0


def test_vocabulary_file_lists_the_tokens_in_order(fast):
    lines = (FOLDER / "tokenizer" / "vocab.txt").read_text(encoding="utf-8").split("\n")
    assert lines.pop() == ""
    assert lines[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert fast.get_vocab() == {token: i for i, token in enumerate(lines)}
    assert len(lines) <= 4000
    assert all(len(token.removeprefix("##")) == 1 for token in lines[5:])


def test_vocabulary_has_no_character_that_only_test_files_have(fast):
    names = [name for name in FILES if ".train." in name]
    texts = {row["text_pos"] for row in read("classification.train.jsonl")}
    texts |= {text for name in names for text in document_texts(name)}
    normalized = fast.normalizer.normalize_str(" ".join(texts))
    pieces = set(fast.get_vocab()) - {"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"}
    assert {piece.removeprefix("##") for piece in pieces} <= set(normalized)


def test_few_tokens_of_the_test_files_are_unknown(fast):
    texts = {t for name in FILES if ".test." in name for t in document_texts(name)}
    ids = [i for e in fast.encode_batch(sorted(texts), add_special_tokens=False) for i in e.ids]
    assert ids.count(fast.token_to_id("[UNK]")) / len(ids) < 0.015  # measured: 0.0068


def test_decoding_gives_the_text_back(fast):
    for text in ("果蔬保鲜技术进展探索", "rodrigues参数", "2010年"):
        assert fast.decode(fast.encode(text).ids).replace(" ", "") == text


@pytest.mark.skipif(not SOURCE.is_dir(), reason="../shared/data/open is absent")
def test_build_reproduces_the_folder_byte_for_byte(tmp_path):
    command = [sys.executable, FOLDER / "build.py", f"--source={SOURCE}", f"--output={tmp_path}"]
    subprocess.run(command, check=True, capture_output=True)
    made = {p.relative_to(tmp_path): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert len(made) == len(FILES) + 4
    for path, content in made.items():
        assert (FOLDER / path).read_bytes() == content, path


def test_build_names_what_is_missing_in_the_source(tmp_path):
    command = [sys.executable, FOLDER / "build.py", f"--source={tmp_path}", f"--output={tmp_path}"]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    assert result.returncode == 2
    assert "is missing" in result.stderr
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())
