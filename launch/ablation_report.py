"""Figures of the ablation with their intervals: results.json, table.md, ablation.png.

Two kinds of 95 % intervals, which hold different things fixed: over seeds, by Student's t on
(differences of) runs of the same seed; over test examples, by a bootstrap that draws the same
examples for both models and holds the seeds fixed.
"""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats
from ablation_scores import CATEGORIES, METRICS, TESTS, Scores, metric

RESAMPLES = 1000
# Of CMTEB's 35 datasets, arXiv 2405.06932, in the order of CATEGORIES, and the mean of all.
PUBLISHED = {
    "infonce": (72.85, 54.72, 86.14, 69.71, 74.05, 61.88, 68.75),
    "cosent": (73.10, 53.39, 90.02, 69.08, 74.25, 63.35, 69.87),
    "labels": (74.59, 62.17, 90.24, 70.00, 74.36, 63.50, 70.95),
}
# Arms beside the ablation's order, and that which each is a change of.
BESIDE = {"counted": "infonce", "heavy": "cosent"}
_COLUMNS = (*CATEGORIES, "mean")


def by_category(scores: Scores, dim: int, rows: dict[str, np.ndarray] | None = None) -> np.ndarray:
    """[categories + 1]: mean over the tests of each category, and the mean of the categories.

    `rows`: of each test those that count; default: all.
    """
    found: dict[str, list[float]] = {category: [] for category in CATEGORIES}
    for name, (category, _) in TESTS.items():
        gold, values = scores[f"{name}|gold"], scores[f"{name}|{dim}"]
        if rows is not None:
            gold, values = gold[rows[name]], values[rows[name]]
        found[category].append(metric(category, gold, values))
    means = [float(np.mean(found[category])) for category in CATEGORIES]
    return np.asarray([*means, np.mean(means)])


def means(scores: Scores) -> str:
    """One line of a model's figures at its full width."""
    values = by_category(scores, dims_of(scores)[-1])
    return ", ".join(f"{c} {v:.2f}" for c, v in zip(_COLUMNS, values, strict=True))


def dims_of(scores: Scores) -> list[int]:
    """The dimensions that a model was evaluated at."""
    names = {key.split("|")[1] for key in scores} - {"gold"}
    return sorted(map(int, names))


def write(
    output: Path, arms: Sequence[str], separate: Sequence[int], dims: Sequence[int], seeds: int
) -> None:
    """Writes results.json, table.md and ablation.png from the scores in `output`."""
    names = [*arms, *(f"alone-{dim}" for dim in separate)]
    runs = {
        name: [dict(np.load(output / "scores" / f"{name}-{s}.npz")) for s in range(seeds)]
        for name in names
    }
    start = dict(np.load(output / "scores" / "start.npz"))
    width = dims[-1]
    order = [arm for arm in arms if arm not in BESIDE]
    pairs = [(b, a, width) for a, b in itertools.pairwise(order)]
    if len(order) > 2:
        pairs.append((order[-1], order[0], width))
    pairs += [(arm, BESIDE[arm], width) for arm in arms if BESIDE.get(arm) in arms]
    if "labels" in arms:
        pairs += [("labels", f"alone-{dim}", dim) for dim in separate if dim in dims]
    compared = {(name, dim) for a, b, dim in pairs for name in (a, b)}
    resampled = {(name, dim): _resampled(runs[name], dim) for name, dim in sorted(compared)}
    results: dict[str, Any] = {
        "settings": json.loads((output / "settings.json").read_text(encoding="utf-8")),
        "seeds": seeds,
        "metrics": METRICS,
        "tests": {name: category for name, (category, _) in TESTS.items()},
        "before_training": _rounded(by_category(start, dims_of(start)[-1])),
        "models": {
            name: {
                str(dim): _over_seeds([by_category(s, dim) for s in of]) for dim in dims_of(of[0])
            }
            for name, of in runs.items()
        },
        "per_test": {
            name: {str(dim): _per_test(of, dim) for dim in dims_of(of[0])}
            for name, of in runs.items()
        },
        "differences": [
            {
                "of": a,
                "minus": b,
                "dim": dim,
                **_difference(runs[a], runs[b], dim, (resampled[a, dim], resampled[b, dim])),
            }
            for a, b, dim in pairs
        ],
        "published": {name: dict(zip(_COLUMNS, v, strict=True)) for name, v in PUBLISHED.items()},
    }
    text = json.dumps(results, indent=1) + "\n"
    (output / "results.json").write_text(text, encoding="utf-8")
    (output / "table.md").write_text(table(results), encoding="utf-8")
    figure(output / "ablation.png", results)


def _rounded(values: np.ndarray) -> dict[str, float]:
    return {c: round(float(v), 3) for c, v in zip(_COLUMNS, values, strict=True)}


def _per_test(of: list[Scores], dim: int) -> dict[str, list[float]]:
    """The figure of each seed."""
    return {
        name: [round(metric(c, s[f"{name}|gold"], s[f"{name}|{dim}"]), 3) for s in of]
        for name, (c, _) in TESTS.items()
    }


def _over_seeds(values: list[np.ndarray]) -> dict[str, Any]:
    """Mean, and half the width of the 95 % interval of Student's t (NaN of one seed: null)."""
    stacked = np.stack(values)
    half = None
    if len(values) > 1:
        t = scipy.stats.t.ppf(0.975, len(values) - 1)
        half = _rounded(t * stacked.std(axis=0, ddof=1) / len(values) ** 0.5)
    return {"mean": _rounded(stacked.mean(axis=0)), "half": half}


def _resampled(of: list[Scores], dim: int) -> np.ndarray:
    """[resamples, categories + 1]: means over seeds, of the same resampled rows for all models."""
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(RESAMPLES):
        sizes = {name: len(of[0][f"{name}|gold"]) for name in TESTS}
        rows = {name: rng.integers(0, size, size) for name, size in sizes.items()}
        drawn.append(np.mean([by_category(scores, dim, rows) for scores in of], axis=0))
    return np.stack(drawn)


def _difference(
    of: list[Scores], minus: list[Scores], dim: int, resampled: tuple[np.ndarray, np.ndarray]
) -> dict[str, Any]:
    """Of runs of the same seed at one dimension, with both intervals."""
    paired = [by_category(a, dim) - by_category(b, dim) for a, b in zip(of, minus, strict=True)]
    low, high = np.percentile(resampled[0] - resampled[1], [2.5, 97.5], axis=0)
    return {**_over_seeds(paired), "examples_low": _rounded(low), "examples_high": _rounded(high)}


def table(results: dict[str, Any]) -> str:
    """The results in Markdown."""
    seeds = results["seeds"]

    def line(*cells: str) -> str:
        return "| " + " | ".join(cells) + " |"

    head = [line("model", "dim", *_COLUMNS), line(*["---"] * (len(_COLUMNS) + 2))]
    start = results["before_training"]
    rows = [line("before training", "all", *(f"{start[c]:.2f}" for c in _COLUMNS))]
    for name, by_dim in results["models"].items():
        for dim, value in by_dim.items():
            half = value["half"]
            cells = [
                f"{value['mean'][c]:.2f}" + (f" ± {half[c]:.2f}" if half else "") for c in _COLUMNS
            ]
            rows.append(line(name, dim, *cells))
    differences = [
        line("difference", "dim", "interval over", *_COLUMNS),
        line(*["---"] * (len(_COLUMNS) + 3)),
    ]
    for d in results["differences"]:
        name = f"{d['of']} − {d['minus']}"
        half = d["half"]
        over_seeds = [
            f"{d['mean'][c]:+.2f}" + (f" ± {half[c]:.2f}" if half else "") for c in _COLUMNS
        ]
        over_examples = [
            f"{d['examples_low'][c]:+.2f} to {d['examples_high'][c]:+.2f}" for c in _COLUMNS
        ]
        differences.append(line(name, str(d["dim"]), "seeds", *over_seeds))
        differences.append(line("", "", "examples", *over_examples))
    return "\n".join([
        f"Percent, mean over {seeds} seeds ± half of the 95 % interval (Student's t).", "",
        *head, *rows, "",
        f"Differences of runs of the same seed: 95 % over seeds (Student's t, {seeds} seeds), and"
        f" over test examples (bootstrap, {RESAMPLES} paired resamples).", "",
        *differences, "",
    ])  # fmt: skip


def figure(path: Path, results: dict[str, Any]) -> None:
    """Left: gains on the first arm by category, beside the published. Right: score by dimension."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    arms = [name for name in results["models"] if not name.startswith("alone-")]
    places = np.arange(len(_COLUMNS))
    full = max(map(int, results["models"][arms[0]]))
    first = results["models"][arms[0]][str(full)]["mean"]
    apart = 0.75 / max(len(arms) - 1, 1)
    for i, name in enumerate(arms[1:]):
        value = results["models"][name][str(full)]["mean"]
        gained = [value[c] - first[c] for c in _COLUMNS]
        left.bar(places + apart * i, gained, 0.88 * apart, label=name)
        if name in PUBLISHED and arms[0] in PUBLISHED:
            gains = np.asarray(PUBLISHED[name]) - PUBLISHED[arms[0]]
            label = None if i else "published (CMTEB)"
            left.plot(places + apart * i, gains, "k_", markersize=14, label=label)
    left.axhline(0, color="black", linewidth=0.8)
    left.set_xticks(places + 0.375 - apart / 2, _COLUMNS)
    left.set_ylabel(f"points above {arms[0]}, at {full} dimensions")
    left.legend()
    for name, by_dim in results["models"].items():
        dims = [int(dim) for dim in by_dim]
        middle = [v["mean"]["mean"] for v in by_dim.values()]
        error = [v["half"]["mean"] if v["half"] else 0 for v in by_dim.values()]
        style = "s" if name.startswith("alone-") else "o-"
        right.errorbar(dims, middle, yerr=error, fmt=style, capsize=3, label=name)
    right.axhline(results["before_training"]["mean"], color="grey", linestyle=":", label="before")
    right.set_xlabel("dimensions")
    right.set_ylabel("mean of the categories, %")
    right.legend()
    fig.savefig(path, dpi=120)
    plt.close(fig)
