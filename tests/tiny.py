"""A tiny encoder and datasets in memory, for tests of losses and steps."""

import jax
import numpy as np

from piccolo_jax import build
from piccolo_jax.config import Config
from piccolo_jax.data.mixing import Dataset
from piccolo_jax.data.packing import num_segments
from piccolo_jax.data.store import Ragged
from piccolo_jax.models.bert import BertConfig
from piccolo_jax.models.embedder import Embedder

TEXTS = 90
LONGEST = 30
ROWS = 40
LENGTHS = np.random.default_rng(1).integers(3, LONGEST + 1, TEXTS).astype(np.int32)


def embedder(layers=2, embed_dim=30, dropout=0.0, **options):
    backbone = BertConfig(
        vocab_size=64,
        hidden_size=32,
        num_layers=layers,
        num_heads=4,
        intermediate_size=64,
        max_positions=LONGEST + 3,
        hidden_dropout=dropout,
        attention_dropout=dropout,
    )
    return Embedder(backbone, embed_dim=embed_dim, **options)


def config(**fields):
    c = Config(batch_size=13, total_steps=3, **fields)
    c.loss.dims = (8, 30)
    c.data.negatives = 2
    c.data.query_max_length = c.data.max_length = LONGEST
    c.optim.learning_rate = 1e-2
    return c


def params(model, seed=0):
    """Numpy parameters, large enough for texts to differ; independent of JAX's random numbers."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        x = rng.normal(size=leaf.shape, scale=0.2).astype(np.float32)
        return x + 1 if "scale" in jax.tree_util.keystr(path) else x

    shapes = build.abstract_params(model, jax.tree.map(lambda _: None, build._shapes(model)))
    return jax.tree.map_with_path(draw, shapes)


class MemoryStore:
    """A prepared dataset of random texts, like data.store.Store."""

    def __init__(self, task):
        rng = np.random.default_rng(2)
        self.name = self.task = task
        self.num_rows, self.lengths = ROWS, LENGTHS
        self.manifest = {"longest_tokens": int(LENGTHS.max())}
        self._tokens = [rng.integers(1, 64, n).astype(np.int32) for n in LENGTHS]

        def column():
            return rng.integers(0, TEXTS, ROWS).astype(np.int32)

        def lists(least, most, texts=TEXTS):
            members = [rng.permutation(texts)[: rng.integers(least, most + 1)] for _ in range(ROWS)]
            return Ragged(
                np.concatenate(members).astype(np.int32),
                np.cumsum([0, *map(len, members)]).astype(np.int64),
            )

        self.columns = {
            "retrieval": lambda: {
                "query": column(),
                "positives": lists(1, 3),
                "negatives": lists(0, 3),
            },
            "similarity": lambda: {
                "first": column(),
                "second": column(),
                "score": rng.integers(0, 4, ROWS).astype(np.float32),
            },
            "classification": lambda: {
                "text": column(),
                "labels": lists(1, 1, 5),
                "other_labels": lists(0, 4, 5),
            },
        }[task]()

    def tokens(self, texts):
        return [self._tokens[i] for i in texts]


def dataset(task):
    return Dataset(MemoryStore(task), weight=1.0)


def one_text_a_row(lengths, seed=0):
    """Token arrays of random texts, one in each row, and their slots."""
    rng = np.random.default_rng(seed)
    length = int(max(lengths))
    places = np.broadcast_to(np.arange(length, dtype=np.int32), (len(lengths), length))
    segments = (places < np.array(lengths)[:, None]).astype(np.int32)
    return {
        "tokens": rng.integers(1, 64, segments.shape).astype(np.int32) * segments,
        "segments": segments,
        "positions": places * segments,
        "text_numbers": np.arange(len(lengths), dtype=np.int32)[:, None] * segments,
        "text_slots": np.arange(len(lengths), dtype=np.int32) * num_segments(length),
    }
