"""The command stopped, killed and asked for more; its budget and its limits."""

import collections
import json
import os
import signal
import subprocess
import sys
import time

import chat_server
import pytest
import small
from chat_server import ChatServer, Reply, completion, error, good
from command import examples_asked, records, report, rows, run

pytestmark = pytest.mark.usefixtures("short_waits", "key")


def start(server, output, count, *flags):
    """The command in a process of its own."""
    env = {**os.environ, "PYTHONPATH": str(small.ROOT)}
    return subprocess.Popen(
        [sys.executable, "-m", "piccolo_jax.synthesize", f"--endpoint={server.url}",
         "--model=some-model", f"--count={count}", f"--output={output}", *flags],
        env=env, cwd=small.ROOT, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def journal_lines(output):
    path = output / "answers" / "journal.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_after_sigkill_nothing_that_was_answered_is_asked_again(output, tmp_path):
    def slowly(prompt, n):
        return Reply(completion(chat_server.good_content(prompt)), delay=0.05)

    with ChatServer(slowly) as server:
        lines = 0
        for _ in range(2):  # killed twice
            process = start(server, output, 60, "--concurrency=4")
            while journal_lines(output) < lines + 15 and process.poll() is None:
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
            assert process.wait(60) == -signal.SIGKILL
            lines = journal_lines(output)
            assert 15 <= lines < 60
        journal = output / "answers" / "journal.jsonl"
        with journal.open("ab") as file:
            file.write(b'{"phase": "examples", "number": 59, "att')  # as if killed while writing
        answered = {(r["phase"], r["number"]) for r in records(output)}
        before = collections.Counter(server.prompts)
        server.forget()
        server.behave = lambda prompt, n: good(prompt)
        assert run(server, output, count=60) == 0
        after = collections.Counter(server.prompts)
        assert after.total() == 61 - len(answered)
        assert set(after.values()) == {1}
        # Twice asked were at most those in flight when the process was killed.
        assert sum(before[p] > 0 for p in after) <= 2 * 4
        server.forget()
        assert run(server, output, count=60) == 0
        assert not server.requests
        assert run(server, tmp_path / "whole", count=60) == 0
    assert (tmp_path / "whole" / "train.jsonl").read_bytes() == (
        output / "train.jsonl"
    ).read_bytes()


def test_a_refusal_of_the_first_new_request_ends_no_run_that_has_answers(output):
    with ChatServer() as server:
        assert run(server, output, count=3) == 0
        server.behave = lambda prompt, n: error(400, "bad words")
        assert run(server, output, count=4) == 0
        assert len(rows(output)) == 3
        assert report(output)["examples"]["refused"] == 1


def test_a_model_that_cannot_filter_is_said_before_anything_is_asked(output, tmp_path, capsys):
    with ChatServer() as server:
        assert run(server, output, f"--filter-model={tmp_path / 'none'}") == 2
        assert not server.requests
    assert "none" in small.one_error(capsys)


def test_a_larger_count_asks_only_for_what_is_new(output):
    with ChatServer() as server:
        assert run(server, output, count=15) == 0
        old = (output / "train.jsonl").read_bytes()
        first = set(server.prompts)
        server.forget()
        assert run(server, output, count=35) == 0
        assert len(examples_asked(server)) == 20
        assert not first & set(server.prompts)
    assert (output / "train.jsonl").read_bytes().startswith(old)
    assert len(rows(output)) == 35


def test_asking_again_goes_on_where_it_was_stopped(output):
    """An answer that can't be used is paid for too: the next run does not ask for it anew."""
    with ChatServer() as server:
        assert run(server, output, count=2) == 0
        journal = output / "answers" / "journal.jsonl"
        lines = records(output)
        lines[-1]["content"] = "no JSON"
        journal.write_text("".join(json.dumps(x) + "\n" for x in lines))
        server.forget()
        run(server, output, count=2)
        (body,) = server.requests
    assert body["messages"][1] == {"role": "assistant", "content": "no JSON"}
    assert records(output)[-1]["attempt"] == 1


@pytest.mark.parametrize("usage", [(100, 50), None])
def test_a_budget_is_exceeded_by_the_requests_in_flight_at_most(output, capsys, usage):
    with ChatServer(lambda prompt, n: good(prompt, usage=usage)) as server:
        assert run(server, output, "--budget-tokens=3000", "--concurrency=4", count=200) == 0
        asked = len(server.requests)
        spent = [r["prompt_tokens"] + r["completion_tokens"] for r in records(output)]
        assert 3000 <= sum(spent) < 3000 + 4 * max(spent)
        assert report(output)["tokens"]["total"] == sum(spent)
        assert report(output)["tokens"]["of these estimated"] == (0 if usage else sum(spent))
        assert "the budget of 3,000 tokens is spent" in capsys.readouterr().err
        # What was spent before counts.
        assert run(server, output, "--budget-tokens=3000", count=200) == 0
        assert len(server.requests) == asked
        assert run(server, output, "--budget-tokens=60000", count=asked + 9) == 0
        assert len(server.requests) > asked
    assert len(rows(output)) == asked + 9


def test_concurrency_is_the_most_in_flight(output):
    def slow(prompt, n):
        return Reply(completion(chat_server.good_content(prompt)), delay=0.05)

    with ChatServer(slow) as server:
        assert run(server, output, "--concurrency=5", count=40) == 0
        assert 3 <= server.most_in_flight <= 5


def test_requests_per_minute_are_kept(output):
    with ChatServer() as server:
        assert run(server, output, "--requests-per-minute=1200", count=15) == 0
        times = sorted(server.times)
    # 50 ms between two; a request can be late on its way, but all of them took their time.
    assert times[-1] - times[0] > 0.05 * 14


def test_nothing_is_sent_while_the_server_asks_to_wait(output):
    def behave(prompt, n):
        busy = len(server.requests) == 4
        return error(429, headers={"Retry-After": "0.6"}) if busy else good(prompt)

    with ChatServer(behave) as server:
        assert run(server, output, "--concurrency=1", count=8) == 0
        gaps = [b - a for a, b in zip(server.times, server.times[1:], strict=False)]
    assert gaps[3] > 0.5


def test_a_full_disk_is_one_message_and_the_run_goes_on_later(output, tmp_path):
    """The journal may have 4,000 bytes, as on a disk that is nearly full."""
    limited = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000));"
        " from piccolo_jax import cli, synthesize; cli.run(synthesize.main)"
    )
    with ChatServer() as server:
        flags = [f"--endpoint={server.url}", "--model=some-model", "--count=30",
                 f"--output={output}", "--concurrency=2"]  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-c", limited, *flags], capture_output=True, text=True, timeout=300,
            env={**os.environ, "PYTHONPATH": str(small.ROOT)}, cwd=small.ROOT, check=False,
        )  # fmt: skip
        assert done.returncode == 2, done.stderr
        assert "make room" in done.stderr
        assert "Traceback" not in done.stderr
        kept = len(records(output))
        assert kept > 2
        server.forget()
        assert run(server, output, count=30) == 0
        assert len(server.requests) == 31 - kept
    assert len(rows(output)) == 30
