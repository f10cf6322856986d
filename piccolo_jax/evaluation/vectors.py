"""Vectors of texts on disk: each text is encoded once, whatever is evaluated with it.

FOLDER/texts.sha256   16 bytes of each text's digest
FOLDER/vectors.f32    float32 [texts, width], in the same order, not normalised

Both are only ever appended to, vectors first, so what a killed process leaves is whole up to the
shorter of the two.
"""

import contextlib
import hashlib
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import tqdm

from piccolo_jax import locks
from piccolo_jax.errors import UserError

Encode = Callable[[Sequence[str]], np.ndarray]  # texts -> float32 [texts, width]
_DIGEST_BYTES = 16
_BLOCK, _LARGEST_BLOCK = 4096, 65536  # texts encoded, and then written, at once: for a device, all


class Vectors:
    """The vectors of one model. A context that holds the folder for this process alone.

    What `encode` gets at once grows with the number of `devices`. Raises UserError if another
    process holds the folder.
    """

    def __init__(
        self, folder: Path, width: int, encode: Encode, devices: int = 1, progress: bool = False
    ):
        self._block = min(_BLOCK * devices, _LARGEST_BLOCK)
        self.folder, self.width, self._encode, self._progress = folder, width, encode, progress
        self.encoded, self.seconds = 0, 0.0  # texts encoded since it was opened, and for how long
        folder.mkdir(parents=True, exist_ok=True)
        lock = locks.take(folder / "lock")
        if lock is None:
            raise UserError(
                f"{folder}: another evaluation of this model is writing there; wait for it, or give"
                " another --output"
            )
        self._lock = lock
        self._digests, self._values = folder / "texts.sha256", folder / "vectors.f32"
        self._row = self._open()

    def __enter__(self) -> "Vectors":
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.close()

    def of(self, texts: Sequence[str], name: str = "") -> np.ndarray:
        """Vectors of texts, float32 [texts, width], a memory map's rows; encodes what is missing.

        `name` is that of the progress bar. Raises UserError if a vector isn't finite.
        """
        keys = [_digest(text) for text in texts]
        missing = {key: text for key, text in zip(keys, texts, strict=True) if key not in self._row}
        if missing:
            self._add(missing, name)
        if not texts:
            return np.zeros((0, self.width), np.float32)
        shape = (len(self._row), self.width)
        return np.memmap(self._values, np.float32, "r", shape=shape)[[self._row[k] for k in keys]]

    def _add(self, missing: dict[bytes, str], name: str) -> None:
        # Blocks of texts of like length, the longest first: what takes longest is known soon.
        order = sorted(missing, key=lambda key: -len(missing[key]))
        bar = tqdm.tqdm(
            total=len(order), desc=f"encoding {name}", unit=" texts", disable=not self._progress,
            leave=False,
        )  # fmt: skip
        with bar, self._values.open("ab") as values, self._digests.open("ab") as digests:
            for start in range(0, len(order), self._block):
                block = order[start : start + self._block]
                begin = time.monotonic()
                found = self._encode([missing[key] for key in block])
                self.seconds += time.monotonic() - begin
                if not np.isfinite(found).all():
                    raise UserError(
                        "the model's vectors are not finite: its weights are damaged, or too large"
                    )
                values.write(np.ascontiguousarray(found, np.float32).tobytes())
                values.flush()
                os.fsync(values.fileno())
                digests.write(b"".join(block))
                digests.flush()
                self._row.update({key: len(self._row) + i for i, key in enumerate(block)})
                self.encoded += len(block)
                bar.update(len(block))

    def _open(self) -> dict[bytes, int]:
        """Row of each digest; half-written ends are cut off."""
        with contextlib.suppress(FileNotFoundError):
            content = self._digests.read_bytes()
            row_bytes = 4 * self.width
            count = min(len(content) // _DIGEST_BYTES, self._values.stat().st_size // row_bytes)
            os.truncate(self._digests, count * _DIGEST_BYTES)
            os.truncate(self._values, count * row_bytes)
            return {content[i * _DIGEST_BYTES : (i + 1) * _DIGEST_BYTES]: i for i in range(count)}
        self._digests.unlink(missing_ok=True)
        self._values.unlink(missing_ok=True)
        return {}


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:_DIGEST_BYTES]
