import json

import pytest

from piccolo_jax.data.labels import LabelNames, own_labels
from piccolo_jax.errors import UserError

NAMES = {"0": "体育", "1": "财经", "news": "新闻"}


@pytest.fixture
def named(tmp_path):
    """named(content, file="names.json", language="") -> LabelNames"""

    def read(content, file="names.json", language=""):
        path = tmp_path / file
        path.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
        return LabelNames(str(path), language)

    return read


@pytest.mark.parametrize(
    ("content", "file"),
    [
        (NAMES, "names.json"),
        (json.dumps(NAMES, ensure_ascii=False), "names.txt"),
        ("0\t体育\n1\t财经\n\nnews\t新闻\n", "names.tsv"),
        ("\ufefflabel\tname\r\n0\t体育\r\n1\t财经\r\nnews\t新闻\r\n", "names.tsv"),
    ],
)
def test_names_are_read_from_json_and_tsv(named, content, file):
    assert dict(named(content, file)) == NAMES


def test_a_list_names_labels_by_their_place(named):
    assert dict(named(["体育", "财经"])) == {"0": "体育", "1": "财经"}


@pytest.mark.parametrize(
    ("content", "file"),
    [
        ({"0": {"zh": "体育", "en": "sports"}, "1": {"zh": "财经", "en": "finance"}}, "names.json"),
        ("label\tzh\ten\n0\t体育\tsports\n1\t财经\tfinance\n", "names.tsv"),
    ],
)
def test_names_by_language_need_one_to_be_chosen(named, content, file):
    assert dict(named(content, file, "en")) == {"0": "sports", "1": "finance"}
    assert dict(named(content, file, "zh")) == {"0": "体育", "1": "财经"}
    with pytest.raises(
        UserError, match=r"label '0' is named by language; set label_language to.*en"
    ):
        named(content, file)
    with pytest.raises(UserError, match=r"label '0' has no 'fr'; set label_language.*zh, en"):
        named(content, file, "fr")


def test_names_of_all_languages_may_stand_beside_those_by_language(named):
    names = named({"0": {"zh": "体育", "en": "sports"}, "1": "NBA"}, language="zh")
    assert dict(names) == {"0": "体育", "1": "NBA"}


@pytest.mark.parametrize(
    ("content", "file", "message"),
    [
        ('{"0": "体育"', "names.json", r"names\.json: broken JSON"),
        ("[" * 100_000, "names.json", r"names\.json: broken JSON"),
        ("", "names.json", r"names\.json: broken JSON"),
        ("", "names.tsv", r"names\.tsv: names no label"),
        ("{}", "names.json", "names no label"),
        ("3", "names.json", "not an object or list"),
        ('{"0": "体育", "0": "财经"}', "names.json", "'0' is there twice"),
        ("0\ta\n0\tb\n", "names.tsv", r"names\.tsv:2: label '0' is there twice"),
        ("0\ta\n1 b\n", "names.tsv", r"names\.tsv:2: 1 columns; write JSON"),
        ("label\tzh\ten\n0\ta\n", "names.tsv", r"names\.tsv:2: 2 columns"),
        ('{"0": 3}', "names.json", "the name of label '0' is 3"),
        ('{"0": " "}', "names.json", "the name of label '0' is ' '"),
        ('{"0": null}', "names.json", "the name of label '0' is None"),
        ('{"0": "\\ud800"}', "names.json", "lone surrogate"),
    ],
)
def test_a_broken_names_file_is_an_error_that_says_where(named, content, file, message):
    with pytest.raises(UserError, match=message):
        named(content, file)


def test_an_unreadable_names_file_is_an_error(tmp_path):
    (tmp_path / "latin.json").write_bytes('{"0": "é"}'.encode("latin-1"))
    for name in ("none.json", "latin.json", ""):
        with pytest.raises(UserError, match="no readable file of label names"):
            LabelNames(str(tmp_path / name))


@pytest.mark.parametrize(
    ("value", "texts"),
    [
        (0, ("体育",)), ("1", ("财经",)), (1.0, ("财经",)), ("news", ("新闻",)), (" 0 ", ("体育",)),
        ([1, 0], ("财经", "体育")), ([0, "0", 0], ("体育",)), (["news"], ("新闻",)),
    ],
)  # fmt: skip
def test_a_row_has_the_names_of_its_labels(named, value, texts):
    assert own_labels(value, "label", named(NAMES)) == texts


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "label is missing"), ([], "label is an empty list"), ([0, None], "label is missing"),
        (2, r"label '2' is not in .*names\.json"), (-1, "'-1' is not in"), ("", "label is empty"),
        (True, "label is bool"), (0.5, "label is float"), (float("nan"), "label is float"),
        ({"a": 1}, "label is dict"), ([[0]], "label is list"), (["x", 0], "'x' is not in"),
    ],
)  # fmt: skip
def test_what_is_no_label_is_said(named, value, reason):
    with pytest.raises(ValueError, match=reason):
        own_labels(value, "label", named(NAMES))


def test_without_names_labels_are_texts():
    assert own_labels("体育", "label", None) == ("体育",)
    assert own_labels(["体育", "NBA"], "label", None) == ("体育", "NBA")
    for value, reason in ((3, "is a number; name the labels"), ("\ud800", "lone surrogate")):
        with pytest.raises(ValueError, match=reason):
            own_labels(value, "label", None)
