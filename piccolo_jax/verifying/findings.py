"""What verifying an export finds: a line for each thing that was compared."""

from typing import NamedTuple

import numpy as np

# Relative difference of states and vectors; float32 in two libraries is 10 to 100 times nearer.
TOLERANCE = 1e-4


class Finding(NamedTuple):
    """One comparison. `part` is what differs if it isn't `same`; `what` says how."""

    part: str
    what: str
    same: bool


def compare(part: str, what: str, ours: np.ndarray, theirs: np.ndarray) -> Finding:
    """Of vectors [N, D], by the largest relative difference of a row."""
    if ours.shape != theirs.shape:
        return Finding(part, f"{what}: {theirs.shape[-1]} wide, not {ours.shape[-1]}", False)
    difference = largest_distance(ours, theirs)
    return Finding(part, f"{what}: differ by {difference:.1e}", difference <= TOLERANCE)


def largest_distance(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest |ours - theirs| / |ours| of corresponding rows; inf if one is not finite."""
    ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
    lengths = np.maximum(np.linalg.norm(ours, axis=-1), 1e-12)
    with np.errstate(invalid="ignore"):
        distance = np.linalg.norm(ours - theirs, axis=-1) / lengths
    return float(np.max(np.where(np.isfinite(distance), distance, np.inf)))


def cut(embeddings: np.ndarray, dim: int) -> np.ndarray:
    """The prefix of `dim` coordinates, then normalised to length 1 (0 stays 0)."""
    prefix = embeddings[:, :dim].astype(np.float64)
    return prefix / np.maximum(np.linalg.norm(prefix, axis=1, keepdims=True), 1e-12)


def largest_difference(x: np.ndarray, y: np.ndarray, dim: int) -> float:
    """The largest 1 - cosine of corresponding rows, cut to `dim`; inf if one is not finite."""
    with np.errstate(invalid="ignore"):
        difference = 1 - (cut(x, dim) * cut(y, dim)).sum(axis=1)
    return float(np.max(np.where(np.isfinite(difference), difference, np.inf)))


def padded(rows: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Rows of different lengths as one array, 0 behind them, and its mask, int64 [N, length]."""
    length = max(map(len, rows))
    out = np.zeros((len(rows), length, *rows[0].shape[1:]), rows[0].dtype)
    mask = np.zeros((len(rows), length), np.int64)
    for i, row in enumerate(rows):
        out[i, : len(row)], mask[i, : len(row)] = row, 1
    return out, mask
