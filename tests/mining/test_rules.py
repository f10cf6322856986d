import numpy as np
import pytest

from piccolo_jax.errors import UserError
from piccolo_jax.mining import corpus as corpus_lib
from piccolo_jax.mining import rules
from piccolo_jax.mining.queries import Query
from piccolo_jax.mining.rules import KEPT, RULES, Limits, Window
from piccolo_jax.mining.search import Neighbours

TEXTS = ["甲乙丙", "甲乙丙。", "另一", "问一", "丁", "戊", "戊！", "己", "庚", "辛"]
SCORES = np.float32([0.95, 0.94, 0.93, 0.9, 0.8, 0.7, 0.69, 0.6, 0.5, 0.4])


def mine(*queries, ranks=(1, 10), count=1, positive=0.9, seed=0, **limits):
    """Every query finds TEXTS in their order."""
    found = Neighbours(
        np.tile(SCORES, (len(queries), 1)), np.tile(np.arange(10), (len(queries), 1))
    )
    corpus = corpus_lib.of_texts(TEXTS, "x")
    positives = np.full(len(queries), positive, np.float32)
    window = Window(*ranks, count)
    return rules.mine(list(queries), corpus, found, positives, window, Limits(**limits), seed)


def reasons(mined, query=0):
    return ["kept" if r == KEPT else RULES[r] for r in mined.reasons[query]]


ONE = Query("问一", ("甲乙丙",), (2,))


def test_each_candidate_is_removed_by_the_first_rule_that_applies():
    assert reasons(mine(ONE)) == [
        "positive by text", "near-duplicate of a positive", "positive by id", "the query itself",
        "kept", "kept", "duplicate of a nearer candidate", "kept", "kept", "kept",
    ]  # fmt: skip


def test_limits_keep_what_lies_below_them():
    removed = {
        "max_positive_ratio": mine(ONE, max_positive_ratio=0.8),  # 0.72
        "margin": mine(ONE, margin=0.25),  # 0.65
        "max_score": mine(ONE, max_score=0.6),
    }
    for name, (first_kept, rule) in {
        "max_positive_ratio": (5, "max positive ratio"), "margin": (7, "margin"),
        "max_score": (8, "max score"),
    }.items():  # fmt: skip
        found = reasons(removed[name])
        assert found.index("kept") == first_kept, name
        assert found[4] == rule


def test_a_limit_itself_is_too_high_and_a_negative_positive_is_no_excuse():
    limits = Limits(max_positive_ratio=0.9)
    scores, half = np.float32([0.45, 0.4499]), np.float32(0.5)
    assert limits.reasons(scores, half)[0].tolist() == [True, False]
    margin = Limits(margin=0.25).reasons(np.float32([0.25, 0.2499]), half)
    assert margin[1].tolist() == [True, False]
    scores, below = np.float32([-0.5, -0.56]), np.float32(-0.5)
    assert limits.reasons(scores, below)[0].tolist() == [True, False]


def test_ranks_are_of_the_whole_search_and_both_ends_are_in():
    mined = mine(ONE, ranks=(5, 6), count=2)
    assert mined.drawn[0].tolist() == [0, 1]
    assert mined.neighbours.indices[0].tolist() == [4, 5]


def test_queries_of_one_text_share_their_positives():
    mined = mine(Query("问?", ("丁",)), Query("问", ("戊",)), Query("别的", ("己",)))
    for query in (0, 1):
        assert reasons(mined, query)[4:7] == [
            "positive by text", "positive by text", "near-duplicate of a positive",
        ]  # fmt: skip
    assert reasons(mined, 2)[4:6] == ["kept", "kept"]


def test_draws_depend_on_the_seed_and_the_query_and_are_by_rank_without_repeats():
    queries = [Query(f"q{i}", ("x",)) for i in range(30)]
    one, again, other = (mine(*queries, count=4, seed=seed).drawn for seed in (1, 1, 2))
    assert all((a == b).all() for a, b in zip(one, again, strict=True))
    assert any((a != b).any() for a, b in zip(one, other, strict=True))
    assert len({tuple(places) for places in one}) > 5
    assert all((np.diff(places) > 0).all() for places in one)
    seen = {int(place) for places in one for place in places}
    assert seen == {place for place in range(10) if reasons(mine(queries[0]))[place] == "kept"}


def test_queries_that_keep_too_few_are_short():
    mined = mine(ONE, Query("别的", ("x",)), count=7)
    assert [len(places) for places in mined.drawn] == [5, 7]
    assert mined.short.tolist() == [0]


@pytest.mark.parametrize(
    ("ranks", "count", "message"),
    [("50", 1, "FIRST:LAST"), ("a:b", 1, "FIRST:LAST"), ("-1:5", 1, "FIRST:LAST"),
     ("0:5", 1, "FIRST must be 1"), ("9:5", 1, "at most LAST"),
     ("1:5", 6, "--count=6.*from 1 to 5"),
     ("1:5", 0, "--count=0")],
)  # fmt: skip
def test_a_window_that_is_none_is_said(ranks, count, message):
    with pytest.raises(UserError, match=message):
        rules.parse_window(ranks, count)
    assert rules.parse_window("50:100", 51) == Window(50, 100, 51)
