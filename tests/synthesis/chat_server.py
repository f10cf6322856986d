"""A real HTTP server that speaks the chat completions protocol, and misbehaves as it is told."""

import collections
import hashlib
import http.server
import json
import random
import re
import string
import threading
import time

KEY = "sk-test-0123456789abcdef"


def han(seed, length):
    """Chinese characters that no other seed gives."""
    rng = random.Random(seed)
    return "".join(chr(rng.randrange(0x4E00, 0x9F00)) for _ in range(length))


def english(seed, length):
    """Words of Latin letters that no other seed gives."""
    rng = random.Random(seed)
    letters = string.ascii_lowercase
    return " ".join("".join(rng.choices(letters, k=rng.randint(2, 9))) for _ in range(length))


def example(seed):
    """An example that passes all filters."""
    return {
        "user_query": han(f"q{seed}", 8),
        "positive_document": han(f"p{seed}", 60),
        "hard_negative_document": han(f"n{seed}", 60),
    }


def topics(seed, count):
    return [f"给出{han(f't{seed}{i}', 6)}，查找文章。" for i in range(count)]


def is_example(prompt):
    return "positive_document" in prompt


def good_content(prompt):
    """What a well-behaved model answers: a function of the prompt."""
    seed = hashlib.sha256(prompt.encode()).hexdigest()
    if is_example(prompt):
        return json.dumps(example(seed), ensure_ascii=False)
    count = int(re.search(r"\d+", prompt)[0])
    return json.dumps(topics(seed, count), ensure_ascii=False)


def completion(content, usage=(100, 50), finish_reason="stop"):
    body = {
        "id": "x", "object": "chat.completion", "created": 1, "model": "m",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": content},
                     "finish_reason": finish_reason}],
    }  # fmt: skip
    if usage:
        prompt, answer = usage
        body["usage"] = {"prompt_tokens": prompt, "completion_tokens": answer,
                         "total_tokens": prompt + answer}  # fmt: skip
    return body


class Reply:
    """Status, body (an object or bytes), headers.

    `delay` seconds pass before, `drip` before each byte of the body; `cut` closes halfway.
    """

    def __init__(self, body=None, status=200, headers=None, delay=0.0, drip=0.0, cut=False):
        self.body, self.status, self.headers = body, status, headers or {}
        self.delay, self.drip, self.cut = delay, drip, cut


def good(prompt, **options):
    return Reply(completion(good_content(prompt), **options))


def error(status, message="no", code=None, **options):
    body = {"error": {"message": message, "type": "e", "code": code}}
    return Reply(body, status=status, **options)


class ChatServer:
    """Answers by `behave(prompt, n)`: the first message, and how often it was sent before.

    `requests` are the bodies of all requests as they came, `headers` their headers, `times` when.
    """

    def __init__(self, behave=None):
        self.behave = behave or (lambda prompt, n: good(prompt))
        self.requests, self.headers, self.times = [], [], []
        self.in_flight = self.most_in_flight = 0
        self._seen = collections.Counter()
        self._lock = threading.Lock()
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer._answer(self, body)

            def log_message(self, *_):
                pass

        class Server(http.server.ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, *_):
                pass  # clients that were killed

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    @property
    def prompts(self):
        """The first message of each request."""
        return [prompt_of(body) for body in self.requests]

    def forget(self):
        """Forgets what was asked so far."""
        with self._lock:
            self.requests, self.headers, self.times = [], [], []

    def _answer(self, handler, body):
        prompt = prompt_of(body)
        with self._lock:
            self.requests.append(body)
            self.headers.append(dict(handler.headers))
            self.times.append(time.monotonic())
            n = self._seen[prompt]
            self._seen[prompt] += 1
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            reply = self.behave(prompt, n)
            time.sleep(reply.delay)
            content = (
                reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
            )
            headers = {"Content-Type": "application/json", **reply.headers}
            handler.send_response(reply.status)
            for name, value in headers.items():
                handler.send_header(name, value)
            handler.send_header("Content-Length", str(len(content)))
            handler.end_headers()
            for byte in content if reply.drip else ():
                handler.wfile.write(bytes([byte]))
                time.sleep(reply.drip)
            handler.wfile.write(
                content[: len(content) // 2] if reply.cut else content * (not reply.drip)
            )
            handler.close_connection |= reply.cut
        finally:
            with self._lock:
                self.in_flight -= 1


def prompt_of(body):
    """The request's own message; what is asked again follows it."""
    return body["messages"][0]["content"]
