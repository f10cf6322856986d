"""Token ids to embeddings by given parameters: packed, on all devices, in a few compiled shapes.

Training evaluates and mines with it while its parameters change. `piccolo_jax.Encoder` is for who
has a model: it owns its parameters, and knows its prompts and its normalisation.
"""

import collections
import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import tqdm
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from piccolo_jax import build, sharding
from piccolo_jax.config import MeshConfig
from piccolo_jax.data import packing
from piccolo_jax.data.tokenizer import Tokenizer
from piccolo_jax.errors import UserError
from piccolo_jax.evaluation import batches
from piccolo_jax.models import pretrained
from piccolo_jax.models.embedder import Embedder, embedder_rules, encode
from piccolo_jax.ops.products import compiler_options
from piccolo_jax.types import Batch, Params

_LONG = (1024, 2048, 4096, 8192)
# On a CPU attention is dear, batches had better stay in the caches, and compiling is quick.
_ON_CPU = batches.Ladder(
    (*range(16, 129, 16), *range(160, 257, 32), *range(320, 513, 64), 640, 768, *_LONG),
    shared=512, tokens=1024, attention=1400,
)  # fmt: skip
_ELSEWHERE = batches.Ladder(
    (64, 128, 256, 512, *_LONG), shared=512, tokens=4096, attention=2048
)  # fmt: skip
_TEXTS_AT_ONCE = 16384  # tokenised
_IN_FLIGHT = 2  # batches that devices have or compute while the next is packed
_CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Encoder:
    """A model as a function of its parameters and of texts, on a mesh.

    Texts of like length share batches of a few shapes (`ladder`), so that the number of compiled
    programs is at most `most_programs`, whatever is encoded.
    """

    def __init__(self, model: Embedder, tokenizer: Tokenizer, mesh: Mesh, max_length: int):
        self.model, self.tokenizer, self.mesh = model, tokenizer, mesh
        self.max_length = max_length
        self.width = model.embed_dim or model.backbone.hidden_size
        on_cpu = mesh.devices.flat[0].platform == "cpu"
        self.ladder = _ON_CPU if on_cpu else _ELSEWHERE
        # Batches side by side, since XLA computes attention over short rows on one core. Only on a
        # single device: collectives must be started in the same order everywhere.
        self._threads = _CORES if on_cpu and mesh.devices.size == 1 else 0
        self._programs: dict[packing.Shape, Callable[[Params, Batch], jax.Array]] = {}

    @property
    def most_programs(self) -> int:
        """The most programs that are compiled for texts of up to max_length tokens."""
        return self.ladder.most_programs(self.max_length)

    def encode(
        self, params: Params, texts: Sequence[str], prompt: str = "", progress: str = ""
    ) -> np.ndarray:
        """Embeddings, float32 [texts, D], not normalised; texts are cut at max_length tokens.

        Args:
          prompt: put before every text.
          progress: name of the progress bar; empty: none.

        In a run of several processes all must call this with the same texts; all get the result.
        """
        tokens: list[np.ndarray] = []
        for start in range(0, len(texts), _TEXTS_AT_ONCE):
            part = [prompt + text for text in texts[start : start + _TEXTS_AT_ONCE]]
            tokens += self.tokenizer.encode(part, self.max_length)[0]
        return self.encode_tokens(params, tokens, progress)

    def encode_tokens(
        self, params: Params, tokens: Sequence[np.ndarray], progress: str = ""
    ) -> np.ndarray:
        """As encode(), of texts that are token ids already, int32 [length] each."""
        lengths = np.asarray([len(ids) for ids in tokens], np.int32)
        out = np.zeros((len(tokens), self.width), np.float32)
        pending: collections.deque[tuple[batches.TextBatch, Callable[[], np.ndarray]]]
        pending = collections.deque()
        bar = tqdm.tqdm(
            total=len(tokens), desc=progress, unit=" texts", disable=not progress, leave=False
        )

        def take() -> None:
            batch, grid = pending.popleft()
            out[batch.members] = grid()[batch.slots]
            bar.update(len(batch.members))

        with bar, ThreadPoolExecutor(max(self._threads, 1)) as pool:
            for batch in batches.plan(lengths, self.ladder, sharding.batch_shards_of(self.mesh)):
                arrays = self._arrays(tokens, lengths, batch)
                pending.append((batch, self._start(pool, params, arrays, batch.shape)))
                if len(pending) > max(self._threads, _IN_FLIGHT):
                    take()
            while pending:
                take()
        return out

    def _start(
        self, pool: ThreadPoolExecutor, params: Params, arrays: Batch, shape: packing.Shape
    ) -> Callable[[], np.ndarray]:
        """Begins to encode a batch; the result waits for its grid of texts, float32 [slots, D]."""

        first = shape not in self._programs
        if first:
            self._programs[shape] = self._program(shape)

        def run() -> jax.Array:
            with jax.set_mesh(self.mesh):
                return self._programs[shape](params, arrays)

        if self._threads and not first:
            return pool.submit(lambda: np.asarray(run())).result
        grid = run()  # compiled by one thread
        return lambda: np.asarray(grid)

    def _arrays(
        self, tokens: Sequence[np.ndarray], lengths: np.ndarray, batch: batches.TextBatch
    ) -> Batch:
        local, shape = sharding.local_shards(self.mesh), batch.shape
        shards = sharding.batch_shards_of(self.mesh)
        arrays = packing.fill(
            batch.layout,
            lengths[batch.members],
            lambda members: [tokens[i] for i in batch.members[members]],
            shape,
            local,
        )
        slots = np.arange(shards * shape.rows * packing.num_segments(shape.length), dtype=np.int32)
        arrays["text_slots"] = slots.reshape(shards, -1)[list(local)].reshape(-1)
        return sharding.global_batch(self.mesh, arrays, {})

    def _program(self, shape: packing.Shape) -> Callable[[Params, Batch], jax.Array]:
        """Encodes batches of a shape; compiled when it is first called."""
        model = self.model
        return jax.jit(
            functools.partial(encode, model),
            out_shardings=NamedSharding(self.mesh, PartitionSpec()),
            compiler_options=compiler_options(
                model.dtype, model.for_cpu, shape.rows * shape.length
            ),
        )


def load(
    directory: Path, mesh_config: MeshConfig | None = None, dtype: str = "float32"
) -> tuple[Encoder, Params]:
    """Encoder and parameters of an exported (or any sentence-transformers) directory.

    `dtype`: of the matrix products, float32, bfloat16 or auto, which is bfloat16 but on a CPU.
    Raises UserError for what is missing or not supported.
    """
    return from_spec(pretrained.read_spec(directory), mesh_config, dtype)


def from_spec(
    spec: pretrained.Pretrained, mesh_config: MeshConfig | None = None, dtype: str = "float32"
) -> tuple[Encoder, Params]:
    """As load(), of a directory that was read already."""
    mesh = sharding.make_mesh(mesh_config or MeshConfig())
    model = Embedder(spec.backbone, pooling=spec.pooling or "mean", embed_dim=spec.embed_dim)
    # Scanned: several programs are compiled, and no backward pass needs activations of each layer.
    model = build.for_platform(model, mesh.devices.flat[0].platform, dtype, layers="scanned")
    tokenizer = _tokenizer(spec)
    stored = pretrained.open_params(spec.path, spec.backbone, spec.embed_dim)
    rules = embedder_rules(spec.backbone.model_type)
    shardings = sharding.param_shardings(mesh, stored, rules)
    params = jax.tree.map(sharding.place, stored, shardings)
    most = spec.backbone.max_positions
    max_length = min(spec.max_seq_length or most, most)
    return Encoder(model, tokenizer, mesh, max_length), params


def _tokenizer(spec: pretrained.Pretrained) -> Tokenizer:
    """Raises UserError if its ids or its limit are not what the model can take."""
    tokenizer = Tokenizer(spec.tokenizer, lower_case=spec.lower_case)
    if tokenizer.vocab_size > spec.backbone.vocab_size:
        raise UserError(
            f"{spec.tokenizer}: its tokenizer has {tokenizer.vocab_size} token ids, but config.json"
            f" has vocab_size = {spec.backbone.vocab_size}: tokenizer and weights are of different"
            " models"
        )
    if tokenizer.hf.truncation_side != "right":
        raise UserError(
            f"{spec.tokenizer / 'tokenizer_config.json'}: truncation_side ="
            f" {tokenizer.hf.truncation_side!r}: must be 'right': encode with sentence-transformers"
            " instead"
        )
    return tokenizer


def cut(embeddings: np.ndarray, dim: int) -> np.ndarray:
    """The prefix of `dim` coordinates, then normalised to length 1 (0 stays 0)."""
    prefix = embeddings[:, :dim]
    return prefix / np.maximum(np.linalg.norm(prefix, axis=1, keepdims=True), 1e-12)
