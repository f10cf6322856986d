"""Embeddings in a byte or a bit per dimension, calibrated on embeddings of the same kind.

The codes are those of sentence-transformers' quantize_embeddings: int8 with the ranges of a
calibration, and `ubinary`. Numpy in and out.
"""

import dataclasses
import os
import uuid
from pathlib import Path
from typing import Self

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from piccolo_jax.errors import UserError

PRECISIONS = ("int8", "binary")
_SCHEMA = "1"
_LEAST = 2  # embeddings to calibrate on
_QUERIES_AT_ONCE = 256


@dataclasses.dataclass(frozen=True)
class Quantizer:
    """How embeddings of `dim` dimensions become codes. It has one of two calibrations.

    Attributes:
      ranges: of int8, float32 [2, dim]: what becomes -128 and 127, linear between.
      thresholds: of binary, float32 [dim]: above it a bit is 1.
    """

    ranges: np.ndarray | None = None
    thresholds: np.ndarray | None = None

    @property
    def precision(self) -> str:
        """Int8 or binary."""
        return "binary" if self.ranges is None else "int8"

    @property
    def dim(self) -> int:
        """Dimensions of the embeddings."""
        calibration = self.thresholds if self.ranges is None else self.ranges
        return 0 if calibration is None else calibration.shape[-1]

    @classmethod
    def fit(cls, embeddings: np.ndarray, precision: str, *, centre: bool = True) -> Self:
        """Calibrated on embeddings, float [n, dim], cut and normalised as those to quantise.

        The range of int8 is from the least value of a dimension to the largest: leaving out the
        outermost loses more than finer steps win (docs/encoder.md).

        Args:
          centre: bits are signs after the mean was taken off; False: signs as they are, as
            sentence-transformers has them, which find far fewer.

        Raises UserError for fewer than 2 embeddings and for what isn't finite.
        """
        if precision not in PRECISIONS:
            raise UserError(f"precision = {precision!r}: must be one of {', '.join(PRECISIONS)}")
        x = _checked(embeddings)
        if len(x) < _LEAST:
            raise UserError(f"calibrating on {len(x)} embeddings: needs at least {_LEAST}")
        if precision == "int8":
            return cls(ranges=np.stack([x.min(0), x.max(0)]))
        thresholds = x.mean(0, dtype=np.float64) if centre else np.zeros(x.shape[1])
        return cls(thresholds=thresholds.astype(np.float32))

    def quantize(self, embeddings: np.ndarray) -> np.ndarray:
        """Codes of float embeddings [n, dim]: int8 [n, dim], or bits, uint8 [n, ceil(dim / 8)].

        Raises UserError if they have another width or aren't finite.
        """
        x = self._fitting(embeddings)
        if self.ranges is None:
            return np.packbits(x > self.thresholds, axis=1)
        step = self._step()
        codes = np.floor((x - self.ranges[0]) / np.where(step == 0, 1, step))
        return (np.clip(codes, 0, 255) - 128).astype(np.int8)

    def scores(self, queries: np.ndarray, codes: np.ndarray) -> np.ndarray:
        """How near queries, float [q, dim], are to documents that are codes: float32 [q, n].

        Of int8, products with the middles of the steps: cosines, nearly. Of binary, products of the
        query less the thresholds with 1 or -1 for each bit: an order of the documents, no cosines.
        Raises UserError if the queries or the codes have another width, or queries aren't finite.
        """
        x = self._fitting(queries)
        is_int8 = self.thresholds is None
        kind, width = ("int8", self.dim) if is_int8 else ("uint8", -(-self.dim // 8))
        if codes.ndim != 2 or codes.dtype != kind or codes.shape[1] != width:
            has = f"{codes.dtype} {list(codes.shape)}"
            raise UserError(f"codes: {has}: must be {kind} [n, {width}]")
        if self.ranges is None:
            bits = np.unpackbits(codes, axis=1, count=self.dim).astype(np.float32)
            return (x - self.thresholds) @ (2 * bits - 1).T
        step = self._step()
        offset = x @ (self.ranges[0] + 128.5 * step)
        return (x * step) @ codes.astype(np.float32).T + offset[:, None]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the calibration to a safetensors file. Raises UserError if it can't be."""
        path = Path(path)
        tensors = {"ranges": self.ranges, "thresholds": self.thresholds}
        own = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        partial = path.with_name(f"{path.name}.partial-{uuid.uuid4().hex[:8]}")
        try:
            save_file(own, partial, {"schema": _SCHEMA})
            os.replace(partial, path)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: can't be written ({error})") from error
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """The calibration of a file. Raises UserError if it holds none."""
        try:
            with safe_open(path, framework="np") as file:
                about = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: not a readable calibration ({error})") from None
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        width = max((shape[-1] for shape in shapes.values() if shape), default=0)
        expected = ({"ranges": (2, width)}, {"thresholds": (width,)})
        if about.get("schema") != _SCHEMA or shapes not in expected:
            raise UserError(f"{path}: holds no calibration (of schema {_SCHEMA})")
        return cls(**tensors)

    def _step(self) -> np.ndarray:
        assert self.ranges is not None
        return (self.ranges[1] - self.ranges[0]) / 255

    def _fitting(self, embeddings: np.ndarray) -> np.ndarray:
        x = _checked(embeddings)
        if x.shape[1] != self.dim:
            raise UserError(
                f"embeddings of {x.shape[1]} dimensions: the calibration has {self.dim}; it must be"
                " made at the dimension that is quantised"
            )
        return x


def recall(queries: np.ndarray, documents: np.ndarray, quantizer: Quantizer, k: int = 10) -> float:
    """Share of the k nearest documents of each query that are so too once documents are codes.

    Queries, [q, dim], stay float32; documents are [n, dim]; both are normalised.
    """
    codes = quantizer.quantize(documents)
    found = 0
    k = min(k, len(documents))
    for start in range(0, len(queries), _QUERIES_AT_ONCE):
        part = queries[start : start + _QUERIES_AT_ONCE]
        exact, ours = _nearest(part @ documents.T, k), _nearest(quantizer.scores(part, codes), k)
        found += sum(len(set(a) & set(b)) for a, b in zip(exact, ours, strict=True))
    return found / max(len(queries) * k, 1)


def _nearest(scores: np.ndarray, k: int) -> list[list[int]]:
    nearest: list[list[int]] = np.argpartition(-scores, k - 1, axis=1)[:, :k].tolist()
    return nearest


def _checked(embeddings: np.ndarray) -> np.ndarray:
    x = np.asarray(embeddings)
    if x.ndim != 2 or x.dtype.kind != "f":
        raise UserError(f"embeddings: {x.dtype} {list(x.shape)}: must be floats [n, dim]")
    x = x.astype(np.float32, copy=False)
    if not np.isfinite(x).all():
        raise UserError("embeddings: hold NaN or infinity")
    return x
