"""The folder of a synthesis: settings that it was begun with, rows, and the report.

`train.jsonl` lies beside nothing else that looks like training data, so the folder is a dataset.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from piccolo_jax.errors import UserError
from piccolo_jax.synthesis import report
from piccolo_jax.synthesis.filters import Dropped, Row
from piccolo_jax.synthesis.phases import Plan


def open_folder(output: Path, settings: dict[str, Any]) -> Path:
    """OUTPUT/answers, new or begun with the same settings. Raises UserError for another folder."""
    folder = output / "answers"
    path = folder / "settings.json"
    if not path.exists():
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise UserError(f"--output={output}: exists and is no synthesis; name another")
        folder.mkdir(parents=True)
        _replace(path, [json.dumps(settings, ensure_ascii=False, indent=2)])
        return folder
    try:
        begun = json.loads(path.read_bytes())
        differing = [name for name in settings if begun.get(name) != settings[name]]
    except (ValueError, AttributeError):
        raise UserError(f"{path}: broken; put it right or name another --output") from None
    if differing:
        name = differing[0]
        raise UserError(
            f"{output} was begun with {name} = {begun.get(name)!r}, not {settings[name]!r}: its"
            " requests would be others; name another --output"
        )
    return folder


def settings_of(plan: Plan, model: str, templates: str) -> dict[str, Any]:
    """What prompts follow from, and so must not change between runs.

    `templates` is their fingerprint.
    """
    topics = hashlib.sha256("\n".join(plan.topics).encode()).hexdigest()[:16]
    return {
        "version": 1, "model": model, "seed": plan.seed, "languages": list(plan.languages),
        "templates": templates,
        "examples_per_topic": plan.per_topic, "topics_per_request": plan.topics_per_request,
        "topics": topics if plan.topics else "",
    }  # fmt: skip


def write(
    output: Path, kept: Sequence[Row], dropped: Sequence[Dropped], made: dict[str, Any]
) -> None:
    """Writes everything anew, each file whole or not at all."""
    reasons = (
        {"number": item.row.number, "rule": item.rule, "reason": item.reason, **_columns(item.row)}
        for item in dropped
    )
    _replace(output / "answers" / "dropped.jsonl", map(_line, reasons))
    _replace(output / "report.json", [json.dumps(made, ensure_ascii=False, indent=2)])
    _replace(output / "report.md", [report.markdown(made).rstrip("\n")])
    _replace(output / "train.jsonl", map(_line, map(_columns, kept)))


def _columns(row: Row) -> dict[str, Any]:
    return {
        "text": row.query, "text_pos": row.positive, "text_neg": [row.negative],
        "type": "retri_contrast",
    }  # fmt: skip


def _replace(path: Path, lines: Iterable[str]) -> None:
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in lines)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _line(values: dict[str, Any]) -> str:
    return json.dumps(values, ensure_ascii=False)
