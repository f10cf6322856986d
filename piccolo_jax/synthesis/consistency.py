"""The consistency filter: a model must find a query's positive among all documents.

Round-trip consistency of Promptagator (arXiv 2209.11755, section 3.2), which keeps a query if its
own document is found at rank 1.
"""

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from piccolo_jax.errors import UserError
from piccolo_jax.evaluation import encoder
from piccolo_jax.models import pretrained
from piccolo_jax.synthesis.filters import Row

_QUERIES_AT_ONCE = 1024
_DOCUMENTS_AT_ONCE = 16384


def check_model(model_dir: Path) -> None:
    """Raises UserError if the folder holds no model that can filter."""
    pretrained.read_spec(model_dir)


def positive_ranks(
    model_dir: Path, rows: Sequence[Row], query_prompt: str | None, passage_prompt: str | None
) -> np.ndarray:
    """The rank of each row's positive among the distinct documents of all rows, int [rows], from 1.

    Prompts that are None are the model's own, if it has prompts `query` and `passage` (or
    `document`). Raises UserError if the folder holds no model.
    """
    prompts = pretrained.read_spec(model_dir).prompts
    if query_prompt is None:
        query_prompt = prompts.get("query", "")
    if passage_prompt is None:
        passage_prompt = prompts.get("passage", prompts.get("document", ""))
    documents = list(dict.fromkeys(text for row in rows for text in row.documents))
    place = {text: i for i, text in enumerate(documents)}
    positives = np.asarray([place[row.positive] for row in rows], np.int32)
    model, params = encoder.load(model_dir, dtype="auto")
    queries = model.encode(params, [row.query for row in rows], query_prompt, "encoding queries")
    passages = model.encode(params, documents, passage_prompt, "encoding documents")
    if not (np.isfinite(queries).all() and np.isfinite(passages).all()):
        raise UserError(
            f"{model_dir}: gives embeddings that are no numbers; its weights are broken"
        )
    return ranks(encoder.cut(queries, model.width), encoder.cut(passages, model.width), positives)


def ranks(queries: np.ndarray, documents: np.ndarray, positives: np.ndarray) -> np.ndarray:
    """1 + the number of documents nearer to query i than documents[positives[i]].

    Args:
      queries, documents: float32 [Q, D] and [N, D], normalised.
      positives: int [Q].
    """
    found: list[np.ndarray] = []
    for start in tqdm.trange(0, len(queries), _QUERIES_AT_ONCE, desc="ranking"):
        block = queries[start : start + _QUERIES_AT_ONCE]
        own = positives[start : start + _QUERIES_AT_ONCE]
        target = np.einsum("qd,qd->q", block, documents[own])
        nearer = np.zeros(len(block), np.int64)
        for first in range(0, len(documents), _DOCUMENTS_AT_ONCE):
            part = documents[first : first + _DOCUMENTS_AT_ONCE]
            nearer += np.asarray(_count_nearer(block, part, target, own - first))
        found.append(1 + nearer)
    return np.concatenate(found) if found else np.zeros(0, np.int64)


@jax.jit
def _count_nearer(
    queries: jax.Array, documents: jax.Array, target: jax.Array, own: jax.Array
) -> jax.Array:
    """Documents with a larger product than `target`, the own one apart (it would round anew)."""
    scores = jnp.matmul(queries, documents.T, precision="highest")
    others = jnp.arange(len(documents))[None] != own[:, None]
    return jnp.sum((scores > target[:, None]) & others, axis=1)
