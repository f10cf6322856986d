"""The command against a real server on this machine, as a user runs it."""

import collections
import itertools
import json
import threading

import chat_server
import pytest
import small
from chat_server import KEY, ChatServer, Reply, completion, error, good, is_example
from command import examples_asked, records, report, rows, run

from piccolo_jax import build, export, synthesize
from piccolo_jax.data import formats
from piccolo_jax.synthesis import prompts

pytestmark = pytest.mark.usefixtures("short_waits", "key")


def test_rows_are_what_prepare_reads(output, capsys):
    with ChatServer() as server:
        assert run(server, output, count=25) == 0
        assert len(server.requests) == 1 + 25
    made = rows(output)
    assert len(made) == 25
    assert set(map(tuple, made)) == {("text", "text_pos", "text_neg", "type")}
    source = formats.open_source(str(output))
    assert source.task == "retrieval"
    for row, example in zip(made, source, strict=True):
        assert example == formats.RetrievalExample(
            row["text"], (row["text_pos"],), tuple(row["text_neg"])
        )
    assert f"25 rows in {output / 'train.jsonl'}" in capsys.readouterr().out


def test_the_same_seed_asks_the_same_and_another_does_not(tmp_path):
    with ChatServer() as server:
        asked = []
        for name, seed, concurrency in (("a", 0, 1), ("b", 0, 16), ("c", 1, 16)):
            server.forget()
            flags = (f"--seed={seed}", f"--concurrency={concurrency}")
            assert run(server, tmp_path / name, *flags) == 0
            asked.append(sorted(server.prompts))
    assert asked[0] == asked[1] != asked[2]
    files = [tmp_path / name / "train.jsonl" for name in "abc"]
    assert files[0].read_bytes() == files[1].read_bytes() != files[2].read_bytes()


def test_topics_come_from_the_first_phase_ten_examples_each_with_other_attributes(output):
    with ChatServer() as server:
        assert run(server, output, count=230) == 0
        asked = server.prompts
    assert [is_example(p) for p in asked].index(True) == 2
    assert not any(is_example(p) for p in asked[:2])
    given = [t for p in asked[:2] for t in json.loads(chat_server.good_content(p))]
    used = collections.Counter(r["topic"] for r in records(output) if r["phase"] == "examples")
    assert set(used) <= set(given)
    assert sorted(used.values()) == [10] * 23
    assert len(set(asked)) == len(asked)


def test_languages_take_turns_and_each_uses_its_own_templates(output):
    def behave(prompt, n):
        if not is_example(prompt):
            language = "zh" if "主题" in prompt else "en"
            return Reply(completion(json.dumps([f"{language}{n}{i}" for i in range(20)])))
        if "检索任务：zh" in prompt:
            return good(prompt)
        assert "Retrieval task: en" in prompt
        made = {key: chat_server.english(prompt + key, 20) for key in chat_server.example(0)}
        return Reply(completion(json.dumps(made)))

    with ChatServer(behave) as server:
        assert run(server, output, "--languages=zh,en", "--examples-per-topic=3", count=18) == 0
        assert len(examples_asked(server)) == 18
    by_language = collections.Counter(
        "zh" if "\u4e00" <= row["text"][0] <= "\u9fff" else "en" for row in rows(output)
    )
    assert by_language == {"zh": 9, "en": 9}
    kept = report(output)["attributes"]
    assert sum(kept["en"]["difficulty"]["college"]) > 0


def test_answers_that_cannot_be_used_are_asked_for_again_at_most_twice(output):
    with ChatServer() as server:
        run(server, output.with_name("first"), count=6)
        asked = sorted(examples_asked(server))
        topics_prompt = next(p for p in server.prompts if not is_example(p))
    good_one = [json.dumps(chat_server.example(i), ensure_ascii=False) for i in range(4)]
    answers = {  # the first and those to asking again
        topics_prompt: ['{"topic": "x"}', '["a topic", "another"'],
        asked[0]: ["Sorry!", good_one[0]],
        asked[1]: ['{"user_query": "a", "positive', '{"query": "q"}', good_one[1]],
        asked[2]: ["{}", "", "[1]"],
        asked[3]: ["", good_one[2]],
        asked[4]: [f"```json\n{good_one[3]}\n```"],
    }

    def behave(prompt, n):
        planned = answers.get(prompt, [])
        return Reply(completion(planned[n])) if n < len(planned) else good(prompt)

    with ChatServer(behave) as server:
        assert run(server, output, count=6) == 0
        turns = collections.Counter(server.prompts)
        bodies = [b["messages"] for b in server.requests if b["messages"][0]["content"] == asked[1]]
    assert turns.pop(topics_prompt) == 3
    assert [turns[prompt] for prompt in asked] == [2, 3, 3, 2, 1, 1]
    # The model sees its answer and what is wrong with it.
    first, second, third = bodies
    assert len(first) == 1
    assert [m["role"] for m in third] == ["user", "assistant", "user"]
    assert second[1]["content"] == '{"user_query": "a", "positive'
    assert "broken JSON" in second[2]["content"]
    assert third[1]["content"] == '{"query": "q"}'
    assert "user_query: Field required" in third[2]["content"]
    counts = report(output)["examples"]
    assert counts == {"wanted": 6, "usable": 2, "usable after asking again": 3, "not usable": 1,
                      "refused": 0, "no answer": 0, "not asked": 0}  # fmt: skip
    assert report(output)["topics"]["usable after asking again"] == 1


def test_a_server_that_misbehaves_in_every_way_gives_all_rows_in_the_end(output):
    ways = [
        error(429, headers={"Retry-After": "0.05"}), error(500), error(503),
        Reply(b"<html>", 502), Reply(completion("x"), cut=True), Reply(b'{"choices": [{"mess'),
        Reply({**completion("x"), "choices": []}), Reply(completion(None)),
        Reply(completion('{"user_query": "half')), Reply(completion('{"query": "q", "doc": "d"}')),
        Reply(completion("x"), delay=6),
    ]  # fmt: skip
    lock, left = threading.Lock(), []

    def behave(prompt, n):
        with lock:
            if is_example(prompt) and n == 0:
                left.append(prompt)
                return ways[(len(left) - 1) % len(ways)]
        return good(prompt)

    with ChatServer(behave) as server:
        assert run(server, output, "--timeout=4", count=22) == 0
    assert len(rows(output)) == 22
    failed = report(output)["this run"]["failed tries"]
    # On a busy machine one of these can time out; each occurs twice or more.
    assert failed.keys() == {"429", "5xx", "connection", "malformed", "timeout"}
    assert 1 <= report(output)["examples"]["usable after asking again"] <= 8
    assert report(output)["tokens"]["timed out"] > 0


@pytest.mark.parametrize(
    ("reply", "part"),
    [
        (error(401, f"Incorrect API key provided: {KEY}"), "not accepted"),
        (error(404, "no model"), "--model"),
        (error(500, f"with {KEY}"), "3 requests in a row got no answer"),
        (error(429, "later", headers={"Retry-After": "9999"}), "wait for 9999 seconds"),
        (Reply(completion("I can't.")), "no usable topics"),
    ],
)
def test_what_ends_a_run_is_one_message_without_the_key(output, capsys, reply, part):
    with ChatServer(lambda *_: reply) as server:
        assert run(server, output, "--retries=1") == 2
    message = small.one_error(capsys)
    assert part in message
    assert message.count("\n") == 1
    assert KEY not in message
    assert not (output / "train.jsonl").exists()


def test_a_key_that_is_not_accepted_ends_the_run_at_the_first_request(output):
    with ChatServer(lambda *_: error(401)) as server:
        assert run(server, output) == 2
        assert len(server.requests) == 1


def test_an_endpoint_that_is_not_there_is_one_message(output, capsys):
    with ChatServer() as server:
        pass
    assert run(server, output) == 2
    assert "can't be reached" in small.one_error(capsys)


def test_the_key_is_in_no_file_and_no_output(output, capfd, monkeypatch):
    def behave(prompt, n):
        if is_example(prompt) and n == 0:
            return error(500, f"key {KEY}")
        if n == is_example(prompt):
            return Reply(completion(f"{KEY}: no JSON", finish_reason=KEY))
        return good(prompt)

    monkeypatch.setenv("OPENAI_LOG", "debug")
    with ChatServer(behave) as server:
        assert run(server, output) == 0
        sent = {h.get("Authorization") or h.get("authorization") for h in server.headers}
    assert sent == {f"Bearer {KEY}"}
    captured = capfd.readouterr()
    assert KEY not in captured.out + captured.err
    files = [p for p in output.rglob("*") if p.is_file()]
    assert len(files) >= 2
    assert not [p for p in files if KEY.encode() in p.read_bytes()]
    assert "***" in (output / "answers" / "journal.jsonl").read_text("utf-8")


def test_another_variable_can_hold_the_key(output, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    monkeypatch.setenv("MY_KEY", "sk-mine-123456")
    with ChatServer() as server:
        assert run(server, output, "--key-variable=MY_KEY", count=1) == 0
        headers = {name.lower(): value for name, value in server.headers[0].items()}
    assert headers["authorization"] == "Bearer sk-mine-123456"


def test_filters_drop_rows_and_the_report_counts_them(output, capsys):
    base = chat_server.example("base")
    bad = [
        {"positive_document": "短"},
        {"positive_document": "this is an English text that has nothing to do with the rest of it"},
        {"hard_negative_document": base["positive_document"],
         "positive_document": base["positive_document"]},
        {"positive_document": "有人问：" + base["user_query"] + chat_server.han(5, 30),
         "user_query": base["user_query"]},
    ]  # fmt: skip
    numbers = itertools.count()  # one request at a time

    def behave(prompt, n):
        if not is_example(prompt):
            return good(prompt)
        k = next(numbers)
        made = chat_server.example(k if k != 9 else 8)
        return Reply(completion(json.dumps({**made, **(bad[k] if k < 4 else {})})))

    with ChatServer(behave) as server:
        flags = ("--concurrency=1", "--prompt-price=2", "--answer-price=10")
        assert run(server, output, *flags, count=10) == 0
    made = report(output)
    assert made["rows"] == {
        "answered": 10, "kept": 5,
        "dropped": {"length": 1, "language": 1, "same": 1, "leak": 1, "near-duplicate": 1,
                    "consistency": 0},
    }  # fmt: skip
    dropped = (output / "answers" / "dropped.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(x)["number"] for x in dropped] == [0, 1, 2, 3, 9]
    assert made["cost"]["prompts"] == pytest.approx(11 * 100 * 2 / 1e6)
    assert made["cost"]["answers"] == pytest.approx(11 * 50 * 10 / 1e6)
    assert made["cost"]["per 1,000 rows"] == pytest.approx(made["cost"]["total"] * 200)
    assert sum(n for n, _ in made["attributes"]["zh"]["clarity"].values()) == 10
    assert sum(n for _, n in made["attributes"]["zh"]["clarity"].values()) == 5
    out = capsys.readouterr().out
    for part in ("- near-duplicate  ", "1,650", "kept"):
        assert part in out
    markdown = (output / "report.md").read_text("utf-8")
    texts = {row["text"] for row in rows(output)}
    assert texts == {sample["text"] for sample in made["samples"]}
    assert all(text in markdown for text in texts)
    assert [sample["rule"] for sample in made["dropped samples"]] == [
        "length", "language", "same", "leak", "near-duplicate",
    ]  # fmt: skip


def test_nothing_kept_is_an_error_that_names_the_report(output, capsys):
    with ChatServer() as server:
        assert run(server, output, "--query-length=50:60") == 2
    assert f"{output / 'report.md'} says why" in small.one_error(capsys)
    assert report(output)["rows"]["dropped"]["length"] == 12


def test_a_model_that_does_not_find_the_positive_drops_the_row(output, tmp_path):
    config = small.config()
    parts = build.build(config)
    export.write(tmp_path / "model", small.params(parts), parts, config)
    papers = [
        "深度学习的模型研究进展",
        "水稻高产栽培技术",
        "桥梁结构的抗震设计",
        "古代诗歌研究综述",
    ]
    numbers = itertools.count()  # one request at a time

    def behave(prompt, n):
        if not is_example(prompt):
            return good(prompt)
        k = next(numbers)
        # The last query is about another paper than its positive.
        query = papers[k] + "啊" if k < 4 else papers[0] + "吗"
        positive = papers[k] + "呀" if k < 4 else "肝炎的临床治疗与观察"
        made = {"user_query": query, "positive_document": positive + "的文章",
                "hard_negative_document": chat_server.han(k, 20)}  # fmt: skip
        return Reply(completion(json.dumps(made)))

    flags = ("--concurrency=1", f"--filter-model={tmp_path / 'model'}", "--filter-rank=1",
             "--near-duplicate=1", "--leak-length=50", "--query-prompt=")  # fmt: skip
    with ChatServer(behave) as server:
        assert run(server, output, *flags, count=5) == 0
    made = report(output)
    assert made["rows"]["dropped"]["consistency"] >= 1
    assert "rank" in made["dropped samples"][-1]["reason"]
    assert papers[0] + "吗" not in {row["text"] for row in rows(output)}


def test_topics_can_be_given_instead_of_asked_for(output, tmp_path):
    (tmp_path / "topics.txt").write_text("甲\n乙\n", encoding="utf-8")
    with ChatServer() as server:
        assert run(server, output, f"--topics={tmp_path / 'topics.txt'}", count=25) == 0
        assert len(server.requests) == 25
    used = collections.Counter(r["topic"] for r in records(output))
    assert used == {"甲": 15, "乙": 10}


def test_a_model_without_new_topics_is_not_asked_for_ever(output, capsys):
    def behave(prompt, n):
        return good(prompt) if is_example(prompt) else Reply(completion('["甲", "乙", "甲。"]'))

    with ChatServer(behave) as server:
        assert run(server, output, "--examples-per-topic=2", count=12) == 0
        assert len(server.requests) - len(examples_asked(server)) == 3
        assert len(set(examples_asked(server))) == 12
    assert "2 topics instead of 6" in capsys.readouterr().err


def test_a_request_for_topics_that_failed_is_replaced_and_moves_no_topics_later(output):
    failing = []

    def behave(prompt, n):
        if not is_example(prompt) and not failing:
            failing.append(prompt)
        return error(500) if prompt in failing else good(prompt)

    flags = ("--examples-per-topic=1", "--topics-per-request=5", "--retries=0", "--concurrency=1")
    with ChatServer(behave) as server:
        assert run(server, output, *flags, count=25) == 0
        assert len(server.requests) == 6 + 25
        server.forget()
        server.behave = lambda prompt, n: good(prompt)
        assert run(server, output, *flags, count=25) == 0
        assert not server.requests
    assert report(output)["topics"]["no answer"] == 1


def test_edited_templates_are_asked_and_need_an_output_of_their_own(output, tmp_path, capsys):
    folder = tmp_path / "mine"
    assert small.run_command(synthesize.main, f"--write-templates={folder}") == 0
    edited = folder / "zh" / "example.txt"
    edited.write_text("只谈猫。" + edited.read_text("utf-8"), encoding="utf-8")
    with ChatServer() as server:
        assert run(server, output, f"--templates={folder}") == 0
        assert all(p.startswith("只谈猫。") for p in examples_asked(server))
        capsys.readouterr()
        for flags, name in (
            ((), "templates"),
            ((f"--templates={folder}", "--seed=1"), "seed"),
            ((f"--templates={folder}", "--examples-per-topic=3"), "examples_per_topic"),
        ):
            assert run(server, output, *flags) == 2
            assert f"was begun with {name} = " in small.one_error(capsys)


def test_preview_shows_prompts_and_asks_nothing(capsys):
    assert small.run_command(
        synthesize.main, "--preview", "--count=5", "--languages=zh,en", "--seed=3"
    ) == 0  # fmt: skip
    out = capsys.readouterr().out
    assert out.count("--- zh: ") == out.count("--- en: ") == 4
    drawn = prompts.load(prompts.PACKAGED, ("zh",))["zh"].draw_attributes(3, 0, 0, 10)
    assert all(value in out for value in drawn.values())


def test_a_folder_with_something_else_in_it_is_left_alone(output, capsys):
    output.mkdir()
    (output / "mine.txt").write_text("mine")
    with ChatServer() as server:
        assert run(server, output) == 2
        assert not server.requests
    assert "is no synthesis" in small.one_error(capsys)
    assert [p.name for p in output.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (("--count=0",), "--count=0: must be 1 or more"),
        (("--concurrency=0",), "--concurrency=0"),
        (("--budget-tokens=-1",), "--budget-tokens=-1"),
        (("--timeout=0",), "--timeout=0.0: must be above 0"),
        (("--timeout=nan",), "--timeout=nan"),
        (("--requests-per-minute=inf",), "--requests-per-minute=inf"),
        (("--near-duplicate=1.5",), "at most 1"),
        (("--query-length=5",), "LEAST:MOST"),
        (("--document-length=9:5",), "LEAST:MOST"),
        (("--fields={",), "--fields: broken JSON"),
        (("--fields=[]",), "must be a JSON object"),
        (('--fields={"messages": []}',), "'messages' can't be set"),
        (("--languages=,",), "--languages"),
        (("--languages=xx",), "no folder 'xx'"),
        (("--templates=/none",), "no folder 'zh'"),
        (("--topics=/none.txt",), "can't be read"),
        (("--endpoint=localhost",), "--endpoint"),
        (("--model=",), "--model is missing"),
    ],
)
def test_flags_that_make_no_sense_are_errors_before_anything_is_made(output, capsys, flags, part):
    with ChatServer() as server:
        assert run(server, output, *flags) == 2
        assert not server.requests
    message = small.one_error(capsys)
    assert part in message
    assert not output.exists()


def test_only_this_command_brings_in_the_client(run_python):
    done = run_python(
        "-c",
        "import sys, piccolo_jax.train, piccolo_jax.embed, piccolo_jax.prepare\n"
        "print(*{'openai', 'datasketch'} & set(sys.modules))",
    )
    assert done.stdout.split() == []
