"""Makes retrieval training data by a language model behind an OpenAI-compatible endpoint.

    python -m piccolo_jax.synthesize --endpoint=URL --model=NAME --count=N --output=DIR [...]

Two phases: topics of retrieval tasks, then examples of each topic, a query with a document that
answers it and one that only seems to. DIR/train.jsonl is what `prepare` and `train` read,
DIR/report.md says what it holds and cost, DIR/answers/ keeps every answer. The same command goes on
after it was stopped, and with a larger --count adds to what is there. The key is read from the
environment. See docs/synthesis.md.
"""

import argparse
import asyncio
import json
import os
from collections.abc import Iterator

import tqdm

from piccolo_jax import cli, metrics
from piccolo_jax.errors import UserError
from piccolo_jax.synthesis import answers, client, filters, flags, output, prompts, report, wording
from piccolo_jax.synthesis.filters import Dropped, Limits, Row
from piccolo_jax.synthesis.journal import Journal
from piccolo_jax.synthesis.limits import Gate
from piccolo_jax.synthesis.phases import Plan, Synthesis


def main(argv: list[str]) -> None:
    """The command."""
    args = flags.parse(argv, __doc__)
    if args.write_templates:
        for path in prompts.copy_packaged(args.write_templates):
            print(f"{path}: {prompts.FILES[path.name]}")
        return
    if args.preview:
        print(_preview(_plan(args)))
        return
    plan, options, limits = _plan(args), _options(args), _limits(args)
    key = client.check_key(os.environ.get(args.key_variable, ""))
    client.check_url(options.url)
    templates = prompts.fingerprint(args.templates, plan.languages)
    if args.filter_model:  # before anything is paid for
        from piccolo_jax.synthesis import consistency

        consistency.check_model(args.filter_model)
    folder = output.open_folder(args.output, output.settings_of(plan, args.model, templates))
    journal = Journal(folder / "journal.jsonl")
    try:
        journal.spending.budget = args.budget_tokens
        synthesis = asyncio.run(_ask(plan, journal, options, key, args))
        rows = list(_rows(plan, journal))
        kept, dropped = _filter(rows, limits, args)
        made = report.make(synthesis, kept, dropped, (args.prompt_price, args.answer_price))
        output.write(args.output, kept, dropped, made)
    finally:
        journal.close()
    print(report.tables(made))
    print(f"\n{len(kept)} rows in {args.output / 'train.jsonl'}; samples in"
          f" {args.output / 'report.md'}")  # fmt: skip
    if synthesis.stopped:
        metrics.say(f"stopped: {synthesis.stopped}; a larger --budget-tokens goes on")
    elif made["examples"]["no answer"]:
        metrics.say(f"{made['examples']['no answer']} requests got no answer; the same command asks"
                    " them again")  # fmt: skip
    if not kept:
        raise UserError(f"no row was kept; {args.output / 'report.md'} says why")


async def _ask(
    plan: Plan, journal: Journal, options: client.Options, key: str, args: argparse.Namespace
) -> Synthesis:
    gate = Gate(args.requests_per_minute, args.tokens_per_minute)
    async with client.Endpoint(options, key, gate, journal.has_answers) as endpoint:
        synthesis = Synthesis(plan, journal, endpoint, args.concurrency)
        await synthesis.run()
        return synthesis


def _rows(plan: Plan, journal: Journal) -> Iterator[Row]:
    """The answered examples in the order of their numbers."""
    for number in range(plan.count):
        progress = journal.of("examples", number)
        if isinstance(value := progress.value, answers.Example):
            yield Row(
                number, plan.example_language(number), progress.topic, value.user_query,
                value.positive_document, value.hard_negative_document,
            )  # fmt: skip


def _filter(
    rows: list[Row], limits: Limits, args: argparse.Namespace
) -> tuple[list[Row], list[Dropped]]:
    kept: list[Row] = []
    dropped: list[Dropped] = []
    for item in tqdm.tqdm(filters.apply(rows, limits), "filtering", len(rows), leave=False):
        if isinstance(item, Dropped):
            dropped.append(item)
        else:
            kept.append(item)
    if not (args.filter_model and kept):
        return kept, dropped
    from piccolo_jax.synthesis import consistency

    found = consistency.positive_ranks(
        args.filter_model, kept, args.query_prompt, args.passage_prompt
    )
    consistent = []
    for row, rank in zip(kept, found.tolist(), strict=True):
        if rank <= args.filter_rank:
            consistent.append(row)
        else:
            reason = f"the model finds the positive at rank {rank}"
            dropped.append(Dropped(row, "consistency", reason))
    return consistent, sorted(dropped, key=lambda item: item.row.number)


def _preview(plan: Plan) -> str:
    """The first prompts in each language, with examples of topics for topics."""
    parts = []
    for place, (language, templates) in enumerate(plan.prompts.items()):
        first = templates.ask_topics(plan.seed, place, plan.topics_per_request)
        parts.append(f"--- {language}: topics\n{first}")
        for generation, topic in enumerate((plan.topics or templates.topic_examples)[:3]):
            drawn = templates.draw_attributes(plan.seed, place, generation, plan.per_topic)
            prompt = templates.ask_example(topic, drawn)
            parts.append(f"--- {language}: example {generation}\n{prompt}")
    return "\n\n".join(parts)


def _plan(args: argparse.Namespace) -> Plan:
    topics = prompts.read_topics(args.topics) if args.topics else ()
    return Plan(
        args.count, args.seed, _prompts(args), args.examples_per_topic, args.topics_per_request,
        topics,
    )  # fmt: skip


def _prompts(args: argparse.Namespace) -> dict[str, prompts.Prompts]:
    languages = tuple(dict.fromkeys(filter(None, map(str.strip, args.languages.split(",")))))
    if not languages:
        raise UserError("--languages: name one or more, like zh,en")
    for language in languages:
        if not wording.is_checked(language):
            metrics.say(f"{language}: the language of answers can't be checked")
    return prompts.load(args.templates, languages)


def _options(args: argparse.Namespace) -> client.Options:
    try:
        fields = json.loads(args.fields)
    except (ValueError, RecursionError) as error:
        raise UserError(f"--fields: broken JSON ({error})") from None
    if not isinstance(fields, dict):
        raise UserError("--fields: must be a JSON object")
    if taken := {"model", "messages", "stream", "n"} & set(fields):
        raise UserError(f"--fields: {min(taken)!r} can't be set here")
    return client.Options(
        args.endpoint, args.model, args.timeout, args.retries, args.longest_pause, args.max_tokens,
        args.temperature, fields,
    )  # fmt: skip


def _limits(args: argparse.Namespace) -> Limits:
    return Limits(
        flags.length_range("query-length", args.query_length),
        flags.length_range("document-length", args.document_length),
        args.language_share, args.leak_length, args.near_duplicate,
    )  # fmt: skip


if __name__ == "__main__":
    cli.run(main)
