"""What a model must answer: schemas, and how JSON is found in what it writes around it."""

import dataclasses
import json
import re
from typing import Annotated

import pydantic

MAX_ATTEMPTS = 3  # the first answer and two that are asked for again

_THINKING = re.compile(r"<think>.*?(</think>|\Z)", re.DOTALL)
_MAX_STARTS = 50  # places in an answer where JSON is looked for
_MAX_ERROR = 300  # characters of an error that the model is told


@dataclasses.dataclass(frozen=True)
class Answer:
    """One chat completion and what it cost."""

    content: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    estimated: bool  # the endpoint did not say how many tokens
    lost_tokens: int = 0  # of prompts of earlier tries that timed out and may be billed; a guess


def _whole(text: str) -> str:
    if "\ufffd" in text:
        raise ValueError("holds U+FFFD, which stands for broken characters")
    return text


_Text = Annotated[
    str,
    pydantic.StringConstraints(strict=True, strip_whitespace=True, min_length=1),
    pydantic.AfterValidator(_whole),
]
_Topic = Annotated[_Text, pydantic.StringConstraints(max_length=500)]


class Example(pydantic.BaseModel):
    """A training example: the answer to a request of the second phase, or a list of just it."""

    user_query: _Text
    positive_document: _Text
    hard_negative_document: _Text

    @pydantic.model_validator(mode="before")
    @classmethod
    def _only_item(cls, value: object) -> object:
        return value[0] if isinstance(value, list) and len(value) == 1 else value


class Topics(pydantic.BaseModel):
    """Topics of retrieval tasks: a list, or an object with a list `topics`."""

    topics: Annotated[list[_Topic], pydantic.Field(min_length=1)]

    @pydantic.model_validator(mode="before")
    @classmethod
    def _list(cls, value: object) -> object:
        return {"topics": value} if isinstance(value, list) else value


Value = Example | Topics
SCHEMAS: dict[str, type[Example] | type[Topics]] = {"topics": Topics, "examples": Example}


class InvalidAnswerError(Exception):
    """An answer that holds nothing of the schema: the message says why, for the model to mend."""


def parse(phase: str, content: str, finish_reason: str = "stop") -> Value:
    """The first JSON value in an answer that fits the phase's schema.

    Takes JSON in a code block, after thoughts in <think> and amid other words, and line breaks
    within strings. Raises InvalidAnswerError.
    """
    text = _THINKING.sub("", content)
    cut = " (the answer was cut off at the token limit: write less)" * (finish_reason == "length")
    if not text.strip():
        raise InvalidAnswerError("it is empty" + cut)
    decoder = json.JSONDecoder(strict=False)
    error = "it holds no JSON"
    starts = re.finditer(r"[\[{]", text)
    position = 0
    for start, _ in zip(starts, range(_MAX_STARTS), strict=False):
        if start.start() < position:
            continue  # within a value that has been looked at and isn't what is wanted
        try:
            value, position = decoder.raw_decode(text, start.start())
        except (ValueError, RecursionError) as broken:
            if error == "it holds no JSON":
                error = f"broken JSON ({broken})"
            continue
        try:
            return SCHEMAS[phase].model_validate(value)
        except pydantic.ValidationError as invalid:
            error = _reasons(invalid)
    raise InvalidAnswerError(error[:_MAX_ERROR] + cut)


def _reasons(invalid: pydantic.ValidationError) -> str:
    reasons = []
    for item in invalid.errors(include_url=False, include_input=False):
        place = ".".join(map(str, item["loc"]))
        reasons.append(f"{place}: {item['msg']}" if place else item["msg"])
    return "; ".join(reasons)
