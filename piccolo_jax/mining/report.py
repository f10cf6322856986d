"""What mining found, in numbers and pictures."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from piccolo_jax import metrics
from piccolo_jax.mining.rules import KEPT, RULES, Limits, Mined

_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_MOST_LISTED = 1000
_TABLE_RANKS = 12


def numbers(mined: Mined, limits: Limits, about: dict[str, Any]) -> dict[str, Any]:
    """The report: what was asked for, scores by rank, what each rule removed, short queries."""
    scores, window = mined.neighbours.scores, mined.window
    drawn = np.asarray([len(places) for places in mined.drawn])
    chosen = [scores[i, places] for i, places in enumerate(mined.drawn)]
    flat = np.concatenate([np.zeros(0, np.float32), *chosen])
    return about | {
        "ranks": [window.first, window.last],
        "count": window.count,
        "limits": dataclasses.asdict(limits),
        "queries": len(drawn),
        "candidates": int(mined.reasons.size),
        "removed": {
            rule: int((mined.reasons == number).sum()) for number, rule in enumerate(RULES)
        },
        "kept": int((mined.reasons == KEPT).sum()),
        "negatives": int(drawn.sum()),
        "mean_negative_score": round(float(flat.mean()), 6) if len(flat) else None,
        "queries_with_too_few": len(mined.short),
        "queries_with_none": int((drawn == 0).sum()),
        "first_queries_with_too_few": [
            {"query": int(i), "negatives": int(drawn[i])} for i in mined.short[:_MOST_LISTED]
        ],
        "score_by_rank": _by_rank(mined),
    }


def _by_rank(mined: Mined) -> list[dict[str, Any]]:
    quantiles = np.quantile(mined.neighbours.scores, _QUANTILES, axis=0).T
    kept = (mined.reasons == KEPT).mean(axis=0)
    return [
        {"rank": mined.window.first + place, "kept": round(float(kept[place]), 6)}
        | {f"{q:.0%}": round(float(x), 6) for q, x in zip(_QUANTILES, scores, strict=True)}
        for place, scores in enumerate(quantiles)
    ]


def text(report: dict[str, Any]) -> str:
    """The tables of a report, for a terminal."""
    total = report["candidates"]
    rows = [[rule, n, f"{n / total:.2%}"] for rule, n in report["removed"].items() if n]
    rows.append(["kept", report["kept"], f"{report['kept'] / total:.2%}"])
    by_rank = report["score_by_rank"]
    step = max(len(by_rank) // _TABLE_RANKS, 1)
    ranks = [
        [row["rank"], *(f"{row[f'{q:.0%}']:.4f}" for q in _QUANTILES), f"{row['kept']:.1%}"]
        for row in by_rank[::step]
    ]
    quantiles = [f"score {q:.0%}" for q in _QUANTILES]
    parts = [
        metrics.table(("candidates", "number", "share"), rows),
        metrics.table(("rank", *quantiles, "kept"), ranks),
        f"{report['queries']} queries, {report['negatives']} negatives",
    ]
    if few := report["queries_with_too_few"]:
        parts.append(
            f"{few} queries have fewer than {report['count']} negatives left in ranks"
            f" {report['ranks'][0]} to {report['ranks'][1]}, {report['queries_with_none']} of them"
            " none: widen --ranks, lower --count or loosen the limits if that is too many"
        )
    return "\n\n".join(parts)


def write(folder: Path, report: dict[str, Any]) -> None:
    """report.json and the plots score_by_rank.png and removed.png."""
    folder.mkdir()
    content = json.dumps(report, ensure_ascii=False, indent=1)
    (folder / "report.json").write_text(content, encoding="utf-8")
    import matplotlib.figure  # slow to import, and only needed here

    def save(figure: Any, name: str) -> None:
        figure.savefig(folder / name, format="png", dpi=120)

    save(_score_by_rank(matplotlib.figure.Figure((7, 4), layout="constrained"), report),
         "score_by_rank.png")  # fmt: skip
    save(_removed(matplotlib.figure.Figure((7, 4), layout="constrained"), report), "removed.png")


def _score_by_rank(figure: Any, report: dict[str, Any]) -> Any:
    axes = figure.subplots()
    rows = report["score_by_rank"]
    ranks = [row["rank"] for row in rows]
    lines = {q: [row[f"{q:.0%}"] for row in rows] for q in _QUANTILES}
    axes.fill_between(ranks, lines[0.05], lines[0.95], alpha=0.2, label="5% to 95% of queries")
    axes.fill_between(ranks, lines[0.25], lines[0.75], alpha=0.3, label="25% to 75%")
    axes.plot(ranks, lines[0.5], marker="." if len(ranks) < 60 else "", label="median")
    axes.set(xlabel="rank", ylabel="cosine with the query", title="Score by rank")
    axes.legend()
    return figure


def _removed(figure: Any, report: dict[str, Any]) -> Any:
    axes = figure.subplots()
    shares = {rule: n / report["candidates"] for rule, n in report["removed"].items()}
    shares["kept"] = report["kept"] / report["candidates"]
    bars = axes.barh(list(shares), [100 * share for share in shares.values()])
    axes.bar_label(bars, [f"{100 * share:.2f} %" for share in shares.values()], padding=3)
    axes.invert_yaxis()
    axes.set(xlabel="% of candidates", title="Removed by each rule", xlim=(0, 115))
    return figure
