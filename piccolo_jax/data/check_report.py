"""What `check` found, as text for a terminal and as a picture."""

import math
import os
import uuid
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from piccolo_jax.data.check import Checked, Side
from piccolo_jax.data.loader import Plan

_BARS, _BAR_WIDTH = 16, 40
_LISTED_ROWS, _LISTED_LABELS, _LISTED_SCORES = 50, 20, 12
_SHOWN_CHARACTERS = 60


def lines_of(checked: Checked) -> list[str]:
    """Everything about one dataset but its batches."""
    c, rejected = checked, checked.collected.rejected
    same = c.tokenised - len(c.lengths)
    speed = c.num_texts / max(c.seconds, 1e-9)
    return [
        f"== {c.name}: {c.path}",
        f"task       {c.task}",
        f"rows       {c.num_rows:,} usable, {rejected.count:,} rejected",
        f"texts      {c.num_texts:,}, of which {len(c.lengths):,} unique"
        + (f" ({same:,} more differ in characters, not in tokens)" if same else ""),
        f"speed      {speed:,.0f} texts per second, {c.tokenised:,} tokenised in {c.seconds:.1f} s",
        "",
        *_sides(c.sides),
        "",
        "tokens of the unique texts",
        *_histogram(c.lengths),
        "",
        *_problems(c),
        *_labels(c),
        *_scores(c),
        *_rejected(c),
    ]


def batch_line(plan: Plan, rows: int, shards: int) -> str:
    """What a batch would look like."""
    s = plan.shape
    return (
        f"batch      {rows:,} rows of data: {s.rows:,} packed rows x {s.length} tokens and"
        f" {s.texts:,} texts on each of {shards} device{'s' * (shards != 1)},"
        f" {plan.fill:.1%} filled"
    )


def save_histograms(path: Path, checked: Sequence[Checked]) -> None:
    """Writes a PNG with the token lengths of each dataset's sides. Raises OSError."""
    from matplotlib.figure import Figure  # takes a second, which only this needs

    columns = min(len(checked), 3)
    rows = math.ceil(len(checked) / columns)
    figure = Figure(figsize=(5 * columns, 3.2 * rows), layout="constrained")
    axes = np.ravel(figure.subplots(rows, columns, squeeze=False))
    for axis in axes[len(checked) :]:
        axis.set_axis_off()
    for axis, one in zip(axes, checked, strict=False):
        edges = _edges(one.lengths, 40)
        for side in one.sides:
            if side.lengths.size:
                label = f"{side.name} (cut: {_share(side.cut, side.texts)})"
                axis.hist(side.lengths, edges, histtype="step", label=label)
                axis.axvline(side.limit, color="grey", linewidth=0.5, linestyle=":")
        axis.set(title=f"{one.name} ({one.task})", xlabel="tokens", ylabel="unique texts",
                 xlim=(0, edges[-1]))  # fmt: skip
        axis.legend(fontsize="small")
    partial = path.with_name(f"{path.name}.partial-{uuid.uuid4().hex[:8]}")
    try:
        figure.savefig(partial, format="png", dpi=120)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _sides(sides: Sequence[Side]) -> list[str]:
    lines = [f"{'side':14}{'texts':>12}{'unique':>12}{'mean':>8}{'95 %':>7}{'longest':>9}"
             f"{'limit':>7}{'truncated':>22}"]  # fmt: skip
    for side in sides:
        n = side.lengths
        tokens = (
            f"{n.mean():8.1f}{np.percentile(n, 95):7.0f}{n.max():9}" if n.size else f"{'-':>24}"
        )
        cut = f"{side.cut:,} ({_share(side.cut, side.texts)})"
        lines.append(f"{side.name:14}{side.texts:12,}{n.size:12,}{tokens}{side.limit:7}{cut:>22}")
    return lines


def _edges(lengths: np.ndarray, bins: int) -> np.ndarray:
    """Edges of equally wide bins of whole tokens, from 0 to above the longest."""
    width = max(math.ceil((int(lengths.max()) + 1) / bins), 1)
    return np.arange(0, int(lengths.max()) + width + 1, width)


def _histogram(lengths: np.ndarray) -> list[str]:
    edges = _edges(lengths, _BARS)
    counts, _ = np.histogram(lengths, edges)
    lines = []
    for low, high, count in zip(edges, edges[1:], counts, strict=False):
        bar = "█" * math.ceil(_BAR_WIDTH * count / counts.max())
        lines.append(f"{low:6}-{high - 1:<5} {bar:{_BAR_WIDTH}} {count:,}")
    return lines


def _problems(checked: Checked) -> list[str]:
    lines = []
    for problem in checked.problems:
        shown = ", ".join(map(_shown, problem.first))
        lines.append(f"{problem.count:10,}  {problem.what}" + (f": {shown}" if shown else ""))
    return ["duplicates and contradictions", *lines, ""]


def _labels(checked: Checked) -> list[str]:
    if checked.labels is None:
        return []
    counts = checked.label_counts.astype(np.float64)
    shares = counts / counts.sum()
    even = float(np.exp(-(shares * np.log(shares)).sum()))
    header = (
        f"labels     {len(counts):,}, from {counts.min():,.0f} to {counts.max():,.0f} rows"
        f" each (1 : {counts.max() / counts.min():,.1f}); as varied as {even:,.1f} even ones"
    )
    items = list(checked.labels.items())
    listed = items if len(items) <= _LISTED_LABELS else items[: _LISTED_LABELS - 3]
    lines = [f"{n:10,}  {n / counts.sum():6.1%}  {_shown(label)}" for label, n in listed]
    if len(listed) < len(items):
        lines.append(f"{'':10}  … {len(counts) - len(listed) - 3:,} more …")
        rarest = items[-3:]
        lines += [f"{n:10,}  {n / counts.sum():6.1%}  {_shown(label)}" for label, n in rarest]
    return [header, *lines, ""]


def _scores(checked: Checked) -> list[str]:
    if checked.scores is None:
        return []
    total = sum(checked.scores.values())
    mean = sum(score * n for score, n in checked.scores.items()) / total
    header = (
        f"scores     {len(checked.scores):,} different, from {min(checked.scores):g} to"
        f" {max(checked.scores):g}, mean {mean:.3g}"
    )
    listed = checked.scores.items() if len(checked.scores) <= _LISTED_SCORES else ()
    return [header, *(f"{n:10,}  {n / total:6.1%}  {score:g}" for score, n in listed), ""]


def _rejected(checked: Checked) -> list[str]:
    rejected = checked.collected.rejected
    if not rejected.count:
        return ["rejected   none"]
    lines = [f"rejected   {rejected.count:,} rows"]
    lines += [f"{n:10,}  {reason}" for reason, n in rejected.reasons.most_common(10)]
    lines += [f"  {row.place}: {row.reason}" for row in rejected.first[:_LISTED_ROWS]]
    if rejected.count > _LISTED_ROWS:
        lines.append(f"  … {rejected.count - _LISTED_ROWS:,} more")
    return lines


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "-"


def _shown(text: str) -> str:
    line = " ".join(text.split())
    return f"“{line if len(line) <= _SHOWN_CHARACTERS else line[:_SHOWN_CHARACTERS] + '…'}”"
