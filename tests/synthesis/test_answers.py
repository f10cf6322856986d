import json

import pytest

from piccolo_jax.synthesis import answers

GOOD = {"user_query": "q", "positive_document": "p", "hard_negative_document": "n"}
TEXT = json.dumps(GOOD)


@pytest.mark.parametrize(
    "content",
    [
        TEXT,
        f"```json\n{TEXT}\n```",
        f"Here it is:\n{TEXT}\nI hope it helps {{really}}.",
        f'<think>maybe {{"user_query": "wrong"}} or {TEXT.replace("q", "x")}</think>{TEXT}',
        f"[{TEXT}]",
        json.dumps({**GOOD, "comment": [1, {"deep": None}]}),
        json.dumps({**GOOD, "user_query": " q\n"}),
        f"As [the task] says {{so}}: {TEXT}",
    ],
)
def test_json_is_found_in_what_is_written_around_it(content):
    assert answers.parse("examples", content).model_dump() == GOOD


def test_line_breaks_within_strings_are_taken():
    value = answers.parse("examples", TEXT.replace('"p"', '"a\nb\tc"'))
    assert value.positive_document == "a\nb\tc"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "empty"),
        ("<think>no end " + TEXT, "empty"),
        ("Sorry.", "no JSON"),
        (TEXT[:-5], "broken JSON"),
        ("[" * 100_000, "broken JSON"),
        ('{"query": "q", "pos": "p"}', "user_query: Field required"),
        (json.dumps({**GOOD, "user_query": 7}), "user_query: Input should be a valid string"),
        (json.dumps({**GOOD, "user_query": ["q"]}), "user_query"),
        (json.dumps({**GOOD, "positive_document": " \n"}), "positive_document"),
        (json.dumps({**GOOD, "hard_negative_document": None}), "hard_negative_document"),
        (json.dumps({**GOOD, "user_query": "a\ud800"}), "user_query"),
        (json.dumps({**GOOD, "user_query": "a\ufffd"}), "user_query: .*U.FFFD"),
        (f"[{TEXT}, {TEXT}]", "valid dictionary"),
        ("[]", "valid dictionary"),
    ],
)
def test_what_does_not_fit_is_invalid_and_says_why(content, reason):
    with pytest.raises(answers.InvalidAnswerError, match=reason) as raised:
        answers.parse("examples", content)
    assert len(str(raised.value)) <= 300


def test_an_answer_that_was_cut_off_is_told_so():
    with pytest.raises(answers.InvalidAnswerError, match="token limit"):
        answers.parse("examples", TEXT[:-5], "length")
    assert answers.parse("examples", TEXT, "length").user_query == "q"


@pytest.mark.parametrize("content", ['["a", "b"]', '{"topics": ["a", "b"]}', '1. ["a", "b"]'])
def test_topics_are_a_list_or_an_object_with_one(content):
    assert answers.parse("topics", content).topics == ["a", "b"]


@pytest.mark.parametrize(
    "content",
    ["[]", '["a", 1]', '[["a"]]', '["a", ""]', '{"topic": "a"}', '[{"topic": "a", "tags": ["b"]}]',
     '["' + "a" * 501 + '"]', '["a", "b'],
)  # fmt: skip
def test_other_lists_are_no_topics(content):
    with pytest.raises(answers.InvalidAnswerError):
        answers.parse("topics", content)
