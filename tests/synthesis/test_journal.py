import json

import pytest

from piccolo_jax.errors import UserError
from piccolo_jax.synthesis.journal import Journal, Record

GOOD = json.dumps({"user_query": "查询", "positive_document": "p", "hard_negative_document": "n"})


def answer(number, content=GOOD, attempt=0, **fields):
    return Record(
        phase="examples", number=number, attempt=attempt, content=content, prompt_tokens=10,
        completion_tokens=5, **fields,
    )  # fmt: skip


@pytest.fixture
def path(tmp_path):
    return tmp_path / "journal.jsonl"


@pytest.fixture
def opened(path):
    journals = []

    def open_it():
        while journals:
            journals.pop().close()
        journals.append(Journal(path))
        return journals[0]

    yield open_it
    for journal in journals:
        journal.close()


def test_what_was_answered_is_known_again(opened):
    journal = opened()
    journal.append(answer(3, topic="主题"))
    journal.append(answer(4, "{"))
    assert journal.spending.total == 30
    journal = opened()
    assert journal.of("examples", 3).value.user_query == "查询"
    assert journal.of("examples", 3).settled
    assert journal.of("examples", 3).topic == "主题"
    again = journal.of("examples", 4)
    assert (again.attempts, again.settled, again.content) == (1, False, "{")
    assert "broken JSON" in again.problem
    assert not journal.of("topics", 3).attempts
    assert (journal.spending.prompt_tokens, journal.spending.completion_tokens) == (20, 10)


def test_an_answer_is_on_disk_when_append_returns(opened, path):
    journal = opened()
    journal.append(answer(0))
    assert len(path.read_bytes().splitlines()) == 1
    assert path.read_bytes().endswith(b"\n")


def test_after_three_answers_that_cannot_be_used_a_request_is_settled(opened):
    journal = opened()
    for attempt in range(3):
        assert not journal.of("examples", 0).settled
        journal.append(answer(0, "no", attempt))
    assert opened().of("examples", 0).settled


def test_a_refusal_is_settled_and_a_failure_is_not(opened):
    journal = opened()
    for number, refused in ((0, True), (1, False)):
        journal.append(Record(phase="examples", number=number, attempt=0, problem="x",
                              refused=refused, lost_tokens=7))  # fmt: skip
    journal = opened()
    assert journal.of("examples", 0).settled
    assert journal.of("examples", 1).failed
    assert not journal.of("examples", 1).settled
    assert journal.spending.total == 14
    assert not journal.append(answer(1)).failed


def test_a_torn_last_line_is_cut_off_wherever_it_was_torn(opened, path):
    journal = opened()
    journal.append(answer(0))
    whole = path.read_bytes()
    journal.append(answer(1))
    line = path.read_bytes()[len(whole) :]
    for length in (1, 40, len(line) - 40, len(line) - 1):
        path.write_bytes(whole + line[:length])
        journal = opened()
        assert path.read_bytes() == whole
        assert not journal.of("examples", 1).attempts
        journal.append(answer(1))
        assert path.read_bytes() == whole + line


@pytest.mark.parametrize(
    "line",
    [b"", b"{", b"[]", b'{"phase": "examples"}', b"\xff", b"\0",
     b'{"phase": "other", "number": 0, "attempt": 0}',
     b'{"phase": "topics", "number": -1, "attempt": 0}',
     b'{"phase": "topics", "number": 0, "attempt": 0, "content": 5}'],
)  # fmt: skip
def test_a_broken_line_amid_others_is_an_error_that_names_it(opened, path, line):
    journal = opened()
    journal.append(answer(0))
    path.write_bytes(path.read_bytes() + line + b"\n" + path.read_bytes())
    with pytest.raises(UserError, match=rf"{path}:2: not a record.*delete the line"):
        opened()


def test_a_journal_is_written_by_one_at_a_time(opened, path):
    opened()
    with pytest.raises(UserError, match="another process is writing"):
        Journal(path)
    assert opened().append(answer(0)).value
