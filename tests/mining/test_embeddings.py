import errno
import os

import numpy as np
import pytest

from piccolo_jax import sharding
from piccolo_jax.config import MeshConfig
from piccolo_jax.errors import UserError
from piccolo_jax.mining import corpus as corpus_lib
from piccolo_jax.mining import embeddings

TEXTS = [f"{'长' * (i % 40)}{i}" for i in range(2500)]


class Counting:
    """An encoder of lengths, which can fail after some texts."""

    width, max_length = 3, 16

    def __init__(self, fails_after=10**9, value=1.0):
        self.mesh = sharding.make_mesh(MeshConfig())
        self.model = type("Model", (), {"dtype": np.float32})
        self.seen, self.fails_after, self.value = [], fails_after, value

    def encode(self, params, texts, prompt=""):
        if len(self.seen) + len(texts) > self.fails_after:
            raise KeyboardInterrupt
        self.seen += texts
        return np.float32([[len(t), len(prompt), self.value] for t in texts])


def embed(cache, encoder, texts=TEXTS, model="m", prompt="p"):
    corpus = corpus_lib.of_texts(texts, "x")
    return embeddings.embed(cache, "corpus", corpus, encoder, None, model, prompt)


def test_texts_are_encoded_once_and_found_again(tmp_path):
    first = Counting()
    rows = embed(tmp_path / "cache", first)
    assert rows[:, 0].tolist() == [len(text) for text in TEXTS]
    assert sorted(first.seen) == sorted(TEXTS)
    again = Counting()
    np.testing.assert_array_equal(embed(tmp_path / "cache", again), rows)
    assert not again.seen


def test_a_stopped_run_goes_on_where_it_was(tmp_path):
    stopped, resumed = Counting(fails_after=2100), Counting()
    with pytest.raises(KeyboardInterrupt):
        embed(tmp_path, stopped)
    rows = embed(tmp_path, resumed)
    assert len(stopped.seen) == 2048
    assert sorted(stopped.seen + resumed.seen) == sorted(TEXTS)
    assert rows[:, 0].tolist() == [len(text) for text in TEXTS]
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize(
    "change", [{"texts": TEXTS[::-1]}, {"texts": TEXTS[:-1]}, {"model": "n"}, {"prompt": "q"}]
)
def test_what_embeddings_depend_on_makes_them_anew(tmp_path, change):
    embed(tmp_path, Counting())
    other = Counting()
    embed(tmp_path, other, **change)
    assert len(other.seen) >= len(TEXTS) - 1


def test_another_length_makes_them_anew(tmp_path):
    embed(tmp_path, Counting())
    other = Counting()
    other.max_length = 8
    embed(tmp_path, other)
    assert len(other.seen) == len(TEXTS)


def test_a_half_written_or_damaged_cache_is_made_again_or_said(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        embed(tmp_path, Counting(fails_after=1100))
    (partial,) = tmp_path.glob("*.partial")
    (partial / "embeddings.npy").write_bytes(b"half")
    resumed = Counting()
    embed(tmp_path, resumed)
    assert len(resumed.seen) == len(TEXTS)
    (folder,) = (p for p in tmp_path.iterdir() if p.is_dir())
    (folder / "embeddings.npy").write_bytes(b"half")
    with pytest.raises(UserError, match=r"damaged.*delete it"):
        embed(tmp_path, Counting())


def test_a_full_disk_is_said_before_anything_is_encoded(tmp_path, monkeypatch):
    def no_room(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", no_room)
    encoder = Counting()
    with pytest.raises(UserError, match=r"No space left.*--cache"):
        embed(tmp_path, encoder)
    assert not encoder.seen
    assert not list(tmp_path.glob("corpus-*/"))


def test_two_runs_dont_write_the_same_cache(tmp_path):
    class Nested(Counting):
        def encode(self, params, texts, prompt=""):
            with pytest.raises(UserError, match="being written by another run"):
                embed(tmp_path, Counting())
            return super().encode(params, texts, prompt)

    embed(tmp_path, Nested())


def test_embeddings_that_arent_finite_are_refused(tmp_path):
    with pytest.raises(UserError, match="not finite"):
        embed(tmp_path, Counting(value=np.nan))
