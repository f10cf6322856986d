"""Asks an OpenAI-compatible endpoint for chat completions, whatever it does."""

import asyncio
import collections
import dataclasses
import email.utils
import json
import math
import random
import time
from typing import Annotated, Any
from urllib.parse import urlsplit

import openai
import pydantic

from piccolo_jax.errors import UserError
from piccolo_jax.synthesis.answers import Answer
from piccolo_jax.synthesis.limits import Gate, estimate_tokens

Messages = list[dict[str, str]]
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0  # seconds between tries, doubled each time
_UNREACHED_TRIES = 3  # of an endpoint that has never answered
_CONNECT_SECONDS = 10.0
_SECRET_LENGTH = 6  # shorter keys are the placeholders that local servers want
_MAX_MESSAGE = 300  # characters of what an endpoint says


class NoAnswerError(Exception):
    """A request got no answer: `refused` by the endpoint, or given up after several tries."""

    def __init__(self, message: str, refused: bool, lost_tokens: int):
        super().__init__(message)
        self.refused, self.lost_tokens = refused, lost_tokens


@dataclasses.dataclass(frozen=True)
class Options:
    """How an endpoint is asked."""

    url: str
    model: str
    timeout: float = 120.0  # seconds for a whole answer
    retries: int = 8  # tries after the first
    longest_pause: float = 600.0  # seconds that the endpoint may ask to wait for
    max_tokens: int = 2048
    temperature: float = 1.0
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)  # put into each request


class _FailedTryError(Exception):
    """A try without an answer. Another may have one, unless it is `refused`."""

    def __init__(self, kind: str, message: str, retry_after: float | None = None):
        super().__init__(f"{kind}: {message}" if message else kind)
        self.kind, self.retry_after = kind, retry_after


# What is read of a completion; anything else in it is ignored.
class _Message(pydantic.BaseModel):
    content: Any = None


class _Choice(pydantic.BaseModel):
    message: _Message = _Message()
    finish_reason: Any = None


class _Usage(pydantic.BaseModel):
    prompt_tokens: Annotated[int, pydantic.Field(ge=0)]
    completion_tokens: Annotated[int, pydantic.Field(ge=0)]


class _Completion(pydantic.BaseModel):
    choices: list[_Choice]
    usage: Any = None


class Endpoint:
    """Sends requests to one endpoint: paced, with tries after errors, counting what happened.

    `failures` counts failed tries by kind, `answered` the answers. An async context manager.
    `proven`: whether it has answered such requests before. If not, a refusal of the first ones ends
    the run.
    """

    def __init__(self, options: Options, key: str, gate: Gate, proven: bool = False):
        self.options, self._gate, self._proven = options, gate, proven
        self._key = check_key(key)
        written = (self._key, repr(self._key)[1:-1], json.dumps(self._key)[1:-1])
        self._key_forms = set(written) if len(self._key) >= _SECRET_LENGTH else set()
        self.place = check_url(options.url)
        self.answered = 0
        self.failures: collections.Counter[str] = collections.Counter()
        # A request without a key carries no header for it.
        self._headers = {} if self._key else {"Authorization": openai.Omit()}
        self._client = openai.AsyncOpenAI(
            base_url=options.url, api_key=self._key or "none",
            max_retries=0, timeout=openai.Timeout(options.timeout, connect=_CONNECT_SECONDS),
        )  # fmt: skip

    async def __aenter__(self) -> "Endpoint":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.close()

    def redact(self, text: str) -> str:
        """The text without the key."""
        for form in self._key_forms:
            text = text.replace(form, "***")
        return text

    async def ask(self, messages: Messages) -> Answer:
        """The endpoint's answer.

        Raises NoAnswerError if it refuses this request or all tries fail, and UserError for what
        would fail with every request.
        """
        tries, answered_before, lost = 0, self.answered, 0
        prompt = sum(estimate_tokens(message["content"]) for message in messages)
        reserved = prompt + self.options.max_tokens
        while True:
            await self._gate.enter(reserved)
            try:
                answer = await self._try(messages, prompt)
            except _FailedTryError as failure:
                self._gate.correct(-reserved)
                self.failures[failure.kind] += 1
                lost += prompt * (failure.kind == "timeout")
                if failure.kind == "refused":
                    raise NoAnswerError(str(failure), True, lost) from None
                if failure.kind == "429" and self.answered > answered_before:
                    tries = 0  # others get answers: a busy endpoint, not a broken one
                tries, answered_before = tries + 1, self.answered
                if tries > self.options.retries:
                    raise NoAnswerError(str(failure), False, lost) from None
                await self._wait_after(failure, tries)
                continue
            self._gate.correct(answer.prompt_tokens + answer.completion_tokens - reserved)
            self.answered += 1
            return dataclasses.replace(answer, lost_tokens=lost)

    async def _wait_after(self, failure: _FailedTryError, tries: int) -> None:
        if failure.kind == "connection" and not self.answered and tries >= _UNREACHED_TRIES:
            raise UserError(f"{self.place}: can't be reached ({failure}); is --endpoint right?")
        wait = min(FIRST_WAIT * 2 ** (tries - 1), LONGEST_WAIT) * random.uniform(0.75, 1.25)
        if failure.retry_after is not None:
            wait = failure.retry_after
        if wait > self.options.longest_pause:
            raise UserError(
                f"{self.place}: asks to wait for {wait:.0f} seconds ({failure}); the same command"
                " goes on then, or waits itself with a larger --longest-pause"
            )
        if failure.retry_after is not None or failure.kind == "429":
            self._gate.pause(wait)
        else:
            await asyncio.sleep(wait)

    async def _try(self, messages: Messages, prompt: int) -> Answer:
        """One try. Raises _FailedTryError, or UserError for what would fail with every request."""
        own = {"max_tokens": self.options.max_tokens, "temperature": self.options.temperature}
        if "max_completion_tokens" in self.options.fields:
            del own["max_tokens"]
        fields = {name: x for name, x in {**own, **self.options.fields}.items() if x is not None}
        create: Any = self._client.chat.completions.with_raw_response.create
        try:
            async with asyncio.timeout(self.options.timeout):  # httpx's begins anew with each byte
                response = await create(
                    model=self.options.model, messages=messages, extra_body=fields,
                    extra_headers=self._headers,
                )  # fmt: skip
        except (TimeoutError, openai.APITimeoutError):
            reason = f"no answer in {self.options.timeout:g} seconds"
            raise _FailedTryError("timeout", reason) from None
        except openai.APIStatusError as error:
            raise self._status_failure(error) from None
        except openai.APIConnectionError as error:
            raise _FailedTryError("connection", self._said(error.__cause__ or error)) from None
        return self._read(response.http_response.content, prompt)

    def _read(self, body: bytes, prompt: int) -> Answer:
        try:
            completion = _Completion.model_validate(json.loads(body))
        except (ValueError, RecursionError):
            start = self._said(body.decode(errors="replace"))
            raise _FailedTryError("malformed", f"not a chat completion: {start}") from None
        choice = completion.choices[0] if completion.choices else _Choice()
        said = choice.message.content if isinstance(choice.message.content, str) else ""
        # Half a surrogate pair can't be written; the schemas don't take what stands for it.
        content = self.redact(said.encode(errors="replace").decode())
        try:
            usage, estimated = _Usage.model_validate(completion.usage), False
        except pydantic.ValidationError:
            estimated = True
            usage = _Usage(prompt_tokens=prompt, completion_tokens=estimate_tokens(content))
        return Answer(
            content=content,
            finish_reason=self.redact(str(choice.finish_reason or "")),
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            estimated=estimated,
        )

    def _status_failure(self, error: openai.APIStatusError) -> Exception:
        status, said = error.status_code, self._said(error)
        where = f"{self.place}: {said}"
        if status in (401, 403):
            given = "is not accepted" if self._key else "is missing"
            return UserError(f"{where}; the key {given} (see --key-variable)")
        if status == 404:
            return UserError(f"{where}; is --endpoint right (most end in /v1), and --model?")
        if status == 402 or error.code == "insufficient_quota":
            return UserError(f"{where}; the account has no credit left")
        if status in (408, 409, 429) or status >= 500:
            kind = "5xx" if status >= 500 else str(status)
            return _FailedTryError(kind, said, retry_after(error.response.headers))
        if self.answered == 0 and not self._proven:
            return UserError(f"{where}; the endpoint can't take such requests (see --fields)")
        return _FailedTryError("refused", said)

    def _said(self, error: object) -> str:
        """What an error says, on one line and without the key, which some endpoints repeat."""
        said = " ".join(self.redact(str(error)).split())
        return said if len(said) <= _MAX_MESSAGE else said[:_MAX_MESSAGE] + "..."


def check_key(key: str) -> str:
    """The key without blanks around it. Raises UserError, which doesn't show it."""
    key = key.strip()
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise UserError("the key in the environment holds characters that no key has")
    return key


def check_url(url: str) -> str:
    """The endpoint's address in one form. Raises UserError if it is none, or holds more."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise UserError(f"--endpoint: not an address ({error})") from None
    if parts.scheme not in ("http", "https") or not host:
        raise UserError("--endpoint: must be like http://localhost:8000/v1")
    if parts.username is not None or parts.query or parts.fragment:
        raise UserError("--endpoint: holds a user or parameters; keys belong in the environment")
    host = f"[{host}]" if ":" in host else host
    return f"{parts.scheme}://{host}" + (f":{port}" if port else "") + parts.path.rstrip("/")


def retry_after(headers: Any) -> float | None:
    """Seconds that the headers of a response ask to wait for; None if they don't say."""
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        try:
            seconds = float(headers.get(name)) * unit
        except (TypeError, ValueError):
            continue
        if math.isfinite(seconds) and seconds >= 0:
            return seconds
    try:
        date = email.utils.parsedate_to_datetime(headers.get("retry-after"))
        return max(date.timestamp() - time.time(), 0.0)
    except (TypeError, ValueError, OverflowError):
        return None
