"""Backbone, pooling and scaling layer: packed rows to one embedding per text."""

from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from piccolo_jax.data.packing import num_segments
from piccolo_jax.models import bert
from piccolo_jax.sharding import BATCH_AXES, Rules, batch_shards, constrain
from piccolo_jax.types import Batch, Params

POOLINGS = ("mean", "cls", "last")


class Backbone(NamedTuple):
    """What is known about a family of encoders."""

    config: Any  # dataclass with from_hf() and to_hf()
    encoder: type[nn.Module]
    rules: Rules  # sharding of its parameters
    hf_names: Mapping[str, str]  # path of a parameter -> Hugging Face name


_BERT = Backbone(bert.BertConfig, bert.BertEncoder, bert.BERT_RULES, bert.HF_NAMES)

BACKBONES = {"bert": _BERT, "roberta": _BERT, "xlm-roberta": _BERT}


def embedder_rules(model_type: str) -> Rules:
    """Sharding rules for the parameters of an Embedder with a backbone of `model_type`."""
    return (*BACKBONES[model_type].rules, (r"^scaling/kernel", P("fsdp", "tensor")))


class Embedder(nn.Module):
    """Embeds packed texts. Parameters: `backbone` and, unless embed_dim is 0, `scaling`.

    For `dtype`, `remat` and `row_chunk` see BertEncoder.
    """

    backbone: bert.BertConfig
    pooling: str = "mean"
    embed_dim: int = 0
    dtype: Any = jnp.float32
    remat: str = "none"
    row_chunk: int = 0

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "R L"],
        segments: Int[Array, "R L"],
        positions: Int[Array, "R L"],
        text_slots: Int[Array, " N"],
        *,
        num_segments: int,
        deterministic: bool = True,
    ) -> Float[Array, "N D"]:
        """Embeddings in float32, not normalised, of the texts at `text_slots`.

        A slot is row * num_segments + segment - 1. All arrays are global; R and N are each split
        evenly over batch_shards() shards, and the slots of a shard point at rows of that shard.
        """
        encoder = BACKBONES[self.backbone.model_type].encoder(
            self.backbone, self.dtype, self.remat, self.row_chunk, name="backbone"
        )
        hidden = encoder(tokens, segments, positions, deterministic=deterministic)
        weights = pooling_weights(segments, self.pooling, num_segments)
        grid = jnp.einsum(
            "rsl,rlh->rsh", weights, hidden.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
        )
        x = _take_texts(constrain(grid, BATCH_AXES, None, None), text_slots)
        if self.embed_dim:
            x = nn.Dense(self.embed_dim, precision=jax.lax.Precision.HIGHEST, name="scaling")(x)
        return constrain(x, BATCH_AXES, None)


def encode(
    model: Embedder, params: Params, batch: Batch, dropout: jax.Array | None = None
) -> Float[Array, "N D"]:
    """Embeddings of a batch's texts; `dropout` is the key of its random numbers (None: without)."""
    embeddings = model.apply(
        {"params": params},
        batch["tokens"],
        batch["segments"],
        batch["positions"],
        batch["text_slots"],
        num_segments=num_segments(batch["tokens"].shape[1]),
        deterministic=dropout is None,
        rngs=None if dropout is None else {"dropout": dropout},
    )
    return cast(jax.Array, embeddings)


def pooling_weights(
    segments: Int[Array, "R L"], pooling: str, num_segments: int
) -> Float[Array, "R S L"]:
    """Weight of each token in the embedding of each segment; all 0 for a segment that is absent.

    Segment s has index s - 1. `pooling`: mean, cls (first token) or last.
    """
    member = segments[:, None, :] == jnp.arange(1, num_segments + 1)[None, :, None]
    if pooling == "mean":
        count = member.sum(-1, keepdims=True)
        return member / jnp.maximum(count, 1).astype(jnp.float32)
    # A segment is contiguous: its first token is the one whose neighbour before is another's.
    if pooling == "cls":
        other = jnp.pad(member[..., :-1], ((0, 0), (0, 0), (1, 0)))
    elif pooling == "last":
        other = jnp.pad(member[..., 1:], ((0, 0), (0, 0), (0, 1)))
    else:
        raise ValueError(f"pooling = {pooling!r}: must be one of {', '.join(POOLINGS)}")
    return (member & ~other).astype(jnp.float32)


def _take_texts(grid: Float[Array, "R S H"], text_slots: Int[Array, " N"]) -> Float[Array, "N H"]:
    """Rows of the grid at flat indices, each shard from its own part so that nothing moves."""
    rows, num_segments, hidden = grid.shape
    shards = batch_shards()
    if rows % shards or text_slots.size % shards:
        shards = 1
    part = rows // shards * num_segments
    local = constrain(grid.reshape(shards, part, hidden), BATCH_AXES, None, None)
    slots = constrain(text_slots.reshape(shards, -1), BATCH_AXES, None)
    slots = slots - part * jnp.arange(shards, dtype=slots.dtype)[:, None]
    # clip: an unused slot may point anywhere, and must not bring in a NaN.
    x = jnp.take_along_axis(local, slots[..., None], axis=1, mode="clip")
    x = constrain(x, BATCH_AXES, None, None)
    return constrain(x.reshape(-1, hidden), BATCH_AXES, None)
