"""What a model makes of token ids, part by part, in float32."""

from collections.abc import Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from piccolo_jax.exporting import reference
from piccolo_jax.exporting.layout import Exported
from piccolo_jax.models.embedder import BACKBONES, Embedder, pooling_weights
from piccolo_jax.types import Params

_SHORT = 32  # tokens; longer texts have a program of their own


def make_reference(
    exported: Exported, trained: Exported, about: dict[str, Any]
) -> reference.Reference:
    """That of an export: `exported` has the weights as written, `trained` before rounding.

    `about`: what else `verify` compares.
    """
    texts = reference.texts_with(exported.prompts)
    prompts = exported.prompts | {"": ""}
    ids, _ = exported.tokenizer.encode(
        [prompts[name] + text for name, text in texts], exported.max_length
    )
    hidden, pooled, embeddings = encode(exported.model, exported.params, ids)
    before = embeddings
    if exported.params is not trained.params:
        before = encode(trained.model, trained.params, ids)[2]
    about = {
        "texts": texts,
        "prompts": exported.prompts,
        "max_length": exported.max_length,
        "pooling": exported.model.pooling,
        "scaling": "scaling" in exported.params,
        "dims": list(exported.dims),
        **about,
    }
    return reference.Reference(about, ids, hidden, pooled, embeddings, before)


def encode(
    model: Embedder, params: Params, ids: Sequence[np.ndarray]
) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Hidden states [tokens, H] of each text, pooled ones [texts, H], embeddings [texts, D]."""
    hidden: list[np.ndarray] = [np.zeros((0, 0), np.float32)] * len(ids)
    pooled = np.zeros((len(ids), model.backbone.hidden_size), np.float32)
    lengths = np.asarray([len(text) for text in ids])
    for members in (np.flatnonzero(lengths <= _SHORT), np.flatnonzero(lengths > _SHORT)):
        if not len(members):
            continue
        states, means = _backbone(model, params, [ids[int(i)] for i in members])
        pooled[members] = means
        for i, state in zip(members, states, strict=True):
            hidden[i] = state[: lengths[i]]
    embeddings = pooled
    if "scaling" in params:
        scaling = {name: np.asarray(leaf, np.float64) for name, leaf in params["scaling"].items()}
        embeddings = (pooled @ scaling["kernel"] + scaling["bias"]).astype(np.float32)
    return hidden, pooled, embeddings


def _backbone(
    model: Embedder, params: Params, ids: list[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """States [texts, length, H] and pooled ones, of a text in each row."""
    length = max(map(len, ids))
    tokens = np.zeros((len(ids), length), np.int32)
    segments = np.zeros((len(ids), length), np.int32)
    for i, text in enumerate(ids):
        tokens[i, : len(text)], segments[i, : len(text)] = text, 1
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape) * segments
    encoder = BACKBONES[model.backbone.model_type].encoder(model.backbone)

    @jax.jit
    def apply(params: Params, *arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
        states = cast(jax.Array, encoder.apply({"params": params}, *arrays))
        weights = pooling_weights(arrays[1], model.pooling, 1)
        return states, jnp.einsum("rsl,rlh->rsh", weights, states)[:, 0]

    with jax.default_matmul_precision("highest"):  # else TPUs round factors to bfloat16
        states, pooled = apply(params["backbone"], tokens, segments, positions)
    return np.asarray(states), np.asarray(pooled)
