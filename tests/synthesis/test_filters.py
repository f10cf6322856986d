import pytest
from chat_server import english, example, han

from piccolo_jax.data.overlap import normalise
from piccolo_jax.synthesis import filters, wording
from piccolo_jax.synthesis.filters import Dropped, Limits, Row


def row(number=0, language="zh", query=None, positive=None, negative=None):
    made = example(number)
    return Row(number, language, "t", query or made["user_query"],
               positive or made["positive_document"],
               negative or made["hard_negative_document"])  # fmt: skip


def rules(rows, **limits):
    """The rule that dropped each row; None for those kept."""
    items = filters.apply(rows, Limits(**limits))
    return [item.rule if isinstance(item, Dropped) else None for item in items]


def test_good_rows_in_both_languages_are_kept():
    rows = [row(n) for n in range(20)]
    rows += [row(20 + n, "en", english(f"q{n}", 6), english(f"p{n}", 30), english(f"n{n}", 30))
             for n in range(5)]  # fmt: skip
    assert list(filters.apply(rows, Limits())) == rows


@pytest.mark.parametrize(
    ("fields", "limits", "dropped"),
    [
        ({"query": han(1, 4)}, {"query_length": (5, 9)}, True),
        ({"query": han(1, 5)}, {"query_length": (5, 9)}, False),
        ({"query": han(1, 10)}, {"query_length": (5, 9)}, True),
        ({"positive": han(1, 9)}, {}, True),
        ({"positive": han(1, 10)}, {}, False),
        ({"negative": han(1, 9)}, {}, True),
        ({"negative": han(1, 2001)}, {}, True),
        ({"query": "。！？"}, {}, True),
    ],
)
def test_texts_too_short_or_too_long_are_dropped(fields, limits, dropped):
    assert rules([row(**fields)], **limits) == ["length" if dropped else None]


def test_lengths_count_chinese_characters_and_words_of_other_scripts():
    assert wording.units("BERT-large 有 340M 参数，Привет!") == [
        "BERT", "large", "有", "340M", "参", "数", "Привет",
    ]  # fmt: skip


def test_normalised_texts_are_letters_and_digits_in_one_case_and_width():
    assert normalise("　ＡＢＣ-１２ Straße，检索！\n") == "abc12strasse检索"


@pytest.mark.parametrize(
    ("language", "fields", "dropped"),
    [
        ("zh", {"positive": english(1, 30)}, True),
        ("zh", {"negative": english(1, 30)}, True),
        ("zh", {"query": "what is this"}, True),
        ("zh", {"query": "iPhone 15 Pro Max 参数"}, False),
        ("zh", {"positive": "これはにほんごのぶんしょうです" + han(1, 5)}, True),
        ("zh", {"positive": "1234 5678 91 23 45 67 89 01 23 45 67"}, True),
        ("en", {"positive": han(1, 60)}, True),
        ("en", {"query": "这是什么"}, True),
        ("en", {"positive": english(1, 30) + "：" + han(1, 20)}, False),
        ("en", {"positive": english(1, 30) + "：" + han(1, 40)}, True),
        ("fr", {"positive": han(1, 60)}, False),
    ],
)
def test_texts_in_another_language_are_dropped(language, fields, dropped):
    if language != "zh":
        texts = {"query": english("q", 5), "positive": english("p", 30)}
        fields = {**texts, "negative": english("n", 30), **fields}
    assert rules([row(language=language, **fields)]) == ["language" if dropped else None]


def test_the_share_of_a_language_can_be_set():
    mixed = row(positive=han(1, 30) + " " + english(1, 10))
    assert rules([mixed], language_share=0.75) == [None]  # the share itself
    assert rules([mixed], language_share=0.8) == ["language"]


@pytest.mark.parametrize(
    "fields",
    [
        {"positive": han(1, 60), "negative": han(1, 60)},
        {"positive": "Ａ1" + han(1, 60), "negative": "  a1" + han(1, 60) + "。"},
        {"positive": han(1, 60), "negative": han(1, 60) + "而已"},
        {"query": han(1, 20), "positive": han(1, 20)},
        {"query": han(1, 20) + "？", "negative": han(1, 20)},
    ],
)
def test_rows_that_pair_a_text_with_itself_are_dropped(fields):
    assert rules([row(**fields)]) == ["same"]


@pytest.mark.parametrize("side", ["positive", "negative"])
def test_a_document_that_repeats_the_query_is_dropped(side):
    query = "光合作用 是什么？"
    document = "“光合作用是什么”这个问题，" + han(1, 40)
    assert rules([row(query=query, **{side: document})]) == ["leak"]
    assert rules([row(query=query, **{side: document})], leak_length=8) == [None]
    assert rules([row(query=query, **{side: document})], leak_length=7) == ["leak"]
    assert rules([row(query="光合", **{side: document})]) == [None]


def test_near_duplicates_of_earlier_queries_or_positives_are_dropped():
    first = row(1)
    other = han(7, 4)
    rows = [
        first,
        row(2, positive=first.positive),
        row(3, positive=first.positive[:-2] + other[:2] + "。"),
        row(4, positive=first.positive[:30] + han(8, 30)),
        row(5, query=first.query),
        row(6, query=f"{first.query}！"),
        row(7, query=first.query[:4] + other),
        row(8, negative=first.negative),
    ]
    assert rules(rows) == [
        None, "near-duplicate", "near-duplicate", None, "near-duplicate", "near-duplicate", None,
        None,
    ]  # fmt: skip


def test_what_was_dropped_makes_nothing_a_duplicate():
    bad = row(1, positive=english(1, 30))
    assert rules([bad, row(1)]) == ["language", None]
    twice = [row(1), row(2, query=row(1).query), row(3, positive=row(2).positive)]
    assert rules(twice) == [None, "near-duplicate", None]


def test_near_duplicates_are_found_just_above_the_threshold_and_none_below():
    found = missed = 0
    for seed in range(30):
        text = han(seed, 100)
        seen = wording.SeenTexts(0.8)
        seen.add(text)
        close = text[:-9] + han(-seed - 1, 9)  # 89 of 107 trigrams: 0.83
        far = text[:-14] + han(-seed - 1, 14)  # 84 of 112: 0.75
        found += seen.find(close) == text
        missed += seen.find(far) is None
    assert found >= 28
    assert missed == 30


@pytest.mark.parametrize("threshold", [0.01, 1.0])
def test_any_threshold_finds_equal_texts(threshold):
    seen = wording.SeenTexts(threshold)
    seen.add("好")
    seen.add("Some text.")
    assert seen.find("some TEXT") == "Some text."
    assert seen.find("好！") == "好"


def test_each_dropped_row_says_why():
    items = list(
        filters.apply([row(1), row(2, positive="短"), row(3, query=row(1).query)], Limits())
    )
    assert "positive has 1 words, not 10 to 2000" in items[1].reason
    assert row(1).query in items[2].reason
    assert {item.rule for item in items[1:]} <= set(filters.RULES)
