import os
import subprocess
import sys

import numpy as np
import pytest

from piccolo_jax.errors import UserError
from piccolo_jax.evaluation import vectors
from piccolo_jax.evaluation.vectors import Vectors

WIDTH = 3


class Encoder:
    """Vectors of three numbers, and a note of each call."""

    def __init__(self):
        self.calls = []

    def __call__(self, texts):
        self.calls.append(list(texts))
        return np.asarray([[len(text), ord(text[0]), hash(text) % 97] for text in texts], float)


def expected(*texts):
    return Encoder()(texts).astype(np.float32)


@pytest.fixture
def encode():
    return Encoder()


def test_each_text_is_encoded_once_and_rows_are_in_order(tmp_path, encode):
    with Vectors(tmp_path, WIDTH, encode) as made:
        found = made.of(["b", "a", "b"])
        np.testing.assert_array_equal(found, expected("b", "a", "b"))
        assert found.dtype == np.float32
        np.testing.assert_array_equal(made.of(["c", "a"]), expected("c", "a"))
        assert made.encoded == 3
        assert made.of([]).shape == (0, WIDTH)
    assert encode.calls == [["b", "a"], ["c"]]


def test_they_stay_on_disk(tmp_path, encode):
    with Vectors(tmp_path, WIDTH, encode) as made:
        made.of(["a", "bb"])
    with Vectors(tmp_path, WIDTH, encode) as made:
        np.testing.assert_array_equal(made.of(["bb", "c", "a"]), expected("bb", "c", "a"))
        assert made.encoded == 1
    assert encode.calls[1:] == [["c"]]


def test_the_longest_texts_are_encoded_first_in_blocks(tmp_path, encode, monkeypatch):
    monkeypatch.setattr(vectors, "_BLOCK", 2)
    texts = ["a", "bbb", "cc", "ddddd"]
    with Vectors(tmp_path, WIDTH, encode) as made:
        np.testing.assert_array_equal(made.of(texts), expected(*texts))
    assert encode.calls == [["ddddd", "bbb"], ["cc", "a"]]


def test_what_was_written_before_a_kill_is_not_encoded_again(tmp_path, encode, monkeypatch):
    monkeypatch.setattr(vectors, "_BLOCK", 1)

    def dying(texts):
        if len(encode.calls) == 2:
            raise KeyboardInterrupt
        return encode(texts)

    with Vectors(tmp_path, WIDTH, dying) as made, pytest.raises(KeyboardInterrupt):
        made.of(["aaa", "bb", "c"])
    with Vectors(tmp_path, WIDTH, encode) as made:
        np.testing.assert_array_equal(made.of(["c", "bb", "aaa"]), expected("c", "bb", "aaa"))
        assert made.encoded == 1


@pytest.mark.parametrize("cut", [("vectors.f32", 5), ("texts.sha256", 3), ("texts.sha256", 17)])
def test_half_written_ends_are_cut_off(tmp_path, encode, cut):
    with Vectors(tmp_path, WIDTH, encode) as made:
        made.of(["a", "b", "c"])
    name, missing = cut
    os.truncate(tmp_path / name, (tmp_path / name).stat().st_size - missing)
    with Vectors(tmp_path, WIDTH, encode) as made:
        np.testing.assert_array_equal(made.of(["c", "b", "a"]), expected("c", "b", "a"))
        assert made.encoded == (2 if missing == 17 else 1)
    with Vectors(tmp_path, WIDTH, encode) as made:
        np.testing.assert_array_equal(made.of(["a", "c", "b"]), expected("a", "c", "b"))
        assert made.encoded == 0


def test_digests_without_vectors_count_nothing(tmp_path, encode):
    with Vectors(tmp_path, WIDTH, encode) as made:
        made.of(["a"])
    (tmp_path / "vectors.f32").unlink()
    with Vectors(tmp_path, WIDTH, encode) as made:
        np.testing.assert_array_equal(made.of(["b", "a"]), expected("b", "a"))


def test_vectors_that_are_not_finite_are_an_error_and_not_kept(tmp_path, encode):
    def damaged(texts):
        return np.full((len(texts), WIDTH), np.nan)

    with Vectors(tmp_path, WIDTH, damaged) as made, pytest.raises(UserError, match="not finite"):
        made.of(["a"])
    with Vectors(tmp_path, WIDTH, encode) as made:
        np.testing.assert_array_equal(made.of(["a"]), expected("a"))


def test_another_process_cannot_write_there_at_the_same_time(tmp_path, encode):
    program = (
        "import sys\nfrom pathlib import Path\nfrom piccolo_jax.evaluation.vectors import Vectors\n"
        "Vectors(Path(sys.argv[1]), 3, None)"
    )
    with Vectors(tmp_path, WIDTH, encode):
        done = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        assert "another evaluation of this model is writing there" in done.stderr
    Vectors(tmp_path, WIDTH, encode).__exit__()


def test_a_full_disk_leaves_what_was_whole(tmp_path, encode):
    with Vectors(tmp_path, WIDTH, encode) as made:
        made.of(["a"])
        made._digests = tmp_path / "none" / "texts"  # can't be opened
        with pytest.raises(OSError, match="No such file"):
            made.of(["b"])
    with Vectors(tmp_path, WIDTH, encode) as made:
        np.testing.assert_array_equal(made.of(["b", "a"]), expected("b", "a"))
