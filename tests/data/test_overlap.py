import numpy as np
import pytest

from piccolo_jax.data import overlap
from piccolo_jax.data.overlap import EvaluationTexts, ngrams, normalise

SAME = [
    ("北京的天气", "北京 的\t天气\n"),
    ("北京的天气", "  “北京”的天气！？…"),
    ("Hello, World 123", "ｈｅｌｌｏ　ｗｏｒｌｄ１２３"),
    ("STRASSE", "straße"),
    ("ﬁle ①", "FILE 1"),
    ("价格：３０元（含税）", "价格:30元(含税)"),
    ("ｶﾞｽ", "ガス"),
    ("café", "cafe\u0301"),
    ("天气", "天\u200b气\ufeff\xa0\u3000"),
    ("İstanbul", "i\u0307STANBUL"),
    ("?!", "？ ！"),
]
DIFFERENT = [
    ("北京的天气", "北京天气"),
    ("体育", "體育"),
    ("C++", "C"),
    ("?!", "..."),
    ("हिन्दी", "हनद"),
    ("中文", "中英文"),
    ("3 元", "3.5 元"),
]


def index(texts, **options):
    evaluated = EvaluationTexts(**options)
    for i, text in enumerate(texts, 1):
        evaluated.add(text, f"dev.jsonl:{i}", "text")
    return evaluated


@pytest.mark.parametrize(("a", "b"), SAME)
def test_texts_that_differ_in_writing_alone_are_the_same(a, b):
    assert normalise(a) == normalise(b)
    for evaluated, text in ((a, b), (b, a)):
        (match,) = index(["x", evaluated]).find([text])
        assert (match.rule, match.overlap) == ("same text", 1.0)
        assert (match.place, match.field) == ("dev.jsonl:2", "text")


@pytest.mark.parametrize(("a", "b"), DIFFERENT)
def test_other_texts_are_not(a, b):
    assert normalise(a) != normalise(b)
    assert index([a]).find([b]) == [None]


def test_normalising_twice_changes_nothing():
    for character in map(chr, (*range(0xD800), *range(0xE000, 0x11000))):
        once = normalise(character)
        assert normalise(once) == once
        assert not any(c.isspace() for c in once)


def test_lone_surrogates_are_no_error():
    assert index(["天\ud800气", "雨"], threshold=0.5, ngram_size=1).find(["\udfff", "雨"])[1]


def test_the_first_of_evaluation_texts_that_are_the_same_is_named():
    evaluated = EvaluationTexts()
    evaluated.add("天气", "a.parquet:row 7", "query")
    evaluated.add("雨", "a.parquet:row 8", "query")
    evaluated.add("天气。", "b.jsonl:1", "text")
    found = evaluated.find(["天气", "雪", "雨!"])
    assert [m and (m.place, m.field) for m in found] == [
        ("a.parquet:row 7", "query"), None, ("a.parquet:row 8", "query"),
    ]  # fmt: skip


def test_nothing_is_found_among_no_texts():
    assert EvaluationTexts(threshold=0.5).find(["天气"]) == [None]
    assert index(["天气"], threshold=0.5).find([]) == []
    assert index(["短"], threshold=0.5).find(["短文"]) == [None]


# N-grams, against sets of tuples


def units(text):
    return overlap._UNIT.findall(overlap._folded(text))


def grams(text, n):
    u = units(text)
    return {tuple(u[i : i + n]) for i in range(len(u) - n + 1)}


def test_units_are_characters_of_scripts_without_spaces_and_words_of_others():
    assert units("Ｈello, 北京2024年 my_name") == ["hello", "北", "京", "2024", "年", "my", "name"]
    assert units("한국어 텍스트 カタカナ") == ["한국어", "텍스트", *"カタカナ"]


@pytest.mark.parametrize("n", [1, 2, 3, 8])
def test_ngrams_are_distinct_and_of_one_text_each(n):
    texts = [
        "",
        "北京",
        "北京北京北京",
        "a b c a b c a b",
        "的" * 20,
        "x",
        "今天天气很好适合出门散步",
    ]
    hashes, owner = ngrams(texts, n)
    counts = np.bincount(owner, minlength=len(texts)).tolist()
    assert counts == [len(grams(text, n)) for text in texts]
    everything = set().union(*(grams(text, n) for text in texts))
    assert len(set(hashes.tolist())) == len(everything)  # equal n-grams have equal hashes


@pytest.mark.parametrize("threshold", [0.3, 0.5, 1.0])
@pytest.mark.parametrize("n", [2, 3])
def test_the_evaluation_text_of_most_overlap_is_found_if_that_is_enough(n, threshold, monkeypatch):
    monkeypatch.setattr(overlap, "_UNITS_AT_ONCE", 50)  # several groups
    rng = np.random.default_rng(n)

    def text():
        return "".join(rng.choice(list("天地人山水风"), rng.integers(1, 14)))

    evaluated, texts = [text() for _ in range(60)], [text() for _ in range(150)]
    found = index(evaluated, ngram_size=n, threshold=threshold).find(texts)
    rules = set()
    for t, match in zip(texts, found, strict=True):
        if t in evaluated:
            assert match.rule == "same text"
            continue
        shares = [len(grams(e, n) & grams(t, n)) / max(len(grams(e, n)), 1) for e in evaluated]
        if max(shares) < threshold:
            assert match is None
            continue
        number = int(match.place.split(":")[1])
        assert (match.rule, match.overlap) == ("n-grams", pytest.approx(max(shares)))
        assert shares[number - 1] == max(shares)
        rules.add(match.rule)
    assert rules == {"n-grams"}


def test_ngrams_are_off_by_default():
    text = "今天北京的天气很好，适合出门散步"
    assert index([text]).find([text + "吧"]) == [None]
    assert index([text], threshold=0.9).find([text + "吧"])[0].rule == "n-grams"


def test_ngrams_of_very_many_evaluation_texts_say_nothing():
    common, rare = "请问一下各位老师", "如何在朝南的阳台上用花盆种植番茄和黄瓜呢"
    texts = [f"{common}{chr(0x4E00 + i)}" for i in range(overlap._COMMON + 1)]
    evaluated = index([*texts, common + rare], ngram_size=8, threshold=0.5)
    assert evaluated.find([common + "明天会下雨吗"]) == [None]
    assert evaluated.find([rare + "啊"])[0].place == f"dev.jsonl:{len(texts) + 1}"
    # Copies of one text are one text.
    copies = index([rare + "吧"] * 500, ngram_size=8, threshold=0.5)
    assert copies.find([rare])[0].rule == "n-grams"
