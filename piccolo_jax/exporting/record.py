"""What a run noted of itself, for its model card: nothing else is known there."""

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from piccolo_jax import config as config_lib
from piccolo_jax import metrics
from piccolo_jax.config import Config
from piccolo_jax.data import formats
from piccolo_jax.data.prepare import name_of
from piccolo_jax.errors import UserError
from piccolo_jax.models.modules import UNREADABLE

_PREFIX = re.compile(r"embed_dim_(\d+)")


@dataclasses.dataclass(frozen=True)
class Score:
    """mteb's main score of a task; `dim` None: at full width."""

    task: str
    kind: str  # of task, as Retrieval; empty: mteb doesn't know the task
    dataset: str
    metric: str
    subset: str
    split: str
    revision: str
    dim: int | None
    value: float


@dataclasses.dataclass(frozen=True)
class Record:
    """What is known of a run up to `step`. What it didn't note is empty."""

    config: Config
    step: int | None = None
    weights: str = "last"  # or "average": over the steps
    name: str = ""  # of the model
    license: str = ""  # of the model
    licenses: dict[str, str] = dataclasses.field(default_factory=dict)  # by dataset, as given
    steps: tuple[dict[str, Any], ...] = ()  # of metrics.jsonl
    evaluations: tuple[dict[str, Any], ...] = ()  # of eval.jsonl
    scores: tuple[Score, ...] = ()

    def noted(self, field: str) -> list[Any]:
        """The values of a field of metrics.jsonl, where lines have it."""
        return [row[field] for row in self.steps if field in row]


def read_record(
    workdir: Path, config: Config, step: int, weights: str = "last", results: Path | None = None
) -> Record:
    """That of a run's checkpoint at `step`, of its "last" weights or their "average".

    `results`: a folder of mteb's, of these weights.

    Raises UserError if `results` holds none, or those of several models.
    """
    logs = [
        tuple(row for row in metrics.read(workdir / name) if row.get("step", step + 1) <= step)
        for name in ("metrics.jsonl", "eval.jsonl")
    ]
    scores = tuple(read_scores(results)) if results else ()
    path = workdir / "config.json"  # of the latest start: licences may be given later
    given = config_lib.from_json(path.read_text("utf-8"), str(path)) if path.exists() else config
    return Record(
        config,
        step,
        weights,
        licenses=_licenses(given),
        steps=logs[0],
        evaluations=tuple(row for row in logs[1] if row.get("weights", "last") == weights),
        scores=scores,
    )


def read_scores(folder: Path) -> Iterator[Score]:
    """Main scores of mteb's result files below a folder: [ORG__NAME/][REVISION/]TASK.json.

    Those of a prefix lie in experiments/embed_dim_256, as mteb has it; other experiments, as
    experiments/limit_8 of a quick look, are not scores of the model. Raises UserError.
    """
    files = [
        path
        for path in sorted(folder.resolve().rglob("*.json"))
        if path.name != "model_meta.json"
        and (path.parent.parent.name != "experiments" or _PREFIX.fullmatch(path.parent.name))
    ]
    results = [(path, values) for path in files if "task_name" in (values := _read_json(path))]
    if not results:
        raise UserError(f"--results={folder}: holds no results of mteb (TASK.json)")
    models = {re.sub(r"/experiments/[^/]*$", "", str(path.parent)) for path, _ in results}
    if len(models) > 1:
        raise UserError(
            f"--results={folder}: holds results of several models or revisions"
            f" ({', '.join(sorted(models)[:3])}); give one of these folders"
        )
    for path, values in results:
        found = _PREFIX.fullmatch(path.parent.name)
        dim = int(found[1]) if found else None
        known = _task(values["task_name"])
        try:
            for split, subsets in values["scores"].items():
                for scores in subsets:
                    yield Score(
                        values["task_name"], known["kind"], known["dataset"], known["metric"],
                        scores.get("hf_subset", "default"), split,
                        values.get("dataset_revision") or "", dim, float(scores["main_score"]),
                    )  # fmt: skip
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{path}: not a result of mteb ({error!r})") from error


def _task(name: str) -> dict[str, str]:
    """What mteb knows of a task; of one that it doesn't know, its name alone."""
    try:
        import mteb
    except ImportError as error:
        raise UserError(
            f"--results needs the package mteb ({error}): pip install -r requirements-dev.txt"
        ) from error
    try:
        about = mteb.get_task(name).metadata
    except KeyError:
        return {"kind": "", "dataset": name, "metric": "main_score"}
    return {"kind": about.type, "dataset": about.dataset["path"], "metric": about.main_score}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except UNREADABLE as error:
        raise UserError(f"{path}: not readable as JSON: {error}") from error
    return values if isinstance(values, dict) else {}


def _licenses(config: Config) -> dict[str, str]:
    """Licences by name of dataset; of a meta list, those of all its datasets are the list's."""
    found: dict[str, set[str]] = {}
    for dataset in config.data.datasets:
        if dataset.license:
            try:
                listed = formats.expand_meta_list(dataset.path)
            except UserError:  # it may be gone by now
                listed = None
            for path, _ in listed if listed is not None else [(dataset.path, 1.0)]:
                found.setdefault(name_of(path), set()).add(dataset.license)
    return {name: ", ".join(sorted(licenses)) for name, licenses in found.items()}
