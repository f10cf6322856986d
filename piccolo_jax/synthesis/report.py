"""What a synthesis gave and cost: a dictionary, as tables for the terminal and as Markdown."""

import collections
import random
from collections.abc import Sequence
from typing import Any

from piccolo_jax import metrics
from piccolo_jax.synthesis import filters
from piccolo_jax.synthesis.filters import Dropped, Row
from piccolo_jax.synthesis.journal import Journal, Phase
from piccolo_jax.synthesis.phases import Synthesis

_SAMPLES = 5  # of kept rows; of dropped ones, one for each rule


def make(
    synthesis: Synthesis,
    kept: Sequence[Row],
    dropped: Sequence[Dropped],
    prices: tuple[float, float],
) -> dict[str, Any]:
    """The report. Prices are those of a million tokens of prompts and of answers."""
    plan, journal, endpoint = synthesis.plan, synthesis.journal, synthesis.endpoint
    spending = journal.spending
    examples = _requests(journal, "examples", plan.count)
    by_rule = collections.Counter(item.rule for item in dropped)
    rng = random.Random(f"samples/{plan.seed}")
    return {
        "endpoint": endpoint.place,
        "model": endpoint.options.model,
        "seed": plan.seed,
        "stopped": synthesis.stopped,
        "topics": _requests(journal, "topics"),
        "examples": {"wanted": plan.count, **examples},
        "rows": {
            "answered": len(kept) + len(dropped),
            "dropped": {rule: by_rule[rule] for rule in filters.RULES},
            "kept": len(kept),
        },
        "tokens": {
            "prompts": spending.prompt_tokens,
            "answers": spending.completion_tokens,
            "timed out": spending.lost_tokens,
            "total": spending.total,
            "of these estimated": spending.estimated_tokens + spending.lost_tokens,
            **({"budget": spending.budget} if spending.budget else {}),
        },
        "cost": _cost(journal, prices, len(kept)),
        "this run": {"answers": endpoint.answered, "failed tries": dict(endpoint.failures)},
        "attributes": _attributes(synthesis, kept, dropped),
        "samples": [_sample(synthesis, row) for row in rng.sample(kept, min(_SAMPLES, len(kept)))],
        "dropped samples": [
            {"rule": item.rule, "reason": item.reason, **_sample(synthesis, item.row)}
            for item in _first_of_each_rule(dropped)
        ],
    }


def tables(report: dict[str, Any]) -> str:
    """Counts, tokens and costs for a terminal."""
    return "\n\n".join(metrics.table(header, rows) for header, rows in _tables(report))


def markdown(report: dict[str, Any]) -> str:
    """The whole report, with samples."""
    parts = ["# Synthetic retrieval data"]
    parts.append(f"`{report['model']}` at {report['endpoint']}, seed {report['seed']}.")
    if report["stopped"]:
        parts.append(f"Not everything was asked: {report['stopped']}.")
    parts += [_markdown_table(header, rows) for header, rows in _tables(report)]
    rows = [
        (f"{language}: {name}", value, *counts)
        for language, attributes in report["attributes"].items()
        for name, values in attributes.items()
        for value, counts in values.items()
    ]
    parts.append(_markdown_table(("attribute", "value", "answered", "kept"), rows))
    parts.append("## Samples")
    parts += [_markdown_sample(sample, "") for sample in report["samples"]]
    if report["dropped samples"]:
        parts.append("## What was dropped, one of each kind")
    for sample in report["dropped samples"]:
        parts.append(_markdown_sample(sample, f" {sample['rule']}: {sample['reason']}"))
    return "\n\n".join(parts) + "\n"


def _requests(journal: Journal, phase: Phase, count: int | None = None) -> dict[str, int]:
    """What has come of the requests of a phase; of the first `count` numbers."""
    outcomes = collections.Counter(
        "usable" if p.value and p.attempts == 1
        else "usable after asking again" if p.value
        else "refused" if p.refused
        else "not usable" if p.settled
        else "no answer" if p.failed
        else "not asked"
        for (of, number), p in journal.progress.items()
        if of == phase and (count is None or number < count)
    )  # fmt: skip
    if count is not None:
        outcomes["not asked"] += count - outcomes.total()
    names = ("usable", "usable after asking again", "not usable", "refused", "no answer")
    return {name: outcomes[name] for name in (*names, "not asked")}


def _cost(journal: Journal, prices: tuple[float, float], kept: int) -> dict[str, float]:
    """Costs, in the currency of the prices; empty without prices."""
    if not any(prices):
        return {}
    spending = journal.spending
    prompts = (spending.prompt_tokens + spending.lost_tokens) * prices[0] / 1e6
    total = prompts + spending.completion_tokens * prices[1] / 1e6
    per_row = {"per 1,000 rows": round(total / kept * 1000, 6)} if kept else {}
    return {"prompts": round(prompts, 6), "answers": round(total - prompts, 6),
            "total": round(total, 6), **per_row}  # fmt: skip


def _attributes(
    synthesis: Synthesis, kept: Sequence[Row], dropped: Sequence[Dropped]
) -> dict[str, dict[str, dict[str, list[int]]]]:
    """By language, attribute and value: the rows answered and kept."""
    counts: dict[str, dict[str, dict[str, list[int]]]] = {
        language: {
            name: {value: [0, 0] for value in values} for name, values in p.attributes.items()
        }
        for language, p in synthesis.plan.prompts.items()
    }
    for row, is_kept in [*((r, 1) for r in kept), *((d.row, 0) for d in dropped)]:
        for name, value in synthesis.plan.attributes(row.number).items():
            counts[row.language][name][value][0] += 1
            counts[row.language][name][value][1] += is_kept
    return counts


def _first_of_each_rule(dropped: Sequence[Dropped]) -> list[Dropped]:
    first: dict[str, Dropped] = {}
    for item in dropped:
        first.setdefault(item.rule, item)
    return [first[rule] for rule in filters.RULES if rule in first]


def _sample(synthesis: Synthesis, row: Row) -> dict[str, Any]:
    return {
        "number": row.number, "topic": row.topic,
        "attributes": synthesis.plan.attributes(row.number), "text": row.query,
        "text_pos": row.positive, "text_neg": row.negative,
    }  # fmt: skip


_Table = tuple[tuple[str, ...], list[tuple[Any, ...]]]


def _tables(report: dict[str, Any]) -> list[_Table]:
    topics, examples = report["topics"], report["examples"]
    requests = [(name, topics[name], examples[name]) for name in topics]
    rows = [("answered", report["rows"]["answered"])]
    rows += [(f"- {rule}", -n) for rule, n in report["rows"]["dropped"].items()]
    rows.append(("kept", report["rows"]["kept"]))
    tokens = [(name, f"{n:,}") for name, n in report["tokens"].items()]
    found: list[_Table] = [
        (("requests", "topics", "examples"), requests), (("rows", ""), rows),
        (("tokens", ""), tokens),
    ]  # fmt: skip
    if report["cost"]:
        found.append((("cost", ""), [(name, f"{n:,.4f}") for name, n in report["cost"].items()]))
    failed = report["this run"]["failed tries"]
    if failed:
        found.append((("failed tries of this run", ""), sorted(failed.items())))
    return found


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines)


def _cell(value: Any) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")


def _markdown_sample(sample: dict[str, Any], note: str) -> str:
    attributes = ", ".join(f"{name} = {value}" for name, value in sample["attributes"].items())
    lines = [
        f"**{sample['number']}**{_cell(note) and ' ' + _cell(note)}",
        f"topic: {_cell(sample['topic'])} ({_cell(attributes)})",
        f"query: {_cell(sample['text'])}",
        f"positive: {_cell(sample['text_pos'])}",
        f"negative: {_cell(sample['text_neg'])}",
    ]
    return "\n".join(f"> {line}  " for line in lines)
