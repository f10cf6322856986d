"""The command against a server, and what it made."""

import json

import small
from chat_server import is_example

from piccolo_jax import synthesize


def run(server, output, *flags, count=12):
    return small.run_command(
        synthesize.main, f"--endpoint={server.url}", "--model=some-model", f"--count={count}",
        f"--output={output}", *flags,
    )  # fmt: skip


def records(output):
    """The whole lines of the journal."""
    lines = (output / "answers" / "journal.jsonl").read_bytes().split(b"\n")[:-1]
    return [json.loads(line) for line in lines]


def rows(output):
    return [json.loads(x) for x in (output / "train.jsonl").read_text("utf-8").splitlines()]


def report(output):
    return json.loads((output / "report.json").read_bytes())


def examples_asked(server):
    return [p for p in server.prompts if is_example(p)]
