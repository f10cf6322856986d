"""What an evaluation found: tables, means by the two conventions, report.json and report.png.

Of mteb it needs nothing: results are those of `run.evaluate`.
"""

import json
import math
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from piccolo_jax import metrics
from piccolo_jax.errors import UserError
from piccolo_jax.evaluation.benchmarks import (
    ALSO_2024,
    CATEGORIES,
    CONVENTIONS,
    PUBLISHED_CATEGORIES,
    PUBLISHED_MEAN,
    PUBLISHED_NAME,
    Convention,
)
from piccolo_jax.models.modules import UNREADABLE

FILE = "report.json"
_SCHEMA = 1
_PAIR_SCORES = {"max_accuracy": "max accuracy", "cosine_ap": "average precision"}
_OF_TASK = ("type", "metric", "revision", "splits", "subsets")  # beside its scores
_MOST_NAMED = 40
# Fonts for names of models in Chinese, of which a machine may have some.
_CHINESE = (
    "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Source Han Sans SC",
    "WenQuanYi Zen Hei", "WenQuanYi Micro Hei", "PingFang SC", "Microsoft YaHei", "SimHei",
)  # fmt: skip

Entry = dict[str, Any]  # one model's: model, revision, experiment, dims, tasks


def score(task: Mapping[str, Any], dim: int, pair_score: str = "max_accuracy") -> float:
    """A task's score at a dimension; of pair classification the one that is named."""
    scores = task["scores"][dim]
    is_pair = task["type"] == "PairClassification"
    return scores.get(pair_score, scores["main_score"]) if is_pair else scores["main_score"]


def missing(entry: Entry, convention: Convention) -> list[str]:
    """The tasks of a convention that an entry has not, with their subset where it matters."""
    names = []
    for name in convention.tasks:
        subset = ALSO_2024[name][1] if name in ALSO_2024 else ""
        task = entry["tasks"].get(name)
        if task is None or (subset and task["subsets"] != [subset]):
            names.append(f"{name}({subset})" if subset else name)
    return names


def summary(entry: Entry) -> dict[str, Any]:
    """Means by category and of all, with pairs by either score, and those of the conventions."""
    tasks = entry["tasks"]

    def mean(names: Iterable[str], pair_score: str) -> dict[int, float]:
        members = [tasks[name] for name in names]
        return {
            dim: float(np.mean([score(task, dim, pair_score) for task in members]))
            for dim in entry["dims"]
        }

    categories: dict[str, Any] = {}
    for kind in (*CATEGORIES, *sorted({t["type"] for t in tasks.values()} - set(CATEGORIES))):
        names = [name for name, task in tasks.items() if task["type"] == kind]
        scored = _PAIR_SCORES if kind == "PairClassification" else {"max_accuracy": ""}
        for pair_score, words in scored.items():
            label = (
                f"{CATEGORIES.get(kind, kind)} ({words})" if words else CATEGORIES.get(kind, kind)
            )
            if names:
                categories[label] = {"datasets": len(names), "mean": mean(names, pair_score)}
    conventions = {}
    for convention in CONVENTIONS:
        absent = missing(entry, convention)
        conventions[convention.name] = {
            "missing": absent,
            "mean": None if absent else mean(convention.tasks, convention.pair_score),
        }
    has_pairs = any(task["type"] == "PairClassification" for task in tasks.values())
    scored = _PAIR_SCORES if has_pairs else {"max_accuracy": ""}
    means = {words: mean(tasks, pair_score) for pair_score, words in scored.items()}
    return {"categories": categories, "means": means, "conventions": conventions}


def text(entry: Entry) -> str:
    """The tables of a report, in percent."""
    dims, tasks = entry["dims"], entry["tasks"]
    order = list(CATEGORIES)
    ranked = sorted(
        tasks.items(),
        key=lambda item: (
            order.index(item[1]["type"]) if item[1]["type"] in order else 99,
            item[0],
        ),
    )
    rows = [
        (f"{CATEGORIES.get(task['type'], task['type'])} {name}", task["metric"],
         *(_percent(score(task, dim)) for dim in dims))
        for name, task in ranked
    ]  # fmt: skip
    found = summary(entry)
    by_category = [
        (label, part["datasets"], *(_percent(part["mean"][dim]) for dim in dims))
        for label, part in found["categories"].items()
    ]
    count = len(tasks)
    by_category += [
        (f"mean of these {count}" + (f", pairs by {words}" if words else ""), count,
         *(_percent(mean[dim]) for dim in dims))
        for words, mean in found["means"].items()
    ]  # fmt: skip
    notes = []
    for name, part in found["conventions"].items():
        size = next(len(c.tasks) for c in CONVENTIONS if c.name == name)
        if part["mean"]:
            by_category.append((name, size, *(_percent(part["mean"][dim]) for dim in dims)))
        elif len(part["missing"]) == size:
            notes.append(f"{name}: no mean, none of its tasks is here")
        else:
            named = ", ".join(part["missing"][:_MOST_NAMED])
            notes.append(f"{name}: no mean, {len(part['missing'])} are missing: {named}")
    head = f"{label(entry)}, at most {entry['max_length']} tokens"
    parts = [
        head,
        metrics.table(("dataset", "metric", *dims), rows),
        metrics.table(("category", "datasets", *dims), by_category),
        *notes,
    ]
    return "\n\n".join(parts[:3]) + "".join(f"\n{note}" for note in parts[3:])


def label(entry: Entry) -> str:
    """How a model is called: its name, revision, and what else its results depend on."""
    experiment = "".join(f", {key} {value}" for key, value in entry["experiment"].items())
    return f"{entry['model']} ({entry['revision']}{experiment})"


def write(folder: Path, entry: Entry) -> None:
    """Puts an entry into FOLDER/report.json: in place of the model's old one, keeping its tasks.

    Tasks that were evaluated with fewer dimensions than now are dropped.
    """
    path = folder / FILE
    entries = read(path) if path.exists() else []
    same = [old for old in entries if label(old) == label(entry)]
    kept = {
        name: task
        for old in same
        for name, task in old["tasks"].items()
        if set(entry["dims"]) <= set(task["scores"])
    }
    merged = entry | {"tasks": kept | entry["tasks"]}
    merged["summary"] = summary(merged)
    content = {"schema": _SCHEMA, "models": [*(e for e in entries if e not in same), merged]}
    partial = path.with_name(f"{FILE}.partial")
    text = json.dumps(without_nan(content), ensure_ascii=False, indent=1, allow_nan=False)
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def read(path: Path) -> list[Entry]:
    """The entries of a report.json. Raises UserError if it can't be used."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["schema"] != _SCHEMA:
            raise ValueError(f"schema {content['schema']}, not {_SCHEMA}")
        for entry in content["models"]:
            for task in entry["tasks"].values():
                task["scores"] = {
                    int(dim): {k: math.nan if v is None else v for k, v in scores.items()}
                    for dim, scores in task["scores"].items()
                }
            _check_fields(entry)
        return list(content["models"])
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file; give the --output folder of an evaluation"
        ) from None
    except (*UNREADABLE, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: not a report of this program ({error!r}); delete it and evaluate again, which"
            " reads the results that are there"
        ) from None


def _check_fields(entry: Entry) -> None:
    """Raises KeyError if one is missing that is read later."""
    needed = [label(entry), *(entry["folders"][str(dim)] for dim in entry["dims"])]
    for task in entry["tasks"].values():
        needed += [task["scores"][dim]["main_score"] for dim in entry["dims"]]
        needed += [task[field] for field in _OF_TASK]


def without_nan(value: Any) -> Any:
    """With null for what is no number in JSON, such as a correlation with a constant."""
    if isinstance(value, dict):
        return {key: without_nan(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def figure(path: Path, entries: Sequence[Entry], published: bool) -> None:
    """A PNG of quality against dimension: a panel for the mean and one per category."""
    import matplotlib.font_manager  # slow to import, and only needed here

    chinese = [name for name in _CHINESE if name in matplotlib.font_manager.get_font_names()]
    fonts: Any = {"font.family": ["DejaVu Sans", *chinese]}
    partial = path.with_name(f"{path.name}.partial")
    with matplotlib.rc_context(fonts), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of signs that no font here has
        _draw(entries, published).savefig(partial, format="png", dpi=120)
    os.replace(partial, path)


def _draw(entries: Sequence[Entry], published: bool) -> Any:
    import matplotlib.figure

    panels: dict[str, list[tuple[str, dict[int, float], str]]] = {}
    for entry in entries:
        found = summary(entry)
        # The published mean takes pairs by average precision.
        words = _PAIR_SCORES["cosine_ap" if published else "max_accuracy"]
        mean = found["means"].get(words) or next(iter(found["means"].values()))
        of_panels = {"mean": mean} | {n: p["mean"] for n, p in found["categories"].items()}
        for name, curve in of_panels.items():
            panels.setdefault(name, []).append((label(entry), curve, "o-"))
    if published:
        full = max(PUBLISHED_MEAN)
        by_label = {CATEGORIES[kind]: {full: x} for kind, x in PUBLISHED_CATEGORIES.items()}
        curves = {"mean": PUBLISHED_MEAN} | {
            f"{name} (average precision)" if name == "Pair" else name: curve
            for name, curve in by_label.items()
        }
        for name in panels:
            if name in curves:
                curve = {dim: value / 100 for dim, value in curves[name].items()}
                panels[name].append((f"{PUBLISHED_NAME}, 35 tasks", curve, "s--"))
    columns = min(len(panels), 4)
    rows = math.ceil(len(panels) / columns)
    made = matplotlib.figure.Figure((3.4 * columns, 2.8 * rows + 0.6), layout="constrained")
    axes = made.subplots(rows, columns, squeeze=False).ravel()
    for place, (name, lines) in zip(axes, panels.items(), strict=False):
        for words, curve, style in lines:
            dims = sorted(curve)
            place.plot(dims, [100 * curve[dim] for dim in dims], style, label=words, markersize=4)
        place.set(title=name, xlabel="dimensions", xscale="log")
        ticks = sorted({dim for _, curve, _ in lines for dim in curve})
        place.set_xticks(ticks, [str(dim) for dim in ticks], rotation=45, fontsize=7)
        place.minorticks_off()
        place.grid(alpha=0.3)
    for place in axes[len(panels) :]:
        place.set_visible(False)
    handles, names = axes[0].get_legend_handles_labels()
    made.legend(handles, names, loc="outside lower center", fontsize=8)
    return made


def _percent(value: float) -> str:
    return f"{100 * value:.2f}"
