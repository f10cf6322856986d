"""Fewer coordinates with the same cosines, where embeddings do not use all of theirs.

A scaling layer from h to D dimensions gives vectors that lie in h + 1 of the D: an orthonormal
basis of that subspace keeps every inner product, and a search there does (h + 1) / D of the work.
"""

import dataclasses

import numpy as np

from piccolo_jax.evaluation.encoder import cut

_LEAST_WIDTH = 256  # below that there is little to gain
_SHARES = (0.25, 0.5, 0.8)  # of the width, in sampled rows: more coordinates than that are no gain
_NOISE = 1e-11  # part of the largest energy in the sample below which a direction is rounding
_PROBES = 8  # random directions outside of the subspace: one in 10^9 of what is there escapes them
# What a unit vector may have along them: about the rounding of the product. A part outside of
# length 10 times that would be seen; a score loses at most the product of two such lengths.
_MOST_OUTSIDE = 2e-5


class NotSpannedError(Exception):
    """A vector has a part outside of the subspace."""


@dataclasses.dataclass(frozen=True)
class Basis:
    """columns: float32 [dim, r], orthonormal; probes: [dim, 8], what is orthogonal to them."""

    columns: np.ndarray
    probes: np.ndarray


def find_basis(corpus: np.ndarray, dim: int, num_queries: int) -> Basis | None:
    """A basis of what the rows' prefixes of `dim` span, as it seems.

    None if they need more than about 0.7 `dim` columns, or if a search for so few queries would not
    repay the change of coordinates. Looks at rows at equal distances only; project() finds out
    whether others lie elsewhere.
    """
    if dim < _LEAST_WIDTH or min(len(corpus), num_queries) < 2 * dim:
        return None
    for share in _SHARES:
        rows = np.linspace(0, len(corpus) - 1, int(share * dim)).astype(np.int64)
        sample = cut(np.asarray(corpus[rows]), dim).astype(np.float64)
        products = sample @ sample.T
        if not np.isfinite(products).all():
            return None
        if _independent(products):
            continue
        energies, vectors = np.linalg.eigh(products)
        used = energies > _NOISE * energies[-1]
        if used.sum() < 0.9 * len(rows):
            columns, _ = np.linalg.qr(sample.T @ (vectors[:, used] / np.sqrt(energies[used])))
            random = np.random.default_rng(0).normal(size=(dim, _PROBES))
            probes = random - columns @ (columns.T @ random)
            return Basis(columns.astype(np.float32), probes.astype(np.float32))
    return None


def project(rows: np.ndarray, basis: Basis | None) -> np.ndarray:
    """Coordinates, float32 [n, r], of unit vectors (or 0) [n, dim] in a basis; None: unchanged.

    Raises NotSpannedError.
    """
    if basis is None:
        return rows
    if np.abs(rows @ basis.probes).max(initial=0) > _MOST_OUTSIDE:
        raise NotSpannedError
    return rows @ basis.columns


def _independent(products: np.ndarray) -> bool:
    """Whether vectors with these inner products are so, each by more than rounding."""
    try:
        pivots = np.diag(np.linalg.cholesky(products))
    except np.linalg.LinAlgError:
        return False
    return bool(pivots.min() ** 2 > 1e-9)
