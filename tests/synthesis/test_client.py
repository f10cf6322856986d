import asyncio
import email.utils
import json
import time

import chat_server
import pytest
from chat_server import KEY, ChatServer, Reply, completion, error, good

from piccolo_jax.errors import UserError
from piccolo_jax.synthesis import client
from piccolo_jax.synthesis.client import Endpoint, NoAnswerError, Options
from piccolo_jax.synthesis.limits import Gate

pytestmark = pytest.mark.usefixtures("short_waits")

PROMPT = "写 2 个主题"


def ask(behave, prompts=(PROMPT,), key=KEY, endpoint="", **options):
    """What came of each prompt, asked one after the other; the endpoint; and the server."""

    async def run(url):
        gate = Gate()
        async with Endpoint(Options(url, "some-model", **options), key, gate) as made:
            outcomes = []
            for prompt in prompts:
                try:
                    outcomes.append(await made.ask([{"role": "user", "content": prompt}]))
                except (NoAnswerError, UserError) as raised:
                    outcomes.append(raised)
            return outcomes, made

    with ChatServer(behave) as server:
        outcomes, made = asyncio.run(run(endpoint or server.url))
        return outcomes, made, server


def first(reply, then=good):
    """Behaves badly once."""
    return lambda prompt, n: reply if n == 0 else then(prompt)


def test_a_request_is_what_the_protocol_says():
    (answer,), _, server = ask(None, max_tokens=77, temperature=0.5)
    assert server.requests == [{
        "model": "some-model", "messages": [{"role": "user", "content": PROMPT}],
        "max_tokens": 77, "temperature": 0.5,
    }]  # fmt: skip
    headers = {name.lower(): value for name, value in server.headers[0].items()}
    assert headers["authorization"] == f"Bearer {KEY}"
    assert answer.content == chat_server.good_content(PROMPT)
    assert (answer.prompt_tokens, answer.completion_tokens, answer.estimated) == (100, 50, False)
    assert answer.finish_reason == "stop"


@pytest.mark.parametrize("key", ["", "  \n"])
def test_without_a_key_no_header_is_sent(key):
    (answer,), _, server = ask(None, key=key)
    assert answer.content
    assert "authorization" not in {name.lower() for name in server.headers[0]}


def test_fields_are_put_into_requests_and_null_leaves_one_out():
    fields = {"temperature": None, "max_completion_tokens": 9, "top_p": 0.9, "x": {"y": [1]}}
    _, _, server = ask(None, fields=fields)
    body = server.requests[0]
    assert body.keys() == {"model", "messages", "max_completion_tokens", "top_p", "x"}
    assert body["x"] == {"y": [1]}


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        (error(429), "429"),
        (error(429, headers={"Retry-After": "0"}), "429"),
        (error(500), "5xx"),
        (error(503, headers={"Retry-After": "nonsense"}), "5xx"),
        (Reply(b"<html>bad gateway</html>", 502, {"Content-Type": "text/html"}), "5xx"),
        (error(408), "408"),
        (good(PROMPT, usage=None), None),
        (Reply(completion("x"), cut=True), "connection"),
        (Reply(b"{" + json.dumps(completion("x")).encode()), "malformed"),
        (Reply(json.dumps(completion("x")).encode()[:-9]), "malformed"),
        (Reply(b""), "malformed"),
        (Reply(b"\xff\xfe\0"), "malformed"),
        (Reply(b"[" * 100_000), "malformed"),
        (Reply(b"<html>hello</html>", headers={"Content-Type": "text/html"}), "malformed"),
        (Reply({"error": "overloaded"}), "malformed"),
        (Reply([1, 2]), "malformed"),
        (Reply({"choices": None}), "malformed"),
        (Reply(b"not gzip", headers={"Content-Encoding": "gzip"}), "connection"),
        (Reply(completion("x"), delay=0.8), "timeout"),
    ],
)
def test_a_try_that_failed_is_repeated_and_counted(reply, kind):
    (answer,), endpoint, server = ask(first(reply), timeout=0.4 if reply.delay else 60)
    assert answer.content == chat_server.good_content(PROMPT)
    if kind == "timeout":  # on a busy machine the second try can be late too
        assert endpoint.failures.keys() == {"timeout"}
        return
    assert dict(endpoint.failures) == ({kind: 1} if kind else {})
    assert len(server.requests) == (2 if kind else 1)
    assert endpoint.answered == 1


def test_prompts_that_timed_out_are_counted_as_lost():
    behave = first(Reply(completion("x"), delay=0.6))
    (answer,), endpoint, _ = ask(behave, timeout=0.3)
    times = endpoint.failures["timeout"]
    assert times >= 1
    assert answer.lost_tokens == times * client.estimate_tokens(PROMPT)


def test_a_server_that_drips_is_timed_out_as_a_whole():
    """A byte now and then keeps a read from timing out, but not the request."""
    behave = first(Reply(completion("x"), drip=0.05))
    (answer,), endpoint, _ = ask(behave, timeout=1.5)
    assert answer.content == chat_server.good_content(PROMPT)
    assert endpoint.failures["timeout"] >= 1


@pytest.mark.parametrize(
    ("content", "expected"),
    [(None, ""), ("", ""), (["x"], ""), ({"a": 1}, ""), ("a\ud800b", "a?b"), ("检索", "检索")],
)
def test_strange_contents_are_answers_too(content, expected):
    (answer,), _, server = ask(lambda *_: Reply(completion(content)))
    assert answer.content == expected
    assert len(server.requests) == 1


def test_an_answer_without_choices_is_empty_and_paid_for():
    (answer,), _, server = ask(lambda *_: Reply({**completion("x"), "choices": []}))
    assert (answer.content, answer.prompt_tokens) == ("", 100)
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "usage", [None, {}, [], "many", {"prompt_tokens": -1, "completion_tokens": 5},
              {"prompt_tokens": "a", "completion_tokens": 5}, {"prompt_tokens": None}],
)  # fmt: skip
def test_tokens_that_are_not_reported_are_estimated(usage):
    (answer,), _, _ = ask(lambda *_: Reply({**completion("检索检索"), "usage": usage}))
    assert answer.estimated
    assert answer.prompt_tokens == client.estimate_tokens(PROMPT)
    assert answer.completion_tokens == 4


def test_retry_after_is_waited_for_before_any_other_request():
    waits = []

    async def run(url):
        gate = Gate()
        gate.pause = waits.append
        async with Endpoint(Options(url, "m"), KEY, gate) as endpoint:
            await endpoint.ask([{"role": "user", "content": PROMPT}])

    date = email.utils.formatdate(time.time() + 50, usegmt=True)
    replies = [error(429, headers={"Retry-After": "0.7"}), error(503, headers={"Retry-After": "3"}),
               error(429, headers={"retry-after-ms": "40", "Retry-After": "9"}),
               error(429, headers={"Retry-After": date})]  # fmt: skip
    with ChatServer(lambda prompt, n: replies[n] if n < 4 else good(prompt)) as server:
        asyncio.run(run(server.url))
    assert waits[:3] == [0.7, 3.0, 0.04]
    assert 30 < waits[3] <= 50


@pytest.mark.parametrize("value", ["-1", "nan", "inf", "soon", ""])
def test_a_retry_after_that_is_no_time_is_ignored(value):
    assert client.retry_after({"retry-after": value}) is None


def test_a_date_that_has_passed_means_now():
    date = email.utils.formatdate(time.time() - 50, usegmt=True)
    assert client.retry_after({"retry-after": date}) == 0


def test_too_long_a_pause_ends_the_run_and_says_how_long():
    (outcome,), _, server = ask(lambda *_: error(429, "day", headers={"Retry-After": "86400"}))
    assert isinstance(outcome, UserError)
    assert "wait for 86400 seconds" in str(outcome)
    assert len(server.requests) == 1


def test_a_request_is_given_up_after_its_retries():
    (outcome,), endpoint, server = ask(lambda *_: error(500), retries=3)
    assert isinstance(outcome, NoAnswerError)
    assert not outcome.refused
    assert len(server.requests) == 4
    assert endpoint.failures["5xx"] == 4


def test_a_busy_endpoint_that_answers_others_is_asked_on():
    async def run(url):
        async with Endpoint(Options(url, "m", retries=2), KEY, Gate()) as endpoint:

            async def others():
                for i in range(20):
                    await endpoint.ask([{"role": "user", "content": f"{i} 1"}])

            busy = endpoint.ask([{"role": "user", "content": PROMPT}])
            answer, _ = await asyncio.gather(busy, others())
            return answer, endpoint

    def behave(prompt, n):
        return error(429) if prompt == PROMPT and n < 5 else good(prompt)

    with ChatServer(behave) as server:
        answer, endpoint = asyncio.run(run(server.url))
    assert answer.content == chat_server.good_content(PROMPT)
    assert endpoint.failures["429"] == 5


@pytest.mark.parametrize(
    ("reply", "part"),
    [
        (error(401, "bad key"), "bad key"),
        (error(403), "the key is not accepted"),
        (error(404, "no such model"), "/v1"),
        (error(429, "pay", code="insufficient_quota"), "no credit"),
        (error(402), "no credit"),
        (error(400, "no field max_tokens"), "no field max_tokens"),
    ],
)
def test_what_would_fail_every_time_ends_the_run_at_once(reply, part):
    (outcome,), _, server = ask(lambda *_: reply)
    assert isinstance(outcome, UserError)
    assert part in str(outcome)
    assert "\n" not in str(outcome)
    assert len(server.requests) == 1


def test_one_request_that_is_refused_among_others_is_not_repeated():
    behave = lambda prompt, n: error(400, "bad words") if "bad" in prompt else good(prompt)  # noqa: E731
    outcomes, endpoint, server = ask(behave, prompts=("写 1", "bad", "写 2"))
    assert outcomes[0].content
    assert outcomes[2].content
    assert isinstance(outcomes[1], NoAnswerError)
    assert outcomes[1].refused
    assert len(server.requests) == 3
    assert endpoint.failures == {"refused": 1}


def test_an_endpoint_that_is_not_there_ends_the_run_soon():
    with ChatServer() as server:
        url = server.url
    (outcome,), endpoint, _ = ask(None, endpoint=url)
    assert isinstance(outcome, UserError)
    assert "can't be reached" in str(outcome)
    assert endpoint.failures["connection"] == 3


def test_one_that_goes_away_is_tried_longer():
    def behave(prompt, n):
        return Reply(completion("x"), cut=True) if "bad" in prompt and n < 5 else good(prompt)

    outcomes, endpoint, _ = ask(behave, prompts=("写 1", "bad 1"))
    assert outcomes[1].content
    assert endpoint.failures["connection"] == 5


@pytest.mark.parametrize("key", [KEY, "a'b\\c\"d-12345", "x" * 299 + "yz"])
@pytest.mark.parametrize("status", [200, 400, 401, 404, 429, 500])
def test_a_key_that_the_endpoint_echoes_is_not_repeated(key, status):
    for body in ({"error": {"message": f"your key {key} is wrong"}}, f"<p>{key}</p>".encode(),
                 (" " * 280 + key).encode()):  # fmt: skip
        (outcome,), _, _ = ask(lambda *_, b=body: Reply(b, status), key=key, retries=0)
        assert isinstance(outcome, Exception)
        assert "***" in str(outcome) or not isinstance(body, dict)
        for form in (key, repr(key)[1:-1], json.dumps(key)[1:-1], key[:20]):
            assert form not in str(outcome)


def test_a_key_in_an_answer_is_taken_out():
    (answer,), _, _ = ask(lambda *_: Reply(completion(f"a {KEY} b", finish_reason=KEY)))
    assert (answer.content, answer.finish_reason) == ("a *** b", "***")


def test_a_finish_reason_that_is_no_text_is_taken_as_one():
    (answer,), _, _ = ask(lambda *_: Reply(completion("a", finish_reason=7)))
    assert (answer.content, answer.finish_reason) == ("a", "7")


def test_a_placeholder_key_is_no_secret():
    (answer,), _, _ = ask(lambda *_: Reply(completion("none EMPTY")), key="EMPTY")
    assert answer.content == "none EMPTY"


@pytest.mark.parametrize("key", ["sk-ключ-123456", "sk-1234\n5678", "two words"])
def test_a_key_that_cannot_be_one_is_an_error_that_does_not_show_it(key):
    with pytest.raises(UserError) as raised:
        client.check_key(key)
    assert key not in str(raised.value)
    assert client.check_key("sk-123456\r\n") == "sk-123456"


@pytest.mark.parametrize(
    "url",
    ["", "localhost:8000/v1", "ftp://x/v1", "http://", "http://x:port/v1", "http://[::1/v1",
     "http://me:secret@host/v1", "https://host/v1?key=secret"],
)  # fmt: skip
def test_an_address_that_cannot_be_one_is_an_error_without_secrets(url):
    with pytest.raises(UserError, match="--endpoint") as raised:
        client.check_url(url)
    assert "secret" not in str(raised.value)


def test_an_address_is_shown_in_one_form():
    assert client.check_url("https://Host:81/v1/") == "https://host:81/v1"
    assert client.check_url("http://[::1]:8/v1") == "http://[::1]:8/v1"
