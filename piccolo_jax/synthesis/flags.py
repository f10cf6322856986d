"""The flags of `synthesize`, and what they must be."""

import argparse
import math
import re
from pathlib import Path
from typing import Any

from piccolo_jax.errors import UserError
from piccolo_jax.synthesis import prompts

_LEAST = {  # of flags that are numbers
    "count": 1, "concurrency": 1, "examples_per_topic": 1, "topics_per_request": 1, "max_tokens": 1,
    "filter_rank": 1, "leak_length": 1, "requests_per_minute": 0, "tokens_per_minute": 0,
    "budget_tokens": 0, "retries": 0, "longest_pause": 0, "temperature": 0, "prompt_price": 0,
    "answer_price": 0, "language_share": 0, "near_duplicate": 0, "timeout": 0,
}  # fmt: skip
_ABOVE_ZERO, _AT_MOST_ONE = ("timeout", "near_duplicate"), ("near_duplicate", "language_share")


def parse(argv: list[str], description: str | None) -> argparse.Namespace:
    """The flags of a command line. Raises UserError naming one that is missing or out of range."""
    parser = argparse.ArgumentParser(
        prog="piccolo_jax.synthesize", description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip

    def flag(name: str, kind: Any, default: Any, text: str) -> None:
        shown = f"; default: {default}" if default not in (None, "") else ""
        group.add_argument(f"--{name}", type=kind, default=default, help=text + shown)

    group = parser.add_argument_group("what is made")
    flag("endpoint", str, "", "address of the API, like http://localhost:8000/v1")
    flag("model", str, "", "the endpoint's name of the model")
    flag("count", int, None, "examples to ask for; what filters drop is not replaced")
    flag("output", Path, None, "folder to write")
    flag("languages", str, "zh", "of the templates, with commas; topics take turns in them")
    flag("seed", int, 0, "of prompts")
    flag("examples-per-topic", int, 10, "requests for each topic")
    flag("topics-per-request", int, 20, "topics to ask for at once")
    flag("topics", Path, None, "file with topics, one a line, instead of the first phase")
    flag("templates", Path, prompts.PACKAGED, "folder of templates")
    flag("write-templates", Path, None, "copies the templates to this new folder, and ends")
    group.add_argument("--preview", action="store_true", help="prints some prompts, and ends")

    group = parser.add_argument_group("how the endpoint is asked")
    flag("key-variable", str, "OPENAI_API_KEY", "environment variable of the key; may be unset")
    flag("concurrency", int, 8, "requests in flight")
    flag("requests-per-minute", float, 0.0, "limit, spaced evenly; 0: none")
    flag("tokens-per-minute", float, 0.0, "limit, of prompts and answers; 0: none")
    flag("timeout", float, 120.0, "seconds for an answer")
    flag("retries", int, 8, "tries after one that failed, with longer and longer waits")
    flag("longest-pause", float, 600.0, "seconds that the endpoint may ask to wait for")
    flag("max-tokens", int, 2048, "of an answer")
    flag("temperature", float, 1.0, "of sampling")
    flag("fields", str, "{}", "JSON object put into each request; null leaves a field out")

    group = parser.add_argument_group("what it may cost")
    flag("budget-tokens", int, 0, "of prompts and answers, of all runs; 0: no limit")
    flag("prompt-price", float, 0.0, "of a million prompt tokens, for the report")
    flag("answer-price", float, 0.0, "of a million answer tokens, for the report")

    group = parser.add_argument_group("which rows are kept (lengths: Chinese characters or words)")
    flag("query-length", str, "1:200", "LEAST:MOST")
    flag("document-length", str, "10:2000", "LEAST:MOST")
    flag("language-share", float, 0.5, "of a document in its language; of a query half of that")
    flag("leak-length", int, 3, "queries so long must not occur in a document")
    flag("near-duplicate", float, 0.8, "Jaccard similarity of character trigrams")
    flag("filter-model", Path, None, "folder of an embedding model that must find the positives")
    flag("filter-rank", int, 3, "within so many of all documents")
    flag("query-prompt", str, None, "put before queries; default: the model's own")
    flag("passage-prompt", str, None, "put before documents; default: the model's own")

    args = parser.parse_args(argv[1:])
    if args.write_templates:
        return args
    needed = ("count",) if args.preview else ("endpoint", "model", "count", "output")
    for name in needed:
        if not getattr(args, name) and getattr(args, name) != 0:
            raise UserError(f"--{name} is missing; see --help")
    for name, least in _LEAST.items():
        value, shown = getattr(args, name), name.replace("_", "-")
        if value is None:
            continue
        if not least <= value < math.inf or (name in _ABOVE_ZERO and value == 0):
            more = f"above {least}" if name in _ABOVE_ZERO else f"{least} or more"
            raise UserError(f"--{shown}={value}: must be {more}")
        if name in _AT_MOST_ONE and value > 1:
            raise UserError(f"--{shown}={value}: must be at most 1")
    return args


def length_range(flag: str, value: str) -> tuple[int, int]:
    """LEAST and MOST of a flag. Raises UserError."""
    found = re.fullmatch(r"(\d+):(\d+)", value)
    if not found or int(found[1]) > int(found[2]):
        raise UserError(f"--{flag}={value}: must be LEAST:MOST")
    return int(found[1]), int(found[2])
