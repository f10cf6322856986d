"""Texts to embeddings, packed and on all devices, with a few compiled shapes."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
import tqdm
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from piccolo_jax import sharding
from piccolo_jax.config import MeshConfig
from piccolo_jax.data import packing
from piccolo_jax.data.tokenizer import Tokenizer
from piccolo_jax.models import pretrained
from piccolo_jax.models.embedder import Embedder, embedder_rules, encode
from piccolo_jax.types import Batch, Params

_ROW_LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
_TOKENS_PER_SHARD = 4096


class Encoder:
    """Encodes texts with a model on a mesh.

    Texts of like length share batches of a fixed shape per row length, so that the number of
    compiled programs is at most that of `_ROW_LENGTHS`.
    """

    def __init__(self, model: Embedder, tokenizer: Tokenizer, mesh: Mesh, max_length: int):
        self.model, self.tokenizer, self.mesh = model, tokenizer, mesh
        self.max_length = max_length
        self.width = model.embed_dim or model.backbone.hidden_size

    def encode(
        self, params: Params, texts: Sequence[str], prompt: str = "", progress: str = ""
    ) -> np.ndarray:
        """Embeddings, float32 [texts, D], not normalised; texts are cut at max_length tokens.

        Args:
          prompt: put before every text.
          progress: name of the progress bar; empty: none.

        In a run of several processes all must call this with the same texts; all get the result.
        """
        tokens, _ = self.tokenizer.encode([prompt + text for text in texts], self.max_length)
        return self.encode_tokens(params, tokens, progress)

    def encode_tokens(
        self, params: Params, tokens: Sequence[np.ndarray], progress: str = ""
    ) -> np.ndarray:
        """As encode(), of texts that are token ids already, int32 [length] each."""
        lengths = np.asarray([len(ids) for ids in tokens], np.int32)
        out = np.zeros((len(tokens), self.width), np.float32)
        bar = tqdm.tqdm(
            total=len(tokens), desc=progress, unit=" texts", disable=not progress, leave=False
        )
        row_length = np.asarray([_row_length(n) for n in lengths])
        for length in np.unique(row_length):
            members = np.flatnonzero(row_length == length)
            rows = packing.plan_layout(lengths[members], int(length), shards=1)
            shards = sharding.batch_shards_of(self.mesh)
            rows_per_batch = max(_TOKENS_PER_SHARD // int(length), 1) * shards
            for start in range(0, rows.rows_needed, rows_per_batch):
                chosen = (rows.row >= start) & (rows.row < start + rows_per_batch)
                grid = self._encode_rows(
                    params, [tokens[i] for i in members[chosen]], lengths[members[chosen]],
                    _part(rows, chosen, start, rows_per_batch // shards),
                    packing.Shape(int(length), rows_per_batch // shards, 0),
                )  # fmt: skip
                slots = (rows.row[chosen] - start) * packing.num_segments(int(length))
                out[members[chosen]] = grid[slots + rows.segment[chosen] - 1]
                bar.update(int(chosen.sum()))
        bar.close()
        return out

    def _encode_rows(
        self,
        params: Params,
        tokens: list[np.ndarray],
        lengths: np.ndarray,
        layout: packing.Layout,
        shape: packing.Shape,
    ) -> np.ndarray:
        local = sharding.local_shards(self.mesh)
        shards = sharding.batch_shards_of(self.mesh)
        arrays = packing.fill(
            layout, lengths, lambda members: [tokens[i] for i in members], shape, local
        )
        grid = shards * shape.rows * packing.num_segments(shape.length)
        arrays["text_slots"] = np.arange(grid, dtype=np.int32).reshape(shards, -1)[list(local)]
        arrays["text_slots"] = arrays["text_slots"].reshape(-1)
        batch = sharding.global_batch(self.mesh, arrays, {})
        with jax.set_mesh(self.mesh):
            return np.asarray(self._apply(params, batch))

    @functools.cached_property
    def _apply(self) -> Callable[[Params, Batch], jax.Array]:
        apply = functools.partial(encode, self.model)
        return jax.jit(apply, out_shardings=NamedSharding(self.mesh, PartitionSpec()))


def load(directory: Path, mesh_config: MeshConfig | None = None) -> tuple[Encoder, Params]:
    """Encoder and parameters of an exported (or any sentence-transformers) directory.

    Raises UserError for what is missing or not supported.
    """
    spec = pretrained.read_spec(directory)
    mesh = sharding.make_mesh(mesh_config or MeshConfig())
    model = Embedder(spec.backbone, pooling=spec.pooling or "mean", embed_dim=spec.embed_dim)
    stored = pretrained.open_params(directory, spec.backbone, spec.embed_dim)
    rules = embedder_rules(spec.backbone.model_type)
    shardings = sharding.param_shardings(mesh, stored, rules)
    params = jax.tree.map(sharding.place, stored, shardings)
    max_length = min(
        spec.max_seq_length or spec.backbone.max_positions, spec.backbone.max_positions
    )
    return Encoder(model, Tokenizer(directory), mesh, max_length), params


def cut(embeddings: np.ndarray, dim: int) -> np.ndarray:
    """The prefix of `dim` coordinates, then normalised to length 1 (0 stays 0)."""
    prefix = embeddings[:, :dim]
    return prefix / np.maximum(np.linalg.norm(prefix, axis=1, keepdims=True), 1e-12)


def _row_length(tokens: int) -> int:
    """Rows that hold two texts of this length or more, if there are such."""
    fitting = [n for n in _ROW_LENGTHS if n >= tokens]
    roomy = [n for n in fitting if n >= 2 * tokens and n <= 512]
    return (roomy or fitting or [tokens])[0]


def _part(
    layout: packing.Layout, chosen: np.ndarray, start: int, rows_per_shard: int
) -> packing.Layout:
    """The texts of some rows of a layout for one shard, laid out over shards of equally many."""
    shard, row = np.divmod(layout.row[chosen] - start, rows_per_shard)
    return packing.Layout(
        shard, row, layout.segment[chosen], layout.start[chosen], layout.slot[chosen],
        rows_per_shard, 0,
    )  # fmt: skip
