"""Embeddings of many texts on disk, by fingerprint: encoded once, resumed after a kill.

CACHE/NAME-FINGERPRINT/embeddings.npy   float32 [texts, width], not normalised
CACHE/NAME-FINGERPRINT/progress.json    chunks that are on disk, while it is being written
"""

import contextlib
import hashlib
import json
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import tqdm

from piccolo_jax import distributed, locks
from piccolo_jax.errors import UserError
from piccolo_jax.evaluation.encoder import Encoder
from piccolo_jax.mining.corpus import Corpus
from piccolo_jax.types import Params

SCHEMA_VERSION = 1
_FILE, _PROGRESS = "embeddings.npy", "progress.json"
_LEAST_CHUNK, _LARGEST_CHUNK, _CHUNKS = 1024, 65536, 64  # texts, texts, about so many


def embed(
    cache: Path,
    name: str,
    texts: Corpus,
    encoder: Encoder,
    params: Params,
    model: str,
    prompt: str,
) -> np.ndarray:
    """Embeddings of all texts, float32 [n, width], a memory map; encoded if they aren't there.

    Texts are encoded in chunks, the longest first; a chunk on disk is not encoded again. `model` is
    the fingerprint of the model. In a run of several processes the cache must be a folder that all
    share; process 0 writes. Raises UserError if the folder can't be written, has no room, is being
    written by another run, or if an embedding isn't finite.
    """
    described = json.dumps(
        {"schema": SCHEMA_VERSION, "model": model, "texts": texts.fingerprint(), "prompt": prompt,
         "max_length": encoder.max_length, "dtype": str(np.dtype(encoder.model.dtype)),
         "platform": encoder.mesh.devices.flat[0].platform}
    )  # fmt: skip
    with distributed.agreed("making the cache of embeddings"):
        _make(cache)
    if not distributed.sees_first(cache):
        raise UserError(f"--cache={cache}: must be a folder that all processes share")
    folder = cache / f"{name}-{hashlib.sha256(described.encode()).hexdigest()[:16]}"
    partial = folder.with_name(f"{folder.name}.partial")
    if not distributed.of_first(np.asarray(folder.exists())):
        with distributed.agreed("opening the cache of embeddings"):
            lock = _lock(cache, folder) if jax.process_index() == 0 else contextlib.nullcontext()
        with lock:
            _encode(partial, texts, encoder, params, prompt, name)
            with distributed.agreed("finishing the cache of embeddings"):
                if jax.process_index() == 0:
                    (partial / _PROGRESS).unlink()
                    os.rename(partial, folder)
    try:
        rows = np.load(folder / _FILE, mmap_mode="r")
        if rows.shape != (len(texts), encoder.width):
            raise ValueError(f"shape {rows.shape}")
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{folder}: damaged ({error}); delete it, and it is made again") from None
    return rows


def _encode(
    folder: Path, texts: Corpus, encoder: Encoder, params: Params, prompt: str, name: str
) -> None:
    order = np.argsort(-texts.lengths.astype(np.int64), kind="stable")
    size = min(max(len(order) // _CHUNKS, _LEAST_CHUNK), _LARGEST_CHUNK)
    chunks = [order[start : start + size] for start in range(0, len(order), size)]
    is_first = jax.process_index() == 0
    with distributed.agreed("making room for the embeddings"):
        done = _open(folder, len(order), encoder.width) if is_first else 0
    done = int(distributed.of_first(np.asarray(done)))
    rows = np.load(folder / _FILE, mmap_mode="r+") if is_first else None
    with tqdm.tqdm(
        total=len(order), initial=min(done * size, len(order)), desc=f"encoding {name}",
        unit=" texts", disable=not is_first,
    ) as bar:  # fmt: skip
        for number, chunk in enumerate(chunks[done:], done + 1):
            found = encoder.encode(params, [texts.texts[int(i)] for i in chunk], prompt)
            if not np.isfinite(found).all():
                raise UserError(
                    "the model's embeddings are not finite: its weights are damaged, or too large"
                )
            if rows is not None:
                rows[chunk] = found
                rows.flush()
                _write(folder / _PROGRESS, json.dumps({"chunks": number}))
            bar.update(len(chunk))


def _open(folder: Path, count: int, width: int) -> int:
    """Makes room for the embeddings, or finds them; returns the number of chunks they hold."""
    with contextlib.suppress(OSError, ValueError, LookupError):
        done = int(json.loads((folder / _PROGRESS).read_text())["chunks"])
        if np.load(folder / _FILE, mmap_mode="r").shape == (count, width):
            return done
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        rows = np.lib.format.open_memmap(folder / _FILE, "w+", np.float32, (count, width))
        size = rows.offset + rows.nbytes
        del rows
        # Room is taken now: a memory map that finds none when written ends the process.
        if hasattr(os, "posix_fallocate"):
            with (folder / _FILE).open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, size)
        _write(folder / _PROGRESS, json.dumps({"chunks": 0}))
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        needed = 4 * count * width / 2**30
        raise UserError(
            f"{folder}: {needed:.2f} GiB of embeddings can't be written here ({error.strerror});"
            " make room, or name another folder by --cache"
        ) from None
    return 0


def _make(cache: Path) -> None:
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--cache={cache}: can't be made ({error.strerror})") from None


def _lock(cache: Path, folder: Path) -> contextlib.AbstractContextManager:
    """Held until the process ends or leaves it."""
    try:
        lock = locks.take(cache / f"{folder.name}.lock")
    except OSError as error:
        raise UserError(f"--cache={cache}: can't be written ({error.strerror})") from None
    if lock is None:
        raise UserError(
            f"{folder}: is being written by another run; wait for it, or name another --cache"
        )
    return lock


def _write(path: Path, text: str) -> None:
    partial = path.with_suffix(".new")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
