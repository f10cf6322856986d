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
from piccolo_jax.sharding import BATCH_AXES, Rules, batch_shards, constrain, over_data
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

    For `dtype` and what follows see BertEncoder.
    """

    backbone: bert.BertConfig
    pooling: str = "mean"
    embed_dim: int = 0
    dtype: Any = jnp.float32
    remat: str = "none"
    for_cpu: bool = False
    kernels: bool = False
    unrolled: bool = False

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "R L"],
        segments: Int[Array, "R L"],
        positions: Int[Array, "R L"],
        text_slots: Int[Array, " N"],
        text_numbers: Int[Array, "R L"] | None = None,
        rows: Int[Array, " R"] | None = None,
        *,
        num_segments: int,
        dropout: Array | None = None,
        micro_batches: int = 1,
    ) -> Float[Array, "N D"]:
        """Embeddings in float32, not normalised, of the texts at `text_slots`.

        `dropout` is the key of its random numbers; None: without. `text_numbers` are those of each
        token's text in the batch, by which it gets them; None: by row and segment. `rows` are the
        numbers of the rows in the whole batch; None: from 0 on.

        A slot is row * num_segments + segment - 1. All arrays are global; R and N are each split
        evenly over batch_shards() shards, and the slots of a shard point at rows of that shard.

        micro_batches > 1 encodes that many chunks of each shard's rows one after the other and
        forgets all but their texts' pooled states, so that the backward pass encodes them again:
        gradient caching (arXiv 2101.06983). The same embeddings and gradients, in the memory of one
        chunk. Raises ValueError if the rows of a shard can't be split so.
        """
        encoder = BACKBONES[self.backbone.model_type].encoder(
            self.backbone, self.dtype, self.remat, self.for_cpu, self.kernels, self.unrolled,
            name="backbone",
        )  # fmt: skip

        def pool(
            encoder: nn.Module, pooled: jax.Array, chunk: tuple[jax.Array, ...]
        ) -> tuple[jax.Array, None]:
            tokens, segments, positions, text_numbers, rows = chunk
            hidden = encoder(tokens, segments, positions, text_numbers, dropout)
            weights = pooling_weights(segments, self.pooling, num_segments)
            grid = jnp.einsum(
                "rsl,rlh->rsh",
                weights,
                hidden.astype(jnp.float32),
                precision=jax.lax.Precision.HIGHEST,
            )
            grid = constrain(grid, BATCH_AXES, None, None)
            return _take_texts(grid, rows, text_slots, len(all_rows), pooled), None

        all_rows = jnp.arange(len(tokens), dtype=text_slots.dtype) if rows is None else rows
        if text_numbers is None:
            text_numbers = all_rows[:, None] * num_segments + segments
        arrays = (tokens, segments, positions, text_numbers, all_rows)
        x = constrain(jnp.zeros((text_slots.size, self.backbone.hidden_size)), BATCH_AXES, None)
        if micro_batches == 1:
            x, _ = pool(encoder, x, arrays)
        else:
            chunks = [_in_chunks(array, micro_batches) for array in arrays]
            in_turn = nn.scan(
                nn.remat(pool, prevent_cse=False),
                variable_broadcast="params",
                split_rngs={"params": False},
            )
            x, _ = in_turn(encoder, x, tuple(chunks))
        if self.embed_dim:
            # Orthogonal: a new layer as wide as the backbone or wider starts with its cosines. Its
            # entries are as large as torch.nn.Linear's (variance 1 / 3 of the backbone's width).
            widening = max(1.0, self.embed_dim / self.backbone.hidden_size)
            x = nn.Dense(
                self.embed_dim,
                precision=jax.lax.Precision.HIGHEST,
                kernel_init=nn.initializers.orthogonal((widening / 3) ** 0.5),
                name="scaling",
            )(x)
        return constrain(x, BATCH_AXES, None)


def encode(
    model: Embedder,
    params: Params,
    batch: Batch,
    dropout: jax.Array | None = None,
    micro_batches: int = 1,
) -> Float[Array, "N D"]:
    """Embeddings of a batch's texts, sharded like them; see Embedder.

    Each part of the mesh's axis `data` encodes its own rows and sums the gradient of the parameters
    over all chunks before the parts are added: one all-reduce a step, in float32.
    """

    def apply(params: Params, dropout: jax.Array | None, *arrays: jax.Array) -> jax.Array:
        if model.unrolled:  # here, so that each layer's gradient is summed over the chunks in place
            layers = model.backbone.num_layers
            params = params | {"backbone": bert.unstack(params["backbone"], layers)}
        embeddings = model.apply(
            {"params": params},
            *arrays,
            num_segments=num_segments(batch["tokens"].shape[1]),
            dropout=dropout,
            micro_batches=micro_batches,
        )
        return cast(jax.Array, embeddings)

    rows = jnp.arange(len(batch["tokens"]), dtype=jnp.int32)
    names = ("tokens", "segments", "positions", "text_slots", "text_numbers")
    return over_data(apply, whole=2)(params, dropout, *(batch[name] for name in names), rows)


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


def _in_chunks(array: Array, chunks: int) -> Array:
    """[R, ...] to [chunks, R / chunks, ...]: to each chunk the same part of every shard's rows."""
    shards = batch_shards()
    if len(array) % (shards * chunks):
        raise ValueError(f"{len(array)} rows on {shards} shards are not {chunks} equal chunks")
    array = array.reshape(shards, chunks, -1, *array.shape[1:])
    array = jnp.moveaxis(array, 1, 0)
    array = array.reshape(chunks, -1, *array.shape[3:])
    return constrain(array, None, BATCH_AXES, *[None] * (array.ndim - 2))


def _take_texts(
    grid: Float[Array, "r S H"],
    rows: Int[Array, " r"],
    text_slots: Int[Array, " N"],
    num_rows: int,
    pooled: Float[Array, "N H"],
) -> Float[Array, "N H"]:
    """`pooled`, with the texts whose slots lie in the grid's rows taken from it.

    Each shard takes from its own part, so that nothing moves. `rows` are the numbers of the grid's
    rows among `num_rows`, consecutive within a shard.
    """
    _, num_segments, hidden = grid.shape
    shards = batch_shards()
    if num_rows % shards or text_slots.size % shards:
        shards = 1
    local = constrain(grid.reshape(shards, -1, hidden), BATCH_AXES, None, None)
    slots = constrain(text_slots.reshape(shards, -1), BATCH_AXES, None)
    slots = slots - rows.reshape(shards, -1)[:, :1] * num_segments
    x = jnp.take_along_axis(local, slots[..., None], axis=1, mode="clip")
    x = constrain(x, BATCH_AXES, None, None).reshape(-1, hidden)
    inside = ((slots >= 0) & (slots < local.shape[1])).reshape(-1, 1)
    return constrain(jnp.where(inside, x, pooled), BATCH_AXES, None)
